"""
Speed of the experts, on the GPU where there is one and on the CPU otherwise: `python benchmark_experts.py`.

First every contestant's output and gradients are checked against a float64 reference, expert by expert; one that is
wrong is not measured, and the status is 1. Then the contestants alternate in one process, each call on fresh random
data and traffic, and medians are printed with the demands on them: ratios of calls that followed one another. Three
minutes on two cores; all sizes and more rounds with `--thorough`.

C        the ceiling: the matrix products at equal loads; on GPU with SwiGLU and a gather-and-sum (see layers.py)
eager    MoHGE's readable loop over the experts
loop     `torch.nn.functional.grouped_mm`, group by group (`experts_implementation="grouped_mm"`)
pad      transformers' `grouped_mm` on experts padded with zeros to the widest
uniform  the kernels, on experts that all have the mean width
mohge    the kernels (`experts_implementation="mohge"`)
mohge_prepacked  the same with copies of the weights in oneDNN's layout (CPU, inference)
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median, quantiles

import torch
import transformers
from layers import SHAPES, TOLERANCES, Inputs, Layer

from mohge.training.benchmarks.machine import processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="paper", help="paper layer or large layer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], action="append", help="default: on CPU both")
    parser.add_argument("--thorough", action="store_true", help="all sizes of the demands, 15 rounds")
    parser.add_argument("--rounds", type=int, help="calls of each contestant (7, on GPUs 15)")
    parser.add_argument("--tokens", type=int, action="append", help="default: some of the demands'")
    parser.add_argument("--json", type=Path, help="file to write all quantiles to")
    options = parser.parse_args()
    options.thorough |= options.device == "cuda"
    if options.rounds is None:
        options.rounds = 15 if options.thorough else 7
    if options.rounds < 3:
        parser.error("--rounds must be at least 3")

    torch.manual_seed(0)
    status = 0
    record = {"machine": machine(options.device), "rounds": options.rounds, "measurements": []}
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    for dtype in options.dtype or (["bfloat16"] if options.device == "cuda" else ["bfloat16", "float32"]):
        layer = Layer(SHAPES[options.shape], getattr(torch, dtype), options.device)
        names = ["eager", "loop", "pad", "uniform", "mohge"] + ["mohge_prepacked"] * (options.device == "cpu")
        sizes = [1, 16, 600] if options.device == "cpu" else [16, 600, 4096, 32768]  # every class of tile sizes
        checks = [layer.check(names, tokens) for tokens in sizes]
        for name in list(names):
            error = max(check[name] for check in checks)
            print(f"check: {dtype} {name}: largest relative error of output and gradients {error:.1e}")
            if not error < TOLERANCES[layer.dtype]:
                print(f"error: {name} computes something else and is not measured", file=sys.stderr)
                names.remove(name)
                status = 1
        tables = gpu_tables if options.device == "cuda" else cpu_tables
        for measurement in tables(layer, options, ["C", *names]):
            record["measurements"].append({"shape": options.shape, "dtype": dtype, **measurement})
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        del layer
        gc.collect()
    return status


WAYS = ("eager", "loop", "pad")
"""Of transformers."""


def cpu_tables(layer: Layer, options, names: list[str]):
    """Yield what was measured, as it is printed."""
    for tokens in options.tokens or ([1, 16, 256, 512, 2048] if options.thorough else [1, 16, 512]):
        times = measure(layer, names, options.rounds, tokens, backward=False)
        demands = against_the_best(times, 1.0, 1.6 if tokens == 1 else 2.0)
        if tokens > 16:
            demands = against_the_best(times, 1.0) | {
                f"{name} against C": (ratios(times, "C", name), 0.95, 1.3) for name in kernels(times)
            }
        yield report(f"forward, T = {tokens}", times, demands)
    trained = [name for name in names if name not in ("eager", "mohge_prepacked")]
    for tokens in options.tokens or ([512, 2048] if options.thorough else [512]):
        times = measure(layer, trained, options.rounds, tokens, backward=True)
        yield report(f"forward + backward, T = {tokens}", times, against_the_best(times, 1.3, 1.9))


def kernels(times: dict[str, list[float]]) -> list[str]:
    return [name for name in times if name.startswith("mohge")]


def against_the_best(times: dict[str, list[float]], must: float, aim: float | None = None) -> dict:
    """The kernels against the fastest of transformers' ways."""
    best = min((name for name in WAYS if name in times), key=lambda name: median(times[name]), default=None)
    if best is None:
        return {}
    return {f"{name} against {best}, the best": (ratios(times, best, name), must, aim) for name in kernels(times)}


