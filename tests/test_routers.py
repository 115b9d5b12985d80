"""The four routers against a plain reference, hand-written cases and the routers of Transformers."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from reference import (
    Layout,
    Routing,
    choose,
    combine,
    group_logsumexp,
    log_group_scores,
    log_joint,
    log_softmax,
    route,
)

from mohge import MoHGEConfig
from mohge.routing_mohge import MoHGERouter, RouterOutput


HIDDEN = 6
TOKENS = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads would only wait for each other over tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    counts: tuple[int, ...]
    routing: Routing

    @property
    def layout(self):
        return Layout(self.counts, tuple(8 * (g + 1) for g in range(len(self.counts))))


COUNTS = {
    "equal_groups": (3, 3, 3),
    "unequal_groups": (2, 4, 6),
    "coprime_groups": (3, 2, 4),
    "one_group": (6,),
    "groups_of_one": (1, 1, 1, 1),
    "one_expert": (1,),
}

# router name -> router_type, group_score_function
ROUTERS = {
    "two_level_sigmoid": ("two_level", "sigmoid"),
    "two_level_softmax": ("two_level", "softmax"),
    "two_level_expert_logsumexp": ("two_level", "expert_logsumexp"),
    "top_k": ("top_k", "sigmoid"),
    "top_p": ("top_p", "sigmoid"),
    "grouped_top_k": ("grouped_top_k", "sigmoid"),
}
WITHOUT_GROUP_ROUTER = ["two_level_expert_logsumexp", "top_k", "top_p", "grouped_top_k"]

NORMALIZATIONS = ["sum", "softmax", "none"]


def build_case(router, counts, normalization="sum", experts_per_tok=None, groups_per_tok=None, **kwargs):
    """A valid case for any router and layout; by default some but not all experts and groups are chosen."""
    router_type, score = ROUTERS[router]
    groups = len(counts)
    if router_type != "two_level":
        groups_per_tok = groups
    elif groups_per_tok is None:
        groups_per_tok = min(groups, 2)
    if experts_per_tok is None:
        if router_type == "grouped_top_k":
            experts_per_tok = groups * min(2, min(counts))
        else:
            experts_per_tok = min(3, sum(sorted(counts)[:groups_per_tok]))
    return Case(counts, Routing(router_type, experts_per_tok, groups_per_tok, score, normalization, **kwargs))


def all_experts(router, counts, normalization="sum"):
    return build_case(router, counts, normalization, sum(counts), len(counts), top_p=1.0)


def make_config(case, hidden_size=HIDDEN, **kwargs):
    layout, routing = case.layout, case.routing
    return MoHGEConfig(
        vocab_size=32,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        moe_intermediate_sizes=list(layout.widths),
        num_experts_per_group=list(layout.counts),
        num_experts_per_tok=routing.experts_per_tok,
        num_groups_per_tok=routing.groups_per_tok,
        shared_expert_intermediate_size=0,
        router_type=routing.router_type,
        group_score_function=routing.group_score_function,
        topk_weight_normalization=routing.normalization,
        router_top_p=routing.top_p,
        router_logit_ema_strength=routing.ema_strength,
        **kwargs,
    )


def make_router(case, seed=0, std=0.8, **kwargs):
    """A float64 router with random weights."""
    torch.manual_seed(seed)
    router = MoHGERouter(make_config(case, **kwargs))
    router.init_weights(0.02)
    router = router.double().eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(std * torch.randn_like(parameter))
        if case.routing.ema_strength:
            router.logit_ema_E.copy_(torch.randn(case.layout.num_experts))
    return router


def probe(case, dtype=torch.float64):
    """A router that takes its logits, and behind them its group logits, as its input."""
    experts = case.layout.num_experts
    size = experts + (case.layout.num_groups if case.routing.has_group_router else 0)
    router = make_router(case, hidden_size=size).to(dtype)
    with torch.no_grad():
        router.weight.copy_(torch.eye(size, dtype=dtype)[:experts])
        if case.routing.has_group_router:
            router.group_weight.copy_(torch.eye(size, dtype=dtype)[experts:])
    return router


def reference_inputs(router, case):
    group_weight = router.group_weight if case.routing.has_group_router else None
    ema = list(router.logit_ema_E.double()) if case.routing.ema_strength else None
    return router.weight, group_weight, ema


def run_reference(router, x, case):
    """The reference's tokens for the router's weights."""
    weight, group_weight, ema = reference_inputs(router, case)
    with torch.no_grad():
        group_weight = None if group_weight is None else group_weight.double()
        return route(x.double(), weight.double(), group_weight, case.layout, case.routing, ema)


def floats(out):
    """The outputs that are no indices."""
    return [value for value in (out.logits, out.weights, out.group_logits) if value is not None]


def as_dict(weights, index, num_experts):
    """Expert id -> combine weight of one token, without masked slots."""
    pairs = [(e, w) for e, w in zip(index.tolist(), weights.tolist(), strict=True) if e != num_experts]
    assert len({e for e, _ in pairs}) == len(pairs), f"an expert twice in {index.tolist()}"
    return dict(pairs)


def assert_same(out, tokens, case, rtol=1e-10, atol=1e-12):
    """All of a `RouterOutput` against the reference's tokens."""
    experts, routing = case.layout.num_experts, case.routing
    assert isinstance(out, RouterOutput)
    assert out.logits.shape == (len(tokens), experts)
    if out.group_logits is not None:
        assert out.group_logits.shape == (len(tokens), case.layout.num_groups)
    assert out.weights.shape == out.index.shape == (len(tokens), routing.experts_per_tok)
    assert out.index.dtype == torch.int64
    for t, token in enumerate(tokens):
        assert out.logits[t].tolist() == pytest.approx([v.item() for v in token.logits], rel=rtol, abs=atol)
        if out.group_logits is not None:
            group_logits = [v.item() for v in token.group_logits]
            assert out.group_logits[t].tolist() == pytest.approx(group_logits, rel=rtol, abs=atol)
        expected = {e: w.item() for e, w in token.weights.items()}
        assert as_dict(out.weights[t], out.index[t], experts) == pytest.approx(expected, rel=rtol, abs=atol)
        masked = out.index[t] == experts
        assert masked.sum() == routing.experts_per_tok - len(expected)
        assert (out.weights[t][masked] == 0).all()
        if routing.router_type == "two_level":
            assert out.group_index.shape == (len(tokens), routing.groups_per_tok)
            assert sorted(out.group_index[t].tolist()) == sorted(token.groups)


