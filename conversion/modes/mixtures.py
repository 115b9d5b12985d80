"""Homogeneous mixtures whose experts become groups as they are."""

import torch

from mohge import MoHGEConfig

from ..decoders import LayerWeights, MoHGE, Source
from .base import Converted, Layer, Mode


FLAT_ROUTERS = {
    "mixtral": lambda config: True,
    "olmoe": lambda config: config.norm_topk_prob,
    "qwen2_moe": lambda config: config.norm_topk_prob,
    "qwen3_moe": lambda config: config.norm_topk_prob,
}
"""Mixtures whose router is a softmax over all experts and its K largest values -> whether these are divided by their
sum. Our own router can take its place."""


def is_flat(layer: MoHGEConfig) -> bool:
    """Whether a layer's own router chooses the best experts of all by the softmax over all of them."""
    if layer.router_type == "two_level":
        keeps_all = layer.num_groups_per_tok == layer.num_groups
        return keeps_all and (layer.group_score_function == "expert_logsumexp" or layer.num_groups == 1)
    return layer.router_type == "top_k"


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
    takes = ("mixture",)
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
