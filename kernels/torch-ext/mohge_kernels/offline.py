"""Compiles every kernel for a GPU that need not be there, and says what of the multiprocessor each one takes.

`python -m mohge_kernels.offline` prints the table for the layers the kernels are tuned for. Not under
TRITON_INTERPRET=1, which turns the kernels into Python.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import triton_experts


class Layer(NamedTuple):
    hidden_size: int
    widths: tuple[int, ...]
    experts_per_group: int
    slots: int


PAPER = Layer(1024, tuple(range(384, 1281, 128)), 8, 6)
LARGE = Layer(2048, tuple(range(512, 1409, 128)), 16, 8)
ODD = Layer(1001, (40, 129, 17), 3, 2)


class Compiled(NamedTuple):
    """One kernel: its name and what distinguishes this use of it, registers of a thread, bytes a thread spills, bytes
    of shared memory, and the code in PTX."""

    kernel: str
    registers: int
    spilled: int
    shared_memory: int
    ptx: str


def launches(layer: Layer, tokens: int, dtype: torch.dtype) -> list[tuple]:
    """Kernel, arguments and keywords of every launch of one forward and backward pass."""
    recorded = []

    def record(kernel, *args, grid, warmup, **kwargs):
        recorded.append((kernel, args, kwargs))

    def tensor(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden, experts = layer.hidden_size, layer.experts_per_group
    gate_up = [tensor(experts, 2 * width, hidden) for width in layer.widths]
    down = [tensor(experts, hidden, width) for width in layer.widths]
    index = tensor(tokens, layer.slots, dtype=torch.int64)
    key_of_expert = tensor(experts * len(layer.widths), dtype=torch.int64)
    weights = tensor(tokens, layer.slots, dtype=torch.float32)
    x = tensor(tokens, hidden)
    with mock.patch.object(JITFunction, "run", record):
        _, *saved = triton_experts.forward(x, gate_up, down, index, key_of_expert, weights, experts, True)
        triton_experts.backward(x, x, gate_up, down, weights, *saved, experts, [True] * 4)
    return recorded


def compile_launch(kernel: JITFunction, args: tuple, kwargs: dict, capability: int = 90) -> Compiled:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    detail = {"FACTOR": {1: "down", 2: "gate_up"}, "RECOMPUTE": {False: "", True: "again"}, "WEIGHTED": {}}
    suffix = [detail[name].get(value, "") for name, value in kwargs.items() if name in detail]
    name = " ".join([kernel.__name__, *filter(None, suffix)])
    return Compiled(name, registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def compile_for(
    layer: Layer = PAPER, tokens: int = 32768, dtype: torch.dtype = torch.bfloat16, capability: int = 90
) -> Iterator[Compiled]:
    """Every kernel of one forward and backward pass at its shipped configuration."""
    for kernel, args, kwargs in launches(layer, tokens, dtype):
        yield compile_launch(kernel, args, kwargs, capability)


def main():
    cases = {
        "paper layer, bfloat16, T 32768": (PAPER, 32768, torch.bfloat16),
        "paper layer, bfloat16, T 4096": (PAPER, 4096, torch.bfloat16),
        "paper layer, bfloat16, T 32": (PAPER, 32, torch.bfloat16),
        "large layer, bfloat16, T 32768": (LARGE, 32768, torch.bfloat16),
        "paper layer, float32, T 32768": (PAPER, 32768, torch.float32),
        "odd layer, bfloat16, T 1000": (ODD, 1000, torch.bfloat16),
        "odd layer, float32, T 1000": (ODD, 1000, torch.float32),
    }
    for title, case in cases.items():
        print(f"{title}\n{'kernel':32}{'registers':>10}{'spilled':>10}{'shared':>10}  wgmma  16-byte loads")
        for compiled in compile_for(*case):
            wgmma = compiled.ptx.count("wgmma.mma_async")
            wide = len(re.findall(r"cp\.async\.cg.*?, 0x10", compiled.ptx))
            print(
                f"{compiled.kernel:32}{compiled.registers:10}{compiled.spilled:10}{compiled.shared_memory:10}"
                f"{wgmma:7}{wide:15}",
                flush=True,
            )


if __name__ == "__main__":
    main()
