"""
Replay of recorded routing on devices that compute and communicate as a [`Hardware`] says.

Shapes: D devices in D / R groups of R, each a whole copy of the experts that exchanges tokens among its own devices;
E experts of a layer, L layers with experts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mohge import MoHGEConfig

from ..loop.traffic import RouterTraffic
from ..placement.allocations import ALLOCATIONS, Allocation, fitting_devices
from ..placement.costs import layer_loads
from .hardware import Hardware


def draw_routing(
    config: MoHGEConfig, devices: int, steps: int, tokens: int, traffic: RouterTraffic | None = None, seed: int = 0
) -> Iterator[list[torch.Tensor]]:
    """
    What the tokens of each device choose, step by step.

    Each device draws one recorded forward pass per step, with replacement, and keeps it for all layers. The passes of
    a step are drawn from 32 that were recorded one after the other, because the router changes in training. Where a
    pass had another number of tokens, the choices are drawn anew (multinomial) from its shares; a pass of few tokens
    then counts as less balanced than its routing was.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        devices (`int`): D.
        steps (`int`): Number of steps.
        tokens (`int`): Tokens of a device and step.
        traffic ([`RouterTraffic`], *optional*):
            Recorded routing. Without it routing is balanced: choices are independent draws from the even load of
            [`layer_loads`]. They vary a little more than those of real tokens, which cannot choose an expert twice.
        seed (`int`, *optional*, defaults to `0`): Seed of the draws.

    Yields:
        `list[torch.Tensor]`: for each layer `[D, E]`, float64, choices of each expert.
    """
    if traffic is None:
        recorded_tokens = np.ones(1, dtype=np.int64)
        recorded = [load.numpy()[None] for load in layer_loads(config)]
    else:
        recorded_tokens = np.array(traffic.tokens)
        recorded = [traffic.layer_counts(index).numpy() for index in range(len(config.sparse_layers))]
    if not recorded_tokens.all():
        raise ValueError("the traffic has a forward pass without tokens: record it anew")
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        near = min(32, len(recorded_tokens))
        passes = generator.integers(len(recorded_tokens) - near + 1) + generator.integers(near, size=devices)
        drawn_anew = (recorded_tokens[passes] != tokens) | (traffic is None)
        choices = []
        for counts in recorded:
            counts = counts[passes]
            totals = counts.sum(1)
            number = np.rint(totals * tokens / recorded_tokens[passes]).astype(np.int64)
            shares = counts / np.maximum(totals, 1)[:, None]
            if drawn_anew.any():
                counts[drawn_anew] = generator.multinomial(number[drawn_anew], shares[drawn_anew])
            choices.append(torch.from_numpy(counts))
        yield choices


def expert_parallel_size(config: MoHGEConfig, devices: int, ep_size: int | None = None) -> int:
    """
    The number of devices R that share a copy of the experts: the largest that divides `devices` and that all-size
    allocation can use, or `ep_size`, checked.

    Raises:
        ValueError: if `ep_size` is no such number.
    """
    fitting = [size for size in fitting_devices(config) if devices % size == 0]
    if ep_size is None:
        return fitting[-1]
    if ep_size not in fitting:
        raise ValueError(
            f"`ep_size` {ep_size} does not fit: use {' or '.join(map(str, fitting))}, which divide both the "
            f"{devices} devices and the sets of experts"
        )
    return ep_size


def allocate(config: MoHGEConfig, ep_size: int, traffic: RouterTraffic | None = None) -> dict[str, list[Allocation]]:
    """For each rule in `ALLOCATIONS` its allocation of each sparse layer; `packed` packs by the load in `traffic`."""
    layers = list(zip(config.sparse_layers, layer_loads(config, traffic), strict=True))
    return {name: [rule(layer, ep_size, load) for layer, load in layers] for name, rule in ALLOCATIONS.items()}


def dispatch(choices: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Where rows go. A device that holds a copy of an expert keeps its rows for it; others spread theirs over all copies.

    Args:
        choices (`torch.Tensor` of shape `[..., R, E]`): What the tokens of each device choose.
        shares (`torch.Tensor` of shape `[R, E]`): [`Allocation.shares`] of the layer.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `[..., R, E]` rows that each device computes with each expert, and
        `[..., R, R]` rows that a device (row) sends to another (column).
    """
    remote = choices.masked_fill(shares > 0, 0)
    rows = (choices - remote) + remote.sum(-2, keepdim=True) * shares
    return rows, remote @ shares.T


