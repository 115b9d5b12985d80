"""Which device holds which experts of a layer: MoHGE's all-size allocation and what it is compared with."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mohge import MoHGEConfig
from mohge.configuration_mohge import divisors


@dataclass(frozen=True)
class Allocation:
    """
    Experts of one layer on R devices.

    Args:
        name (`str`): Name of the rule that made it, a key of `ALLOCATIONS`.
        devices (`tuple[tuple[int, ...], ...]`):
            Ids of the experts on each device, ascending. An expert with redundant copies stands on several devices.
    """

    name: str
    devices: tuple[tuple[int, ...], ...]

    def shares(self, num_experts: int) -> torch.Tensor:
        """`[R, E]`, float64: the fraction of each expert's tokens that each device computes. Copies share equally."""
        holds = torch.zeros(len(self.devices), num_experts, dtype=torch.float64)
        for device, experts in enumerate(self.devices):
            holds[device, list(experts)] = 1
        return holds / holds.sum(0)


def fitting_devices(config: MoHGEConfig) -> list[int]:
    """
    Every number of devices over which all-size allocation can split the experts of all layers, ascending.

    Raises:
        ValueError: if the config has no layer with experts.
    """
    if not config.sparse_layers:
        raise ValueError("`mlp_only_layers` leaves no layer with experts: there is nothing to place")
    return divisors(math.gcd(*(layer.num_expert_sets for layer in config.sparse_layers)))


def misfit(devices: int, fitting: list[int]) -> str:
    """Says that `devices` is none of the ascending numbers `fitting`, and which are the nearest."""
    below = [number for number in fitting if number < devices][-1:]
    above = [number for number in fitting if number > devices][:1]
    return (
        f"{devices} does not divide the {fitting[-1]} set{'s' if fitting[-1] > 1 else ''} of experts: use "
        f"{' or '.join(map(str, below + above))} ({', '.join(map(str, fitting))} fit)"
    )


def all_size(layer_config: MoHGEConfig, devices: int, load: torch.Tensor | None = None) -> Allocation:
    """
    All-size group-decoupling allocation of MoHGE (https://huggingface.co/papers/2604.23108): device r of R holds the
    experts `[r N_g / R, (r + 1) N_g / R)` of every group g, so that all devices hold the same parameters whatever the
    traffic between groups. These are the ids `[r E / R, (r + 1) E / R)`.

    Args:
        layer_config ([`MoHGEConfig`]): Config of one layer.
        devices (`int`): R.
        load (`torch.Tensor` of shape `[E]`, *optional*): Not used.

    Raises:
        ValueError: if R does not divide the number of sets of experts.
    """
    fitting = divisors(layer_config.num_expert_sets)
    if devices not in fitting:
        raise ValueError(f"`devices` {misfit(devices, fitting)}")
    return Allocation("all-size", _chunks(list(range(layer_config.num_experts)), devices))


def contiguous(layer_config: MoHGEConfig, devices: int, load: torch.Tensor | None = None) -> Allocation:
    """
    The experts in the order of their groups, and so of their widths, cut into R chunks of the same number. Arguments
    as for [`all_size`].

    Raises:
        ValueError: if R does not divide the number of experts.
    """
    _check_divides(devices, layer_config)
    return Allocation("contiguous", _chunks(_by_width(layer_config), devices))


def paired(layer_config: MoHGEConfig, devices: int, load: torch.Tensor | None = None) -> Allocation:
    """
    Expert-pair allocation of MoDSE (https://huggingface.co/papers/2409.12210): the smallest expert with the largest,
    the second smallest with the second largest and so on, and the pairs dealt out to the devices in turn. Where a
    device holds an odd number of experts, its last one comes from the middle. Arguments as for [`all_size`].

    Raises:
        ValueError: if R does not divide the number of experts.
    """
    _check_divides(devices, layer_config)
    order = _by_width(layer_config)
    pairs = len(order) // devices // 2 * devices
    held = [[] for _ in range(devices)]
    for number in range(pairs):
        held[number % devices] += [order[number], order[-1 - number]]
    for device, expert in enumerate(order[pairs : len(order) - pairs]):
        held[device].append(expert)
    return Allocation("paired", _sorted(held))


def packed(layer_config: MoHGEConfig, devices: int, load: torch.Tensor | None = None) -> Allocation:
    """
    Greedy packing by load with redundant experts, in the manner of DeepSeek-V3
    (https://huggingface.co/papers/2412.19437, section 3.4) and its load balancer EPLB. Each of the R devices has
    `E // R + 1` slots, so at most one for a redundant copy. Copies go one by one to the expert with the greatest work
    per copy, then all copies, heaviest first, to the device with the least work that has a free slot and does not hold
    the expert.

    Args:
        layer_config ([`MoHGEConfig`]): Config of one layer.
        devices (`int`): R.
        load (`torch.Tensor` of shape `[E]`, *optional*):
            How often each expert is chosen; by default equally often. Its work is that times its width.
    """
    widths = torch.tensor(layer_config.expert_widths, dtype=torch.float64)
    work = (widths if load is None else widths * load.to(widths)).tolist()
    experts = range(len(work))
    slots = min(len(work) // devices + 1, len(work))
    copies = [1] * len(work)
    for _ in range(slots * devices - len(work)):
        heaviest = max((e for e in experts if copies[e] < devices), key=lambda e: work[e] / copies[e])
        copies[heaviest] += 1

    held, total = [[] for _ in range(devices)], [0.0] * devices
    for expert in sorted(experts, key=lambda e: -work[e] / copies[e]):
        for _ in range(copies[expert]):
            free = [d for d in range(devices) if len(held[d]) < slots and expert not in held[d]]
            device = min(free, key=lambda d: total[d])
            held[device].append(expert)
            total[device] += work[expert] / copies[expert]
    return Allocation("packed", _sorted(held))


ALLOCATIONS: dict[str, Callable[[MoHGEConfig, int, torch.Tensor | None], Allocation]] = {
    "all-size": all_size,
    "contiguous": contiguous,
    "paired": paired,
    "packed": packed,
}
"""Name of each rule -> the function that allocates the experts of a layer by it."""


def _by_width(layer_config: MoHGEConfig) -> list[int]:
    """Ids in the order of (group, index in group)."""
    return [expert for row in layer_config.expert_id_table for expert in row if expert < layer_config.num_experts]


def _check_divides(devices: int, layer_config: MoHGEConfig):
    if devices < 1 or layer_config.num_experts % devices:
        fitting = ", ".join(map(str, divisors(layer_config.num_experts)))
        raise ValueError(f"`devices` {devices} does not divide the {layer_config.num_experts} experts: use {fitting}")


def _chunks(order: list[int], devices: int) -> tuple[tuple[int, ...], ...]:
    size = len(order) // devices
    return _sorted([order[device * size : (device + 1) * size] for device in range(devices)])


def _sorted(held: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(experts)) for experts in held)


__all__ = ["ALLOCATIONS", "Allocation", "all_size", "contiguous", "fitting_devices", "misfit", "packed", "paired"]
