"""A rank that is lost ends the others, with one line that names it; a rank that is only slow does not."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_training_runs import SECONDS, Ranks
from trainer_runs import config, train
from transformers import Trainer, TrainerCallback

from mohge.training import MoHGETrainer, PeerWatchdog


TIMEOUT = 12.0
"""Of the watchdogs: long enough for heartbeats to come through, and for all ranks to read who is lost before the first
of them ends, however busy the machine is."""


def exchange(folder: Path):
    """Take part in a collective again and again."""
    dist.init_process_group("gloo")
    PeerWatchdog(TIMEOUT).start()
    _ready(folder)
    while True:
        dist.all_reduce(torch.ones(1))
        time.sleep(0.01)


class _AtStep3(TrainerCallback):
    def __init__(self, action: Callable):
        self.action = action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.action()


def train_on(folder: Path):
    """Train for longer than any test."""
    _train(folder, lambda: _ready(folder))


def fail_alone(folder: Path):
    """Train until an exception in rank 1, which lives on."""

    def fail():
        _ready(folder)
        if dist.get_rank() == 1:
            raise RuntimeError("only here")

    try:
        _train(folder, fail)
    except RuntimeError:
        time.sleep(2 * SECONDS)


def stop_in_a_plain_trainer(folder: Path):
    """Train with a Trainer of one's own until rank 1 stops in a step."""

    def stop():
        _ready(folder)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    _train(folder, stop, Trainer)


def _train(folder: Path, at_step_3: Callable, trainer_class=MoHGETrainer):
    callbacks = [PeerWatchdog(TIMEOUT), _AtStep3(at_step_3)]
    train(config(), str(folder), trainer_class, ranks=2, steps=10**9, logging_steps=10**6, callbacks=callbacks)


def _ready(folder: Path):
    (folder / f"ready_{dist.get_rank()}").touch()


def compute_for_long_and_end_apart(folder: Path):
    """Rank 0 computes for longer than the time-out while rank 1 waits for it at the end, and leaves long after it."""
    dist.init_process_group("gloo")
    watchdog = PeerWatchdog(TIMEOUT)
    for compute in (1.2 * TIMEOUT, 0):
        watchdog.start()
        _ready(folder)
        end = time.monotonic() + compute * (dist.get_rank() == 0)
        while time.monotonic() < end:
            pass
        watchdog.stop()
    time.sleep(1.2 * TIMEOUT * (dist.get_rank() == 0))


def start_late(folder: Path):
    """Rank 1 begins long after rank 0, and when they watch again, rank 0 long after rank 1."""
    dist.init_process_group("gloo")
    _ready(folder)
    watchdog = PeerWatchdog(TIMEOUT)
    for late in (1, 0):
        time.sleep(1.2 * TIMEOUT * (dist.get_rank() == late))
        watchdog.start()
        watchdog.stop()


@dataclass(frozen=True)
class Case:
    """What `processes` ranks do, and which signal is sent to rank `lost` in the middle of it."""

    function: Callable
    processes: int = 2
    lost: int | None = None
    sent: signal.Signals | None = None
    launcher: bool = True


def _exchanges(number: signal.Signals, *ranks: tuple[int, int]) -> dict[str, Case]:
    return {
        f"rank {lost} of {processes}, store in {'launcher' if launcher else 'rank 0'}": Case(
            exchange, processes, lost, number, launcher
        )
        for processes, lost in ranks
        for launcher in (True, False)
    }


STOPPED = _exchanges(signal.SIGSTOP, (2, 0), (3, 1)) | {"training": Case(train_on, 2, 1, signal.SIGSTOP)}
SILENT = {"plain Trainer": Case(stop_in_a_plain_trainer, lost=1), "exception": Case(fail_alone, lost=1)}
KILLED = {f"killed, {name}": case for name, case in _exchanges(signal.SIGKILL, (3, 0)).items()}
SLOW = {function.__name__: Case(function) for function in (compute_for_long_and_end_apart, start_late)}
CASES = {**STOPPED, **SILENT, **KILLED, **SLOW}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[str, Ranks]:
    """The ranks of every case, in the middle of their work or past it: they wait for time-outs all at once."""
    started, folders = {}, {name: tmp_path_factory.mktemp("ranks") for name in CASES}
    for name, case in CASES.items():
        logs = folders[name] / "logs"
        started[name] = Ranks(case.processes, logs, case.function, folders[name], launcher=case.launcher)
    deadline = time.monotonic() + SECONDS
    for name, case in CASES.items():
        while len(list(folders[name].glob("ready_*"))) < case.processes:
            assert time.monotonic() < deadline, started[name].errors()
            time.sleep(0.05)
    for name, case in CASES.items():
        if case.sent is not None:
            started[name].signal(case.lost, case.sent)
    yield started
    for each in started.values():
        each.wait(seconds=0)


def wait_for_others(ranks: Ranks, lost: int) -> list[int]:
    """Those that are not lost, which must all end: they would otherwise wait for 30 minutes or more."""
    others = [rank for rank in range(len(ranks.processes)) if rank != lost]
    assert ranks.wait(others) == [1] * len(others)
    return others


@pytest.mark.parametrize("name", [*STOPPED, *SILENT])
def test_silent_rank_ends_the_others(name, ranks):
    lost = CASES[name].lost
    for rank in wait_for_others(ranks[name], lost):
        (line,) = re.findall("^mohge: .*", ranks[name].errors(rank), re.MULTILINE)
        assert line.startswith(f"mohge: rank {lost} gives no sign of life: rank {rank} ends.")


@pytest.mark.parametrize("name", KILLED)
def test_killed_rank_ends_the_others(name, ranks):
    wait_for_others(ranks[name], CASES[name].lost)


@pytest.mark.parametrize("name", SLOW)
def test_slow_rank_is_not_lost(name, ranks):
    assert "sign of life" not in ranks[name].succeed().errors()


def test_nothing_is_watched_without_other_ranks():
    watchdog = PeerWatchdog(TIMEOUT)
    before = threading.active_count()
    watchdog.start()
    assert threading.active_count() == before
    watchdog.stop()


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_timeout_must_be_positive(timeout):
    with pytest.raises(ValueError, match=r"`timeout` is .* above 0"):
        PeerWatchdog(timeout)
