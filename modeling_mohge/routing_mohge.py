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


try:
    import mohge_kernels
except ImportError:  # this file also travels with checkpoints
    mohge_kernels = None


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


class ExpertTables(nn.Module):
    """
    How the experts of a layer are numbered and grouped, as tensors.

    Args:
        config ([`MoHGEConfig`]): Config of the layer.
    """

    corrects_logits = False

    def __init__(self, config: MoHGEConfig):
        super().__init__()
        self.config = config
        self.equal_groups = min(config.expert_counts) == max(config.expert_counts)
        self.expert_ids_NG: torch.Tensor
        self.position_E: torch.Tensor
        self.group_of_E: torch.Tensor
        self.membership_GE: torch.Tensor
        self.widths_G: torch.Tensor
        for name, table in self._tables().items():
            self.register_buffer(name, table, persistent=False)

    def _tables(self) -> dict[str, torch.Tensor]:
        """Expert ids [N, G], E where a group is shorter; position of each id in it; group of each id; membership
        [G, E] as 0 and 1; widths [G]."""
        groups, slots = torch.tensor(self.config.expert_groups), torch.tensor(self.config.expert_slots)
        return {
            "expert_ids_NG": torch.tensor(self.config.expert_id_table).T.contiguous(),
            "position_E": slots * self.config.num_groups + groups,
            "group_of_E": groups,
            "membership_GE": (groups == torch.arange(self.config.num_groups)[:, None]).float(),
            "widths_G": torch.tensor(self.config.moe_intermediate_sizes),
        }

    def extra_repr(self) -> str:
        """What `print` says: the router, and for each group how many experts of which width."""
        config = self.config
        chosen = f"top_k={config.num_experts_per_tok}"
        if config.router_type == "two_level":
            chosen += f" from {config.num_groups_per_tok} of {config.num_groups} groups"
        groups = [f"{n} x {w}" for n, w in zip(config.expert_counts, config.moe_intermediate_sizes, strict=True)]
        return f"{config.router_type}, {chosen}, experts x width: {', '.join(groups)}"

    @torch.no_grad()
    def fill_tables(self):
        """Fill the tables, which no checkpoint holds."""
        for name, table in self._tables().items():
            init.copy_(getattr(self, name), table)

    def log_probabilities(self, logits_TE: torch.Tensor, group_logits_TG: torch.Tensor | None) -> torch.Tensor:
        """
        [T, E] log-probability of each expert before any choice: `log p(g) + log p(e | g)` for the two-level router,
        with `p(g)` the softmax of the group logits; the flat log-softmax for the others.
        """
        if self.config.router_type != "two_level":
            return logits_TE.log_softmax(-1)
        inside_TNG = self._by_group(logits_TE).log_softmax(1)
        return self._by_expert(inside_TNG + group_logits_TG.log_softmax(-1).unsqueeze(1))

    def group_logits(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """[T, G] logsumexp of the expert logits of each group: their softmax is the groups' share of the flat one."""
        return self._by_group(logits_TE).logsumexp(1)

    def _by_group(self, values_TE: torch.Tensor) -> torch.Tensor:
        """[T, E] -> [T, N, G], short groups filled up with -inf."""
        if self.equal_groups:  # ids run over the groups first: a view
            return values_TE.unflatten(1, self.expert_ids_NG.shape)
        padding_NG = self.expert_ids_NG == self.config.num_experts
        ids = self.expert_ids_NG.masked_fill(padding_NG, 0).flatten()
        return values_TE.index_select(1, ids).unflatten(1, padding_NG.shape).masked_fill(padding_NG, float("-inf"))

    def _by_expert(self, values_TNG: torch.Tensor) -> torch.Tensor:
        """[T, N, G] -> [T, E], the inverse of `_by_group`."""
        values = values_TNG.flatten(1)
        return values if self.equal_groups else values.index_select(1, self.position_E)


class MoHGERouter(ExpertTables):
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
        super().__init__(config)
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.router_type == "two_level" and config.group_score_function != "expert_logsumexp":
            self.group_weight = nn.Parameter(torch.empty(config.num_groups, config.hidden_size))
        self.corrects_logits = config.router_logit_ema_strength > 0
        if self.corrects_logits:
            self.logit_ema_E: torch.Tensor
            self.logit_pending: torch.Tensor
            self.register_buffer("logit_ema_E", torch.zeros(config.num_experts))
            # Sum of the logits since the last optimizer step, and as its last entry the number of tokens in it.
            self.register_buffer("logit_pending", torch.zeros(config.num_experts + 1))
            self.last_logits_TE: torch.Tensor | None = None
            self.last_version = -1

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
        """Draw the weights from a normal distribution and clear the running mean."""
        init.normal_(self.weight, mean=0.0, std=std)
        if hasattr(self, "group_weight"):
            init.normal_(self.group_weight, mean=0.0, std=std)
        if self.corrects_logits:
            init.zeros_(self.logit_ema_E)
            init.zeros_(self.logit_pending)

    def forward(self, hidden_states: torch.Tensor) -> RouterOutput:
        """Route `hidden_states` [T, H]."""
        route = getattr(self, f"_route_{self.config.router_type}")
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        hidden_states = hidden_states.to(dtype)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits_TE = F.linear(hidden_states, self.weight.to(dtype))
            group_index_TJ, group_logits_TG, log_scores_TK, index_TK = route(hidden_states, logits_TE)
            weights_TK = self._normalise(log_scores_TK, index_TK)
        return RouterOutput(logits_TE, weights_TK, index_TK, group_logits_TG, group_index_TJ)

    # The rules, in logarithms so that nothing underflows: each returns the groups kept, the group logits (both None
    # where there is no group router), the log-scores of the chosen experts and their ids.

    def _route_two_level(self, hidden_states, logits_TE):
        config = self.config
        if config.group_score_function == "expert_logsumexp":
            group_logits_TG = self.group_logits(logits_TE)
        else:
            group_logits_TG = F.linear(hidden_states, self.group_weight.to(hidden_states.dtype))
        if self._has_kernel(logits_TE):
            sigmoid = config.group_score_function == "sigmoid"
            log_scores_TK, index_TK, group_index_TJ = mohge_kernels.two_level_route(
                logits_TE, group_logits_TG, self.group_of_E, self.top_k, config.num_groups_per_tok, sigmoid
            )
            return group_index_TJ, group_logits_TG, log_scores_TK, index_TK
        # Every score grows with its logit, so the best logits are the best scores, also where scores saturate.
        group_index_TJ = group_logits_TG.topk(config.num_groups_per_tok, dim=-1).indices
        # Masked, not gathered and scattered: the derivative of that is a scatter, and torch.compile on a CPU, up to
        # PyTorch 2.13 at least, may compute what reads the result before it (pytorch/pytorch#185873).
        kept_TG = (group_index_TJ.unsqueeze(-1) == torch.arange(config.num_groups, device=logits_TE.device)).any(1)
        log_scores_TG = F.logsigmoid(group_logits_TG) if config.group_score_function == "sigmoid" else group_logits_TG
        log_scores_TG = log_scores_TG.masked_fill(~kept_TG, float("-inf")).log_softmax(-1)
        joint_TNG = self._by_group(logits_TE).log_softmax(1) + log_scores_TG.unsqueeze(1)
        return group_index_TJ, group_logits_TG, *self._by_expert(joint_TNG).topk(self.top_k, dim=-1)

    @staticmethod
    def _has_kernel(logits: torch.Tensor) -> bool:
        """Whether one kernel does what follows, in place of a dozen that each take longer to launch than to run."""
        return (
            mohge_kernels is not None
            and mohge_kernels.runs_on_triton(logits)
            and mohge_kernels.reason_against(logits.device, logits.dtype) is None
            and logits.dtype == torch.float32
        )

    def _route_top_k(self, hidden_states, logits_TE):
        return None, None, *logits_TE.log_softmax(-1).topk(self.top_k, dim=-1)

    def _route_top_p(self, hidden_states, logits_TE):
        log_scores_TK, index_TK = logits_TE.log_softmax(-1).topk(self.top_k, dim=-1)
        # An expert belongs to the set while those before it fall short of p, so there is always at least one.
        scores_TK = log_scores_TK.exp()
        surplus_TK = scores_TK.cumsum(-1) - scores_TK >= self.config.router_top_p
        index_TK = index_TK.masked_fill(surplus_TK, self.config.num_experts)
        return None, None, log_scores_TK.masked_fill(surplus_TK, float("-inf")), index_TK

    def _route_grouped_top_k(self, hidden_states, logits_TE):
        corrected_TE = logits_TE
        if self.corrects_logits:
            corrected_TE = logits_TE - self.config.router_logit_ema_strength * self.logit_ema_E.to(logits_TE.dtype)
            if self.training:
                self.last_logits_TE = logits_TE.detach()
        log_scores_TNG = self._by_group(corrected_TE.log_softmax(-1))
        per_group = self.top_k // self.config.num_groups
        log_scores_TkG, slots_TkG = log_scores_TNG.topk(per_group, dim=1)
        ids_TNG = self.expert_ids_NG.expand(logits_TE.shape[0], -1, -1)
        return None, None, log_scores_TkG.flatten(1), ids_TNG.gather(1, slots_TkG).flatten(1)

    def _normalise(self, log_scores_TK: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        match self.config.topk_weight_normalization:
            case "sum":  # the softmax of logarithms divides by the sum
                return log_scores_TK.softmax(-1)
            case "softmax":
                empty_TK = index_TK == self.config.num_experts
                return log_scores_TK.exp().masked_fill(empty_TK, float("-inf")).softmax(-1)
            case _:
                return log_scores_TK.exp()

    # Running mean of the logits. It may change only between optimizer steps, and outside the layers: a layer that is
    # checkpointed runs twice, and must see the same mean both times.

    @torch.no_grad()
    def fold_logit_mean(self):
        """Take what the last optimizer step saw into the running mean."""
        count = self.logit_pending[-1]
        decay = torch.where(count > 0, self.config.router_logit_ema_decay, 1.0)
        self.logit_ema_E.lerp_(self.logit_pending[:-1] / count.clamp(min=1), 1 - decay)
        self.logit_pending.zero_()

    def step_seems_new(self) -> bool:
        """Whether the training forward that begins is the first of an optimizer step, as far as one can tell: after a
        step gradients are cleared, and most optimizers mark the weights they change."""
        if self.weight.grad is None:
            return True
        return not is_torchdynamo_compiling() and self.weight._version != self.last_version

    @torch.no_grad()
    def gather_logit_mean(self, token_mask: torch.Tensor):
        """At the end of a training forward: add its logits, padding left out."""
        logits_TE, self.last_logits_TE = self.last_logits_TE, None
        if logits_TE is None:  # the layer did not run
            return
        mask_T = token_mask.flatten().to(logits_TE)
        self.logit_pending += torch.cat([mask_T @ logits_TE, mask_T.sum()[None]]).to(self.logit_pending.dtype)
        if not is_torchdynamo_compiling():
            self.last_version = self.weight._version


__all__ = ["ExpertTables", "MoHGERouter", "RouterOutput"]
