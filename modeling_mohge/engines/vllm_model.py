"""The model class that vLLM's plugin registers."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key
from vllm.model_executor.models.transformers import TransformersForCausalLM


class MoHGEForCausalLM(TransformersForCausalLM):
    """vLLM's backend for models of transformers, without its experts of one width."""

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
