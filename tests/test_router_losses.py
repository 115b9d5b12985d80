"""The eight router losses against a plain reference and hand-written cases; the running mean of the router logits."""

import copy
import math
from functools import partial

import pytest
import reference
import torch
from reference import Layout, Routing, Token, batch_value, choose, group_logsumexp, route

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.losses_mohge import router_losses
from mohge.routing_mohge import MoHGERouter, RouterOutput


COEFFICIENTS = {
    "load_balancing": "router_aux_loss_coef",
    "z": "router_z_loss_coef",
    "parameter_penalty": "router_parameter_penalty_coef",
    "entropy": "router_entropy_coef",
    "intra_group": "router_intra_group_coef",
    "inter_group": "router_inter_group_coef",
    "group": "router_group_aux_loss_coef",
    "expert": "router_expert_aux_loss_coef",
}

INTERVAL = 16

# loss as tested -> name, further config fields, reference
LOSSES = {
    "load_balancing": ("load_balancing", {}, reference.load_balancing),
    "z": ("z", {}, reference.z),
    "parameter_penalty": ("parameter_penalty", {}, reference.parameter_penalty),
    "entropy": ("entropy", {}, reference.entropy),
    "intra_group_quadratic": ("intra_group", {}, reference.intra_group_quadratic),
    "intra_group_entropy": ("intra_group", {"router_regularizer": "entropy"}, reference.intra_group_entropy),
    "inter_group_quadratic": ("inter_group", {}, reference.inter_group_quadratic),
    "inter_group_entropy": ("inter_group", {"router_regularizer": "entropy"}, reference.inter_group_entropy),
    "group": ("group", {"group_size_interval": INTERVAL}, partial(reference.group, interval=INTERVAL)),
    "expert_global": ("expert", {}, reference.expert_global),
    "expert_per_group": ("expert", {"router_expert_aux_loss_type": "per_group"}, reference.expert_per_group),
}

ROUTERS = {
    "two_level": ("two_level", "sigmoid"),
    "two_level_expert_logsumexp": ("two_level", "expert_logsumexp"),
    "top_k": ("top_k", "sigmoid"),
    "top_p": ("top_p", "sigmoid"),
    "grouped_top_k": ("grouped_top_k", "sigmoid"),
}

LAYOUTS = {
    "equal_groups": Layout((2, 2, 2), (8, 16, 40)),
    "unequal_groups": Layout((2, 4, 6), (8, 24, 32)),
    "one_group": Layout((5,), (16,)),
    "groups_of_one": Layout((1, 1, 1, 1), (8, 8, 24, 32)),
}
UNEQUAL = LAYOUTS["unequal_groups"]

# True where there is a token: a full row, one padded on the left, one padded on the right
MASK = [[True] * 3, [False, True, True], [True, False, False]]
WEIGHTS = [0.5, 0.125, 0.375]

DEFINED = [
    (loss, router) for loss in LOSSES for router in ROUTERS if loss != "group" or router.startswith("two_level")
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads would only wait for each other over tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_routing(router, layout, **kwargs):
    router_type, score = ROUTERS[router]
    groups = layout.num_groups
    kept = min(groups, 2) if router_type == "two_level" else groups
    if router_type == "grouped_top_k":
        chosen = groups * min(2, min(layout.counts))
    else:
        chosen = min(3, sum(sorted(layout.counts)[:kept]))
    return Routing(
        **{
            "router_type": router_type,
            "experts_per_tok": chosen,
            "groups_per_tok": kept,
            "group_score_function": score,
            **kwargs,
        }
    )


def make_config(layout, routing, coefficients, **kwargs):
    """A config with the losses in `coefficients` (name -> coefficient) and no others."""
    return MoHGEConfig(
        vocab_size=32,
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
        **{field: coefficients.get(name, 0.0) for name, field in COEFFICIENTS.items()},
        **{"hidden_size": 6, **kwargs},
    )


def make_router(config):
    router = MoHGERouter(config)
    router.init_weights(0.02)
    return router.double()


class Batch:
    """Random outputs of a router for the positions of a mask, once as tensors that are leaves and once as tokens."""

    def __init__(self, layout, routing, mask=MASK, seed=0, scale=1.5, logits=None, group_logits=None):
        torch.manual_seed(seed)
        self.layout, self.routing, self.mask = layout, routing, mask
        length = len(mask) * len(mask[0])
        if logits is None:
            logits = scale * torch.randn(length, layout.num_experts)
        self.logits = torch.as_tensor(logits, dtype=torch.float64).clone().requires_grad_()
        self.leaves = {"logits": self.logits}
        if routing.has_group_router:
            if group_logits is None:
                group_logits = scale * torch.randn(length, layout.num_groups)
            self.group_logits = torch.as_tensor(group_logits, dtype=torch.float64).clone().requires_grad_()
            self.leaves["group_logits"] = self.group_logits
        else:
            rows = [torch.stack(group_logsumexp(list(row), layout)) for row in self.logits]
            self.group_logits = torch.stack(rows)

        index = torch.full((length, routing.experts_per_tok), layout.num_experts)
        weights = torch.zeros(length, routing.experts_per_tok, dtype=torch.float64)
        self.group_index = None
        if routing.router_type == "two_level":
            self.group_index = torch.zeros(length, routing.groups_per_tok, dtype=torch.int64)
        for t in range(length):
            choice = choose(list(self.logits[t]), list(self.group_logits[t]), layout, routing)
            for slot, (e, w) in enumerate(choice.weights.items()):
                index[t, slot], weights[t, slot] = e, w.item()
            if self.group_index is not None:
                self.group_index[t] = torch.tensor(sorted(choice.groups))
        self.index = index
        self.weights = weights.requires_grad_()
        self.leaves["weights"] = self.weights

    @property
    def output(self):
        return RouterOutput(self.logits, self.weights, self.index, self.group_logits, self.group_index)

    @property
    def tokens(self):
        tokens = []
        for t in range(len(self.logits)):
            chosen = {
                e: self.weights[t, slot]
                for slot, e in enumerate(self.index[t].tolist())
                if e != self.layout.num_experts
            }
            kept = None if self.group_index is None else set(self.group_index[t].tolist())
            tokens.append(Token(list(self.logits[t]), list(self.group_logits[t]), chosen, kept))
        return tokens

    def losses(self, config, sequence_weights=None, progress=-1.0):
        return run([config], [self.output], self.mask, sequence_weights, progress)

    def expected(self, loss, sequence_weights=None):
        loss = partial(loss, layout=self.layout, routing=self.routing)
        return batch_value(loss, [self.tokens], self.mask, sequence_weights)

    def gradients(self, value):
        """Gradients of a value with respect to logits, group logits and weights; zeros for what it does not touch."""
        leaves = list(self.leaves.values())
        if not value.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        gradients = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(self.leaves.items(), gradients, strict=True)
        }


