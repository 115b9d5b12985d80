"""The model class that vLLM's plugin registers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
from vllm.model_executor.models.transformers import TransformersForCausalLM


class MoHGEForCausalLM(TransformersForCausalLM):
    """vLLM's backend for models of transformers, without its experts of one width."""

    def recursive_replace(self):
        """Put vLLM's layers in place of the model's; of several ranks each keeps its share of every expert."""
        super().recursive_replace()
        if self.tp_group.world_size > 1:
            for experts in [module for module in self.model.modules() if hasattr(module, "kept_groups")]:
                for name, stack in [*experts.named_parameters()]:
                    share = partial(self._share, name)
                    data = torch.empty_like(
                        share(stack), dtype=self.model_config.dtype, device=self.device_config.device
                    )
                    stack = nn.Parameter(data.contiguous(), requires_grad=False)
                    stack.weight_loader = partial(_load_share, share)
                    setattr(experts, name, stack)
                experts.register_forward_hook(lambda experts, given, output: self.tp_group.all_reduce(output))

    def _share(self, name: str, stack: torch.Tensor) -> torch.Tensor:
        """What this rank holds of a stack: of each expert the same part of its neurons."""
        rank, ranks = self.tp_group.rank_in_group, self.tp_group.world_size

        def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            width = tensor.shape[dim]
            if width < ranks:
                raise ValueError(f"experts of width {width} do not fit {ranks} ranks: lower --tensor-parallel-size")
            return tensor.tensor_split(ranks, dim)[rank]

        if name.startswith("down_bias"):  # counts once
            return stack if rank == 0 else torch.zeros_like(stack)
        if name.startswith("down"):
            return part(stack, 2)
        return part(stack.unflatten(1, (2, -1)), 2).flatten(1, 2)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the weights of a checkpoint, padded exports among them."""
        return super().load_weights(self._stacked(weights))

    def _stacked(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights by the names of the model: vLLM only renames, and does not stack what is stored by expert."""
        converters = [
            entry for entry in get_model_conversion_mapping(self.model) if isinstance(entry, WeightConverter)
        ]
        known = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        parts = defaultdict(list)
        for name, tensor in weights:
            first, pattern = rename_source_key(name, [], converters)
            if pattern is None:
                yield name, tensor
                continue
            parts[first].append((name, pattern, tensor))
            experts = self.get_submodule(first.rpartition(".")[0])
            if len(parts[first]) == experts.num_experts * len(known[pattern].source_patterns):
                converter = deepcopy(known[pattern])
                for part in sorted(parts.pop(first), key=lambda part: dot_natural_key(part[0])):
                    converter.add_tensor(first, *part)
                yield from converter.convert(first, model=self, config=self.config).items()
        for first in parts:
            raise ValueError(f"the checkpoint lacks experts of {first.rpartition('.')[0]}: save it again")


def _load_share(share: Callable, parameter: nn.Parameter, stack: torch.Tensor):
    parameter.data.copy_(share(stack))
