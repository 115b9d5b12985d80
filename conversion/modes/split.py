"""Splitting a dense feed-forward into a shared expert and routed ones."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch

from mohge import MoHGEConfig
from mohge.info import parameter_counts
from mohge.routing_mohge import MoHGERouter

from ..decoders import Expert, LayerWeights, MoHGE
from ..recipe import Recipe
from ..statistics import LayerSaliency, assign, cluster, magnitude, observe_dense, ridge, square
from .base import Converted, Layer, Mode, Run, slice_neurons
from .dense import shared_expert


_SAMPLE = 4096
"""Most tokens whose activations are kept."""
_RIDGE = 0.3
"""Strength of the ridge, relative to the diagonal."""
_SPREAD = 0.05
"""Standard deviation of the router's logits: so small that combine weights are 1, nearly."""
_EXPERTS = 64
"""Routed experts of a layer, for `keep_active`: finer ones fit tokens better, but each costs a row of the router."""
_CHOSEN = 0.25
"""Share of the routed neurons that tokens use on average, over all layers, for `keep_active`."""
_MOST = 2.4
"""How many times as many as on average a token may use."""
_UNLIKE = 0.6
"""How far layers differ in what tokens use of them, relative to a global ranking of neurons."""
_WHOLE = 0.97
"""Share from which on the routed neurons of a layer are one expert, which every token uses."""


