"""Two-level routing against a reference that goes token by token, in float64."""

import re
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from kernel_cases import Recorder, assert_close, assert_equal, each_implementation, on_gpu
from torch._dynamo.testing import CompileCounterWithBackend

from mohge_kernels.routing import two_level_route


@dataclass(frozen=True)
class Routing:
    """Sizes and logits of one call."""

    counts: tuple[int, ...] = (3, 5, 1, 4)
    """Experts of each group."""
    tokens: int = 19
    top_k: int = 4
    kept: int = 2
    sigmoid: bool = False
    ids: str = "interleaved"
    """Order of the ids: `"by_group"`, `"interleaved"` (one expert of each group in turn) or `"shuffled"`."""
    saturated: float = 0.0
    """Distance from 0 to which all logits are moved, up or down at random."""
    strided: bool = False
    """Logits, and the gradient of the scores, by columns."""
    int32: bool = False

    def arguments(self, device: str, seed: int = 0) -> tuple:
        generator = torch.Generator().manual_seed(seed)
        experts, groups = sum(self.counts), len(self.counts)
        logits = [torch.randn(self.tokens, number, generator=generator) * 2 for number in (experts, groups)]
        for values in logits:
            values += self.saturated * torch.where(torch.rand(values.shape, generator=generator) < 0.5, -1, 1)
        if self.strided:
            logits = [values.t().contiguous().t() for values in logits]
        dtype = torch.int32 if self.int32 else torch.int64
        groups_of_experts = torch.tensor(self.groups(), dtype=dtype, device=device)
        return *(values.to(device) for values in logits), groups_of_experts, self.top_k, self.kept, self.sigmoid

    def groups(self) -> list[int]:
        """The group of each id."""
        by_group = [(group, i) for group, count in enumerate(self.counts) for i in range(count)]
        if self.ids == "interleaved":
            by_group.sort(key=lambda place: place[::-1])
        if self.ids == "shuffled":
            order = torch.randperm(len(by_group), generator=torch.Generator().manual_seed(3))
            by_group = [by_group[i] for i in order]
        return [group for group, _ in by_group]

    def grad(self, device: str) -> torch.Tensor:
        grad = torch.randn(self.tokens, self.top_k, generator=torch.Generator().manual_seed(7))
        return (grad.t().contiguous().t() if self.strided else grad).to(device)


