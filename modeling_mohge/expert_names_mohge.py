"""Experts under names of their own, `experts.{id}.gate_proj.weight` and so on, which serving engines know: the layout
of experts of one width on the disk, beside the stacks of the model. Ids are those that the router gives."""

import re

import torch
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_utils import PreTrainedModel

from .configuration_mohge import MoHGEConfig


_STACK = re.compile(r"(.+\.experts)\.(gate_up|down)_proj_(\d+)")


class _StackExperts(ConversionOps):
    """The stacks of all groups, of what a layer's experts have under names of their own."""

    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        full_layer_name: str,
        model: PreTrainedModel,
        **kwargs,
    ) -> dict[str, torch.Tensor]:
        path, _, first = full_layer_name.rpartition(".")
        experts, stack = model.get_submodule(path), first.removesuffix("_0")
        parts = [input_dict.get(pattern, []) for pattern in source_patterns]
        if {len(tensors) for tensors in parts} != {experts.num_experts}:
            return {}  # the stacks are missing, which is for the caller to judge
        by_id = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        made = {
            f"experts.{stack}_{group}": torch.stack([by_id[index] for index in experts.ids_of(group)])
            for group in experts.kept_groups
        }
        if stack == "down_proj" and hasattr(experts, "expert_ids"):
            made["experts.expert_ids"] = torch.arange(experts.num_experts, device=by_id[0].device)
        return made


def name_experts(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model whose experts have one width, with each expert under names of its own. Those with biases stay
    as they are: no engine has names for these."""
    named = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        found = _STACK.fullmatch(name)
        experts = model.get_submodule(path) if found or last == "expert_ids" else None
        if experts is None or experts.has_bias:
            named[name] = tensor
        elif found:
            parts = ("gate_proj", "up_proj") if found[2] == "gate_up" else ("down_proj",)
            for index, weight in zip(experts.ids_of(int(found[3])), tensor, strict=True):
                weights = weight.chunk(len(parts))
                named |= {f"{path}.{index}.{part}.weight": w for part, w in zip(parts, weights, strict=True)}
    return named


# transformers looks for these by the type of the model when it loads weights, and leaves stacks alone.
register_checkpoint_conversion_mapping(
    MoHGEConfig.model_type,
    [
        WeightConverter(
            [rf"experts\.\d+\.{part}\.weight" for part in parts], f"experts.{stack}_0", operations=[_StackExperts()]
        )
        for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",)))
    ],
    overwrite=True,  # the package and the code of each checkpoint register the same
)

__all__ = ["name_experts"]
