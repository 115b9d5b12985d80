"""Callbacks and metrics in a Trainer of one's own, and the record of each expert's load that MoHGETrainer keeps."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from parallel_training_runs import Ranks
from trainer_runs import LENGTHS, config, logged, train
from transformers import Trainer, TrainerCallback

from mohge.training import (
    MoHGETrainer,
    PeerWatchdog,
    RouterLogCallback,
    RouterScheduleCallback,
    RouterTraffic,
    StopSignalCallback,
)
from mohge.training.loop import trainer


CONFIG = config("load_balancing", router_z_loss_coef=0.5)
TOKENS = sum(LENGTHS)


class AtStep(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.action()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


# In a plain Trainer.


def test_nothing_of_it_needs_the_trainer_of_this_package():
    script = """
import sys
from mohge.training import RouterStatistics, RouterTraffic
assert "transformers.trainer" not in sys.modules
from mohge.training import PeerWatchdog, RouterLogCallback, RouterScheduleCallback, StopSignalCallback
assert "mohge.training.loop.trainer" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_callbacks_do_not_change_what_is_learnt(tmp_path):
    callbacks = [RouterScheduleCallback(), RouterLogCallback(), PeerWatchdog(), StopSignalCallback()]
    with_them = train(CONFIG, str(tmp_path), steps=3, callbacks=callbacks)
    without = train(CONFIG, str(tmp_path), steps=3)
    assert logged(with_them) == logged(without)
    assert logged(with_them)[-1] < logged(with_them)[0]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_log_callback_logs_what_the_own_trainer_logs(accumulation, tmp_path):
    options = {"folder": str(tmp_path), "accumulation": accumulation, "steps": 4, "logging_steps": 2}
    plain = train(CONFIG, callbacks=[RouterLogCallback()], **options).state.log_history
    own = train(CONFIG, trainer_class=MoHGETrainer, **options).state.log_history
    for ours, theirs in zip(plain[:2], own[:2], strict=True):
        figures = {name for name in ours if name.startswith("router/")}
        assert figures == {name for name in theirs if name.startswith("router/")} - {
            "router/load_balancing",
            "router/z",
        }
        assert len(figures) == 7
        assert {name: ours[name] for name in figures} == {name: theirs[name] for name in figures}


def log_across_checkpoints(folder: Path, ranks: int = 2):
    """Log every third step, of a run with a checkpoint every second one, and of one that goes on from the first."""
    run = {"model_config": CONFIG, "ranks": ranks, "steps": 6, "logging_steps": 3, "logging_strategy": "steps"}
    run |= {"save_strategy": "steps", "save_steps": 2}
    for name, start in (("straight", None), ("resumed", folder / "straight" / "checkpoint-2")):
        callbacks = [RouterLogCallback()]
        own = train(folder=str(folder / name), callbacks=callbacks, resume_from_checkpoint=start, **run)
        own.save_state()


@pytest.mark.parametrize("ranks", [1, 2])
def test_log_callback_counts_the_steps_before_a_checkpoint(ranks, tmp_path):
    if ranks == 1:
        log_across_checkpoints(tmp_path, ranks)
    else:
        Ranks(ranks, tmp_path / "logs", log_across_checkpoints, tmp_path).succeed()
    straight, resumed = (
        [
            {key: value for key, value in entry.items() if key.startswith("router/")}
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        ]
        for name in ("straight", "resumed")
    )
    assert resumed == straight
    assert len(straight[0]) == len(straight[1]) == 7


class RecordTraffic(TrainerCallback):
    """Records every forward pass, as a user would."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.traffic = RouterTraffic(model.config)
        model.register_forward_hook(self.record, with_kwargs=True)

    def record(self, model, args, kwargs, outputs):
        self.traffic.add(outputs.tokens_per_expert, kwargs["attention_mask"].sum())


def test_recorded_traffic_is_that_of_the_own_trainer(tmp_path):
    recording = RecordTraffic()
    train(CONFIG, str(tmp_path / "plain"), accumulation=2, callbacks=[recording])
    train(CONFIG, str(tmp_path / "own"), MoHGETrainer, accumulation=2)
    expected = RouterTraffic.load(tmp_path / "own" / "traffic.json").records
    assert sum(tokens for tokens, _ in expected) == 2 * TOKENS
    assert recording.traffic.records == expected


@pytest.fixture
def handler():
    """A handler of one's own: if that of the callback is missing, the tests go on and fail."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("save_strategy", ["no", "steps"])
def test_signal_stops_a_plain_trainer_with_a_checkpoint(save_strategy, handler, tmp_path):
    mine = signal.getsignal(signal.SIGTERM)
    stop = StopSignalCallback()
    options = {"steps": 4, "accumulation": 2, "save_strategy": save_strategy}
    stopped = train(CONFIG, str(tmp_path / "run"), callbacks=[stop, AtStep(2, terminate)], **options)
    assert stop.stopped
    assert not handler
    assert stopped.state.global_step == 2
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) is mine

    resume = str(tmp_path / "run" / "checkpoint-2")
    resumed = train(CONFIG, str(tmp_path / "run"), resume_from_checkpoint=resume, **options)
    straight = train(CONFIG, str(tmp_path / "straight"), **options)
    assert logged(resumed) == logged(straight)
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_stopped_trainer_trains_on_when_asked_again(handler, tmp_path):
    stop = StopSignalCallback()
    stopped = train(CONFIG, str(tmp_path), callbacks=[stop, AtStep(2, terminate)], steps=4)
    assert stop.stopped
    stopped.train(resume_from_checkpoint=True)
    assert stopped.state.global_step == 4
    assert not stop.stopped


