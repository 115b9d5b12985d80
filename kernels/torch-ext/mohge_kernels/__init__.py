"""Kernels for experts of different width."""

from .cpu import PackedExperts
from .experts import reason_against, swiglu_experts


__all__ = ["PackedExperts", "reason_against", "swiglu_experts"]
