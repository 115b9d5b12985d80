"""Modes for homogeneous mixtures: regroup and trim."""

import torch

from ..decoders import Expert, LayerWeights, MoHGE, Source
from ..statistics import ExpertStatistics, important_neurons, observe_experts, refit, square
from .base import Converted, Layer, Mode, Run, slice_neurons, widen


FLAT_ROUTERS = {
    "mixtral": lambda config: True,
    "olmoe": lambda config: config.norm_topk_prob,
    "qwen2_moe": lambda config: config.norm_topk_prob,
    "qwen3_moe": lambda config: config.norm_topk_prob,
}
"""Mixtures whose router is a softmax over all experts and its K largest values -> whether these are divided by their
sum. Our own router can take its place."""


def routing_fields(source: Source, router: str | None, groups: int) -> dict:
    """
    The fields of [`MoHGEConfig`] that route as the mixture `source` does.

    Raises:
        ValueError: if `router` cannot.
    """
    layers = {"mlp_only_layers": list(source.experts.dense_layers)}
    if router in (None, "source"):
        return {"router_type": "source", **layers}
    if router != "two_level" or source.model_type not in FLAT_ROUTERS:
        able = f', and "two_level" for {", ".join(FLAT_ROUTERS)}'
        raise ValueError(f'`router` {router} cannot route as a {source.model_type} model does: use "source"{able}')
    config = source.config
    return {
        **layers,
        "router_type": "two_level",
        "group_score_function": "expert_logsumexp",
        "topk_weight_normalization": "sum" if FLAT_ROUTERS[source.model_type](config) else "none",
        "num_experts_per_tok": config.num_experts_per_tok,
        "num_groups_per_tok": groups,
        "shared_expert_intermediate_size": getattr(config, "shared_expert_intermediate_size", 0),
        "shared_expert_gate": hasattr(config, "shared_expert_intermediate_size"),
        "router_expert_aux_loss_coef": 0.0,
        "router_group_aux_loss_coef": 0.0,
    }


class Regroup(Mode):
    """Experts become groups at their own width, and expert ids stay. The source's own router stays too, or its rows
    become those of a two-level router whose levels multiply to the flat softmax: the model computes the same."""

    name = "regroup"
    takes = "mixture"
    options = frozenset({"experts_per_group", "router"})

    @property
    def reason(self) -> str:
        if self.target.config.keeps_router:
            return "experts and router stay as they are"
        return "experts and router rows stay, and the two-level router multiplies to the source's flat softmax"

    def make_target(self) -> MoHGE:
        layout = self.source.experts
        counts = self.expert_counts(layout.count)
        fields = routing_fields(self.source, self.recipe.router, len(counts))
        fields |= {"moe_intermediate_sizes": [layout.width] * len(counts), "num_experts_per_group": counts}
        coefficient = getattr(self.source.config, "router_aux_loss_coef", 0.0)  # it is trained as the source was
        return self.mohge(**fields, router_aux_loss_coef=coefficient)

    def convert(self, layer: Layer, weights: LayerWeights, statistics: None) -> Converted:
        tensors = dict(weights.tensors)
        if self.target.config.keeps_router:
            tensors[f"{layer.block}experts.expert_ids"] = torch.arange(self.source.experts.count)
        return Converted(LayerWeights(tensors, weights.expert))


class Trim(Mode):
    """The experts that matter most (REAP, https://huggingface.co/papers/2510.13999) get the large widths; in narrower
    groups an expert keeps its most important neurons, and its down projection is refitted."""

    name = "trim"
    takes = "mixture"
    options = frozenset({"widths", "experts_per_group", "router", "top_k", "top_groups"})
    exact = False
    reason = "experts lose neurons where their group is narrower than the source's experts"
    needs_calibration = "to rank experts and neurons"

    def make_target(self) -> MoHGE:
        layout, recipe = self.source.experts, self.recipe
        widths = self.required("widths")
        fields = routing_fields(self.source, recipe.router, len(widths))
        for option, field in (("top_k", "num_experts_per_tok"), ("top_groups", "num_groups_per_tok")):
            value = getattr(recipe, option)
            if value is None:
                continue
            if fields["router_type"] == "source":
                raise ValueError(f"`{option}` is the source's own where its router stays: leave it out")
            fields[field] = value
        counts = self.expert_counts(layout.count, len(widths))
        return self.mohge(**fields, moe_intermediate_sizes=widths, num_experts_per_group=counts)

    def observe(self, layer: Layer, weights: LayerWeights, run: Run) -> ExpertStatistics:
        layout = self.source.experts
        statistics = ExpertStatistics(layout.count, layout.width, layer.device)
        run(lambda found: observe_experts(found, statistics))
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

        tensors = dict(weights.tensors)
        if config.keeps_router:
            tensors[f"{layer.block}experts.expert_ids"] = torch.tensor(origins).argsort()
        else:
            rows = f"{layer.block}gate.weight"
            tensors[rows] = tensors[rows][origins]
        return Converted(LayerWeights(tensors, expert), squares)
