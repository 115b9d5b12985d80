"""What an allocation of experts costs each device: parameters, memory, floating-point operations, all-to-all traffic.

Analytic, from the config alone. The model is trained with FSDP and expert parallelism as transformers does them: the R
devices of an expert-parallel group share the experts, and as R data-parallel ranks they shard everything else. Every
device brings its own tokens, and every figure "per token" is per token that a device brings.
"""

from dataclasses import dataclass

import torch

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.backbones_mohge import feed_forwards

from ..loop.traffic import RouterTraffic
from .activations import expert_bytes, run_without_memory, sender_bytes
from .allocations import ALLOCATIONS, Allocation


@dataclass(frozen=True)
class Workload:
    """
    How a model is trained.

    Args:
        devices (`int`): Devices R that share the experts.
        tokens (`int`, *optional*, defaults to `4096`): Tokens that each device brings to a step.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of weights, gradients, optimizer states, activations and what is sent.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether only the inputs of the layers are kept, and a layer is computed again for its backward.
    """

    devices: int
    tokens: int = 4096
    dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class AllocationCosts:
    """What one rule costs. Each list has one entry per device; sums are over the layers."""

    layers: list[Allocation]
    """Of each layer that has experts."""
    parameters: list[int]
    """Parameters held, with redundant copies."""
    expert_parameters: list[int]
    """Of which routed experts."""
    expert_flops: list[float]
    """Operations of the routed experts per token, forward, two per multiply-add; backward takes twice as many. Their
    mean is what the model needs, whatever R is."""
    flops_imbalance: float
    """Slowest over mean device, layer by layer: devices wait for each other in every layer."""
    exchanged_bytes: list[float]
    """Bytes per token that cross the network to and from the device's experts: dispatch and combine, both forward and
    backward. Their mean is what the model sends; the largest belongs to the busiest receiver."""
    memory: dict[str, list[int]]
    """Bytes of `weights`, `gradients`, `optimizer` (AdamW's two moments), `activations` and `logits`. Weights gathered
    for a moment and communication buffers are left out."""

    @property
    def total_memory(self) -> list[int]:
        """Bytes of all parts together."""
        return [sum(parts) for parts in zip(*self.memory.values(), strict=True)]

    @property
    def parameter_imbalance(self) -> float:
        """Largest over mean number of parameters."""
        return max(self.parameters) * len(self.parameters) / sum(self.parameters)


def layer_loads(config: MoHGEConfig, traffic: RouterTraffic | None = None) -> list[torch.Tensor]:
    """
    `[E]`, float64, for each layer that has experts: how often a token chooses each expert, as recorded, or else if all
    experts are chosen equally often (and every set is full, for `router_type="top_p"`).

    Raises:
        ValueError: if the traffic was recorded with other experts, or without tokens.
    """
    if traffic is None:
        return [_even_load(layer) for layer in config.sparse_layers]
    traffic.check(config)
    tokens = sum(traffic.tokens)
    if tokens == 0:
        raise ValueError("the traffic has no tokens: record it in training")
    return [traffic.layer_counts(number).sum(0) / tokens for number in range(len(config.sparse_layers))]


def _even_load(layer: MoHGEConfig) -> torch.Tensor:
    if layer.router_type == "grouped_top_k":  # the same number from each group
        sizes = [layer.num_groups * layer.expert_counts[group] for group in layer.expert_groups]
    else:
        sizes = [layer.num_experts] * layer.num_experts
    return layer.num_experts_per_tok / torch.tensor(sizes, dtype=torch.float64)


