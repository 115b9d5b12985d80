"""`mohge train` and `mohge finetune` that cannot go on: they say why in one line, and what was good stays."""

import json
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator
from finetune_cases import finetune, make_workplace
from parallel_training_runs import SECONDS, Ranks
from pretrain_runs import (
    FAULTS,
    arguments,
    assert_same_weights,
    contents,
    make_inputs,
    run_command,
    run_command_alone_of_two,
    run_command_of_each,
    run_command_stopped_in_step,
    run_command_with_fault,
    run_command_with_little_space,
    train,
)
from safetensors.torch import load_file, save_file

from mohge.commands.main import main
from mohge.model_cards.writing import hold


SAVE = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def cache(inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", inputs / "cache")
        yield inputs / "cache"


@pytest.fixture(scope="module")
def whole(inputs) -> Path:
    """A run with checkpoints 2, 4 and 6."""
    return train(inputs, inputs / "whole", **SAVE)


@pytest.fixture
def begun(whole, tmp_path) -> Path:
    """That run, as if it had been killed in its fifth step."""
    shutil.copytree(whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    shutil.copy(whole / "recipe.yaml", tmp_path / "run")
    return tmp_path / "run"


def only_line(printed: str, command: str = "train") -> str:
    """The one line with which a command says why it ends."""
    assert "Traceback" not in printed
    (line,) = re.findall("^mohge.*", printed, re.MULTILINE)
    assert line.startswith(f"mohge {command}: ")
    return line


def fail(flags: list[str], capsys, status: int = 1) -> str:
    capsys.readouterr()
    assert main(["train", *flags]) == status
    return only_line(capsys.readouterr().err)


def break_weight(file: Path, name: str, value: float):
    state = load_file(file)
    state[name].view(-1)[3] = value
    save_file(state, file, metadata={"format": "pt"})


# Two runs in one folder.


def test_folder_of_a_run_that_goes_on_is_refused_and_free_when_that_is_killed(whole, inputs, cache, tmp_path, capsys):
    flags = arguments(inputs, tmp_path / "run", **SAVE)
    ranks = Ranks(1, tmp_path / "logs", run_command_stopped_in_step, 4, cache, *flags)
    wait_for(tmp_path / "run" / "checkpoint-2", ranks)
    before = contents(tmp_path / "run")
    for steps in (6, 8):
        line = fail([*flags, f"--max_steps={steps}"], capsys, status=2)
        assert re.search("another process is writing .*run: wait for it, or name another folder", line)
    assert contents(tmp_path / "run") == before
    ranks.signal(0, signal.SIGKILL)
    ranks.processes[0].join()
    assert main(["train", *flags]) == 0
    assert_same_weights(tmp_path / "run", whole)
    assert not list((tmp_path / "run").glob(".*"))
    assert ranks.wait() == [-signal.SIGKILL]


def test_folder_of_a_run_that_goes_on_is_refused_on_all_ranks(inputs, cache, tmp_path):
    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run" / ".lock", tmp_path / "run"):
        ranks = Ranks(2, tmp_path / "logs", run_command, cache, *arguments(inputs, tmp_path / "run"))
        assert ranks.wait() == [2, 2], ranks.errors()
    assert "another process is writing" in only_line(ranks.errors(0))


def wait_for(path: Path, ranks: Ranks):
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert ranks.processes[0].is_alive(), ranks.errors()
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Numbers that are none.


@pytest.mark.parametrize("logging_steps", [1, 100])
@pytest.mark.parametrize("fault", FAULTS)
def test_run_that_diverges_stops_and_keeps_its_last_checkpoint(
    fault, logging_steps, inputs, tmp_path, capsys, monkeypatch
):
    FAULTS[fault](monkeypatch.setattr, step=4)
    limits = {"logging_steps": logging_steps, "save_total_limit": 1, "save_steps": 3}
    line = fail(arguments(inputs, tmp_path / "run", **{**SAVE, **limits}), capsys)
    assert re.search(r"not finite at step \d: .*run/checkpoint-3 is kept: lower `learning_rate`", line)
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()] == ["checkpoint-3"]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    weights = load_file(tmp_path / "run" / "checkpoint-3" / "model.safetensors").values()
    assert all(weight.isfinite().all() for weight in weights)


def test_last_update_may_not_ruin_the_model(inputs, tmp_path, capsys, monkeypatch):
    FAULTS["weight"](monkeypatch.setattr, step=4)
    line = fail(arguments(inputs, tmp_path / "run"), capsys)
    assert "no checkpoint" in line
    assert not list((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}], ids=["all weights", "adapters"])
