"""What the loss of a dense model loses without each neuron."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM

from mohge.backbones_mohge import feed_forwards


_TOKENS = 8192
"""Most tokens of the backward pass."""


def neuron_saliency(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """
    [L, D] sum over tokens of (a dL/da)^2, a the activation of a neuron and L the summed loss. Takes the whole model in
    memory.

    Args:
        folder (`Path`): Of the model.
        ids (`torch.Tensor`): Tokens [N, S].
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    activations: list[torch.Tensor] = []

    def keep(module, args):
        activation = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        activation.retain_grad()
        activations.append(activation)
        return (activation,)

    for found in feed_forwards(model):
        down = [module for module in found.module.modules() if isinstance(module, nn.Linear)][-1]
        down.register_forward_pre_hook(keep)
    total = None
    for row in ids[: max(1, _TOKENS // ids.shape[1])]:
        logits = model(row[None], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits.float(), row[1:], reduction="sum").backward()
        sums = torch.stack([(a.detach() * a.grad).square().flatten(0, -2).sum(0) for a in activations])
        total = sums if total is None else total + sums
        activations.clear()
    return total
