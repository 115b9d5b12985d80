"""
Checkpoints of runs on several ranks: the weights gathered into one model folder, the optimizer's state as each rank
holds it (torch.distributed.checkpoint), so that any other layout, or one process, can go on from them.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import PreTrainedConfig, PreTrainedModel, TrainerState
from transformers.distributed.checkpoint import _redistribute_state_dict, load_optimizer_distributed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from mohge import MoHGEConfig
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.model_cards.folder import read_json
from mohge.model_cards.shipped import load_config

from .failure import is_lost_touch


RECORD_NAME = "record.json"
"""File of a checkpoint that holds what has been summed up for log entries to come."""

OPTIMIZER_FOLDER = "optimizer"
"""Folder of a checkpoint that holds the optimizer's state of a sharded run."""

_MAY_CHANGE = {
    "backbone_config",  # whose fields are looked at one by one
    *ROUTER_COEFFICIENTS.values(),
    *("group_aux_loss_start", "router_intra_group_warmup", "router_logit_ema_decay", "attention_dropout"),
    *("initializer_range", "max_position_embeddings", "use_cache", "output_router_logits"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    *(field.name for field in dataclasses.fields(PreTrainedConfig)),
}


def check_same_model(config: MoHGEConfig, folder: str | Path):
    """
    Check that the checkpoint in `folder` belongs to the model of `config`. Coefficients, schedules and token ids may
    differ.

    Raises:
        ValueError: naming the first field that differs.
    """
    saved = load_config(str(folder))
    for wanted, found in ((config, saved), (config.backbone_config, saved.backbone_config)):
        for name in ("model_type", *(field.name for field in dataclasses.fields(wanted))):
            ours, theirs = getattr(wanted, name), getattr(found, name, None)
            if name not in _MAY_CHANGE and ours != theirs:
                raise ValueError(
                    f"{folder} is a checkpoint of another config: `{name}` is {theirs} there and {ours} in this "
                    "model: load the model with the checkpoint's config, or resume from another checkpoint"
                )


def check_resumable(folder: str | Path, ranks: int, more: Iterable[str] = ()):
    """
    Check that a checkpoint holds all that a run needs to go on bit for bit.

    Args:
        folder (`str` or `Path`): Folder of the checkpoint.
        ranks (`int`): Number of ranks that wrote it; 0 if that is not known.
        more (`Iterable[str]`, *optional*): Files that only some runs need.

    Raises:
        ValueError: naming the file that is missing.
    """
    folder = Path(folder)
    wanted = [[f"rng_state_{rank}.pth"] for rank in range(ranks)] if ranks > 1 else [["rng_state.pth"]]
    if ranks == 0:
        wanted = [["rng_state.pth", "rng_state_0.pth"]]
    for names in ([OPTIMIZER_NAME, OPTIMIZER_FOLDER], [SCHEDULER_NAME], *wanted, *([name] for name in more)):
        if not any((folder / name).exists() for name in names):
            raise ValueError(
                f"{folder} has no {names[0]} (`save_only_model` leaves it out), without which no run goes on to the "
                "same weights: start another run from its weights, with it as `model`"
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


_STATE = {
    **dict.fromkeys(("global_step", "train_batch_size"), _is_count),
    **dict.fromkeys(("epoch", "total_flos"), lambda value: _is_number(value) and value >= 0),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), lambda value: _is_number(value) and value > 0),
    "log_history": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
    "best_model_checkpoint": lambda value: isinstance(value, str | None),
    "stateful_callbacks": lambda value: isinstance(value, dict) and "TrainerControl" in value,
}
_RECORD = {
    "total_loss": _is_number,
    **dict.fromkeys(("loss_since", "last_logged", "batches"), _is_count),
    "first_step": lambda value: value is None or _is_count(value),
    "ranks": lambda value: isinstance(value, list) and value and all(map(_is_rank, value)),
}


def _is_rank(own: Any) -> bool:
    """Whether this is what one rank puts into a record."""
    if not isinstance(own, dict) or not {"loss", "sums", "router"} <= own.keys() or not isinstance(own["sums"], dict):
        return False
    return all(map(_is_number, (own["loss"], *own["sums"].values()))) and isinstance(own["router"], list | None)