CASES = {
    "unequal_groups": Routing(),
    "by_group": Routing(ids="by_group"),
    "shuffled": Routing(ids="shuffled", int32=True),
    "powers_of_two": Routing(counts=(4,) * 4, tokens=16, kept=3),
    "paper": Routing(counts=(8,) * 8, top_k=6, kept=4, tokens=17),
    "one_group": Routing(counts=(7,), kept=1, top_k=3),
    "one_expert": Routing(counts=(1,), kept=1, top_k=1),
    "groups_of_one": Routing(counts=(1,) * 6, kept=3, top_k=2),
    "one_group_kept": Routing(counts=(4, 6, 5), kept=1),
    "all_groups_kept": Routing(kept=4),
    "all_experts_of_the_groups_kept": Routing(counts=(3, 3, 3, 3), top_k=6),
    "all_experts": Routing(kept=4, top_k=13),
    "one_slot": Routing(top_k=1),
    "one_slot_and_group": Routing(top_k=1, kept=1),
    "odd_sizes": Routing(counts=(9, 1, 17, 4, 6), top_k=7, kept=4, tokens=13),
    "one_token": Routing(tokens=1),
    "many_tokens": Routing(tokens=37, counts=(2, 3, 4)),
    "columns_first": Routing(strided=True),
    "saturated": Routing(saturated=80.0, kept=3, counts=(4, 6, 5, 4)),
    "beyond_512_experts": Routing(counts=(70, 90, 110, 30, 250), top_k=9, kept=3, tokens=5),
}
CASES |= {f"{name}_sigmoid": replace(case, sigmoid=True) for name, case in CASES.items()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

TIED = 2e-5
"""Scores closer than this, relative to both where they are above 1, may come in either order in float32."""


def choose(logits, group_logits, group_of_expert, top_k, kept, sigmoid) -> tuple[torch.Tensor, ...]:
    """The rule, token by token: ids, groups, and whether no two candidates of a token are as good as tied."""
    chosen, chosen_groups, decided = [], [], []
    group_of_expert = group_of_expert.tolist()
    for scores, group_scores in zip(logits.double().cpu(), group_logits.double().cpu(), strict=True):
        groups = sorted(range(len(group_scores)), key=lambda g: (-group_scores[g].item(), g))
        members = [e for e, g in enumerate(group_of_expert) if g in groups[:kept]]
        joint = log_scores_of_token(scores, group_scores, group_of_expert, groups[:kept], members, sigmoid).tolist()
        ranked = sorted(zip(joint, members, strict=True), key=lambda pair: (-pair[0], pair[1]))
        chosen.append([e for _, e in ranked[:top_k]])
        chosen_groups.append(groups[:kept])
        decided.append(
            distinct([group_scores[g].item() for g in groups[: kept + 1]])
            and distinct([score for score, _ in ranked[: top_k + 1]])
        )
    shape = logits.shape[0], -1
    sizes = (logits.shape[0], top_k), (logits.shape[0], kept)
    ids, groups = (torch.tensor(x).long().reshape(s) for x, s in zip((chosen, chosen_groups), sizes, strict=True))
    return ids, groups, torch.tensor(decided, dtype=torch.bool).reshape(shape[:1])


def distinct(scores: list[float]) -> bool:
    return all(a - b > TIED * max(1, min(abs(a), abs(b))) for a, b in pairwise(scores))


def log_scores_of_token(logits, group_logits, group_of_expert, groups, experts, sigmoid) -> torch.Tensor:
    """log p(e | g) + log p(g | groups kept) of some experts of the groups kept."""
    group_scores = [torch.nn.functional.logsigmoid(group_logits[g]) if sigmoid else group_logits[g] for g in groups]
    group_scores = torch.stack(group_scores).log_softmax(0)
    scores = []
    for e in experts:
        g = group_of_expert[e]
        peers = [i for i, other in enumerate(group_of_expert) if other == g]
        scores.append(logits[peers].log_softmax(0)[peers.index(e)] + group_scores[groups.index(g)])
    return torch.stack(scores)


def reference(arguments: tuple, index: torch.Tensor, group_index: torch.Tensor, grad: torch.Tensor) -> dict:
    """Log-scores of a choice, and their gradients."""
    logits, group_logits, group_of_expert, *_, sigmoid = arguments
    logits, group_logits = (x.detach().cpu().double().requires_grad_() for x in (logits, group_logits))
    score = partial(log_scores_of_token, group_of_expert=group_of_expert.tolist(), sigmoid=sigmoid)
    rows = [
        score(logits[t], group_logits[t], groups=group_index[t].tolist(), experts=index[t].tolist())
        for t in range(len(logits))
    ]
    log_scores = torch.stack(rows)
    d_logits, d_group_logits = torch.autograd.grad(log_scores, [logits, group_logits], grad.cpu().double())
    return {"log_scores": log_scores.detach(), "d logits": d_logits, "d group_logits": d_group_logits}


def run(arguments: tuple, grad: torch.Tensor, function=two_level_route) -> dict[str, torch.Tensor]:
    """Everything that comes of a call and of its backward pass."""
    logits, group_logits, *rest = arguments
    logits, group_logits = logits.detach().requires_grad_(), group_logits.detach().requires_grad_()
    log_scores, index, group_index = function(logits, group_logits, *rest)
    assert log_scores.dtype == torch.float32
    assert index.dtype == group_index.dtype == torch.int64
    assert not index.requires_grad
    assert not group_index.requires_grad
    gradients = torch.autograd.grad(log_scores, [logits, group_logits], grad)
    results = log_scores.detach(), *gradients, index, group_index
    return dict(zip(("log_scores", "d logits", "d group_logits", "index", "group_index"), results, strict=True))


def check(arguments: tuple, grad: torch.Tensor, actual: dict[str, torch.Tensor]) -> torch.Tensor:
    """Holds a result against the reference; returns which tokens leave no doubt about the choice."""
    index, group_index = actual.pop("index").cpu(), actual.pop("group_index").cpu()
    expected_index, expected_groups, decided = choose(*arguments)
    assert index.shape == expected_index.shape
    assert group_index.shape == expected_groups.shape
    assert torch.equal(index[decided], expected_index[decided])
    assert torch.equal(group_index[decided], expected_groups[decided])
    for ids in (*index.tolist(), *group_index.tolist()):
        assert len(set(ids)) == len(ids)
    expected = reference(arguments, index, group_index, grad)
    assert_close(actual, expected)
    best = reference(arguments, expected_index, expected_groups, grad)["log_scores"]
    torch.testing.assert_close(expected["log_scores"], best, rtol=TIED, atol=TIED)
    return decided


@each_implementation
@each_case
def test_routing_equals_the_reference(case, device):
    arguments, grad = case.arguments(device), case.grad(device)
    assert check(arguments, grad, run(arguments, grad)).all()


@each_implementation
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_ties_go_to_the_lower_id(sigmoid, device):
    case = Routing(counts=(4, 2, 4, 1), kept=3, top_k=6, tokens=6, sigmoid=sigmoid)
    logits, group_logits, *rest = case.arguments(device)
    groups = torch.tensor(case.groups())
    ids = [(groups == g).nonzero().flatten() for g in range(4)]

    def check_all(group_logits, expected_index, expected_groups):
        _, index, group_index = two_level_route(torch.zeros_like(logits), group_logits, *rest)
        assert torch.equal(index.cpu(), expected_index.expand(6, -1))
        assert torch.equal(group_index.cpu(), torch.tensor(expected_groups).expand(6, -1))

    # The smaller a group, the larger the share of each of its experts.
    of_the_large = torch.cat([ids[0], ids[2]]).sort().values
    check_all(torch.full_like(group_logits, -0.5), torch.cat([ids[1], of_the_large[:4]]), [0, 1, 2])
    some_equal = torch.tensor([-0.0, 3.0, 0.0, 3.0], device=device).expand(6, -1)
    check_all(some_equal, torch.cat([ids[3], ids[1], ids[0][:3]]), [1, 3, 0])


@each_implementation
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_many_ties(sigmoid, device):
    """Logits of few values, so that most tokens have ties."""
    case = Routing(counts=(4, 4, 3), kept=2, top_k=5, tokens=40, sigmoid=sigmoid)
    logits, group_logits, *rest = case.arguments(device)
    arguments, grad = (logits.round(), group_logits.round(), *rest), case.grad(device)
    actual = run(arguments, grad)
    # Ties of groups are exact, and so are those of experts of one group.
    assert torch.equal(actual["group_index"].cpu(), choose(*arguments)[1])
    groups = case.groups()
    for scores, ids in zip(arguments[0].cpu().tolist(), actual["index"].tolist(), strict=True):
        for a, b in pairwise(ids):
            assert groups[a] != groups[b] or scores[a] > scores[b] or (scores[a] == scores[b] and a < b)
    assert not check(arguments, grad, actual).all()


@each_implementation
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("distance", [30.0, 80.0, 1e4])
def test_all_logits_far_from_zero(distance, sigmoid, device):
    """Scores are differences of logits: all may be large."""
    case = Routing(kept=3, sigmoid=sigmoid, counts=(3, 5, 2, 4))
    logits, group_logits, *rest = case.arguments(device)
    grad = case.grad(device)
    for sign in (-1, 1):
        arguments = logits + sign * distance, group_logits + sign * distance, *rest
        check(arguments, grad, run(arguments, grad))


@each_implementation
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_no_tokens(sigmoid, device):
    case = Routing(tokens=0, sigmoid=sigmoid)
    actual = run(case.arguments(device), case.grad(device))
    shapes = {name: tuple(value.shape) for name, value in actual.items()}
    assert shapes == {
        "log_scores": (0, 4),
        "d logits": (0, 13),
        "d group_logits": (0, 4),
        "index": (0, 4),
        "group_index": (0, 2),
    }


@each_implementation
def test_slices_and_expanded_inputs(device):
    """Rows with a distance, rows that are all the same, and a gradient that is one number."""
    case = Routing()
    logits, group_logits, *rest = case.arguments(device)
    wide = torch.cat([logits, logits + 1], 1)[:, : logits.shape[1]]
    check((wide, group_logits, *rest), case.grad(device), run((wide, group_logits, *rest), case.grad(device)))
    same = logits[:1].expand_as(logits), group_logits[:1].expand_as(group_logits), *rest
    grad = torch.ones((), device=device).expand(case.tokens, case.top_k)
    check(same, grad, run(same, grad))
    every_second = logits[::2], group_logits[::2], *rest
    check(every_second, grad[::2], run(every_second, grad[::2]))


@each_implementation
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_logits_of_minus_infinity(sigmoid, device):
    """An expert or group that is ruled out comes last, with no weight, and hurts no other."""
    case = Routing(counts=(3, 3, 3, 3), kept=2, top_k=5, sigmoid=sigmoid)
    logits, group_logits, group_of_expert, *rest = case.arguments(device)
    groups = torch.tensor(case.groups())
    logits[:, (groups == 2).nonzero()[0]] = float("-inf")
    logits[:, groups == 3] = float("-inf")
    group_logits[:, 3] = float("-inf")
    group_logits[:, 2] += 9
    arguments = logits, group_logits, group_of_expert, *rest
    actual = run(arguments, case.grad(device))
    expected_index, expected_groups, decided = choose(*arguments)
    assert decided.all()
    assert torch.equal(actual["index"].cpu(), expected_index)
    assert torch.equal(actual["group_index"].cpu(), expected_groups)
    assert_close(
        {name: actual[name] for name in ("log_scores", "d logits", "d group_logits")},
        reference(arguments, expected_index, expected_groups, case.grad(device)),
    )


@pytest.mark.filterwarnings("ignore:invalid value")  # in the interpreter
@each_implementation
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), float("-inf")])
def test_choices_are_distinct_and_in_range_whatever_the_logits(value, sigmoid, device):
    case = Routing(counts=(3, 3, 3, 3), kept=2, top_k=6, sigmoid=sigmoid, tokens=12)
    logits, group_logits, *rest = case.arguments(device)
    logits[0, 3], logits[1], logits[2, ::2], logits[3, 1:] = value, value, value, value
    group_logits[4, 1], group_logits[5], group_logits[6, ::2], group_logits[3, 2] = value, value, value, value
    actual = run((logits, group_logits, *rest), case.grad(device))
    for name, most in (("index", 12), ("group_index", 4)):
        for ids in actual[name].tolist():
            assert len(set(ids)) == len(ids)
            assert set(ids) <= set(range(most))
    others = slice(7, None)  # tokens do not touch each other
    untouched = logits[others], group_logits[others], *rest
    expected = run(untouched, case.grad(device)[others])
    assert_equal({name: x[others] for name, x in actual.items()}, expected)
    if value != value:
        assert (actual["group_index"][4, 0] == 1).all(), "NaN counts as the best"
        assert actual["log_scores"][4].isnan().all()


