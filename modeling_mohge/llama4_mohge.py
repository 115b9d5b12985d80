"""Llama 4's mixture behind transformers' interface for experts, which its own class does not have."""

import torch
from torch import nn
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextExperts, Llama4TextMoe


def scale_input(experts: nn.Module, arguments: tuple) -> tuple:
    """Before experts whose weight is on what goes in, not on what comes out. Right for one expert a token."""
    hidden_states, top_k_index, top_k_weights = arguments
    return hidden_states * top_k_weights, top_k_index, torch.ones_like(top_k_weights)


@use_experts_implementation(is_transposed=True)
class _Experts(nn.Module):
    """The experts of a layer, called with ids and weights: `gate_up_proj` `[E, H, 2 W]`, `down_proj` `[E, W, H]`."""

    scales_input = True

    def __init__(self, config, source: Llama4TextExperts):
        super().__init__()
        self.num_experts = source.num_experts
        self.gate_up_proj, self.down_proj, self.act_fn = source.gate_up_proj, source.down_proj, source.act_fn
        self.register_forward_pre_hook(scale_input)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] -> [T, H]"""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_idx, position = torch.where(top_k_index == expert)
            gated = self._apply_gate(torch.matmul(hidden_states[token_idx], self.gate_up_proj[expert]))
            states = torch.matmul(gated, self.down_proj[expert]) * top_k_weights[token_idx, position, None]
            output.index_add_(0, token_idx, states.to(output.dtype))
        return output


class _Router(Llama4Router):
    """Returns logits first, as other routers do."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden_states)[::-1]


class _Block(nn.Module):
    """Router, experts and shared expert, each expert run on its own tokens."""

    def __init__(self, config, source: Llama4TextMoe):
        super().__init__()
        self.router, self.shared_expert = source.router, source.shared_expert
        self.router.__class__ = _Router
        self.experts = _Experts(config, source.experts)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat_hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, scores = self.router(flat_hidden_states)
        weights, index = scores.topk(1, dim=-1)
        return self.experts(flat_hidden_states, index, weights) + self.shared_expert(flat_hidden_states), logits


def adapt_llama4(model: PreTrainedModel) -> bool:
    """
    Put blocks that call their experts by that interface in place of Llama 4's, with the same weights under the
    same names. Says whether there were any.

    Raises:
        ValueError: if a token has more than one expert, whose scaled inputs the interface cannot hold.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, Llama4TextMoe)}
    for name, block in blocks.items():
        if block.top_k > 1:
            raise ValueError(f"Llama4TextMoe scales the input of {block.top_k} experts a token, and ours of one only")
        model.set_submodule(name, _Block(model.config, block))
    return bool(blocks)


__all__ = ["adapt_llama4", "scale_input"]
