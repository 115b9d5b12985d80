"""Routers: which experts a token goes to, and with which weight.

Shapes: T tokens, H hidden size, E experts in id order, G groups, N largest group, K experts per token, J groups kept
per token. A suffix names the shape of a tensor: `logits_TE`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast
from transformers.utils.import_utils import is_torchdynamo_compiling

from .configuration_mohge import MoHGEConfig


class RouterOutput(NamedTuple):
    """What a router decides; floating point values are at least float32, whatever the model's dtype."""

    logits: torch.Tensor
    """[T, E] expert logits, in id order, before any correction."""
    weights: torch.Tensor
    """[T, K] combine weights before `routed_scaling_factor`; 0 in a masked slot."""
    index: torch.Tensor
    """[T, K] expert ids; a masked slot (`top_p` chose fewer than K) has id E."""
    group_logits: torch.Tensor | None
    """[T, G] group logits of the two-level router, None for routers that have none."""
    group_index: torch.Tensor | None
    """[T, J] groups kept, or None for routers that keep all."""


class MoHGERouter(nn.Module):
    """
    Chooses `num_experts_per_tok` experts for each token, by one of four rules (`config.router_type`).

    - `"two_level"`, MoHGE (https://huggingface.co/papers/2604.23108, section 3): the best groups by group score,
      then the best experts of these groups together, by group score times probability inside the group.
    - `"top_k"` and `"top_p"`, HMoE (https://huggingface.co/papers/2408.10681, section 2): the K most probable experts,
      or the smallest set that reaches `router_top_p`, with K as its cap.
    - `"grouped_top_k"`, Hi-MoE (https://huggingface.co/papers/2605.08292): K / G experts of each group, after
      subtracting a running mean from the logits.

    Args:
        config ([`MoHGEConfig`]): Config of the layer.
    """

    def __init__(self, config: MoHGEConfig):
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.router_type == "two_level" and config.group_score_function != "expert_logsumexp":
            self.group_weight = nn.Parameter(torch.empty(config.num_groups, config.hidden_size))
        self._route = getattr(self, f"_route_{config.router_type}")

        self.equal_groups = min(config.expert_counts) == max(config.expert_counts)
        self.expert_ids_GN: torch.Tensor
        self.position_E: torch.Tensor
        self.membership_GE: torch.Tensor
        self.widths_G: torch.Tensor
        for name, table in self._tables().items():
            self.register_buffer(name, table, persistent=False)
        self.corrects_logits = config.router_logit_ema_strength > 0
        if self.corrects_logits:
            self.logit_ema_E: torch.Tensor
            self.logit_pending: torch.Tensor
            self.register_buffer("logit_ema_E", torch.zeros(config.num_experts))
            # Sum of the logits since the last optimizer step, and as its last entry the number of tokens in it.
            self.register_buffer("logit_pending", torch.zeros(config.num_experts + 1))
            self.last_logits_TE: torch.Tensor | None = None
            self.last_version = -1
        self.step_begins: bool | None = None  # see `MoHGEForCausalLM.set_training_progress`

    def _tables(self) -> dict[str, torch.Tensor]:
        """Expert ids [G, N], E where a group is shorter; position of each id in it; membership [G, E] as 0 and 1;
        widths [G]."""
        groups, slots = torch.tensor(self.config.expert_groups), torch.tensor(self.config.expert_slots)
        return {
            "expert_ids_GN": torch.tensor(self.config.expert_id_table),
            "position_E": groups * max(self.config.expert_counts) + slots,
            "membership_GE": (groups == torch.arange(self.config.num_groups)[:, None]).float(),
            "widths_G": torch.tensor(self.config.moe_intermediate_sizes),
        }

    def _apply(self, fn, recurse=True):
        """Moves the module, but never to half precision what adds up over many tokens."""
        kept = {name: self._buffers[name] for name in ("logit_ema_E", "logit_pending") if name in self._buffers}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self

    @torch.no_grad()
    def init_weights(self, std: float):
        """Draw the weights from a normal distribution and fill the buffers."""
        init.normal_(self.weight, mean=0.0, std=std)
        if hasattr(self, "group_weight"):
            init.normal_(self.group_weight, mean=0.0, std=std)
        for name, table in self._tables().items():
            init.copy_(getattr(self, name), table)
        if self.corrects_logits:
            init.zeros_(self.logit_ema_E)
            init.zeros_(self.logit_pending)

    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route `hidden_states` [T, H]."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        hidden_states = hidden_states.to(dtype)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits_TE = F.linear(hidden_states, self.weight.to(dtype))
            group_index, group_logits_TG, scores_TK, index_TK = self._route(hidden_states, logits_TE)
            weights_TK = self._normalise(scores_TK, index_TK)
        return RouterOutput(logits_TE, weights_TK, index_TK, group_logits_TG, group_index)

    def log_probabilities(self, logits_TE: torch.Tensor, group_logits_TG: torch.Tensor | None) -> torch.Tensor:
        """
        [T, E] log-probability of each expert before any choice: `log p(g) + log p(e | g)` for the two-level router,
        with `p(g)` the softmax of the group logits; the flat log-softmax for the others.
        """
        if self.config.router_type != "two_level":
            return logits_TE.log_softmax(-1)
        inside_TGN = self._by_group(logits_TE).log_softmax(-1)
        return self._by_expert(inside_TGN + group_logits_TG.log_softmax(-1).unsqueeze(-1))

    def group_logits(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, G] logsumexp of the expert logits of each group: their softmax is the groups' share of the flat one."""
        return self._by_group(logits_TE).logsumexp(-1)

    def _route_two_level(self, hidden_states, logits_TE):
        config = self.config
        if config.group_score_function == "expert_logsumexp":
            group_logits_TG = self.group_logits(logits_TE)
        else:
            group_logits_TG = F.linear(hidden_states, self.group_weight.to(hidden_states.dtype))
        # Every score grows with its logit, so the best logits are the best scores even where scores saturate; and the
        # softmax of log-scores is the scores over their sum even where they underflow.
        kept_TJ, group_index_TJ = group_logits_TG.topk(config.num_groups_per_tok, dim=-1)
        if config.group_score_function == "sigmoid":
            kept_TJ = F.logsigmoid(kept_TJ)
        # -1 marks the groups not kept: below every kept expert, even one whose probability underflows to 0.
        scores_TG = torch.full_like(group_logits_TG, -1.0).scatter(-1, group_index_TJ, kept_TJ.softmax(-1))
        scores_TG1 = scores_TG.unsqueeze(-1)
        # The softmax inside groups, spelled out: on short rows these steps beat the softmax kernel.
        logits_TGN = self._by_group(logits_TE)
        exp_TGN = (logits_TGN - logits_TGN.detach().amax(-1, keepdim=True)).exp()
        joint_TGN = exp_TGN * (scores_TG1 / exp_TGN.sum(-1, keepdim=True))
        joint_TGN = torch.where(scores_TG1 < 0, scores_TG1, joint_TGN)
        return group_index_TJ, group_logits_TG, *self._by_expert(joint_TGN).topk(self.top_k, dim=-1)

    def _route_top_k(self, hidden_states, logits_TE):
        return None, None, *logits_TE.softmax(-1).topk(self.top_k, dim=-1)

    def _route_top_p(self, hidden_states, logits_TE):
        scores_TK, index_TK = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        # An expert belongs to the set while those before it fall short of p, so there is always at least one.
        surplus = scores_TK.cumsum(-1) - scores_TK >= self.config.router_top_p
        index_TK = index_TK.masked_fill(surplus, self.config.num_experts)
        return None, None, scores_TK.masked_fill(surplus, 0.0), index_TK

    def _route_grouped_top_k(self, hidden_states, logits_TE):
        corrected_TE = logits_TE
        if self.corrects_logits:
            corrected_TE = logits_TE - self.config.router_logit_ema_strength * self.logit_ema_E.to(logits_TE.dtype)
            if self.training:
                self.last_logits_TE = logits_TE.detach()
        scores_TGN = self._by_group(corrected_TE.softmax(-1), fill=-1.0)
        per_group = self.top_k // self.config.num_groups
        scores_TGk, slots_TGk = scores_TGN.topk(per_group, dim=-1)
        ids_TGN = self.expert_ids_GN.expand(logits_TE.shape[0], -1, -1)
        index_TK = ids_TGN.gather(-1, slots_TGk).flatten(1)
        return None, None, scores_TGk.flatten(1), index_TK

    def _normalise(self, scores_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        match self.config.topk_weight_normalization:
            case "sum":
                return _divide_by_sum(scores_TK)
            case "softmax":
                return scores_TK.masked_fill(index_TK == self.config.num_experts, float("-inf")).softmax(-1)
            case _:
                return scores_TK

    def _by_group(self, values_TE: torch.Tensor, fill: float = float("-inf")) -> torch.Tensor:
        """[T, E] -> [T, G, N], short groups filled up with `fill`."""
        groups, largest = self.expert_ids_GN.shape
        if self.equal_groups:  # ids run over the groups first: a view
            return values_TE.unflatten(1, (largest, groups)).transpose(1, 2)
        ids = self.expert_ids_GN
        padding = ids == self.config.num_experts
        values = values_TE.index_select(1, ids.masked_fill(padding, 0).flatten()).view(-1, groups, largest)
        return values.masked_fill(padding, fill)

    def _by_expert(self, values_TGN: torch.Tensor) -> torch.Tensor:
        """[T, G, N] -> [T, E], the inverse of `_by_group`."""
        if self.equal_groups:
            return values_TGN.transpose(1, 2).flatten(1)
        return values_TGN.flatten(1).index_select(1, self.position_E)

    # Running mean of the logits. It may change only between optimizer steps, and outside the layers: a layer that is
    # checkpointed runs twice, and must see the same mean both times.

    @torch.no_grad()
    def fold_logit_mean(self):
        """At the start of a training forward: take what the last optimizer step saw into the running mean."""
        if self.step_begins is not None:  # somebody says when a step begins
            accumulating = not self.step_begins
            self.step_begins = False
        else:  # guess it: gradients are cleared after a step, and most optimizers mark the weights they change
            accumulating = self.weight.grad is not None
            if not is_torchdynamo_compiling():
                accumulating = accumulating and self.weight._version == self.last_version
        if accumulating:
            return
        count = self.logit_pending[-1]
        decay = torch.where(count > 0, self.config.router_logit_ema_decay, 1.0)
        self.logit_ema_E.lerp_(self.logit_pending[:-1] / count.clamp(min=1), 1 - decay)
        self.logit_pending.zero_()

    @torch.no_grad()
    def gather_logit_mean(self, token_mask: torch.Tensor):
        """At the end of a training forward: add its logits, padding left out, over all data-parallel ranks."""
        logits_TE, self.last_logits_TE = self.last_logits_TE, None
        mask_T = token_mask.flatten().to(logits_TE)
        seen = torch.cat([mask_T @ logits_TE, mask_T.sum()[None]]).to(self.logit_pending.dtype)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)
        self.logit_pending += seen
        if not is_torchdynamo_compiling():
            self.last_version = self.weight._version


def _divide_by_sum(values: torch.Tensor) -> torch.Tensor:
    return values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)


__all__ = ["MoHGERouter", "RouterOutput"]
