"""Callbacks for any `Trainer`. [`MoHGETrainer`] has the first on its own, and logs what the second adds."""

import signal
import threading

import torch
import torch.distributed as dist
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback
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
    On SIGTERM, what schedulers send before they take a machine away, ends training after the step that is running,
    with a checkpoint. One rank of a run is enough: all stop after the same step, which
    `TrainingArguments.enable_jit_checkpoint` does not promise. Pass it to any `Trainer` with
    `callbacks=[StopSignalCallback()]`.
    """

    def __init__(self):
        self.stopped = False
        """Whether training was ended by the signal."""
        self._received = False
        self._handler_before = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped = self._received = False
        if threading.current_thread() is threading.main_thread():  # Python allows no other to handle signals
            self._handler_before = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number, frame):
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
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)


def base_model(model: nn.Module) -> MoHGEForCausalLM:
    """The MoHGE model inside the wrappers of data parallelism, compilation and PEFT."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["RouterLogCallback", "RouterScheduleCallback", "StopSignalCallback"]
