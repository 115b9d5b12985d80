"""The four routers against tests/reference.py and against choices worked out by hand."""

import math

import pytest
import torch
from reference import Layout
from router_cases import (
    EQUAL,
    HIDDEN,
    LAYOUTS,
    NORMALIZATIONS,
    ROUTERS,
    UNEQUAL,
    as_dict,
    assert_same,
    build_case,
    floats,
    make_config,
    make_router,
    probe,
    reference_tokens,
)


TOKENS = 5


def cases(router):
    for name, layout in LAYOUTS.items():
        for normalization in NORMALIZATIONS:
            yield f"{name}-{normalization}", build_case(router, layout, normalization=normalization)
    yield "one_expert_in_all", build_case(router, Layout((1,), (8,)))
    if router == "grouped_top_k":
        yield "all_experts", build_case(router, EQUAL, experts_per_tok=9)
        yield "one_expert_of_each_group", build_case(router, experts_per_tok=3)
        yield "corrected", build_case(router, ema_strength=0.7)
    else:
        yield "all_experts", build_case(router, experts_per_tok=12, groups_per_tok=3, top_p=1.0)
        yield "one_expert_chosen", build_case(router, experts_per_tok=1, normalization="none")
    if router == "top_p":
        yield "high_p", build_case(router, experts_per_tok=12, top_p=0.95)
        yield "low_p", build_case(router, experts_per_tok=5, top_p=0.2)
    if router.startswith("two_level"):
        yield "all_groups", build_case(router, experts_per_tok=3, groups_per_tok=3)
        yield "one_group_kept", build_case(router, experts_per_tok=2, groups_per_tok=1)
        yield "as_many_experts_as_kept_groups_hold", build_case(router, EQUAL, experts_per_tok=6)


CASES = {f"{router}-{name}": case for router in ROUTERS for name, case in cases(router)}


def assert_same_gradients(actual, expected, inputs, more_than):
    actual, expected = (
        torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in (actual, expected)
    )
    assert expected[0].abs().max() > more_than
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference(case):
    """All outputs, of several tokens and of one, and the gradients of weights, logits and group logits."""
    experts, groups = case.layout.num_experts, case.layout.num_groups
    router = make_router(case)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    out, tokens = router(x), reference_tokens(router, x, case)
    assert all(value.dtype == torch.float64 for value in floats(out))
    assert_same(router, out, tokens, case)
    assert_same(router, router(x[:1]), tokens[:1], case)

    inputs = [x, *router.parameters()]
    factors = torch.randn(TOKENS, experts + 1, dtype=torch.float64)  # of each expert, and of masked slots
    expected = sum(w * factors[t, e] for t, token in enumerate(tokens) for e, w in token.weights.items())
    more_than = 1e-2 if experts > 1 else -1
    assert_same_gradients((out.weights * factors.gather(-1, out.index)).sum(), expected, inputs, more_than)

    group_factors = torch.randn(TOKENS, groups, dtype=torch.float64)
    group_logits = router.group_logits(out.logits) if out.group_logits is None else out.group_logits
    total = (out.logits * factors[:, :-1]).sum() + (group_logits * group_factors).sum()
    expected = sum(
        torch.stack(token.logits) @ factors[t, :-1] + torch.stack(token.group_logits) @ group_factors[t]
        for t, token in enumerate(tokens)
    )
    assert_same_gradients(total, expected, inputs, 1e-2)


@pytest.mark.parametrize("router", ROUTERS)
def test_group_weight_is_for_group_routers(router):
    case = build_case(router)
    names = ["weight", "group_weight"] if case.routing.has_group_router else ["weight"]
    assert [name for name, _ in make_router(case).named_parameters()] == names


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_reference_numbers_experts_like_the_config(layout):
    config = make_config(build_case("top_k", layout))
    assert layout.experts == list(zip(config.expert_groups, config.expert_slots, strict=True))
    assert config.expert_widths == tuple(layout.widths[group] for group, _ in layout.experts)


@pytest.mark.parametrize("layout", [EQUAL, UNEQUAL], ids=["equal_groups", "unequal_groups"])
def test_expert_logsumexp_of_all_groups_is_the_flat_softmax(layout):
    fields = {"experts_per_tok": 4, "groups_per_tok": 3, "normalization": "none"}
    two_level, flat = (build_case(r, layout, **fields) for r in ("two_level_expert_logsumexp", "top_k"))
    router, flat_router = make_router(two_level), make_router(flat)
    x = torch.randn(200, HIDDEN, dtype=torch.float64)
    out, expected = router(x), flat_router(x)
    for t in range(200):
        assert as_dict(out, t, two_level) == pytest.approx(as_dict(expected, t, flat), rel=1e-12)


# By hand


def run_one(router, counts, x, **fields):
    """Combine weights by expert id of a token with these logits, followed by its group logits; and the output."""
    case = build_case(router, Layout(counts, tuple(range(8, 8 + len(counts)))), **fields)
    out = probe(case)(torch.tensor([x], dtype=torch.float64))
    return as_dict(out, 0, case), out


@pytest.mark.parametrize("router", ["two_level_sigmoid", "two_level_softmax"])
def test_two_level_router_goes_by_id_order(router):
    """Of (2, 4) group 1 holds the ids 1, 2, 4 and 5; it is kept although the best expert, 3, is in group 0."""
    x = [8.0, 2.0, 1.0, 9.0, -3.0, 3.0, 0.0, 1.0]
    chosen, out = run_one(router, (2, 4), x, normalization="none", experts_per_tok=2, groups_per_tok=1)
    total = math.exp(2) + math.exp(1) + math.exp(-3) + math.exp(3)
    assert chosen == pytest.approx({5: math.exp(3) / total, 1: math.exp(2) / total}, rel=1e-12)
    assert out.group_index.tolist() == [[1]]