# Every router, layout and normalisation


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_matches_reference(router, counts, normalization):
    case = build_case(router, counts, normalization)
    module = make_router(case)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    out = module(x)
    assert all(value.dtype == torch.float64 for value in floats(out))
    assert_same(out, run_reference(module, x, case), case)


@pytest.mark.parametrize("router", ROUTERS)
def test_group_logits(router):
    """Those of the group router; without one the logsumexp of each group's expert logits."""
    case = build_case(router, (2, 4, 6))
    module = make_router(case)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    out = module(x)
    if case.routing.has_group_router:
        expected = x @ module.group_weight.T
    else:
        logits = x @ module.weight.T
        # (2, 4, 6) in two sets: 0 | 1 1 | 2 2 2, twice
        expected = torch.stack(
            [logits[:, ids].logsumexp(-1) for ids in ([0, 6], [1, 2, 7, 8], [3, 4, 5, 9, 10, 11])], -1
        )
        if not router.startswith("two_level"):
            assert out.group_logits is None  # what they would be is left to whoever asks
            out = out._replace(group_logits=module.group_logits(out.logits))
    torch.testing.assert_close(out.group_logits, expected, rtol=1e-10, atol=1e-12)


EDGES = {
    **{f"{r}-all_experts": all_experts(r, (2, 4, 6)) for r in ROUTERS if r != "grouped_top_k"},
    "grouped_top_k-all_experts": all_experts("grouped_top_k", (3, 3, 3)),
    **{f"{r}-all_experts_unnormalised": all_experts(r, (3, 3, 3), "none") for r in ROUTERS},
    **{
        f"{r}-all_groups": build_case(r, (2, 4, 6), experts_per_tok=3, groups_per_tok=3)
        for r in ROUTERS
        if r.startswith("two_level")
    },
    **{
        f"{r}-one_group_kept": build_case(r, (2, 4, 6), experts_per_tok=2, groups_per_tok=1)
        for r in ROUTERS
        if r.startswith("two_level")
    },
    **{
        f"{r}-as_many_experts_as_kept_groups_hold": build_case(r, (3, 3, 3), experts_per_tok=6, groups_per_tok=2)
        for r in ROUTERS
        if r.startswith("two_level")
    },
    **{
        f"{r}-one_expert_chosen": build_case(r, (2, 4, 6), "none", experts_per_tok=1)
        for r in ROUTERS
        if r != "grouped_top_k"
    },
    "grouped_top_k-one_expert_of_each_group": build_case("grouped_top_k", (2, 4, 6), experts_per_tok=3),
    "grouped_top_k-corrected": build_case("grouped_top_k", (2, 4, 6), ema_strength=0.7),
    "grouped_top_k-corrected_unnormalised": build_case("grouped_top_k", (3, 3, 3), "none", ema_strength=2.0),
    "top_p-high_p": build_case("top_p", (2, 4, 6), experts_per_tok=12, top_p=0.95),
    "top_p-low_p": build_case("top_p", (2, 4, 6), experts_per_tok=5, top_p=0.2),
}


