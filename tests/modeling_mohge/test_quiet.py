"""What other packages print when mohge imports and uses them: nothing that its user can do nothing about."""

import subprocess
import sys
from pathlib import Path

import pytest
from conversion_cases import make_source


def run_python(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("arguments", [["--help"], ["info", "tiny"]], ids=" ".join)
def test_commands_say_nothing_but_their_own(arguments, tmp_path):
    done = run_python(["-m", "mohge.commands.main", *arguments], tmp_path)
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


def test_only_known_lines_are_kept_quiet(tmp_path):
    code = """
import enum, logging
import mohge
torchao, pytree = logging.getLogger("torchao"), logging.getLogger("torch.utils._pytree")
message = "%s is an Enum subclass and is now natively supported"
torchao.warning("Failed to load a.so: reason")
torchao.warning("another %s", "line")
for module in ("torchao.kernels", "mine"):
    kind = enum.Enum("Kind", "A", module=module)
    pytree.warning(message, kind)
pytree.warning("another line")
"""
    lines = run_python(["-c", code], tmp_path).stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("another line")
    assert "Kind" in lines[1]
    assert lines[2].endswith("another line")
