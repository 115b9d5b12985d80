"""The ranks of a distributed run: that all of them start, and a watchdog over them."""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.utils import logging

from .failure import RunFailed


logger = logging.get_logger(__name__)


STARTING = timedelta(minutes=5)
"""In which all ranks have to start."""


def meet() -> dist.Store | None:
    """
    Wait until all ranks that torchrun, or accelerate, says there are have come here. Who makes the process group at
    once waits for up to 30 minutes for one that never starts.

    Returns:
        `torch.distributed.Store`, *optional*: The store in which they met, None for a process on its own. It has to
        live until the process group is there.

    Raises:
        RunFailed: naming the ranks that are missing.
        RuntimeError: if there is no way to the store.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "MASTER_ADDR" not in os.environ or dist.is_initialized():
        return None
    rank = int(os.environ["RANK"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=STARTING,
        wait_for_workers=False,
        multi_tenant=True,  # the process group's store takes the same port
    )
    names = [f"mohge/meet/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{other}" for other in range(world)]
    store.set(names[rank], "")
    try:
        store.wait(names, STARTING)
    except dist.DistStoreError as error:
        missing = ", ".join(str(other) for other, name in enumerate(names) if not store.check([name]))
        raise RunFailed(
            f"of {world} ranks, {missing} did not start within {STARTING.total_seconds():.0f} seconds: see what that "
            "one says, and start all again"
        ) from error
    return store


class PeerWatchdog(TrainerCallback):
    """
    Ends this process, with one line that names the rank, when another rank has not been heard of for `timeout`
    seconds: killed, stopped, or on a machine that is gone. Without it the ranks that are left wait in a collective
    until the process group's own time-out, which is 2 hours where transformers made the group.

    Each rank counts up its key in the store through which the ranks found each other, and watches that of the next
    rank; who finds a rank lost tells all. Threads do this, so a rank that computes for long is not lost.

    [`MoHGETrainer`] has it; pass it to a plain `Trainer` in `callbacks`, or call `start` and `stop`.

    Args:
        timeout (`float`, *optional*, defaults to 120):
            Seconds after which this process has ended at the latest, counted from the last sign of life of a rank.
    """

    _starts = 0  # of all watchdogs in this process

    def __init__(self, timeout: float = 120.0):
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout}: give a number of seconds above 0")
        self.timeout = timeout
        self._stopped = threading.Event()
        self._judge: threading.Thread | None = None
        self._lost: int | None = None
        self._heard: float | None = None  # when the next rank last gave a sign of life
        self._answered = 0.0  # when the store did

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def start(self):
        """Begin to watch. All ranks must call this; without other ranks it does nothing."""
        if (
            self._judge is not None
            or not (dist.is_available() and dist.is_initialized())
            or dist.get_world_size() == 1
        ):
            return
        if "MASTER_ADDR" not in os.environ:  # a process group that was not made through it
            logger.warning("No watchdog over the ranks: MASTER_ADDR, which torchrun and accelerate set, is missing.")
            return
        self._stopped.clear()
        self._lost, self._heard, self._answered = None, None, time.monotonic()
        # Two threads: a store that does not answer holds up whoever asks it.
        store = self._connect()
        store.add(f"beat/{dist.get_rank()}", 1)
        threading.Thread(target=self._beat, args=(store,), daemon=True).start()
        self._judge = threading.Thread(target=self._watch, daemon=True)
        self._judge.start()

    def stop(self):
        """Stop to watch, once all ranks have come here."""
        if self._judge is not None:
            dist.barrier()
            self.leave()

    def leave(self):
        """Stop to watch and to give signs of life: to the others this rank is lost, unless they stop as well."""
        if self._judge is not None:
            self._stopped.set()
            self._judge.join()
            self._judge = None

    def _connect(self) -> dist.Store:
        # A connection of its own: one that the main thread waits on would hold up the heartbeat.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=self.timeout)
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        # torchrun keeps the store when it restarts the ranks, and a process may train more than once.
        PeerWatchdog._starts += 1
        run = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{PeerWatchdog._starts}"
        return dist.PrefixStore(f"mohge/watchdog/{run}", store)

    def _beat(self, store: dist.Store):
        """Count up this rank's key, and note when that of the next rank has changed."""
        own, watched = f"beat/{dist.get_rank()}", f"beat/{self._next_rank()}"
        last = 0
        while not self._stopped.wait(self.timeout / 12):
            with contextlib.suppress(RuntimeError):  # the store is gone: `_answered` says for how long
                store.add(own, 1)
                if self._lost is not None:
                    store.set("lost", str(self._lost))
                elif store.check(["lost"]):
                    self._lost = int(store.get("lost"))
                beats = store.add(watched, 0)
                self._answered = time.monotonic()
                if beats != last:  # a rank that has not begun yet is not lost
                    last, self._heard = beats, self._answered

    def _watch(self):
        beat = self.timeout / 12
        while not self._stopped.wait(beat):
            now = time.monotonic()
            if self._lost is None and now - self._answered >= 7 * beat:
                self._lost = 0  # or whoever keeps the store
            elif self._lost is None and self._heard is not None and now - self._heard >= 7 * beat:
                answers = now - self._answered < 2 * beat
                self._lost = self._next_rank() if answers else 0
            if self._lost is not None:
                # At once: when another rank has ended, a collective may fail here and end this one as well.
                message = f"rank {self._lost} gives no sign of life: rank {dist.get_rank()} ends"
                print(f"mohge: {message}. Resume from the last checkpoint.", file=sys.stderr, flush=True)
                # This process may keep the store, where the others have to read who is lost.
                if self._stopped.wait(3 * beat):
                    return
                os._exit(1)  # the main thread may wait in a collective, where no exception reaches it

    def _next_rank(self) -> int:
        return (dist.get_rank() + 1) % dist.get_world_size()
