"""Leaving MoHGE: back to the source's format, to experts of one width, or to an architecture that engines have."""

import torch
from transformers.core_model_loading import revert_weight_conversion

from mohge import MoHGEConfig
from mohge.expert_names_mohge import name_experts
from mohge.llama4_mohge import scale_input

from ..decoders import Expert, LayerWeights, MoHGE, Source, make_decoder
from .base import Converted, Layer, Mode, widen
from .mixtures import routing_fields
from .native import make_native, native_layer, notes_on_engines, round_up


_FREE = {"dtype", "use_cache", "attention_dropout", "initializer_range", "architectures", "transformers_version"}
"""Fields that may differ from the source's: they matter in training only."""


class Export(Mode):
    """A model that `regroup` made goes back to its source's format. With `pad`, any MoHGE model gets experts of one
    width: idle neurons add nothing. With `to`, one with a flat router, or its mixture's own, leaves as a mixture that
    every engine has."""

    name = "export"
    takes = ("mohge",)
    options = frozenset({"pad", "to", "multiple"})

    @property
    def reason(self) -> str:
        if self.recipe.to is not None:
            return f"idle neurons add nothing, and the router is that of {self.target.model_type}"
        return "idle neurons add nothing" if self.recipe.pad else "groups of one width route as the source's experts"

    @property
    def notes(self) -> list[str]:
        if self.recipe.to is not None:
            return notes_on_engines(self.target)
        return self._notes_on_vllm() if self.recipe.pad else []

    def make_target(self) -> Source | MoHGE:
        if self.recipe.to is not None:
            return make_native(self.source, self.recipe.to, self._width(), self.recipe.multiple or 1)
        if self.recipe.pad:
            return self._padded()
        if self.recipe.multiple is not None:
            raise ValueError("`multiple` is for the width of padded experts: give `pad` or `to` too, or leave it out")
        return self._source()

    def _width(self) -> int:
        """The width that all experts get."""
        config = self.source.config
        sparse = [number for number in range(config.num_hidden_layers) if number not in config.mlp_only_layers]
        removed = [number for number in sparse if not config.per_layer_config[number].kept_groups]
        if removed:
            raise ValueError(
                f"mode export cannot pad what is not there: all experts of layer {removed[0]} have been removed. Use "
                "the model as it is"
            )
        widest = max(max(layer.moe_intermediate_sizes) for layer in config.sparse_layers)
        return round_up(widest, self.recipe.multiple or 1)

    def _padded(self) -> MoHGE:
        config, width = self.source.config, self._width()

        def padded(fields: dict) -> dict:
            given = fields.get("moe_intermediate_sizes", [])
            return fields | ({"moe_intermediate_sizes": [width] * len(given)} if given else {})

        fields = padded(config.to_dict())
        layers = fields.get("per_layer_config") or {}
        fields["per_layer_config"] = {layer: padded(entry) for layer, entry in layers.items()} or None
        if config.keeps_router:  # which has its own order of experts, and so have engines: that of one group
            fields |= {"moe_intermediate_sizes": [width], "num_experts_per_group": [config.num_experts]}
            fields |= {"per_layer_config": None, "num_groups_per_tok": None}
        return MoHGE(MoHGEConfig.from_dict(fields))

    def _source(self) -> Source:
        config = self.source.config
        fields = getattr(config, "source_config", None)
        if not isinstance(fields, dict):
            raise ValueError(
                "mode export goes back to the source of a `regroup`, and this model has none: use `pad` or `to`"
            )
        target = make_decoder(fields)
        if target.experts is None or config.is_heterogeneous:
            raise ValueError(f"mode export cannot make these experts a {target.model_type} model: use `pad`")
        ours, wanted = config.backbone_config.to_dict(), target.config.to_dict()
        if not config.keeps_router:
            routing = routing_fields(target, config.router_type, config.num_groups)
            ours |= {name: getattr(config, name) for name in routing}
            wanted |= routing
        for name in sorted(wanted.keys() - _FREE):
            if ours.get(name) != wanted[name] and not name.startswith(("_", "router_")):
                raise ValueError(
                    f"mode export cannot go back to {target.model_type}: `{name}` is {ours.get(name)}, and was "
                    f"{wanted[name]} in the source. Set it back, or use `pad`"
                )
        if list(config.expert_widths) != [target.experts.width] * target.experts.count:
            raise ValueError(
                f"mode export cannot go back to {target.model_type}, which has {target.experts.count} experts of "
                f"width {target.experts.width} in a layer: use `pad`"
            )
        return target

    def _notes_on_vllm(self) -> list[str]:
        """vLLM's own experts compute down(silu(gate(x)) * up(x)), and weigh what comes out."""
        experts = next(found.experts for found in self.target.feed_forwards if found.experts is not None)
        found = {
            "compute SiLU, and these another activation": not experts.act_is_silu,
            "have no biases, and these have": experts.has_bias,
            "weigh their output, and these their input": scale_input in experts._forward_pre_hooks.values(),
        }
        return [
            f"vLLM's own experts {text}: serve with the plugin, or the model as it was"
            for text, true in found.items()
            if true
        ]

    def convert(self, layer: Layer, weights: LayerWeights, statistics: None) -> Converted:
        tensors, ids = dict(weights.tensors), f"{layer.block}experts.expert_ids"
        here = tensors.pop(ids).tolist() if ids in tensors else None
        width = self._width() if self.recipe.pad or self.recipe.to is not None else None

        def expert(number: int) -> Expert:
            found = weights.expert(number if here is None else here[number])
            return found if width is None else widen(found, width, None)

        if isinstance(self.target, MoHGE) and here is not None:
            tensors[ids] = torch.arange(len(here))
        return self.convert_dense(layer, LayerWeights(tensors, expert))

    def convert_dense(self, layer: Layer, weights: LayerWeights) -> Converted:
        if self.recipe.to is not None:
            weights = native_layer(self.source, self.target, layer.number, weights)
        return Converted(weights)

    def on_disk(self, tensors: dict) -> dict:
        """The tensors as the source's format, or serving engines, have them on the disk."""
        named = name_experts if isinstance(self.target, MoHGE) else revert_weight_conversion
        return named(self.target.model, tensors)
