"""Tile sizes follow from what a GPU can do, not from its name; what was measured comes first."""

import json
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("triton", reason="needs triton")

from mohge_kernels import triton_experts, tuning


# Name, compute capability, shared memory of a program, multiprocessors
GPUS = {
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 232448, 132),
    "H100_PCIe": ("NVIDIA H100 PCIe", (9, 0), 232448, 114),
    "H200": ("NVIDIA H200", (9, 0), 232448, 132),
    "B200": ("NVIDIA B200", (10, 0), 232448, 148),
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0), 166912, 108),
    "L4": ("NVIDIA L4", (8, 9), 101376, 58),
    "RTX_5090": ("NVIDIA GeForce RTX 5090", (12, 0), 101376, 170),
}
LARGE_TILES = ["H100", "H100_PCIe", "H200", "B200"]
KERNELS = ["up", "down", "d_activation", "d_weights", "d_rows"]
ROWS = {"decode": 3, "few": 60, "some": 400, "many": 3000}
"""Per expert."""


@pytest.fixture
def pretend(monkeypatch):
    """Makes `cuda:0` one of GPUS."""

    def pretended(gpu: str):
        name, (major, minor), shared_memory, multiprocessors = GPUS[gpu]
        properties = SimpleNamespace(
            name=name,
            major=major,
            minor=minor,
            shared_memory_per_block_optin=shared_memory,
            multi_processor_count=multiprocessors,
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        for function in vars(tuning).values():
            getattr(function, "cache_clear", lambda: None)()

    yield pretended
    for function in vars(tuning).values():
        getattr(function, "cache_clear", lambda: None)()


def fake(*shape, dtype=torch.bfloat16, row=None, address=0):
    """As much of a tensor on `cuda:0` as the choice looks at."""
    stride = (*shape[:-2], row or shape[-1], 1)
    return SimpleNamespace(
        shape=shape,
        dtype=dtype,
        device=torch.device("cuda:0"),
        stride=lambda axis: stride[axis],
        data_ptr=lambda: address,
        element_size=lambda: dtype.itemsize,
    )


def layer_of(rows: int, experts: int = 64, dtype=torch.bfloat16, x: dict | None = None, weight: dict | None = None):
    hidden, width = 1024, 832
    gate_up = [fake(experts // 2, 2 * width, hidden, dtype=dtype, **(weight or {})) for _ in range(2)]
    down = [fake(experts // 2, hidden, width, dtype=dtype) for _ in range(2)]
    states = fake(rows * experts // 8, hidden, dtype=dtype, **(x or {}))
    return triton_experts._Layer(states, gate_up, down, experts // 2, 8)


def tiles(kernel: str, *args, **kwargs) -> tuning.Config:
    return layer_of(*args, **kwargs).tiles(kernel)[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", GPUS)
def test_large_tiles_where_tensor_cores_read_shared_memory(gpu, kernel, pretend):
    pretend(gpu)
    chosen = tiles(kernel, ROWS["many"])
    columns = chosen.block_n * (2 if kernel == "up" else 1)
    assert chosen.block_m == 128
    if gpu in LARGE_TILES:
        assert columns == (128 if kernel == "d_activation" else 256)
    else:
        assert columns == 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("gpu", GPUS)
def test_stages_of_all_programs_fit_the_shared_memory(gpu, rows, dtype, pretend):
    pretend(gpu)
    shared_memory = GPUS[gpu][2]
    for kernel in KERNELS:
        chosen = tiles(kernel, ROWS[rows], dtype=dtype)
        columns = chosen.block_n * (2 if kernel == "up" else 1)
        stages = (chosen.block_m + columns) * chosen.block_k * dtype.itemsize * chosen.num_stages
        assert chosen.num_stages >= 2
        assert stages <= shared_memory
        assert chosen.programs * (stages + 1024) <= shared_memory + 1024, kernel  # 1 KiB of each is the driver's


def test_more_multiprocessors_take_smaller_tiles_of_a_small_layer(pretend):
    """115 tiles of 128 x 256: enough for the 114 multiprocessors of one H100, not for the 132 of the other."""
    block_m = {}
    for gpu in ("H100_PCIe", "H100"):
        pretend(gpu)
        block_m[gpu] = tiles("d_rows", rows=4532 // 4, experts=4).block_m
        launched = tuning.programs(tiles("d_rows", ROWS["many"]), torch.device("cuda:0"))
        assert launched == GPUS[gpu][3]
    assert block_m == {"H100_PCIe": 128, "H100": 64}


@pytest.mark.parametrize(
    "layout",
    [{"x": {"row": 1025}}, {"x": {"row": 1032}}, {"x": {"address": 2}}, {"weight": {"address": 4}}],
    ids=["odd_row_stride", "row_stride_of_8", "unaligned_pointer", "unaligned_weights"],
)
def test_single_elements_are_loaded_in_shorter_tiles(layout, pretend):
    pretend("H200")
    assert layer_of(ROWS["many"]).aligned
    assert not layer_of(ROWS["many"], **layout).aligned
    assert tiles("down", ROWS["many"], **layout).block_k == 32


def test_what_was_measured_comes_first(pretend, monkeypatch, tmp_path):
    measured = tmp_path / "table.json"
    entry = [64, 256, 64, 4, 3, 1, False]
    measured.write_text(json.dumps({"8.0": {"16 bits": {"many": {"down": entry}}}}))
    pretend("A100")
    by_rule = {(kernel, rows): tiles(kernel, ROWS[rows]) for kernel in KERNELS for rows in ROWS}
    monkeypatch.setattr(tuning, "TABLE", measured)
    pretend("A100")
    for (kernel, rows), config in by_rule.items():
        expected = tuning.Config(*entry) if (kernel, rows) == ("down", "many") else config
        assert tiles(kernel, ROWS[rows]) == expected
    pretend("H100")
    assert tiles("down", ROWS["many"]) != tuning.Config(*entry)


def test_the_shipped_table_holds_tiles():
    table = json.loads(tuning.TABLE.read_text())
    for capability, entries in table.items():
        assert all(part.isdigit() for part in capability.split("."))
        for classes in entries.values():
            for kernels in classes.values():
                assert all(tuning.Config(*entry) for entry in kernels.values())
