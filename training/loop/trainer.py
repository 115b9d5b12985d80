"""Training MoHGE models with Hugging Face Trainer."""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.distributed.checkpoint import save_optimizer_distributed
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint, rotate_checkpoints
from transformers.utils import CONFIG_NAME, logging

from mohge import MoHGEForCausalLM, MoHGEForSequenceClassification, MoHGEForTokenClassification
from mohge.loading import find_not_finite, local_tensor, reason_against_keys
from mohge.losses_mohge import at_least_one, targets_per_sequence
from mohge.model_cards.folder import check_folder
from mohge.model_cards.writing import write_file
from mohge.training.tuning.lora import read_adapter

from .callbacks import RouterScheduleCallback, base_model
from .checkpointing import (
    OPTIMIZER_FOLDER,
    RECORD_NAME,
    check_resumable,
    check_same_model,
    load_optimizer,
    load_scheduler,
    load_sharded_weights,
    read_record,
    read_state,
    read_trainer_state,
    reading,
)
from .failure import RunFailed, writing
from .metrics import RouterStatistics, dense_parameters
from .traffic import RouterTraffic
from .watchdog import PeerWatchdog


logger = logging.get_logger(__name__)

TRAFFIC_NAME = "traffic.json"
"""File of a run or checkpoint that holds its newest routing."""

LOAD_RECORDS = 256
"""Largest number of entries of `log_history` that hold every expert's load."""


