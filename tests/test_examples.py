"""The examples run as they stand, with few steps and tokens, one on what another has made, and their commands in this
process; and so do the notebook's cells."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mohge.commands.main import main
from mohge.conversion.recipe import Recipe
from mohge.training.data import corpus, packing


ROOT = Path(__file__).parents[1]


def run_here(command: list[str], check: bool):
    assert (command[:3], check) == ([sys.executable, "-m", "mohge"], True)
    assert main(command[3:]) == 0


def example(monkeypatch, path: str, *arguments: str):
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    runpy.run_path(str(ROOT / path), run_name="__main__")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    texts, calibrate_with = corpus.standard_library_texts(500_000), Recipe.calibrate_with

    def calibrate_with_few(recipe, data_set):
        calibrate_with(recipe, data_set)
        recipe.calibration_tokens = 4096

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (corpus, packing):
            monkeypatch.setattr(module, "standard_library_texts", lambda: texts)
        monkeypatch.setattr(Recipe, "calibrate_with", calibrate_with_few)
        monkeypatch.setattr(subprocess, "run", run_here)
        monkeypatch.chdir(tmp_path_factory.mktemp("examples"))
        example(monkeypatch, "training/examples/pretrain.py", "first-model", "2")
        yield Path.cwd()


def test_serve(place, monkeypatch, capsys):
    example(monkeypatch, "conversion/examples/serve.py")
    assert "vllm serve padded" in capsys.readouterr().out


def test_compress(place, monkeypatch, capfd):
    example(monkeypatch, "conversion/examples/compress.py", "first-model", "compressed", "2")
    assert "parameters: " in capfd.readouterr().out
    assert (place / "compressed-recovered" / "config.json").exists()


def test_upcycle(place, monkeypatch, capfd):
    example(monkeypatch, "conversion/examples/upcycle.py", "tiny-llama", "upcycled", "2")
    assert "exact: True" in capfd.readouterr().out
    assert (place / "upcycled-trained" / "config.json").exists()


def test_mixture(place, monkeypatch, capfd):
    example(monkeypatch, "conversion/examples/mixture.py", "olmoe", "2")
    assert main(["convert", "olmoe", "groups", "--mode", "regroup", "--experts-per-group", "3"]) == 0
    assert "parameters              975,456 -> 975,456\n" in capfd.readouterr().out  # as README.md shows


def test_notebook(place, monkeypatch, capsys):
    notebook = json.loads((ROOT / "training/examples/first_steps.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("STEPS = 200", "STEPS = 2"), names)
    assert len(names["used"]) == names["tokens"].numel()
    assert all(64 * 4 <= count <= 256 * 4 for count in names["used"])
