"""Compiles every kernel for a GPU that need not be there, and says what of the multiprocessor each one takes.

`python -m mohge_kernels.offline` prints a table for the layers the kernels are tuned for, and fails if one spills. Not
under TRITON_INTERPRET=1, which turns the kernels into Python.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import triton_experts, triton_routing, tuning


class Layer(NamedTuple):
    hidden_size: int
    widths: tuple[int, ...]
    experts_per_group: int
    slots: int


PAPER = Layer(1024, tuple(range(384, 1281, 128)), 8, 6)
LARGE = Layer(2048, tuple(range(512, 1409, 128)), 16, 8)
MANY = Layer(1024, (384, 640), 128, 8)
ODD = Layer(1001, (40, 129, 17), 43, 2)
"""129 experts, which the kernels round up to 256."""

CASES = {
    f"{name}-{str(dtype).removeprefix('torch.')}-{tokens}": (layer, tokens, dtype)
    for name, layer, dtype, tokens in (
        ("paper", PAPER, torch.bfloat16, 32768),
        ("paper", PAPER, torch.bfloat16, 4096),
        ("paper", PAPER, torch.bfloat16, 32),
        ("large", LARGE, torch.bfloat16, 32768),
        ("large", LARGE, torch.bfloat16, 32),
        ("paper", PAPER, torch.float32, 32768),
        ("many", MANY, torch.bfloat16, 32768),
        ("odd", ODD, torch.bfloat16, 32768),
        ("odd", ODD, torch.float32, 32768),
    )
}
"""Layer, tokens and dtype by name."""


class Compiled(NamedTuple):
    """What one kernel takes."""

    kernel: str
    """Its name, and what distinguishes this use of it."""
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of its registers that a thread keeps in memory."""
    shared_memory: int
    """In bytes."""
    tensor_cores: str | None
    """The kind of instruction: `wgmma`, which reads shared memory, `mma` or None."""
    wide_loads: float | None
    """Share of the operands of matrix products that comes in asynchronous copies of 16 bytes."""


def _recorded(function) -> list[tuple]:
    """Kernel, arguments and keywords of every launch of `function`."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        function()
    return launches


def launches(layer: Layer, tokens: int, dtype: torch.dtype, weights_dtype: torch.dtype = torch.float32) -> list[tuple]:
    """Kernel, arguments and keywords of every launch of a forward and backward pass, and of a forward pass that saves
    nothing, without those that only repeat an earlier one."""
    hidden, slots, per_group = layer.hidden_size, layer.slots, layer.experts_per_group
    groups = len(layer.widths)

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, group_logits = (tensor(tokens, n, dtype=torch.float32) for n in (per_group * groups, groups))
    group_of_expert, key_of_expert = (tensor(per_group * groups, dtype=torch.int64) for _ in range(2))
    x = tensor(tokens, hidden)
    gate_up = [tensor(per_group, 2 * width, hidden) for width in layer.widths]
    down = [tensor(per_group, hidden, width) for width in layer.widths]
    weights = tensor(tokens, slots, dtype=weights_dtype)

    def layer_forward_and_backward():
        routing = logits, group_logits, group_of_expert
        grad, index, group_index = triton_routing.forward(*routing, slots, max(groups // 2, 1), False)
        forward = x, gate_up, down, index, key_of_expert, weights, per_group
        _, *saved = triton_experts.forward(*forward, True)
        triton_experts.backward(x, x, gate_up, down, weights, *saved, per_group, [True] * 4)
        triton_routing.backward(grad, *routing, index, group_index, False)
        triton_experts.forward(*forward, False)

    kept = []
    for kernel, args, kwargs in _recorded(layer_forward_and_backward):
        if not any(kernel is other and kwargs == options for other, _, options in kept):
            kept.append((kernel, args, kwargs))
    return kept


def _name(kernel: JITFunction, kwargs: dict) -> str:
    use = {
        "up_kernel": (("RECOMPUTE", {True: "again"}), ("SAVE", {False: "saving nothing"})),
        "rows_kernel": (("FACTOR", {1: "down", 2: "gate_up"}),),
        "combine_kernel": (("WEIGHTED", {True: "forward", False: "backward"}),),
    }
    details = (values.get(kwargs[option]) for option, values in use.get(kernel.__name__, ()))
    return " ".join([kernel.__name__, *filter(None, details)])


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Nothing but spilled registers is on the stack of these kernels.
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, capability: tuple[int, int]) -> Compiled:
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    ptx = compiled.asm["ptx"]
    wide_loads = None
    if "BLOCK_K" in kwargs:
        columns = (2 if kernel.__name__ == "up_kernel" else 1) * kwargs["BLOCK_N"]
        stage = (kwargs["BLOCK_M"] + columns) * kwargs["BLOCK_K"] * args[0].element_size()
        # One copy for each stage: those before the loop, and one in it.
        copies = len(re.findall(r"cp\.async\.cg\.shared\.global .*?, 0x10,", ptx))
        wide_loads = copies * 16 * 32 * kwargs["num_warps"] / (stage * kwargs["num_stages"])
    return Compiled(
        _name(kernel, kwargs),
        *_resource_usage(compiled.asm["cubin"]),
        compiled.metadata.shared,
        next((kind for kind in ("wgmma", "mma") if f"{kind}.mma_async." in ptx or f"{kind}.sync." in ptx), None),
        wide_loads,
    )


def compile_for(layer: Layer, tokens: int, dtype: torch.dtype, gpu: tuning.Gpu = tuning.OFFLINE) -> Iterator[Compiled]:
    """Every kernel of one layer as it is launched on `gpu`."""
    with mock.patch.object(tuning, "gpu", return_value=gpu):
        recorded = launches(layer, tokens, dtype)
    for kernel, args, kwargs in recorded:
        yield compile_launch(kernel, args, kwargs, gpu.capability)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mohge_kernels.offline",
        description="Compiles every kernel for an H200, which need not be there. Exits with 1 if a kernel spills.",
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"layer, dtype and tokens (default: all): {', '.join(CASES)}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: kernels by case")
    options = parser.parse_args(arguments)
    for case in options.cases:
        if case not in CASES:
            parser.error(f"no case {case!r}: choose from {', '.join(CASES)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 turns the kernels into Python: unset it")

    results = {}
    for case in options.cases or CASES:
        if not options.json:
            print(f"{case}\n  {'kernel':30}{'registers':>10}{'spilled':>10}{'shared':>10}{'':>10}  16-byte copies")
        results[case] = []
        for compiled in compile_for(*CASES[case]):
            results[case].append(compiled._asdict())
            if not options.json:
                wide = "" if compiled.wide_loads is None else f"{compiled.wide_loads:16.0%}"
                print(
                    f"  {compiled.kernel:30}{compiled.registers:10}{compiled.spilled:10}{compiled.shared_memory:10}"
                    f"{compiled.tensor_cores or '':>10}{wide}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(results, indent=2))
    return int(any(kernel["spilled"] for kernels in results.values() for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