def gpu_tables(layer: Layer, options, names: list[str]):
    """Yield what was measured, as it is printed; nothing where the kernels, which all of it is about, are wrong."""
    if "mohge" not in names:
        return
    bandwidth = copy_bandwidth()
    print(f"copy bandwidth: {bandwidth / 1e12:.2f} TB/s")
    for tokens in options.tokens or [32768, 4096]:
        for backward in (False, True):
            compared = [name for name in names if name != "eager"]
            times = measure(layer, compared, options.rounds, tokens, backward)
            ceiling = median(times["C"])
            if tokens < 32768:
                x = layer.inputs(tokens)
                ceiling = max(ceiling, (1 + 2 * backward) * layer.weight_bytes(x.index) / bandwidth)
            must, aim = (0.70, 0.80) if tokens < 32768 else (0.78, 0.86) if backward else (0.85, 0.90)
            demands = {
                "share of C": ([ceiling / seconds for seconds in times["mohge"]], must, aim),
                "against loop": (ratios(times, "loop", "mohge"), 2.0, 2.5),
                "against pad": (ratios(times, "pad", "mohge"), 2.7, 3.3),
                "against uniform": (ratios(times, "uniform", "mohge"), 0.97, 0.99),
            }
            yield report(f"{'forward + backward' if backward else 'forward'}, T = {tokens}", times, demands)
    yield skewed_traffic(layer, options)
    for tokens in (16, 32, 64):
        yield decode(layer, options, tokens, bandwidth)
    yield properties(layer)


def skewed_traffic(layer: Layer, options) -> dict:
    """FLOP/s at T = 32768 under skewed traffic, against that under equal loads."""
    kinds, tokens = ["balanced", "zipf", "one_group"], 32768
    run, rates = layer.contestant("mohge"), {kind: [] for kind in kinds}
    with torch.no_grad():
        for _ in range(options.rounds):
            for kind in kinds:
                x = layer.inputs(tokens, kind)
                rates[kind].append(layer.flops(x.index) / timed(run, x))
    times = {kind: [1 / rate for rate in values] for kind, values in rates.items()}
    demands = {f"{kind} against balanced": (ratios(times, "balanced", kind), 0.90, 0.95) for kind in kinds[1:]}
    return report(f"forward, T = {tokens}", times, demands, "s/PFLOP", 1e15)


def decode(layer: Layer, options, tokens: int, bandwidth: float) -> dict:
    """Replays of a CUDA graph, whose weights are read once."""
    run, x = layer.contestant("mohge"), layer.inputs(tokens)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        run(x)  # compiles
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            output = run(x)
        times = []
        for _ in range(10 * options.rounds):
            x.index.copy_(layer.traffic(tokens, "uniform"))
            times.append(timed(lambda _: graph.replay(), x) * bandwidth / layer.weight_bytes(x.index))
        expected = run(x)
    if not torch.equal(output, expected):
        raise SystemExit("error: the captured graph computes something else")
    demands = {"share of bandwidth": ([1 / each for each in times], 0.75, 0.85)}
    return report(
        f"decode, T = {tokens}, graph, time over that of reading the weights", {"mohge": times}, demands, "", 1
    )


def properties(layer: Layer) -> dict:
    """No wait for the device, the same bits twice, number of launches, and memory kept for backward."""
    x, tokens = layer.inputs(4096), 4096
    run, parameters = layer.contestant("mohge"), layer.parameters_of("mohge")
    x.hidden_states.requires_grad_()

    def results() -> list[torch.Tensor]:
        output = run(x)
        return [output, *torch.autograd.grad(output, [x.hidden_states, *parameters], x.grad_output)]

    repeatable = all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        results()
        waits = False
    except RuntimeError as error:
        waits = True
        print(error, file=sys.stderr)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        results()
    launches = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kept = {
        name: kept_bytes(layer.contestant(name), x, layer.parameters_of(name)) for name in ("mohge", "transformers")
    }
    demands = {
        "no wait for the device": ([float(not waits)], 1.0, 1.0),
        "same bits twice": ([float(repeatable)], 1.0, 1.0),
        "11 / launches": ([11 / max(len(launches), 1)], 0.0, 1.0),
        "0.36 x memory of transformers' grouped_mm / memory kept": (
            [0.36 * kept["transformers"] / kept["mohge"]],
            1.0,
            1.0,
        ),
    }
    return report(f"properties, T = {tokens}", {}, demands) | {"launches": [event.name for event in launches]}


