"""Routers at the edge: extreme and tied logits, other dtypes than float64, the correction of the logits."""

import math

import pytest
import torch
from reference import Layout, choose, combine, group_logsumexp, log_joint, log_softmax
from router_cases import (
    EQUAL,
    NORMALIZATIONS,
    ROUTERS,
    UNEQUAL,
    as_dict,
    assert_same,
    build_case,
    floats,
    make_router,
    numbers,
    probe,
    reference_tokens,
)


def extreme_inputs(case, dtype):
    """Inputs for `probe`: logits and group logits that are several hundred apart, some far below, some far above 0."""
    torch.manual_seed(3)
    experts = case.layout.num_experts
    groups = case.layout.num_groups if case.routing.has_group_router else 0
    x = 300 * torch.randn(16, experts + groups, dtype=dtype)
    x[1] = -x[1].abs()
    x[2] = x[2].abs()
    x[3, experts:] -= 600
    x[4, experts:] += 600
    return x


def assert_best(scores, chosen, number, tiny):
    """Scores that come out equal in the router's dtype may be chosen in any order."""
    assert len(chosen) == number
    rest = [score for key, score in scores.items() if key not in chosen]
    assert min(scores[key] for key in chosen) >= max(rest, default=float("-inf")) - tiny


@pytest.mark.parametrize(
    ("dtype", "rtol", "tiny"),
    [(torch.float32, 1e-3, 1e-6), (torch.float64, 1e-9, 1e-14)],
    ids=["float32", "float64"],
)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("layout", [EQUAL, UNEQUAL], ids=["equal_groups", "unequal_groups"])
@pytest.mark.parametrize("router", ROUTERS)
def test_extreme_logits_match_reference(router, layout, normalization, dtype, rtol, tiny):
    """Scores under- and overflow here."""
    case = build_case(router, layout, normalization=normalization)
    routing, experts = case.routing, layout.num_experts
    x = extreme_inputs(case, dtype).requires_grad_()
    out = probe(case, dtype)(x)
    assert torch.equal(out.logits, x[:, :experts])
    for t, row in enumerate(x.detach().double()):
        logits = list(row[:experts])
        group_logits = list(row[experts:]) or group_logsumexp(logits, layout)
        chosen = as_dict(out, t, case)
        log_q = dict(enumerate(log_softmax(logits)))
        if routing.router_type == "two_level":
            kept = set(out.group_index[t].tolist())
            assert_best(dict(enumerate(numbers(group_logits))), kept, routing.groups_per_tok, tiny)
            log_q = log_joint(logits, group_logits, kept, layout, routing)
            assert out.group_logits[t].tolist() == pytest.approx(numbers(group_logits), rel=rtol)
        q = {e: log.exp().item() for e, log in log_q.items()}
        if routing.router_type == "grouped_top_k":
            each = routing.experts_per_tok // layout.num_groups
            for members in map(layout.members, range(layout.num_groups)):
                assert_best({e: q[e] for e in members}, chosen.keys() & set(members), each, tiny)
        else:
            assert_best(q, chosen, len(choose(logits, group_logits, layout, routing).weights), tiny)
        expected = {e: w.item() for e, w in combine({e: log_q[e] for e in chosen}, normalization).items()}
        assert chosen == pytest.approx(expected, rel=rtol, abs=tiny)
    (gradient,) = torch.autograd.grad((out.weights * torch.randn_like(out.weights)).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_sigmoid_scores_that_underflow_are_renormalised(dtype):
    """Group logits -800 and -801, both kept: the scores have the ratio e and, renormalised, the sum 1."""
    case = build_case("two_level_sigmoid", Layout((1, 1, 1), (8, 8, 8)), normalization="none", experts_per_tok=2)
    out = probe(case, dtype)(torch.tensor([[0.0, 0.0, 0.0, -801.0, -900.0, -800.0]], dtype=dtype))
    share = 1 / (1 + math.exp(-1))
    assert as_dict(out, 0, case) == pytest.approx({2: share, 0: 1 - share}, rel=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_tied_logits_give_distinct_experts(router):
    case = build_case(router, top_p=0.99)
    module = probe(case)
    out = module(torch.zeros(1, module.weight.shape[1], dtype=torch.float64))
    chosen = as_dict(out, 0, case)
    assert len(chosen) == case.routing.experts_per_tok
    assert sum(chosen.values()) == pytest.approx(1, rel=1e-12)
    if out.group_index is not None:
        kept = out.group_index[0].tolist()
        assert len(set(kept)) == len(kept)
        assert {case.layout.group_of(e) for e in chosen} <= set(kept)


@pytest.mark.parametrize("mode", ["bf16", "bf16_input", "autocast"])
@pytest.mark.parametrize("router", ROUTERS)
def test_routing_is_in_float32(router, mode):
    case = build_case(router)
    module = make_router(case, hidden_size=64, std=0.2).to(torch.bfloat16 if mode == "bf16" else torch.float32)
    x = torch.randn(5, 64, dtype=torch.float32 if mode == "autocast" else torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        out = module(x)
    assert all(value.dtype == torch.float32 for value in floats(out))
    assert_same(module, out, reference_tokens(module, x, case), case, rtol=2e-5, atol=2e-6)
    factors = torch.randn(5, case.layout.num_experts + 1)
    inputs = [x, *module.parameters()]
    for leaf, gradient in zip(
        inputs, torch.autograd.grad((out.weights * factors.gather(-1, out.index)).sum(), inputs), strict=True
    ):
        assert gradient.dtype == leaf.dtype
        assert gradient.abs().max() > 1e-3


def test_correction_is_for_the_choice():
    """Strength 0.5 takes (4, 0, 0, 0) off the logits: expert 2 replaces expert 0 in group 0 (ids 0 and 2)."""
    case = build_case("grouped_top_k", Layout((2, 2), (8, 16)), experts_per_tok=2, ema_strength=0.5)
    router = probe(case)
    router.logit_ema_E.copy_(torch.tensor([8.0, 0.0, 0.0, 0.0]))
    x = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    out = router(x)
    total = math.exp(2) + math.exp(1)
    assert as_dict(out, 0, case) == pytest.approx({2: math.exp(2) / total, 1: math.exp(1) / total}, rel=1e-12)
    assert torch.equal(out.logits, x)


def test_mean_logits_are_a_buffer_in_the_state_dict():
    router = make_router(build_case("grouped_top_k", ema_strength=0.01))
    assert router.state_dict()["logit_ema_E"].shape == (12,)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    router.logit_pending.fill_(1)
    router.init_weights(0.02)
    assert not any(buffer.any() for buffer in (router.logit_ema_E, router.logit_pending))
