"""Where a decoder of transformers has its feed-forward, what that is made of, and why it may not be replaced.

Nothing here knows models by name. A dense feed-forward is gated if, with small weights in place of its own, it
computes what a gated feed-forward computes; a mixture says itself, as every mixture of transformers has to, how its
experts lie in memory.
"""

import copy
import dis
import inspect
import itertools
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN, SiLUActivation
from transformers.configuration_utils import PreTrainedConfig
from transformers.integrations.moe import _default_apply_gate
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .llama4_mohge import adapt_llama4


FEED_FORWARD_NAMES = ("block_sparse_moe", "mlp", "feed_forward", "mlp_block", "ffn", "shared_mlp", "mixer")
"""Attributes of a decoder layer that may hold its feed-forward."""
_ROUTER_NAMES = ("gate", "router")


class FeedForward(NamedTuple):
    """The feed-forward of one decoder layer."""

    layer_idx: int
    layer: nn.Module
    name: str
    """Attribute of the layer; empty where the layer itself has router and experts, beside a dense feed-forward."""
    path: str
    """Name inside the model, such as `"model.layers.0.mlp"`."""

    @property
    def module(self) -> nn.Module:
        """The module, which may have been replaced in the meantime."""
        return getattr(self.layer, self.name) if self.name else self.layer

    @property
    def experts(self) -> nn.Module | None:
        """The experts of a mixture; None for a dense feed-forward."""
        return getattr(self.module, "experts", None)

    @property
    def router(self) -> nn.Module | None:
        """The router of a mixture, where it is a module of its own."""
        modules = (getattr(self.module, name, None) for name in _ROUTER_NAMES)
        return next((module for module in modules if isinstance(module, nn.Module)), None)


class GatedWeights(NamedTuple):
    """Weights of a dense feed-forward: `down @ (act(gate @ x) * (up @ x))`."""

    gate: torch.Tensor
    """[W, H]"""
    up: torch.Tensor
    """[W, H]"""
    down: torch.Tensor
    """[H, W]"""


class ExpertStacks(NamedTuple):
    """Weights of the experts of a mixture, gate before up."""

    gate_up: torch.Tensor
    """[E, 2 W, H]"""
    down: torch.Tensor
    """[E, H, W]"""
    gate_up_bias: torch.Tensor | None
    """[E, 2 W]"""
    down_bias: torch.Tensor | None
    """[E, H]"""


def feed_forwards(model: PreTrainedModel) -> list[FeedForward]:
    """
    The feed-forward of each decoder layer, in order.

    Raises:
        ValueError: if a layer has none that is known here.
    """
    decoder = getattr(model.base_model, "model", model.base_model)  # some name their base model wrongly
    lists = [
        module
        for module in decoder.children()
        if isinstance(module, nn.ModuleList) and any(_names_in(layer) for layer in module)
    ]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers with a feed-forward of a known name")
    list_name = next(name for name, module in model.named_modules() if module is lists[0])
    found = []
    for index, layer in enumerate(lists[0]):
        names = _names_in(layer)
        if not names:
            raise ValueError(f"{type(layer).__name__} {index} has no feed-forward of a known name")
        found.append(FeedForward(index, layer, names[0], f"{list_name}.{index}.{names[0]}".removesuffix(".")))
    return found


def _names_in(layer: nn.Module) -> list[str]:
    if isinstance(getattr(layer, "experts", None), nn.Module):
        return [""]
    return [name for name in FEED_FORWARD_NAMES if isinstance(getattr(layer, name, None), nn.Module)]


def replaceable(
    model: PreTrainedModel, keeps_router: bool, mlp_only_layers: Collection[int] | None = None
) -> list[FeedForward]:
    """
    The feed-forwards that are replaced, whole or, where the mixture keeps its router, in their experts alone.

    Args:
        model (`PreTrainedModel`): A decoder, possibly on the meta device.
        keeps_router (`bool`): Whether only the experts are replaced.
        mlp_only_layers (`Collection[int]`, *optional*):
            Layers to leave alone. By default none or, where the router stays, those that have no experts.

    Raises:
        ValueError: if one of them cannot be replaced, with the reason.
    """
    found = feed_forwards(model)
    if mlp_only_layers is None:
        mlp_only_layers = [each.layer_idx for each in found if keeps_router and each.experts is None]
    found = [each for each in found if each.layer_idx not in mlp_only_layers]
    if keeps_router and not found:
        raise ValueError(f"{type(model).__name__} is no mixture of experts")
    for each in found:
        name = type(each.module).__name__
        if keeps_router:
            if each.experts is None:
                raise ValueError(f"{name} of layer {each.layer_idx} has no experts")
            stacked_experts(each.experts)
            continue
        if not each.name:
            raise ValueError(f"{name} has its experts beside a dense feed-forward")
        forward = inspect.unwrap(type(each.module).forward)
        if len(inspect.signature(forward).parameters) != 2:
            raise ValueError(f"{name} takes more than the hidden states")
        if each.experts is None:
            gated_weights(each.module, activation(each.module, model.config))
        elif _returns_tuple(forward):
            raise ValueError(f"{name} returns more than the hidden states")
    return found


