"""What is answered at once: help, versions and wrong usage, without torch and transformers, which take seconds."""

import json
import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mohge.commands.main import COMMANDS, main, make_parser


ROOT = Path(__file__).parents[3]
TRY = """
import contextlib, io, json, sys

commands = json.loads(sys.argv[1])
from mohge.commands.main import main

results = []
for command in commands:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = main(command)
        except SystemExit as end:
            status = end.code
    heavy = sorted({"torch", "transformers", "datasets", "accelerate", "numpy"} & sys.modules.keys())
    results.append([status, heavy, printed.getvalue()])
print(json.dumps(results))
"""
NAMES = ["info", "convert", "place", "simulate", "eval", "serve-check", "generate", "chat"]
NAMES += ["report", "train", "finetune", "push", "demo"]
QUICK = {
    "help": (["--help"], 0, "COMMAND"),
    "version": (["--version"], 0, "mohge 0."),
    "nothing": ([], 2, "required: COMMAND"),
    "command": (["tarin"], 2, "did you mean train?"),
    "option": (["convert", "--widhts", "3"], 2, "did you mean --widths?"),
    "router": (["demo", "--router", "tow_level"], 2, "did you mean two_level?"),
    "trainer's flag": (["train", "--learning_rat", "3"], 2, "did you mean --learning_rate?"),
    "our flag": (["finetune", "--lora-rnk=3"], 2, "did you mean --lora_rank?"),
    "path": (["info", "runs/tniy"], 2, "did you mean runs/tiny?"),
    "folder": (["eval", "rnus/tiny", "--datasets", "a"], 2, "did you mean runs/tiny?"),
    "not in the folder": (["report", "runs/other"], 2, "runs/other does not exist"),
    "model to train": (["train", "--model", "runs/tniy"], 2, "did you mean runs/tiny?"),
    "recipe to train": (["train", "tniy"], 2, "did you mean tiny?"),
    "folder that is a file": (["train", "--model", "bda.yaml/a/tiny"], 2, "bda.yaml/a/tiny does not exist"),
    "model in a recipe": (["train", "bad.yaml"], 2, "did you mean runs/tiny?"),
    "text to train on": (
        ["train", "tiny", "--datasets", "standard-library", "tx.jsonl"],
        2,
        "`datasets`: tx.jsonl",
    ),
    "held-out text": (
        ["finetune", "--model", "tiny", "--eval-datasets={path: tx}"],
        2,
        "`eval_datasets`: tx does",
    ),
    "tokenizer": (["train", "tiny", "--tokenizer", "runs/other"], 2, "give the folder of a tokenizer"),
    "teacher": (["finetune", "--model", "runs/tiny", "--distill", "runs/tniy"], 2, "did you mean runs/tiny?"),
    "text to evaluate on": (["eval", "runs/tiny", "--datasets", "tx.jsonl"], 2, "`--datasets`: tx.jsonl does not"),
    "text of a report": (["report", "runs/tiny", "--text", "tx.jsonl"], 2, "`--text`: tx.jsonl does not exist"),
    "text of a conversion": (
        ["convert", "runs/tiny", "out", "--calibration", "tx.txt"],
        2,
        "tx.txt does not exist",
    ),
    "recipe": (["place", "tinny", "--devices", "2"], 2, "did you mean tiny?"),
    **{f"{name} --help": ([name, "--help"], 0, f"usage: mohge {name}") for name in NAMES},
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> dict[str, list]:
    """What each command gives, all in one process without network, where `runs/tiny` is a folder."""
    place = tmp_path_factory.mktemp("place")
    (place / "runs" / "tiny").mkdir(parents=True)
    (place / "bad.yaml").write_text("model: runs/tniy\n")
    commands = json.dumps([command for command, _, _ in QUICK.values()])
    done = subprocess.run([sys.executable, "-c", TRY, commands], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(QUICK, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", QUICK)
def test_answered_without_importing_what_runs(name, quick):
    status, heavy, printed = quick[name]
    _, expected, text = QUICK[name]
    assert (status, heavy) == (expected, []), printed
    assert text in printed
    assert "did you mean bad.yaml?" not in printed
    if expected:
        assert "Traceback" not in printed
        assert len([line for line in printed.splitlines() if line.startswith("mohge")]) == 1
    assert not {"\r", "\x1b"} & {*printed}


def test_every_command_has_a_parser():
    parser = make_parser()
    (commands,) = (action for action in parser._actions if action.dest == "command")
    assert [*commands.choices] == NAMES
    assert len(COMMANDS) == len(NAMES)


def test_help_of_training_begins_with_our_flags(quick):
    printed = quick["train --help"][2]
    places = [
        printed.index(f"\n{text}") for text in ("flags of mohge:", "most used flags", "Optimizer:", "Dataloader:")
    ]
    assert places == sorted(places)
    assert printed.index("  --sequence_length") < printed.index("  --learning_rate") < printed.index("  --adam_beta1")
    assert re.search(r"--logging_steps X .*?\(default: 10\)\n  --eval_strategy", printed, re.DOTALL)


ORDERS = {
    "package first": "import mohge\nfrom transformers import AutoConfig, AutoModelForCausalLM",
    "between": "from transformers import AutoConfig\nimport mohge\nfrom transformers import AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_model_in_any_order_of_imports(order):
    code = f"""
import sys
{ORDERS[order]}

assert "mohge.modeling_mohge" not in sys.modules
config = AutoConfig.from_pretrained({str(ROOT / "model_cards" / "tiny")!r})
import torch

with torch.device("meta"):
    print(type(AutoModelForCausalLM.from_config(config)).__name__, isinstance(config, mohge.MoHGEConfig))
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

assert [*CONFIG_MAPPING].count("mohge") == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "MoHGEForCausalLM True\n"


def test_auto_classes_know_the_model_although_their_table_is_another(tmp_path):
    """What a later transformers may change: the package then registers as any other does, when it is imported."""
    place = Path(find_spec("transformers").origin).parent
    for folder in (place, place / "models", place / "models" / "auto"):  # all as it is, but for one file
        copy = tmp_path / folder.relative_to(place.parent)
        copy.mkdir()
        for entry in folder.iterdir():
            if entry not in (place / "models", place / "models" / "auto"):
                (copy / entry.name).symlink_to(entry)
    file = tmp_path / "transformers" / "models" / "auto" / "configuration_auto.py"
    text = file.read_text(encoding="utf-8")
    file.unlink()
    file.write_text(text.replace("self._mapping", "self._table").replace("self._modules", "self._loaded"))
    code = f"""
import mohge
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

assert not hasattr(CONFIG_MAPPING, "_mapping")
config = AutoConfig.from_pretrained({str(ROOT / "model_cards" / "tiny")!r})
import torch

with torch.device("meta"):
    print(type(AutoModelForCausalLM.from_config(config)).__name__, isinstance(config, mohge.MoHGEConfig))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "MoHGEForCausalLM True\n"


# Ctrl-C.


@pytest.fixture
def _listens():
    """As in a terminal; tests in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(*args):
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_in_a_package(*args):
    """Such as numpy, of which half has been imported."""
    try:
        interrupted()
    except KeyboardInterrupt:
        raise ImportError("cannot load module more than once per process") from None


@pytest.mark.usefixtures("_listens")
@pytest.mark.parametrize("run", [interrupted, interrupted_in_a_package])
def test_interrupt_ends_any_command_with_one_line(run, monkeypatch, capsys):
    for command, left in (
        (["info", "tiny"], "nothing was written"),
        (["convert", str(ROOT / "model_cards" / "tiny"), "out"], "the same command goes on from here"),
        (["train", "tiny"], "nothing was written"),
    ):
        monkeypatch.setattr(f"mohge.commands.{command[0]}.run", run)
        assert main(command) == 1
        assert capsys.readouterr().err == f"\nmohge {command[0]}: interrupted, {left}\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_before_the_first_step_says_that_there_is_no_checkpoint(tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mohge.commands.train.load_config", interrupt)
    assert main(["train", "tiny", "--output_dir", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == "\nmohge train: interrupted, no checkpoint was there yet\n"
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    assert main(["train", "tiny", "--output_dir", str(tmp_path / "run")]) == 1
    assert f"the same command goes on from {tmp_path / 'run' / 'checkpoint-3'}" in capsys.readouterr().err


def test_completion_is_made_of_the_parser():
    shtab = pytest.importorskip("shtab")
    script = shtab.complete(make_parser(), "bash")
    assert all(word in script for word in ("serve-check", "--learning_rate", "--experts-per-group", "grouped_top_k"))