def test_fine_tuning_that_diverges_stops(flags, tmp_path, capsys, monkeypatch):
    make_workplace(tmp_path)
    FAULTS["weight"](monkeypatch.setattr, step=3)
    assert finetune(tmp_path, "run", save_steps=2, **flags) == 1
    assert "not finite at step" in only_line(capsys.readouterr().err, "finetune")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_rank_that_diverges_stops_all(inputs, cache, tmp_path):
    flags = arguments(inputs, tmp_path / "run", **SAVE, ddp_find_unused_parameters=True)
    ranks = Ranks(2, tmp_path / "logs", run_command_with_fault, "weight", 3, 1, cache, *flags)
    assert ranks.wait() == [1, 1], ranks.errors()
    assert "not finite at step" in only_line(ranks.errors(0))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_model_that_is_not_finite_is_not_trained(value, whole, inputs, tmp_path, capsys):
    shutil.copytree(whole / "checkpoint-2", tmp_path / "model")
    break_weight(tmp_path / "model" / "model.safetensors", "model.norm.weight", value)
    line = fail(arguments(inputs, tmp_path / "run", model=tmp_path / "model"), capsys, status=2)
    assert re.search(r"`model\.norm\.weight` of .*model is not finite", line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("last_step", [4, 6])
def test_checkpoint_whose_weights_are_not_finite_is_not_gone_on_from(last_step, begun, inputs, capsys):
    break_weight(begun / "checkpoint-4" / "model.safetensors", "model.norm.weight", float("nan"))
    (begun / "recipe.yaml").unlink()
    before = contents(begun)
    line = fail(arguments(inputs, begun, **{**SAVE, "max_steps": last_step}), capsys, status=2)
    assert re.search(r"`model\.norm\.weight` of .*checkpoint-4 is not finite", line)
    assert contents(begun) == before


def test_optimizer_that_is_not_finite_is_not_gone_on_with(begun, inputs, capsys):
    file = begun / "checkpoint-4" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][2]["exp_avg"].view(-1)[0] = float("nan")
    torch.save(state, file)
    line = fail(arguments(inputs, begun, **SAVE), capsys, status=2)
    assert re.search(r"`exp_avg 2` .*checkpoint-4 is not finite", line)


# Checkpoints that lack something or are broken.

STATE = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json"]


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_checkpoint_that_is_not_whole_is_refused(damage, name, begun, inputs, capsys):
    spoil(begun / "checkpoint-4" / name, damage)
    before = contents(begun)
    line = fail(arguments(inputs, begun, **SAVE), capsys, status=2)
    assert name in line
    assert "checkpoint-4" in line
    assert contents(begun) == before
    assert ("as `model`" in line) == (damage == "missing" and name.endswith(("pt", "pth")))


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_scale_of_the_loss_belongs_to_the_state_where_a_run_has_one(damage, begun, inputs, monkeypatch, capsys):
    """As with fp16 on a GPU."""
    scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(Accelerator, "scaler", property(lambda self: scaler, lambda *_: None), raising=False)
    torch.save(scaler.state_dict(), begun / "checkpoint-4" / "scaler.pt")
    spoil(begun / "checkpoint-4" / "scaler.pt", damage)
    line = fail(arguments(inputs, begun, **SAVE), capsys, status=2)
    assert f"checkpoint-4{' has no ' if damage == 'missing' else '/'}scaler.pt " in line


@pytest.mark.parametrize("name", ["model.safetensors", "record.json", "traffic.json"])
def test_checkpoint_that_is_broken_is_refused(name, begun, inputs, capsys):
    spoil(begun / "checkpoint-4" / name, "cut off")
    line = fail(arguments(inputs, begun, **SAVE), capsys, status=2)
    assert f"checkpoint-4/{name} " in line


@pytest.mark.parametrize("file", ["trainer_state.json", "record.json"])
def test_checkpoint_whose_state_has_something_else_is_refused(file, begun, inputs, capsys):
    path = begun / "checkpoint-4" / file
    content = json.loads(path.read_text())
    names = {"total_loss", "loss_since", "last_logged", "first_step", "batches", "ranks"}
    if file == "trainer_state.json":
        names = {"global_step", "epoch", "log_history", "save_steps", "train_batch_size", "best_model_checkpoint"}
    for name in names:
        for value in (-1.5, float("nan"), "x") if name not in ("total_loss", "best_model_checkpoint") else ([],):
            path.write_text(json.dumps(content | {name: value}))
            line = fail(arguments(inputs, begun, **SAVE), capsys, status=2)
            assert f"{file} cannot be read (`{name}` is {value!r})" in line


