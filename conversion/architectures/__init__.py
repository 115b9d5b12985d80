"""The architectures that can be converted, one file each."""

from .base import ARCHITECTURES, Architecture, Expert, ExpertLayout, LayerWeights
from .llama import Llama
from .mistral import Mistral
from .mixtral import Mixtral
from .mohge import MoHGE
from .olmoe import Olmoe
from .qwen2 import Qwen2
from .qwen2_moe import Qwen2Moe
from .qwen3 import Qwen3
from .qwen3_moe import Qwen3Moe


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Expert",
    "ExpertLayout",
    "LayerWeights",
    "Llama",
    "Mistral",
    "Mixtral",
    "MoHGE",
    "Olmoe",
    "Qwen2",
    "Qwen2Moe",
    "Qwen3",
    "Qwen3Moe",
]
