"""
Expert-parallel training with the shared expert computed while tokens travel (`ep_implementation="mohge"`) against
transformers' own `"all_to_all"`, side by side in the same processes:

    torchrun --nproc-per-node 2 -m mohge.training.benchmarks.parallel

Outputs and gradients are compared before anything is timed, the contestants alternate, and medians over the repeats of
the slowest rank are printed, with the bytes that a rank hands to the all-to-alls of token rows. On one machine ranks
talk through memory; for a network, give the run a network namespace of its own with a slower loopback (Linux, root):

    unshare -n sh -c "ip link set lo up; tc qdisc add dev lo root tbf rate 1gbit burst 256kb latency 1s; torchrun ..."
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEConfig, MoHGEForCausalLM


CONTESTANTS = ("all_to_all", "mohge")


def main() -> int:
    """Check, measure, print; exit status 0, 1 if the contestants disagree, 2 without torchrun."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--widths", default="192,256,320,384,448,512,576,640", help="widths of the groups")
    parser.add_argument("--experts-per-group", type=int, default=4)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--shared", type=int, default=1024, help="width of the shared expert")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each rank and step")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--mode", choices=["float32", "bfloat16", "autocast"], default="float32")
    parser.add_argument("--json", type=Path, help="file to write all times to")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        print("start it with torchrun --nproc-per-node 2 -m mohge.training.benchmarks.parallel", file=sys.stderr)
        return 2
    models = _models(options)
    steps = {name: _step(model, options) for name, model in models.items()}
    difference = _difference(models, steps, with_gradients=options.mode == "float32")
    if difference > (1e-4 if options.mode == "float32" else 2e-2):
        print(f"CHECK FAILED: the contestants differ by {difference:.1e}")
        return 1
    times = _measure(steps, options.repeats)
    wire = {name: _bytes_on_the_wire(step) for name, step in steps.items()}
    if dist.get_rank() == 0:
        _print(options, difference, times, wire)
    dist.destroy_process_group()
    return 0


def _models(options) -> dict[str, MoHGEForCausalLM]:
    config = MoHGEConfig(
        vocab_size=1024,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        moe_intermediate_sizes=[int(width) for width in options.widths.split(",")],
        num_experts_per_group=options.experts_per_group,
        num_experts_per_tok=options.top_k,
        group_aux_loss_start=0.0,
        shared_expert_intermediate_size=options.shared,
    )
    ranks = int(os.environ["WORLD_SIZE"])
    dtype = torch.bfloat16 if options.mode == "bfloat16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:  # every rank its own: seeded alike, they are the same
        torch.manual_seed(0)
        MoHGEForCausalLM(config).save_pretrained(folder)
        return {
            name: MoHGEForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                distributed_config=DistributedConfig(fsdp_size=ranks, ep_size=ranks, ep_implementation=name),
            )
            for name in CONTESTANTS
        }


def _step(model: MoHGEForCausalLM, options) -> Callable[[], torch.Tensor]:
    """A training step without optimizer: forward and backward on this rank's own tokens."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    device = next(model.parameters()).device
    ids = torch.randint(0, 1024, (max(options.tokens // 256, 1), min(options.tokens, 256)), generator=generator)
    ids = ids.to(device)
    autocast = options.mode == "autocast"

    def step():
        model.zero_grad()
        context = torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
        with context:
            output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return output.logits.detach()

    model.train()
    return step


def _difference(models: dict[str, MoHGEForCausalLM], steps: dict[str, Callable], with_gradients: bool) -> float:
    """Relative difference between the contestants on the rank where it is largest: of the logits of the median token,
    because rounding may send a token elsewhere; in float32 of every gradient too."""
    ours, theirs = (steps[name]().float() for name in CONTESTANTS)
    worst = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median())
    if with_gradients:
        for pair in zip(*(model.parameters() for model in models.values()), strict=True):
            a, b = (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in pair)
            worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-12))) if a.numel() else worst
    everywhere = torch.tensor(worst, device=ours.device)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return float(everywhere)


def _measure(steps: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of the slowest rank."""
    times = {name: [] for name in steps}
    device = [step().device for step in steps.values()][-1]  # and warm up
    for repeat in range(repeats):
        for name in CONTESTANTS if repeat % 2 else reversed(CONTESTANTS):
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            elapsed = torch.tensor(time.perf_counter() - start, device=device)
            dist.all_reduce(elapsed, dist.ReduceOp.MAX)
            times[name].append(float(elapsed))
    return times


class _CountBytes(TorchDispatchMode):
    """Adds up the bytes of the rows that go into all-to-alls; the counts that go before them are integers."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "alltoall_base" in name or "all_to_all_single" in name:
            rows = args[1] if "alltoall_base" in name else args[0]
            self.total += rows.numel() * rows.element_size() * rows.is_floating_point()
        return function(*args, **(kwargs or {}))


def _bytes_on_the_wire(step: Callable) -> int:
    with _CountBytes() as counter:
        step()
    return counter.total


def _print(options, difference: float, times: dict[str, list[float]], wire: dict[str, int]):
    ranks, cores = dist.get_world_size(), os.cpu_count()
    print(f"{ranks} ranks, {cores} cores, {options.mode}, torch {torch.__version__}, transformers", end=" ")
    print(f"{transformers.__version__}, {platform.machine()}; contestants differ by {difference:.1e}\n")
    print("| contestant | ms per step | quartiles | ratio | MB into all-to-alls per step |")
    print("|---|---|---|---|---|")
    base = statistics.median(times[CONTESTANTS[0]])
    for name in CONTESTANTS:
        low, median, high = (1e3 * value for value in statistics.quantiles(times[name], n=4))
        print(
            f"| {name} | {median:.1f} | {low:.1f} to {high:.1f} | {1e3 * base / median:.2f} | {wire[name] / 1e6:.2f} |"
        )
    if options.json is not None:
        content = {"options": {k: str(v) for k, v in vars(options).items()}, "seconds": times, "bytes": wire}
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