@pytest.mark.parametrize("tokens", [TOKENS, 1], ids=["tokens", "single_token"])
@pytest.mark.parametrize("case", EDGES.values(), ids=EDGES)
def test_edges_match_reference(case, tokens):
    module = make_router(case, seed=1)
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64)
    assert_same(module(x), run_reference(module, x, case), case)


@pytest.mark.parametrize("router", ROUTERS)
def test_default_weights_of_a_token_sum_to_one(router):
    out = make_router(build_case(router, (2, 4, 6)))(torch.randn(TOKENS, HIDDEN, dtype=torch.float64))
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(TOKENS, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("router", ROUTERS)
def test_weights_are_before_the_routed_scaling_factor(router):
    case = build_case(router, (2, 4, 6))
    module = make_router(case, routed_scaling_factor=3.0)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    assert_same(module(x), run_reference(module, x, case), case)


@pytest.mark.parametrize("router", WITHOUT_GROUP_ROUTER)
def test_no_group_weight_without_a_group_router(router):
    module = make_router(build_case(router, (2, 4, 6)))
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert getattr(module, "group_weight", None) is None


@pytest.mark.parametrize("router", ROUTERS)
def test_group_index_is_for_routers_that_choose_groups(router):
    case = build_case(router, (2, 4, 6))
    out = make_router(case)(torch.randn(TOKENS, HIDDEN, dtype=torch.float64))
    assert (out.group_index is not None) == (case.routing.router_type == "two_level")


def test_init_weights_draws_with_the_given_deviation():
    torch.manual_seed(0)
    router = MoHGERouter(make_config(build_case("two_level_sigmoid", (16, 16, 16)), hidden_size=512))
    router.init_weights(0.3)
    for parameter, shape in ((router.weight, (48, 512)), (router.group_weight, (3, 512))):
        assert parameter.shape == shape
        assert parameter.mean().abs() < 0.05
        assert parameter.std().item() == pytest.approx(0.3, rel=0.1)


# Order of ids


ORDER = {
    # (2, 4, 6): gcd 2, so two sets, each with 1 + 2 + 3 experts
    "unequal_groups": ((2, 4, 6), (0, 1, 1, 2, 2, 2, 0, 1, 1, 2, 2, 2), (0, 0, 1, 0, 1, 2, 1, 2, 3, 3, 4, 5)),
    # (3, 3): three sets with one expert of each group
    "equal_groups": ((3, 3), (0, 1, 0, 1, 0, 1), (0, 0, 1, 1, 2, 2)),
    # (2, 3): gcd 1, so group after group
    "coprime_groups": ((2, 3), (0, 0, 1, 1, 1), (0, 1, 0, 1, 2)),
    "one_group": ((4,), (0, 0, 0, 0), (0, 1, 2, 3)),
    "groups_of_one": ((1, 1, 1), (0, 1, 2), (0, 0, 0)),
    "a_group_of_one": ((4, 1), (0, 0, 0, 0, 1), (0, 1, 2, 3, 0)),
    "one_expert": ((1,), (0,), (0,)),
}


@pytest.mark.parametrize(("counts", "groups", "slots"), ORDER.values(), ids=ORDER)
def test_id_order(counts, groups, slots):
    config = make_config(build_case("top_k", counts))
    assert tuple(config.expert_groups) == groups
    assert tuple(config.expert_slots) == slots
    assert tuple(config.expert_widths) == tuple(8 * (g + 1) for g in groups)
    assert config.num_experts == len(groups)
    # and the reference the other tests lean on
    assert Layout(counts, tuple(range(len(counts)))).experts == list(zip(groups, slots, strict=True))


@pytest.mark.parametrize("router", ["two_level_sigmoid", "two_level_softmax"])
def test_two_level_router_goes_by_id_order(router):
    """Of (2, 4) group 1 holds the ids 1, 2, 4 and 5; it is kept although the best expert, 3, is in group 0."""
    case = build_case(router, (2, 4), "none", experts_per_tok=2, groups_per_tok=1)
    logits = torch.tensor([[8.0, 2.0, 1.0, 9.0, -3.0, 3.0, 0.0, 1.0]], dtype=torch.float64)
    out = probe(case)(logits)
    total = math.exp(2) + math.exp(1) + math.exp(-3) + math.exp(3)
    expected = {5: math.exp(3) / total, 1: math.exp(2) / total}
    assert as_dict(out.weights[0], out.index[0], 6) == pytest.approx(expected, rel=1e-12)
    assert out.group_index.tolist() == [[1]]


def test_expert_logsumexp_router_goes_by_id_order():
    """Of (2, 4) group 0 holds the ids 0 and 3. Its mass e^3 + e^3 beats e^3.5 although 1 is the best expert."""
    case = build_case("two_level_expert_logsumexp", (2, 4), "none", experts_per_tok=2, groups_per_tok=1)
    out = probe(case)(torch.tensor([[3.0, 3.5, -9.0, 3.0, -9.0, -9.0]], dtype=torch.float64))
    assert as_dict(out.weights[0], out.index[0], 6) == pytest.approx({0: 0.5, 3: 0.5}, rel=1e-12)
    assert out.group_index.tolist() == [[0]]
    expected = [3 + math.log(2), math.log(math.exp(3.5) + 3 * math.exp(-9))]
    assert out.group_logits[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_grouped_router_goes_by_id_order():
    """Of (2, 4) group 0 holds 0 and 3, group 1 holds 1, 2, 4 and 5: one expert of each."""
    case = build_case("grouped_top_k", (2, 4), experts_per_tok=2)
    out = probe(case)(torch.tensor([[0.0, 5.0, 4.0, 1.0, 6.0, 3.0]], dtype=torch.float64))
    expected = {3: math.exp(1) / (math.exp(1) + math.exp(6)), 4: math.exp(6) / (math.exp(1) + math.exp(6))}
    assert as_dict(out.weights[0], out.index[0], 6) == pytest.approx(expected, rel=1e-12)


# Two levels by hand


def test_experts_are_chosen_over_kept_groups_together():
    """Two groups of two, both kept, with the scores 0.75 and 0.25; two experts of one group and one of the other."""
    case = build_case("two_level_sigmoid", (2, 2), experts_per_tok=3, groups_per_tok=2)
    # ids 0, 2 in group 0 with p(i|g) 0.6, 0.4; ids 1, 3 in group 1 with 0.9, 0.1
    experts = [math.log(0.6), math.log(0.9), math.log(0.4), math.log(0.1)]
    groups = [math.log(3), -math.log(3)]  # sigmoid: 3/4 and 1/4
    x = torch.tensor([experts + groups], dtype=torch.float64)
    q = {0: 0.45, 1: 0.225, 2: 0.3}
    total = sum(q.values())
    exponentials = {e: math.exp(value) for e, value in q.items()}
    for normalization, expected in (
        ("none", q),
        ("sum", {e: value / total for e, value in q.items()}),
        ("softmax", {e: value / sum(exponentials.values()) for e, value in exponentials.items()}),
    ):
        out = probe(replace(case, routing=replace(case.routing, normalization=normalization)))(x)
        assert as_dict(out.weights[0], out.index[0], 4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("router", "scores"), [("two_level_sigmoid", (0.75, 0.5)), ("two_level_softmax", (3.0, 1.0))])
def test_kept_group_scores_are_renormalised(router, scores):
    """Groups of one expert: q is the group score over the sum of the kept ones, here the last two of three."""
    case = build_case(router, (1, 1, 1), "none", experts_per_tok=2, groups_per_tok=2)
    x = torch.tensor([[7.0, 8.0, 9.0, -1.0, math.log(3), 0.0]], dtype=torch.float64)
    out = probe(case)(x)
    expected = {1: scores[0] / sum(scores), 2: scores[1] / sum(scores)}
    assert as_dict(out.weights[0], out.index[0], 3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("counts", [COUNTS[n] for n in COUNTS if n != "one_expert"], ids=list(COUNTS)[:-1])
def test_expert_logsumexp_of_all_groups_is_the_flat_softmax(counts, normalization):
    experts_per_tok = min(4, sum(counts))
    two_level = build_case("two_level_expert_logsumexp", counts, normalization, experts_per_tok, len(counts))
    flat = build_case("top_k", counts, normalization, experts_per_tok)
    module, flat_module = make_router(two_level), make_router(flat)
    with torch.no_grad():
        flat_module.weight.copy_(module.weight)
    x = torch.randn(200, HIDDEN, dtype=torch.float64)
    out, expected = module(x), flat_module(x)
    assert torch.equal(out.logits, expected.logits)
    order, expected_order = out.index.argsort(-1), expected.index.argsort(-1)
    assert torch.equal(out.index.gather(-1, order), expected.index.gather(-1, expected_order))
    torch.testing.assert_close(
        out.weights.gather(-1, order), expected.weights.gather(-1, expected_order), rtol=1e-12, atol=0
    )


# top_p by hand


def run_top_p(probabilities, p, cap, normalization="sum"):
    """Choice of a top_p router over len(probabilities) experts; probability 0 is a logit of -1000."""
    case = build_case("top_p", (1,) * len(probabilities), normalization, cap, top_p=p)
    logits = [math.log(value) if value else -1000.0 for value in probabilities]
    out = probe(case)(torch.tensor([logits], dtype=torch.float64))
    chosen = as_dict(out.weights[0], out.index[0], len(probabilities))
    masked = out.index[0] == len(probabilities)
    assert out.index.shape == out.weights.shape == (1, cap)
    assert masked.sum() == cap - len(chosen)
    assert (out.weights[0][masked] == 0).all()
    return chosen


TOP_P = {
    # probabilities, p, cap, set with the weights' sum 1
    "two_experts_reach_p": ([0.15, 0.5, 0.05, 0.3], 0.6, 4, {1: 0.5 / 0.8, 3: 0.3 / 0.8}),
    "single_expert_reaches_p": ([0.1, 0.7, 0.1, 0.1], 0.6, 4, {1: 1.0}),
    "exactly_p_is_reached": ([1.0, 1.0, 0.0, 0.0], 0.5, 4, None),
    "at_least_one": ([0.2, 0.3, 0.26, 0.24], 1e-6, 4, {1: 1.0}),
    "cap": ([0.28, 0.26, 0.24, 0.22], 0.9, 2, {0: 0.28 / 0.54, 1: 0.26 / 0.54}),
    "cap_of_one": ([0.28, 0.26, 0.24, 0.22], 0.9, 1, {0: 1.0}),
    "p_of_one_takes_all": ([0.4, 0.3, 0.2, 0.1], 1.0, 4, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}),
    "all_but_one": ([0.4, 0.3, 0.2, 0.1], 0.85, 4, {0: 0.4 / 0.9, 1: 0.3 / 0.9, 2: 0.2 / 0.9}),
    "one_expert": ([1.0], 0.6, 1, {0: 1.0}),
}


@pytest.mark.parametrize(("probabilities", "p", "cap", "expected"), TOP_P.values(), ids=TOP_P)
def test_top_p_set(probabilities, p, cap, expected):
    chosen = run_top_p(probabilities, p, cap)
    if expected is None:  # two equal experts: either
        assert list(chosen.values()) == [1.0]
        assert set(chosen) < {0, 1}
    else:
        assert chosen == pytest.approx(expected, rel=1e-12)


def test_top_p_unnormalised_and_softmax_weights():
    probabilities = [0.15, 0.5, 0.05, 0.3]
    assert run_top_p(probabilities, 0.6, 4, "none") == pytest.approx({1: 0.5, 3: 0.3}, rel=1e-12)
    share = math.exp(0.5) / (math.exp(0.5) + math.exp(0.3))
    assert run_top_p(probabilities, 0.6, 4, "softmax") == pytest.approx({1: share, 3: 1 - share}, rel=1e-12)


def test_top_p_sets_differ_between_tokens():
    case = build_case("top_p", (2, 4), experts_per_tok=3, top_p=0.6)
    x = torch.zeros(3, 6, dtype=torch.float64)
    x[0, 4], x[1, 2], x[1, 3] = 9.0, 9.0, 9.0
    out = probe(case)(x)
    assert (out.index != 6).sum(-1).tolist() == [1, 2, 3]  # the third would need four, but for the cap
    assert set(as_dict(out.weights[0], out.index[0], 6)) == {4}
    assert set(as_dict(out.weights[1], out.index[1], 6)) == {2, 3}


def test_top_p_masked_slots_carry_no_gradient():
    case = build_case("top_p", (2, 4), "none", experts_per_tok=4, top_p=0.6)
    x = torch.tensor([[0.0, 9.0, 0.5, 1.0, -1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    out = probe(case)(x)
    masked = out.index[0] == 6
    assert masked.sum() == 3
    (gradient,) = torch.autograd.grad(out.weights[0][masked].sum(), x, retain_graph=True, allow_unused=True)
    assert gradient is None or (gradient == 0).all()
    (gradient,) = torch.autograd.grad(out.weights[0][~masked].sum(), x)
    p = torch.softmax(x.detach()[0], 0)
    expected = p[1] * (torch.eye(6, dtype=torch.float64)[1] - p)
    torch.testing.assert_close(gradient[0], expected, rtol=1e-10, atol=1e-15)


# Hi-MoE's logit correction


def test_correction_affects_the_choice_only():
    """Strength 0.5 takes (4, 0, 0, 0) off the logits: expert 2 replaces expert 0 in group 0 (ids 0 and 2)."""
    case = build_case("grouped_top_k", (2, 2), experts_per_tok=2, ema_strength=0.5)
    router = probe(case)
    with torch.no_grad():
        router.logit_ema_E.copy_(torch.tensor([8.0, 0.0, 0.0, 0.0]))
    x = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    out = router(x)
    expected = {2: math.exp(2) / (math.exp(2) + math.exp(1)), 1: math.exp(1) / (math.exp(2) + math.exp(1))}
    assert as_dict(out.weights[0], out.index[0], 4) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(out.logits, x)
    if out.group_logits is not None:
        raw = [math.log(math.exp(3) + math.exp(2)), math.log(math.exp(1) + math.exp(0))]
        assert out.group_logits[0].tolist() == pytest.approx(raw, rel=1e-12)


def test_mean_logits_are_a_buffer_in_the_state_dict():
    router = make_router(build_case("grouped_top_k", (2, 4), ema_strength=0.01))
    assert "logit_ema_E" in router.state_dict()
    assert router.logit_ema_E.shape == (6,)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    router.init_weights(0.02)
    assert (router.logit_ema_E == 0).all()


# Extreme logits


def extreme_inputs(case, dtype):
    """Inputs for `probe`: logits and group logits that are several hundred apart, some far below, some far above 0."""
    torch.manual_seed(3)
    split = case.layout.num_experts
    size = split + (case.layout.num_groups if case.routing.has_group_router else 0)
    x = 300 * torch.randn(16, size, dtype=dtype)
    x[1] = -x[1].abs()
    x[2] = x[2].abs()
    if case.routing.has_group_router:
        x[3, split:] -= 600
        x[4, split:] += 600
        if case.routing.group_score_function == "sigmoid":  # scores that all underflow have their own test
            x[:, split:] += (-x[:, split:].max(-1, keepdim=True).values).clamp(min=0)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("counts", [(3, 3, 3), (2, 4, 6)], ids=["equal_groups", "unequal_groups"])
@pytest.mark.parametrize("router", ROUTERS)
def test_extreme_logits_give_a_valid_choice(router, counts, normalization, dtype):
    case = build_case(router, counts, normalization)
    module = probe(case, dtype)
    x = extreme_inputs(case, dtype).requires_grad_()
    out = module(x)
    experts = case.layout.num_experts
    assert all(value.isfinite().all() for value in floats(out))
    for t in range(len(x)):
        chosen = as_dict(out.weights[t], out.index[t], experts)
        assert chosen
        assert all(0 <= e < experts for e in chosen)
        assert max(chosen.values()) > 0
        if normalization != "none":
            assert sum(chosen.values()) == pytest.approx(1, rel=1e-6)
        if case.routing.router_type == "two_level":
            kept = set(out.group_index[t].tolist())
            assert len(kept) == case.routing.groups_per_tok
            assert {case.layout.group_of(e) for e in chosen} <= kept
        if case.routing.router_type == "grouped_top_k":
            each = case.routing.experts_per_tok // case.layout.num_groups
            in_groups = [case.layout.group_of(e) for e in chosen]
            assert all(in_groups.count(g) == each for g in range(case.layout.num_groups))
    (gradient,) = torch.autograd.grad((out.weights * torch.randn_like(out.weights)).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("counts", [(3, 3, 3), (2, 4, 6)], ids=["equal_groups", "unequal_groups"])
@pytest.mark.parametrize("router", ROUTERS)
def test_extreme_logits_match_reference(router, counts, normalization, dtype):
    """Scores under- and overflow here. Those that come out equal in `dtype` may be chosen in any order."""
    case = build_case(router, counts, normalization)
    layout, routing = case.layout, case.routing
    tiny = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    rtol = {torch.float32: 1e-3, torch.float64: 1e-9}[dtype]
    x = extreme_inputs(case, dtype)
    out = probe(case, dtype)(x)

    def assert_best(scores, chosen, number):
        assert len(chosen) == number
        rest = [score for key, score in scores.items() if key not in chosen]
        if rest:
            assert min(scores[key] for key in chosen) >= max(rest) - tiny

    for t, row in enumerate(x.double()):
        logits = list(row[: layout.num_experts])  # the router passes its input on, so nothing has been rounded
        chosen = as_dict(out.weights[t], out.index[t], layout.num_experts)
        if routing.router_type == "two_level":
            group_logits = list(row[layout.num_experts :]) or group_logsumexp(logits, layout)
            kept = set(out.group_index[t].tolist())
            log_scores = log_group_scores(group_logits, routing)
            assert_best({g: score.exp().item() for g, score in enumerate(log_scores)}, kept, routing.groups_per_tok)
            log_q = log_joint(logits, group_logits, kept, layout, routing)
        else:
            group_logits = group_logsumexp(logits, layout)
            log_q = dict(enumerate(log_softmax(logits)))
        q = {e: log.exp().item() for e, log in log_q.items()}
        if routing.router_type == "top_p":
            assert_best(q, chosen, len(choose(logits, group_logits, layout, routing).weights))
        elif routing.router_type == "grouped_top_k":
            each = routing.experts_per_tok // layout.num_groups
            for g in range(layout.num_groups):
                members = layout.members(g)
                assert_best({e: q[e] for e in members}, chosen.keys() & set(members), each)
        else:
            assert_best(q, chosen, routing.experts_per_tok)
        expected = {e: w.item() for e, w in combine({e: log_q[e] for e in chosen}, normalization).items()}
        assert chosen == pytest.approx(expected, rel=rtol, abs=tiny)
        if out.group_logits is not None:
            assert out.group_logits[t].tolist() == pytest.approx([v.item() for v in group_logits], rel=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("normalization", ["sum", "none"])
def test_sigmoid_scores_that_underflow_are_renormalised(normalization, dtype):
    """Group logits -800 and -801, both kept: the scores have the ratio e and, renormalised, the sum 1."""
    case = build_case("two_level_sigmoid", (1, 1, 1), normalization, experts_per_tok=2, groups_per_tok=2)
    x = torch.tensor([[0.0, 0.0, 0.0, -801.0, -900.0, -800.0]], dtype=dtype)
    out = probe(case, dtype)(x)
    share = 1 / (1 + math.exp(-1))
    assert as_dict(out.weights[0], out.index[0], 3) == pytest.approx({2: share, 0: 1 - share}, rel=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_tied_logits_give_distinct_experts(router):
    case = build_case(router, (2, 4, 6), top_p=0.99)
    module = probe(case)
    out = module(torch.zeros(3, module.weight.shape[1], dtype=torch.float64))
    for t in range(3):
        chosen = as_dict(out.weights[t], out.index[t], 12)
        assert len(chosen) == case.routing.experts_per_tok
        assert sum(chosen.values()) == pytest.approx(1, rel=1e-12)
        if out.group_index is not None:
            kept = out.group_index[t].tolist()
            assert len(set(kept)) == len(kept)
            assert {case.layout.group_of(e) for e in chosen} <= set(kept)


# Gradients


def backward(outputs, inputs):
    gradients = torch.autograd.grad(outputs, inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, gradients, strict=True)]


GRADIENT_CASES = {
    **{
        f"{r}-{name}-{n}": build_case(r, COUNTS[name], n)
        for r in ROUTERS
        for name in COUNTS
        for n in NORMALIZATIONS
        if name != "one_expert"
    },
    "grouped_top_k-corrected": EDGES["grouped_top_k-corrected"],
    "top_p-high_p": EDGES["top_p-high_p"],
    "two_level_sigmoid-all_experts": EDGES["two_level_sigmoid-all_experts"],
    "two_level_expert_logsumexp-all_groups": EDGES["two_level_expert_logsumexp-all_groups"],
}


@pytest.mark.parametrize("case", GRADIENT_CASES.values(), ids=GRADIENT_CASES)
def test_gradients_of_weights_match_reference(case):
    module = make_router(case, seed=4)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(TOKENS, case.layout.num_experts + 1, dtype=torch.float64)  # a factor for each expert
    parameters = [x, *module.parameters()]

    out = module(x)
    gradients = backward((out.weights * factors.gather(-1, out.index)).sum(), parameters)

    weight, group_weight, ema = reference_inputs(module, case)
    tokens = route(x, weight, group_weight, case.layout, case.routing, ema)
    total = sum(w * factors[t, e] for t, token in enumerate(tokens) for e, w in token.weights.items())
    expected = backward(total, parameters)

    assert expected[0].abs().max() > 1e-2  # there is something to compare
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_of_logits_match_reference(router):
    """Group logits of a router that chooses no groups are left out: whether they have a gradient is its own affair."""
    case = build_case(router, (2, 4, 6))
    module = make_router(case, seed=5)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(TOKENS, case.layout.num_experts, dtype=torch.float64)
    group_factors = torch.randn(TOKENS, case.layout.num_groups, dtype=torch.float64)
    parameters = [x, *module.parameters()]

    out = module(x)
    total = (out.logits * factors).sum()
    if case.routing.router_type == "two_level":
        total = total + (out.group_logits * group_factors).sum()
    else:
        group_factors.zero_()
    gradients = backward(total, parameters)

    weight, group_weight, ema = reference_inputs(module, case)
    total = sum(
        sum(a * b for a, b in zip(token.logits, factors[t], strict=True))
        + sum(a * b for a, b in zip(token.group_logits, group_factors[t], strict=True))
        for t, token in enumerate(route(x, weight, group_weight, case.layout, case.routing, ema))
    )
    expected = backward(total, parameters)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert wanted.abs().max() > 1e-2
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS)
def test_gradcheck(router):
    case = build_case(router, (2, 4, 6), "none")
    module = make_router(case, seed=6)
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)

    def scores(x, *parameters):
        values = dict(zip([name for name, _ in module.named_parameters()], parameters, strict=True))
        out = torch.func.functional_call(module, values, (x,))
        return tuple(value for value in floats(out) if value.requires_grad)

    parameters = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
    assert torch.autograd.gradcheck(scores, (x, *parameters), eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


# Dtypes


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bf16_weights", "float32_weights"])
@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_input_is_routed_in_float32(router, weight_dtype):
    case = build_case(router, (2, 4, 6))
    module = make_router(case, seed=7, hidden_size=64, std=0.2).to(weight_dtype)
    x = torch.randn(TOKENS, 64).to(torch.bfloat16)
    out = module(x)
    assert all(value.dtype == torch.float32 for value in floats(out))
    assert_same(out, run_reference(module, x, case), case, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_autocast_leaves_routing_in_float32(router):
    case = build_case(router, (2, 4, 6))
    module = make_router(case, seed=7, hidden_size=64, std=0.2).float()
    x = torch.randn(TOKENS, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert all(value.dtype == torch.float32 for value in floats(out))
    assert_same(out, run_reference(module, x, case), case, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_bf16_weights_receive_gradients(router):
    case = build_case(router, (2, 4, 6))
    module = make_router(case, seed=8).bfloat16()
    x = torch.randn(TOKENS, HIDDEN).to(torch.bfloat16).requires_grad_()
    out = module(x)
    factors = torch.randn(TOKENS, case.layout.num_experts + 1)
    gradients = torch.autograd.grad((out.weights * factors.gather(-1, out.index)).sum(), [x, *module.parameters()])
    assert all(gradient.dtype == torch.bfloat16 and gradient.abs().max() > 1e-3 for gradient in gradients)


# The routers of Transformers


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "unnormalised"])
def test_flat_top_k_is_the_router_of_olmoe(normalize):
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    case = build_case("top_k", (8,), "sum" if normalize else "none", experts_per_tok=3)
    module = make_router(case).float()
    theirs = OlmoeTopKRouter(
        OlmoeConfig(hidden_size=HIDDEN, num_experts=8, num_experts_per_tok=3, norm_topk_prob=normalize)
    )
    with torch.no_grad():
        theirs.weight.copy_(module.weight)
    x = torch.randn(64, HIDDEN)
    assert_same_as_theirs(module(x), theirs(x))


def test_flat_top_k_is_the_router_of_mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    module = make_router(build_case("top_k", (8,), experts_per_tok=2)).float()
    theirs = MixtralTopKRouter(MixtralConfig(hidden_size=HIDDEN, num_local_experts=8, num_experts_per_tok=2))
    with torch.no_grad():
        theirs.weight.copy_(module.weight)
    x = torch.randn(64, HIDDEN)
    assert_same_as_theirs(module(x), theirs(x))


def assert_same_as_theirs(out, theirs):
    logits, weights, index = theirs
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(out.index.sort(-1).values, index.sort(-1).values)
    ours = torch.zeros_like(logits).scatter(-1, out.index, out.weights)
    torch.testing.assert_close(ours, torch.zeros_like(logits).scatter(-1, index, weights), rtol=1e-5, atol=1e-7)
