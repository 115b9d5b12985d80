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

from mohge.versions_mohge import OLDEST_TRANSFORMERS, TESTED_TRANSFORMERS


ROOT = Path(__file__).parents[2]
NEWER = f"import transformers\ntransformers.__version__ = '{Version(TESTED_TRANSFORMERS).major}.99.0.dev0'\n"


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
    load = "from transformers import AutoModelForCausalLM\nimport sys\n"
    load += "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    for code in (NEWER + WITHOUT_PACKAGE + load, NEWER + load + "import mohge"):
        done = run_python(code, tmp_path, folder)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stderr.splitlines() if ".99.0.dev0" in line]
        assert len(lines) == 1, done.stderr
        assert f"up to {TESTED_TRANSFORMERS}," in lines[0]
        assert f'pip install "transformers=={TESTED_TRANSFORMERS}.*"' in lines[0]
    silent = "from transformers.utils import logging\nlogging.set_verbosity_error()\n"
    assert run_python(silent + NEWER + "import mohge", tmp_path).stderr == ""


@pytest.mark.parametrize("version", ["4.40.0", f"{OLDEST_TRANSFORMERS}.0.dev0"])
def test_older_transformers_is_refused_in_one_line(version, folder, tmp_path):
    """Whatever else that version lacks: here it has nothing but its number."""
    (tmp_path / "transformers.py").write_text(f"__version__ = '{version}'\n")
    shutil.copytree(folder, tmp_path / "model")
    for module in ("mohge", "model.configuration_mohge", "model.modeling_mohge"):
        done = run_python(f"import {module}", tmp_path)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == (
            f"ImportError: mohge needs transformers {OLDEST_TRANSFORMERS} or later, and {version} is installed: run "
            "`pip install -U transformers`"
        )
