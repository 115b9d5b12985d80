"""Models from disk or from the Hub, with every weight that they have to have."""

from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .modeling_mohge import MoHGEForCausalLM


def load_model(name: str | Path, **kwargs) -> MoHGEForCausalLM:
    """
    Load a language model, or an adapter with its base model, of which no weight is missing, left over or not finite.
    `from_pretrained` fills what is missing at random, with a warning. Of a model that is spread over ranks, all ranks
    must call this.

    Args:
        name (`str` or `Path`): Folder or Hub id.
        kwargs: As for `from_pretrained`.

    Raises:
        ValueError: naming the tensor, or the file that cannot be read.
        OSError: if there is no such model.
    """
    kwargs.setdefault("dtype", "auto")
    try:
        model, found = MoHGEForCausalLM.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{name} does not load ({' '.join(str(error).split())[:300]}): save it again") from error
    reason = _reason_against(model, found)
    if dist.is_initialized():  # each rank has looked at its own part
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
        reason = next(filter(None, reasons), None)
    if reason is not None:
        raise ValueError(f"{reason.format(place=name)}: save the model again, or start from other weights")
    return model


def _reason_against(model: MoHGEForCausalLM, found: dict) -> str | None:
    reason = reason_against_keys(found)
    if reason is not None:
        return reason
    name = find_not_finite(dict(chain(model.named_parameters(), model.named_buffers())))
    return None if name is None else f"`{name}` of {{place}} is not finite"


def reason_against_keys(found: Mapping[str, Iterable[str | tuple]]) -> str | None:
    """What is wrong with weights of which keys were `found` missing, left over or mismatched, with `{place}` where it
    is to say where they are; None if nothing is."""
    for problem, says in (
        ("missing_keys", "{place} lacks the weight"),
        ("unexpected_keys", "{place} has a weight that its config has no place for,"),
        ("mismatched_keys", "{place} has a weight of another shape than its config asks for,"),
    ):
        if found[problem]:
            names = sorted(key if isinstance(key, str) else key[0] for key in found[problem])
            return f"{says} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    return None


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, as plain numbers."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor  # torchao's


def find_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor of which this rank holds a number that is not finite. Waits for the device once."""
    finite = [torch.isfinite(local_tensor(tensor)).all() for tensor in tensors.values()]
    if not finite:
        return None
    flags = torch.stack([flag.to(finite[0].device) for flag in finite]).tolist()
    return next((name for name, flag in zip(tensors, flags, strict=True) if not flag), None)


__all__ = ["find_not_finite", "load_model", "local_tensor", "reason_against_keys"]
