"""A watchdog over the ranks of a distributed run."""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


class PeerWatchdog(TrainerCallback):
    """
    Ends this process, with one line that names the rank, when another rank has not been heard of for `timeout`
    seconds: killed, stopped, or on a machine that is gone. Without it the ranks that are left wait in a collective
    until the process group's own time-out, which is 2 hours where transformers made the group.

    Each rank counts up its key in the store through which the ranks found each other, and watches that of the next
    rank; who finds a rank lost tells all. A thread does this, so a rank that computes for long is not lost.

    [`MoHGETrainer`] has it; pass it to a plain `Trainer` in `callbacks`, or call `start` and `stop`.

    Args:
        timeout (`float`, *optional*, defaults to 120): Seconds without a sign of life after which a rank is lost.
    """

    def __init__(self, timeout: float = 120.0):
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout}: give a number of seconds above 0")
        self.timeout = timeout
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def start(self):
        """Begin to watch. All ranks must call this; without other ranks it does nothing."""
        if (
            self._thread is not None
            or not (dist.is_available() and dist.is_initialized())
            or dist.get_world_size() == 1
        ):
            return
        if "MASTER_ADDR" not in os.environ:  # a process group that was not made through it
            logger.warning("No watchdog over the ranks: MASTER_ADDR, which torchrun and accelerate set, is missing.")
            return
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, args=(self._connect(),), daemon=True)
        self._thread.start()

    def stop(self):
        """Stop to watch, once all ranks have come here."""
        if self._thread is not None:
            dist.barrier()
            self.leave()

    def leave(self):
        """Stop to watch and to give signs of life: to the others this rank is lost, unless they stop as well."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _connect(self) -> dist.Store:
        # A connection of its own: one that the main thread waits on would hold up the heartbeat.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=self.timeout)
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it restarts ranks
        return dist.PrefixStore(f"mohge/watchdog/{attempt}", store)

    def _watch(self, store: dist.Store):
        rank = dist.get_rank()
        watched = (rank + 1) % dist.get_world_size()
        last, heard = None, time.monotonic()
        while not self._stopped.wait(self.timeout / 10):
            try:
                store.add(f"beat/{rank}", 1)
                beats = store.add(f"beat/{watched}", 0)
                told = int(store.get("lost")) if store.check(["lost"]) else None
            except RuntimeError:  # the store is gone, and with it whoever kept it
                beats = told = None
            now = time.monotonic()
            if beats is not None and beats != last:
                last, heard = beats, now
            if told is None and now - heard < self.timeout:
                continue
            if told is None:
                told = watched if beats is not None else 0
                with contextlib.suppress(RuntimeError):
                    store.set("lost", str(told))
            message = f"rank {told} has not been heard of for {self.timeout:g} s: rank {rank} ends"
            print(f"mohge: {message}. Resume from the last checkpoint.", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may wait in a collective, where no exception reaches it
