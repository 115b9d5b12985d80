"""
The simulator against real processes: `torchrun --nproc-per-node 4 -m mohge.training.benchmarks.simulation`.

Measures this machine, replays the same routing under every allocation with real experts, kernels and all-to-alls
between the processes, and prints what the simulator predicts beside what was measured. Results are checked first, the
allocations alternate, and medians over repeats are taken. Where processes share processors, the time of experts is the
CPU time of the process's thread, which a neighbour cannot lengthen.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from mohge import MoHGEConfig
from mohge.model_cards.shipped import load_config

from ..loop.traffic import RouterTraffic
from ..placement.allocations import Allocation
from ..simulation.calibration import measure_hardware
from ..simulation.replay import DeviceExperts, Exchange, replay_error, replay_step, split_choices
from ..simulation.simulator import Simulation, allocate, draw_routing, expert_parallel_size, simulate


def main() -> int:
    """Parse the arguments, measure, check, replay, simulate, print and write; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="CONFIG_OR_FOLDER", help="model to take the experts of")
    parser.add_argument("--hidden-size", type=int, default=256, help="without --config, as the next five")
    parser.add_argument("--widths", default="96,128,160,192,224,256,288,320", help="widths of the groups")
    parser.add_argument("--experts-per-group", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--traffic", metavar="JSON", help="recorded routing (default: every expert equally likely)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per process and step")
    parser.add_argument("--steps", type=int, default=6, help="steps with different routing")
    parser.add_argument("--repeats", type=int, default=7, help="times that each step is replayed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    parser.add_argument("--save-hardware", type=Path, help="file to write for `mohge simulate --hardware`")
    options = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        parser.error(
            "start it as several processes: torchrun --nproc-per-node 4 -m mohge.training.benchmarks.simulation"
        )
    try:
        config, traffic = _inputs(options)
        expert_parallel_size(config, int(os.environ["WORLD_SIZE"]), int(os.environ["WORLD_SIZE"]))
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    device = _start(options)
    try:
        return _run(options, config, traffic, device)
    finally:
        dist.destroy_process_group()


def _inputs(options) -> tuple[MoHGEConfig, RouterTraffic | None]:
    if options.config is not None:
        config = load_config(options.config)
    else:
        config = MoHGEConfig(
            hidden_size=options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=1,
            moe_intermediate_sizes=[int(width) for width in options.widths.split(",")],
            num_experts_per_group=options.experts_per_group,
            num_experts_per_tok=options.top_k,
        )
    if options.traffic is None:
        return config, None
    traffic = RouterTraffic.load(options.traffic)
    traffic.check(config)
    return config, traffic


def _start(options) -> torch.device:
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    torch.set_num_threads(max(1, os.cpu_count() // dist.get_world_size()))
    return torch.device(options.device)


def _run(options, config: MoHGEConfig, traffic: RouterTraffic | None, device: torch.device) -> int:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    processors = os.cpu_count() if device.type == "cpu" and ranks > os.cpu_count() else None
    clock = _clock(device, processors is not None)
    allocations = allocate(config, ranks, traffic)
    draws = list(draw_routing(config, ranks, options.steps, options.tokens, traffic, options.seed))
    most = max(int(choices.sum(1).max()) for draw in draws for choices in draw)
    torch.manual_seed(rank)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = torch.randn(most, config.hidden_size, device=device, dtype=dtype)

    hardware = measure_hardware(config, allocations["all-size"][0].devices[rank], rows, clock, processors)
    contestants = {name: _Contestant(config, chosen, draws, rows, clock) for name, chosen in allocations.items()}
    errors = {name: contestant.check() for name, contestant in contestants.items()}
    passed = max(errors.values()) < (1e-4 if dtype == torch.float32 else 2e-2)
    if rank == 0:
        for name, error in errors.items():
            print(f"check: {name}, outputs and gradients against one process: relative error {error:.1e}")
    if not passed:
        return 1
    measured = _measure(contestants, options)
    if rank == 0:
        predicted = simulate(config, hardware, draws, allocations)
        results = {
            name: {"predicted": _figures(predicted[name]), "measured": _figures(measured[name])}
            for name in contestants
        }
        record = {
            "machine": _machine(ranks, processors),
            "arguments": {name: str(value) for name, value in vars(options).items() if name != "json"},
            "hardware": asdict(hardware),
            "errors": errors,
            "results": results,
        }
        _print(record)
        if options.json:
            options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if options.save_hardware:
            hardware.save(options.save_hardware)
    return 0


def _clock(device: torch.device, shared: bool) -> Callable[[], float]:
    if device.type == "cuda":

        def clock() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return clock
    return time.thread_time if shared else time.perf_counter


class _Contestant:
    """An allocation on this rank: its experts, and what they exchange in each step."""

    def __init__(self, config, allocation: list[Allocation], draws, rows: torch.Tensor, clock: Callable[[], float]):
        rank = dist.get_rank()
        self.config, self.rows, self.clock = config, rows, clock
        self.layers = [
            DeviceExperts(layer, index, chosen.devices[rank], rows)
            for index, (layer, chosen) in enumerate(zip(config.sparse_layers, allocation, strict=True))
        ]
        self.exchanges = [
            [Exchange(split_choices(c, chosen), rank) for c, chosen in zip(draw, allocation, strict=True)]
            for draw in draws
        ]

    def check(self) -> float:
        """The largest relative error on any rank in the first step."""
        replayed = replay_step(self.layers, self.exchanges[0], self.rows, self.clock)
        error = replay_error(self.config, self.exchanges[0], self.rows, replayed)
        error = torch.tensor(error, device=self.rows.device)
        dist.all_reduce(error, dist.ReduceOp.MAX)
        return float(error)

    def time_step(self, step: int) -> list[float]:
        """Seconds of wall time, then seconds with the experts of each layer."""
        dist.barrier()
        start = time.perf_counter()
        replayed = replay_step(self.layers, self.exchanges[step], self.rows, self.clock)
        self.clock()  # waits for a GPU
        return [time.perf_counter() - start, *replayed.expert_seconds]


def _measure(contestants: dict[str, _Contestant], options) -> dict[str, Simulation]:
    """Medians over repeats, after a round of warming up, of what all ranks see."""
    times = {name: [] for name in contestants}
    for repeat in range(options.repeats + 1):
        for step in range(options.steps):
            for name, contestant in contestants.items():
                seconds = contestant.time_step(step)
                if repeat:
                    times[name].append(seconds)
    measured = {}
    for name, contestant in contestants.items():
        own = torch.tensor(times[name], dtype=torch.float64, device=contestant.rows.device)
        every_rank = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every_rank, own)
        seconds = torch.stack(every_rank, dim=-1).cpu().view(options.repeats, options.steps, own.shape[1], -1)
        expert = seconds[:, :, 1:].median(0).values
        step = seconds[:, :, 0].amax(-1).median(0).values
        measured[name] = Simulation(expert=expert, device=expert.sum(1), step=step)
    return measured


def _figures(simulation: Simulation) -> dict[str, float]:
    summary = simulation.summary()
    return {
        "expert_time_max_over_mean": summary["expert_time_max_over_mean"],
        "expert_seconds": float(simulation.expert.sum(1).mean()),
        "step_seconds": summary["step_seconds"],
    }


def _machine(ranks: int, processors: int | None) -> dict[str, str]:
    clock = "wall time" if processors is None else "CPU time of the thread"
    return {
        "processes": f"{ranks}, on {os.cpu_count()} processors, {torch.get_num_threads()} threads each",
        "expert time": clock,
        "platform": f"{platform.platform()}, {platform.processor() or platform.machine()}",
        "torch": torch.__version__,
    }


def _print(record: dict):
    print(f"\n{json.dumps(record['machine'])}\n{json.dumps(record['hardware'])}\n")
    print(f"{'':<12}{'expert time max/mean':^30}{'expert time, ms':^30}{'step, ms':^30}")
    print(f"{'':<12}" + f"{'predicted':>11}{'measured':>10}{'ratio':>7}  " * 3)
    for name, result in record["results"].items():
        line = f"{name:<12}"
        for key, factor in (("expert_time_max_over_mean", 1), ("expert_seconds", 1e3), ("step_seconds", 1e3)):
            predicted, measured = (result[kind][key] * factor for kind in ("predicted", "measured"))
            line += f"{predicted:>11.3f}{measured:>10.3f}{predicted / measured:>7.3f}  "
        print(line)


if __name__ == "__main__":
    sys.exit(main())
