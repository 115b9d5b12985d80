"""The models that a conversion reads and writes, one decoder layer at a time."""

import math
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from mohge import MoHGEConfig
from mohge.backbones_mohge import (
    ExpertStacks,
    FeedForward,
    activation,
    constant_factors,
    expert_parameters,
    feed_forwards,
    gated_weights,
    replaceable,
    stacked_experts,
)
from mohge.llama4_mohge import adapt_llama4


class Expert(NamedTuple):
    """The weights of a gated feed-forward of width W. Only some mixtures have biases."""

    gate: torch.Tensor
    """[W, H]"""
    up: torch.Tensor
    """[W, H]"""
    down: torch.Tensor
    """[H, W]"""
    gate_bias: torch.Tensor | None = None
    """[W]"""
    up_bias: torch.Tensor | None = None
    """[W]"""
    down_bias: torch.Tensor | None = None
    """[H]"""


class LayerWeights(NamedTuple):
    """What a decoder layer is made of."""

    tensors: dict[str, torch.Tensor]
    """All but the experts, by name inside the layer."""
    expert: Callable[[int], Expert] | None
    """Brings a routed expert by its id. The feed-forward of a dense model is its only expert; None in the dense layers
    of a mixture, which nothing changes."""


class ExpertLayout(NamedTuple):
    """The experts of a homogeneous mixture."""

    count: int
    """Routed experts in a layer."""
    width: int
    """Intermediate width of each."""
    dense_layers: tuple[int, ...]
    """Layers that have a dense feed-forward instead of experts."""


_LOGITS = 2**24
"""Most logits of a model that are computed at once, for large vocabularies."""
_PRODUCTS = {F.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm}


