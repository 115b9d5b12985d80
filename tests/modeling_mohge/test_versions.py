"""Versions of other packages: which ones are supported, and what is said about others."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from model_cases import make_model
from packaging.version import Version
from processes import WITHOUT_PACKAGE

from mohge.versions_mohge import OLDEST_SERVING_TRANSFORMERS, OLDEST_TRANSFORMERS, TESTED_TRANSFORMERS


ROOT = Path(__file__).parents[2]
NEWER = f"{Version(TESTED_TRANSFORMERS).major}.99.0.dev"


def run_python(code: str, cwd: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_oldest_version_is_the_one_that_is_installed_with_the_package():
    assert f'"transformers>={OLDEST_TRANSFORMERS},' in (ROOT / "pyproject.toml").read_text()


def test_tested_version_is_the_newest():
    installed = Version(transformers.__version__)
    if Path(sys.prefix).name == ".venv-floor":
        assert installed.release[:2] == Version(OLDEST_TRANSFORMERS).release
    else:
        assert f"{installed.major}.{installed.minor}" == TESTED_TRANSFORMERS, "set TESTED_TRANSFORMERS once tests pass"


def test_floors_are_those_of_the_ranges():
    command = [sys.executable, str(ROOT / ".ci" / "floors.py")]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    pins = dict(line.split(";")[0].strip().split("==") for line in printed)
    assert "torch" not in pins
    floors = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', (ROOT / "pyproject.toml").read_text().partition("dep")[2])
    assert pins == {name: floor for name, floor in floors if name != "torch"}
    assert {"transformers", "accelerate", "datasets", "peft", "triton", "lm-eval"} <= pins.keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    make_model().save_pretrained(path)
    return path


def test_newer_transformers_is_named_once_in_one_line(folder, tmp_path):
    """First by the code in a checkpoint, where the package is missing; then no more, and never where the user wants
    errors only."""
    code = f"""
import importlib
import sys

import transformers


def set_version(number):
    # On the module of this moment: transformers replaces its own when its models are imported.
    sys.modules["transformers"].__version__ = "{NEWER}" + number


set_version("0")
from transformers import AutoModelForCausalLM
from transformers.utils import logging

AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print("loaded", file=sys.stderr)
sys.meta_path.remove(missing)
set_version("0")
import mohge

mohge.MoHGEConfig
logging.set_verbosity_error()
set_version("1")
importlib.reload(mohge.versions_mohge)
logging.set_verbosity_warning()
set_version("2")
importlib.reload(mohge.versions_mohge)
"""
    done = run_python(WITHOUT_PACKAGE + code, tmp_path, folder)
    assert done.returncode == 0, done.stderr
    by_checkpoint, by_package = done.stderr.split("loaded\n")
    for text, number in ((by_checkpoint, "0"), (by_package, "2")):
        (line,) = (line for line in text.splitlines() if NEWER in line)
        assert f"{NEWER}{number} is installed" in line
        assert f"up to {TESTED_TRANSFORMERS}," in line
        assert f'pip install "transformers=={TESTED_TRANSFORMERS}.*"' in line


@pytest.mark.parametrize(
    ("modules", "oldest"),
    [
        (["mohge.registration"], OLDEST_TRANSFORMERS),
        (["model.configuration_mohge", "model.modeling_mohge"], OLDEST_SERVING_TRANSFORMERS),
    ],
    ids=["package", "checkpoint"],
)
def test_older_transformers_is_refused_in_one_line(modules, oldest, folder, tmp_path):
    """Whatever else that version lacks: here it has nothing but its number."""
    shutil.copytree(folder, tmp_path / "model")
    for version in ("4.40.0", f"{oldest}.0.dev0"):
        (tmp_path / "transformers.py").write_text(f"__version__ = '{version}'\n")
        for module in modules:
            done = run_python(f"import {module}", tmp_path)
            assert done.returncode == 1
            assert done.stderr.splitlines()[-1] == (
                f"ImportError: mohge needs transformers {oldest} or later, and {version} is installed: run "
                "`pip install -U transformers`"
            )