@dataclass(frozen=True)
class Simulation:
    """
    Times of one allocation, in seconds.

    Args:
        expert (`torch.Tensor` of shape `[steps, L, D / R, R]`):
            What the experts of a device compute, forward and backward; devices of a group wait for one another.
        device (`torch.Tensor` of shape `[steps, D]`): Whole work of a device: dense part, experts, exchanges.
        step (`torch.Tensor` of shape `[steps]`): From the start of a step until all devices are done with it.
    """

    expert: torch.Tensor
    device: torch.Tensor
    step: torch.Tensor

    def summary(self) -> dict[str, float]:
        """
        The figures, means over steps: `expert_time_max_over_mean`, the slowest device's time with its experts over
        that of the mean device of its group, layer by layer, which is what the literature calls balance, and its 95th
        percentile; `device_time_max_over_mean`, the same of the whole work of all devices in a step; `step_seconds`;
        and `waiting_share`, the part of a step in which the mean device waits for others.
        """
        ratio = (self.expert.amax(-1) / self.expert.mean(-1)).flatten()
        return {
            "expert_time_max_over_mean": float(ratio.mean()),
            "expert_time_max_over_mean_p95": float(ratio.quantile(0.95)),
            "device_time_max_over_mean": float((self.device.amax(-1) / self.device.mean(-1)).mean()),
            "step_seconds": float(self.step.mean()),
            "waiting_share": float((1 - self.device.mean(-1) / self.step).mean()),
        }


def simulate(
    config: MoHGEConfig,
    hardware: Hardware,
    routing: Iterable[list[torch.Tensor]],
    allocations: dict[str, list[Allocation]],
    dense_flops: float = 0.0,
) -> dict[str, Simulation]:
    """
    Replay the same routing under every allocation.

    A layer is an all-to-all, the experts and an all-to-all back, forward and again backward, where the experts take
    twice the arithmetic and memory traffic. Each of these ends for a group of R devices when its slowest device is
    done; the groups wait for one another at the end of the step. The dense part takes every device the same time. Left
    out, the same for all allocations: the reduction of gradients, the optimizer, and overlap of any of these.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        hardware ([`Hardware`]): The devices.
        routing (`Iterable[list[torch.Tensor]]`): Steps, each as [`draw_routing`] yields it.
        allocations (`dict[str, list[Allocation]]`): For each contestant its allocation of each sparse layer.
        dense_flops (`float`, *optional*, defaults to `0.0`): Work of a device beside the experts, forward, in a step.

    Returns:
        `dict[str, Simulation]`: by the names of the allocations.
    """
    shares = {
        name: [a.shares(layer.num_experts) for a, layer in zip(chosen, config.sparse_layers, strict=True)]
        for name, chosen in allocations.items()
    }
    steps = {name: [] for name in allocations}
    for choices in routing:
        for name in allocations:
            steps[name].append(_step(config, hardware, choices, shares[name], dense_flops))
    return {name: Simulation(*map(torch.stack, zip(*steps[name], strict=True))) for name in allocations}


def _step(
    config: MoHGEConfig,
    hardware: Hardware,
    choices: list[torch.Tensor],
    shares: list[torch.Tensor],
    dense_flops: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    devices, ranks = len(choices[0]), len(shares[0])
    node = torch.arange(devices).view(-1, ranks) // hardware.node_size
    same_node = node.unsqueeze(-1) == node.unsqueeze(-2)
    row_bytes = config.hidden_size * hardware.element_bytes
    busy = torch.full(node.shape, 3 * dense_flops / hardware.flops_per_second, dtype=torch.float64)
    elapsed = hardware.wait_for_all(busy)
    experts = []
    for layer, layer_choices, layer_shares in zip(config.sparse_layers, choices, shares, strict=True):
        parameters = torch.tensor([layer.expert_parameters(w) for w in layer.expert_widths], dtype=torch.float64)
        travelling = layer_choices * (parameters > 0)  # nothing is sent to removed experts
        rows, sent = dispatch(travelling.view(-1, ranks, layer.num_experts), layer_shares)
        flops = 2 * rows @ parameters
        read = hardware.element_bytes * ((rows > 0).double() @ parameters) + 2 * row_bytes * rows.sum(-1)
        forward = hardware.expert_seconds(flops, read)
        backward = hardware.expert_seconds(2 * flops, 2 * read)
        # What is sent on the way there is received on the way back, so all four exchanges take the same time.
        exchange = hardware.exchange_seconds(sent * row_bytes, same_node)
        experts.append(forward + backward)
        busy = busy + forward + backward + 4 * exchange
        elapsed = elapsed + hardware.wait_for_all(forward) + hardware.wait_for_all(backward) + 4 * exchange.amax(-1)
    return torch.stack(experts), busy.flatten(), elapsed.amax()


__all__ = ["Simulation", "allocate", "dispatch", "draw_routing", "expert_parallel_size", "simulate"]
