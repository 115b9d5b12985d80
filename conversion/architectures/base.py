"""What all architectures have in common: a pre-norm RMSNorm SwiGLU decoder with grouped-query attention."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from mohge import MoHGEConfig, MoHGEForCausalLM


class ExpertLayout(NamedTuple):
    """The experts of a homogeneous mixture."""

    count: int
    """Routed experts in a layer."""
    width: int
    """Intermediate width of each."""
    per_token: int
    """Experts that a token is given."""
    normalized: bool
    """Whether the weights of the chosen experts are divided by their sum."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have a dense feed-forward instead of experts."""
    shared_width: int = 0
    """Width of the shared expert, 0 for none."""
    shared_gate: bool = False
    """Whether a sigmoid gate scales the shared expert."""


class Expert(NamedTuple):
    """The matrices of a SwiGLU feed-forward of width W."""

    gate: torch.Tensor
    """[W, H]"""
    up: torch.Tensor
    """[W, H]"""
    down: torch.Tensor
    """[H, W]"""


class LayerWeights(NamedTuple):
    """A decoder layer, in MoHGE's terms."""

    tensors: dict[str, torch.Tensor]
    """What is not an expert, by MoHGE's name inside the layer."""
    expert: Callable[[int], Expert] | None
    """Brings an expert by its id; None in a layer without experts."""


