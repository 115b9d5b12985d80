"""Tile sizes of the Triton kernels: those measured on GPUs of the same compute capability, and a rule for all others.

`tuning_table.json` holds what kernels/benchmarks/campaign.py measured: capability, bits of the dtype, shape class and
kernel, and the fields of `Config` in their order. The rule was chosen by reasoning and by compilation (`offline.py`:
no registers spilled at the shapes they are meant for, shared memory within bounds, loads of 16 bytes), not by
measurement.

Tensors on the CPU go through Triton's interpreter; those on the meta device stand for `OFFLINE` in `offline.py`.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """What the choice of tiles depends on."""

    capability: tuple[int, int]
    shared_memory: int
    """Bytes that one program may have."""
    multiprocessors: int


OFFLINE = Gpu((9, 0), 232448, 132)  # H100 and H200

TABLE = Path(__file__).with_name("tuning_table.json")


class Config(NamedTuple):
    """Tile of a kernel (for `up`, `block_n` columns of gate and as many of up), how many programs each
    multiprocessor gets, whether to load for the next tile while the results of one are written (`flatten`), and which
    of `triton_candidates.py` to take instead (`variant`)."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int
    flatten: bool = False
    variant: str = ""


_RULE = {
    "16 bits": {
        "decode": {
            "default": Config(16, 64, 128, 4, 3, 2),
            "up": Config(16, 32, 128, 4, 4, 2),
            "down": Config(16, 32, 128, 4, 4, 3),
        },
        "few": {"default": Config(64, 128, 64, 4, 4, 2)},
        "large": {
            "default": Config(128, 256, 64, 8, 4, 1),
            "up": Config(128, 128, 64, 8, 4, 1),
            "d_activation": Config(128, 128, 64, 8, 4, 1),
        },
        # Tensor cores that take their operands from registers leave none for larger tiles.
        "large, from registers": {"default": Config(128, 128, 64, 8, 3, 1), "up": Config(128, 64, 64, 8, 3, 1)},
    },
    "float32": {
        "decode": {"default": Config(16, 32, 64, 4, 3, 2)},
        "few": {"default": Config(64, 64, 32, 4, 3, 2), "up": Config(64, 32, 32, 4, 3, 2)},
    },
}

_INTERPRETED = Config(16, 16, 16, 4, 2, 1)
"""Small enough that tests with small sizes see several tiles."""

_INTERPRETED_PROGRAMS = 3


@cache
def _table(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def gpu(device: torch.device) -> Gpu:
    if device.type == "meta":
        return OFFLINE
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )


def shape_class(pairs: int, experts: int, columns: float, gpu: Gpu) -> str:
    """`decode`, where reading the weights is all the work, or `few`, `some` or `many` rows for each expert; `few` too
    where large tiles would leave multiprocessors without one."""
    rows = pairs / experts
    if rows <= 24:
        return "decode"
    if rows <= 160 or pairs * columns < 128 * 256 * gpu.multiprocessors:
        return "few"
    return "some" if rows <= 1024 else "many"


def config(
    kernel: str,
    dtype: torch.dtype,
    pairs: int,
    experts: int,
    hidden: int,
    mean_width: float,
    aligned: bool,
    device: torch.device,
) -> Config:
    """
    Args:
        kernel: `up`, `down`, `d_activation`, `d_weights` or `d_rows`.
        hidden: the hidden size, `mean_width`: the mean width of the experts.
        aligned: whether every row of every matrix is seen to begin at a multiple of 16 bytes.
    """
    if device.type == "cpu":
        return _INTERPRETED
    on = gpu(device)
    narrowest = min(hidden, mean_width)
    bits, name = "float32" if dtype == torch.float32 else "16 bits", shape_class(pairs, experts, narrowest, on)
    measured = _table(TABLE).get("{}.{}".format(*on.capability), {}).get(bits, {}).get(name, {}).get(kernel)
    chosen = _by_rule(kernel, bits, name, on) if measured is None else Config(*measured)
    if narrowest < chosen.block_n:  # a narrow layer fills no wide tile
        chosen = chosen._replace(block_n=max(16, 1 << (int(narrowest) - 1).bit_length()))
    if not aligned:  # loads of single elements, each with an address in a register
        block_m, block_n, block_k = map(min, chosen[:3], (64, 64, 32))
        chosen = chosen._replace(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=4, variant="")
    return chosen


def _by_rule(kernel: str, bits: str, name: str, on: Gpu) -> Config:
    if name in ("some", "many"):
        # Those of 9.x to 11.x (Hopper, and Blackwell for servers) read shared memory, those of 12.x again registers.
        from_memory = on.capability[0] in (9, 10, 11)
        name = "few" if bits == "float32" else "large" if from_memory else "large, from registers"
    chosen = _RULE[bits][name].get(kernel, _RULE[bits][name]["default"])
    columns = chosen.block_n * (2 if kernel == "up" else 1)
    stage = (chosen.block_m + columns) * chosen.block_k * (4 if bits == "float32" else 2)
    # Of the shared memory of a multiprocessor each program takes 1 KiB more than it may use. A second program is worth
    # less than a third stage, which is worth more than long rows.
    for programs in range(chosen.programs, 0, -1):
        stages = min(chosen.num_stages, ((on.shared_memory + 1024) // programs - 1024) // stage)
        if stages >= 3:
            return chosen._replace(programs=programs, num_stages=stages)
    return chosen._replace(programs=1, num_stages=3, block_k=chosen.block_k // 2)


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


def programs(chosen: Config, device: torch.device) -> int:
    return _INTERPRETED_PROGRAMS if device.type == "cpu" else gpu(device).multiprocessors * chosen.programs
