"""One layer of a model at a time, run by transformers' own class of that model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel

from .architectures import Architecture


class ComputeInFloat32(TorchFunctionMode):
    """Lets half-precision weights work on float32 activations, one matrix at a time instead of in a copied model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))


@contextmanager
def layer_window(
    architecture: Architecture, layer: int, state: dict[str, torch.Tensor], norm: torch.Tensor | None, device: str
) -> Iterator[nn.Module]:
    """
    The decoder of a model whose only layer is `layer`; it takes `inputs_embeds` and computes in float32. Its weights
    are gone after the context.

    Args:
        architecture ([`Architecture`]): Architecture of the whole model.
        layer (`int`): Number of the layer.
        state (`dict[str, torch.Tensor]`): Tensors of the layer, from `Architecture.module_state`; emptied.
        norm (`torch.Tensor`, *optional*): Weight of the model's final norm, to be applied after the layer.
        device (`str`): Where to compute.
    """
    config = architecture.layer_config(layer)
    config._experts_implementation = "eager"  # works on one expert at a time
    with init_empty_weights():
        decoder = AutoModel._model_mapping[type(config)](config)
    dummy = torch.zeros(1, config.hidden_size)
    weights = {"embed_tokens.weight": dummy, "norm.weight": dummy[0] if norm is None else norm}
    weights |= {f"layers.0.{name}": tensor for name, tensor in state.items()}
    decoder.load_state_dict(weights, strict=True, assign=True)
    state.clear()
    del weights
    for parameter in decoder.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:  # a view would keep the whole file in memory
            parameter.data = parameter.data.clone()
    decoder.to(device).eval()
    if norm is None:
        decoder.norm = nn.Identity()
    try:
        with torch.no_grad(), ComputeInFloat32():
            yield decoder
    finally:
        for parameter in decoder.parameters():  # modules refer to each other: only the garbage collector frees them
            parameter.data = parameter.data.new_empty(0)


class Stream:
    """
    Hidden states between layers, kept in files so that memory does not grow with the number of tokens.

    Args:
        folder (`Path`): Folder for the files.
        kind (`str`): Name of the model whose states these are.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind

    def _path(self, layer: int, batch: int) -> Path:
        return self.folder / f"{self.kind}-{layer}-{batch}.safetensors"

    def load(self, layer: int, batch: int) -> torch.Tensor:
        """[b, S, H] states that enter `layer`."""
        return load_file(self._path(layer, batch))["states"]

    def save(self, layer: int, batch: int, states: torch.Tensor):
        """Keep the states that enter `layer`."""
        save_file({"states": states.float().cpu().contiguous()}, self._path(layer, batch))

    def drop(self, layer: int):
        """Remove the states that enter `layer`."""
        for path in self.folder.glob(f"{self.kind}-{layer}-*.safetensors"):
            path.unlink()