def test_checkpoint_of_an_adapter_that_is_broken_is_refused(tmp_path, capsys):
    make_workplace(tmp_path)
    assert finetune(tmp_path, "run", lora_rank=2, save_steps=2) == 0
    for name in ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    for name, damage in (
        ("adapter_model.safetensors", "cut off"),
        ("optimizer.pt", "cut off"),
        ("scheduler.pt", "missing"),
    ):
        spoil(tmp_path / "run" / "checkpoint-2" / name, damage)
        capsys.readouterr()
        assert finetune(tmp_path, "run", lora_rank=2, save_steps=2) == 2
        assert f"checkpoint-2{' has no ' if damage == 'missing' else '/'}{name}" in only_line(
            capsys.readouterr().err, "finetune"
        )
        shutil.copy(tmp_path / "run" / "checkpoint-2.whole" / name, tmp_path / "run" / "checkpoint-2")


def spoil(file: Path, damage: str):
    """Damage a file of a checkpoint, of which a whole copy stays beside it."""
    if not (copy := file.parent.with_suffix(".whole")).exists():
        shutil.copytree(file.parent, copy)
    size = {"missing": None, "cut off": file.stat().st_size // 2, "empty": 0}[damage]
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)


def test_run_that_saves_only_the_model_says_that_it_cannot_go_on(inputs, tmp_path, capsys, caplog):
    flags = arguments(inputs, tmp_path / "run", **SAVE, save_only_model=True)
    assert main(["train", *flags]) == 0
    assert "no checkpoint of this run can be resumed" in caplog.text
    line = fail([*flags, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-2")], capsys, status=2)
    assert "checkpoint-2 has no optimizer.pt (`save_only_model` leaves it out)" in line


# A full disk.


@pytest.mark.parametrize(("place", "saved"), [("/.initial", []), ("/checkpoint-4", [2]), ("", [2, 4])])
def test_full_disk_ends_the_run_and_leaves_the_last_checkpoint(place, saved, inputs, cache, tmp_path):
    flags = arguments(inputs, tmp_path / "run", **{**SAVE, "max_steps": 4})
    ranks = Ranks(1, tmp_path / "logs", run_command_with_little_space, place, cache, *flags)
    assert ranks.wait() == [1], ranks.errors()
    assert re.search(rf"run{place} cannot be written \(.*\): .*make room", only_line(ranks.errors()))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [f"checkpoint-{n}" for n in saved]
    assert not list((tmp_path / "run").glob(".*"))
    assert main(["train", *flags]) == 0


# Several ranks.


def test_error_of_one_rank_is_said_by_it_and_ends_the_other(inputs, cache, tmp_path):
    flags = [arguments(inputs, tmp_path / "run", datasets=data) for data in (inputs / "a.jsonl", "no/such/text.jsonl")]
    ranks = Ranks(2, tmp_path / "logs", run_command_of_each, cache, flags)
    assert ranks.wait() == [1, 2], ranks.errors()
    assert "no/such/text.jsonl does not exist" in only_line(ranks.errors(1))
    assert "lost touch with another rank" in only_line(ranks.errors(0))


def test_ranks_with_other_arguments_are_refused(inputs, cache, tmp_path):
    flags = [arguments(inputs, tmp_path / "run", max_steps=steps) for steps in (4, 2)]
    ranks = Ranks(2, tmp_path / "logs", run_command_of_each, cache, flags)
    assert ranks.wait(seconds=60) == [2, 2], ranks.errors()
    assert "`max_steps` is 4 on rank 0 and 2 on rank 1: give all ranks the same" in only_line(ranks.errors())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", ["port in use", "second missing", "first missing"])
def test_ranks_that_cannot_meet_say_so_in_one_line(case, inputs, cache, tmp_path):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        if case == "port in use":
            used.listen()
        port, rank = used.getsockname()[1], int(case == "first missing")
        if case == "second missing":
            used.close()
        flags = arguments(inputs, tmp_path / "run")
        ranks = Ranks(1, tmp_path / "logs", run_command_alone_of_two, rank, port, cache, *flags)
        assert ranks.wait(seconds=60) == [1], ranks.errors()
    message = (
        "of 2 ranks, 1 did not start within 3 sec" if case == "second missing" else "lost touch with another rank"
    )
    assert message in only_line(ranks.errors())
    assert not (tmp_path / "run").exists()
