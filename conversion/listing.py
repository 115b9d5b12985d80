"""Which decoders of transformers can be converted, and how."""

from collections.abc import Iterator

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from .decoders import Source, Unconvertible
from .modes import MODES
from .modes.mixtures import FLAT_ROUTERS
from .modes.native import BACKBONES


_LAYERS = 4
"""Enough that a mixture with a few dense layers shows its experts."""


def list_decoders() -> Iterator[str]:
    """A line for each text decoder of transformers: its kind, modes and routers, and what a model with it as backbone
    leaves as; or the reason against it."""
    types = sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING} - {"mohge"})
    width = max(map(len, types))
    for model_type in types:
        yield f"{model_type:<{width}}  {_describe(model_type)}"


def _describe(model_type: str) -> str:
    try:
        source = _source(model_type)
    except Unconvertible as error:
        return f"no: {error.reason}"
    except Exception as error:  # whatever transformers raises must not break the list
        return f"unknown: its default config makes no model ({' '.join(str(error).split())[:120]})"
    kind = "dense" if source.experts is None else "mixture"
    modes = ", ".join(sorted(name for name, mode in MODES.items() if kind in mode.takes))
    routers = "" if kind == "dense" else f"; router: source{', two_level' if model_type in FLAT_ROUTERS else ''}"
    leaves = ", ".join(to for to, backbones in BACKBONES.items() if model_type in backbones)
    return f"{kind:<7}  {modes}{routers}{f'; export --to {leaves}' if leaves else ''}"


def _source(model_type: str) -> Source:
    """The model of the default config, with few layers where that is possible."""
    try:
        return Source(CONFIG_MAPPING[model_type](num_hidden_layers=_LAYERS).get_text_config())
    except Unconvertible:
        raise
    except Exception:  # fields that go by the number of layers
        return Source(CONFIG_MAPPING[model_type]().get_text_config())