def test_expert_logsumexp_router_goes_by_id_order():
    """Of (2, 4) group 0 holds the ids 0 and 3. Its mass e^3 + e^3 beats e^3.5 although 1 is the best expert."""
    fields = {"normalization": "none", "experts_per_tok": 2, "groups_per_tok": 1}
    chosen, out = run_one("two_level_expert_logsumexp", (2, 4), [3.0, 3.5, -9.0, 3.0, -9.0, -9.0], **fields)
    assert chosen == pytest.approx({0: 0.5, 3: 0.5}, rel=1e-12)
    assert out.group_index.tolist() == [[0]]
    expected = [3 + math.log(2), math.log(math.exp(3.5) + 3 * math.exp(-9))]
    assert out.group_logits[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_grouped_router_goes_by_id_order():
    """Of (2, 4) group 0 holds 0 and 3, group 1 holds 1, 2, 4 and 5: one expert of each."""
    chosen, _ = run_one("grouped_top_k", (2, 4), [0.0, 5.0, 4.0, 1.0, 6.0, 3.0], experts_per_tok=2)
    total = math.exp(1) + math.exp(6)
    assert chosen == pytest.approx({3: math.exp(1) / total, 4: math.exp(6) / total}, rel=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_experts_are_chosen_over_kept_groups_together(normalization):
    """Two groups of two, both kept, with the scores 0.75 and 0.25; two experts of one group and one of the other."""
    # ids 0, 2 in group 0 with p(i|g) 0.6, 0.4; ids 1, 3 in group 1 with 0.9, 0.1; a sigmoid of 3/4 and 1/4
    x = [math.log(0.6), math.log(0.9), math.log(0.4), math.log(0.1), math.log(3), -math.log(3)]
    chosen, _ = run_one("two_level_sigmoid", (2, 2), x, experts_per_tok=3, normalization=normalization)
    expected = {0: 0.45, 1: 0.225, 2: 0.3}
    if normalization == "softmax":
        expected = {e: math.exp(q) for e, q in expected.items()}
    total = 1 if normalization == "none" else sum(expected.values())
    assert chosen == pytest.approx({e: value / total for e, value in expected.items()}, rel=1e-12)


@pytest.mark.parametrize(("router", "scores"), [("two_level_sigmoid", (0.75, 0.5)), ("two_level_softmax", (3.0, 1.0))])
def test_kept_group_scores_are_renormalised(router, scores):
    """Groups of one expert: q is the group score over the sum of the kept ones, here the last two of three."""
    x = [7.0, 8.0, 9.0, -1.0, math.log(3), 0.0]
    chosen, _ = run_one(router, (1, 1, 1), x, normalization="none", experts_per_tok=2)
    assert chosen == pytest.approx({1: scores[0] / sum(scores), 2: scores[1] / sum(scores)}, rel=1e-12)


def run_top_p(probabilities, p, cap, **fields):
    """Choice of a top_p router over len(probabilities) experts; probability 0 is a logit of -1000."""
    x = [math.log(value) if value else -1000.0 for value in probabilities]
    return run_one("top_p", (1,) * len(x), x, experts_per_tok=cap, top_p=p, **fields)[0]


TOP_P = {
    # probabilities, p, cap, set with the weights' sum 1
    "two_experts_reach_p": ([0.15, 0.5, 0.05, 0.3], 0.6, 4, {1: 0.5 / 0.8, 3: 0.3 / 0.8}),
    "single_expert_reaches_p": ([0.1, 0.7, 0.1, 0.1], 0.6, 4, {1: 1.0}),
    "at_least_one": ([0.2, 0.3, 0.26, 0.24], 1e-6, 4, {1: 1.0}),
    "cap": ([0.28, 0.26, 0.24, 0.22], 0.9, 2, {0: 0.28 / 0.54, 1: 0.26 / 0.54}),
    "cap_of_one": ([0.28, 0.26, 0.24, 0.22], 0.9, 1, {0: 1.0}),
    "p_of_one_takes_all": ([0.4, 0.3, 0.2, 0.1], 1.0, 4, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}),
    "one_expert": ([1.0], 0.6, 1, {0: 1.0}),
}


@pytest.mark.parametrize(("probabilities", "p", "cap", "expected"), TOP_P.values(), ids=TOP_P)
def test_top_p_set(probabilities, p, cap, expected):
    assert run_top_p(probabilities, p, cap) == pytest.approx(expected, rel=1e-12)


def test_top_p_stops_where_exactly_p_is_reached():
    chosen = run_top_p([1.0, 1.0, 0.0, 0.0], 0.5, 4)
    assert list(chosen.values()) == [1.0]
    assert set(chosen) < {0, 1}


def test_top_p_unnormalised_and_softmax_weights():
    probabilities = [0.15, 0.5, 0.05, 0.3]
    assert run_top_p(probabilities, 0.6, 4, normalization="none") == pytest.approx({1: 0.5, 3: 0.3}, rel=1e-12)
    share = math.exp(0.5) / (math.exp(0.5) + math.exp(0.3))
    weights = run_top_p(probabilities, 0.6, 4, normalization="softmax")
    assert weights == pytest.approx({1: share, 3: 1 - share}, rel=1e-12)
