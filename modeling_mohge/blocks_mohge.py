"""What stands in a layer in place of its feed-forward: router and experts of different width, or the experts alone.

Shapes: T tokens, H hidden size, E experts in id order, G groups, N_g experts of width W_g in group g, K experts per
token.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.integrations import use_experts_implementation
from transformers.utils.output_capturing import CompileableContextVar

from .backbones_mohge import activation, gate_function, is_silu
from .configuration_mohge import MoHGEConfig
from .experts_mohge import HeterogeneousExpertsInterface
from .llama4_mohge import scale_input
from .routing_mohge import ExpertTables, MoHGERouter, RouterOutput


recording = CompileableContextVar("routing")
"""Under `"routing"`, where the layers of a forward under way put what was decided: [`ExpertTables`], [`RouterOutput`]
and, of a backbone's own router, the id here of each of its experts. Not there where nobody asked for it."""


def under_way() -> list | None:
    return (recording.get() or {}).get("routing")


def is_inside() -> bool:
    """Whether the forward of one of our models is under way."""
    return recording.get() is not None and not isinstance(under_way(), _Outputs)


class _Outputs(list):
    """Keeps the output of what a layer puts in. Layers do so themselves where a part of a model is run."""

    def append(self, entry):
        super().append(by_our_ids(*entry[1:]) if isinstance(entry, tuple) else entry)


def by_our_ids(output: RouterOutput, expert_ids: torch.Tensor | None) -> RouterOutput:
    """The output with logits in the order of our ids. Not in the layer itself: one that is checkpointed runs a second
    time, unrecorded, and must do the same then."""
    if expert_ids is None or output.logits is None:
        return output
    logits = output.logits.reshape(-1, output.logits.shape[-1]).float()
    return output._replace(logits=logits[:, expert_ids.argsort()])


@contextmanager
def record_routing() -> Iterator[list[RouterOutput]]:
    """
    Collect what the routers decide in the forwards inside the block: one [`RouterOutput`] for each layer that has
    experts, in order, one forward after the other.

    ```python
    >>> with record_routing() as routing:
    ...     model(input_ids)
    >>> routing[0].index.shape  # tokens, experts per token
    ```
    """
    recorded = _Outputs()
    token = recording.set({"routing": recorded})
    try:
        yield recorded
    finally:
        recording.reset(token)


