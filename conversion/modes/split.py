"""Splitting a dense feed-forward into a shared expert and routed ones."""

from typing import NamedTuple

import torch

from mohge import MoHGEConfig
from mohge.routing_mohge import MoHGERouter

from ..decoders import Expert, LayerWeights, MoHGE
from ..statistics import cluster, linear_rows, observe_dense, ridge, square
from .base import Converted, Layer, Mode, Run, slice_neurons
from .dense import shared_expert


_MARKED = 0.1
"""Share of a layer's neurons that count as active at a token."""
_MARKERS = 1024
"""Most tokens whose active neurons are kept for clustering."""


class _Activity:
    """Which neurons are active, and how inputs and activations go together."""

    def __init__(self, down_HD: torch.Tensor, tokens: int, device: str):
        hidden_size, width = down_HD.shape
        self.norms_D = down_HD.to(device).float().norm(dim=0)
        self.tokens = 0
        self.active_D = torch.zeros(width, device=device)
        """Number of tokens at which a neuron is among the most active."""
        self.markers: list[torch.Tensor] = []
        """The same for a sample of tokens, each a row of zeros and ones."""
        self.gram_HH = torch.zeros(hidden_size, hidden_size, device=device)
        self.moments_HD = torch.zeros(hidden_size, width, device=device)
        """Sum of inputs times what each neuron adds to the output, in magnitude."""
        self._stride = -(-tokens // _MARKERS)

    def __call__(self, inputs_TH: torch.Tensor, activations_TD: torch.Tensor):
        effect_TD = activations_TD.abs() * self.norms_D
        most_active = effect_TD.topk(max(1, round(_MARKED * effect_TD.shape[1])), dim=1).indices
        marked_TD = torch.zeros_like(effect_TD).scatter_(1, most_active, 1.0)
        self.active_D += marked_TD.sum(0)
        self.markers.append(marked_TD[(-self.tokens) % self._stride :: self._stride])
        self.gram_HH.addmm_(inputs_TH.T, inputs_TH)
        self.moments_HD.addmm_(inputs_TH.T, effect_TD)
        self.tokens += len(inputs_TH)


class _Residue:
    """What the routed sum misses of the feed-forward's output, and how it goes together with the activations."""

    def __init__(self, router: MoHGERouter, order_D: torch.Tensor, down_HD: torch.Tensor, device: str):
        self.router, self.order_D = router.to(device), order_D
        self.down_HD = down_HD.to(device).float()[:, order_D]
        width = len(order_D)
        self.gram_DD = torch.zeros(width, width, device=device)
        self.moments_DH = torch.zeros(width, down_HD.shape[0], device=device)
        self.output = self.missed = torch.zeros((), dtype=torch.float64)
        """Sums of squares of the output and of what is missed."""

    def __call__(self, inputs_TH: torch.Tensor, activations_TD: torch.Tensor):
        config = self.router.config
        routing = self.router(inputs_TH)
        weights_TE = inputs_TH.new_zeros(len(inputs_TH), config.num_experts)
        weights_TE.scatter_(1, routing.index, routing.weights * config.routed_scaling_factor)
        widths = torch.tensor(config.expert_widths, device=inputs_TH.device)
        ordered_TD = activations_TD[:, self.order_D]
        routed_TD = ordered_TD.clone()
        routed_TD[:, -sum(config.expert_widths) :] *= weights_TE.repeat_interleave(widths, dim=1)
        missed_TH = (ordered_TD - routed_TD) @ self.down_HD.T
        self.gram_DD.addmm_(routed_TD.T, routed_TD)
        self.moments_DH.addmm_(routed_TD.T, missed_TH)
        self.output = self.output + (ordered_TD @ self.down_HD.T).square().sum(dtype=torch.float64).cpu()
        self.missed = self.missed + missed_TH.square().sum(dtype=torch.float64).cpu()


class _Partition(NamedTuple):
    """How a layer is split."""

    rows_EH: torch.Tensor
    order_D: torch.Tensor
    residue: _Residue


class Split(Mode):
    """
    The neurons that are most often active become the shared expert; the others are clustered by when they are active
    (CMoE, https://huggingface.co/papers/2502.04416) into experts of the asked widths. Router rows predict, by least
    squares, how much each expert adds. Combine weights are close to 1: they are a softmax over scores below 1, times
    their number. All down projections are refitted together to what the routed sum misses.
    """

    name = "split"
    takes = ("dense",)
    options = frozenset({"widths", "experts_per_group", "top_k", "top_groups"})
    exact = False
    reason = "a token passes through the shared expert and some of the routed ones only"
    needs_calibration = True

    def make_target(self) -> MoHGE:
        widths, width = self.required("widths"), self.source.width
        top_groups = self.recipe.top_groups
        fields = {
            "moe_intermediate_sizes": widths,
            "num_experts_per_group": self.required("experts_per_group"),
            "num_experts_per_tok": self.required("top_k"),
            "num_groups_per_tok": len(widths) if top_groups is None else top_groups,
            "shared_expert_intermediate_size": 0,
            "group_score_function": "expert_logsumexp",
            "topk_weight_normalization": "softmax",
            "routed_scaling_factor": float(self.recipe.top_k),
        }
        routed = sum(MoHGEConfig(backbone_config=self.source.config, **fields).expert_widths)
        if routed > width:
            raise ValueError(
                f"`widths` times `experts_per_group` make {routed} neurons, and the feed-forward has {width}: ask for "
                "fewer; what is left becomes the shared expert"
            )
        fields["shared_expert_intermediate_size"] = width - routed
        return self.mohge(**fields)

    def observe(self, layer: Layer, weights: LayerWeights, run: Run) -> _Partition:
        full = weights.expert(0)
        rows_EH, order_D = self._partition(layer, full, run)
        router = MoHGERouter(self.target.config)
        router.weight.data = rows_EH.float()  # as they will be read again
        residue = _Residue(router, order_D, full.down, layer.device)
        run(lambda found: observe_dense(found, residue))
        return _Partition(rows_EH, order_D, residue)

    def _partition(self, layer: Layer, full: Expert, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
        """Router rows, and the order of neurons: those of the shared expert, then of each routed expert by id."""
        config = self.target.config
        activity = _Activity(full.down, layer.tokens, layer.device)
        run(lambda found: observe_dense(found, activity))
        by_rate_D = activity.active_D.cpu().argsort(descending=True, stable=True)
        shared, routed = by_rate_D.tensor_split([config.shared_expert_intermediate_size])
        markers = torch.cat(activity.markers).cpu()[:, routed].T.contiguous()
        clusters = cluster(markers, list(config.expert_widths), layer.generator)
        members = [routed[clusters == expert] for expert in range(config.num_experts)]
        moments_HE = torch.stack([activity.moments_HD[:, neurons].sum(1) for neurons in members], dim=1)
        rows_EH = linear_rows(activity.gram_HH, moments_HE, activity.tokens)
        return rows_EH.cpu().to(full.gate.dtype), torch.cat([shared, *members])

    def convert(self, layer: Layer, weights: LayerWeights, statistics: _Partition) -> Converted:
        config, residue = self.target.config, statistics.residue
        full, tensors = weights.expert(0), dict(weights.tensors)
        gram_DD, moments_DH = residue.gram_DD.cpu(), residue.moments_DH.cpu()
        correction_HD = ridge(gram_DD, moments_DH).T
        # ||missed - correction a||^2, summed over tokens
        error = residue.missed - 2 * (correction_HD.T * moments_DH).sum(dtype=torch.float64)
        error = error + square(correction_HD, gram_DD)
        ordered = slice_neurons(full, statistics.order_D)
        ordered = ordered._replace(down=(ordered.down.float() + correction_HD).to(full.down.dtype))
        parts = torch.arange(len(statistics.order_D)).split(
            [config.shared_expert_intermediate_size, *config.expert_widths]
        )
        tensors[f"{layer.block}gate.weight"] = statistics.rows_EH
        if config.shared_expert_intermediate_size:
            tensors |= shared_expert(layer.block, slice_neurons(ordered, parts[0]))
        weights = LayerWeights(tensors, lambda number: slice_neurons(ordered, parts[1 + number]))
        return Converted(weights, [torch.stack([residue.output, residue.missed, error.clamp(min=0)])])
