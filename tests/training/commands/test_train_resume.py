"""`mohge train` that is cut off, whenever that may be, goes on by the same command as if nothing had happened."""

import re
import shutil
import signal
import time
from pathlib import Path

import datasets
import pytest
import yaml
from parallel_training_runs import SECONDS, Ranks
from pretrain_runs import (
    MOMENTS,
    arguments,
    assert_same_weights,
    contents,
    documents,
    history,
    log,
    make_inputs,
    run_command,
    run_command_interrupted_in_step,
    run_command_terminated_in_step,
    run_command_until,
    save_config,
    train,
    write_jsonl,
)
from transformers.trainer_utils import get_last_checkpoint

from mohge.commands.main import main


STEPS, SAVE = 8, {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}  # across checkpoints
ROUTER = {"router_type": "grouped_top_k", "num_groups_per_tok": None, "router_logit_ema_strength": 0.5}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Inputs of all runs: the model drops out and keeps a running mean, so that all its state counts."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), attention_dropout=0.2, **ROUTER)
    save_config(folder / "other")
    write_jsonl(folder / "b.jsonl", documents(8, seed=1))  # of 11 sequences: an epoch is 3 steps
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(inputs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", inputs / "cache")
        yield inputs / "cache"


def mixture(inputs: Path) -> list[str]:
    return [f"{{path: {inputs / name}.jsonl, weight: {weight}}}" for name, weight in (("a", 0.6), ("b", 0.4))]


KINDS = {
    "plain": lambda inputs: {},
    "accumulated": lambda inputs: {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "second epoch": lambda inputs: {"datasets": inputs / "b.jsonl"},
    "stream": lambda inputs: {"streaming": True, "shuffle_buffer": 5},
    "stream of a mixture": lambda inputs: {"streaming": True, "datasets": mixture(inputs)},
    "second epoch of a stream": lambda inputs: {"datasets": inputs / "b.jsonl", "streaming": True},
}


class Whole:
    """Uninterrupted runs, each trained when it is first asked for."""

    def __init__(self, inputs: Path):
        self.inputs, self._runs = inputs, {}

    def __call__(self, kind: str) -> Path:
        if kind not in self._runs:
            output = self.inputs / "whole" / kind
            self._runs[kind] = train(self.inputs, output, **SAVE, **KINDS[kind](self.inputs))
        return self._runs[kind]


@pytest.fixture(scope="module")
def whole(inputs) -> Whole:
    return Whole(inputs)


def command(inputs: Path, folder: Path, kind: str = "plain", **values) -> list[str]:
    """The command for a run in `folder / "run"`."""
    return arguments(inputs, folder / "run", **{**SAVE, **KINDS[kind](inputs), **values})


def cut_off(moment: str, folder: Path, cache: Path, flags: list[str]):
    ranks = Ranks(1, folder / "logs", run_command_until, moment, cache, *flags)
    assert ranks.wait() == [-signal.SIGKILL], ranks.errors()


def assert_same_run(actual: Path, expected: Path):
    assert without_times(actual) == without_times(expected)
    assert (actual / "traffic.json").read_text() == (expected / "traffic.json").read_text()
    assert_same_weights(actual, expected)


def without_times(run: Path) -> list[dict]:
    times = ("runtime", "per_second")
    return [{name: value for name, value in entry.items() if not name.endswith(times)} for entry in history(run)]


# Killed.


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_run_goes_on_as_if_uninterrupted(moment, whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path)
    cut_off(moment, tmp_path, cache, flags)
    last = get_last_checkpoint(tmp_path / "run")
    before = contents(Path(last)) if last else None
    assert main(["train", *flags]) == 0
    assert_same_run(tmp_path / "run", whole("plain"))
    assert not [path.name for path in (tmp_path / "run").glob(".*")]
    if last:
        assert contents(Path(last)) == before, "it went on from there"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_every_kind_of_run_goes_on_as_if_uninterrupted(kind, whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path, kind)
    cut_off("step 6", tmp_path, cache, flags)
    assert get_last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-4")
    assert main(["train", *flags]) == 0
    assert_same_run(tmp_path / "run", whole(kind))


def test_run_killed_again_and_again_arrives(whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path)
    for n, moment in enumerate(
        ("step 2", "weights of checkpoint 4 are being written", "step 6", "after the last step")
    ):
        cut_off(moment, tmp_path / str(n), cache, flags)
    assert main(["train", *flags]) == 0
    assert_same_run(tmp_path / "run", whole("plain"))


def test_run_killed_from_outside_while_a_checkpoint_is_written(whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path)
    for attempt in range(10):
        ranks = Ranks(1, tmp_path / f"logs_{attempt}", run_command, cache, *flags)
        deadline = time.monotonic() + SECONDS
        while not (tmp_path / "run" / ".incomplete").exists() and ranks.processes[0].is_alive():
            assert time.monotonic() < deadline
        ranks.processes[0].kill()
        if ranks.wait() == [-signal.SIGKILL]:
            break
        shutil.rmtree(tmp_path / "run")  # on a busy machine this process may have slept past the end of the run
    else:
        pytest.fail(f"the run always ended before it could be killed: {ranks.errors()}")
    Ranks(1, tmp_path / "again", run_command, cache, *flags).succeed()
    assert_same_run(tmp_path / "run", whole("plain"))


@pytest.mark.parametrize(
    ("moment", "changed"),
    [("the initial model is being written", {"model": "other"}), ("step 2", {"seed": 1})],
    ids=["initial model, other model", "step 2, other seed"],
)
def test_run_without_checkpoint_may_begin_again_otherwise(changed, moment, inputs, cache, tmp_path):
    cut_off(moment, tmp_path, cache, command(inputs, tmp_path))
    values = {name: inputs / value if name == "model" else value for name, value in changed.items()}
    assert main(["train", *command(inputs, tmp_path, **values)]) == 0
    assert_same_run(tmp_path / "run", train(inputs, tmp_path / "fresh", **{**SAVE, **values}))


def test_state_of_dropout_and_router_counts(whole, inputs, cache, tmp_path):
    """Or else the tests above would not notice that they are lost."""
    flags = command(inputs, tmp_path)
    cut_off("step 6", tmp_path, cache, flags)
    shutil.copy(tmp_path / "run" / "checkpoint-2" / "rng_state.pth", tmp_path / "run" / "checkpoint-4")
    assert main(["train", *flags]) == 0
    ours, theirs = ([entry["loss"] for entry in log(run)] for run in (tmp_path / "run", whole("plain")))
    assert ours[0] == theirs[0]
    assert ours[1] != theirs[1]


# Terminated.


@pytest.mark.parametrize("kind", ["plain", "accumulated", "stream of a mixture"])
def test_terminated_run_saves_the_step_that_was_running(kind, whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path, kind)
    ranks = Ranks(1, tmp_path / "logs", run_command_terminated_in_step, 5, None, cache, *flags)
    assert ranks.wait() == [1]
    lines = re.findall("^mohge.*", ranks.errors(), re.MULTILINE)
    checkpoint = tmp_path / "run" / "checkpoint-5"
    assert lines == [f"mohge train: stopped, the same command goes on from here: {checkpoint}"]
    assert "Traceback" not in ranks.errors()
    assert get_last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-5")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert main(["train", *flags]) == 0
    assert_same_run(tmp_path / "run", whole(kind))


def test_interrupted_run_saves_the_step_that_was_running(whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path)
    ranks = Ranks(1, tmp_path / "logs", run_command_interrupted_in_step, 5, cache, *flags)
    assert ranks.wait() == [1]
    checkpoint = tmp_path / "run" / "checkpoint-5"
    assert [line for line in ranks.errors().splitlines() if "stop" in line] == [
        "stopping after this step, with a checkpoint; Ctrl-C once more stops at once",
        f"mohge train: stopped, the same command goes on from here: {checkpoint}",
    ]
    assert "Traceback" not in ranks.errors()
    assert main(["train", *flags]) == 0
    assert_same_run(tmp_path / "run", whole("plain"))


def test_terminated_run_without_checkpoints_of_its_own_goes_on(whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path, save_strategy="no")
    ranks = Ranks(1, tmp_path / "logs", run_command_terminated_in_step, 3, None, cache, *flags)
    assert ranks.wait() == [1], ranks.errors()
    assert main(["train", *flags]) == 0
    assert_same_run(tmp_path / "run", whole("plain"))


def test_run_terminated_in_its_last_step_ends_well(whole, inputs, cache, tmp_path):
    flags = command(inputs, tmp_path)
    Ranks(1, tmp_path / "logs", run_command_terminated_in_step, STEPS, None, cache, *flags).succeed()
    assert_same_run(tmp_path / "run", whole("plain"))


def test_termination_of_one_rank_stops_both_after_the_same_step(inputs, cache, tmp_path):
    values = {"per_device_train_batch_size": 2, "ddp_find_unused_parameters": True}
    straight = arguments(inputs, tmp_path / "straight", **SAVE, **values)
    Ranks(2, tmp_path / "logs_straight", run_command, cache, *straight).succeed()
    flags = command(inputs, tmp_path, **values)
    ranks = Ranks(2, tmp_path / "logs", run_command_terminated_in_step, 3, 1, cache, *flags)
    assert ranks.wait() == [1, 1], ranks.errors()
    assert get_last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")
    Ranks(2, tmp_path / "again", run_command, cache, *flags).succeed()
    assert_same_run(tmp_path / "run", tmp_path / "straight")


EPOCHS = {
    "logs and evaluations by epoch": {"logging_strategy": "epoch", "eval_strategy": "epoch"},
    "evaluations by epoch that set the rate": {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau"},
    "logs by epoch, in parts": {
        "logging_strategy": "epoch",
        "logging_first_step": True,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "save_steps": 6,
        "max_steps": 13,
    },
}


@pytest.mark.parametrize("case", EPOCHS)
def test_run_goes_on_from_each_of_its_checkpoints(case, inputs, tmp_path):
    """An epoch has 3 steps (6 in parts), so that checkpoints are at the end of one, within one, and at the end."""
    values = {**SAVE, "datasets": inputs / "b.jsonl", "eval_datasets": inputs / "b.jsonl", "save_steps": 3}
    straight = train(inputs, tmp_path / "straight", **{**values, **EPOCHS[case]})
    checkpoints = sorted(path.name for path in straight.glob("checkpoint-*"))
    assert len(checkpoints) == 3
    for name in checkpoints:
        run = tmp_path / name
        shutil.copytree(straight / name, run / name)
        shutil.copy(straight / "recipe.yaml", run)
        assert_same_run(train(inputs, run, **{**values, **EPOCHS[case]}), straight)


# Going on by hand, and what is refused.


def test_finished_run_goes_on_with_more_steps_from_a_checkpoint(inputs, tmp_path):
    constant = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    short = train(inputs, tmp_path / "short", max_steps=4, **constant)
    straight = train(inputs, tmp_path / "straight", max_steps=6, **constant)
    for output, checkpoint in ((tmp_path / "elsewhere", short / "checkpoint-4"), (short, True)):
        train(inputs, output, max_steps=6, resume_from_checkpoint=checkpoint, **constant)
        assert_same_run(output, straight)
        assert "resume_from_checkpoint" not in yaml.safe_load((output / "recipe.yaml").read_text())


def refuse(flags: list[str], folder: Path, capsys) -> str:
    """The one line of a refusal that changes nothing in `folder`."""
    before = contents(folder)
    capsys.readouterr()
    assert main(["train", *flags]) == 2
    assert contents(folder) == before
    (line,) = re.findall("^mohge.*", capsys.readouterr().err, re.MULTILINE)
    return line


CHANGES = {
    "learning_rate": 2e-2,
    "max_steps": 9,
    "seed": 1,
    "gradient_accumulation_steps": 2,
    "sequence_length": 16,
    "streaming": True,
    "bf16": True,
    "lr_scheduler_type": "cosine",
}


@pytest.mark.parametrize("name", [*CHANGES, "model", "datasets", "tokenizer"])
def test_unfinished_run_does_not_go_on_otherwise(name, whole, inputs, tmp_path, capsys):
    shutil.copytree(whole("plain") / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    shutil.copy(whole("plain") / "recipe.yaml", tmp_path / "run")
    other = {"model": inputs / "other", "datasets": inputs / "b.jsonl", "tokenizer": None}
    line = refuse(command(inputs, tmp_path, **{name: {**CHANGES, **other}[name]}), tmp_path, capsys)
    assert re.search(rf"`output_dir` .* holds a run with `{name}` ", line)


def test_reports_and_limits_may_change(whole, inputs, tmp_path):
    shutil.copytree(whole("plain") / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    shutil.copy(whole("plain") / "recipe.yaml", tmp_path / "run")
    assert main(["train", *command(inputs, tmp_path, save_total_limit=1, disable_tqdm=False)]) == 0
    assert_same_run(tmp_path / "run", whole("plain"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize("values", [{}, {"max_steps": 9}, {"resume_from_checkpoint": False}], ids=str)
def test_finished_run_is_left_alone(values, whole, inputs, tmp_path, capsys):
    run = shutil.copytree(whole("plain"), tmp_path / "run")
    line = refuse(arguments(inputs, run, **{**SAVE, **values}), run, capsys)
    assert re.search(
        r"`output_dir` .* holds a model already: name another folder, or .*`resume_from_checkpoint`", line
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model": "other"}, "is a checkpoint of another config: `"),
        ({"datasets": "no/such/text.jsonl"}, "no/such/text.jsonl does not exist"),
        ({"tokenizer": "no/such/tokenizer"}, "no/such/tokenizer"),
        ({"resume_from_checkpoint": "no/checkpoint-4"}, "`resume_from_checkpoint` is no/checkpoint-4"),
    ],
    ids=["other model", "missing text", "missing tokenizer", "missing checkpoint"],
)
def test_failure_to_go_on_by_hand_leaves_the_run_alone(values, reason, whole, inputs, tmp_path, capsys):
    run = shutil.copytree(whole("plain"), tmp_path / "run")
    values = {name: inputs / value if value == "other" else value for name, value in values.items()}
    flags = arguments(inputs, run, **{**SAVE, "resume_from_checkpoint": run / "checkpoint-4", **values})
    assert reason in refuse(flags, run, capsys)


def test_folder_of_another_model_is_left_alone(inputs, tmp_path, capsys):
    save_config(tmp_path / "run")
    line = refuse(command(inputs, tmp_path), tmp_path, capsys)
    assert re.search("`output_dir` .* holds a model already", line)
