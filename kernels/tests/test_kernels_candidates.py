"""Other ways to do a step, which a table of tiles may choose: as right as those that they replace."""

import pytest
import torch
from kernel_cases import CASES, Case, check, make_inputs, make_layer, run


pytest.importorskip("triton", reason="needs triton")

from mohge_kernels import tuning


EDGES = {
    "unequal_widths_and_counts": CASES["unequal_widths_and_counts"],
    "one_wider_than_128": CASES["one_wider_than_128"],
    "beyond_a_tile": Case(counts=(1, 2), widths=(16, 40), hidden_size=36, tokens=41, top_k=2),
    "empty_experts_in_every_group": CASES["empty_experts_in_every_group"],
    "empty_middle_group": CASES["empty_middle_group"],
    "masked_slots": CASES["masked_slots"],
}
"""Sizes whose rows begin at multiples of 16 bytes in float32."""

CANDIDATES = {
    "descriptors": {"down": "descriptors", "d_rows": "descriptors"},
    "split": {"down": "split"},
}


@pytest.fixture
def choose(monkeypatch):
    def chosen(variants: dict[str, str], **changes):
        by_rule = tuning.config

        def config(kernel, *args):
            return by_rule(kernel, *args)._replace(variant=variants.get(kernel, ""), **changes)

        monkeypatch.setattr(tuning, "config", config)

    return chosen


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_candidates_match_the_reference(candidate, name, device, choose, launches):
    choose(CANDIDATES[candidate])
    check(EDGES[name], device)
    kernels = {"descriptors": "rows_by_group_kernel", "split": "split_down_kernel"}
    assert kernels[candidate] in launches


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_flattened_loops_and_other_tiles_give_the_same_bits(device, choose):
    """What the sweep may choose without a variant; the sums over the hidden size keep their order."""
    case = EDGES["beyond_a_tile"]
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run(layer, inputs)
    choose({}, flatten=True, block_m=32)
    actual = run(layer, inputs)
    for name in ("output", "d hidden_states"):
        assert torch.equal(actual[name], expected[name])
