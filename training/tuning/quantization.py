"""Experts in 8 bits (torchao, `pip install torchao`), group by group. Everything else stays as it is."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.conversion.tokenizer import load_tokenizer
from mohge.loading import load_model
from mohge.model_cards.shipped import load_config
from mohge.model_cards.writing import new_folder

from .merge import add_config, is_quantized, save_without_config


KINDS = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}
"""What weights can become: 8-bit integers or floats (e4m3), with a float32 scale for each row of each expert. torchao
has no 4-bit format for stacks of experts that runs on CPU."""


def expert_quantization(config: MoHGEConfig, kind: Literal["int8", "float8"], min_width: int = 0) -> TorchAoConfig:
    """
    Quantisation of the experts' weights, for `from_pretrained(..., quantization_config=...)`, which quantises one
    stack at a time as it is read. The forward pass dequantises one group at a time.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        kind (`str`): `"int8"` or `"float8"`.
        min_width (`int`, *optional*, defaults to 0):
            Groups of narrower experts stay as they are: they have few weights.

    Raises:
        ValueError: if the model is quantised already, or no group is left to quantise.
    """
    if is_quantized(config):
        raise ValueError("`quantize`: the model is saved quantised already: name the model that it was made of")
    layers = []
    sparse = [index for index in range(config.num_hidden_layers) if index not in config.mlp_only_layers]
    for index, layer in zip(sparse, config.sparse_layers, strict=True):
        groups = [str(group) for group in layer.kept_groups if layer.moe_intermediate_sizes[group] >= min_width]
        if groups:
            layers.append(rf"{index}\.\w+\.experts\.(gate_up|down)_proj_({'|'.join(groups)})")
    if not layers:
        raise ValueError(f"`quantize_min_width` is {min_width}, and no expert is that wide: lower it")
    pattern = rf"re:(.*\.)?layers\.({'|'.join(layers)})"
    return TorchAoConfig(FqnToConfig({pattern: KINDS[kind](set_inductor_config=False)}))


class _AdaptableQuantizer(TorchAoHfQuantizer):
    # transformers guesses this from the name of torchao's config, and knows none that names weights.
    is_trainable = True


def allow_adapters(model: MoHGEForCausalLM):
    """Let `Trainer` train adapters on a model with quantised experts, whose gradients pass through them."""
    model.hf_quantizer.__class__ = _AdaptableQuantizer


@dataclass
class QuantizedCheckpoint:
    """
    What quantising a checkpoint did.

    Args:
        bytes_before (`int`): Size of the weights.
        bytes_after (`int`): Size of the quantised weights.
        reloaded (`bool`): Whether the weights read back from disk are those that were written, bit for bit.
    """

    bytes_before: int
    bytes_after: int
    reloaded: bool


def quantize_checkpoint(
    source: str | Path,
    target: str | Path,
    kind: Literal["int8", "float8"],
    min_width: int = 0,
    dtype: torch.dtype | str | None = None,
) -> QuantizedCheckpoint:
    """
    Quantise the experts of the model `source` and write model and tokenizer to `target`, which is created only if the
    weights read back from it are the same. `from_pretrained` loads it as it is.

    Args:
        source (`str` or `Path`): Model folder or Hub id.
        target (`str` or `Path`): Folder to create.
        kind (`str`): `"int8"` or `"float8"`.
        min_width (`int`, *optional*, defaults to 0): Groups of narrower experts stay as they are.
        dtype (`torch.dtype` or `str`, *optional*): Of the other weights; by default the model's.

    Raises:
        ValueError: if `source` is quantised already, or no group is left to quantise.
        OSError: if `target` exists, or `source` cannot be read.
    """
    target = Path(target)
    config = load_config(str(source))
    quantization = expert_quantization(config, kind, min_width)
    with new_folder(target, "quantize") as temporary:
        folder = temporary / "quantized"
        dtype = dtype or config.dtype or torch.float32
        model = load_model(source, dtype=dtype, quantization_config=quantization)
        config = save_without_config(model, folder, load_tokenizer(source))
        result = QuantizedCheckpoint(
            bytes_before=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
            bytes_after=sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            reloaded=_same_weights(model, load_model(folder, config=config)),
        )
        if result.reloaded:
            add_config(folder, target)
    return result


def _same_weights(model: MoHGEForCausalLM, other: MoHGEForCausalLM) -> bool:
    def tensors(of: MoHGEForCausalLM) -> dict[str, torch.Tensor]:
        return dict(chain(of.named_parameters(), of.named_buffers()))

    ours, theirs = tensors(model), tensors(other)
    return ours.keys() == theirs.keys() and all(
        type(ours[name]) is type(theirs[name]) and torch.equal(_plain(ours[name]), _plain(theirs[name]))
        for name in ours
    )


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor


__all__ = ["KINDS", "QuantizedCheckpoint", "allow_adapters", "expert_quantization", "quantize_checkpoint"]
