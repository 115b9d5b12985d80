"""Models from disk or from the Hub, with every weight that they have to have."""

from pathlib import Path

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
        raise ValueError(f"{name} {reason}: save the model again, or take another checkpoint")
    return model


def _reason_against(model: MoHGEForCausalLM, found: dict) -> str | None:
    for problem, says in (
        ("missing_keys", "lacks the weight"),
        ("unexpected_keys", "has a weight that its config has no place for,"),
        ("mismatched_keys", "has a weight of another shape than its config asks for,"),
    ):
        if found[problem]:
            names = sorted(key if isinstance(key, str) else key[0] for key in found[problem])
            return f"{says} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if is_traceable_wrapper_subclass(tensor) or tensor.is_meta or not tensor.is_floating_point():  # quantised
            continue
        if not tensor.isfinite().all():
            return f"holds numbers that are not finite, in {name}"
    return None


__all__ = ["load_model"]
