"""Architectures that every serving engine has, and MoHGE models that are one of them once their experts are padded."""

import dataclasses
import math

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig

from mohge import MoHGEConfig

from ..decoders import Decoder, Expert, LayerWeights, MoHGE, Source, make_decoder
from .mixtures import is_flat


BACKBONES = {
    "mixtral": ("mixtral", "llama", "mistral"),
    "qwen2_moe": ("qwen2_moe", "qwen2", "llama", "mistral", "mixtral"),
    "qwen3_moe": ("qwen3_moe", "qwen3"),
    "olmoe": ("olmoe",),
}
"""Architecture -> backbones that compute what it computes outside of the experts, where their tensors agree."""
_WIDTHS = ("moe_intermediate_size", "intermediate_size")
"""Fields that may hold the width of a mixture's experts; the first that a config has does."""
_SHARED = ".shared_expert"
"""Part of the names of a shared expert's tensors, or of several."""
_FAINT = 2.0**-40
"""Entries of a shared expert's gate that is always half open. Not 0: llama.cpp computes silu(x) / x of its output."""


def make_native(source: MoHGE, to: str, width: int, multiple: int) -> Source:
    """
    The model of the architecture `to` that computes what `source` does once its experts are padded to `width`.

    Args:
        source ([`MoHGE`]): A model with a flat router, or one that keeps its mixture's.
        to (`str`): The architecture, or `"source"` for the backbone's.
        width (`int`): Width of the experts.
        multiple (`int`): What the width of a shared expert is rounded up to a multiple of.

    Raises:
        ValueError: if there is none, naming the field and what does.
    """
    own = source.config.backbone_config.model_type
    named = [own] if source.config.keeps_router else list(BACKBONES)
    to = own if to == "source" else to
    if to not in named:
        raise ValueError(f"`to` is {to}: this model can only become {' or '.join(named)}")
    try:
        return _make(source, to, width, multiple)
    except ValueError as error:
        fits = [other for other in named if other != to and _fits(source, other, width, multiple)]
        remedy = f"use {' or '.join(fits)}" if fits else "`pad` keeps it a MoHGE model"
        raise ValueError(f"`to` {to} does not fit this model: {error}; {remedy}") from error


def _fits(source: MoHGE, to: str, width: int, multiple: int) -> bool:
    try:
        return _make(source, to, width, multiple) is not None
    except ValueError:
        return False


def _make(source: MoHGE, to: str, width: int, multiple: int) -> Source:
    config, backbone = source.config, source.config.backbone_config
    dtype = config.dtype or torch.float32
    if config.keeps_router:
        fields = backbone.to_dict()
        fields |= {next((name for name in _WIDTHS if fields.get(name) is not None), _WIDTHS[0]): width}
    else:
        fields = _fields(source, to, width, multiple)
    fields |= {"model_type": to, "dtype": str(dtype).removeprefix("torch."), "architectures": None}
    target = make_decoder(fields)
    _check_rest(source, target, width)
    return target


def _fields(source: MoHGE, to: str, width: int, multiple: int) -> dict:
    """The fields of the architecture's config for a model whose router is ours."""
    config, backbone = source.config, source.config.backbone_config
    if backbone.model_type not in BACKBONES[to]:
        raise ValueError(f"its `backbone_config` is a {backbone.model_type}")
    layers = config.sparse_layers
    for layer in layers:
        if not is_flat(layer):
            raise ValueError(
                f"its router does not choose the best of all experts by one softmax (`router_type` "
                f"{layer.router_type}, {layer.num_groups_per_tok} of {layer.num_groups} groups"
                f"{f', scored by {layer.group_score_function}' if layer.router_type == 'two_level' else ''})"
            )
    [*counts], [*chosen] = (
        {getattr(layer, name) for layer in layers} for name in ("num_experts", "num_experts_per_tok")
    )
    if len(counts) > 1 or len(chosen) > 1:
        raise ValueError(
            f"its layers differ in `num_experts_per_group` or `num_experts_per_tok` ({sorted(counts)} experts, of "
            f"which tokens take {sorted(chosen)})"
        )
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[to])}
    normalisation, shared = config.topk_weight_normalization, config.shared_expert_intermediate_size
    able = ["sum", "none"] if "norm_topk_prob" in known else ["sum"]
    if normalisation not in able:
        raise ValueError(f"`topk_weight_normalization` is {normalisation}, not {' or '.join(able)}")
    if shared and "shared_expert_intermediate_size" not in known:
        raise ValueError(f"it has a shared expert, of `shared_expert_intermediate_size` {shared}")
    if config.mlp_only_layers and "mlp_only_layers" not in known:
        raise ValueError(f"it has dense layers, `mlp_only_layers` {config.mlp_only_layers}")
    if backbone.hidden_act not in ("silu", "swish"):
        raise ValueError(f"engines compute silu in it, and `hidden_act` is {backbone.hidden_act}")
    factor = config.routed_scaling_factor
    if config.dtype not in (None, torch.float32) and math.frexp(factor)[0] != 0.5:
        raise ValueError(
            f"`routed_scaling_factor` {factor} goes into the down projections, and {config.dtype} cannot hold them "
            "exactly, as float32 can"
        )
    fields = {
        "num_experts": counts[0],
        "num_local_experts": counts[0],
        "num_experts_per_tok": chosen[0],
        "norm_topk_prob": normalisation == "sum",
        "shared_expert_intermediate_size": round_up(shared or 1, multiple),
        "mlp_only_layers": config.mlp_only_layers,
        "decoder_sparse_step": 1,
        "qkv_bias": True,  # vLLM has them whatever this says, and what is not there would be left to chance
        "router_aux_loss_coef": config.router_aux_loss_coef,
        next(name for name in _WIDTHS if name in known): width,
    }
    if to == "qwen3_moe":
        known.add("head_dim")  # it takes that, and does not declare it
    return {name: value for name, value in (backbone.to_dict() | fields).items() if name in known}


