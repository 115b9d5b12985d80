"""Leaving MoHGE: back to the source's format, or to experts of one width."""

from mohge import MoHGEConfig

from ..architectures import Architecture, Expert, LayerWeights, MoHGE
from ..loading import make_architecture
from .base import Converted, Layer, Mode, widen


_FREE = {"moe_intermediate_sizes", "num_experts_per_group", "num_groups_per_tok"}
_FREE |= {"dtype", "use_cache", "attention_dropout", "initializer_range"}
"""Fields that may differ from the source's: how experts are grouped, and what matters in training only."""


class Export(Mode):
    """A model that `regroup` made goes back to its source's format. With `pad`, any MoHGE model gets experts of one
    width: idle neurons add nothing."""

    name = "export"
    takes = "mohge"
    options = frozenset({"pad"})

    @property
    def reason(self) -> str:
        return "idle neurons add nothing" if self.recipe.pad else "groups of one width route as the source's experts"

    def make_target(self) -> Architecture:
        return self._padded() if self.recipe.pad else self._source()

    def _padded(self) -> MoHGE:
        config = self.source.config
        width = max(max(layer.moe_intermediate_sizes) for layer in config.sparse_layers)

        def padded(fields: dict) -> dict:
            given = fields.get("moe_intermediate_sizes", [])
            return fields | ({"moe_intermediate_sizes": [width] * len(given)} if given else {})

        fields = padded(config.to_dict())
        layers = fields.get("per_layer_config") or {}
        fields["per_layer_config"] = {layer: padded(entry) for layer, entry in layers.items()} or None
        return MoHGE(MoHGEConfig.from_dict(fields))

    def _source(self) -> Architecture:
        config = self.source.config
        fields = getattr(config, "source_config", None)
        if not isinstance(fields, dict):
            raise ValueError("mode export goes back to the source of a `regroup`, and this model has none: use `pad`")
        target = make_architecture(fields)
        if target.experts is None or config.is_heterogeneous:
            raise ValueError(f"mode export cannot make these experts a {target.model_type} model: use `pad`")
        wanted = target.equivalent()
        names = target.backbone().keys() | target.mixture([1], 1).keys()
        for name in sorted(names - _FREE):
            if getattr(config, name) != getattr(wanted, name):
                raise ValueError(
                    f"mode export cannot go back to {target.model_type}: `{name}` is {getattr(config, name)}, and was "
                    f"{getattr(wanted, name)} in the source. Set it back, or use `pad`"
                )
        routes_flat = config.num_groups_per_tok == config.num_groups
        if not routes_flat or sorted(config.expert_widths) != sorted(wanted.expert_widths):
            raise ValueError(
                f"mode export cannot go back to {target.model_type}, which chooses among all of {wanted.num_experts} "
                f"experts of width {target.experts.width}: use `pad`"
            )
        return target

    def convert(self, layer: Layer, weights: LayerWeights, statistics: None) -> Converted:
        if not self.recipe.pad:
            return Converted(weights)
        width = self.target.config.moe_intermediate_size

        def expert(number: int) -> Expert:
            return widen(weights.expert(number), width, None)

        return Converted(LayerWeights(weights.tensors, expert))
