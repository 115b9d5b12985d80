"""A rank that is lost ends the others, with one line that names it; a rank that is only slow does not."""

import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_training_runs import SECONDS, Ranks
from trainer_runs import config, train
from transformers import TrainerCallback

from mohge.training import MoHGETrainer, PeerWatchdog


TIMEOUT = 3.0
"""Of the watchdogs: long enough for a heartbeat to come through when the machine is busy."""
BOUND = 30.0
"""The others must have ended by then, and would otherwise wait for 30 minutes or more."""


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
        time.sleep(SECONDS)


def _train(folder: Path, at_step_3: Callable):
    callbacks = [PeerWatchdog(TIMEOUT), _AtStep3(at_step_3)]
    train(config(), str(folder), MoHGETrainer, ranks=2, steps=10**9, logging_steps=10**6, callbacks=callbacks)


def _ready(folder: Path):
    (folder / f"ready_{dist.get_rank()}").touch()


def compute_for_long_and_end_apart():
    """Rank 0 computes for 2.5 time-outs while rank 1 waits for it at the end, and leaves 1.5 time-outs after it."""
    dist.init_process_group("gloo")
    watchdog = PeerWatchdog(TIMEOUT)
    for compute in (2.5 * TIMEOUT, 0):
        watchdog.start()
        end = time.monotonic() + compute * (dist.get_rank() == 0)
        while time.monotonic() < end:
            pass
        watchdog.stop()
    time.sleep(1.5 * TIMEOUT * (dist.get_rank() == 0))


def start_late():
    """Rank 1 begins 2.5 time-outs after rank 0, and when they watch again, rank 0 1.5 time-outs after rank 1."""
    dist.init_process_group("gloo")
    watchdog = PeerWatchdog(TIMEOUT)
    for late, timeouts in ((1, 2.5), (0, 1.5)):
        time.sleep(timeouts * TIMEOUT * (dist.get_rank() == late))
        watchdog.start()
        watchdog.stop()


@pytest.mark.parametrize(
    ("function", "processes", "lost", "launcher"),
    [
        (train_on, 2, 1, True),
        *((exchange, *ranks, launcher) for ranks in ((2, 0), (3, 1)) for launcher in (True, False)),
    ],
)
def test_stopped_rank_ends_the_others(function, processes, lost, launcher, tmp_path):
    ranks = start(function, processes, launcher, tmp_path)
    ranks.signal(lost, signal.SIGSTOP)
    check_that_others_end(ranks, lost)


def test_rank_that_fails_alone_ends_the_others(tmp_path):
    check_that_others_end(start(fail_alone, 2, True, tmp_path), lost=1)


def check_that_others_end(ranks: Ranks, lost: int):
    others = [rank for rank in range(len(ranks.processes)) if rank != lost]
    assert ranks.wait(others, BOUND) == [1] * len(others)
    for rank in others:
        (line,) = re.findall("^mohge: .*", ranks.errors(rank), re.MULTILINE)
        assert line.startswith(f"mohge: rank {lost} gives no sign of life: rank {rank} ends.")


@pytest.mark.parametrize("launcher", [True, False])
def test_killed_rank_ends_the_others(launcher, tmp_path):
    ranks = start(exchange, 3, launcher, tmp_path)
    ranks.signal(0, signal.SIGKILL)
    assert ranks.wait([1, 2], BOUND) == [1, 1]


def start(function: Callable, processes: int, launcher: bool, folder: Path) -> Ranks:
    """Ranks in the middle of their work."""
    ranks = Ranks(processes, folder / "logs", function, folder, launcher=launcher)
    deadline = time.monotonic() + SECONDS
    while len(list(folder.glob("ready_*"))) < processes:
        assert time.monotonic() < deadline, ranks.errors()
        time.sleep(0.05)
    return ranks


@pytest.mark.parametrize("function", [compute_for_long_and_end_apart, start_late])
def test_slow_rank_is_not_lost(function, tmp_path):
    ranks = Ranks(2, tmp_path / "logs", function).succeed()
    assert "sign of life" not in ranks.errors()


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