def round_up(width: int, multiple: int) -> int:
    """The least multiple that is not below `width`."""
    return -(-width // multiple) * multiple


def _check_rest(source: MoHGE, target: Source, width: int):
    """Check that all but routers and experts is the same."""
    if (
        target.experts is None
        or target.experts.width != width
        or set(target.experts.dense_layers) != set(source.config.mlp_only_layers)
    ):
        raise ValueError(f"it has no such layers of experts of width {width}")
    before, after = (_rest(decoder, source.config) for decoder in (source, target))
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        grows = _SHARED in name and "gate_up" not in name
        fills = name.endswith(".bias") if old is None else new and grows and old <= new
        if old != new and not fills:
            raise ValueError(f"{name} would be {new or 'lost'}, and is {old or 'missing'}")
    windows = _windows(source.config.backbone_config)
    if windows != _windows(target.config):
        raise ValueError(f"`sliding_window` and `layer_types` let its layers see {windows} tokens")


def _rest(decoder: Decoder, config: MoHGEConfig) -> dict[str, list[int]]:
    part = "experts." if config.keeps_router else ""
    parts = tuple(
        f"{decoder.prefix}{number}.{decoder.block(number)}{part}"
        for number in range(decoder.num_layers)
        if number not in config.mlp_only_layers
    )
    return {name: list(tensor.shape) for name, tensor in decoder.tensors.items() if not name.startswith(parts)}


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """How far back each layer sees, None for all tokens."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def native_layer(source: MoHGE, target: Source, number: int, weights: LayerWeights) -> LayerWeights:
    """
    The layer of the architecture: the factor on the sum of its experts goes into their down projections, shared
    experts are padded, and one without a gate gets one that is half open. Biases, or a shared expert, that it lacks
    are 0.

    Args:
        source ([`MoHGE`]): The model.
        target ([`Source`]): From `make_native`.
        number (`int`): Number of the layer.
        weights ([`LayerWeights`]): The layer, with the target's order and width of experts.
    """
    given, prefix, block = weights.tensors, f"{target.prefix}{number}.", target.block(number)
    like, tensors = next(iter(given.values())), {}
    for name in target.layer_names(number):
        own_name, shape = name.removeprefix(prefix), target.tensors[name].shape
        if not own_name.startswith(f"{block}experts."):
            tensors[own_name] = _grown(given.get(own_name, like[:0]), shape)
    gate, down = (f"{block}shared_expert{part}.weight" for part in ("_gate", ".down_proj"))
    if gate in tensors.keys() - given.keys():
        numbers = torch.finfo(like.dtype)
        tensors[gate].fill_(max(_FAINT, numbers.smallest_normal * numbers.eps))
        tensors[down] = 2 * tensors[down]
    if weights.expert is None:
        return LayerWeights(tensors, None)

    def expert(index: int) -> Expert:
        found = weights.expert(index)
        return found._replace(down=found.down * source.config.routed_scaling_factor)

    return LayerWeights(tensors, expert)


def _grown(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The tensor with zeros behind it in each dimension."""
    if tensor.shape == shape:
        return tensor
    grown = tensor.new_zeros(shape)
    if tensor.numel():
        grown[tuple(map(slice, tensor.shape))] = tensor
    return grown


def notes_on_engines(target: Source) -> list[str]:
    """What keeps a model from running in engines whose classes compute less than those of transformers."""
    config, kind = target.config, target.model_type
    if kind not in BACKBONES:
        return []
    llama_cpp, both = "llama.cpp, which", "vLLM or llama.cpp, which"
    divides, olmoe = getattr(config, "norm_topk_prob", True), kind == "olmoe"
    few_heads = config.num_key_value_heads < config.num_attention_heads
    reasons = {
        f"{llama_cpp} divides the weights of the chosen experts by their sum": kind == "qwen3_moe" and not divides,
        f"{llama_cpp} does not divide the weights of the chosen experts by their sum": divides
        and kind in ("qwen2_moe", "olmoe"),
        f"{llama_cpp} lets every layer see all tokens": any(_windows(config)),
        f"{llama_cpp} has no dense layers": bool(target.experts.dense_layers),
        f"{both if olmoe else llama_cpp} has no tied embeddings": config.tie_word_embeddings
        and kind in ("qwen2_moe", "olmoe"),
        f"{llama_cpp} has as many heads of keys as of queries": olmoe and few_heads,
        f"{both} does not clip queries, keys and values": olmoe and config.clip_qkv is not None,
        f"{both} has no bias on the output of attention": getattr(config, "attention_bias", False),
    }
    return [f"not for {reason} in {kind}" for reason, applies in reasons.items() if applies]
