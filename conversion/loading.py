"""From a source's config.json to its architecture."""

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from .architectures import ARCHITECTURES, Architecture


_UNFIT = {
    "olmo2": "its norms come after attention and feed-forward",
    "olmo3": "its norms come after attention and feed-forward",
    "gemma": "its feed-forward has GELU and its norms have an offset",
    "gemma2": "its feed-forward has GELU, and norms come before and after it",
    "gemma3_text": "its feed-forward has GELU, and norms come before and after it",
    "phi": "attention and feed-forward run side by side, and the feed-forward has biases",
    "gpt2": "its feed-forward has GELU and biases, and its norms are not RMSNorm",
    "gpt_neox": "its feed-forward has GELU and biases, and its norms are not RMSNorm",
    "falcon": "its feed-forward has GELU, and its norms are not RMSNorm",
    "cohere": "attention and feed-forward run side by side",
    "gpt_oss": "its experts have biases and a clipped activation",
    "deepseek_v2": "multi-head latent attention has no converter yet",
    "deepseek_v3": "multi-head latent attention has no converter yet",
}
"""Why some well-known architectures do not fit."""


def read_config(folder: Path) -> dict:
    """
    The config.json of a checkpoint.

    Raises:
        ValueError: if there is none.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no config.json that can be read ({error}): give a checkpoint") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{folder / 'config.json'} is no config: give a checkpoint")
    return fields


def make_architecture(fields: dict) -> Architecture:
    """
    The architecture of a config.

    Raises:
        ValueError: if it cannot be converted, with the reason.
    """
    model_type = fields.get("model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES.keys() - {"mohge"}))
        reason = f": {_UNFIT[model_type]}" if model_type in _UNFIT else ""
        raise ValueError(f"`model_type` {model_type} cannot be converted{reason}. Sources are {known}")
    return ARCHITECTURES[model_type](_typed(fields))


def _typed(fields: dict) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(**fields)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"the source's config.json is not valid ({' '.join(str(error).split())})") from error