class Architecture:
    """
    How an architecture's config and tensors translate to MoHGE's. One subclass for each; a tensor that a subclass does
    not name has MoHGE's own name.

    Args:
        config ([`PreTrainedConfig`]): Config of the checkpoint.

    Raises:
        ValueError: if the config asks for something that MoHGE cannot express, with the reason.
    """

    model_type: str
    expert_names = Expert(
        gate="mlp.experts.{expert}.gate_proj.weight",
        up="mlp.experts.{expert}.up_proj.weight",
        down="mlp.experts.{expert}.down_proj.weight",
    )
    """Names of an expert's matrices inside a layer."""
    renamed: dict[str, str] = {}
    """MoHGE's name -> this architecture's, for other tensors inside a layer whose names differ."""

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self.check()

    def check(self):
        """Raise ValueError if the config asks for something that MoHGE cannot express."""
        config = self.config
        if config.hidden_act != "silu":
            self.refuse(f'`hidden_act` is "{config.hidden_act}", but experts are SwiGLU, with "silu"')
        if getattr(config, "mlp_bias", False):
            self.refuse("`mlp_bias` is true, but experts have no biases")
        if getattr(config, "quantization_config", None) is not None:
            self.refuse("it has a `quantization_config`: give the checkpoint before quantisation")
        if self.experts is not None and not 1 <= self.experts.per_token <= self.experts.count:
            self.refuse(f"it chooses {self.experts.per_token} of {self.experts.count} experts for a token")

    def refuse(self, reason: str):
        """Raise the ValueError that names this architecture and `reason`."""
        raise ValueError(f"this {self.model_type} checkpoint cannot be converted: {reason}")

    @property
    def experts(self) -> ExpertLayout | None:
        """The layout of a mixture, None for a dense model."""
        return None

    def backbone(self) -> dict:
        """The fields of [`MoHGEConfig`] outside the mixture."""
        config = self.config
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": getattr(config, "head_dim", None),
            "hidden_act": config.hidden_act,
            "max_position_embeddings": config.max_position_embeddings,
            "initializer_range": config.initializer_range,
            "rms_norm_eps": config.rms_norm_eps,
            "use_cache": config.use_cache,
            "pad_token_id": config.pad_token_id if config.pad_token_id in range(config.vocab_size) else None,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "tie_word_embeddings": config.tie_word_embeddings,
            "rope_parameters": dict(config.rope_parameters),
            "attention_dropout": config.attention_dropout or 0.0,
            "dtype": config.dtype,
            **self.attention(),
        }

    def attention(self) -> dict:
        """The fields of [`MoHGEConfig`] in which architectures differ: biases, norms, clipping and windows."""
        return {"attention_bias": getattr(self.config, "attention_bias", False)}

    def mixture(self, widths: list[int], counts: int | list[int]) -> dict:
        """The fields of [`MoHGEConfig`] that route as this mixture does, among groups of `widths`."""
        layout = self.experts
        return {
            "mlp_only_layers": list(layout.dense_layers),
            "moe_intermediate_sizes": widths,
            "num_experts_per_group": counts,
            "num_experts_per_tok": layout.per_token,
            "num_groups_per_tok": len(widths),
            "shared_expert_intermediate_size": layout.shared_width,
            "shared_expert_gate": layout.shared_gate,
            "router_type": "two_level",
            "group_score_function": "expert_logsumexp",
            "topk_weight_normalization": "sum" if layout.normalized else "none",
        }

    def equivalent(self) -> MoHGEConfig:
        """The MoHGE config of the same model, in one group or without experts."""
        if self.experts is not None:
            return MoHGEConfig(**self.backbone(), **self.mixture([self.experts.width], self.experts.count))
        return MoHGEConfig(**self.backbone(), mlp_only_layers=list(range(self.config.num_hidden_layers)))

    def layer_config(self, layer: int) -> PreTrainedConfig:
        """Config of a model whose only layer is layer number `layer` of this one, with a vocabulary of one."""
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        fields = self.config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 1, **special}
        if fields.get("layer_types"):
            fields["layer_types"] = [fields["layer_types"][layer]]
        if "decoder_sparse_step" in fields:
            fields["decoder_sparse_step"] = 1
            fields["mlp_only_layers"] = [0] if layer in self.experts.dense_layers else []
        return type(self.config).from_dict(fields)

    def shapes(self) -> dict[str, torch.Size]:
        """Shape of every tensor of a checkpoint."""
        with torch.device("meta"):
            ours = MoHGEForCausalLM(self.equivalent()).state_dict()
        shapes = {}
        for name, tensor in ours.items():
            match = re.fullmatch(r"(model\.layers\.\d+\.)(.*)", name)
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if match is None:
                shapes[name] = tensor.shape
            elif not match[2].startswith("mlp.experts."):
                shapes[match[1] + self.renamed.get(match[2], match[2])] = tensor.shape
            elif "down_proj" in match[2]:
                for expert in range(tensor.shape[0]):
                    for matrix, pattern in self.expert_names._asdict().items():
                        shape = tensor.shape[1:] if matrix == "down" else tensor.shape[:0:-1]
                        shapes[match[1] + pattern.format(expert=expert)] = shape
        return shapes

    def read_layer(self, layer: int, read: Callable[[str], torch.Tensor], names: list[str]) -> LayerWeights:
        """
        A layer of a checkpoint.

        Args:
            layer (`int`): Its number.
            read (`Callable`): Brings a tensor by its name inside the layer.
            names (`list[str]`): Names of the layer's tensors, without the layer's prefix.
        """
        ours = {theirs: name for name, theirs in self.renamed.items()}
        is_expert = re.compile("|".join(re.escape(n).replace(r"\{expert\}", r"\d+") for n in self.expert_names))
        others = [name for name in names if not is_expert.fullmatch(name)]
        tensors = {ours.get(name, name): read(name) for name in others}

        def expert(number: int) -> Expert:
            return Expert(*(read(pattern.format(expert=number)) for pattern in self.expert_names))

        return LayerWeights(tensors, expert if len(others) < len(names) else None)

    def module_state(
        self, layer: int, read: Callable[[str], torch.Tensor], names: list[str]
    ) -> dict[str, torch.Tensor]:
        """The tensors of a layer as the module of transformers has them, with experts in stacks. Arguments are those
        of `read_layer`. (transformers would stack them on loading, and take the memory of a layer more.)"""
        tensors, expert = self.read_layer(layer, read, names)
        if expert is None:
            return tensors
        layout, first = self.experts, expert(0)
        gate_up = first.gate.new_empty(layout.count, 2 * layout.width, self.config.hidden_size)
        down = first.gate.new_empty(layout.count, self.config.hidden_size, layout.width)
        for number in range(layout.count):
            gate_up[number, : layout.width], gate_up[number, layout.width :], down[number] = expert(number)
        return {**tensors, "mlp.experts.gate_up_proj": gate_up, "mlp.experts.down_proj": down}

    def write_layer(self, layer: int, weights: LayerWeights) -> dict[str, torch.Tensor]:
        """The tensors of a layer by their names inside it, in memory of their own; the inverse of `read_layer`."""
        tensors = {self.renamed.get(name, name): own(tensor) for name, tensor in weights.tensors.items()}
        if weights.expert is not None:
            for number in range(self.experts.count):
                for pattern, matrix in zip(self.expert_names, weights.expert(number), strict=True):
                    tensors[pattern.format(expert=number)] = own(matrix)
        return tensors

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        ARCHITECTURES[cls.model_type] = cls


ARCHITECTURES: dict[str, type[Architecture]] = {}
"""Every architecture by its `model_type`; a subclass of [`Architecture`] enters itself."""


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, which does not keep the file or tensor it was cut from in memory."""
    return tensor.clone(memory_format=torch.contiguous_format)