@each_implementation
def test_fewer_experts_than_slots_give_no_duplicates(device):
    """Which groups are kept is known on the device only: what they lack is filled up with scores of -inf."""
    case = Routing(counts=(1, 1, 5), kept=2, top_k=5, tokens=3)
    logits, group_logits, *rest = case.arguments(device)
    group_logits[:, 2] = -9
    actual = run((logits, group_logits, *rest), case.grad(device))
    groups = torch.tensor(case.groups())
    for ids, scores in zip(actual["index"].tolist(), actual["log_scores"].tolist(), strict=True):
        assert ids[2:] == (groups == 2).nonzero().flatten().tolist()[:3]
        assert sorted(ids[:2]) == (groups != 2).nonzero().flatten().tolist()
        assert [score == float("-inf") for score in scores] == [False, False, True, True, True]
    assert not actual["d logits"].any()  # each group kept has one expert
    grad, order = case.grad(device)[:, :2], actual["index"][:, :2].cpu()
    expected = reference((logits, group_logits, *rest), order, actual["group_index"].cpu(), grad)
    assert_close({"d group_logits": actual["d group_logits"]}, {"d group_logits": expected["d group_logits"]})


@each_implementation
@pytest.mark.parametrize("case", [CASES["paper"], CASES["odd_sizes_sigmoid"]], ids=["paper", "odd_sizes_sigmoid"])
def test_repeatable_bit_for_bit(case, device):
    arguments, grad = case.arguments(device), case.grad(device)
    expected = run(arguments, grad)
    for _ in range(3):
        assert_equal(run(arguments, grad), expected)
    # Nor does a token depend on the others.
    some = arguments[0][3:10], arguments[1][3:10], *arguments[2:]
    assert_equal(run(some, grad[3:10]), {name: value[3:10] for name, value in expected.items()})


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
@pytest.mark.parametrize("name", ["unequal_groups", "columns_first"])
def test_one_kernel_each_way(name, device, launches):
    case = CASES[name]
    run(case.arguments(device), case.grad(device))
    assert launches == ["route_kernel", "route_backward_kernel"]


