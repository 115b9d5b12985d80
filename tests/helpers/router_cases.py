"""Routers of every kind with random or exact weights, and their comparison with tests/reference.py."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from reference import Layout, Routing, route

from mohge import MoHGEConfig
from mohge.routing_mohge import MoHGERouter, RouterOutput


HIDDEN = 6

# name -> router_type, group_score_function
ROUTERS = {
    "two_level_sigmoid": ("two_level", "sigmoid"),
    "two_level_softmax": ("two_level", "softmax"),
    "two_level_expert_logsumexp": ("two_level", "expert_logsumexp"),
    "top_k": ("top_k", "sigmoid"),
    "top_p": ("top_p", "sigmoid"),
    "grouped_top_k": ("grouped_top_k", "sigmoid"),
}
NORMALIZATIONS = ["sum", "softmax", "none"]

EQUAL = Layout((3, 3, 3), (8, 16, 40))
UNEQUAL = Layout((2, 4, 6), (8, 24, 32))
LAYOUTS = {
    "equal_groups": EQUAL,
    "unequal_groups": UNEQUAL,
    "coprime_groups": Layout((3, 2, 4), (8, 16, 24)),
    "one_group": Layout((5,), (16,)),
    "groups_of_one": Layout((1, 1, 1, 1), (8, 8, 24, 32)),
}


@dataclass(frozen=True)
class Case:
    layout: Layout
    routing: Routing


def build_case(router, layout=UNEQUAL, **fields):
    """A case that is valid for any router and layout; by default some but not all experts and groups are chosen."""
    router_type, score = ROUTERS[router]
    groups = kept = layout.num_groups
    if router_type == "two_level":
        kept = fields.get("groups_per_tok", min(groups, 2))
    if router_type == "grouped_top_k":
        chosen = groups * min(2, *layout.counts)
    else:
        chosen = min(3, sum(sorted(layout.counts)[:kept]))
    fields = {"experts_per_tok": chosen, "groups_per_tok": kept, "group_score_function": score, **fields}
    return Case(layout, Routing(router_type, **fields))


def make_config(case, **kwargs):
    layout, routing = case.layout, case.routing
    fields = {
        "vocab_size": 32,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 2,
        "moe_intermediate_sizes": list(layout.widths),
        "num_experts_per_group": list(layout.counts),
        "num_experts_per_tok": routing.experts_per_tok,
        "num_groups_per_tok": routing.groups_per_tok,
        "shared_expert_intermediate_size": 0,
        "router_type": routing.router_type,
        "group_score_function": routing.group_score_function,
        "topk_weight_normalization": routing.normalization,
        "router_top_p": routing.top_p,
        "router_logit_ema_strength": routing.ema_strength,
        "routed_scaling_factor": 3.0,  # comes after routing: neither weights nor losses may contain it
    }
    return MoHGEConfig(**fields | kwargs)


def make_router(case, seed=0, std=0.8, **kwargs):
    """A float64 router with random weights."""
    torch.manual_seed(seed)
    router = MoHGERouter(make_config(case, **kwargs)).double().eval()
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


def reference_tokens(router, x, case):
    """The reference's tokens for the router's weights, in float64."""
    group_weight = router.group_weight.double() if case.routing.has_group_router else None
    ema = list(router.logit_ema_E.double()) if case.routing.ema_strength else None
    return route(x.double(), router.weight.double(), group_weight, case.layout, case.routing, ema)


def floats(out):
    """The outputs that are no indices."""
    return [value for value in (out.logits, out.weights, out.group_logits) if value is not None]


def as_dict(out, t, case):
    """Expert id -> combine weight of token `t`, without masked slots."""
    slots = zip(out.index[t].tolist(), out.weights[t].tolist(), strict=True)
    pairs = [(e, w) for e, w in slots if e != case.layout.num_experts]
    assert len({e for e, _ in pairs}) == len(pairs), f"an expert twice in {pairs}"
    return dict(pairs)


def numbers(values):
    return [value.item() for value in values]


def assert_same(router, out, tokens, case, rtol=1e-10, atol=1e-12):
    """All of what a router returned against the reference's tokens."""
    two_level = case.routing.router_type == "two_level"
    close = partial(pytest.approx, rel=rtol, abs=atol)
    assert isinstance(out, RouterOutput)
    assert (out.group_logits is not None) == (out.group_index is not None) == two_level
    group_logits = out.group_logits if two_level else router.group_logits(out.logits)
    assert out.logits.shape[0] == group_logits.shape[0] == len(tokens)
    assert out.weights.shape == out.index.shape == (len(tokens), case.routing.experts_per_tok)
    assert out.index.dtype == torch.int64
    assert (out.weights[out.index == case.layout.num_experts] == 0).all()
    for t, token in enumerate(tokens):
        assert out.logits[t].tolist() == close(numbers(token.logits))
        assert group_logits[t].tolist() == close(numbers(token.group_logits))
        assert as_dict(out, t, case) == close({e: w.item() for e, w in token.weights.items()})
    if two_level:
        assert out.group_index.sort(-1).values.tolist() == [sorted(token.groups) for token in tokens]
