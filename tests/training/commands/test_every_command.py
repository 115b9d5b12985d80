"""What every command does when there is no room for what it writes, and with a name that is nothing."""

import re
import resource
import socket
import sys
from pathlib import Path

import datasets
import pytest
from conversion_cases import COPY, make_source
from finetune_cases import finetune, make_workplace
from huggingface_hub import constants
from parallel_training_runs import Ranks
from pretrain_runs import contents

from mohge.commands.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, `base`, an adapter on it, `lora`, `text.txt` and a dense model, `dense`."""
    place = make_workplace(tmp_path_factory.mktemp("place"))
    assert finetune(place, "lora", lora_rank=2, max_steps=1) == 0
    make_source("llama", place / "dense", hidden_size=128)
    return place


def run_with_little_space(*command: str):
    """A command for which no file can grow beyond 20 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    sys.exit(main(list(command)))


WRITING = {
    "convert": ["convert", "PLACE/dense", "OUT", *COPY],
    "merge": ["finetune", "--model", "PLACE/lora", "--merge", "OUT"],
    "report": ["report", "PLACE/lora", "--output", "OUT"],
}


def fill(command: list[str], place: Path, out: Path) -> list[str]:
    return [part.replace("PLACE", str(place)).replace("OUT", str(out)) for part in command]


def only_line(printed: str) -> str:
    assert "Traceback" not in printed
    (line,) = re.findall("^mohge.*", printed, re.MULTILINE)
    return line


def test_full_disk_is_a_failed_run_that_leaves_nothing_in_the_way(place, tmp_path):
    commands = {name: fill(command, place, tmp_path / name / "out") for name, command in WRITING.items()}
    for name in commands:
        (tmp_path / name).mkdir()
    ranks = {
        name: Ranks(1, tmp_path / "logs" / name, run_with_little_space, *command) for name, command in commands.items()
    }
    for name, command in commands.items():
        assert ranks[name].wait() == [1], (name, ranks[name].errors())
        line = only_line(ranks[name].errors())
        assert re.search("File too large.*: make room", line), line
        left = {path.name for path in (tmp_path / name).iterdir()}
        assert left == ({".out.partial", ".out.scratch"} if name == "convert" else set())
        assert ("goes on from here" in line) == bool(left)
        assert main(command) == 0
        assert [path.name for path in (tmp_path / name).iterdir()] == ["out"]


RUN = ["--sequence_length", "16", "--max_steps", "1", "--use_cpu"]
NAMES = ["5", "null", "a b/c", "a/b/c", "-", "../nowhere", "a//b", "nobody/x.jsonl", "/nowhere", "a/b\n", "[]"]
NAMING = {
    "train model": ["train", "--model", "NAME", "--datasets", "PLACE/text.txt", "--output_dir", "OUT", *RUN],
    "train text": ["train", "--model", "PLACE/base", "--datasets", "NAME", "--output_dir", "OUT", *RUN],
    "train tokenizer": [
        *("train", "--model", "PLACE/base", "--datasets", "PLACE/text.txt", "--output_dir", "OUT", *RUN),
        *("--tokenizer", "NAME"),
    ],
    "finetune model": ["finetune", "--model", "NAME", "--datasets", "PLACE/text.txt", "--output_dir", "OUT", *RUN],
    "finetune text": ["finetune", "--model", "PLACE/base", "--datasets", "NAME", "--output_dir", "OUT", *RUN],
    "teacher": [
        *("finetune", "--model", "PLACE/base", "--datasets", "PLACE/text.txt", "--output_dir", "OUT", *RUN),
        *("--distill", "NAME"),
    ],
    "merge": ["finetune", "--model", "NAME", "--merge", "OUT"],
    "generate": ["generate", "NAME", "text"],
    "quantize": ["finetune", "--model", "NAME", "--quantize", "int8", "--output_dir", "OUT", *RUN],
    "eval model": ["eval", "NAME", "--datasets", "PLACE/text.txt"],
    "eval text": ["eval", "PLACE/base", "--datasets", "NAME"],
    "report": ["report", "NAME", "--output", "OUT"],
    "report text": ["report", "PLACE/lora", "--text", "NAME", "--output", "OUT"],
    "convert": ["convert", "NAME", "OUT", *COPY],
    "convert text": ["convert", "PLACE/dense", "OUT", *COPY, "--calibration", "NAME"],
    "info": ["info", "NAME"],
    "place": ["place", "NAME", "--devices", "2"],
    "push": ["push", "NAME", "someone/model", "--dry-run"],
    "serve-check": ["serve-check", "NAME", "--engine-python", sys.executable],
    "push repository": ["push", "PLACE/base", "NAME", "--dry-run"],
}


@pytest.mark.parametrize("naming", NAMING)
def test_name_that_is_neither_there_nor_of_the_hub_is_refused_at_once(naming, place, tmp_path, monkeypatch, capsys):
    """Without a word to the Hub."""
    asked = []

    def ask(host, *args, **kwargs):
        asked.append(host)
        raise OSError("there is no network")

    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", ask)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
    before = contents(place)
    for name in NAMES:
        if naming == "push repository" and name in ("5", "null", "nobody/x.jsonl"):  # which can be repositories
            continue
        command = [part.replace("NAME", name) for part in fill(NAMING[naming], place, tmp_path / "out")]
        capsys.readouterr()
        assert main(command) == 2, name
        only_line(capsys.readouterr().err)
        assert not asked, name
    assert contents(place) == before
    assert not list(tmp_path.iterdir())
