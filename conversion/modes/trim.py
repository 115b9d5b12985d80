"""Mixtures whose experts become narrower, each to the width that it deserves."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from mohge import MoHGEConfig

from ..allocation import Choices, allocate, choices, even, prices
from ..decoders import Expert, LayerWeights, MoHGE
from ..recipe import Recipe
from ..statistics import ExpertStatistics, LayerSaliency, observe_experts, refit
from .base import Converted, Layer, Mode, Run, slice_neurons, widen
from .mixtures import is_flat, routing_fields


_DEFAULTS = {"saliency": "gradient", "budget": "memory", "multiple": 64, "groups": 3}
_WITH_WIDTHS = {"widths", "experts_per_group", "saliency"}
_WITH_KEEP = {"keep", *_DEFAULTS}
_OF_THE_ROUTER = {"router", "top_k", "top_groups"}


class Trim(Mode):
    """
    Experts keep their most salient neurons, and their down projections are refitted. With `keep`, neurons of all
    experts and layers compete under one budget, and widths are what falls out, snapped to a few in each layer; with
    `widths`, the experts that matter most get the large ones.

    Where groups are part of how a model routes, all experts of a group stay together and share a width.
    """

    name = "trim"
    takes = ("mixture", "mohge")
    options = frozenset(_WITH_WIDTHS | _WITH_KEEP | _OF_THE_ROUTER)
    exact = False
    reason = "experts lose neurons"

    def make_target(self) -> MoHGE:
        recipe = self.recipe
        if (recipe.keep is None) == (recipe.widths is None):
            raise ValueError("mode trim needs `keep`, a fraction, or else `widths`: give one of the two")
        refused, why = _WITH_WIDTHS - _WITH_KEEP, "does not go with `keep`"
        if recipe.keep is None:
            refused, why = _WITH_KEEP - _WITH_WIDTHS, "goes with `keep`"
        if isinstance(self.source, MoHGE):
            if recipe.widths is not None:
                raise ValueError("`widths` do not apply to a MoHGE model, which has widths already: use `keep`")
            refused, why = refused | _OF_THE_ROUTER, "does not apply to a MoHGE model, whose router stays"
        for option in sorted(refused):
            if getattr(recipe, option) is not None:
                raise ValueError(f"`{option}` {why}: leave it out")
        for option, default in _DEFAULTS.items():
            if option not in refused and getattr(recipe, option) is None:
                setattr(recipe, option, default)
        if recipe.budget == "work" and recipe.saliency == "magnitude":
            raise ValueError(
                "`budget` work counts where tokens go, and none are looked at here: leave out `saliency` magnitude"
            )
        if recipe.keep is not None and isinstance(self.source, MoHGE):  # until the survey says more
            return MoHGE(self.source.config)
        if recipe.keep is not None:
            return self._regrouped(self._shape_of([self.source.experts.width], [self.source.experts.count]), {})
        counts = self.expert_counts(self.source.experts.count, len(recipe.widths))
        return self._regrouped({"moe_intermediate_sizes": recipe.widths, "num_experts_per_group": counts}, {})

    def _regrouped(self, shape: dict, per_layer: dict[int, dict]) -> MoHGE:
        """The result, whose layers have this shape but where `per_layer` has another."""
        fields = shape | ({"per_layer_config": per_layer} if per_layer else {})
        if isinstance(self.source, MoHGE):
            fields = {**self.source.config.to_dict(), "per_layer_config": None, **fields}
            if self.source.config.router_type == "two_level" and self._is_flat:
                fields["group_score_function"] = "expert_logsumexp"  # a router of one group has none for several
            return MoHGE(MoHGEConfig.from_dict(fields))
        fields = routing_fields(self.source, self.recipe.router, len(shape["moe_intermediate_sizes"])) | fields
        for option, field in (("top_k", "num_experts_per_tok"), ("top_groups", "num_groups_per_tok")):
            value = getattr(self.recipe, option)
            if value is not None and fields["router_type"] == "source":
                raise ValueError(f"`{option}` is the source's own where its router stays: leave it out")
            if value is not None and field not in shape:
                fields[field] = value
        return self.mohge(**fields)

    @property
    def criterion(self) -> str:
        return self.recipe.saliency

    @property
    def refits(self) -> bool:
        return self.recipe.keep is not None

    @property
    def keeps_statistics(self) -> bool:
        if self.recipe.saliency == "magnitude":
            return False
        # Two matrices in float32 for each expert, if its three in half precision take no less.
        widest = max(width for number in range(self.source.num_layers) for width in self.source.expert_widths(number))
        return 8 * widest <= 6 * self.source.config.hidden_size

    @property
    def needs_calibration(self) -> bool:
        return self.recipe.saliency != "magnitude"

    @property
    def observes(self) -> bool:
        return self.recipe.calibration is not None

    def resolved(self, revision: str | None) -> Recipe:
        if self.recipe.keep is None:
            return super().resolved(revision)
        router = None if isinstance(self.source, MoHGE) else self.target.config.router_type
        return replace(self.recipe, revision=revision, router=router)  # widths differ between layers

    def settle(self, layers: list[LayerSaliency], tokens: int) -> None:
        self.saliency = layers
        sparse = [number for number, layer in enumerate(layers) if layer.neurons]
        self.group_of = {}
        """For each sparse layer, [E] the group in the result of each expert of the source."""
        if self.recipe.keep is None:
            config = self.target.config
            for number in sparse:
                ranked = np.argsort([neurons.sum().item() for neurons in layers[number].neurons], kind="stable")
                self.group_of[number] = np.empty(len(ranked), dtype=int)
                self.group_of[number][ranked] = np.repeat(range(config.num_groups), config.expert_counts)
            return
        tables = {number: self._choices(number, layers[number]) for number in sparse}
        own = {number: list(map(len, layers[number].neurons)) for number in sparse}
        cost = sum(prices(layers[number], self.recipe.budget) @ own[number] for number in sparse)
        evened = even([layers[number] for number in sparse], list(tables.values()))
        chosen = dict(zip(sparse, self.pick(evened, self.recipe.keep * cost), strict=True))
        lost = sum(tables[number].lost[range(len(chosen[number])), chosen[number]].sum() for number in sparse)
        whole = sum(curve[0].item() for layer in layers for curve in layer.lost)
        self._lost, self._tokens = lost, tokens
        self._share = lost / whole if whole else 0.0
        shapes = {}
        for number in sparse:
            widths = np.array(tables[number].widths)[chosen[number]]
            shapes[number], self.group_of[number] = self._shape(number, widths)
        first = shapes[sparse[0]]
        self.target = self._regrouped(first, {number: shape for number, shape in shapes.items() if shape != first})

    def pick(self, tables: list[Choices], budget: float) -> list[list[int]]:
        """Of each layer and unit the index of its width; here the widths that lose the least."""
        return allocate(tables, budget, self.recipe.groups)

    def forecast(self) -> dict[str, str]:
        if self.recipe.keep is None:
            return {}
        said = {"saliency lost": f"{self._share:.2%} ({self.recipe.saliency})"}
        if self.recipe.saliency == "gradient":
            said["predicted loss"] = f"+{self._lost / 2 / self._tokens:.4f} nats per token, to second order"
        return said

    @property
    def _is_flat(self) -> bool:
        """Whether no layer of a MoHGE model chooses by groups."""
        return all(map(is_flat, self.source.config.sparse_layers))

    def _units(self, number: int) -> list[list[int]]:
        """The experts that must share a width."""
        if isinstance(self.source, MoHGE):
            config = self.source.config.per_layer_config[number]
            scored = config.group_score_function != "expert_logsumexp"  # by a router that all layers have, or none
            flat = self._is_flat if scored else is_flat(config)
            if config.router_type in ("two_level", "grouped_top_k") and not flat:
                groups = np.array(config.expert_groups)
                return [np.flatnonzero(groups == group).tolist() for group in range(config.num_groups)]
        return [[expert] for expert in range(len(self.source.expert_widths(number)))]

    def _choices(self, number: int, layer: LayerSaliency) -> Choices:
        made = choices(layer, self.recipe.multiple, self.recipe.budget)
        units = self._units(number)
        widths, lost, cost = made.widths, *(np.stack([t[unit].sum(0) for unit in units]) for t in made[1:])
        if self.source.equivalent.keeps_router and self.source.feed_forwards[number].experts.has_bias:
            return Choices(widths[1:], lost[:, 1:], cost[:, 1:])  # without neurons, an expert would lose its bias too
        return Choices(widths, lost, cost)

    def _shape(self, number: int, widths: np.ndarray) -> tuple[dict, np.ndarray]:
        """Fields of a layer whose units have these widths, and the group of each expert."""
        units = self._units(number)
        together = max(map(len, units)) > 1
        if together:  # groups stay, in the order of their new widths
            order = np.argsort(widths, kind="stable")
            group_of_unit = np.argsort(order, kind="stable")
            distinct, counts = widths[order], [len(units[unit]) for unit in order]
        else:
            distinct, group_of_unit, counts = np.unique(widths, return_inverse=True, return_counts=True)
        group_of = np.empty(sum(map(len, units)), dtype=int)
        for unit, group in zip(units, group_of_unit, strict=True):
            group_of[unit] = group
        shape = self._shape_of(list(map(int, distinct)), list(map(int, counts)))
        if isinstance(self.source, MoHGE):
            config = self.source.config.per_layer_config[number]
            shape["num_experts_per_tok"] = config.num_experts_per_tok
            if together:
                shape["num_groups_per_tok"] = config.num_groups_per_tok
        return shape, group_of

    def _shape_of(self, widths: list[int], counts: list[int]) -> dict:
        """Fields of a layer with these groups. As many of them are kept per token as there are, or were asked for, but
        no fewer than hold the experts of a token: how large groups become is not for the user to choose."""
        kept = len(widths) if self.recipe.top_groups is None else min(self.recipe.top_groups, len(widths))
        if self.recipe.router == "two_level" and kept > 0:
            chosen = self.recipe.top_k or self.source.config.num_experts_per_tok
            while kept < len(widths) and sum(sorted(counts)[:kept]) < chosen:
                kept += 1
        return {"moe_intermediate_sizes": widths, "num_experts_per_group": counts, "num_groups_per_tok": kept}

    def observe(self, layer: Layer, weights: LayerWeights, run: Run) -> ExpertStatistics | None:
        if not self.observes:
            return None
        statistics = ExpertStatistics(self.source.expert_widths(layer.number), layer.device)
        run(lambda found: observe_experts(found, statistics))
        return statistics

    def convert(self, layer: Layer, weights: LayerWeights, statistics: ExpertStatistics | None) -> Converted:
        config = self.target.config.per_layer_config[layer.number]
        origins = list(self._origins(config, self.group_of[layer.number]))
        saliency, squares = self.saliency[layer.number], []

        def expert(number: int) -> Expert:
            origin, width = origins[number], config.expert_widths[number]
            full = weights.expert(origin)
            narrow = width < full.gate.shape[0]
            kept = saliency.kept(origin, width)
            made = slice_neurons(full, kept)
            if statistics is not None:
                down, sums = refit(full.down, kept, statistics.grams[origin])
                squares.append(sums)
                made = made._replace(down=down)
            return made if narrow else widen(full, width, layer.generator, config.initializer_range)

        tensors = self._routed(layer, dict(weights.tensors), origins)
        return Converted(LayerWeights(tensors, expert), squares if statistics is not None else None)

    def _routed(self, layer: Layer, tensors: dict[str, torch.Tensor], origins: list[int]) -> dict[str, torch.Tensor]:
        """The tensors beside the experts, where id `n` is now what `origins[n]` was."""
        if self.target.config.keeps_router:
            name = f"{layer.block}experts.expert_ids"
            before = tensors.get(name, torch.arange(len(origins)))
            return {**tensors, name: torch.tensor(origins).argsort()[before]}
        group_of, of_groups = self.group_of[layer.number], f"{layer.block}gate.group_weight"
        if self.target.config.group_score_function == "expert_logsumexp":
            tensors.pop(of_groups, None)
        for name, tensor in tensors.items():
            if name == of_groups:
                groups = [group_of[unit[0]] for unit in self._units(layer.number)]
                tensors[name] = tensor[np.argsort(groups, kind="stable")]
            elif name.startswith(f"{layer.block}gate."):  # one entry for each expert, some with another at the end
                tensors[name] = tensor[[*origins, *range(len(origins), len(tensor))]]
        return tensors

    @staticmethod
    def _origins(config: MoHGEConfig, group_of: np.ndarray) -> Iterator[int]:
        """The source's expert that each id of the result comes from; inside a group they keep their order."""
        members = [iter(np.flatnonzero(group_of == group).tolist()) for group in range(config.num_groups)]
        for group in config.expert_groups:
            yield next(members[group])