def run(configs, outputs, mask, sequence_weights=None, progress=-1.0):
    if sequence_weights is not None:
        sequence_weights = torch.tensor(sequence_weights, dtype=torch.float64)
    routers = [make_router(config) for config in configs]
    return router_losses(routers, outputs, torch.tensor(mask), sequence_weights, torch.tensor(progress))


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def all_losses(router, regularizer="quadratic", expert_type="global"):
    """Coefficients for every loss that is defined for a router, the further config fields and the references."""
    names = ["load_balancing", "z", "parameter_penalty", "entropy", f"intra_group_{regularizer}"]
    names += [f"inter_group_{regularizer}", f"expert_{expert_type}"]
    if router.startswith("two_level"):
        names.append("group")
    coefficients = {LOSSES[name][0]: 0.25 + 0.5 * i for i, name in enumerate(names)}
    fields = {
        "router_regularizer": regularizer,
        "router_expert_aux_loss_type": expert_type,
        "group_size_interval": INTERVAL,
    }
    return coefficients, fields, {LOSSES[name][0]: LOSSES[name][2] for name in names}


# Every loss and router against the reference


@pytest.mark.parametrize(
    ("layout", "sequence_weights"),
    [*((layout, None) for layout in LAYOUTS.values()), (UNEQUAL, WEIGHTS)],
    ids=[*LAYOUTS, "unequal_groups-per_sequence"],
)
@pytest.mark.parametrize(("loss", "router"), DEFINED, ids=[f"{loss}-{router}" for loss, router in DEFINED])
def test_matches_reference(loss, router, layout, sequence_weights):
    name, fields, wanted = LOSSES[loss]
    routing = make_routing(router, layout)
    batch = Batch(layout, routing)
    result = batch.losses(make_config(layout, routing, {name: 0.75}, **fields), sequence_weights)
    expected = batch.expected(wanted, sequence_weights)

    assert set(result.values) == {name}
    value = result.values[name]
    assert value.shape == result.aux_loss.shape == ()
    zero = loss == "inter_group_entropy" and layout.num_groups == 1  # all of the mass, whatever the token
    assert zero or abs(expected.item()) > 1e-3
    assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-14)
    assert result.aux_loss.item() == pytest.approx(0.75 * expected.item(), rel=1e-10, abs=1e-14)
    assert_same_gradients(batch.gradients(result.aux_loss), batch.gradients(0.75 * expected))


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("regularizer", ["quadratic", "entropy"])
@pytest.mark.parametrize("router", ROUTERS)
def test_aux_loss_is_the_weighted_sum_of_all(router, regularizer, expert_type, sequence_weights):
    coefficients, fields, wanted = all_losses(router, regularizer, expert_type)
    routing = make_routing(router, UNEQUAL)
    batch = Batch(UNEQUAL, routing, seed=1)
    result = batch.losses(make_config(UNEQUAL, routing, coefficients, **fields), sequence_weights)
    expected = {name: batch.expected(loss, sequence_weights) for name, loss in wanted.items()}
    total = sum(coefficients[name] * value for name, value in expected.items())

    assert {name: value.item() for name, value in result.values.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-10
    )
    assert result.aux_loss.item() == pytest.approx(total.item(), rel=1e-10)
    expected_gradients = batch.gradients(total)
    assert all(gradient.abs().max() > 1e-3 for gradient in expected_gradients.values())
    assert_same_gradients(batch.gradients(result.aux_loss), expected_gradients)


@pytest.mark.parametrize("router", ROUTERS)
def test_router_and_losses_together(router):
    """Gradients through a real router to its input and its weights."""
    coefficients, fields, wanted = all_losses(router)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    torch.manual_seed(2)
    module = make_router(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn_like(parameter))
    x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]

    result = router_losses([module], [module(x)], torch.tensor(MASK), None, torch.tensor(-1.0))
    tokens = route(x, module.weight, module.group_weight if routing.has_group_router else None, UNEQUAL, routing)
    expected = sum(
        coefficients[name] * batch_value(partial(loss, layout=UNEQUAL, routing=routing), [tokens], MASK)
        for name, loss in wanted.items()
    )
    assert result.aux_loss.item() == pytest.approx(expected.item(), rel=1e-10)
    gradients = torch.autograd.grad(result.aux_loss, inputs)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, inputs), strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradcheck(router, sequence_weights):
    """Finite differences of the tensors a loss is given: choices stay as they are, so f is a constant."""
    coefficients, fields, _ = all_losses(router, expert_type="per_group")
    routing = make_routing(router, UNEQUAL)
    batch = Batch(UNEQUAL, routing, seed=3)
    config = make_config(UNEQUAL, routing, coefficients, **fields)

    def aux_loss(logits, weights, *group_logits):
        if group_logits:
            (groups,) = group_logits
        else:
            groups = torch.stack(
                [logits[:, UNEQUAL.members(g)].logsumexp(-1) for g in range(UNEQUAL.num_groups)], dim=-1
            )
        output = RouterOutput(logits, weights, batch.index, groups, batch.group_index)
        return run([config], [output], MASK, sequence_weights).aux_loss

    inputs = [batch.logits, batch.weights] + ([batch.group_logits] if routing.has_group_router else [])
    assert torch.autograd.gradcheck(aux_loss, inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


# By hand


def fixed_output(layout, routing, logits, chosen, group_logits=None, kept=None):
    """An output with given choices: `chosen` lists (expert, weight) pairs for each token."""
    logits = torch.tensor(logits, dtype=torch.float64)
    if group_logits is None:
        group_logits = [[value.item() for value in group_logsumexp(list(row), layout)] for row in logits]
    return RouterOutput(
        logits,
        torch.tensor([[w for _, w in row] for row in chosen], dtype=torch.float64),
        torch.tensor([[e for e, _ in row] for row in chosen]),
        torch.tensor(group_logits, dtype=torch.float64),
        None if kept is None else torch.tensor(kept),
    )


def value_by_hand(name, layout, routing, output, **fields):
    config = make_config(layout, routing, {name: 1.0}, **fields)
    return run([config], [output], [[True] * len(output.logits)]).values[name].item()


def log(*values):
    return [math.log(value) for value in values]


def test_balanced_load_gives_k():
    """Uniform probabilities, every expert chosen equally often: K, as in Transformers."""
    layout, routing = Layout((4,), (8,)), Routing("top_k", 2, 1)
    output = fixed_output(layout, routing, [[0.0] * 4] * 2, [[(0, 0.5), (1, 0.5)], [(3, 0.5), (2, 0.5)]])
    assert value_by_hand("load_balancing", layout, routing, output) == pytest.approx(2, rel=1e-12)


def test_load_balancing_by_hand():
    layout, routing = Layout((2,), (8,)), Routing("top_k", 1, 1)
    output = fixed_output(
        layout, routing, [log(0.9, 0.1), log(0.7, 0.3), log(0.2, 0.8)], [[(0, 1)], [(0, 1)], [(1, 1)]]
    )
    expected = 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4)
    assert value_by_hand("load_balancing", layout, routing, output) == pytest.approx(expected, rel=1e-12)