class ComputeInFloat32(TorchFunctionMode):
    """Lets half-precision weights work on float32 activations, one matrix at a time instead of in a copied model."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            args = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return func(*args, **(kwargs or {}))


class Unconvertible(ValueError):
    """
    A kind of model that cannot be converted.

    Args:
        model_type (`str`): The kind.
        reason (`str`): Why not.
    """

    def __init__(self, model_type: str, reason: str):
        super().__init__(f"this {model_type} checkpoint cannot be converted: {reason}")
        self.reason = reason


class Passed(NamedTuple):
    """What a decoder layer leaves for the next."""

    output: Any
    """What it returns: states, or a tuple that begins with them."""
    shared: dict[str, dict]
    """Entries of the dicts that all layers are given, by the name of the argument: keys and values of attention that
    later layers use again."""


class _Reached(Exception):
    """Ends a forward at the layer that was to be run."""

    def __init__(self, passed: Passed):
        super().__init__("a layer has been run")
        self.passed = passed


class _Turn:
    """Which layer of a decoder runs, and what the one before it left."""

    number = 0
    passed: Passed | None = None


class _OneOfMany(nn.Module):
    """A decoder layer that runs when its turn has come; layers before it return what the last of them returned."""

    def __init__(self, layer: nn.Module, number: int, turn: _Turn):
        super().__init__()
        self.layer, self.number, self.turn = layer, number, turn

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # a decoder asks its layers for their kind, say
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args, **kwargs) -> Any:
        turn = self.turn
        if self.number < turn.number:
            return turn.passed.output
        dicts = {name: value for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        before = {name: dict(value) for name, value in dicts.items()}
        for name, entries in (turn.passed.shared if turn.passed else {}).items():
            dicts[name].update(entries)
        output = self.layer(*args, **kwargs)
        shared = {
            name: {key: value for key, value in entries.items() if before[name].get(key) is not value}
            for name, entries in dicts.items()
        }
        raise _Reached(Passed(output, {name: entries for name, entries in shared.items() if entries}))


class Decoder:
    """
    A model without weights, whose layers are given theirs one at a time. It is run by transformers' own classes, in
    float32 whatever the dtype of its weights.

    Args:
        config ([`PreTrainedConfig`]): Config of the model.

    Raises:
        ValueError: if its feed-forward is none that can be converted, with the reason.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        config._experts_implementation = "eager"  # works on one expert at a time
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        try:
            adapt_llama4(self.model)
        except ValueError as error:
            self.refuse(str(error))
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            parent, _, own_name = name.rpartition(".")
            setattr(self.model.get_submodule(parent), own_name, torch.empty_like(buffer, device="cpu"))
        self.model.initialize_weights()  # fills these tables, which no checkpoint has; weights stay without memory
        try:
            self.feed_forwards = feed_forwards(self.model)
        except ValueError as error:
            self.refuse(str(error))
        self.num_layers = len(self.feed_forwards)
        first = self.feed_forwards[0]
        layers = first.path.removesuffix(f".{first.name}" if first.name else "").removesuffix(".0")
        self.prefix = f"{layers}."
        tied = self.model.all_tied_weights_keys
        self.tensors = {
            name: tensor.to("meta") for name, tensor in self.model.state_dict().items() if name not in tied
        }
        """Each tensor of a checkpoint, without memory, by the name that transformers gives it."""
        self._turn = _Turn()
        parent, _, self._list_name = layers.rpartition(".")
        self._parent = self.model.get_submodule(parent)
        self._layers = nn.ModuleList(
            _OneOfMany(found.layer, found.layer_idx, self._turn) for found in self.feed_forwards
        )
        setattr(self._parent, self._list_name, self._layers)
        self.model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.float())

    @property
    def model_type(self) -> str:
        return self.config.model_type

    def refuse(self, reason: str):
        """Raise the error that names this kind of model and `reason`."""
        raise Unconvertible(self.model_type, reason)

    @property
    def outer_names(self) -> list[str]:
        """Names of the tensors outside of the layers."""
        return [name for name in self.tensors if not name.startswith(self.prefix)]

    def layer_names(self, number: int) -> list[str]:
        """Names of the tensors of a layer."""
        return [name for name in self.tensors if name.startswith(f"{self.prefix}{number}.")]

    def block(self, number: int) -> str:
        """What the names of the feed-forward's tensors begin with inside a layer."""
        name = self.feed_forwards[number].name
        return f"{name}." if name else ""

    def load_outer(self, tensors: dict[str, torch.Tensor], device: str):
        """Give the model its tensors outside of the layers."""
        self.model.load_state_dict(tensors, strict=False, assign=True)
        self.model.tie_weights()
        setattr(self._parent, self._list_name, nn.ModuleList())  # the layers have no weights that could be moved
        for parameter in self.model.parameters():
            if parameter.dim() < 2:  # norms, which are no products of matrices
                parameter.data = parameter.data.float()
        self.model.to(device)
        setattr(self._parent, self._list_name, self._layers)

    @contextmanager
    def layer(self, number: int, state: dict[str, torch.Tensor], device: str) -> Iterator[FeedForward]:
        """
        Within this context, a layer has its weights; brings its feed-forward.

        Args:
            number (`int`): Number of the layer.
            state (`dict[str, torch.Tensor]`): Its tensors, by name inside the layer.
            device (`str`): Where to compute.
        """
        found = self.feed_forwards[number]
        found.layer.load_state_dict(state, strict=True, assign=True)
        wide = {id(parameter) for parameter in found.module.parameters() if parameter.dim() > 1}
        if found.router is not None:  # some round the states to the dtype of their weights
            wide -= {id(parameter) for parameter in found.router.parameters()}
        for parameter in found.layer.parameters():
            if id(parameter) not in wide:
                parameter.data = parameter.data.float()
        found.layer.to(device)
        try:
            with ComputeInFloat32():
                yield found
        finally:
            _empty(found.layer)

    def run(self, number: int, ids: torch.Tensor, before: Passed | None) -> Passed:
        """What layer `number` makes of the tokens `ids` [b, S] and what the layer before it left, None for the
        first."""
        self._turn.number, self._turn.passed = number, send_to_device(before, ids.device)
        try:
            with ComputeInFloat32():
                self.model(input_ids=ids, use_cache=False)
        except _Reached as reached:
            return reached.passed
        raise AssertionError("the model has not run its layers")

    def logits(self, ids: torch.Tensor, last: Passed, positions: torch.Tensor) -> torch.Tensor:
        """[b, n, V] the logits at `positions` [n] that follow from what the last layer left."""
        self._turn.number, self._turn.passed = self.num_layers, send_to_device(last, ids.device)
        with ComputeInFloat32():
            return self.model(input_ids=ids, use_cache=False, logits_to_keep=positions).logits.float()

    def logits_in_steps(self, ids: torch.Tensor, *last: Passed) -> Iterator[tuple[torch.Tensor, ...]]:
        """For the tokens `ids` [b, S], a few positions at a time: the tokens that follow, -100 for none, and the
        logits [t, V] that follow from each of `last`."""
        targets = targets_of(ids).view_as(ids)
        step = max(1, _LOGITS // self.config.vocab_size // len(ids))
        for positions in torch.arange(ids.shape[1], device=ids.device).split(step):
            logits = (self.logits(ids, passed, positions).flatten(0, 1) for passed in last)
            yield targets[:, positions].flatten(), *logits


def targets_of(ids: torch.Tensor) -> torch.Tensor:
    """The token that follows each token of `ids` [b, S], -100 for none; flat."""
    return F.pad(ids[:, 1:], (0, 1), value=-100).flatten()


class Source(Decoder):
    """
    A model that is converted.

    Args:
        config ([`PreTrainedConfig`]): Config of a text decoder.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        if getattr(config, "quantization_config", None) is not None:
            self.refuse("it has a `quantization_config`: give the checkpoint before quantisation")
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            self.refuse("transformers has no causal language model for it alone")
        super().__init__(config)
        self.config = self.model.config
        self.experts: ExpertLayout | None = None
        """The layout of a mixture, None for a dense model."""
        self.width = 0
        """Width of the feed-forward of a dense model."""
        mixtures = [found for found in self.feed_forwards if found.experts is not None]
        try:
            replaceable(self.model, keeps_router=bool(mixtures))
        except ValueError as error:
            self.refuse(str(error))
        if mixtures:
            shapes = {tuple(stacked_experts(found.experts).down.shape) for found in mixtures}
            if len(shapes) > 1:
                self.refuse("its layers have experts of different number or width")
            [(count, _, width)] = shapes
            dense = {found.layer_idx for found in self.feed_forwards} - {found.layer_idx for found in mixtures}
            self.experts = ExpertLayout(count, width, tuple(sorted(dense)))
        else:
            widths = {self._dense(found).gate.shape[0] for found in self.feed_forwards}
            if len(widths) > 1:
                self.refuse(f"its layers have feed-forwards of the widths {sorted(widths)}")
            [self.width] = widths
            factors = {factor for found in self.feed_forwards for factor in constant_factors(found.module)}
            if self.config.dtype not in (None, torch.float32) and any(math.frexp(f)[0] != 0.5 for f in factors):
                self.refuse("half precision cannot hold its weights times their multipliers: give it in float32")

    def _dense(self, found: FeedForward) -> Expert:
        return Expert(*gated_weights(found.module, activation(found.module, self.config)))

    @property
    def equivalent(self) -> MoHGEConfig:
        """The MoHGE config of the same model, in one group or without experts."""
        if self.experts is None:
            return MoHGEConfig(backbone_config=self.config, mlp_only_layers=list(range(self.num_layers)))
        return MoHGEConfig(
            backbone_config=self.config,
            router_type="source",
            moe_intermediate_sizes=[self.experts.width],
            num_experts_per_group=self.experts.count,
            mlp_only_layers=list(self.experts.dense_layers),
        )

    def expert_widths(self, number: int) -> list[int]:
        """Width of each routed expert of a layer, by id: the feed-forward of a dense model is its only expert."""
        if self.experts is None:
            return [self.width]
        return [] if number in self.experts.dense_layers else [self.experts.width] * self.experts.count

    def read_layer(self, number: int, state: dict[str, torch.Tensor]) -> LayerWeights:
        """A layer whose tensors, by name inside it, are `state`."""
        found = self.feed_forwards[number]
        if self.experts is not None and found.experts is None:
            return LayerWeights(dict(state), None)
        module, prefix = found.module, self.block(number)
        if self.experts is not None:
            module, prefix = found.experts, f"{prefix}experts."
        module.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)},
            assign=True,
        )
        others = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        if self.experts is None:
            expert = self._dense(found)
            _empty(module)
            return LayerWeights(others, lambda index: expert)
        stacks = stacked_experts(module)
        _empty(module)
        return LayerWeights(others, lambda index: _expert(stacks, index))

    def write_layer(self, number: int, weights: LayerWeights) -> dict[str, torch.Tensor]:
        """The tensors of a layer by their names inside it, in memory of their own; the inverse of `read_layer`."""
        tensors = {name: own(tensor) for name, tensor in weights.tensors.items()}
        if weights.expert is not None:
            stacks = _empty_stacks(self.experts.count, self.experts.width, weights.expert(0))
            for index in range(self.experts.count):
                _fill(stacks, index, weights.expert(index))
            parameters = expert_parameters(self.feed_forwards[number].experts, stacks)
            tensors |= {f"{self.block(number)}experts.{name}": tensor for name, tensor in parameters.items()}
        return tensors


class MoHGE(Decoder):
    """MoHGE itself: what every mode but `export` writes, and `export` reads."""

    config: MoHGEConfig

    @property
    def equivalent(self) -> MoHGEConfig:
        """See `Source.equivalent`."""
        return self.config

    def expert_widths(self, number: int) -> list[int]:
        """See `Source.expert_widths`."""
        dense = number in self.config.mlp_only_layers
        return [] if dense else list(self.config.per_layer_config[number].expert_widths)

    def read_layer(self, number: int, state: dict[str, torch.Tensor]) -> LayerWeights:
        """See `Source.read_layer`."""
        if number in self.config.mlp_only_layers:
            return LayerWeights(dict(state), None)
        config, groups = self.config.per_layer_config[number], self._names_of_groups(number)
        stacks = [ExpertStacks(*map(state.get, names)) for names in groups]
        held = set().union(*groups)
        others = {name: tensor for name, tensor in state.items() if name not in held}
        if config.kept_groups:
            like = _expert(stacks[config.kept_groups[0]], 0)
        else:
            new = next(iter(others.values())).new_empty
            like = Expert(new(0, config.hidden_size), new(0, config.hidden_size), new(config.hidden_size, 0))
        for group in set(range(config.num_groups)) - set(config.kept_groups):
            stacks[group] = _empty_stacks(config.expert_counts[group], 0, like)
        return LayerWeights(
            others, lambda index: _expert(stacks[config.expert_groups[index]], config.expert_slots[index])
        )

    def write_layer(self, number: int, weights: LayerWeights) -> dict[str, torch.Tensor]:
        """See `Source.write_layer`."""
        tensors = {name: own(tensor) for name, tensor in weights.tensors.items()}
        if weights.expert is None:
            return tensors
        config, stacks = self.config.per_layer_config[number], {}
        for index, (group, slot) in enumerate(zip(config.expert_groups, config.expert_slots, strict=True)):
            expert = weights.expert(index)
            if group not in stacks:
                count, width = config.expert_counts[group], config.moe_intermediate_sizes[group]
                stacks[group] = _empty_stacks(count, width, expert)
            _fill(stacks[group], slot, expert)
        groups = self._names_of_groups(number)
        for group in config.kept_groups:
            pairs = zip(groups[group], stacks[group], strict=True)
            tensors |= {name: stack for name, stack in pairs if stack is not None}
        return tensors

    def _names_of_groups(self, number: int) -> list[list[str]]:
        """Names of the stacks of each group."""
        prefix, parts = f"{self.block(number)}experts.", ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
        groups = self.config.per_layer_config[number].num_groups
        return [[f"{prefix}{part}_{group}" for part in parts] for group in range(groups)]


def _empty(module: nn.Module):
    """Let go of the weights of a module."""
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in module.state_dict().items()}
    module.load_state_dict(empty, assign=True)


def _expert(stacks: ExpertStacks, index: int) -> Expert:
    """An expert of a stack, as views."""
    biases = () if stacks.down_bias is None else (*stacks.gate_up_bias[index].chunk(2), stacks.down_bias[index])
    return Expert(*stacks.gate_up[index].chunk(2), stacks.down[index], *biases)


def _empty_stacks(count: int, width: int, like: Expert) -> ExpertStacks:
    new, hidden_size = like.gate.new_empty, like.down.shape[0]
    biases = (None, None)
    if like.down_bias is not None:
        biases = new(count, 2 * width), like.gate.new_zeros(count, hidden_size)
    return ExpertStacks(new(count, 2 * width, hidden_size), new(count, hidden_size, width), *biases)


def _fill(stacks: ExpertStacks, index: int, expert: Expert):
    for view, weight in zip(_expert(stacks, index), expert, strict=True):
        if weight is not None:
            view.copy_(weight)


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy, which does not keep the file or tensor it was cut from in memory."""
    return tensor.clone(memory_format=torch.contiguous_format)


def make_decoder(fields: dict) -> Source | MoHGE:
    """
    The model that a config.json describes.

    Raises:
        ValueError: if it cannot be converted, with the reason.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"the source's config.json has the `model_type` {model_type}, which transformers does not know"
        )
    try:
        config = AutoConfig.for_model(**PreTrainedConfig._decode_special_floats(fields))
        if not isinstance(config, MoHGEConfig):
            return Source(config.get_text_config())
        return MoHGE(config)
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"the source's config.json, of `model_type` {model_type}, is not valid "
            f"({type(error).__name__}: {' '.join(str(error).split())}): mend it"
        ) from error