def test_without_a_signal_nothing_is_stopped(handler, tmp_path):
    mine = signal.getsignal(signal.SIGTERM)
    stop = StopSignalCallback()
    assert train(CONFIG, str(tmp_path), callbacks=[stop]).state.global_step == 2
    assert not stop.stopped
    assert signal.getsignal(signal.SIGTERM) is mine


def test_training_in_a_thread_does_without_signals(tmp_path):
    steps = []

    def run():
        steps.append(train(CONFIG, str(tmp_path), callbacks=[StopSignalCallback()]).state.global_step)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert steps == [2]


# What a run says, and how fast it is.


class Clock(TrainerCallback):
    """A step takes one second, and an evaluation or a checkpoint a hundred."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_step_end(self, args, state, control, **kwargs):
        self.now += 1

    def on_evaluate(self, args, state, control, **kwargs):
        self.now += 100

    on_save = on_evaluate


def test_evaluations_and_checkpoints_are_left_out_of_the_speed_of_training(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(trainer, "time", clock)
    apart = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = train(CONFIG, str(tmp_path), MoHGETrainer, callbacks=[clock], steps=4, logging_steps=2, **apart)
    speeds = [entry["tokens_per_second"] for entry in run.state.log_history if "loss" in entry]
    assert speeds == [TOKENS, TOKENS]


# The record of each expert's load.


def loads(history: list[dict]) -> dict[int, list[list[int]]]:
    return {entry["step"]: entry["router_load"] for entry in history if "router_load" in entry}


def assert_counts(found: dict[int, list[list[int]]], steps: int):
    """Both layers, all 6 experts, 2 for each token of `steps` steps."""
    for load in found.values():
        assert [len(layer) for layer in load] == [6, 6]
        assert all(isinstance(count, int) and count >= 0 for layer in load for count in layer)
        assert [sum(layer) for layer in load] == [2 * TOKENS * steps] * 2


@pytest.mark.parametrize("accumulation", [1, 4])
def test_load_counts_the_tokens_since_the_last_log(accumulation, tmp_path):
    run = train(CONFIG, str(tmp_path), MoHGETrainer, accumulation, steps=6, logging_steps=2)
    found = loads(run.state.log_history)
    assert list(found) == [2, 4, 6]
    assert_counts(found, steps=2)
    assert len({str(load) for load in found.values()}) == 3
    for step, load in found.items():
        (entry,) = [entry for entry in run.state.log_history if entry["step"] == step and "loss" in entry]
        for group in range(2):
            own = [layer.expert_groups[expert] == group for layer in CONFIG.sparse_layers[:1] for expert in range(6)]
            counts = torch.tensor(load)[:, own]
            assert entry[f"router/tokens_group_{group}"] == pytest.approx(counts.sum(1).double().mean().item())


class Reporter(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_load_is_not_reported(tmp_path):
    reporter = Reporter()
    run = train(CONFIG, str(tmp_path), MoHGETrainer, callbacks=[reporter])
    assert len(loads(run.state.log_history)) == 2
    assert "router/max_vio" in reporter.logs[0]
    assert all(isinstance(value, int | float) for logs in reporter.logs for value in logs.values())


LIMIT, LONG = 4, 21


@pytest.fixture
def long_run(tmp_path, monkeypatch) -> Trainer:
    """More entries than are kept with their load, half of them after it was resumed."""
    monkeypatch.setattr(trainer, "LOAD_RECORDS", LIMIT)
    options = {"folder": str(tmp_path), "trainer_class": MoHGETrainer, "steps": LONG}
    first = train(CONFIG, save_strategy="steps", save_steps=10, **options)
    resumed = train(CONFIG, resume_from_checkpoint=str(tmp_path / "checkpoint-10"), **options)
    assert loads(resumed.state.log_history) == loads(first.state.log_history)
    return resumed


def test_loads_of_a_long_run_are_thinned_out(long_run):
    found = loads(long_run.state.log_history)
    assert LIMIT // 2 < len(found) <= LIMIT
    assert next(iter(found)) == 1
    assert list(found)[-1] == LONG, "the newest is always there"
    assert_counts(found, steps=1)
    assert len(logged(long_run)) == LONG


def test_record_stays_serialisable(long_run, tmp_path):
    long_run.save_state()
    saved = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert saved == long_run.state.log_history
    assert loads(saved)
    long_run.create_model_card()
    assert "router_load" not in (tmp_path / "README.md").read_text()


def test_run_without_router_losses_has_no_load(tmp_path):
    assert not loads(train(config(), str(tmp_path), MoHGETrainer).state.log_history)
