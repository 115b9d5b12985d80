"""Kernels for experts of different width."""

from .cpu import EMULATES_BFLOAT16, PackedExperts
from .dispatch import runs_on_triton, transforms_active
from .experts import reason_against, swiglu_experts
from .routing import two_level_route


__all__ = [
    "EMULATES_BFLOAT16",
    "PackedExperts",
    "reason_against",
    "runs_on_triton",
    "swiglu_experts",
    "transforms_active",
    "two_level_route",
]