class MoHGETrainer(Trainer):
    """
    `Trainer` that keeps the router losses under label smoothing and `compute_loss_func`, where `Trainer` drops them,
    and logs the language-model loss (`lm_loss`), or what these make of it (`objective`), and, under `router/`, the
    value of each router loss and the figures of [`RouterStatistics.summary`]. Otherwise a plain `Trainer` computes the
    same loss. Arguments are those of `Trainer`.

    It also checkpoints and resumes models that `from_pretrained(..., distributed_config=...)` has spread over ranks,
    which `Trainer` refuses: the weights are gathered into the checkpoint, the optimizer's state is written as each
    rank holds it, and a run on any other layout, or on one process, goes on from both. A checkpoint gets its name when
    it is complete, so one that is cut off leaves those before it as they were. Distributed runs have a
    [`PeerWatchdog`]. Runs with a router loss leave their newest routing in `traffic.json`, for `mohge place` and
    `mohge simulate`, and each expert's load over time in `log_history` (`router_load`: tokens since the entry before
    by sparse layer and expert), for `mohge report`. All ranks must see one file system.

    A loss, gradient or weight that is not finite ends training with [`RunFailed`] on all ranks when the next entry is
    logged or the next checkpoint is due, which is not written.
    """

    @functools.wraps(Trainer.__init__)
    def __init__(self, model=None, args: TrainingArguments | None = None, *more, **kwargs):
        if isinstance(model, MoHGEForSequenceClassification | MoHGEForTokenClassification):
            raise ValueError(f"MoHGETrainer trains language models: train {type(model).__name__} with Trainer")
        args = TrainingArguments("tmp_trainer") if args is None else args
        save_only_model = args.save_only_model
        if getattr(model, "is_distributed_loading_by_transformers", False):
            args.save_only_model = True  # which Trainer insists on, not knowing the methods below
        try:
            super().__init__(model, args, *more, **kwargs)
        finally:
            args.save_only_model = save_only_model
        self.args.logging_nan_inf_filter = False  # which logs 0 for a loss that is not finite
        if self.is_distributed_loading_by_transformers and self.args.world_size != dist.get_world_size():
            raise ValueError(
                f"`args` say that there are {self.args.world_size} processes, and the model is spread over "
                f"{dist.get_world_size()}: on CPU pass use_cpu=True to TrainingArguments"
            )
        self.add_callback(RouterScheduleCallback())
        self.add_callback(_MomentsCallback(self))
        if not self._watchdogs():
            self.add_callback(PeerWatchdog())
        if self.label_smoother is not None:
            self.label_smoother = self._with_router_losses(self.label_smoother)
        if self.compute_loss_func is not None:
            self.compute_loss_func = self._with_router_losses(self.compute_loss_func)
        self.logged_speed: float | None = None
        """Tokens per second, of all ranks, in the steps that the newest entry of the log is about; None where that is
        not known, as of a run that has gone on within them."""
        self._start_sums()
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # loss and targets of an evaluation
        config = base_model(self.model).config
        self._traffic = RouterTraffic(config) if config.sparse_layers else None
        self._epoch_is_over = self._checkpoint_waits = False
        self._staging: str | None = None  # folder of a checkpoint that is being written
        self._resumed_from: str | None = None
        self._traffic_before = []  # the newest records of the steps before the checkpoint that the run goes on from

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """See `Trainer.compute_loss`. Gathers what `log` adds."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._first_step is None:
            self._first_step, self._began = self.state.global_step, time.perf_counter()
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
            self._traffic.add(outputs.tokens_per_expert, tokens)
        return (loss, outputs) if return_outputs else loss

    def _share_of_targets(self, inputs: dict, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | None:
        """[B]: each sequence's share of the targets of the optimizer step."""
        if inputs.get("labels") is None and inputs.get("shift_labels") is None:
            return None  # Trainer says what is missing
        targets = targets_per_sequence(inputs.get("labels"), inputs.get("shift_labels"))
        if num_items_in_batch is None:
            num_items_in_batch = targets.sum() * self.args.gradient_accumulation_steps
        return targets / at_least_one(num_items_in_batch)

    def _with_router_losses(self, loss_function: Callable) -> Callable:
        def with_router_losses(outputs, *args, **kwargs):
            loss = loss_function(outputs, *args, **kwargs)
            if not self.model.training:
                return loss
            self._add("objective", loss)
            return loss if outputs.aux_loss is None else loss + outputs.aux_loss

        return with_router_losses

    def _start_sums(self):
        model = base_model(self.model)
        self._first_step: int | None = None  # of the steps that the sums are over
        self._began: float | None = None  # when; None if that was in the run that this one goes on from
        self._sums: dict[str, torch.Tensor] = {}
        dense = dense_parameters(model)
        self._statistics = RouterStatistics(model.config, dense) if model.config.sparse_layers else None

    def _add(self, name: str, value: torch.Tensor):
        self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`. Adds the language-model loss and the router's figures to the logs of training steps."""
        if "train_loss" in logs:  # of all steps, also those before the checkpoint that the run went on from
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._loss_since, 0.001)
        if "loss" not in logs or self._first_step is None:
            return super().log(logs, start_time)
        self._check_finite(weights=False)
        logs.update(self._figures(steps=self.state.global_step - self._first_step))
        tokens = 0.0 if self._statistics is None else float(self._statistics.tokens)
        load = self._statistics.counts if tokens else None
        known = tokens and self._began is not None
        self.logged_speed = tokens / (time.perf_counter() - self._began) if known else None
        self._start_sums()
        super().log(logs, start_time)
        if self.logged_speed is not None:  # in the record only: no two runs have the same
            self.state.log_history[-1]["tokens_per_second"] = round(self.logged_speed, 1)
        if load is not None:  # in the record only: reports take numbers
            self._record_load([[round(count) for count in layer.tolist()] for layer in load])

    def _record_load(self, load: list[list[int]]):
        """Keep what each expert got since the last log, thinned out in long runs."""
        entries = [entry for entry in self.state.log_history if "router_load" in entry]
        if len(entries) >= LOAD_RECORDS:
            for entry in entries[1::2]:
                del entry["router_load"]
        self.state.log_history[-1]["router_load"] = load

    def _figures(self, steps: int) -> dict[str, float]:
        # A rank's losses are its part of the sum over all ranks, unless each rank averages over its own targets.
        over_ranks = "sum" if self.args.average_tokens_across_devices else "mean"
        sums = self.accelerator.reduce(self._sums, over_ranks)
        copies = self.get_tp_size()  # ranks of a tensor-parallel group see the same batches
        if over_ranks == "sum":
            steps *= copies
        figures = {name: float(total) / steps for name, total in sums.items()}
        if self._statistics is not None and self._statistics.tokens > 0:
            totals = self.accelerator.reduce(self._statistics.tensors(), "sum")
            self._statistics.set_tensors([total / copies for total in totals])
            figures |= {f"router/{name}": value for name, value in self._statistics.summary().items()}
        return figures

    # Numbers that are none.

    def training_step(self, *args, **kwargs):
        """See `Trainer.training_step`. Takes note of a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        self._note("loss", loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None:  # which leaves out steps whose gradients overflow
            self._note("gradient's norm", norm)
        return norm

    def _note(self, name: str, value: torch.Tensor | float):
        # On the device: what waits for it is the next log entry or checkpoint.
        value = local_tensor(torch.as_tensor(value, device=self.args.device).detach())
        self._not_finite[name] = self._not_finite[name] + ~torch.isfinite(value)

    def _check_finite(self, weights: bool):
        """Raises [`RunFailed`] on all ranks if one has noted something, or, with `weights`, has such a weight."""
        weight = find_not_finite(self.model.state_dict()) if weights else None
        found = self._not_finite | {"weight": torch.tensor(weight is not None, device=self.args.device)}
        found = self.accelerator.reduce({name: count.float() for name, count in found.items()}, "sum")
        names = [name for name, count in found.items() if count > 0]
        if names:
            last = get_last_checkpoint(self.args.output_dir) if os.path.isdir(self.args.output_dir) else None
            kept = "no checkpoint was there yet" if last is None else f"{last} is kept"
            go_on = "" if last is None else ", and go on from it with `resume_from_checkpoint`"
            raise RunFailed(
                f"not finite at step {self.state.global_step}: {', '.join(names)}; nothing was saved from there, and "
                f"{kept}: lower `learning_rate`, or look at the text and the model{go_on}"
            )

    def _check_start(self, source: str | None):
        """Raises `ValueError` on all ranks if a weight of one is not finite. `source` is where they come from."""
        self._not_finite = {name: torch.zeros((), device=self.args.device) for name in ("loss", "gradient's norm")}
        for name in gather_object([find_not_finite(self.model.state_dict())]):
            if name is not None:
                source = source or base_model(self.model).config._name_or_path or "the model"
                raise ValueError(f"`{name}` of {source} is not finite: start from other weights")

    def _finalize_training(self, *args, **kwargs):
        self._check_finite(weights=True)
        return super()._finalize_training(*args, **kwargs)

    # Evaluation.

    def prediction_step(self, model, inputs, *args, **kwargs):
        """See `Trainer.prediction_step`. Gathers what `evaluation_loop` needs."""
        labels = inputs.get("labels")
        loss, *more = super().prediction_step(model, inputs, *args, **kwargs)
        if loss is not None and labels is not None:
            targets = labels[..., 1:].ne(-100).sum().to(loss.device)
            total = torch.where(targets > 0, loss.double() * targets, 0)  # without targets it is not a number
            self._evaluated = self._evaluated.to(loss.device) + torch.stack([total, targets])
        return (loss, *more)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """See `Trainer.evaluation_loop`. The loss is the mean over all targets, of which the perplexity is the
        exponential; `Trainer` averages the means of batches. (Rows that even out the last batch of several ranks count
        twice.)"""
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, targets = self.accelerator.reduce(self._evaluated.to(self.args.device), "sum").tolist()
        if targets and f"{metric_key_prefix}_loss" in output.metrics:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / targets
        return output

    # Checkpoints.

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # A checkpoint of the last step of an epoch waits for what is due at the end of the epoch: log entries and
        # evaluations belong to its state, and a run that goes on from there begins with the next epoch.
        control, state = self.control, self.state
        if self._epoch_is_over:
            control.should_save |= self._checkpoint_waits
            self._checkpoint_waits = False
        elif control.should_save and (state.epoch.is_integer() or state.global_step >= state.max_steps):
            control.should_save, self._checkpoint_waits = False, True
        before = time.perf_counter()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._began is not None:  # what is no training is left out of its speed
            self._began += time.perf_counter() - before

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        self._check_finite(weights=True)
        run_dir = super()._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        final = os.path.join(run_dir, name)
        staging = os.path.join(run_dir, ".incomplete")
        try:
            with writing(final):
                self._write_checkpoint(model, trial, run_dir, staging, name)
        except RunFailed:
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        if self.args.should_save:
            if self.args.push_to_hub:
                self._push_from_checkpoint(final)
            rotate_checkpoints(run_dir, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model, trial, run_dir: str, staging: str, name: str):
        written, final = os.path.join(staging, name), os.path.join(run_dir, name)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self._save_record(written)
        self.accelerator.wait_for_everyone()  # every rank has written its part
        if self.state.best_global_step:
            best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == final or os.path.exists(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(os.path.join(written, TRAINER_STATE_NAME))
            replaced = os.path.join(run_dir, f".replaced-{name}")
            if os.path.exists(final):
                os.rename(final, replaced)
            os.rename(written, final)
            shutil.rmtree(staging)
            shutil.rmtree(replaced, ignore_errors=True)

    def _save(self, *args, **kwargs):
        token, self.args.hub_token = self.args.hub_token, None  # which would go into training_args.bin
        try:
            super()._save(*args, **kwargs)
        finally:
            self.args.hub_token = token

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """See `Trainer.push_to_hub`. A whole model goes there as by `mohge push`: loaded where mohge is missing first,
        with its card, in one commit; of adapters, nothing but they. That always blocks."""
        self.save_model(_internal_call=True)
        self.save_state()
        if not self.is_world_process_zero():
            return None
        repo_id = self.args.hub_model_id or Path(self.args.output_dir).name
        options = {
            "private": self.args.hub_private_repo if private is None else private,
            "token": token or self.args.hub_token,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        if isinstance(self.model, MoHGEForCausalLM):
            return self._push_folder(self.args.output_dir, repo_id, tags=kwargs.get("tags"), **options)
        return self.model.push_to_hub(repo_id, **options)

    def _push_folder(self, folder: str, repo_id: str, **options):
        from mohge.model_cards.push import push_folder

        return push_folder(folder, repo_id, **options)

    def _push_from_checkpoint(self, checkpoint_folder):
        # Trainer uploads the output folder as it is, with paths of this machine and the token in training_args.bin.
        complete, whole = self._staging is None, isinstance(self.model, MoHGEForCausalLM)
        if complete and whole and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            self._push_folder(
                checkpoint_folder,
                self.args.hub_model_id or Path(self.args.output_dir).name,
                private=self.args.hub_private_repo,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
                commit_message=f"Training in progress, step {self.state.global_step}",
            )

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_distributed_loading_by_transformers:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_optimizer_distributed(self.model, self._plain_optimizer(), os.path.join(output_dir, OPTIMIZER_FOLDER))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        model = self.model if model is None else model
        whole = isinstance(model, MoHGEForCausalLM)  # not an adapter on it
        if whole and os.path.isfile(os.path.join(resume_from_checkpoint, CONFIG_NAME)):
            check_same_model(model.config, resume_from_checkpoint)
        if isinstance(model, PeftModel):
            read_adapter(resume_from_checkpoint, base_model(model).config)
        with reading(resume_from_checkpoint):
            if whole and self.is_distributed_loading_by_transformers:
                load_sharded_weights(model, resume_from_checkpoint)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result):
        # Trainer warns and goes on with what the model began with, and warns of tied weights, which are saved once.
        tied = base_model(self.model).all_tied_weights_keys or {}
        found = {
            "missing_keys": [name for name in load_result.missing_keys if name not in tied],
            "unexpected_keys": load_result.unexpected_keys,
            "mismatched_keys": [],  # which torch refuses
        }
        reason = reason_against_keys(found)
        if reason is not None:
            raise RuntimeError(reason.format(place="it"))  # `reading` says which checkpoint, and what to do

    def _load_rng_state(self, checkpoint):
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint):
        with reading(checkpoint):
            super()._load_scaler(checkpoint)

    def load_finished(self, checkpoint: str | None) -> bool:
        """Load the weights and the record of a checkpoint after which there is nothing left to train, and say whether
        it is one. (`Trainer` would train another step.)"""
        if checkpoint is None:
            return False
        state = read_trainer_state(checkpoint)
        if self.args.max_steps > 0:
            finished = state.global_step >= self.args.max_steps
        else:
            finished = state.global_step > 0 and state.epoch >= self.args.num_train_epochs
        if finished:
            self.state = state
            best = self.args.load_best_model_at_end and state.best_model_checkpoint
            self._load_best_model() if best else self._load_from_checkpoint(checkpoint)
            self._check_start(state.best_model_checkpoint if best else checkpoint)
            record = read_record(checkpoint)
            if record is not None:
                self._restore_record(record, checkpoint)
                self._total_loss_scalar += self._tr_loss.item()
                self.log({"total_flos": state.total_flos, "train_loss": 0.0})
            self._save_traffic(self.args.output_dir)
        return finished

    def _load_best_model(self):
        with reading(self.state.best_model_checkpoint):
            if isinstance(self.model, MoHGEForCausalLM) and self.is_distributed_loading_by_transformers:
                load_sharded_weights(self.model, self.state.best_model_checkpoint)
            else:
                super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        with reading(checkpoint):
            self._read_optimizer_and_scheduler(checkpoint)
            for file in Path(checkpoint).glob("rng_state*.pth"):  # which Trainer does in the first step
                read_state(file)
        states = {
            f"{key} {number}": value
            for number, state in enumerate(self.optimizer.state.values())
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        for name in gather_object([find_not_finite(states)]):
            if name is not None:
                raise ValueError(
                    f"`{name}` in the optimizer's state of {checkpoint} is not finite: go on from another checkpoint"
                )

    def _read_optimizer_and_scheduler(self, checkpoint: str):
        if os.path.isdir(os.path.join(checkpoint, OPTIMIZER_FOLDER)):
            load_optimizer(self.model, self._plain_optimizer(), os.path.join(checkpoint, OPTIMIZER_FOLDER))
            load_scheduler(self.lr_scheduler, os.path.join(checkpoint, SCHEDULER_NAME))
        elif self.is_distributed_loading_by_transformers and os.path.exists(os.path.join(checkpoint, OPTIMIZER_NAME)):
            raise ValueError(
                f"{checkpoint} holds the optimizer of a run that was not spread over ranks: resume it that way, or "
                "start anew from its weights, without `resume_from_checkpoint`"
            )
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper

    # The record of a run, which is part of its state.

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """See `Trainer.train`. Writes `traffic.json` at the end; figures of the whole are those of a run that was not
        cut off."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        self._resumed_from = resume_from_checkpoint or None
        if self._resumed_from is None:
            if self.args.save_only_model and self.args.save_strategy != "no" and self.is_world_process_zero():
                logger.warning("`save_only_model` is set: no checkpoint of this run can be resumed.")
        else:
            self._check_resumable(self._resumed_from)
        try:
            result = super().train(self._resumed_from, *args, **kwargs)
        except BaseException:
            for watchdog in self._watchdogs():
                watchdog.leave()
            raise
        with writing(self.args.output_dir):
            self._save_traffic(self.args.output_dir)
        return result._replace(training_loss=result.metrics["train_loss"])

    def _check_resumable(self, checkpoint: str):
        check_folder(Path(checkpoint))
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # which have files of their own
            return
        read_trainer_state(checkpoint)
        record = read_record(checkpoint)
        ranks = 0 if record is None else len(record["ranks"])
        scaled = getattr(self.accelerator, "scaler", None) is not None
        check_resumable(checkpoint, ranks, [SCALER_NAME] if scaled else [])
        if ranks not in (0, self.args.world_size) and self.is_world_process_zero():
            logger.warning(
                f"{checkpoint} is of {ranks} ranks, and here are {self.args.world_size}: random numbers, as of "
                "dropout, are others than they would have been."
            )

    def _begin(self):
        """What is left to do when everything has been loaded, before the first step."""
        self._check_start(self._resumed_from)
        self._loss_since = self.state.global_step
        record = None if self._resumed_from is None else read_record(self._resumed_from)
        if record is not None:
            with reading(self._resumed_from):
                self._restore_record(record, self._resumed_from)

    def _batches(self) -> int:
        """Number of ranks with batches of their own."""
        return self.args.world_size // self.get_tp_size()

    def _save_record(self, folder: str):
        """Write what log entries and figures still to come need of the steps so far."""
        router = self._statistics
        own = {
            "loss": self._tr_loss.item(),
            "sums": {name: value.item() for name, value in self._sums.items()},
            "router": None if router is None else [total.tolist() for total in router.tensors()],
        }
        record = {
            "total_loss": self._total_loss_scalar,
            "loss_since": self._loss_since,
            "last_logged": self._globalstep_last_logged,
            "first_step": self._first_step,
            "batches": self._batches(),
            "ranks": gather_object([own]),
        }
        if self.args.should_save:
            write_file(Path(folder) / RECORD_NAME, json.dumps(record))
        self._save_traffic(folder)

    def _restore_record(self, record: dict, checkpoint: str):
        ranks, here = record["ranks"], self.args.world_size
        # Another number of ranks divides the whole evenly.
        own = [ranks[self.args.process_index]] if len(ranks) == here else ranks
        mean = 1 / len(own)
        share = mean if len(ranks) == here else mean * record["batches"] / self._batches()

        def total(values: Iterable, factor: float) -> torch.Tensor:
            return torch.tensor(list(values)).sum(0) * factor

        of_sums = share if self.args.average_tokens_across_devices else mean
        self._total_loss_scalar, self._loss_since = record["total_loss"], record["loss_since"]
        self._globalstep_last_logged, self._first_step = record["last_logged"], record["first_step"]
        self._tr_loss = total((rank["loss"] for rank in own), mean).to(self.args.device)
        self._sums = {name: total((rank["sums"][name] for rank in own), of_sums) for name in own[0]["sums"]}
        if self._statistics is not None:
            self._statistics.set_tensors(
                [total(values, share) for values in zip(*(rank["router"] for rank in own), strict=True)]
            )
        traffic = Path(checkpoint) / TRAFFIC_NAME
        if self._traffic is not None and traffic.exists():
            before = RouterTraffic.load(traffic)
            before.check(base_model(self.model).config)
            self._traffic_before = before.records

    def _watchdogs(self) -> list[PeerWatchdog]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, PeerWatchdog)]

    def _save_traffic(self, folder: str):
        if self._traffic is None:
            return
        by_rank = gather_object([self._traffic.records])[:: self.get_tp_size()]
        records = self._traffic_before + [record for forward in zip(*by_rank, strict=False) for record in forward]
        if self.args.should_save and records:
            everything = RouterTraffic(base_model(self.model).config)
            everything.extend(records[-everything.limit :])
            os.makedirs(folder, exist_ok=True)
            everything.save(os.path.join(folder, TRAFFIC_NAME))


class _MomentsCallback(TrainerCallback):
    def __init__(self, trainer: MoHGETrainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._begin()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._trainer._epoch_is_over = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self._trainer._epoch_is_over = True


__all__ = ["MoHGETrainer"]
