"""Kernels for experts of different width."""

from .cpu import PackedExperts
from .dispatch import runs_on_triton, transforms_active
from .experts import reason_against, swiglu_experts
from .routing import two_level_route


__all__ = [
    "PackedExperts",
    "reason_against",
    "runs_on_triton",
    "swiglu_experts",
    "transforms_active",
    "two_level_route",
]
