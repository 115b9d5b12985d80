"""MoHGE itself: what every mode but `export` writes, and `export` reads."""

from collections.abc import Callable

import torch

from mohge import MoHGEConfig, MoHGEForCausalLM

from .base import Architecture, Expert, LayerWeights, own


class MoHGE(Architecture):
    model_type = "mohge"

    def check(self):
        pass

    def equivalent(self) -> MoHGEConfig:
        return self.config

    def layer_config(self, layer: int) -> MoHGEConfig:
        one = self.config.per_layer_config[layer]
        fields = {name: getattr(one, name) for name in MoHGEConfig.__annotations__}
        fields |= {
            "num_hidden_layers": 1,
            "vocab_size": 1,
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            "layer_types": [self.config.layer_types[layer]],
            "mlp_only_layers": [0] if layer in self.config.mlp_only_layers else [],
        }
        return MoHGEConfig(**fields)

    def shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            model = MoHGEForCausalLM(self.config)
        return {
            name: tensor.shape
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight" or not self.config.tie_word_embeddings
        }

    def read_layer(self, layer: int, read: Callable[[str], torch.Tensor], names: list[str]) -> LayerWeights:
        config = self.config.per_layer_config[layer]
        others = [name for name in names if not name.startswith("mlp.experts.")]

        def expert(number: int) -> Expert:
            group, slot = config.expert_groups[number], config.expert_slots[number]
            gate, up = read(f"mlp.experts.gate_up_proj_{group}")[slot].chunk(2)
            return Expert(gate, up, read(f"mlp.experts.down_proj_{group}")[slot])

        return LayerWeights({name: read(name) for name in others}, expert if len(others) < len(names) else None)

    def module_state(
        self, layer: int, read: Callable[[str], torch.Tensor], names: list[str]
    ) -> dict[str, torch.Tensor]:
        return {name: read(name) for name in names}

    def write_layer(self, layer: int, weights: LayerWeights) -> dict[str, torch.Tensor]:
        tensors = {name: own(tensor) for name, tensor in weights.tensors.items()}
        if weights.expert is None:
            return tensors
        config = self.config.per_layer_config[layer]
        for number, (group, slot) in enumerate(zip(config.expert_groups, config.expert_slots, strict=True)):
            gate, up, down = weights.expert(number)
            width = config.moe_intermediate_sizes[group]
            gate_up_name, down_name = f"mlp.experts.gate_up_proj_{group}", f"mlp.experts.down_proj_{group}"
            if gate_up_name not in tensors:
                count = config.expert_counts[group]
                tensors[gate_up_name] = gate.new_empty(count, 2 * width, config.hidden_size)
                tensors[down_name] = gate.new_empty(count, config.hidden_size, width)
            tensors[gate_up_name][slot, :width], tensors[gate_up_name][slot, width:] = gate, up
            tensors[down_name][slot] = down
        return tensors