def read_trainer_state(folder: str | Path) -> TrainerState:
    """
    The state of the `Trainer` that wrote the checkpoint `folder`.

    Raises:
        ValueError: naming what it does not have as it should be.
        OSError: if there is none.
    """
    return TrainerState(**_read_fields(Path(folder) / TRAINER_STATE_NAME, _STATE))


def read_record(folder: str | Path) -> dict | None:
    """What a checkpoint holds for log entries to come; None of a plain `Trainer`. Errors as [`read_trainer_state`]."""
    file = Path(folder) / RECORD_NAME
    return _read_fields(file, _RECORD) if file.exists() else None


def _read_fields(file: Path, fields: dict[str, Callable[[Any], bool]]) -> dict:
    content = read_json(file)
    for name, fits in fields.items():
        if name not in content or not fits(content[name]):
            found = repr(content[name])[:80] if name in content else "missing"
            raise ValueError(f"{file} cannot be read (`{name}` is {found}): go on from another checkpoint")
    return content


@contextmanager
def reading(folder: str | Path) -> Iterator[None]:
    """Within this context, which reads the checkpoint or model `folder`, what fails because of a broken file is a
    ValueError that names it."""
    try:
        yield
    except Exception as error:
        if is_lost_touch(error):
            raise
        broken = _broken_file(Path(folder))
        if broken is None and isinstance(error, ValueError | OSError):
            raise
        raise ValueError(
            f"{broken or folder} cannot be read ({str(error) or type(error).__name__}): name another checkpoint or "
            "model, or remove this one, and the same command goes on from the checkpoint before it"
        ) from error


def _broken_file(folder: Path) -> Path | None:
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.safetensors"))):
        try:
            if file.suffix == ".safetensors":
                safe_open(file, "pt").__exit__(None, None, None)
            else:
                read_state(file)
        except Exception:
            return file
    return None


def read_state(file: str | Path) -> Any:
    """Read what a `Trainer` has saved of an optimizer, a schedule or random numbers."""
    with safe_globals():
        return torch.load(file, map_location="cpu", weights_only=True)


def load_sharded_weights(model: PreTrainedModel, folder: str | Path):
    """
    Read the weights of the model folder `folder` into a model whose weights are spread over ranks. Each rank reads its
    own shard only; all ranks must call this.

    Raises:
        ValueError: if the folder lacks a weight.
        OSError: if there are no weights.
    """
    if not list(Path(folder).glob("*.safetensors")):
        raise FileNotFoundError(f"{folder} has no safetensors weights: give the folder of a checkpoint")
    reader = HuggingFaceStorageReader(str(folder))
    saved = reader.read_metadata().state_dict_metadata
    state = get_model_state_dict(model)
    missing = state.keys() - saved.keys() - (model.all_tied_weights_keys or {}).keys()
    if missing:
        raise ValueError(f"{folder} has no weight {min(missing)}: it is no checkpoint of this model")
    state = {name: tensor for name, tensor in state.items() if name in saved}
    contiguous = _redistribute_state_dict(state)
    dcp.load(contiguous, storage_reader=reader)
    state = _redistribute_state_dict(contiguous, reference_state_dict=state)
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))  # tied weights are there once


def load_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: str | Path):
    """Read the state that a sharded run wrote to `folder`, whatever the layout of that run and of this one."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group for group in groups if group["params"]]  # torch cannot load an empty one
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
        load_optimizer_distributed(model, optimizer, str(folder))
    loaded = iter(optimizer.param_groups)
    optimizer.param_groups = [next(loaded) if group["params"] else group for group in groups]


def load_scheduler(scheduler: torch.optim.lr_scheduler.LRScheduler, file: str | Path):
    """
    Read a scheduler's state. Its entries for each group of parameters are fitted to the number of groups of this
    layout: weights on different meshes are in different groups.

    Raises:
        ValueError: if the number differs and the groups do too.
    """
    state = torch.load(file, weights_only=True)
    saved, wanted = (len(of.get("base_lrs", ())) for of in (state, vars(scheduler)))
    if saved != wanted:
        for name, entries in state.items():
            if isinstance(entries, list) and len(entries) == saved:
                if any(entry != entries[0] for entry in entries):
                    raise ValueError(
                        f"{file}: `{name}` differs between groups of parameters, and this layout has other groups: "
                        "resume on the layout of the checkpoint"
                    )
                state[name] = entries[:1] * wanted
    scheduler.load_state_dict(state)