def kept_bytes(run: Callable[[Inputs], torch.Tensor], x: Inputs, parameters: list[torch.Tensor]) -> int:
    """Bytes kept for backward, without the parameters."""
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(x)
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def copy_bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    times = [timed(lambda _: target.copy_(source), None) for _ in range(20)]
    return 2 * source.nbytes / median(times)


def measure(layer: Layer, names: list[str], rounds: int, tokens: int, backward: bool) -> dict[str, list[float]]:
    """Seconds of each call. The contestants take turns, each on inputs of its own."""
    prepare = training if backward else inference
    runs = {name: layer.ceiling(tokens, backward) if name == "C" else prepare(layer, name) for name in names}
    times = {name: [] for name in names}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            x = layer.inputs(tokens)
            seconds = timed(run, x)
            if turn >= 2:
                times[name].append(seconds)
    return times


def inference(layer: Layer, name: str) -> Callable[[Inputs], torch.Tensor]:
    return torch.no_grad()(layer.contestant(name))


def training(layer: Layer, name: str) -> Callable[[Inputs], None]:
    run, parameters = layer.contestant(name), layer.parameters_of(name)

    def step(x: Inputs) -> None:
        x.hidden_states.requires_grad_()
        x.weights.requires_grad_()
        output = run(x)
        torch.autograd.grad(output, [x.hidden_states, x.weights, *parameters], x.grad_output)

    return step


def timed(run: Callable, x: Inputs | None) -> float:
    """Seconds of one call, what it returns freed."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run(x)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(6_000_000)  # about three milliseconds, in which the host gets ahead of the device
    begin.record()
    run(x)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def ratios(times: dict[str, list[float]], other: str, name: str) -> list[float]:
    """How many times faster `name` is than `other`, turn by turn."""
    return [theirs / ours for theirs, ours in zip(times.get(other, ()), times[name], strict=other in times)]


def deciles(values: list[float]) -> dict[str, float]:
    cuts = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
    return {"10%": cuts[0], "median": cuts[4], "90%": cuts[8]}


def report(
    title: str,
    times: dict[str, list[float]],
    demands: dict[str, tuple[list[float], float, float | None]],
    unit: str = "ms",
    scale: float = 1e3,
) -> dict:
    """Print one table, and return it for the record."""
    print(f"\n{title}")
    by_name, reached = {}, {}
    for name, values in times.items():
        by_name[name] = deciles([value * scale for value in values])
        shown = "  ".join(f"{value:10.4g}" for value in by_name[name].values())
        print(f"  {name:16} {shown}  {unit} (10%, median, 90%)")
    for name, (values, must, aim) in demands.items():
        if not values:  # the other one was wrong
            continue
        reached[name] = {"value": deciles(values), "must": must, "aim": aim}
        low, value, high = reached[name]["value"].values()
        verdict = "must reached" if value >= must else "FALLS SHORT"
        if aim is not None and value >= aim:
            verdict = "aim reached"
        wanted = f"must {must}" + ("" if aim is None else f", aim {aim}")
        print(f"  {name}: {value:.2f} [{low:.2f}, {high:.2f}] ({wanted}): {verdict}", flush=True)
    return {"title": title, "unit": unit, "quantiles": by_name, "demands": reached}


def machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    threads = {} if device == "cuda" else {"threads": str(torch.get_num_threads())}
    environment = {
        key: os.environ[key] for key in sorted(os.environ) if key.startswith(("OMP_", "ONEDNN_", "MALLOC_"))
    }
    return {
        "date": str(date.today()),
        "device": name,
        **threads,
        **versions,
        "python": platform.python_version(),
        **environment,
    }


if __name__ == "__main__":
    sys.exit(main())
