"""
Speed of conversion, contestants alternating in one process: `python -m mohge.conversion.benchmark`.

`regroup` against copying the same files, both down to the disk, with the source read from the disk and with it in the
page cache; calibration statistics for `trim` against plain forward passes over the same tokens. Results are checked
before anything is timed; medians are printed.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from mohge.training.benchmarks.machine import processor

from .calibration import Tokens
from .pipeline import _Conversion, convert
from .plan import make_plan
from .recipe import Recipe, load_recipe
from .staging import Staging


def main() -> None:
    """Parse the arguments, check, measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    options = parser.parse_args()
    print(f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads,")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.dtype}")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        _make_source(options, folder / "source")
        _measure_disk(folder, options.repeats)
        _measure_calibration(folder, options)


def _make_source(options: argparse.Namespace, path: Path):
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32000,
        hidden_size=options.hidden_size,
        intermediate_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 64,
        num_experts=options.experts,
        num_experts_per_tok=4,
        pad_token_id=None,
        eos_token_id=None,
    )
    OlmoeForCausalLM(config).to(getattr(torch, options.dtype)).save_pretrained(path, max_shard_size="300MB")


def _sync(folder: Path):
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _evict(folder: Path):
    _sync(folder)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _take_memory():
    """Touch as much memory as a contestant will and let it go: a virtual machine may have given free memory back to
    its host, and whoever touches it first pays."""
    torch.ones(3 * 2**28)


def _alternate(contestants: dict[str, Callable[[], None]], repeats: int, prepare: Callable, finish: Callable) -> dict:
    """Median seconds of each; the first round is not counted."""
    times = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        for name, contestant in contestants.items():
            prepare()
            started = time.perf_counter()
            contestant()
            elapsed = time.perf_counter() - started
            finish()
            if round_number:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def _measure_disk(folder: Path, repeats: int):
    source, output = folder / "source", folder / "output"
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))

    def copy():
        shutil.copytree(source, output)
        _sync(output)

    def regroup():
        report = convert(make_plan(_recipe(folder, mode="regroup", experts_per_group=4)))
        assert report["passed"], report["failures"]
        _sync(output)

    regroup()
    _check_regrouped(source, output)
    shutil.rmtree(output)
    print(f"\n| {size / 1e9:.2f} GB | copy, s | regroup, s | ratio |\n|---|---|---|---|")
    for state, evicts in (("source on disk", True), ("source cached", False)):

        def prepare(evicts=evicts):
            _take_memory()
            if evicts:
                _evict(source)

        times = _alternate({"copy": copy, "regroup": regroup}, repeats, prepare, lambda: shutil.rmtree(output))
        ratio = times["regroup"] / times["copy"]
        print(f"| {state} | {times['copy']:.2f} | {times['regroup']:.2f} | {ratio:.2f} |", flush=True)


def _check_regrouped(source: Path, output: Path):
    """Every weight of the source is in the output."""
    before = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()}
    after = {name: t for path in output.glob("*.safetensors") for name, t in load_file(path).items()}
    after = {name: tensor for name, tensor in after.items() if tensor.is_floating_point()}
    experts = before["model.layers.0.mlp.gate.weight"].shape[0]
    assert sum(t.numel() for t in before.values()) == sum(t.numel() for t in after.values())
    for name, tensor in after.items():
        layer, _, rest = name.partition(".mlp.experts.")
        if not rest:
            assert torch.equal(tensor, before[name]), name
            continue
        group, groups = int(rest.rpartition("_")[2]), experts // 4
        for slot in range(4):
            expert = f"{layer}.mlp.experts.{slot * groups + group}."
            parts = ("gate_proj", "up_proj") if rest.startswith("gate_up") else ("down_proj",)
            assert torch.equal(tensor[slot], torch.cat([before[f"{expert}{part}.weight"] for part in parts])), name


def _recipe(folder: Path, **options) -> Recipe:
    return load_recipe(None, source=str(folder / "source"), output=str(folder / "output"), **options)


@torch.no_grad()
def _measure_calibration(folder: Path, options: argparse.Namespace):
    widths = [options.width // 2, options.width]
    # Without a survey, which would bring the statistics that are to be timed.
    plan = make_plan(_recipe(folder, mode="trim", widths=widths, saliency="magnitude", calibration="-"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32000, (options.tokens // 512, 512), generator=generator)
    tokens = Tokens(ids, max(1, len(ids) // 8), True)
    # On a CPU the loop over experts is the faster of transformers' implementations.
    model = AutoModelForCausalLM.from_pretrained(folder / "source", experts_implementation="eager").eval()
    layers = range(options.layers)
    with plan.tensors.open() as read:
        plan.source.load_outer({name: read(name) for name in plan.source.outer_names}, "cpu")
    last = []

    def plain():
        last[:] = [model.model(batch).last_hidden_state for batch in ids.split(8)]

    def calibrate():
        staging = Staging(folder / "calibrated", options.layers + 2, "benchmark")
        try:
            work = _Conversion(plan, tokens, staging, None, False)
            for number in layers:
                state = plan.tensors.layer(number)
                work.observe(work.layer(number, None), state, plan.source.read_layer(number, state))
            states = [work.source.load(options.layers, batch)[0] for batch in range(len(work.batches))]
            last[:] = [model.model.norm(torch.cat(states))]
        finally:
            staging.close()
            shutil.rmtree(staging.folder)
            shutil.rmtree(staging.scratch)

    plain()
    expected = torch.cat(last)
    calibrate()
    error = ((last[0] - expected).norm() / expected.norm()).item()
    assert error < (1e-4 if options.dtype == "float32" else 0.1), error
    times = _alternate({"plain": plain, "calibrate": calibrate}, 3, lambda: None, lambda: None)
    print(f"\n| {options.tokens} tokens | forward, s | with statistics, s | ratio |\n|---|---|---|---|")
    print(
        f"| trim | {times['plain']:.2f} | {times['calibrate']:.2f} | {times['calibrate'] / times['plain']:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
