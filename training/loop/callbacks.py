"""Callbacks for any `Trainer`, but for the last one. [`MoHGETrainer`] has the first on its own, and logs what the
second adds."""

import math
import os
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from mohge import MoHGEForCausalLM

from .metrics import RouterStatistics, dense_parameters


class RouterScheduleCallback(TrainerCallback):
    """Tells the model after every step how far training is, for `group_aux_loss_start`, `router_intra_group_warmup`
    and the running mean of the logits. Pass it to a plain `Trainer` with `callbacks=[RouterScheduleCallback()]`."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base_model(model).set_training_progress(state.global_step / state.max_steps)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        base_model(model).set_training_progress(state.global_step / state.max_steps)


class RouterLogCallback(TrainerCallback, ExportableState):
    """
    Adds the figures of [`RouterStatistics.summary`], under `router/`, to what a plain `Trainer` logs, for models with
    a router loss. What has been counted since the last entry is part of checkpoints, so that the next entry of a run
    that goes on covers all its steps. Reporters of `report_to` run before the callbacks that `Trainer` is given; to
    have the figures there too, put this one first:

    ```python
    >>> trainer.callback_handler.callbacks.insert(0, RouterLogCallback())
    ```
    """

    def __init__(self):
        self._statistics: RouterStatistics | None = None

    def state(self) -> dict:
        """What `Trainer` puts into a checkpoint."""
        sums = self._statistics and [total.tolist() for total in self._statistics.tensors()]
        return {"args": {}, "attributes": {"sums": sums}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = base_model(model)
        dense = dense_parameters(model)
        self._new_statistics = lambda: RouterStatistics(model.config, dense)
        self._start()
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        sums = saved["attributes"]["sums"] if state.global_step else None
        self._counted = bool(sums)
        if sums and args.process_index == 0:  # of all ranks
            self._statistics.set_tensors([*map(torch.tensor, sums)])
        self._hook = model.register_forward_hook(self._count, with_kwargs=True)

    def _start(self):
        self._statistics, self._counted = self._new_statistics(), False  # the latter is the same on all ranks

    def _gather(self, args):
        """Add up over ranks what was counted; the first one keeps it."""
        if args.world_size > 1:
            for total in self._statistics.tensors():
                dist.all_reduce(total)
                total.mul_(args.process_index == 0)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and self._counted:  # only the first rank is asked for its `state`
            self._gather(args)

    on_epoch_end = on_step_end

    def _count(self, model: nn.Module, args: tuple, kwargs: dict, output):
        if model.training and getattr(output, "tokens_per_expert", None) is not None:
            mask = kwargs.get("attention_mask")
            tokens = output.logits.shape[:2].numel() if mask is None else mask.sum()
            self._statistics.add(output.tokens_per_expert, tokens)
            self._counted = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not self._counted:
            return
        self._gather(args)
        if args.process_index == 0:
            figures = {f"router/{name}": value for name, value in self._statistics.summary().items()}
            logs.update(figures)
            state.log_history[-1].update(figures)
        self._start()

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()


class StopSignalCallback(TrainerCallback):
    """
    On SIGTERM, what schedulers send before they take a machine away, and on Ctrl-C ends training after the step that
    is running, with a checkpoint. A second Ctrl-C is a `KeyboardInterrupt` at once. One rank of a run is enough: all
    stop after the same step, which `TrainingArguments.enable_jit_checkpoint` does not promise. Pass it to any
    `Trainer` with `callbacks=[StopSignalCallback()]`.
    """

    def __init__(self):
        self.stopped = False
        """Whether training was ended by the signal."""
        self._received = False
        self._handlers_before = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped = self._received = False
        if threading.current_thread() is not threading.main_thread():  # Python allows no other to handle signals
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:  # as in the background
                self._handlers_before[number] = signal.signal(number, self._receive)

    def _receive(self, number, frame):
        if number == signal.SIGINT:
            if self._received:
                raise KeyboardInterrupt
            if os.environ.get("LOCAL_RANK", "0") == "0":  # `print` may be under way
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C once more stops at once\n")
        self._received = True

    def on_step_end(self, args, state, control, **kwargs):
        received = self._received
        if args.world_size > 1:
            flag = torch.tensor(float(received), device=args.device)
            dist.all_reduce(flag)
            received = flag.item() > 0
        if received and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.release()

    def release(self):
        """Let the signals do what they did before; for who trains no more although training has not ended."""
        while self._handlers_before:
            signal.signal(*self._handlers_before.popitem())


class LogLineCallback(TrainerCallback):
    """
    Prints a line for each entry of a [`MoHGETrainer`]'s log, in place of the dictionary that `Trainer` prints, and no
    progress bar: step, loss, perplexity where the loss is the language model's, tokens per second of training, time
    left, and balance, as the largest load of an expert over the mean, minus 1 (`max_vio`). A run that is shorter than
    `logging_steps` says its mean loss.

    Args:
        trainer ([`MoHGETrainer`]): The trainer that it is added to, from which it takes the callbacks that print.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        for printing in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printing)

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._first_step, self._has_said = time.perf_counter(), state.global_step, False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        evaluated = "eval_loss" in logs
        name = next((name for name in ("eval_loss", "lm_loss", "objective", "loss") if name in logs), None)
        if name is None:  # the summary of the whole run, which its figures are in
            if not self._has_said and "train_loss" in logs:
                print(f"step {state.global_step}/{state.max_steps}  mean loss {logs['train_loss']:.4g}", flush=True)
            return
        loss = logs[name]
        parts = [f"step {state.global_step}/{state.max_steps}", f"{'held-out ' if evaluated else ''}loss {loss:.4g}"]
        if name != "objective":  # which is a divergence, say
            parts.append(f"perplexity {math.exp(min(loss, 700)):,.4g}")
        if not evaluated:
            if self._trainer.logged_speed is not None:
                parts.append(f"{self._trainer.logged_speed:,.0f} tokens/s")
            left = (time.perf_counter() - self._began) / max(state.global_step - self._first_step, 1)
            left = timedelta(seconds=round(left * (state.max_steps - state.global_step)))
            parts.append(f"{left} left")
            if "router/max_vio" in logs:
                parts.append(f"max_vio {logs['router/max_vio']:.2f}")
            self._has_said = True
        print("  ".join(parts), flush=True)


def base_model(model: nn.Module) -> MoHGEForCausalLM:
    """The MoHGE model inside the wrappers of data parallelism, compilation and PEFT."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["LogLineCallback", "RouterLogCallback", "RouterScheduleCallback", "StopSignalCallback"]
