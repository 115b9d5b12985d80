"""From a source's config.json to its architecture."""

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

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


def make_architecture(fields: dict) -> Architecture:
    """
    The architecture of a config.

    Raises:
        ValueError: if it cannot be converted, with the reason.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES.keys() - {"mohge"}))
        reason = f": {_UNFIT[model_type]}" if str(model_type) in _UNFIT else ""
        raise ValueError(f"`model_type` {model_type} cannot be converted{reason}. Sources are {known}")
    try:
        architecture = ARCHITECTURES[model_type](AutoConfig.for_model(**fields))
        architecture.equivalent()
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"the source's config.json is not valid ({type(error).__name__}: {' '.join(str(error).split())}): mend it"
        ) from error
    return architecture