def test_parameter_penalty_by_hand():
    """Three narrow experts and a wide one: the mean width is that of an expert, 12, not that of a group, 16."""
    layout, routing = Layout((3, 1), (8, 24)), Routing("top_k", 1, 2)
    output = fixed_output(layout, routing, [log(0.4, 0.3, 0.2, 0.1), log(0.1, 0.1, 0.2, 0.6)], [[(0, 1)], [(3, 1)]])
    expected = 4 * (0.5 * 8 / 12 * 0.25 + 0.5 * 24 / 12 * 0.35)
    assert value_by_hand("parameter_penalty", layout, routing, output) == pytest.approx(expected, rel=1e-12)


def test_joint_probability_of_a_two_level_router():
    """p(g) 3/4 and 1/4, p(e|g) 0.5 and 0.5 in both: whatever the scale of the expert logits of a group."""
    layout, routing = Layout((2, 2), (8, 8)), Routing("two_level", 1, 1)
    output = fixed_output(layout, routing, [[5.0, -1.0, 5.0, -1.0]], [[(0, 1)]], [log(3, 1)], [[0]])
    p = [3 / 8, 3 / 8, 1 / 8, 1 / 8]
    by_hand = partial(value_by_hand, layout=layout, routing=routing, output=output)
    assert by_hand("load_balancing") == pytest.approx(4 * 3 / 8, rel=1e-12)
    assert by_hand("entropy") == pytest.approx(-sum(v * math.log(v) for v in p), rel=1e-12)
    assert by_hand("intra_group") == pytest.approx(-sum(v**2 for v in p), rel=1e-12)
    assert by_hand("inter_group") == pytest.approx(9 / 16 + 1 / 16, rel=1e-12)
    mass = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert by_hand("inter_group", router_regularizer="entropy") == pytest.approx(-mass, rel=1e-12)


def test_uniform_probabilities_by_hand():
    layout, routing = Layout((2, 2), (8, 8)), Routing("top_k", 1, 2)
    output = fixed_output(layout, routing, [[1.5] * 4], [[(0, 1)]])
    by_hand = partial(value_by_hand, layout=layout, routing=routing, output=output)
    assert by_hand("z") == pytest.approx((1.5 + math.log(4)) ** 2, rel=1e-12)
    assert by_hand("entropy") == pytest.approx(math.log(4), rel=1e-12)
    assert by_hand("intra_group") == pytest.approx(-1 / 4, rel=1e-12)
    assert by_hand("intra_group", router_regularizer="entropy") == pytest.approx(math.log(4), rel=1e-12)
    assert by_hand("inter_group") == pytest.approx(1 / 2, rel=1e-12)
    assert by_hand("inter_group", router_regularizer="entropy") == pytest.approx(-math.log(2), rel=1e-12)


def test_z_loss_of_a_two_level_router_is_over_experts():
    layout, routing = Layout((1, 1), (8, 8)), Routing("two_level", 1, 1)
    output = fixed_output(layout, routing, [log(3, 1), log(1, 1)], [[(0, 1)], [(0, 1)]], [[9, 9], [9, 9]], [[0], [0]])
    expected = (math.log(4) ** 2 + math.log(2) ** 2) / 2
    assert value_by_hand("z", layout, routing, output) == pytest.approx(expected, rel=1e-12)


def test_group_loss_by_hand():
    """Widths 8 and 24 with interval 16: size factors 1 and 2."""
    layout, routing = Layout((1, 1), (8, 24)), Routing("two_level", 1, 1)
    logits, chosen = [[0.0, 0.0]] * 4, [[(0, 1)], [(1, 1)], [(1, 1)], [(1, 1)]]
    groups = [log(3, 1), log(1, 3), log(1, 3), log(1, 1)]
    output = fixed_output(layout, routing, logits, chosen, groups, [[0], [1], [1], [1]])
    p = [(0.75 + 0.25 + 0.25 + 0.5) / 4, (0.25 + 0.75 + 0.75 + 0.5) / 4]
    expected = 2 * (1 * 0.25 * p[0] + 2 * 0.75 * p[1])
    by_hand = partial(value_by_hand, "group", layout, routing, output)
    assert by_hand(group_size_interval=16) == pytest.approx(expected, rel=1e-12)
    # the interval of the paper makes the factors 1 and 1 + 16 / 1024
    assert by_hand() == pytest.approx(2 * (0.25 * p[0] + (1 + 1 / 64) * 0.75 * p[1]), rel=1e-12)


def test_global_expert_loss_by_hand():
    """E 4, K_e 2, G 2, K_g 1: the factor is E K_g / G = 2."""
    layout, routing = Layout((2, 2), (8, 16)), Routing("two_level", 2, 1)
    # ids 0 and 2 are group 0
    chosen = [[(0, 0.7), (2, 0.3)], [(2, 0.6), (0, 0.4)], [(1, 0.9), (3, 0.1)]]
    output = fixed_output(layout, routing, [[0.0] * 4] * 3, chosen, [[0.0, 0.0]] * 3, [[0], [0], [1]])
    expected = 2 * (2 / 6 * 1.1 / 3 + 2 / 6 * 0.9 / 3 + 1 / 6 * 0.9 / 3 + 1 / 6 * 0.1 / 3)
    assert value_by_hand("expert", layout, routing, output) == pytest.approx(expected, rel=1e-12)


def test_global_expert_loss_of_a_flat_router_keeps_all_groups():
    """Balanced: E sum_e (1/E)(1/E) = 1."""
    layout, routing = Layout((2, 2), (8, 16)), Routing("top_k", 2, 2)
    chosen = [[(0, 0.5), (1, 0.5)], [(2, 0.5), (3, 0.5)]]
    output = fixed_output(layout, routing, [[0.0] * 4] * 2, chosen)
    assert value_by_hand("expert", layout, routing, output) == pytest.approx(1, rel=1e-12)