def _solve(gram: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Ridge regression."""
    return ridge(gram, moments, _RIDGE)


class _Activity:
    """How much neurons do, how that follows from inputs, and a sample of both."""

    def __init__(self, hidden_size: int, width: int, tokens: int, device: str):
        self.tokens = 0
        self.squares_D = torch.zeros(width, device=device)
        self.gram_HH = torch.zeros(hidden_size, hidden_size, device=device)
        self.sum_H = torch.zeros(hidden_size, device=device)
        self.moments_HD = torch.zeros(hidden_size, width, device=device)
        """Sum of inputs times the magnitude of each activation."""
        self.sample: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stride = -(-tokens // _SAMPLE)

    def __call__(self, inputs_TH: torch.Tensor, activations_TD: torch.Tensor):
        self.squares_D += activations_TD.square().sum(0)
        self.sum_H += inputs_TH.sum(0)
        self.gram_HH.addmm_(inputs_TH.T, inputs_TH)
        self.moments_HD.addmm_(inputs_TH.T, activations_TD.abs())
        sampled = slice((-self.tokens) % self._stride, None, self._stride)
        self.sample.append((inputs_TH[sampled].clone(), activations_TD[sampled].clone()))
        self.tokens += len(inputs_TH)


class _Need:
    """How inputs go together with the need for each expert: the root of what is lost without it."""

    def __init__(self, hidden_size: int, experts: list[torch.Tensor], scale_D: torch.Tensor):
        self.scale_D = scale_D
        self.members_DE = torch.stack([torch.zeros_like(scale_D).index_fill_(0, e, 1.0) for e in experts], dim=1)
        self.moments_HE = torch.zeros(hidden_size, len(experts), device=scale_D.device)

    def __call__(self, inputs_TH: torch.Tensor, activations_TD: torch.Tensor):
        lost_TE = (activations_TD * self.scale_D).square() @ self.members_DE
        self.moments_HE.addmm_(inputs_TH.T, lost_TE.sqrt())


class _Residue:
    """What the routed sum misses of the feed-forward's output, and how it goes together with the activations."""

    def __init__(self, router: MoHGERouter, order_D: torch.Tensor, down_HD: torch.Tensor):
        self.router, self.order_D, self.down_HD = router, order_D, down_HD[:, order_D]
        width, device = len(order_D), down_HD.device
        self.gram_DD = torch.zeros(width, width, device=device)
        self.moments_DH = torch.zeros(width, len(down_HD), device=device)
        self.output = self.missed = torch.zeros((), dtype=torch.float64)
        """Sums of squares of the output and of what is missed."""

    def __call__(self, inputs_TH: torch.Tensor, activations_TD: torch.Tensor):
        config = self.router.config
        routing = self.router(inputs_TH)
        weights_TE = inputs_TH.new_zeros(len(inputs_TH), config.num_experts)
        weights_TE.scatter_(1, routing.index, routing.weights * config.num_experts_per_tok)
        widths = torch.tensor(config.expert_widths, device=inputs_TH.device)
        ordered_TD = activations_TD[:, self.order_D]
        routed_TD = ordered_TD.clone()
        routed_TD[:, config.shared_expert_intermediate_size :] *= weights_TE.repeat_interleave(widths, dim=1)
        missed_TH = (ordered_TD - routed_TD) @ self.down_HD.T
        self.gram_DD.addmm_(routed_TD.T, routed_TD)
        self.moments_DH.addmm_(routed_TD.T, missed_TH)
        self.output = self.output + (ordered_TD @ self.down_HD.T).square().sum(dtype=torch.float64).cpu()
        self.missed = self.missed + missed_TH.square().sum(dtype=torch.float64).cpu()


class _Partition(NamedTuple):
    """How a layer is split."""

    rows_EH: torch.Tensor
    order_D: torch.Tensor
    residue: _Residue | None
    """None without data."""


class Split(Mode):
    """
    Neurons that no token can do without become the shared expert, the others are clustered by which tokens need them.
    The need for a neuron is its activation's square, times a factor for how much the loss feels it; that for an expert
    is the root of its neurons' sum. Router rows predict it by least squares, and the most needed experts are chosen.

    With `keep_active` tokens differ in how many that is: experts of width 0 compete, whose need is predicted to be the
    same for every token, and a token that needs few experts takes those instead. Combine weights are 1, nearly. All
    down projections are refitted together to what the routed sum misses.

    With `saliency` magnitude there are no data: neurons of the largest weights become the shared expert, those whose
    gates look the same way go together, and a router row is the mean of its expert's gates (as in MoEfication,
    https://huggingface.co/papers/2110.01786). Nothing is refitted.
    """

    name = "split"
    takes = ("dense",)
    options = frozenset({"widths", "experts_per_group", "top_k", "top_groups", "keep_active", "saliency"})
    exact = False
    reason = "a token passes through the shared expert and some of the routed ones only"
    saliency_LD: torch.Tensor | None = None
    """What the loss loses without each neuron, summed over tokens; None where that is not known."""

    @property
    def criterion(self) -> str | None:
        return None if self.recipe.keep_active is None else "gradient"

    @property
    def needs_calibration(self) -> bool:
        return self.recipe.saliency != "magnitude"

    @property
    def observes(self) -> bool:
        return self.needs_calibration

    def settle(self, layers: list[LayerSaliency], tokens: int) -> None:
        self.saliency_LD = torch.stack([layer.neurons[0] for layer in layers])
        self.target = self.make_target()

    def resolved(self, revision: str | None) -> Recipe:
        if self.recipe.keep_active is None:
            return super().resolved(revision)
        return replace(self.recipe, revision=revision)

    def make_target(self) -> MoHGE:
        fields = {"topk_weight_normalization": "softmax"}
        if self.recipe.saliency not in (None, "magnitude"):
            raise ValueError(f"mode split takes `saliency` magnitude, or none: leave out {self.recipe.saliency}")
        if self.recipe.keep_active is not None:
            return self.mohge(**fields, **self._layout())
        widths, width, top_groups = self.required("widths"), self.source.width, self.recipe.top_groups
        fields |= {
            "moe_intermediate_sizes": widths,
            "num_experts_per_group": self.required("experts_per_group"),
            "num_experts_per_tok": self.required("top_k"),
            "num_groups_per_tok": len(widths) if top_groups is None else top_groups,
            "shared_expert_intermediate_size": 0,
            "group_score_function": "expert_logsumexp",
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

    def _layout(self) -> dict:
        """Fields of the config for `keep_active`; also finds `used_L`, the neurons of each layer that a token uses on
        average."""
        for option in ("widths", "experts_per_group", "top_k", "top_groups", "saliency"):
            if getattr(self.recipe, option) is not None:
                raise ValueError(f"`{option}` and `keep_active` exclude one another: leave one of them out")
        kept, width, config = self.recipe.keep_active, self.source.width, self.source.config
        before = parameter_counts(self.source.equivalent).activated
        per_neuron = 3 * config.hidden_size * config.num_hidden_layers
        experts = min(_EXPERTS, width // 4)
        rows = experts * (1 + min(1, _MOST * _CHOSEN)) / 3  # of the router, as neurons
        least, most = 0.1 * width, width - (1 - _CHOSEN) * experts  # neurons that a token may use
        # The range to name in a message; where tokens use few neurons, the router may come to have more rows.
        low, high = (1 - (width - n - r) * per_neuron / before for n, r in ((least, 2 * experts / 3), (most, rows)))
        for _ in range(4):  # how many rows there are follows from how many neurons they leave
            used = width - (1 - kept) * before / per_neuron - rows
            if not least <= used <= most:
                raise ValueError(
                    f"`keep_active` is {kept}: give {math.ceil(1000 * low) / 1000} to "
                    f"{math.floor(1000 * high) / 1000}, so that beside the router a token uses {math.ceil(least)} to "
                    f"{math.floor(most)} of the {width} neurons of a feed-forward"
                )
            shared = max(0, round((used - _CHOSEN * width) / (1 - _CHOSEN)))
            each = min(-(-(width - shared) // experts), width // experts)  # up, or the shared expert might have it all
            shared = width - each * experts
            self.used_L = self._budgets(used, shared, each)
            layers = [self._layer((n - shared) / each, each, experts) for n in self.used_L]
            needed = sum(sum(layer["num_experts_per_group"]) for layer in layers) / len(layers) / 3
            rows = max(rows, needed)  # never fewer, or it might go to and fro between two layouts
        self.used_L = [
            width if layer["num_experts_per_tok"] == 2 else n for n, layer in zip(self.used_L, layers, strict=True)
        ]
        return {
            **layers[0],
            "per_layer_config": dict(enumerate(layers)),
            "router_type": "top_k",
            "shared_expert_intermediate_size": shared,
        }

    def _budgets(self, used: float, shared: int, each: int) -> list[float]:
        """How many neurons of each layer tokens are to use on average: those that the loss feels most, wherever they
        are, beside `shared` in every layer."""
        layers = self.source.num_layers
        if self.saliency_LD is None:
            return [used] * layers
        rest_LD = self.saliency_LD.sort(dim=1, descending=True).values[:, shared:]
        count = round((used - shared) * layers)
        chosen = rest_LD.flatten().argsort(descending=True, stable=True)[:count] // rest_LD.shape[1]
        alone_L = chosen.bincount(minlength=layers) + float(shared)
        # Tokens drop what they need least, so a layer can do with less than if all dropped the same: layers are nearer
        # to one another than in a ranking of neurons alone.
        return (used + _UNLIKE * (alone_L - used)).clamp(shared + each, self.source.width).tolist()

    @staticmethod
    def _layer(chosen: float, width: int, experts: int) -> dict:
        """Fields of a layer in which tokens choose so many experts on average."""
        if chosen >= _WHOLE * experts:
            return {"moe_intermediate_sizes": [0, width * experts], "num_experts_per_group": [1, 1]} | {
                "num_experts_per_tok": 2
            }
        most = max(3, min(experts, math.ceil(_MOST * chosen)))
        idle = min(most, math.ceil(2 * (most - chosen)))
        return {
            "moe_intermediate_sizes": [0, width],
            "num_experts_per_group": [idle, experts],
            "num_experts_per_tok": most,
        }

    def observe(self, layer: Layer, weights: LayerWeights, run: Run) -> _Partition | None:
        if not self.observes:
            return None
        full = weights.expert(0)
        down_HD = full.down.to(layer.device).float()
        activity = _Activity(*down_HD.shape, layer.tokens, layer.device)
        run(lambda found: observe_dense(found, activity))
        scale_D = down_HD.norm(dim=0)
        if self.saliency_LD is not None:
            saliency_D = self.saliency_LD[layer.number].to(scale_D)
            scale_D = (saliency_D / activity.squares_D).nan_to_num(0.0, 0.0, 0.0).sqrt()
        shared, experts = self._partition(layer, activity, scale_D)

        need = _Need(len(down_HD), experts, scale_D)
        run(lambda found: observe_dense(found, need))
        rows_EH = self._rows(layer, activity, need.moments_HE)
        rows_EH = rows_EH.cpu().to(full.gate.dtype)
        router = MoHGERouter(self._config(layer)).to(layer.device)
        router.weight.data = rows_EH.to(layer.device).float()  # as they will be read again
        order_D = torch.cat([shared, *experts])
        residue = _Residue(router, order_D, down_HD)
        run(lambda found: observe_dense(found, residue))
        return _Partition(rows_EH, order_D.cpu(), residue)

    def _partition(
        self, layer: Layer, activity: _Activity, scale_D: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Neurons of the shared expert, and of each routed one by id."""
        config, tokens = self._config(layer), activity.tokens
        kept, capacities = self._kept(config)
        # First by what inputs tell: neurons are near whose need is predicted for the same tokens. The Gram matrix of
        # the predictions, with their means taken out, has a factor with a column for each neuron.
        predicted_HD = _solve(activity.gram_HH, activity.moments_HD * scale_D)
        mean_H = activity.sum_H / tokens
        values_H, vectors_HH = torch.linalg.eigh(activity.gram_HH / tokens - mean_H[:, None] * mean_H)
        points_DH = predicted_HD.T @ (vectors_HH * values_H.clamp(min=0).sqrt())
        points_DH = points_DH / points_DH.norm(dim=1, keepdim=True).clamp(min=1e-30)
        order_D = (activity.squares_D * scale_D.square()).argsort(descending=True, stable=True)
        shared, routed = order_D.tensor_split([config.shared_expert_intermediate_size])
        experts = self._members(config, routed, cluster(points_DH[routed].cpu(), capacities, layer.generator))

        # Then by what the router makes of it: each neuron moves where it is used most when it is needed, and those
        # that would be missed most into the shared expert.
        moments_HE = torch.stack([activity.moments_HD[:, e] @ scale_D[e] for e in experts], dim=1)
        rows_EH = self._rows(layer, activity, moments_HE)
        used_DE, needed_D = scale_D.new_zeros(len(order_D), len(kept)), torch.zeros_like(scale_D)
        for inputs_TH, activations_TD in activity.sample:
            need_TD = (activations_TD * scale_D).square()
            logits_TE = inputs_TH @ rows_EH.T
            chosen_TE = torch.zeros_like(logits_TE).scatter_(
                1, logits_TE.topk(config.num_experts_per_tok, dim=1).indices, 1.0
            )
            used_DE += need_TD.T @ chosen_TE[:, kept]
            needed_D += need_TD.sum(0)
        order_D = (needed_D - used_DE.max(1).values).argsort(descending=True, stable=True)
        shared, routed = order_D.tensor_split([config.shared_expert_intermediate_size])
        return shared, self._members(config, routed, assign(-used_DE[routed].cpu(), capacities))

    @staticmethod
    def _kept(config: MoHGEConfig) -> tuple[list[int], list[int]]:
        """Experts that have neurons, and how many."""
        kept = [number for number, width in enumerate(config.expert_widths) if width]
        return kept, [config.expert_widths[number] for number in kept]

    def _members(self, config: MoHGEConfig, routed: torch.Tensor, places: torch.Tensor) -> list[torch.Tensor]:
        """The neurons of each expert by id, of those `routed` that have these places among the experts kept."""
        experts = [routed[:0]] * config.num_experts
        for place, number in enumerate(self._kept(config)[0]):
            experts[number] = routed[places.to(routed.device) == place]
        return experts

    def _by_weights(self, layer: Layer, full: Expert) -> _Partition:
        """A partition without data."""
        config, gate_DH = self._config(layer), full.gate.float()
        order_D = magnitude(full).argsort(descending=True, stable=True)
        shared, routed = order_D.tensor_split([config.shared_expert_intermediate_size])
        directions = gate_DH[routed] / gate_DH[routed].norm(dim=1, keepdim=True).clamp(min=1e-30)
        places = cluster(directions, self._kept(config)[1], layer.generator)
        experts = self._members(config, routed, places)
        rows_EH = torch.stack([gate_DH[expert].sum(0) / max(1, len(expert)) for expert in experts])
        rows_EH *= _SPREAD / rows_EH.norm(dim=1).mean().clamp(min=1e-30)
        return _Partition(rows_EH.to(full.gate.dtype), torch.cat([shared, *experts]), None)

    def _rows(self, layer: Layer, activity: _Activity, moments_HE: torch.Tensor) -> torch.Tensor:
        """Router rows [E, H] that predict the need for each expert. That for experts of width 0 is the same for every
        token, and such that tokens use as many neurons as they should."""
        config = self._config(layer)
        widths_E = torch.tensor(config.expert_widths, device=moments_HE.device)
        idle_E = widths_E == 0
        moments_HE[:, idle_E] = activity.sum_H[:, None]
        rows_EH = _solve(activity.gram_HH, moments_HE).T
        logits_TE = torch.cat([inputs_TH for inputs_TH, _ in activity.sample]) @ rows_EH.T
        if idle_E.any():
            wanted = self.used_L[layer.number] - config.shared_expert_intermediate_size
            low, high = 0.0, (logits_TE.max() / logits_TE[:, idle_E].median()).item()
            for _ in range(20):
                level = (low + high) / 2
                leveled_TE = torch.where(idle_E, level * logits_TE, logits_TE)
                chosen_TK = leveled_TE.topk(config.num_experts_per_tok, dim=1).indices
                used = widths_E[chosen_TK].sum(1).float().mean()
                low, high = (level, high) if used > wanted else (low, level)
            rows_EH[idle_E] *= level
            logits_TE[:, idle_E] *= level
        spread = (logits_TE - logits_TE.mean(1, keepdim=True)).std()
        return rows_EH * (_SPREAD / spread) if spread > 0 else rows_EH  # zero where tokens are all alike

    def _config(self, layer: Layer) -> MoHGEConfig:
        return self.target.config.per_layer_config[layer.number]

    def convert(self, layer: Layer, weights: LayerWeights, statistics: _Partition | None) -> Converted:
        full, tensors, squares = weights.expert(0), dict(weights.tensors), None
        statistics = statistics or self._by_weights(layer, full)
        config, residue = self._config(layer), statistics.residue
        ordered = slice_neurons(full, statistics.order_D)
        down_HD = ordered.down.float()
        if residue is not None:
            gram_DD, moments_DH = residue.gram_DD.cpu(), residue.moments_DH.cpu()
            correction_HD = _solve(gram_DD, moments_DH).T
            # ||missed - correction a||^2, summed over tokens
            error = residue.missed - 2 * (correction_HD.T * moments_DH).sum(dtype=torch.float64)
            error = error + square(correction_HD, gram_DD)
            down_HD = down_HD + correction_HD
            squares = [torch.stack([residue.output, residue.missed, error.clamp(min=0)])]
        # Combine weights add up to the scaling factor, which is the same in all layers.
        down_HD[:, config.shared_expert_intermediate_size :] *= (
            config.num_experts_per_tok / config.routed_scaling_factor
        )
        ordered = ordered._replace(down=down_HD.to(full.down.dtype))
        parts = torch.arange(len(statistics.order_D)).split(
            [config.shared_expert_intermediate_size, *config.expert_widths]
        )
        tensors[f"{layer.block}gate.weight"] = statistics.rows_EH
        if config.shared_expert_intermediate_size:
            tensors |= shared_expert(layer.block, slice_neurons(ordered, parts[0]))
        weights = LayerWeights(tensors, lambda number: slice_neurons(ordered, parts[1 + number]))
        return Converted(weights, squares)