@each_implementation
def test_gradient_of_one_input_only(device):
    case = CASES["unequal_groups"]
    arguments, grad = case.arguments(device), case.grad(device)
    expected = run(arguments, grad)
    for i, name in enumerate(("logits", "group_logits")):
        inputs = [x.detach() if torch.is_tensor(x) else x for x in arguments]
        inputs[i].requires_grad_()
        (actual,) = torch.autograd.grad(two_level_route(*inputs)[0], [inputs[i]], grad)
        assert torch.equal(actual, expected[f"d {name}"])
    with torch.no_grad():
        assert not two_level_route(*inputs)[0].requires_grad


# The model


CONFIGS = {
    "default": {},
    "unequal_groups": {"num_experts_per_group": [4, 2, 6]},
    "one_group_kept": {"num_groups_per_tok": 1, "num_experts_per_tok": 2},
    "all_groups_kept": {"num_groups_per_tok": 3, "num_experts_per_tok": 5},
    "one_group": {"num_experts_per_group": 5, "moe_intermediate_sizes": [16], "num_groups_per_tok": 1},
}


@each_implementation
@pytest.mark.parametrize("scores", ["sigmoid", "softmax", "expert_logsumexp"])
@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_agrees_with_the_router_of_the_model(changes, scores, device):
    mohge = pytest.importorskip("mohge", reason="needs the model")
    from mohge.routing_mohge import MoHGERouter

    sizes = {"moe_intermediate_sizes": [16, 24, 32], "num_experts_per_group": 4, "num_experts_per_tok": 3}
    config = mohge.MoHGEConfig(
        hidden_size=32, num_attention_heads=2, router_type="two_level", group_score_function=scores, **sizes | changes
    )
    torch.manual_seed(0)
    router = MoHGERouter(config)
    router.init_weights(std=0.5)
    router.to(device)
    hidden = torch.randn(18, 32, device=device)
    grad = torch.randn(18, config.num_experts_per_tok, device=device)
    group_of_expert = torch.tensor(config.expert_groups, device=device)

    def ours(logits):
        from_experts = scores == "expert_logsumexp"
        group_logits = router.group_logits(logits) if from_experts else hidden @ router.group_weight.T
        log_scores, index, group_index = two_level_route(
            logits,
            group_logits,
            group_of_expert,
            config.num_experts_per_tok,
            config.num_groups_per_tok,
            scores == "sigmoid",
        )
        return group_index, group_logits, log_scores, index

    results = []
    for route in (ours, partial(router._route_two_level, hidden)):
        group_index, _, log_scores, index = route(hidden @ router.weight.T)
        gradients = torch.autograd.grad(log_scores, list(router.parameters()), grad)
        results.append(({"index": index, "groups": group_index}, {"log_scores": log_scores.detach()}, gradients))
    (choice, log_scores, gradients), (expected_choice, expected_scores, expected_gradients) = results
    assert_equal(choice, expected_choice)
    assert_close(log_scores, {name: x.cpu() for name, x in expected_scores.items()})
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        # Both are float32, and sums over 18 tokens.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6 * grad.norm().item())
        assert config.num_groups_per_tok == 1 or expected.any()


