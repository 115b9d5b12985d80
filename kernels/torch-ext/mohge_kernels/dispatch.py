"""What all operators share: their namespace, and the choice of an implementation."""

import os

import torch


try:  # written by kernel-builder, so that several versions of a Hub kernel can be loaded at once
    from ._ops import add_op_namespace_prefix as qualified
except ImportError:

    def qualified(name: str) -> str:
        """Name of an operator, with its namespace."""
        return f"mohge_kernels::{name}"


def transforms_active() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which the operators do not support."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def runs_on_triton(tensor: torch.Tensor) -> bool:
    """Tensors on CUDA do; with `MOHGE_KERNELS_INTERPRET=1` and `TRITON_INTERPRET=1` those on CPU do too."""
    return tensor.is_cuda or os.environ.get("MOHGE_KERNELS_INTERPRET") == "1"
