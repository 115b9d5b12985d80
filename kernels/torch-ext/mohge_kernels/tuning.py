"""Tile sizes of the Triton kernels: a table per GPU and shape class, and a heuristic for GPUs without one.

The values were chosen by reasoning and by compilation (`offline.py`: no registers spilled at the shapes they are meant
for, shared memory within bounds, loads of 16 bytes), not by measurement.

Tensors on the CPU go through Triton's interpreter; those on the meta device stand for an H200 in `offline.py`.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tile of a kernel (for `up`, `block_n` columns of gate and as many of up), how many programs each
    multiprocessor gets, and whether to load for the next tile while the results of one are written (`flatten`)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int
    flatten: bool = False


_INTERPRETED = Config(16, 16, 16, 4, 2, 1)
"""Small enough that tests with small sizes see several tiles."""

_INTERPRETED_PROGRAMS = 3


@cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("tuning_table.json").read_text())


def shape_class(rows_per_expert: float) -> str:
    """`decode`, where reading the weights is all the work, or `few`, `some` or `many` rows for each expert."""
    for name, most in (("decode", 24), ("few", 160), ("some", 1024)):
        if rows_per_expert <= most:
            return name
    return "many"


def config(
    kernel: str,
    dtype: torch.dtype,
    rows_per_expert: float,
    hidden: int,
    mean_width: float,
    aligned: bool,
    device_name: str,
) -> Config:
    """
    Args:
        kernel: `up`, `down`, `d_activation`, `d_weights` or `d_rows`.
        rows_per_expert: mean over the experts.
        hidden: the hidden size, `mean_width`: the mean width of the experts.
        aligned: whether every row of every matrix is seen to begin at a multiple of 16 bytes.
        device_name: as `torch.cuda.get_device_name` has it; `cpu` in Triton's interpreter.
    """
    if device_name == "cpu":
        return _INTERPRETED
    bits = "float32" if dtype == torch.float32 else "16 bits"
    table = _table()
    name = next((name for name in table if name in device_name), "other")
    entry = table[name][bits][shape_class(rows_per_expert)]
    chosen = Config(*entry.get(kernel, entry["default"]))
    if min(hidden, mean_width) < chosen.block_n:  # a narrow layer fills no wide tile
        chosen = chosen._replace(block_n=max(16, 1 << (int(min(hidden, mean_width)) - 1).bit_length()))
    if not aligned:  # loads of single elements, each with an address in a register
        chosen = chosen._replace(block_k=min(chosen.block_k, 32))
    return chosen


def epilogue_parts(chosen: Config, aligned: bool, device: torch.device) -> int:
    """In how many parts, one after the other, `d_activation` works on its tile: 16 elements a thread, or 8 where each
    has its own address, leave the registers that the rest needs."""
    if device.type == "cpu":
        return 2
    elements = (16 if aligned else 8) * 32 * chosen.num_warps
    return max(1, min(chosen.block_m * chosen.block_n // elements, chosen.block_n // 16))


PREFIX_CHUNK = 1024
"""Blocks of pairs that the sort sums in one step."""


def sort_sizes(device: torch.device) -> tuple[int, int]:
    """Up to how many pairs one program sorts alone, and how many pairs make a block where several share the work. A
    program compares all its pairs with each other."""
    return (32, 32) if device.type == "cpu" else (512, 128)


@cache
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "NVIDIA H200" if device.type == "meta" else "cpu"


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def programs(chosen: Config, device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETED_PROGRAMS
    return _multiprocessors(device) * chosen.programs
