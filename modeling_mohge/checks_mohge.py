"""Checks of config fields before anything is made of them, and one kind of error for all of them."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig


MAX_LAYERS, MAX_EXPERTS = 2_000, 65_536
"""Far beyond any model: so many layers, or experts in a layer, are a mistake, and take minutes to lay out."""
_MAPPINGS = {
    "per_layer_config": "the fields of each layer that differ, such as {1: {...}}",
    "rope_parameters": 'the rotary embedding\'s, such as {"rope_type": "default", "rope_theta": 10000.0}',
    "rope_scaling": 'the rotary embedding\'s, such as {"rope_type": "default", "rope_theta": 10000.0}',
    "quantization_config": "those of a quantisation that transformers knows",
}
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("head_dim", "max_position_embeddings"),
)
_NUMBERS_OF_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def value_errors(cls: type) -> type:
    """Make every error of a config's `__init__` a `ValueError` on one line, those of wrong types too."""
    initial = cls.__init__

    @functools.wraps(initial)
    def __init__(self, *args, **kwargs):
        try:
            initial(self, *args, **kwargs)
        except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            if not isinstance(error, StrictDataclassError):  # which says it
                reason = f"{type(error).__name__}: {reason}"
            raise ValueError(f"a field has a wrong value ({reason}): mend that field") from error

    cls.__init__ = __init__
    return cls


def check_form(fields: Mapping[str, Any]):
    """
    Check, of the fields that a config is made of, what its own classes take for granted.

    Raises:
        ValueError: naming the field and the remedy.
    """
    for name, remedy in _MAPPINGS.items():
        value = fields.get(name)
        if value is not None and not isinstance(value, Mapping) and not hasattr(value, "to_dict"):
            raise ValueError(
                f"`{name}` is {value!r}, and no mapping of fields to values: give {remedy}, or leave it out"
            )
    for layer, values in (fields.get("per_layer_config") or {}).items():
        if not (isinstance(layer, int) or str(layer).isdigit()) or not isinstance(values, Mapping):
            raise ValueError(
                f"`per_layer_config` has {layer!r}: {values!r}: give numbers of layers, and for each the fields that "
                "differ, such as {1: {...}}"
            )
    dtype = fields.get("dtype")
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f'`dtype` is {dtype!r}: give one of torch\'s, such as "bfloat16", or leave it out')
    for name in _NUMBERS_OF_LAYERS:
        value = fields.get(name)
        if isinstance(value, int) and value > MAX_LAYERS:
            raise ValueError(f"`{name}` is {value}: give at most {MAX_LAYERS:,} layers")


def check_finite(config: PreTrainedConfig):
    """
    Check that no number in a config is NaN or infinite, unless that is the field's default.

    Raises:
        ValueError: naming the field.
    """
    for name, field in type(config).__dataclass_fields__.items():
        value = vars(config).get(name)
        if value != field.default and not isinstance(value, PreTrainedConfig) and not _is_finite(value):
            raise ValueError(f"`{name}` is {value}: give finite numbers")


def check_backbone(config: PreTrainedConfig):
    """
    Check what a backbone's config takes, and its model fails at in words that name no field.

    Raises:
        ValueError: naming the field.
    """
    for name in _SIZES:
        value = vars(config).get(name)
        if isinstance(value, int) and value < 1:
            raise ValueError(f"`{name}` is {value}: it must be at least 1")
    for name in ("hidden_act", "hidden_activation"):
        value = vars(config).get(name)
        if isinstance(value, str) and value not in ACT2FN:
            raise ValueError(f'`{name}` is {value!r}, which transformers does not have: give one such as "silu"')


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list | tuple) or all(map(_is_finite, value))


__all__ = ["MAX_EXPERTS", "check_backbone", "check_finite", "check_form", "value_errors"]