class MoHGEMLP(nn.Module):
    """Dense gated feed-forward: the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int, act_fn: nn.Module):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = act_fn

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


@use_experts_implementation(experts_interface=HeterogeneousExpertsInterface())
class MoHGEExperts(nn.Module):
    """
    The routed experts of a layer, one stack of weights for each group g and projection: `gate_up_proj_{g}`
    `[N_g, 2 W_g, H]` and `down_proj_{g}` `[N_g, H, W_g]`. Groups of width 0 have none.

    Args:
        config ([`MoHGEConfig`]): Config of the model, which names the experts implementation.
        layer_config ([`MoHGEConfig`]): Config of the layer, which has its widths.
        act_fn (`nn.Module`): Activation of the gate projection.
    """

    gate_function = None
    """What stands in for `act_fn(gate) * up`, a plain function of this module and of gate and up in one."""

    def __init__(self, config: MoHGEConfig, layer_config: MoHGEConfig, act_fn: nn.Module):
        super().__init__()
        self.num_experts = layer_config.num_experts
        self.kept_groups = layer_config.kept_groups
        self.expert_groups, self.expert_slots = layer_config.expert_groups, layer_config.expert_slots
        # Not even tensors without elements for the others: file formats, optimizers, sharding, quantisation and
        # adapters each have their own way with those.
        for group in self.kept_groups:
            count, width = layer_config.expert_counts[group], layer_config.moe_intermediate_sizes[group]
            gate_up = nn.Parameter(torch.empty(count, 2 * width, config.hidden_size))
            down = nn.Parameter(torch.empty(count, config.hidden_size, width))
            self.register_parameter(f"gate_up_proj_{group}", gate_up)
            self.register_parameter(f"down_proj_{group}", down)
        self.act_fn = act_fn
        self.act_is_silu = is_silu(act_fn)
        self.keys_per_group = max(layer_config.expert_counts)
        self.key_of_expert: torch.Tensor
        self.register_buffer("key_of_expert", self._key_table(), persistent=False)
        self.meanwhile: Callable | None = None  # what expert parallelism runs while tokens travel

    def extra_repr(self) -> str:
        """What `print` says: the stacks of weights."""
        return ", ".join(f"{name}: {list(stack.shape)}" for name, stack in self.named_parameters())

    def _key_table(self) -> torch.Tensor:
        kept = torch.tensor(self.expert_groups) - self.kept_groups.start
        return torch.where(kept < 0, self.key_to_skip, kept * self.keys_per_group + torch.tensor(self.expert_slots))

    @property
    def key_to_skip(self) -> int:
        """Sort key, behind all others, of what is not computed: slots without an expert, or with a removed one."""
        return len(self.kept_groups) * self.keys_per_group

    @torch.no_grad()
    def init_weights(self, std: float):
        """Draw the weights from a normal distribution."""
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)

    def fill_tables(self):
        """Fill the table of sort keys, which no checkpoint holds."""
        init.copy_(self.key_of_expert, self._key_table())

    def ids_of(self, group: int) -> list[int]:
        """Ids of the experts of a group, in the order of its stacks."""
        return [index for index, of in enumerate(self.expert_groups) if of == group]

    def groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`gate_up_proj` and `down_proj` of each kept group."""
        return [(getattr(self, f"gate_up_proj_{g}"), getattr(self, f"down_proj_{g}")) for g in self.kept_groups]

    def biases(self) -> list[tuple[torch.Tensor, torch.Tensor] | tuple[None, None]]:
        """Biases of each group in the order of `groups`, or None."""
        return [(None, None)] * len(self.kept_groups)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.gate_function is not None:
            return self.gate_function(self, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def sort_keys(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """`group * keys_per_group + slot` of each id, where `group` counts the kept ones; or `key_to_skip`."""
        skipped = top_k_index >= self.num_experts
        keys = self.key_of_expert[top_k_index.masked_fill(skipped, 0)]
        return keys.masked_fill(skipped, self.key_to_skip)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] -> [T, H]: the weighted sum of the outputs of the experts `top_k_index` [T, K]."""
        final_hidden_states = torch.zeros_like(hidden_states)
        groups, biases = self.groups(), self.biases()
        # Experts without tokens run on zero rows: data parallelism waits for the gradient of every weight.
        for expert in range(self.num_experts):
            group, slot = self.expert_groups[expert] - self.kept_groups.start, self.expert_slots[expert]
            if group < 0:
                continue
            gate_up_proj, down_proj = (stack[slot] for stack in groups[group])
            gate_up_bias, down_bias = (stack if stack is None else stack[slot] for stack in biases[group])
            token_idx, top_k_pos = torch.where(top_k_index == expert)
            gated = self._apply_gate(F.linear(hidden_states[token_idx], gate_up_proj, gate_up_bias))
            expert_output = F.linear(gated, down_proj, down_bias)
            expert_output = expert_output * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, expert_output.to(final_hidden_states.dtype))
        return final_hidden_states


class MoHGESparseMoeBlock(nn.Module):
    """Router, routed experts and, where configured, the shared expert, in place of a layer's feed-forward."""

    def __init__(self, config: MoHGEConfig, layer_config: MoHGEConfig, act_fn: nn.Module):
        super().__init__()
        self.gate = MoHGERouter(layer_config)
        self.experts = MoHGEExperts(config, layer_config, act_fn)
        self.routed_scaling_factor = config.routed_scaling_factor
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MoHGEMLP(config.hidden_size, config.shared_expert_intermediate_size, act_fn)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat_hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: RouterOutput = self.gate(flat_hidden_states)
        if (recorded := under_way()) is not None:
            recorded.append((unwrap(self.gate), routing, None))
        weights = (routing.weights * self.routed_scaling_factor).to(hidden_states.dtype)
        index, experts = routing.index, unwrap(self.experts)
        if not isinstance(experts, MoHGEExperts):  # those of a serving engine, which know no empty slots
            index = index.masked_fill(index == self.gate.config.num_experts, 0)
        if self.shared_expert is None:
            return self.experts(flat_hidden_states, index, weights).view(hidden_states.shape)
        if not getattr(experts, "_is_expert_parallel", False):
            output = self.experts(flat_hidden_states, index, weights).view(hidden_states.shape)
            return output + self._shared_output(hidden_states)
        # Tokens that travel to other ranks leave time to compute the shared expert.
        shared_output = experts.meanwhile = functools.cache(functools.partial(self._shared_output, hidden_states))
        try:
            output = self.experts(flat_hidden_states, index, weights).view(hidden_states.shape)
        finally:  # gradient checkpointing ends its second run with an exception
            experts.meanwhile = None
        return output + shared_output()

    def _shared_output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shared = self.shared_expert(hidden_states)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
        return shared


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside the adapter that PEFT may have put around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


class MoHGEMixtureExperts(MoHGEExperts):
    """
    The experts in a mixture that keeps its own router and shared experts.

    `expert_ids` `[E]`, saved with the weights, is the id here of each expert of the router: experts are numbered set
    by set here, and in any order there. Where the mixture's experts have biases, these have `gate_up_bias_{g}`
    `[N_g, 2 W_g]` and `down_bias_{g}` `[N_g, H]`.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        layer_config ([`MoHGEConfig`]): Config of the layer.
        source (`nn.Module`): The experts whose place these take.
    """

    def __init__(self, config: MoHGEConfig, layer_config: MoHGEConfig, source: nn.Module):
        super().__init__(config, layer_config, activation(source, config.backbone_config))
        self.has_bias = source.has_bias
        if self.has_bias:
            for group, (gate_up, down) in zip(self.kept_groups, self.groups(), strict=True):
                self.register_parameter(f"gate_up_bias_{group}", nn.Parameter(torch.empty(gate_up.shape[:2])))
                self.register_parameter(f"down_bias_{group}", nn.Parameter(torch.empty(down.shape[:2])))
        function = gate_function(source)
        if function is not None:
            self.gate_function, self.act_is_silu = function, False
            self.interleaves = not source.is_concatenated
            for name, value in vars(source).items():  # what the function may read, such as the limit of a clamp
                if isinstance(value, int | float) and not name.startswith("_") and not hasattr(self, name):
                    setattr(self, name, value)
        self.tables = ExpertTables(layer_config)
        self.expert_ids: torch.Tensor
        self.register_buffer("expert_ids", torch.arange(self.num_experts))
        # Before the hook of expert parallelism, which knows only our ids.
        self.register_forward_pre_hook(_translate_and_record)
        if getattr(source, "scales_input", False):
            self.register_forward_pre_hook(scale_input)

    def biases(self) -> list[tuple[torch.Tensor, torch.Tensor] | tuple[None, None]]:
        if not self.has_bias:
            return super().biases()
        return [(getattr(self, f"gate_up_bias_{g}"), getattr(self, f"down_bias_{g}")) for g in self.kept_groups]

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.gate_function is not None and self.interleaves:
            gate_up = gate_up.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        return super()._apply_gate(gate_up)

    def init_weights(self, std: float):
        super().init_weights(std)
        init.copy_(self.expert_ids, torch.arange(self.num_experts))

    def fill_tables(self):
        super().fill_tables()
        self.tables.fill_tables()


def _translate_and_record(experts: MoHGEMixtureExperts, arguments: tuple) -> tuple:
    hidden_states, top_k_index, top_k_weights = arguments
    # A router may say that a slot has no expert, by an id that no expert has.
    empty = top_k_index >= len(experts.expert_ids)
    top_k_index = experts.expert_ids[top_k_index.masked_fill(empty, 0)].masked_fill(empty, len(experts.expert_ids))
    if (recorded := under_way()) is not None:
        tensors = recorded.pop() if recorded and isinstance(recorded[-1], list) else []
        # Some routers have a last entry for "no expert".
        number = len(experts.expert_ids)
        logits = next((tensor for tensor in tensors if tensor.shape[-1] in (number, number + 1)), None)
        output = RouterOutput(logits, top_k_weights, top_k_index, None, None)
        recorded.append((experts.tables, output, experts.expert_ids))
    return hidden_states, top_k_index, top_k_weights


def record_logits(router: nn.Module, arguments: tuple, output):
    """Keep what the backbone's router returns until its experts are called."""
    if (recorded := under_way()) is not None:
        output = output if isinstance(output, tuple) else (output,)
        recorded.append([x for x in output if isinstance(x, torch.Tensor) and x.is_floating_point()])


__all__ = [
    "MoHGEExperts",
    "MoHGEMLP",
    "MoHGEMixtureExperts",
    "MoHGESparseMoeBlock",
    "by_our_ids",
    "is_inside",
    "record_logits",
    "record_routing",
    "recording",
    "under_way",
    "unwrap",
]