def test_per_group_expert_loss_is_one_when_balanced_inside_groups():
    """Three tokens go to group 0 (ids 0 and 2), one to group 1: unequal traffic costs the global form only."""
    layout, routing = Layout((2, 2), (8, 16)), Routing("two_level", 2, 1)
    chosen = [[(0, 0.5), (2, 0.5)]] * 3 + [[(1, 0.5), (3, 0.5)]]
    output = fixed_output(layout, routing, [[0.0] * 4] * 4, chosen, [[0.0, 0.0]] * 4, [[0], [0], [0], [1]])
    by_hand = partial(value_by_hand, "expert", layout, routing, output)
    assert by_hand(router_expert_aux_loss_type="per_group") == pytest.approx(1, rel=1e-12)
    assert by_hand() == pytest.approx(2 * 2 * (3 / 8 * 3 / 8 + 1 / 8 * 1 / 8), rel=1e-12)


def test_per_group_expert_loss_by_hand():
    layout, routing = Layout((2, 2), (8, 16)), Routing("two_level", 1, 1)
    chosen = [[(0, 0.8)], [(0, 0.6)], [(2, 0.6)], [(1, 0.5)]]
    output = fixed_output(layout, routing, [[0.0] * 4] * 4, chosen, [[0.0, 0.0]] * 4, [[0], [0], [0], [1]])
    first = 2 * (2 / 3 * 1.4 / 2.0 + 1 / 3 * 0.6 / 2.0)
    second = 2 * 1.0
    value = value_by_hand("expert", layout, routing, output, router_expert_aux_loss_type="per_group")
    assert value == pytest.approx((first + second) / 2, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("count", [1, 4, 64])
def test_per_group_expert_loss_leaves_out_groups_without_traffic(count, dtype):
    """All tokens go to group 0, to its two experts in turn; the size of the empty group does not matter."""
    layout = Layout((2, count), (8, 16))
    routing = Routing("two_level", 1, 1)
    first, second = layout.members(0)
    output = fixed_output(
        layout,
        routing,
        [[0.0] * (2 + count)] * 3,
        [[(first, 0.5)], [(first, 0.5)], [(second, 0.5)]],
        [[0.0, 0.0]] * 3,
        [[0]] * 3,
    )
    logits, weights, index, group_logits, group_index = output
    weights = weights.to(dtype).requires_grad_()
    output = RouterOutput(logits.to(dtype), weights, index, group_logits.to(dtype), group_index)
    config = make_config(layout, routing, {"expert": 1.0}, router_expert_aux_loss_type="per_group")
    result = run([config], [output], [[True] * 3])
    assert result.values["expert"].item() == pytest.approx(2 * (4 / 9 + 1 / 9), rel=1e-6)
    (gradient,) = torch.autograd.grad(result.aux_loss, weights)
    # 2 sum_e f_e w_e / W with W = 3/2: d/dw_t = 2 (f_e - 5/9) / W
    expected = [2 * (2 / 3 - 5 / 9) / 1.5] * 2 + [2 * (1 / 3 - 5 / 9) / 1.5]
    assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_masked_slots_of_top_p_are_no_expert():
    """Expert id E in a masked slot counts nowhere; f of the expert loss is still over T times the cap."""
    layout, routing = Layout((3,), (8,)), Routing("top_p", 2, 1)
    output = fixed_output(layout, routing, [[0.0] * 3] * 2, [[(2, 1.0), (3, 0.0)], [(0, 0.6), (2, 0.4)]])
    result = run([make_config(layout, routing, {"load_balancing": 1.0, "expert": 1.0})], [output], [[True, True]])
    assert result.values["load_balancing"].item() == pytest.approx(3 * (0.5 / 3 + 1.0 / 3), rel=1e-12)
    assert result.values["expert"].item() == pytest.approx(3 * (1 / 4 * 0.3 + 2 / 4 * 0.7), rel=1e-12)
    assert result.tokens_per_expert[0].tolist() == [1, 0, 2]


# The Switch loss


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_parameter_penalty_of_equal_widths_is_the_switch_loss(router, sequence_weights):
    layout = Layout((2, 4, 6), (16, 16, 16))
    routing = make_routing(router, layout)
    batch = Batch(layout, routing)
    penalty = batch.losses(make_config(layout, routing, {"parameter_penalty": 0.5}), sequence_weights)
    switch = batch.losses(make_config(layout, routing, {"load_balancing": 0.5}), sequence_weights)
    expected = switch.values["load_balancing"].item()
    assert expected > 1
    assert penalty.values["parameter_penalty"].item() == pytest.approx(expected, rel=1e-12)
    assert_same_gradients(batch.gradients(penalty.aux_loss), batch.gradients(switch.aux_loss))


def test_parameter_penalty_of_unequal_widths_is_not_the_switch_loss():
    routing = make_routing("top_k", UNEQUAL)
    config = make_config(UNEQUAL, routing, {"parameter_penalty": 1.0, "load_balancing": 1.0})
    values = Batch(UNEQUAL, routing).losses(config).values
    assert abs(values["parameter_penalty"].item() - values["load_balancing"].item()) > 0.01


@pytest.mark.parametrize("mask", [[[True] * 4] * 3, MASK], ids=["no_padding", "padding"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_load_balancing_is_that_of_transformers(layout, mask):
    from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

    routing = make_routing("top_k", layout)
    batch = Batch(layout, routing, mask=mask)
    result = batch.losses(make_config(layout, routing, {"load_balancing": 1.0}))
    theirs = load_balancing_loss_func(
        (batch.logits.float(),), layout.num_experts, routing.experts_per_tok, torch.tensor(mask).long()
    )
    assert result.values["load_balancing"].item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = batch.gradients(result.aux_loss)
    assert gradients["logits"].abs().max() > 1e-3
    torch.testing.assert_close(gradients["logits"], batch.gradients(theirs)["logits"], rtol=1e-4, atol=1e-6)


# What carries a gradient


@pytest.mark.parametrize("loss", ["group", "load_balancing", "parameter_penalty"])
def test_only_p_carries_gradient(loss):
    """The gradient is that of P with f as a number."""
    name, fields, _ = LOSSES[loss]
    routing = make_routing("two_level", UNEQUAL)
    batch = Batch(UNEQUAL, routing, mask=[[True] * 5])
    result = batch.losses(make_config(UNEQUAL, routing, {name: 1.0}, **fields))
    groups = torch.softmax(batch.group_logits, -1)
    if loss == "group":
        kept = torch.zeros_like(groups).scatter(-1, batch.group_index, 1.0)
        f = kept.sum(0) / (5 * routing.groups_per_tok)
        r = torch.tensor([(w - 8 + INTERVAL) / INTERVAL for w in UNEQUAL.widths], dtype=torch.float64)
        expected = 3 * (r * f * groups.mean(0)).sum()
    else:
        p = torch.zeros_like(batch.logits)
        for g in range(3):
            members = UNEQUAL.members(g)
            inside = groups[:, g : g + 1] * torch.softmax(batch.logits[:, members], -1)
            p = p.index_copy(-1, torch.tensor(members), inside)
        width = torch.tensor([UNEQUAL.widths[UNEQUAL.group_of(e)] for e in range(12)], dtype=torch.float64)
        width = width / width.mean() if loss == "parameter_penalty" else torch.ones_like(width)
        f = torch.zeros_like(p).scatter(-1, batch.index, 1.0).mean(0)
        expected = 12 * (width * f * p.mean(0)).sum()
    assert not f.requires_grad
    expected_gradients = batch.gradients(expected)
    assert expected_gradients["group_logits"].abs().max() > 1e-3
    assert_same_gradients(batch.gradients(result.aux_loss), expected_gradients)


@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", ROUTERS)
def test_expert_loss_reaches_the_router_through_combine_weights_only(router, expert_type):
    routing = make_routing(router, UNEQUAL)
    batch = Batch(UNEQUAL, routing)
    config = make_config(UNEQUAL, routing, {"expert": 1.0}, router_expert_aux_loss_type=expert_type)
    gradients = batch.gradients(batch.losses(config).aux_loss)
    assert gradients.pop("weights").abs().max() > 1e-3
    assert all((gradient == 0).all() for gradient in gradients.values())


def test_group_loss_prefers_small_groups():
    """With equal traffic a step against the gradient raises the smallest group and lowers the largest."""
    layout, routing = Layout((1, 1, 1), (8, 16, 40)), Routing("two_level", 1, 1)
    group_logits = 1e-3 * torch.eye(3)  # each token keeps another group
    batch = Batch(layout, routing, mask=[[True] * 3], group_logits=group_logits)
    assert batch.group_index.flatten().tolist() == [0, 1, 2]
    result = batch.losses(make_config(layout, routing, {"group": 1.0}, group_size_interval=16))
    gradient = batch.gradients(result.aux_loss)["group_logits"].sum(0)
    assert gradient[0] < -1e-2
    assert gradient[2] > 1e-2
    assert gradient[0] < gradient[1] < gradient[2]


def test_group_loss_of_equal_widths_has_no_preference():
    layout, routing = Layout((1, 1, 1), (16, 16, 16)), Routing("two_level", 3, 3)
    batch = Batch(layout, routing, mask=[[True] * 3])
    result = batch.losses(make_config(layout, routing, {"group": 1.0}))
    assert result.values["group"].item() == pytest.approx(1, rel=1e-12)  # G sum_g (1/G) P_g
    assert batch.gradients(result.aux_loss)["group_logits"].abs().max() < 1e-15


# Padding


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_padding_never_counts(router, sequence_weights):
    coefficients, fields, _ = all_losses(router)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    padding = ~torch.tensor(MASK).flatten()
    batch = Batch(UNEQUAL, routing, seed=4)
    other = copy.copy(batch)
    replaced = Batch(UNEQUAL, routing, seed=5, scale=40.0)
    for name in ("logits", "group_logits", "weights", "index", "group_index"):
        ours = getattr(batch, name)
        if ours is not None:
            condition = padding.reshape(-1, 1)
            value = torch.where(condition, getattr(replaced, name).detach(), ours.detach())
            assert not torch.equal(value, ours)
            setattr(other, name, value.requires_grad_(ours.requires_grad))
    other.leaves = {name: getattr(other, name) for name in batch.leaves}

    result, other_result = batch.losses(config, sequence_weights), other.losses(config, sequence_weights)
    torch.testing.assert_close(other_result.aux_loss, result.aux_loss, rtol=1e-14, atol=0)
    assert {n: v.item() for n, v in other_result.values.items()} == pytest.approx(
        {n: v.item() for n, v in result.values.items()}, rel=1e-14
    )
    assert torch.equal(other_result.tokens_per_expert[0], result.tokens_per_expert[0])
    for changed, its_result in ((batch, result), (other, other_result)):
        for gradient in changed.gradients(its_result.aux_loss).values():
            assert (gradient[padding] == 0).all()
            assert gradient[~padding].abs().max() > 1e-3


@pytest.mark.parametrize("router", ROUTERS)
def test_padded_batch_is_the_batch_without_padding(router):
    coefficients, fields, _ = all_losses(router)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    batch = Batch(UNEQUAL, routing, seed=6)
    keep = torch.tensor(MASK).flatten()
    short = RouterOutput(*(None if value is None else value[keep] for value in batch.output))
    result, expected = batch.losses(config), run([config], [short], [[True] * int(keep.sum())])
    assert result.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-12)
    assert torch.equal(result.tokens_per_expert[0], expected.tokens_per_expert[0])


@pytest.mark.parametrize("sequence_weights", [None, [0.625, 0.0, 0.375]], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_fully_padded_sequence_adds_nothing(router, expert_type, sequence_weights):
    coefficients, fields, _ = all_losses(router, expert_type=expert_type)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    mask = [MASK[0], [False] * 3, MASK[2]]
    batch = Batch(UNEQUAL, routing, mask=mask, seed=7)
    result = batch.losses(config, sequence_weights)
    keep = torch.tensor([True] * 3 + [False] * 3 + [True] * 3)
    short = RouterOutput(*(None if value is None else value[keep] for value in batch.output))
    short_weights = None if sequence_weights is None else [0.625, 0.375]
    expected = run([config], [short], [mask[0], mask[2]], short_weights)
    assert result.aux_loss.item() == pytest.approx(expected.aux_loss.item(), rel=1e-12)
    assert {n: v.item() for n, v in result.values.items()} == pytest.approx(
        {n: v.item() for n, v in expected.values.items()}, rel=1e-12
    )
    gradients, expected_gradients = batch.gradients(result.aux_loss), batch.gradients(expected.aux_loss)
    assert_same_gradients(gradients, expected_gradients)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["logits"].abs().max() > 1e-3


@pytest.mark.parametrize("sequence_weights", [None, [0.5, 0.5], [0.0, 0.0]], ids=["whole", "weights", "zero_weights"])
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_but_padding_gives_finite_values(router, expert_type, sequence_weights):
    for regularizer in ("quadratic", "entropy"):
        coefficients, fields, _ = all_losses(router, regularizer, expert_type)
        routing = make_routing(router, UNEQUAL)
        batch = Batch(UNEQUAL, routing, mask=[[False] * 3] * 2)
        result = batch.losses(make_config(UNEQUAL, routing, coefficients, **fields), sequence_weights)
        assert result.aux_loss.isfinite()
        assert set(result.values) == set(coefficients)
        assert all(value.isfinite() for value in result.values.values())
        assert all((gradient == 0).all() for gradient in batch.gradients(result.aux_loss).values())
        assert (result.tokens_per_expert[0] == 0).all()


# Sequences


@pytest.mark.parametrize("parts", [[[0], [1], [2]], [[0, 1], [2]], [[1], [0, 2]]], ids=str)
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", ROUTERS)
def test_sequences_add_up(router, expert_type, parts):
    """The auxiliary losses of the parts of a batch sum to that of the whole, gradients included."""
    coefficients, fields, _ = all_losses(router, expert_type=expert_type)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    batch = Batch(UNEQUAL, routing, seed=8)
    whole = batch.losses(config, WEIGHTS)

    total, counts = 0, 0
    for rows in parts:
        take = torch.tensor([b in rows for b in range(3)]).repeat_interleave(3)
        output = RouterOutput(*(None if value is None else value[take] for value in batch.output))
        part = run([config], [output], [MASK[b] for b in rows], [WEIGHTS[b] for b in rows])
        total, counts = total + part.aux_loss, counts + part.tokens_per_expert[0]
    assert total.item() == pytest.approx(whole.aux_loss.item(), rel=1e-12)
    assert torch.equal(counts, whole.tokens_per_expert[0])
    assert_same_gradients(batch.gradients(total), batch.gradients(whole.aux_loss))
    assert abs(batch.losses(config).aux_loss.item() - whole.aux_loss.item()) > 1e-3  # pooled statistics are others


@pytest.mark.parametrize("router", ROUTERS)
def test_values_are_a_mean_over_sequences(router):
    """With weights that sum to 0.5 the values are still a mean, the auxiliary loss half of it."""
    coefficients, fields, wanted = all_losses(router)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    batch = Batch(UNEQUAL, routing, seed=9)
    result = batch.losses(config, [weight / 2 for weight in WEIGHTS])
    expected = {name: batch.expected(loss, WEIGHTS).item() for name, loss in wanted.items()}
    assert {name: value.item() for name, value in result.values.items()} == pytest.approx(expected, rel=1e-10)
    total = sum(coefficients[name] * value for name, value in expected.items())
    assert result.aux_loss.item() == pytest.approx(total / 2, rel=1e-10)


@pytest.mark.parametrize("router", ROUTERS)
def test_a_lone_sequence_is_the_batch(router):
    coefficients, fields, _ = all_losses(router)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    batch = Batch(UNEQUAL, routing, mask=[[True] * 6 + [False]])
    result, whole = batch.losses(config, [1.0]), batch.losses(config)
    assert result.aux_loss.item() == pytest.approx(whole.aux_loss.item(), rel=1e-12)
    assert_same_gradients(batch.gradients(result.aux_loss), batch.gradients(whole.aux_loss))


# Few tokens, few experts, no traffic


@pytest.mark.parametrize("sequence_weights", [None, [1.0]], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("router", ROUTERS)
def test_single_token(router, layout, sequence_weights):
    coefficients, fields, wanted = all_losses(router)
    routing = make_routing(router, layout)
    batch = Batch(layout, routing, mask=[[True]])
    result = batch.losses(make_config(layout, routing, coefficients, **fields), sequence_weights)
    expected = {name: batch.expected(loss) for name, loss in wanted.items()}
    assert {name: value.item() for name, value in result.values.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-10
    )
    total = sum(coefficients[name] * value for name, value in expected.items())
    assert_same_gradients(batch.gradients(result.aux_loss), batch.gradients(total))


@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_expert(router, expert_type):
    coefficients, fields, wanted = all_losses(router, expert_type=expert_type)
    layout = Layout((1,), (8,))
    routing = make_routing(router, layout)
    batch = Batch(layout, routing)
    values = batch.losses(make_config(layout, routing, coefficients, **fields)).values
    expected = {name: batch.expected(loss).item() for name, loss in wanted.items()}
    assert {name: value.item() for name, value in values.items()} == pytest.approx(expected, rel=1e-10, abs=1e-14)
    for name in expected.keys() & {"load_balancing", "parameter_penalty", "expert", "group"}:
        assert values[name].item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", [router for router in ROUTERS if router != "grouped_top_k"])
def test_groups_without_traffic(router, expert_type, sequence_weights):
    """No token chooses group 0 (and, of the routers that keep all groups, none chooses group 2 either)."""
    coefficients, fields, wanted = all_losses(router, expert_type=expert_type)
    routing = make_routing(router, UNEQUAL, experts_per_tok=2)
    torch.manual_seed(10)
    logits, group_logits = torch.randn(9, 12), torch.randn(9, 3)
    empty = [0] if router.startswith("two_level") else [0, 2]
    for g in empty:
        logits[:, UNEQUAL.members(g)] -= 20
        group_logits[:, g] -= 20
    batch = Batch(UNEQUAL, routing, logits=logits, group_logits=group_logits)
    result = batch.losses(make_config(UNEQUAL, routing, coefficients, **fields), sequence_weights)
    for g in empty:
        assert (result.tokens_per_expert[0][UNEQUAL.members(g)] == 0).all()
    expected = {name: batch.expected(loss, sequence_weights) for name, loss in wanted.items()}
    assert {name: value.item() for name, value in result.values.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-10
    )
    total = sum(coefficients[name] * value for name, value in expected.items())
    assert_same_gradients(batch.gradients(result.aux_loss), batch.gradients(total))


@pytest.mark.parametrize("router", ROUTERS)
def test_extreme_logits_give_finite_losses_and_gradients(router):
    for regularizer in ("quadratic", "entropy"):
        coefficients, fields, wanted = all_losses(router, regularizer)
        routing = make_routing(router, UNEQUAL)
        batch = Batch(UNEQUAL, routing, scale=400.0)
        result = batch.losses(make_config(UNEQUAL, routing, coefficients, **fields))
        expected = {name: batch.expected(loss).item() for name, loss in wanted.items()}
        assert {name: value.item() for name, value in result.values.items()} == pytest.approx(expected, rel=1e-9)
        assert all(gradient.isfinite().all() for gradient in batch.gradients(result.aux_loss).values())


# Schedules and switches


@pytest.mark.parametrize(
    ("start", "progress", "active"),
    [
        (0.5, -1.0, True),
        (0.5, 0.0, False),
        (0.5, 0.4375, False),
        (0.5, 0.5, True),
        (0.5, 1.0, True),
        (0.0, 0.0, True),
        (1.0, 0.9375, False),
        (1.0, 1.0, True),
        (1.0, -1.0, True),
    ],
)
@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
def test_group_loss_starts_late(start, progress, active, sequence_weights):
    routing = make_routing("two_level", UNEQUAL)
    batch = Batch(UNEQUAL, routing)
    config = make_config(UNEQUAL, routing, {"group": 2.0}, group_aux_loss_start=start, group_size_interval=INTERVAL)
    result = batch.losses(config, sequence_weights, progress)
    expected = batch.expected(partial(reference.group, interval=INTERVAL), sequence_weights).item()
    assert expected > 0.1
    assert result.values["group"].item() == pytest.approx(expected, rel=1e-10)
    assert result.aux_loss.item() == pytest.approx(2 * expected if active else 0.0, rel=1e-10)
    gradient = batch.gradients(result.aux_loss)["group_logits"]
    assert (gradient.abs().max() > 1e-3) == active


@pytest.mark.parametrize(
    ("warmup", "progress", "factor"),
    [
        (0.5, 0.0, 0.0),
        (0.5, 0.125, 0.25),
        (0.5, 0.25, 0.5),
        (0.5, 0.5, 1.0),
        (0.5, 0.75, 1.0),
        (0.5, -1.0, 1.0),
        (1.0, 0.75, 0.75),
        (1.0, -1.0, 1.0),
        (0.0, 0.0, 1.0),
        (0.0, 0.5, 1.0),
        (0.0, -1.0, 1.0),
    ],
)
@pytest.mark.parametrize("regularizer", ["quadratic", "entropy"])
def test_intra_group_loss_is_warmed_up(warmup, progress, factor, regularizer):
    _, fields, wanted = LOSSES[f"intra_group_{regularizer}"]
    routing = make_routing("grouped_top_k", UNEQUAL)
    batch = Batch(UNEQUAL, routing)
    config = make_config(UNEQUAL, routing, {"intra_group": 2.0}, router_intra_group_warmup=warmup, **fields)
    result = batch.losses(config, None, progress)
    expected = batch.expected(wanted)
    assert abs(expected.item()) > 0.1
    assert result.values["intra_group"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert result.aux_loss.item() == pytest.approx(2 * factor * expected.item(), rel=1e-10)
    assert_same_gradients(batch.gradients(result.aux_loss), batch.gradients(2 * factor * expected))


def test_schedules_touch_their_own_loss_only():
    coefficients, fields, wanted = all_losses("two_level")
    routing = make_routing("two_level", UNEQUAL)
    batch = Batch(UNEQUAL, routing)
    config = make_config(UNEQUAL, routing, coefficients, router_intra_group_warmup=0.5, **fields)
    result = batch.losses(config, None, 0.125)
    factors = {"group": 0.0, "intra_group": 0.25}
    total = sum(coefficients[n] * factors.get(n, 1.0) * batch.expected(loss).item() for n, loss in wanted.items())
    assert result.aux_loss.item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("router", ROUTERS)
def test_coefficient_zero_switches_a_loss_off(router):
    coefficients, fields, _ = all_losses(router)
    routing = make_routing(router, UNEQUAL)
    batch = Batch(UNEQUAL, routing)
    everything = batch.losses(make_config(UNEQUAL, routing, coefficients, **fields))
    for off in coefficients:
        others = {name: value for name, value in coefficients.items() if name != off}
        result = batch.losses(make_config(UNEQUAL, routing, others, **fields))
        assert set(result.values) == set(others)
        without = everything.aux_loss - coefficients[off] * everything.values[off]
        assert result.aux_loss.item() == pytest.approx(without.item(), rel=1e-10)


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
def test_no_losses_at_all(sequence_weights):
    routing = make_routing("two_level", UNEQUAL)
    batch = Batch(UNEQUAL, routing)
    result = batch.losses(make_config(UNEQUAL, routing, {}), sequence_weights)
    assert result.values == {}
    assert result.aux_loss.item() == 0
    assert result.tokens_per_expert[0].sum() == 6 * routing.experts_per_tok


# Layers and counts


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_layers_are_averaged(router, sequence_weights):
    coefficients, fields, wanted = all_losses(router)
    routing = make_routing(router, UNEQUAL)
    config = make_config(UNEQUAL, routing, coefficients, **fields)
    batches = [Batch(UNEQUAL, routing, seed=seed) for seed in (11, 12)]
    result = run([config] * 2, [batch.output for batch in batches], MASK, sequence_weights)
    expected = {
        name: batch_value(
            partial(loss, layout=UNEQUAL, routing=routing), [b.tokens for b in batches], MASK, sequence_weights
        )
        for name, loss in wanted.items()
    }
    assert {name: value.item() for name, value in result.values.items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-10
    )
    total = sum(coefficients[name] * value for name, value in expected.items())
    assert result.aux_loss.item() == pytest.approx(total.item(), rel=1e-10)
    assert len(result.tokens_per_expert) == 2
    for batch in batches:
        assert_same_gradients(batch.gradients(result.aux_loss), batch.gradients(total))


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_per_expert(router, sequence_weights):
    routing = make_routing(router, UNEQUAL)
    batches = [Batch(UNEQUAL, routing, seed=seed) for seed in (13, 14)]
    config = make_config(UNEQUAL, routing, {"z": 1.0})
    counts = run([config] * 2, [batch.output for batch in batches], MASK, sequence_weights).tokens_per_expert
    assert isinstance(counts, tuple)
    mask = [present for row in MASK for present in row]
    for batch, count in zip(batches, counts, strict=True):
        tokens = [token for token, present in zip(batch.tokens, mask, strict=True) if present]
        assert count.tolist() == reference.count_tokens(tokens, UNEQUAL)
        assert not count.requires_grad


# The running mean of the router logits


DECAY, STRENGTH = 0.75, 2.0
PADDED = [[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


def make_model(strength=STRENGTH, seed=0):
    torch.manual_seed(seed)
    layout, routing = Layout((2, 4), (8, 16)), Routing("grouped_top_k", 2, 2)
    config = make_config(
        layout,
        routing,
        {"load_balancing": 0.01},
        hidden_size=16,
        router_logit_ema_strength=strength,
        router_logit_ema_decay=DECAY,
        initializer_range=0.5,
    )
    config.num_hidden_layers = 2
    config.layer_types = ["full_attention"] * 2
    return MoHGEForCausalLM(config).double().train()


def make_batch(seed=0):
    torch.manual_seed(seed)
    return {"input_ids": torch.randint(0, 32, (4, 6)), "attention_mask": torch.tensor(PADDED)}


def rows(batch, *indices):
    return {name: value[list(indices)] for name, value in batch.items()}


def forward(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels, output_router_logits=True)


def forward_backward(model, batch):
    out = forward(model, batch)
    out.loss.backward()
    return out


def ema(model):
    return torch.stack([layer.mlp.gate.logit_ema_E for layer in model.model.layers]).detach().clone()


def mean_logits(*runs):
    """Mean over the tokens that are no padding of several (output, batch) pairs, by layer."""
    means = []
    for layer in range(2):
        logits = [
            out.router_logits[layer].reshape(-1, 6)[batch["attention_mask"].flatten() == 1] for out, batch in runs
        ]
        means.append(torch.cat(logits).mean(0).detach())
    return torch.stack(means)


def assert_ema(model, expected):
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(ema(model), expected, rtol=1e-10, atol=1e-12)


def with_ema(model, values):
    """An evaluation copy of a model with a given running mean."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for layer, value in zip(model.model.layers, values, strict=True):
            layer.mlp.gate.logit_ema_E.copy_(value)
    return model


def test_running_mean_starts_at_zero_and_moves_at_the_next_step():
    model, batch, later = make_model(), make_batch(0), make_batch(1)
    assert (ema(model) == 0).all()
    first = forward_backward(model, batch)
    assert (ema(model) == 0).all()  # this step's tokens count from the next step on
    model.zero_grad(set_to_none=True)
    assert (ema(model) == 0).all()  # the update belongs to the next forward
    expected = (1 - DECAY) * mean_logits((first, batch))
    second = forward_backward(model, later)
    assert_ema(model, expected)

    model.zero_grad(set_to_none=True)
    forward_backward(model, batch)
    assert_ema(model, DECAY * expected + (1 - DECAY) * mean_logits((second, later)))


def test_forward_routes_by_the_mean_it_has_just_updated():
    model, batch, later = make_model(), make_batch(0), make_batch(1)
    first = forward_backward(model, batch)
    model.zero_grad(set_to_none=True)
    updated = (1 - DECAY) * mean_logits((first, batch))
    with_new, with_old = (forward(with_ema(model, value), later) for value in (updated, 0 * updated))
    out = forward(model, later)
    keep = later["attention_mask"] == 1
    torch.testing.assert_close(out.logits[keep], with_new.logits[keep], rtol=1e-9, atol=1e-10)
    assert (out.logits - with_old.logits)[keep].abs().max() > 1e-2
    # the input of the first layer's router does not depend on routing: its raw logits do not change with the mean
    torch.testing.assert_close(out.router_logits[0], with_old.router_logits[0], rtol=1e-10, atol=1e-12)


def test_micro_batches_of_a_step_see_the_same_mean():
    model, batch, later = make_model(), make_batch(0), make_batch(1)
    start = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        for layer, value in zip(model.model.layers, start, strict=True):
            layer.mlp.gate.logit_ema_E.copy_(value)
    fixed = with_ema(model, start)
    runs = []
    for part in (rows(batch, 0, 1), rows(batch, 2), rows(batch, 3)):
        runs.append((forward_backward(model, part), part))
        assert torch.equal(ema(model), start)
        keep = part["attention_mask"] == 1
        torch.testing.assert_close(runs[-1][0].logits[keep], forward(fixed, part).logits[keep], rtol=1e-9, atol=1e-10)
    model.zero_grad(set_to_none=True)
    forward_backward(model, later)
    assert_ema(model, DECAY * start + (1 - DECAY) * mean_logits(*runs))


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[2], [0, 1, 3]], [[0], [1], [2], [3]]], ids=str)
def test_mean_is_independent_of_the_split(parts):
    """The parts hold different numbers of tokens: a mean of their means would be another."""
    batch, later = make_batch(0), make_batch(1)
    means = []
    for split in ([[0, 1, 2, 3]], parts):
        model = make_model()
        for indices in split:
            forward_backward(model, rows(batch, *indices))
        model.zero_grad(set_to_none=True)
        forward(model, later)
        means.append(ema(model))
    assert means[0].abs().max() > 0.05
    torch.testing.assert_close(means[1], means[0], rtol=1e-10, atol=1e-12)


def test_padding_does_not_enter_the_mean():
    batch, later = make_batch(0), make_batch(1)
    means = []
    for token in (3, 17):
        model = make_model()
        changed = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, token)}
        forward_backward(model, changed)
        model.zero_grad(set_to_none=True)
        forward(model, later)
        means.append(ema(model))
    assert means[0].abs().max() > 0.05
    torch.testing.assert_close(means[1], means[0], rtol=1e-10, atol=1e-12)


def test_evaluation_leaves_the_mean_alone():
    model, batch, later = make_model(), make_batch(0), make_batch(1)
    model.eval()
    with torch.no_grad():
        forward(model, later)
    model.train()
    first = forward_backward(model, batch)  # nothing was gathered before
    assert (ema(model) == 0).all()
    model.eval()
    with torch.no_grad():
        forward(model, later)
    forward(model, later)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        forward(model, later)  # no training forward: no update
    assert (ema(model) == 0).all()
    model.train()
    forward(model, later)
    assert_ema(model, (1 - DECAY) * mean_logits((first, batch)))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_activation_checkpointing_changes_nothing(use_reentrant):
    """The second forward of a checkpointed layer, in its backward pass, adds nothing to the mean.

    Gradients are compared without re-entrance only: with it no loss taken from inside a layer has any.
    """
    batch, later = make_batch(0), make_batch(1)
    results = []
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        means, gradients = [], []
        for step in (batch, later, batch):
            forward_backward(model, rows(step, 0, 1))
            forward_backward(model, rows(step, 2, 3))
            means.append(ema(model))
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        results.append((means, gradients))
    (means, gradients), (other_means, other_gradients) = results
    assert (means[0] == 0).all()
    assert means[1].abs().max() > 0.05
    for mean, other in zip(means, other_means, strict=True):
        torch.testing.assert_close(other, mean, rtol=1e-10, atol=1e-12)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        if use_reentrant:
            continue
        assert gradient.keys() == other.keys()
        for name in gradient:
            torch.testing.assert_close(other[name], gradient[name], rtol=1e-9, atol=1e-12)


def test_mean_is_saved_with_the_model(tmp_path):
    model, batch = make_model(), make_batch(0)
    forward_backward(model, batch)
    model.zero_grad(set_to_none=True)
    forward_backward(model, batch)
    saved = ema(model)
    assert saved.abs().max() > 0.05
    model.save_pretrained(tmp_path)
    loaded = MoHGEForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(ema(loaded), saved, rtol=1e-6, atol=1e-7)


def test_mean_has_no_gradient():
    model, batch = make_model(), make_batch(0)
    forward_backward(model, batch)
    model.zero_grad(set_to_none=True)
    forward_backward(model, batch)
    assert not any("logit_ema" in name for name, _ in model.named_parameters())
    for layer in model.model.layers:
        assert not layer.mlp.gate.logit_ema_E.requires_grad
        assert layer.mlp.gate.logit_ema_E.grad is None
