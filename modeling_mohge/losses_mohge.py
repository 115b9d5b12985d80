"""Router losses, and the counts that losses and reports share.

Shapes: T tokens, E experts, G groups, K experts per token; R segments, the stretches of tokens over which the balance
losses take their statistics, of S tokens each (T = R S).
"""

from typing import NamedTuple

import torch

from .configuration_mohge import ROUTER_COEFFICIENTS, MoHGEConfig
from .routing_mohge import MoHGERouter, RouterOutput


class RouterLosses(NamedTuple):
    """Router losses of one forward pass."""

    aux_loss: torch.Tensor
    """Weighted sum of the losses: what is added to the language-model loss in training."""
    values: dict[str, torch.Tensor]
    """Value of each loss that is switched on, without its coefficient and schedule, averaged over the layers."""
    tokens_per_expert: tuple[torch.Tensor, ...]
    """[E] number of tokens that chose each expert, for each layer, padding left out."""


def router_losses(
    routers: list[MoHGERouter],
    outputs: list[RouterOutput],
    token_mask: torch.Tensor,
    sequence_weights: torch.Tensor | None,
    progress: torch.Tensor,
) -> RouterLosses:
    r"""
    Router losses of the layers `routers`, averaged over the layers so that coefficients do not depend on depth. (The
    MoHGE release adds the layers up: multiply its coefficients by the number of layers for the same strength.)

    The balance losses are products of batch means, so the losses of the parts of a batch do not add up to the loss
    of the whole. Where the batch is split, over accumulation steps or ranks, each sequence is therefore a segment of
    its own, and the segments are weighted by `sequence_weights`: any split into rows gives the same loss and gradient.
    A row counts as one sequence, also if documents are packed into it; balance over a short row is mostly noise.

    Args:
        routers (`list[MoHGERouter]`): The L routers.
        outputs (`list[RouterOutput]`): What each of them returned for the B S tokens.
        token_mask (`torch.Tensor` of shape `[B, S]`): 0 where a token is padding.
        sequence_weights (`torch.Tensor` of shape `[B]`, *optional*):
            Each sequence's share of the whole batch. `None` if these B sequences are the whole batch: all tokens
            are then one segment.
        progress (`torch.Tensor`): Fraction of training done, or -1 if unknown (every schedule at its end value).
    """
    mask = token_mask.to(outputs[0].logits.dtype)
    if sequence_weights is None:
        mask, sequence_weights = mask.reshape(1, -1), mask.new_ones(1)
    sequence_weights = sequence_weights.to(mask.dtype)

    layers = [  # which may sit on several devices
        _layer_losses(router, output, mask.to(output.logits.device))
        for router, output in zip(routers, outputs, strict=True)
    ]
    schedules = _schedules(routers[0].config, progress)
    aux_loss = mask.new_zeros(())
    values = {}
    for name in switched_on(routers[0].config):
        per_segment = torch.stack([losses[name].to(mask.device) for losses, _ in layers]).mean(0)
        weighted = per_segment @ sequence_weights
        aux_loss = aux_loss + getattr(routers[0].config, ROUTER_COEFFICIENTS[name]) * schedules.get(name, 1) * weighted
        values[name] = weighted.detach() / sequence_weights.sum().clamp(min=torch.finfo(mask.dtype).tiny)
    return RouterLosses(aux_loss, values, tuple(counts.sum(0) for _, counts in layers))


def switched_on(config: MoHGEConfig) -> list[str]:
    """Names of the router losses that are switched on."""
    return [name for name, field in ROUTER_COEFFICIENTS.items() if getattr(config, field) > 0]


def has_router_losses(config: MoHGEConfig) -> bool:
    """Whether any router loss is switched on."""
    return bool(switched_on(config))


