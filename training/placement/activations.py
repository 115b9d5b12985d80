"""
What a forward pass keeps for backward, in bytes per token, and what its attention computes.

Experts by formula, since it depends on where they are; everything else is seen in a forward pass on the meta device,
whatever the backbone. For the kernels that MoHGE models use by default, and attention kernels that keep no matrix of
scores (sdpa, flash). What router losses keep is left out: a few numbers per expert at most.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.backbones_mohge import feed_forwards
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.info import model_without_memory


_TOKENS = 64


class AttentionShape(NamedTuple):
    """What the attention of a layer computes."""

    score_width: int
    """Numbers in the query and in the value heads of a token."""
    window: int | None
    """Tokens that a token attends to at most, itself included."""


class _Keep(torch.autograd.Function):
    """Keeps its inputs, and if it is to, its output and a number for each query, as attention kernels do."""

    @staticmethod
    def forward(ctx, shape: tuple[int, ...], statistics: bool, *inputs: torch.Tensor) -> torch.Tensor:
        output = inputs[0].new_empty(shape)
        kept = [output, output.new_empty(shape[:-1], dtype=torch.float32)] if statistics else []
        ctx.save_for_backward(*inputs, *kept)
        return output


def _attention(module: nn.Module, query, key, value, attention_mask, sliding_window=None, **kwargs):
    batch, heads, tokens, width = query.shape
    module.attention_shape = AttentionShape(heads * (width + value.shape[-1]), sliding_window)
    return _Keep.apply((batch, tokens, heads, value.shape[-1]), True, query, key, value), None


AttentionInterface.register("mohge_placement", _attention)


def _experts(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    return _Keep.apply(hidden_states.shape, False, hidden_states, top_k_index, top_k_weights)


def run_without_memory(config: MoHGEConfig, dtype: torch.dtype) -> tuple[MoHGEForCausalLM, list[float]]:
    """
    Run a model without memory forward.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        dtype (`torch.dtype`): Of weights and activations.

    Returns:
        `tuple[MoHGEForCausalLM, list[float]]`: the model, whose attention modules have an `attention_shape` now; and
        the bytes per token that each decoder layer keeps, routed experts left out, and at last those that everything
        around the layers keeps, logits left out.
    """
    config = copy.deepcopy(config)
    for name in ROUTER_COEFFICIENTS.values():
        setattr(config, name, 0.0)
    model = model_without_memory(config).to(dtype).train()
    model.set_attn_implementation("mohge_placement")
    layers = feed_forwards(model)
    kept: list[dict[int, torch.UntypedStorage]] = [{} for _ in range(len(layers) + 1)]
    inside: list[int] = []
    for found in layers:
        found.layer.register_forward_pre_hook(lambda *_, index=found.layer_idx: inside.append(index))
        found.layer.register_forward_hook(lambda *_: inside.clear())
    for found in model.sparse_feed_forwards:
        found.experts.forward = _experts
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            kept[inside[-1] if inside else -1][storage._cdata] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return model, [sum(storage.nbytes() for storage in storages.values()) / _TOKENS for storages in kept]


def expert_bytes(layer: MoHGEConfig, element: int, dispatched: bool) -> torch.Tensor:
    """
    `[E]`, float64: bytes that each expert, by id, keeps for each token it computes: gate and up before SwiGLU and two
    indices; if tokens are `dispatched` to other devices, also the row that came and its unit weight.
    """
    row = layer.hidden_size + 1 if dispatched else 0
    widths = torch.tensor(layer.expert_widths, dtype=torch.float64)
    return (row + 2 * widths) * element + 2 * 4


def sender_bytes(layer: MoHGEConfig, element: int) -> int:
    """Bytes that a token's own device keeps for each of its choices if they are dispatched: the output row, which is
    multiplied by its weight there, and two indices."""
    return layer.hidden_size * element + 2 * 8


__all__ = ["AttentionShape", "expert_bytes", "run_without_memory", "sender_bytes"]