def _returns_tuple(function) -> bool:
    names = [instruction.opname for instruction in dis.get_instructions(function)]
    return ("BUILD_TUPLE", "RETURN_VALUE") in itertools.pairwise(names)


def backbone_on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """
    The model of a text decoder's config, without memory for its weights.

    Raises:
        ValueError: if transformers has no causal language model for the config, or it can be none of ours.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f'transformers has no causal language model for `model_type` "{config.model_type}" alone')
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config))
    adapt_llama4(model)
    return model


def reason_against(config: PreTrainedConfig, keeps_router: bool) -> str | None:
    """Why the feed-forward of a text decoder cannot be replaced, or the experts of a mixture alone; None if it can."""
    try:
        replaceable(backbone_on_meta(config), keeps_router)
    except ValueError as error:
        return str(error)
    return None


def is_mixture(config: PreTrainedConfig) -> bool:
    """Whether any layer of a text decoder is a mixture of experts."""
    return any(_has_experts(config))


def layers_without_experts(config: PreTrainedConfig) -> list[int]:
    """The layers of a text decoder that have a dense feed-forward."""
    return [index for index, has_experts in enumerate(_has_experts(config)) if not has_experts]


def _has_experts(config: PreTrainedConfig) -> list[bool]:
    """Whether each layer has experts; empty where the feed-forwards are not found."""
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _HAS_EXPERTS:
        try:
            _HAS_EXPERTS[key] = [found.experts is not None for found in feed_forwards(backbone_on_meta(config))]
        except ValueError:
            _HAS_EXPERTS[key] = []
    return _HAS_EXPERTS[key]


_HAS_EXPERTS: dict[str, list[bool]] = {}
"""What was found out by building a model, which takes seconds for a large one."""


def activation(module: nn.Module, config: PreTrainedConfig) -> nn.Module:
    """The activation of the gate in a feed-forward or in the experts of a mixture."""
    for part in (module, getattr(module, "experts", None)):
        for name in ("act_fn", "activation_fn", "activation", "act"):
            function = getattr(part, name, None)
            if isinstance(function, nn.Module):
                return function
    return ACT2FN[getattr(config, "hidden_act", None) or "silu"]


def is_silu(function: nn.Module) -> bool:
    """Whether this activation is the SiLU, for which there are kernels."""
    return isinstance(function, nn.SiLU | SiLUActivation)


def gated_weights(module: nn.Module, act_fn: nn.Module) -> GatedWeights:
    """
    The weights of a dense gated feed-forward, constant factors multiplied in.

    Raises:
        ValueError: if it is something else, saying what.
    """
    name = type(module).__name__
    linears = {key: child for key, child in module.named_children() if isinstance(child, nn.Linear)}
    if any(linear.bias is not None for linear in linears.values()):
        raise ValueError(f"{name} has biases, which our feed-forwards have not")
    weights = {id(linear.weight) for linear in linears.values()}
    if any(id(parameter) not in weights for parameter in module.parameters()):
        raise ValueError(f"{name} has parameters beside those of its projections")
    gate_factor, down_factor = constant_factors(module)
    for names in itertools.permutations(linears):
        sizes = [(linears[key].in_features, linears[key].out_features) for key in names]
        fits = len(sizes) == 3 or (len(sizes) == 2 and sizes[0][1] == 2 * sizes[1][0])
        if fits and _is_gated(module, names, act_fn, gate_factor, down_factor):
            parts = [linears[key].weight for key in names]
            gate, up = parts[0].chunk(2) if len(parts) == 2 else parts[:2]
            if gate_factor != 1 or down_factor != 1:
                return GatedWeights(gate * gate_factor, up, parts[-1] * down_factor)
            return GatedWeights(gate, up, parts[-1])
    raise ValueError(f"{name} does not compute down(act(gate(x)) * up(x))")


def constant_factors(module: nn.Module) -> tuple[float, float]:
    """What a dense feed-forward multiplies its gate and its output by."""
    return getattr(module, "gate_multiplier", 1.0), getattr(module, "down_multiplier", 1.0)


@torch.no_grad()
def _is_gated(
    module: nn.Module, names: tuple[str, ...], act_fn: nn.Module, gate_factor: float, down_factor: float
) -> bool:
    """Whether a copy with small weights computes a gated feed-forward, if its projections have these roles."""
    generator = torch.Generator().manual_seed(0)
    size = 8  # of inputs and of each projection: nothing fails for its shape
    with torch.device("cpu"):
        x, gate, up, down = torch.randn(4, size, size, generator=generator, dtype=torch.float32)
        x = x * 30  # beyond any clamp
        weights = [gate, up, down] if len(names) == 3 else [torch.cat([gate, up]), down]
        probe = copy.copy(module)
        probe._modules = dict(module._modules)
        probe.training = False
        for name, weight in zip(names, weights, strict=True):
            probe._modules[name] = _Linear(weight)
        for name, child in module.named_children():
            if isinstance(child, nn.Dropout):
                probe._modules[name] = nn.Identity()
        expected = (act_fn(x @ gate.T * gate_factor) * (x @ up.T)) @ down.T * down_factor
        return torch.allclose(probe(x[None])[0], expected, rtol=1e-4, atol=1e-3)


class _Linear(nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def stacked_experts(experts: nn.Module) -> ExpertStacks:
    """
    The weights of the experts of a mixture: views where its layout allows.

    Raises:
        ValueError: if they are experts of another kind, saying which.
    """
    name = type(experts).__name__
    if not hasattr(experts, "has_gate"):
        raise ValueError(f"{name} does not follow transformers' interface for experts")
    if not experts.has_gate:
        raise ValueError(f"{name} has no gate")
    if getattr(experts, "has_post_expert_norm", False):  # before transformers 5.23 no experts have one
        raise ValueError(f"{name} normalises the output of each expert")
    parts = ("gate_up_proj", "down_proj")
    names = (*parts, *(f"{part}_bias" for part in parts)) if experts.has_bias else parts
    parameters = dict(experts.named_parameters())
    if parameters.keys() != set(names):
        raise ValueError(f"{name} has other parameters than {', '.join(names)}")
    gate_up, down, gate_up_bias, down_bias = (parameters.get(part) for part in (*parts, *(f"{p}_bias" for p in parts)))
    if experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not experts.is_concatenated:
        gate_up = gate_before_up(gate_up)
        gate_up_bias = None if gate_up_bias is None else gate_before_up(gate_up_bias)
    number, twice_width, hidden_size = gate_up.shape
    if down.shape != (number, hidden_size, twice_width // 2):
        raise ValueError(f"{name} has stacks of the shapes {list(gate_up.shape)} and {list(down.shape)}")
    return ExpertStacks(gate_up, down, gate_up_bias, down_bias)


def expert_parameters(experts: nn.Module, stacks: ExpertStacks) -> dict[str, torch.Tensor]:
    """The parameters, by name, that give a mixture's experts these weights: the inverse of `stacked_experts`."""
    gate_up, down, gate_up_bias, down_bias = stacks
    if not experts.is_concatenated:
        gate_up, gate_up_bias = gate_beside_up(gate_up), None if gate_up_bias is None else gate_beside_up(gate_up_bias)
    if experts.is_transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    parameters = {"gate_up_proj": gate_up, "down_proj": down}
    if gate_up_bias is not None:
        parameters |= {"gate_up_proj_bias": gate_up_bias, "down_proj_bias": down_bias}
    return parameters


def gate_before_up(stack: torch.Tensor) -> torch.Tensor:
    """[E, 2 W, ...] with rows gate 0, up 0, gate 1, ... -> all gates before all ups."""
    return stack.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def gate_beside_up(stack: torch.Tensor) -> torch.Tensor:
    """[E, 2 W, ...] with all gates before all ups -> rows gate 0, up 0, gate 1, ..."""
    return stack.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def gate_function(experts: nn.Module):
    """The function of an experts class that stands in for `act(gate) * up`; None where there is none."""
    function = type(experts)._apply_gate
    return None if function is _default_apply_gate else function


__all__ = [
    "FEED_FORWARD_NAMES",
    "ExpertStacks",
    "FeedForward",
    "GatedWeights",
    "activation",
    "backbone_on_meta",
    "constant_factors",
    "expert_parameters",
    "feed_forwards",
    "gate_before_up",
    "gate_beside_up",
    "gate_function",
    "gated_weights",
    "is_mixture",
    "is_silu",
    "layers_without_experts",
    "reason_against",
    "replaceable",
    "stacked_experts",
]
