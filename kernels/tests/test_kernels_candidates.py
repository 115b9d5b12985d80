"""Other ways to do a step, which a table of tiles may choose: as right as those that they replace."""

import pytest
from kernel_cases import CASES, IMPLEMENTATIONS, Case, check


pytest.importorskip("triton", reason="needs triton")

from mohge_kernels import tuning


EDGES = {
    "unequal_widths_and_counts": CASES["unequal_widths_and_counts"],
    "one_wider_than_128": CASES["one_wider_than_128"],
    "beyond_a_tile": Case(counts=(1, 2), widths=(16, 40), hidden_size=36, tokens=41, top_k=2),
    "empty_experts_in_every_group": CASES["empty_experts_in_every_group"],
}
"""Sizes whose rows begin at multiples of 16 bytes in float32."""

CANDIDATES = {
    "table_and_descriptors": {"up": "table", "down": "descriptors", "d_rows": "descriptors"},
    "split": {"down": "split"},
}


@pytest.mark.parametrize("device", IMPLEMENTATIONS[1:], indirect=True)
@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("candidate", CANDIDATES)
def test_candidates_match_the_reference(candidate, name, device, launches, monkeypatch):
    by_rule, variants = tuning.config, CANDIDATES[candidate]

    def config(kernel, *args):
        return by_rule(kernel, *args)._replace(variant=variants.get(kernel, ""))

    monkeypatch.setattr(tuning, "config", config)
    check(EDGES[name], device)
    if device == "cuda":  # where nobody records the launches
        return
    kernels = {"up_by_table_kernel", "rows_by_group_kernel"} if candidate != "split" else {"split_down_kernel"}
    assert kernels <= set(launches)