# The operators


def strided(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


CHECKED = {
    "unequal_groups": CASES["unequal_groups"],
    "sigmoid": CASES["odd_sizes_sigmoid"],
    "strided": CASES["columns_first"],
    "int32": CASES["shuffled"],
    "no_tokens": Routing(tokens=0),
}


@each_implementation
@pytest.mark.parametrize("case", CHECKED.values(), ids=CHECKED.keys())
@pytest.mark.parametrize("differentiable", [True, False], ids=["grad", "no_grad"])
def test_forward_passes_opcheck(case, differentiable, device):
    logits, group_logits, *rest = case.arguments(device)
    logits.requires_grad_(differentiable)
    group_logits.requires_grad_(differentiable)
    torch.library.opcheck(torch.ops.mohge_kernels.two_level_route, (logits, group_logits, *rest))


@each_implementation
@pytest.mark.parametrize("case", CHECKED.values(), ids=CHECKED.keys())
def test_backward_passes_opcheck(case, device):
    logits, group_logits, group_of_expert, *_, sigmoid = arguments = case.arguments(device)
    _, index, group_index = two_level_route(*arguments)
    if case.strided:
        index, group_index = strided(index), strided(group_index)
    torch.library.opcheck(
        torch.ops.mohge_kernels.two_level_route_backward,
        (case.grad(device), logits, group_logits, group_of_expert, index, group_index, sigmoid),
    )


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
@pytest.mark.parametrize("name", ["unequal_groups", "odd_sizes_sigmoid", "columns_first"])
def test_compiled_equals_eager_mode(name, device):
    arguments, grad = CASES[name].arguments(device), CASES[name].grad(device)
    compiled = torch.compile(two_level_route, fullgraph=True, backend="aot_eager")
    assert_equal(run(arguments, grad, compiled), run(arguments, grad))


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
def test_one_graph_for_any_number_of_tokens(device):
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(two_level_route, fullgraph=True, backend=backend)

    def function(logits, group_logits, *rest):
        for tensor in (logits, group_logits):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(logits, group_logits, *rest)

    for tokens in (9, 5, 23, 2):
        case = Routing(tokens=tokens)
        arguments, grad = case.arguments(device), case.grad(device)
        assert_equal(run(arguments, grad, function), run(arguments, grad))
    assert backend.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
def test_compiled_for_other_numbers_of_tokens(device):
    """Sizes that the compiler treats apart: none and one."""
    compiled = torch.compile(two_level_route, fullgraph=True, backend="aot_eager")
    for tokens in (7, 1, 11, 0):
        case = Routing(tokens=tokens)
        arguments, grad = case.arguments(device), case.grad(device)
        assert_equal(run(arguments, grad, compiled), run(arguments, grad))


@on_gpu
def test_captured_in_a_graph(device):
    case = CASES["paper"]
    arguments, grad = case.arguments(device), case.grad(device)
    expected = run(arguments, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(arguments, grad)
    graph.replay()
    assert_equal(actual, expected)


@on_gpu
@pytest.mark.parametrize("name", ["paper", "paper_sigmoid"])
def test_large(name, device):
    """As many tokens as in training, against the rule in PyTorch on the CPU."""
    case = replace(CASES[name], tokens=8192)
    arguments, grad = case.arguments(device), case.grad(device)
    actual = run(arguments, grad)
    expected = run(tuple(x.cpu() if torch.is_tensor(x) else x for x in arguments), grad.cpu())
    same = (actual["index"].cpu() == expected["index"]).all(1)
    assert same.float().mean() > 0.999
    for name in ("log_scores", "d logits", "d group_logits"):
        torch.testing.assert_close(actual[name].cpu()[same], expected[name][same], rtol=1e-4, atol=1e-5)


# Bad input


# name -> the argument that the error must name, and the change that makes a valid call wrong
BAD_INPUTS = {
    "logits_bfloat16": ("logits", lambda a: {"logits": a["logits"].bfloat16()}),
    "logits_float64": ("logits", lambda a: {"logits": a["logits"].double()}),
    "logits_with_one_dimension": ("logits", lambda a: {"logits": a["logits"][0]}),
    "group_logits_float16": ("group_logits", lambda a: {"group_logits": a["group_logits"].half()}),
    "group_logits_of_fewer_tokens": ("group_logits", lambda a: {"group_logits": a["group_logits"][1:]}),
    "group_logits_with_three_dimensions": ("group_logits", lambda a: {"group_logits": a["group_logits"][None]}),
    "more_groups_than_experts": ("group_logits", lambda a: {"group_logits": a["group_logits"].repeat(1, 4)}),
    "group_of_expert_float": ("group_of_expert", lambda a: {"group_of_expert": a["group_of_expert"].float()}),
    "group_of_expert_of_fewer_experts": ("group_of_expert", lambda a: {"group_of_expert": a["group_of_expert"][1:]}),
    "group_of_expert_per_token": ("group_of_expert", lambda a: {"group_of_expert": a["group_of_expert"][None]}),
    "group_logits_on_another_device": ("group_logits", lambda a: {"group_logits": a["group_logits"].to("meta")}),
    "group_of_expert_on_another_device": (
        "group_of_expert",
        lambda a: {"group_of_expert": a["group_of_expert"].to("meta")},
    ),
    "logits_on_another_device": ("logits", lambda a: {"logits": a["logits"].to("meta")}),
    "no_slots": ("top_k", lambda a: {"top_k": 0}),
    "more_slots_than_experts": ("top_k", lambda a: {"top_k": 14, "num_groups_per_tok": 4}),
    "more_slots_than_two_groups_can_hold": ("top_k", lambda a: {"top_k": 12}),
    "no_groups_kept": ("num_groups_per_tok", lambda a: {"num_groups_per_tok": 0}),
    "more_groups_kept_than_there_are": ("num_groups_per_tok", lambda a: {"num_groups_per_tok": 5}),
}
NAMES = "logits", "group_logits", "group_of_expert", "top_k", "num_groups_per_tok", "sigmoid"


@pytest.mark.parametrize("device", ["cpu", "interpreter"], indirect=True)
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name, device, launches):
    named, change = BAD_INPUTS[name]
    arguments = dict(zip(NAMES, Routing().arguments(device), strict=True))
    arguments.update(change(arguments))
    with Recorder() as operators, pytest.raises(ValueError, match=rf"`{named}`") as error:
        two_level_route(**arguments)
    assert "\n" not in str(error.value)
    assert re.search(r"must|move|use \.", str(error.value)), f"no remedy in: {error.value}"
    assert not operators.calls
    assert not launches


@pytest.mark.parametrize("device", ["cpu", "interpreter"], indirect=True)
def test_the_call_that_the_bad_inputs_change_is_valid(device):
    with Recorder() as operators:
        two_level_route(*Routing().arguments(device))
    assert [name for name, _ in operators.calls] == ["two_level_route"]
