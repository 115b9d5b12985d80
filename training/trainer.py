"""Training MoHGE models with Hugging Face Trainer."""

from collections.abc import Callable

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import Trainer, TrainerCallback

from mohge import MoHGEForCausalLM

from .metrics import RouterStatistics


class RouterScheduleCallback(TrainerCallback):
    """Tells the model at every step how far training is, for `group_aux_loss_start` and `router_intra_group_warmup`.
    [`MoHGETrainer`] has it; pass it to a plain `Trainer` with `callbacks=[RouterScheduleCallback()]`."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        _base_model(model).set_training_progress(state.global_step / state.max_steps)


class MoHGETrainer(Trainer):
    """
    `Trainer` that keeps the router losses under label smoothing and `compute_loss_func`, where `Trainer` drops them,
    and logs the language-model loss (`lm_loss`) and, under `router/`, the value of each router loss and the figures of
    [`RouterStatistics.summary`]. Otherwise a plain `Trainer` computes the same loss. Arguments are those of `Trainer`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(RouterScheduleCallback())
        if self.label_smoother is not None:
            self.label_smoother = self._with_router_losses(self.label_smoother)
        if self.compute_loss_func is not None:
            self.compute_loss_func = self._with_router_losses(self.compute_loss_func)
        self._start_sums()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`. Gathers what `log` adds."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._first_step is None:
            self._first_step = self.state.global_step
        # Trainer may take the labels away, and without them the model cannot tell each sequence's share of the batch.
        weights = self._share_of_targets(inputs, num_items_in_batch)
        if weights is not None:
            inputs["sequence_weights"] = weights
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.lm_loss is not None:
            self._add("lm_loss", outputs.lm_loss)
        for name, value in (outputs.router_losses or {}).items():
            self._add(f"router/{name}", value * (1 if weights is None else weights.sum()))
        if outputs.tokens_per_expert is not None:
            mask = inputs.get("attention_mask")
            tokens = outputs.logits.shape[:2].numel() if mask is None else mask.sum()
            self._statistics.add(outputs.tokens_per_expert, tokens)
        return (loss, outputs) if return_outputs else loss

    def _share_of_targets(self, inputs: dict, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | None:
        """[B]: each sequence's share of the targets of the optimizer step."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if labels is None:
            return None  # Trainer says what is missing
        if "shift_labels" not in inputs:
            labels = labels[..., 1:]
        targets = labels.ne(-100).sum(-1)
        if num_items_in_batch is None:
            num_items_in_batch = targets.sum() * self.args.gradient_accumulation_steps
        return targets / num_items_in_batch

    def _with_router_losses(self, loss_function: Callable) -> Callable:
        def with_router_losses(outputs, *args, **kwargs):
            loss = loss_function(outputs, *args, **kwargs)
            if not self.model.training:
                return loss
            self._add("lm_loss", loss)
            return loss if outputs.aux_loss is None else loss + outputs.aux_loss

        return with_router_losses

    def _start_sums(self):
        model = _base_model(self.model)
        self._first_step: int | None = None  # of the steps that the sums are over
        self._sums: dict[str, torch.Tensor] = {}
        dense = model.num_parameters() - model.config.routed_parameters
        self._statistics = RouterStatistics(model.config, dense) if model.config.sparse_layers else None

    def _add(self, name: str, value: torch.Tensor):
        self._sums[name] = self._sums.get(name, 0) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`. Adds the language-model loss and the router's figures to the logs of training steps."""
        if "loss" in logs and self._first_step is not None:
            logs.update(self._figures(steps=self.state.global_step - self._first_step))
            self._start_sums()
        super().log(logs, start_time)

    def _figures(self, steps: int) -> dict[str, float]:
        # A rank's losses are its part of the sum over all ranks, unless each rank averages over its own targets.
        over_ranks = "sum" if self.args.average_tokens_across_devices else "mean"
        figures = {
            name: float(total) / steps for name, total in self.accelerator.reduce(self._sums, over_ranks).items()
        }
        if self._statistics is not None and self._statistics.tokens > 0:
            self._statistics.set_tensors(self.accelerator.reduce(self._statistics.tensors(), "sum"))
            figures |= {f"router/{name}": value for name, value in self._statistics.summary().items()}
        return figures


def _base_model(model: nn.Module) -> MoHGEForCausalLM:
    """The MoHGE model inside the wrappers of data parallelism, compilation and PEFT."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = ["MoHGETrainer", "RouterScheduleCallback"]
