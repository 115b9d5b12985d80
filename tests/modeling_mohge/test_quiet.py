"""What other packages print when mohge imports and uses them: nothing that its user can do nothing about."""

import enum
import logging
import subprocess
import sys
from pathlib import Path

from conversion_cases import make_source


def run_python(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_commands_say_nothing_but_their_own(tmp_path):
    done = run_python(["-m", "mohge.commands.main", "info", "tiny"], tmp_path)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr == ""


def test_conversion_says_nothing_about_configs_of_its_own(tmp_path):
    make_source("olmoe", tmp_path / "source", bos_token_id=1, eos_token_id=2)
    commands = [
        ["source", "groups", "--mode", "regroup", "--experts-per-group", "3"],
        ["groups", "again", "--mode", "export"],
    ]
    code = "from mohge.commands.main import main\n"
    code += f"for arguments in {commands}:\n    assert main(['convert', *arguments]) == 0"
    done = run_python(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr


def test_pinned_memory_is_no_news_without_an_accelerator(tmp_path):
    code = """
import mohge
from torch.utils.data import DataLoader

next(iter(DataLoader([1], pin_memory=True)))
"""
    done = run_python(["-W", "default", "-c", code], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


class Lines(logging.Handler):
    """The messages that come through the filters of a logger."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_only_known_lines_are_kept_quiet():
    torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
    passed = Lines()
    for logger in (torchao, pytree):
        logger.addHandler(passed)
    message = "%s is an Enum subclass and is now natively supported"
    torchao.warning("Failed to load a.so: reason")
    torchao.warning("another %s", "line")
    for module in ("torchao.kernels", "mine"):
        pytree.warning(message, enum.Enum("Kind", "A", module=module))
    pytree.warning("another line")
    for logger in (torchao, pytree):
        logger.removeHandler(passed)
    assert passed.lines == [
        "another line",
        "<enum 'Kind'> is an Enum subclass and is now natively supported",
        "another line",
    ]
