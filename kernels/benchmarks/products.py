"""
Which library is fastest on this processor at the products that experts are made of: `python products.py`.

`_mkl_leads` in mohge_kernels/cpu.py says which one a processor gets; this is where its figures come from. One product
after another with each of 64 weights, so that they come from memory as they do in a model; the ways are checked
against float64, take turns, and their ratios are of calls that followed one another.

For M rows, `product` is [M, K] times a weight [N, K] turned, and `gradient` [N, M] times [M, K], written to a place in
memory as gradients of weights are.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from benchmark_experts import deciles, machine, ratios


EXPERTS, WIDTH, HIDDEN_SIZE = 64, 832, 1024
"""As in benchmark_experts.py, at its mean width."""
_LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def onednn(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    result = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return result if out is None else out.copy_(result)


def mm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """MKL in float32, what PyTorch takes in bfloat16."""
    return torch.mm(x, weight.t(), out=out)


def turned(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """The same with the weight as the first of two matrices."""
    return torch.mm(weight, x.t(), out=None if out is None else out.t()).t()


WAYS = {"onednn": onednn, "mm": mm, "turned": turned}


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def operands(kind: str, rows: int, dtype: torch.dtype) -> list[Operands]:
    """Of each expert, as `F.linear` takes them, and where to write."""

    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    if kind == "product":
        return [(new(rows, HIDDEN_SIZE), new(WIDTH, HIDDEN_SIZE), None) for _ in range(EXPERTS)]
    gradients = new(EXPERTS, WIDTH, HIDDEN_SIZE)
    return [(new(rows, WIDTH).t(), new(rows, HIDDEN_SIZE).t(), gradient) for gradient in gradients]


def seconds(way: Callable, calls: list[Operands]) -> float:
    start = time.perf_counter()
    for call in calls:
        way(*call)
    return time.perf_counter() - start


def compare(calls: list[Operands], rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each way, turn by turn."""
    x, weight, _ = calls[0]
    expected = x.double() @ weight.double().t()
    for name, way in WAYS.items():
        error = (way(*calls[0]).double() - expected).norm() / expected.norm()
        if not error < _LARGEST_ERROR[x.dtype]:
            raise SystemExit(f"error: {name} computes something else: relative error {error:.1e}")
    # The first turn generates code.
    turns = [[seconds(way, calls) / EXPERTS for way in WAYS.values()] for _ in range(rounds + 1)][1:]
    return dict(zip(WAYS, map(list, zip(*turns, strict=True)), strict=True))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 24, 96, 192])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file to write all quantiles to")
    options = parser.parse_args()
    torch.manual_seed(0)
    record = {"machine": machine("cpu"), "rounds": options.rounds, "measurements": []}
    print(", ".join(f"{key} {value}" for key, value in record["machine"].items()))
    print("microseconds (median), and times faster than oneDNN with 10% and 90%")
    for dtype, kind, rows in product(_LARGEST_ERROR, ("product", "gradient"), options.rows):
        times = compare(operands(kind, rows, dtype), options.rounds)
        found = {name: deciles([1e6 * value for value in values]) for name, values in times.items()}
        faster = {name: deciles(ratios(times, "onednn", name)) for name in times if name != "onednn"}
        shown = [f"{name} {found[name]['median']:7.1f}" for name in times]
        shown += [f"{name} {r['median']:.2f} [{r['10%']:.2f}, {r['90%']:.2f}]" for name, r in faster.items()]
        print(f"{dtype!s:14} {kind:8} {rows:4} rows: " + "  ".join(shown), flush=True)
        row = {"dtype": str(dtype), "kind": kind, "rows": rows, "us": found, "faster": faster}
        record["measurements"].append(row)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