def targets_per_sequence(labels: torch.Tensor, shift_labels: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """[B]: number of targets of each sequence, of the arguments of a language model's forward."""
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return targets.ne(-100).sum(-1)


def at_least_one(count: torch.Tensor | int) -> torch.Tensor | int:
    """What to divide by where something is shared out among `count`, which may be none."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)


def _schedules(config: MoHGEConfig, progress: torch.Tensor) -> dict[str, torch.Tensor]:
    unknown = progress < 0
    group = unknown | (progress >= config.group_aux_loss_start)
    schedules = {"group": group.to(progress.dtype)}
    if config.router_intra_group_warmup:
        risen = (progress / config.router_intra_group_warmup).clamp(max=1)
        schedules["intra_group"] = torch.where(unknown, 1.0, risen)
    return schedules


def _layer_losses(
    router: MoHGERouter, output: RouterOutput, mask_RS: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The [R] losses that are switched on, and the [R, E] counts of tokens that chose each expert."""
    statistics = _Statistics(router, output, mask_RS)
    losses = {name: _LOSSES[name](router.config, statistics) for name in switched_on(router.config)}
    return losses, statistics.counts_RE


class _Statistics:
    """What the losses of one layer have in common. Frequencies are counts and carry no gradient."""

    def __init__(self, router: MoHGERouter, output: RouterOutput, mask_RS: torch.Tensor):
        self.router, self.output, self.mask_RS = router, output, mask_RS
        self.tokens_R1 = mask_RS.sum(1, keepdim=True).clamp(min=1)
        self.counts_RE = self.add_up(output.index, torch.ones_like(output.weights), router.config.num_experts)
        self._log_probabilities_TE = None

    @property
    def log_probabilities_TE(self) -> torch.Tensor:
        if self._log_probabilities_TE is None:
            self._log_probabilities_TE = self.router.log_probabilities(self.output.logits, self.output.group_logits)
        return self._log_probabilities_TE

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens of each segment: [T] -> [R], [T, X] -> [R, X]."""
        segments = values.view(*self.mask_RS.shape, -1)
        means = (self.mask_RS.unsqueeze(1) @ segments).squeeze(1) / self.tokens_R1
        return means if values.dim() == 2 else means.squeeze(1)

    def add_up(self, index_TK: torch.Tensor, values_TK: torch.Tensor, size: int) -> torch.Tensor:
        """[R, size] sums of the values at each index over the tokens of a segment; index `size` is dropped."""
        segments = self.mask_RS.shape[0]
        values = (values_TK.view(*self.mask_RS.shape, -1) * self.mask_RS.unsqueeze(-1)).view(segments, -1)
        sums = values.new_zeros(segments, size + 1).scatter_add(1, index_TK.view(segments, -1), values)
        return sums[:, :size]


def _load_balancing(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """Switch Transformer (https://huggingface.co/papers/2101.03961, equations 4 to 6), scaled as in transformers:
    `E sum_e (tokens that chose e / T) P_e`, K where balanced."""
    return config.num_experts * (s.counts_RE / s.tokens_R1 * s.mean(s.log_probabilities_TE.exp())).sum(-1)


def _parameter_penalty(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """HMoE's P-penalty (https://huggingface.co/papers/2408.10681, section 3): the Switch loss with each frequency
    times the expert's width over the mean width."""
    widths_E = s.router.widths_G.to(s.mask_RS.dtype) @ s.router.membership_GE.to(s.mask_RS.dtype)
    mean_width = widths_E.mean().clamp(min=torch.finfo(widths_E.dtype).tiny)  # all experts may have been removed
    share_RE = s.counts_RE / s.tokens_R1 * (widths_E / mean_width)
    return config.num_experts * (share_RE * s.mean(s.log_probabilities_TE.exp())).sum(-1)


def _z(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """ST-MoE's z-loss (https://huggingface.co/papers/2202.08906, equation 5): mean of logsumexp(logits)^2."""
    return s.mean(s.output.logits.logsumexp(-1).square())


def _entropy(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """Mean entropy of the expert probabilities, in nats, which is to be minimised so that routing stays sharp and
    few experts are activated. HMoE prints `N sum P log P` (section 3), whose minimum is the uniform distribution; its
    stated purpose is the opposite, and the purpose is what this computes."""
    return s.mean(_entropy_of(s.log_probabilities_TE))


def _intra_group(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """Hi-MoE's specialisation inside groups (https://huggingface.co/papers/2605.08292): `-mean_t sum_e p_e^2`, or the
    entropy of p."""
    if config.router_regularizer == "entropy":
        return s.mean(_entropy_of(s.log_probabilities_TE))
    return -s.mean((2 * s.log_probabilities_TE).exp().sum(-1))


def _inter_group(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """Hi-MoE's balance between groups (https://huggingface.co/papers/2605.08292): `mean_t sum_g (sum_{e in g} p_e)^2`,
    or minus the entropy of the group masses."""
    mass_TG = s.log_probabilities_TE.exp() @ s.router.membership_GE.to(s.mask_RS.dtype).T
    if config.router_regularizer == "entropy":
        return -s.mean(_entropy_of(mass_TG.clamp(min=torch.finfo(mass_TG.dtype).tiny).log()))
    return s.mean(mass_TG.square().sum(-1))


def _group(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """MoHGE's group-wise loss (https://huggingface.co/papers/2604.23108): `G sum_g r_g f_g P_g` with f the share of
    choices that kept the group, P the mean softmax of the group logits and `r_g = (W_g - W_min + D) / D`."""
    widths_G = s.router.widths_G.to(s.mask_RS.dtype)
    size_factor_G = (widths_G - widths_G.min() + config.group_size_interval) / config.group_size_interval
    kept_TJ = s.output.group_index
    ones_TJ = torch.ones_like(kept_TJ, dtype=s.mask_RS.dtype)
    frequency_RG = s.add_up(kept_TJ, ones_TJ, config.num_groups) / (s.tokens_R1 * config.num_groups_per_tok)
    probability_RG = s.mean(s.output.group_logits.softmax(-1))
    return config.num_groups * (size_factor_G * frequency_RG * probability_RG).sum(-1)


def _expert(config: MoHGEConfig, s: _Statistics) -> torch.Tensor:
    """MoHGE's intra-group experts loss (https://huggingface.co/papers/2604.23108): `(E J / G) sum_e f_e P_e` with f
    the number of tokens that chose the expert over T K, P its mean combine weight before `routed_scaling_factor`.
    The `"per_group"` form is `N_g sum_{e in g} f P` with f and P divided by their sums over the group, averaged over
    the groups with traffic."""
    weight_RE = s.add_up(s.output.index, s.output.weights, config.num_experts) / s.tokens_R1
    frequency_RE = s.counts_RE / (s.tokens_R1 * config.num_experts_per_tok)
    if config.router_expert_aux_loss_type == "global":
        kept = config.num_groups_per_tok / config.num_groups if config.router_type == "two_level" else 1
        return config.num_experts * kept * (frequency_RE * weight_RE).sum(-1)
    membership_EG = s.router.membership_GE.to(s.mask_RS.dtype).T
    traffic_RG, mass_RG = frequency_RE @ membership_EG, weight_RE @ membership_EG
    product_RG = traffic_RG * mass_RG
    empty_RG = product_RG == 0
    loss_RG = membership_EG.sum(0) * ((frequency_RE * weight_RE) @ membership_EG) / product_RG.masked_fill(empty_RG, 1)
    return loss_RG.sum(-1) / (~empty_RG).sum(-1).clamp(min=1)


def _entropy_of(log_probabilities: torch.Tensor) -> torch.Tensor:
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


_LOSSES = {
    "load_balancing": _load_balancing,
    "z": _z,
    "parameter_penalty": _parameter_penalty,
    "entropy": _entropy,
    "intra_group": _intra_group,
    "inter_group": _inter_group,
    "group": _group,
    "expert": _expert,
}

__all__ = [
    "RouterLosses",
    "at_least_one",
    "has_router_losses",
    "router_losses",
    "switched_on",
    "targets_per_sequence",
]
