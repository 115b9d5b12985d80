"""Measures a machine for the simulator, on all ranks at once, as they work in a training step."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from mohge import MoHGEConfig

from .hardware import Hardware
from .replay import DeviceExperts, Exchange


def measure_hardware(
    config: MoHGEConfig,
    held: tuple[int, ...],
    rows: torch.Tensor,
    clock: Callable[[], float],
    processors: int | None,
) -> Hardware:
    """
    Time experts, memory and all-to-all at several sizes around those of a step, and fit speeds and overheads to them.
    The links between all ranks count as equal, those of one node.

    Args:
        config ([`MoHGEConfig`]): Its first sparse layer is measured.
        held (`tuple[int, ...]`): Ids of the experts that this rank computes.
        rows (`torch.Tensor` of shape `[S, H]`): As many rows as a device sends in one layer; their dtype is measured.
        clock (`Callable[[], float]`): Seconds of this device's work.
        processors (`int`, *optional*): See [`Hardware`].

    Returns:
        [`Hardware`]: the same on every rank.
    """
    ranks = dist.get_world_size()
    overhead, per_flop = _fit(_time_experts(config.sparse_layers[0], held, rows, clock))
    latency, per_byte = _fit(_time_exchanges(rows))
    figures = torch.tensor([1 / per_flop, _memory_speed(rows, clock), overhead, 1 / per_byte, latency / (ranks - 1)])
    figures = figures.double().to(rows.device)
    dist.all_reduce(figures)
    flops, memory, overhead, link, latency = (figures / ranks).tolist()
    return Hardware(
        name=f"measured: {ranks} ranks on {rows.device.type}",
        flops_per_second=flops,
        memory_bytes_per_second=memory,
        kernel_overhead_seconds=overhead,
        link_bytes_per_second=link,
        link_latency_seconds=latency,
        node_size=ranks,
        inter_node_bytes_per_second=link,
        inter_node_latency_seconds=latency,
        element_bytes=rows.element_size(),
        processors=processors,
    )


def _time_experts(
    layer: MoHGEConfig, held: tuple[int, ...], rows: torch.Tensor, clock: Callable[[], float]
) -> list[tuple[float, float]]:
    """FLOPs and seconds of forward and backward passes."""
    experts = DeviceExperts(layer, 0, held, rows)
    points = []
    for size in _sizes(len(rows)):
        ids = torch.tensor(held, device=rows.device).repeat(size // len(held) + 1)[:size].sort().values
        flops = 2 * sum(layer.expert_parameters(layer.expert_widths[expert]) for expert in ids.tolist())
        forward, backward = [], []
        for _ in range(_REPEATS):
            dist.barrier()
            received = rows[:size].clone().requires_grad_()
            start = clock()
            output = experts(received, ids)
            forward.append(clock() - start)
            start = clock()
            output.backward(received.detach())
            backward.append(clock() - start)
            experts.zero_grad()
        points += [(flops, statistics.median(forward[1:])), (2 * flops, statistics.median(backward[1:]))]
    return points


def _time_exchanges(rows: torch.Tensor) -> list[tuple[float, float]]:
    """Bytes that leave a rank, and seconds, of all-to-alls in which each rank sends every rank as many rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    largest = max(len(rows), 2**21 // rows[0].nbytes)  # 2 MiB, to see the bandwidth beside the latency
    points = []
    for size in _sizes(largest):
        each = max(1, size // ranks)
        exchange = Exchange(torch.full((ranks, ranks, 1), each), rank)
        sent = rows.new_ones(each * ranks, rows.shape[1])
        seconds = []
        for _ in range(_REPEATS):
            dist.barrier()
            start = time.perf_counter()
            exchange.there(sent)
            if rows.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        points.append(((ranks - 1) * each * rows[0].nbytes, statistics.median(seconds[1:])))
    return points


def _memory_speed(rows: torch.Tensor, clock: Callable[[], float]) -> float:
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.ones(2**26, dtype=torch.uint8, device=rows.device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_REPEATS):
        dist.barrier()
        start = clock()
        target.copy_(source)
        seconds.append(clock() - start)
    return 2 * source.nbytes / statistics.median(seconds[1:])


_REPEATS = 12
"""The first of them warms up."""


def _sizes(rows: int) -> list[int]:
    return [max(1, rows // part) for part in (16, 8, 4, 2, 1)]


def _fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope of the line with the least relative errors in y; through 0 where noise hides one of them."""
    x, y = torch.tensor(points, dtype=torch.float64).T
    line = torch.stack([torch.ones_like(x), x], dim=1) / y[:, None]
    intercept, slope = torch.linalg.lstsq(line, torch.ones_like(y)[:, None]).solution.flatten().tolist()
    if min(intercept, slope) <= 0:
        intercept, slope = 0.0, float((x / y).sum() / (x / y).square().sum())
    return intercept, slope


__all__ = ["measure_hardware"]
