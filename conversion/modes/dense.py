"""Modes for dense models that keep the feed-forward whole: copy, residual and shards."""

import math

import torch

from ..decoders import Expert, LayerWeights, MoHGE
from ..statistics import DenseStatistics, LayerSaliency, cluster, linear_rows, observe_dense, refit
from .base import Converted, Layer, Mode, Run, slice_neurons, widen


def shared_expert(block: str, expert: Expert) -> dict[str, torch.Tensor]:
    """The tensors of a shared expert."""
    return {
        f"{block}shared_expert.{name}_proj.weight": tensor
        for name, tensor in expert._asdict().items()
        if tensor is not None  # it has no biases
    }


class Copy(Mode):
    """Every expert is a copy of the feed-forward: wider ones have idle neurons, narrower ones keep the most important
    neurons and are refitted. `reinit` draws a fraction of each expert's neurons anew (Drop-Upcycling,
    https://huggingface.co/papers/2502.19261)."""

    name = "copy"
    takes = ("dense",)
    options = frozenset({"widths", "experts_per_group", "top_k", "top_groups", "router", "saliency", "reinit"})
    refits = True

    @property
    def narrows(self) -> bool:
        """Whether some expert is narrower than the feed-forward."""
        return min(self.recipe.widths) < self.source.width

    @property
    def criterion(self) -> str | None:
        return self.recipe.saliency

    def settle(self, layers: list[LayerSaliency], tokens: int) -> None:
        self.saliency = layers

    @property
    def exact(self) -> bool:
        return not self.narrows and not self.recipe.reinit

    @property
    def reason(self) -> str:
        if self.exact:
            return "every expert computes the feed-forward, and combine weights add up to 1"
        return "neurons are drawn anew" if self.recipe.reinit else "experts are narrower than the feed-forward"

    @property
    def needs_calibration(self) -> bool:
        return self.recipe.saliency not in (None, "magnitude")

    @property
    def needs_difficulty(self) -> bool:
        return self.recipe.calibration is not None and self.target.config.router_type == "two_level"

    def make_target(self) -> MoHGE:
        widths = self.required("widths")
        if self.narrows and self.recipe.saliency is None:
            self.recipe.saliency = "gradient"
        if not self.narrows and self.recipe.saliency is not None:
            raise ValueError(
                f"`saliency` is for `widths` below {self.source.width}, that of the feed-forward: leave it out, as no "
                "neuron goes"
            )
        fields = {
            "moe_intermediate_sizes": widths,
            "num_experts_per_group": self.required("experts_per_group"),
            "num_experts_per_tok": self.required("top_k"),
            "num_groups_per_tok": self.recipe.top_groups,
            "router_type": self.recipe.router or "two_level",
            "shared_expert_intermediate_size": self.shared_width,
        }
        return self.mohge(**fields)

    @property
    def shared_width(self) -> int:
        """Width of the shared expert."""
        return 0

    def observe(self, layer: Layer, weights: LayerWeights, run: Run) -> DenseStatistics | None:
        if self.recipe.calibration is None:
            return None
        statistics = DenseStatistics(
            layer.tokens, self.source.width if self.refits and self.narrows else None, layer.device
        )
        run(lambda found: observe_dense(found, statistics))
        return statistics

    def convert(self, layer: Layer, weights: LayerWeights, statistics: DenseStatistics | None) -> Converted:
        config, generator = self.target.config, layer.generator
        full, tensors = weights.expert(0), dict(weights.tensors)
        tensors |= self._router(layer, statistics, full.gate.dtype)
        squares, narrowed = [], {}

        def narrow(width: int) -> Expert:
            kept = self.saliency[layer.number].kept(0, width)
            if not self.refits or statistics is None:
                return slice_neurons(full, kept)
            down, sums = refit(full.down, kept, statistics.gram)
            squares.append(sums)
            return slice_neurons(full, kept)._replace(down=down)

        def expert(number: int) -> Expert:
            width = config.expert_widths[number]
            if width >= full.gate.shape[0]:
                return self.finish(widen(full, width, generator, config.initializer_range), generator)
            if width not in narrowed:
                narrowed[width] = narrow(width)
            return self.finish(narrowed[width], generator)

        refitted = self.refits and self.narrows and statistics is not None
        return Converted(LayerWeights(tensors, expert), squares if refitted else None)

    def finish(self, expert: Expert, generator: torch.Generator) -> Expert:
        """The expert as it is written."""
        if not self.recipe.reinit:
            return expert
        width = expert.gate.shape[0]
        drawn = torch.randperm(width, generator=generator)[: round(self.recipe.reinit * width)]
        made = Expert(*(matrix.clone() for matrix in expert if matrix is not None))
        for neurons in (made.gate, made.up, made.down.T):  # one index set for all three
            old = neurons[drawn].float()
            new = torch.randn(old.shape, generator=generator) * old.std() + old.mean()
            neurons[drawn] = new.to(neurons.dtype)
        return made

    def _router(self, layer: Layer, statistics: DenseStatistics | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Rows that tell clusters of tokens apart, and for groups easy tokens from hard ones: the harder, the wider.
        Without calibration, rows drawn at random."""
        config = self.target.config
        experts, groups = f"{layer.block}gate.weight", f"{layer.block}gate.group_weight"
        sizes = {experts: config.num_experts}
        if config.router_type == "two_level":
            sizes[groups] = config.num_groups
        if statistics is None:
            drawn = {name: torch.randn(n, config.hidden_size, generator=layer.generator) for name, n in sizes.items()}
            return {name: (rows * config.initializer_range).to(dtype) for name, rows in drawn.items()}
        inputs_TH = statistics.sample()
        targets = {experts: torch.zeros(len(inputs_TH), config.num_experts)}
        for ids in config.expert_id_table:
            ids = torch.tensor([number for number in ids if number < config.num_experts])
            capacity = -(-len(inputs_TH) // len(ids))
            clusters_T = cluster(inputs_TH, [capacity] * len(ids), layer.generator)
            targets[experts].scatter_(1, ids[clusters_T, None], 1.0)
        if groups in sizes:
            order_T = layer.difficulty[statistics.sampled()].argsort(stable=True).argsort()
            bins_T = order_T * config.num_groups // len(order_T)
            targets[groups] = torch.eye(config.num_groups)[bins_T]
        gram_HH = inputs_TH.T @ inputs_TH
        return {
            name: linear_rows(gram_HH, inputs_TH.T @ target, len(inputs_TH)).to(dtype)
            for name, target in targets.items()
        }


class Residual(Copy):
    """The feed-forward stays whole as the shared expert; routed experts start as in `copy` with a down projection of
    zero, so that they add nothing until they have learned something."""

    name = "residual"
    options = frozenset({"widths", "experts_per_group", "top_k", "top_groups", "router", "saliency"})
    refits = False
    exact = True
    reason = "the shared expert computes the feed-forward, and routed experts add zero"

    @property
    def shared_width(self) -> int:
        return self.source.width

    def convert(self, layer: Layer, weights: LayerWeights, statistics: DenseStatistics | None) -> Converted:
        routed = super().convert(layer, weights, statistics).weights
        shared = shared_expert(layer.block, weights.expert(0))
        return Converted(LayerWeights({**routed.tensors, **shared}, routed.expert))

    def finish(self, expert: Expert, generator: torch.Generator) -> Expert:
        return expert._replace(down=torch.zeros_like(expert.down))


class Shards(Mode):
    """The feed-forward is cut into one shard for each group, and each group holds copies of its shard: virtual groups
    (https://huggingface.co/papers/2410.07524) with shards of different width. A token takes one expert of each group
    at weight 1 / G; the down projection alone makes up for that."""

    name = "shards"
    takes = ("dense",)
    options = frozenset({"widths", "experts_per_group"})
    reason = "a token takes one copy of every shard, and the down projection makes up for the combine weights"

    def make_target(self) -> MoHGE:
        widths, width = self.required("widths"), self.source.width
        if sum(widths) != width:
            raise ValueError(
                f"`widths` {widths} add up to {sum(widths)}, and the feed-forward has width {width}: make them agree"
            )
        fields = {
            "moe_intermediate_sizes": widths,
            "num_experts_per_group": self.required("experts_per_group"),
            "num_experts_per_tok": len(widths),
            "router_type": "grouped_top_k",
            "shared_expert_intermediate_size": 0,
            "routed_scaling_factor": len(widths) / self._factor(len(widths)),
        }
        return self.mohge(**fields)

    def _factor(self, groups: int) -> int:
        """What the down projection is multiplied by. Half precision holds a weight times a power of two only; the
        router's scaling factor takes the rest."""
        return groups if self.source.config.dtype in (None, torch.float32) else 2 ** int(math.log2(groups))

    def convert(self, layer: Layer, weights: LayerWeights, statistics: None) -> Converted:
        config = self.target.config
        full, tensors = weights.expert(0), dict(weights.tensors)
        tensors[f"{layer.block}gate.weight"] = full.gate.new_zeros(config.num_experts, config.hidden_size)
        parts = torch.arange(full.gate.shape[0]).split(config.moe_intermediate_sizes)

        def expert(number: int) -> Expert:
            shard = slice_neurons(full, parts[config.expert_groups[number]])
            return shard._replace(down=shard.down * self._factor(config.num_groups))

        return Converted(LayerWeights(tensors, expert))
