"""The command `mohge place`: where the experts go, and what that costs each device."""

import argparse
import json
from pathlib import Path

import torch

from mohge import MoHGEConfig
from mohge.model_cards.writing import new_folder
from mohge.training.loop.traffic import RouterTraffic
from mohge.training.placement.allocations import ALLOCATIONS, fitting_devices, misfit
from mohge.training.placement.costs import AllocationCosts, Workload, allocation_costs, dense_flops, layer_loads
from mohge.training.placement.launch_files import write_launch_files
from mohge.training.placement.plot import plot_placement


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments.

    Raises:
        ValueError: for bad usage or input.
        OSError: if a file cannot be read or written.
    """
    from mohge.model_cards.shipped import load_config

    _check_options(options)
    config = load_config(options.source)
    fitting = fitting_devices(config)
    if options.devices not in fitting:
        raise ValueError(f"--devices {misfit(options.devices, fitting)}")
    traffic = None if options.traffic is None else RouterTraffic.load(options.traffic)
    workload = Workload(
        devices=options.devices,
        tokens=options.tokens,
        dtype=getattr(torch, options.dtype) if options.dtype else config.dtype or torch.float32,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    length = options.sequence_length or min(config.max_position_embeddings, 4096)
    loads = layer_loads(config, traffic)
    costs = {name: allocation_costs(name, config, workload, loads) for name in ALLOCATIONS}
    facts = {
        "config": options.source,
        "replicas": options.replicas,
        **vars(workload),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "sequence_length": length,
        "traffic": options.traffic,
        "traffic_tokens": None if traffic is None else sum(traffic.tokens),
        "fitting_devices": fitting,
    }
    flops = dense_flops(config, length)
    report = {**facts, "dense_flops": flops, "allocations": {name: _as_json(entry) for name, entry in costs.items()}}
    if options.plot is not None:
        plot_placement(costs, Path(options.plot))
    if options.output is not None:
        _write_folder(Path(options.output), options, workload, report, costs)
    if options.format == "json":
        print(json.dumps(report, indent=2))
    else:
        print(_as_text(config, facts, flops, costs))
        if options.output is not None:
            print(f"written: {options.output}")
    return 0


def _check_options(options: argparse.Namespace):
    for name in ("devices", "replicas", "tokens", "sequence_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if options.plot is not None and Path(options.plot).suffix not in (".png", ".svg"):
        raise ValueError(f"--plot {options.plot} is neither .png nor .svg: give it one of these endings")
    if options.output is not None and Path(options.output).exists():
        raise FileExistsError(f"--output {options.output} exists: name another folder, or remove it first")


def _write_folder(
    target: Path, options: argparse.Namespace, workload: Workload, report: dict, costs: dict[str, AllocationCosts]
):
    with new_folder(target, "place") as temporary:
        folder = temporary / "place"
        folder.mkdir()
        length = report["sequence_length"]
        write_launch_files(folder, target, options.source, workload, length, options.replicas, options.device)
        (folder / "placement.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        plot_placement(costs, folder / "placement.svg")
        folder.rename(target)  # only now, so that a failure leaves nothing


def _as_json(costs: AllocationCosts) -> dict:
    return {
        "experts": [allocation.devices for allocation in costs.layers],
        "parameters": costs.parameters,
        "parameter_imbalance": costs.parameter_imbalance,
        "expert_parameters": costs.expert_parameters,
        "memory": costs.memory,
        "total_memory": costs.total_memory,
        "expert_flops": costs.expert_flops,
        "expert_flops_imbalance": costs.flops_imbalance,
        "all_to_all_bytes": costs.exchanged_bytes,
    }


def _as_text(config: MoHGEConfig, facts: dict, flops: dict[str, float], costs: dict[str, AllocationCosts]) -> str:
    traffic = "every expert equally likely"
    if facts["traffic"] is not None:
        traffic = f"{facts['traffic_tokens']:,} recorded tokens"
    checkpointing = ", gradient checkpointing" if facts["gradient_checkpointing"] else ""
    lines = [
        f"devices {facts['devices']}, replicas {facts['replicas']}, tokens per device and step {facts['tokens']:,}, "
        f"{facts['dtype']}{checkpointing}",
        f"traffic: {traffic}",
        "",
        f"{'':<11} {'experts':>9} {'largest device':>22}  {'expert FLOPs per token':>30}  "
        f"{'all-to-all per token':>20}",
        f"{'allocation':<11} {'per layer':>9} {'parameters':>11} {'memory':>10}  {'mean':>9} {'slowest':>9} "
        f"{'imbalance':>10}  {'mean':>9} {'busiest':>10}",
    ]
    for name, entry in costs.items():
        sizes = [len(experts) for layer in entry.layers for experts in layer.devices]
        experts = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        lines.append(
            f"{name:<11} {experts:>9} {_short(max(entry.parameters)):>11} "
            f"{_gibibytes(max(entry.total_memory)):>10}  {_short(_mean(entry.expert_flops)):>9} "
            f"{_short(max(entry.expert_flops)):>9} {entry.flops_imbalance:>10.3f}  "
            f"{_short(_mean(entry.exchanged_bytes)) + 'B':>9} {_short(max(entry.exchanged_bytes)) + 'B':>10}"
        )
    memory = costs["all-size"].memory
    whole = {**flops, "routed_experts": _mean(costs["all-size"].expert_flops)}
    lines += [
        "",
        "memory of a device, all-size (of each part the largest)",
        *(f"  {name:<22} {_gibibytes(max(sizes)):>10}" for name, sizes in memory.items()),
        "",
        f"FLOPs per token forward, sequences of {facts['sequence_length']:,} (backward: twice as many)",
        *(f"  {name.replace('_', ' '):<22} {_short(value):>10}" for name, value in whole.items() if value),
        f"  {'together':<22} {_short(sum(whole.values())):>10}",
        "",
        f"fits on: {', '.join(map(str, facts['fitting_devices']))} devices",
    ]
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _short(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} "


__all__ = ["run"]
