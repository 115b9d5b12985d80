"""`swiglu_experts` repeats bit for bit, with any number of threads and whichever products compute it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    CASES,
    NARROW,
    Case,
    assert_close,
    assert_equal,
    dtype_name,
    each_case,
    make_inputs,
    make_layer,
    run,
    run_reference,
)

from mohge_kernels import cpu


@each_case(
    {"masked_slots": replace(NARROW, masked=0.4)}
    | {name: CASES[name] for name in ("many_rows_of_all_widths", "large_odd_sizes")}
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_repeats_bit_for_bit(case, device, dtype):
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype)
    first = run(layer, inputs)
    kept = {name: value.clone() for name, value in first.items()}
    assert_equal(run(layer, inputs), kept)
    other = Case(counts=(2, 1), widths=(20, 8), hidden_size=16, tokens=21, top_k=2)
    run(make_layer(other, device, dtype, seed=5), make_inputs(other, device, dtype, seed=6))
    again = replace(case, allowed=(0,), top_k=1)
    run(layer, make_inputs(again, device, dtype, seed=7))
    assert_equal(first, kept)  # later calls do not write into earlier results
    assert_equal(run(layer, inputs), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", ["many_rows_of_all_widths", "large_odd_sizes", "one_token", "empty_middle_group"])
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_several_threads(name, device, dtype):
    case = CASES[name]
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = run(layer, inputs), run(layer, inputs)
    finally:
        torch.set_num_threads(threads)
    assert_close(first, run_reference(case, layer, inputs), dtype)
    assert_equal(first, second)


PRODUCTS = {
    "Intel": {"MKL_LEADS": True},
    "AMD": {"MKL_LEADS": False},
    "AMD, serving": {"MKL_LEADS": False, "few_rows": 8},
    "without MKL and oneDNN": {"MKL_LEADS": False, "_ONEDNN_DTYPES": ()},
    "without bfloat16": {"_ONEDNN_DTYPES": (torch.float32,)},
}
"""What decides which product is taken."""


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("name", ["many_rows_of_all_widths", "one_token", "empty_middle_group"])
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_every_product(name, device, dtype, product, monkeypatch):
    for constant, value in PRODUCTS[product].items():
        monkeypatch.setattr(cpu, constant, value)
    case = CASES[name]
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype)
    assert_close(run(layer, inputs), run_reference(case, layer, inputs), dtype)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("vendor_id\t: GenuineIntel\n", True),
        ("vendor_id\t: AuthenticAMD\n", False),
        ("CPU implementer\t: 0x41\n", False),
        (None, True),
    ],
    ids=["Intel", "AMD", "ARM", "Intel, Windows"],
)
def test_products_go_by_the_processor(cpuinfo, expected, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: cpuinfo is not None)
    monkeypatch.setattr(Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr("platform.processor", lambda: "Intel64 Family 6 Model 106 Stepping 6, GenuineIntel")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert cpu._mkl_leads() == expected
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not cpu._mkl_leads()
