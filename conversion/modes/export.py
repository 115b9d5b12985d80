"""Leaving MoHGE: back to the source's format, or to experts of one width."""

from mohge import MoHGEConfig

from ..architectures import ARCHITECTURES, Architecture, Expert, LayerWeights, MoHGE
from ..loading import make_architecture
from .base import Converted, Layer, Mode, widen


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
        fields = {name: getattr(config, name) for name in MoHGEConfig.__annotations__}
        fields["moe_intermediate_sizes"] = [width] * config.num_groups
        if config.is_heterogeneous:
            raise ValueError("`pad` works on models whose layers are all alike, and this one has `per_layer_config`")
        return MoHGE(MoHGEConfig(**fields, dtype=config.dtype))

    def _source(self) -> Architecture:
        config = self.source.config
        fields = getattr(config, "source_config", None)
        if not isinstance(fields, dict) or fields.get("model_type") not in ARCHITECTURES:
            raise ValueError(
                "mode export goes back to a source that `regroup` came from, and this model has none: use `pad`"
            )
        target = make_architecture(fields)
        if target.experts is None:
            raise ValueError(f"mode export cannot make a dense {target.model_type} model of experts: use `pad`")
        groups = {"moe_intermediate_sizes", "num_experts_per_group", "num_groups_per_tok"}
        wanted = MoHGEConfig(**target.backbone(), **target.mixture([target.experts.width], target.experts.count))
        routes_flat = config.num_groups_per_tok == config.num_groups and config.num_experts == wanted.num_experts
        for name in target.backbone().keys() | target.mixture([1], 1).keys() - groups:
            if name != "dtype" and getattr(config, name) != getattr(wanted, name):
                raise ValueError(
                    f"mode export cannot go back to {target.model_type}: `{name}` is {getattr(config, name)}, and was "
                    f"{getattr(wanted, name)} in the source. Use `pad`"
                )
        if set(config.expert_widths) != set(wanted.expert_widths) or not routes_flat or config.is_heterogeneous:
            raise ValueError(
                f"mode export cannot go back to {target.model_type}, whose experts are {wanted.num_experts} of width "
                f"{target.experts.width} in one group: use `pad`"
            )
        return target

    def convert(self, layer: Layer, weights: LayerWeights, statistics: None) -> Converted:
        if not self.recipe.pad:
            return Converted(weights)
        width = self.target.config.moe_intermediate_size

        def expert(number: int) -> Expert:
            return widen(weights.expert(number), width, None)

        return Converted(LayerWeights(weights.tensors, expert))