def allocation_costs(
    name: str, config: MoHGEConfig, workload: Workload, loads: list[torch.Tensor] | None = None
) -> AllocationCosts:
    """
    Allocate the experts of every layer by a rule and add up what that costs.

    Args:
        name (`str`): A key of `ALLOCATIONS`.
        config ([`MoHGEConfig`]): Config of the model.
        workload ([`Workload`]): How it is trained.
        loads (`list[torch.Tensor]`, *optional*): Of [`layer_loads`]; by default those of even traffic.

    Raises:
        ValueError: if the rule cannot split the experts over so many devices.
    """
    devices, element = workload.devices, workload.dtype.itemsize
    allocations, held, flops, exchanged, kept = [], [], [], [], []
    for layer, load in zip(config.sparse_layers, loads or layer_loads(config), strict=True):
        allocation = ALLOCATIONS[name](layer, devices, load)
        allocations.append(allocation)
        shares = allocation.shares(layer.num_experts)
        holds = (shares > 0).double()
        parameters = torch.tensor([layer.expert_parameters(w) for w in layer.expert_widths], dtype=torch.float64)
        held.append(holds @ parameters)
        # [R, E] that a device computes, per token that it brings: nothing is sent to removed experts.
        choices = devices * shares * load * (parameters > 0)
        flops.append(choices @ (2 * parameters))
        sending = 1 - holds.sum(0) / devices  # a device that has a copy uses it
        exchanged.append(4 * config.hidden_size * element * (choices @ sending))
        kept.append(choices @ expert_bytes(layer, element, dispatched=devices > 1))
        if devices > 1:
            kept[-1] += load.sum() * sender_bytes(layer, element)

    expert_parameters = [int(count) for count in sum(held)]
    slowest, mean = (float(sum(map(of, flops))) for of in (torch.max, torch.mean))
    model, dense_bytes = run_without_memory(config, workload.dtype)
    parameters = [a + b for a, b in zip(dense_parameters(model, devices), expert_parameters, strict=True)]
    weights = [count * element for count in parameters]
    activations = _activation_bytes(config, workload, dense_bytes, kept)
    # When backward begins there are the logits in the model's dtype, which it returns, and in float32 their
    # log-probabilities and the gradients of both.
    logits = workload.tokens * config.vocab_size * (element + 3 * 4)
    return AllocationCosts(
        layers=allocations,
        parameters=parameters,
        expert_parameters=expert_parameters,
        expert_flops=sum(flops).tolist(),
        flops_imbalance=slowest / mean if mean else 1.0,  # all experts may have been removed
        exchanged_bytes=sum(exchanged).tolist(),
        memory={
            "weights": weights,
            "gradients": weights,
            "optimizer": [2 * size for size in weights],
            "activations": [round(workload.tokens * size) for size in activations.tolist()],
            "logits": [logits] * devices,
        },
    )


def _activation_bytes(
    config: MoHGEConfig, workload: Workload, dense_bytes: list[float], kept: list[torch.Tensor]
) -> torch.Tensor:
    """`[R]` bytes per token, where the experts of each sparse layer keep `kept` `[R]`."""
    *sizes, around = dense_bytes
    of_experts = iter(kept)
    layers = torch.stack(
        [
            size + (torch.zeros_like(kept[0]) if index in config.mlp_only_layers else next(of_experts))
            for index, size in enumerate(sizes)
        ]
    )
    if workload.gradient_checkpointing:
        inputs = config.num_hidden_layers * config.hidden_size * workload.dtype.itemsize
        return layers.amax(0) + inputs + around
    return layers.sum(0) + around


def dense_parameters(model: MoHGEForCausalLM, devices: int) -> list[int]:
    """Parameters of each device that belong to no routed expert: FSDP shards the first dimension of each tensor in
    chunks of the same number of rows, so that the last devices may have less."""
    routed = {id(p) for found in model.sparse_feed_forwards for p in found.experts.parameters()}
    held = [0] * devices
    for parameter in model.parameters():
        if id(parameter) not in routed:
            rows, row = parameter.shape[0], parameter[0].numel()
            chunk = -(-rows // devices)
            for device in range(devices):
                held[device] += row * min(chunk, max(0, rows - device * chunk))
    return held


def dense_flops(config: MoHGEConfig, sequence_length: int) -> dict[str, float]:
    """
    Operations per token of everything but the routed experts, forward, two per multiply-add; backward takes twice as
    many. `attention_scores` are queries with keys and weights with values, over the tokens that a token of a sequence
    of `sequence_length` attends to on average. Norms and other elementwise work are left out.
    """
    model, _ = run_without_memory(config, torch.float32)
    names = ("attention_projections", "attention_scores", "shared_expert", "dense_layers", "router")
    flops = dict.fromkeys(names, 0.0)
    for found in feed_forwards(model):
        feed_forward = _matrix_flops(found.module)
        flops["attention_projections"] += _matrix_flops(found.layer) - feed_forward
        for module in found.layer.modules():
            if hasattr(module, "attention_shape"):
                width, window = module.attention_shape
                flops["attention_scores"] += 2 * width * _mean_context(window, sequence_length)
        if found.layer_idx in config.mlp_only_layers:
            flops["dense_layers"] += feed_forward
        else:
            router = 0.0 if found.router is None else _matrix_flops(found.router)
            flops["router"] += router
            flops["shared_expert"] += feed_forward - router
    return flops | {"lm_head": _matrix_flops(model.get_output_embeddings())}


def _matrix_flops(module: torch.nn.Module) -> float:
    return 2.0 * sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)


def _mean_context(window: int | None, length: int) -> float:
    """Tokens that a token attends to, itself included: 1 for the first of a sequence, and so on up to the window."""
    window = min(window or length, length)
    return window * (length - (window - 1) / 2) / length


__all__ = ["AllocationCosts", "Workload", "allocation_costs", "dense_flops", "dense_parameters", "layer_loads"]
