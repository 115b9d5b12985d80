"""Modes for homogeneous mixtures: regroup and trim."""

import torch

from mohge import MoHGEConfig

from ..architectures import Expert, LayerWeights, MoHGE
from ..statistics import ExpertStatistics, important_neurons, observe_experts, refit, square
from .base import Converted, Layer, Mode, Run, slice_neurons, widen


class Regroup(Mode):
    """Experts become groups at their own width. Ids and router rows stay, and the two levels of the router multiply
    to the flat softmax, so the model computes the same."""

    name = "regroup"
    takes = "mixture"
    options = frozenset({"experts_per_group"})
    reason = "experts and router rows stay, and the two-level router multiplies to the source's flat softmax"

    def make_target(self) -> MoHGE:
        layout = self.source.experts
        counts = self.expert_counts(layout.count)
        losses = {  # those of the source
            "router_aux_loss_coef": self.source.config.router_aux_loss_coef,
            "router_expert_aux_loss_coef": 0.0,
            "router_group_aux_loss_coef": 0.0,
        }
        fields = self.source.mixture([layout.width] * len(counts), counts)
        return MoHGE(MoHGEConfig(**self.source.backbone(), **fields, **losses))

    def convert(self, layer: Layer, weights: LayerWeights, statistics: None) -> Converted:
        return Converted(weights)


class Trim(Mode):
    """The experts that matter most (REAP, https://huggingface.co/papers/2510.13999) get the large widths; in narrower
    groups an expert keeps its most important neurons, and its down projection is refitted."""

    name = "trim"
    takes = "mixture"
    options = frozenset({"widths", "experts_per_group", "top_k", "top_groups"})
    exact = False
    reason = "experts lose neurons where their group is narrower than the source's experts"
    needs_calibration = "to rank experts and neurons"

    def make_target(self) -> MoHGE:
        layout, recipe = self.source.experts, self.recipe
        widths = self.required("widths")
        fields = self.source.mixture(widths, self.expert_counts(layout.count, len(widths)))
        if recipe.top_k is not None:
            fields["num_experts_per_tok"] = recipe.top_k
        if recipe.top_groups is not None:
            fields["num_groups_per_tok"] = recipe.top_groups
        return MoHGE(MoHGEConfig(**self.source.backbone(), **fields))

    def observe(self, layer: Layer, weights: LayerWeights, run: Run) -> ExpertStatistics:
        layout = self.source.experts
        statistics = ExpertStatistics(layout.count, layout.width, layer.device)
        run(lambda decoder: observe_experts(decoder, statistics))
        return statistics

    def convert(self, layer: Layer, weights: LayerWeights, statistics: ExpertStatistics) -> Converted:
        config = self.target.config
        ranked = (statistics.saliency_E / statistics.tokens_E.clamp(min=1)).cpu().argsort(stable=True)
        origins = [0] * config.num_experts
        for ids in config.expert_id_table:  # widths ascend with the groups, as saliency does
            ids = [number for number in ids if number < config.num_experts]
            for number, origin in zip(ids, ranked[: len(ids)].sort().values.tolist(), strict=True):
                origins[number] = origin
            ranked = ranked[len(ids) :]
        squares = []

        def expert(number: int) -> Expert:
            origin, width = origins[number], config.expert_widths[number]
            full, gram = weights.expert(origin), statistics.gram_EWW[origin].cpu()
            if width >= full.gate.shape[0]:
                whole = square(full.down.float(), gram)
                squares.append(torch.stack([whole, torch.zeros_like(whole), torch.zeros_like(whole)]))
                return widen(full, width, layer.generator, config.initializer_range)
            kept = important_neurons(statistics.activation_EW[origin].cpu(), full.down, width)
            down, sums = refit(full.down, kept, gram)
            squares.append(sums)
            return slice_neurons(full, kept)._replace(down=down)

        tensors = {**weights.tensors, "mlp.gate.weight": weights.tensors["mlp.gate.weight"][origins]}
        return Converted(LayerWeights(tensors, expert), squares)
