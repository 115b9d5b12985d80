"""The values and gradients of the eight router losses, against tests/reference.py and worked out by hand."""

import math

import pytest
import torch
from loss_cases import (
    LOSSES,
    MASK,
    ROUTERS,
    WEIGHTS,
    Batch,
    all_losses,
    assert_matches,
    config_fields,
    every_loss,
    reference_values,
    run,
)
from reference import Layout, Routing
from router_cases import HIDDEN, LAYOUTS, Case, build_case, make_config, make_router, reference_tokens

from mohge.losses_mohge import router_losses
from mohge.routing_mohge import RouterOutput


DEFINED = [
    (loss, router) for loss in LOSSES for router in ROUTERS if loss != "group" or router.startswith("two_level")
]


@pytest.mark.parametrize(
    ("layout", "sequence_weights"),
    [
        ("equal_groups", None),
        ("unequal_groups", None),
        ("unequal_groups", WEIGHTS),
        ("one_group", None),
        ("groups_of_one", None),
    ],
)
@pytest.mark.parametrize(("loss", "router"), DEFINED)
def test_matches_reference(loss, router, layout, sequence_weights):
    batch = Batch(build_case(router, LAYOUTS[layout]), {loss: 0.75})
    (value,) = assert_matches(batch, sequence_weights=sequence_weights).values.values()
    assert value.shape == ()
    zero = loss == "inter_group_entropy" and layout == "one_group"  # all of the mass, whatever the token
    assert zero or value.abs() > 1e-3


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS, [w / 2 for w in WEIGHTS]], ids=["whole", "parts", "half"])
@pytest.mark.parametrize("router", ROUTERS)
def test_all_losses_over_two_layers(router, sequence_weights):
    """With weights that sum to 0.5 the values are still means over sequences, the auxiliary loss is half of it."""
    layers = [every_loss(router, seed=seed) for seed in (1, 2)]
    result = assert_matches(*layers, sequence_weights=sequence_weights)
    assert isinstance(result.tokens_per_expert, tuple)
    for layer in layers:
        assert all(gradient.abs().max() > 1e-3 for gradient in layer.gradients(result.aux_loss))


@pytest.mark.parametrize("router", ROUTERS)
def test_router_and_losses_together(router):
    """Gradients through a real router to its input and its weights."""
    losses, case = all_losses(router), build_case(router)
    module = make_router(case, seed=2, **config_fields(losses))
    x = torch.randn(9, HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    actual = router_losses([module], [module(x)], torch.tensor(MASK), None, torch.tensor(-1.0)).aux_loss
    values = reference_values(losses, case, [reference_tokens(module, x, case)]).values()
    expected = sum(coefficient * value for coefficient, value in zip(losses.values(), values, strict=True))
    assert actual.item() == pytest.approx(expected.item(), rel=1e-10)
    gradients, wanted = (torch.autograd.grad(value, inputs) for value in (actual, expected))
    for gradient, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 1e-2
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-12)


# By hand


def by_hand(layout, routing, logits, chosen, group_logits=None, kept=None):
    """The value of a loss, given by its key in LOSSES and further config fields, for one sequence of tokens;
    `chosen` lists pairs of expert and weight for each token."""
    output = RouterOutput(
        torch.tensor(logits, dtype=torch.float64),
        torch.tensor([[w for _, w in row] for row in chosen], dtype=torch.float64),
        torch.tensor([[e for e, _ in row] for row in chosen]),
        None if group_logits is None else torch.tensor(group_logits, dtype=torch.float64),
        None if kept is None else torch.tensor(kept),
    )

    def value(loss, **fields):
        config = make_config(Case(layout, routing), **config_fields({loss: 1.0}) | fields)
        return run(config, [output], [[True] * len(logits)]).values[LOSSES[loss][0]].item()

    return value


def exactly(value):
    return pytest.approx(value, rel=1e-12)


def log(*values):
    return [math.log(value) for value in values]


def test_balanced_load_gives_k():
    """Uniform probabilities, every expert chosen equally often: K, as in Transformers."""
    chosen = [[(0, 0.5), (1, 0.5)], [(3, 0.5), (2, 0.5)]]
    value = by_hand(Layout((4,), (8,)), Routing("top_k", 2, 1), [[0.0] * 4] * 2, chosen)
    assert value("load_balancing") == exactly(2)


def test_load_balancing():
    logits = [log(0.9, 0.1), log(0.7, 0.3), log(0.2, 0.8)]
    value = by_hand(Layout((2,), (8,)), Routing("top_k", 1, 1), logits, [[(0, 1)], [(0, 1)], [(1, 1)]])
    assert value("load_balancing") == exactly(2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))


def test_parameter_penalty():
    """Three narrow experts and a wide one: the mean width is that of an expert, 12, not that of a group, 16."""
    logits = [log(0.4, 0.3, 0.2, 0.1), log(0.1, 0.1, 0.2, 0.6)]
    value = by_hand(Layout((3, 1), (8, 24)), Routing("top_k", 1, 2), logits, [[(0, 1)], [(3, 1)]])
    assert value("parameter_penalty") == exactly(4 * (0.5 * 8 / 12 * 0.25 + 0.5 * 24 / 12 * 0.35))


@pytest.mark.parametrize(("widths", "expected"), [((0, 24), 4 * (1 * 4 * 0.25)), ((0, 0), 0)])
def test_parameter_penalty_of_removed_experts(widths, expected):
    """Half of the choices are of the one expert that is left, 4 times as wide as the mean; without any it is 0."""
    chosen = [[(0, 1), (3, 1)], [(3, 1), (1, 1)]]
    value = by_hand(Layout((3, 1), widths), Routing("top_k", 2, 2), [[0.0] * 4] * 2, chosen)
    assert value("parameter_penalty") == exactly(expected)


def test_parameter_penalty_of_equal_widths_is_the_switch_loss():
    layout = Layout((2, 4, 6), (16, 16, 16))
    batches = [
        Batch(build_case("two_level_sigmoid", layout), {loss: 1}) for loss in ("parameter_penalty", "load_balancing")
    ]
    penalty, switch = (run(batch.config, [batch.output]).aux_loss.item() for batch in batches)
    assert penalty == exactly(switch)


def test_joint_probability_of_a_two_level_router():
    """p(g) 3/4 and 1/4, p(e|g) 0.5 and 0.5 in both: whatever the scale of the expert logits of a group."""
    layout, routing = Layout((2, 2), (8, 8)), Routing("two_level", 1, 1)
    value = by_hand(layout, routing, [[5.0, -1.0, 5.0, -1.0]], [[(0, 1)]], [log(3, 1)], [[0]])
    p = [3 / 8, 3 / 8, 1 / 8, 1 / 8]
    assert value("load_balancing") == exactly(4 * 3 / 8)
    assert value("entropy") == exactly(-sum(v * math.log(v) for v in p))
    assert value("intra_group_quadratic") == exactly(-sum(v**2 for v in p))
    assert value("inter_group_quadratic") == exactly(9 / 16 + 1 / 16)
    assert value("inter_group_entropy") == exactly(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))


def test_uniform_probabilities():
    value = by_hand(Layout((2, 2), (8, 8)), Routing("top_k", 1, 2), [[1.5] * 4], [[(0, 1)]])
    assert value("z") == exactly((1.5 + math.log(4)) ** 2)
    assert value("entropy") == exactly(math.log(4))
    assert value("intra_group_quadratic") == exactly(-1 / 4)
    assert value("intra_group_entropy") == exactly(math.log(4))
    assert value("inter_group_quadratic") == exactly(1 / 2)
    assert value("inter_group_entropy") == exactly(-math.log(2))


def test_z_loss_of_a_two_level_router_is_over_experts():
    layout, routing = Layout((1, 1), (8, 8)), Routing("two_level", 1, 1)
    value = by_hand(layout, routing, [log(3, 1), log(1, 1)], [[(0, 1)], [(0, 1)]], [[9, 9], [9, 9]], [[0], [0]])
    assert value("z") == exactly((math.log(4) ** 2 + math.log(2) ** 2) / 2)


def test_group_loss():
    """Widths 8 and 24: size factors 1 and 2 with interval 16, 1 and 1 + 1 / 64 with the interval of the paper."""
    layout, routing = Layout((1, 1), (8, 24)), Routing("two_level", 1, 1)
    chosen = [[(0, 1)], [(1, 1)], [(1, 1)], [(1, 1)]]
    groups = [log(3, 1), log(1, 3), log(1, 3), log(1, 1)]
    value = by_hand(layout, routing, [[0.0, 0.0]] * 4, chosen, groups, [[0], [1], [1], [1]])
    p = [(0.75 + 0.25 + 0.25 + 0.5) / 4, (0.25 + 0.75 + 0.75 + 0.5) / 4]
    assert value("group", group_size_interval=16) == exactly(2 * (0.25 * p[0] + 2 * 0.75 * p[1]))
    assert value("group", group_size_interval=1024) == exactly(2 * (0.25 * p[0] + (1 + 1 / 64) * 0.75 * p[1]))


def test_group_loss_prefers_small_groups():
    """With equal traffic a step against the gradient raises the smallest group and lowers the largest."""
    case = Case(Layout((1, 1, 1), (8, 16, 40)), Routing("two_level", 1, 1))
    batch = Batch(case, {"group": 1.0}, mask=[[True] * 3], group_logits=1e-3 * torch.eye(3))
    assert batch.output.group_index.flatten().tolist() == [0, 1, 2]
    _, gradient, _ = batch.gradients(run(batch.config, [batch.output], batch.mask).aux_loss)
    small, middle, large = gradient.sum(0)
    assert small < -1e-2
    assert large > 1e-2
    assert small < middle < large


def test_global_expert_loss():
    """E 4, K_e 2, G 2, K_g 1: the factor is E K_g / G = 2. Ids 0 and 2 are group 0."""
    layout, routing = Layout((2, 2), (8, 16)), Routing("two_level", 2, 1)
    chosen = [[(0, 0.7), (2, 0.3)], [(2, 0.6), (0, 0.4)], [(1, 0.9), (3, 0.1)]]
    value = by_hand(layout, routing, [[0.0] * 4] * 3, chosen, [[0.0, 0.0]] * 3, [[0], [0], [1]])
    expected = 2 * (2 / 6 * 1.1 / 3 + 2 / 6 * 0.9 / 3 + 1 / 6 * 0.9 / 3 + 1 / 6 * 0.1 / 3)
    assert value("expert_global") == exactly(expected)


def test_global_expert_loss_of_a_flat_router_keeps_all_groups():
    """Balanced: E sum_e (1/E)(1/E) = 1."""
    chosen = [[(0, 0.5), (1, 0.5)], [(2, 0.5), (3, 0.5)]]
    value = by_hand(Layout((2, 2), (8, 16)), Routing("top_k", 2, 2), [[0.0] * 4] * 2, chosen)
    assert value("expert_global") == exactly(1)


def test_per_group_expert_loss_is_one_when_balanced_inside_groups():
    """Three tokens go to group 0 (ids 0 and 2), one to group 1: unequal traffic costs the global form only."""
    layout, routing = Layout((2, 2), (8, 16)), Routing("two_level", 2, 1)
    chosen = [[(0, 0.5), (2, 0.5)]] * 3 + [[(1, 0.5), (3, 0.5)]]
    value = by_hand(layout, routing, [[0.0] * 4] * 4, chosen, [[0.0, 0.0]] * 4, [[0], [0], [0], [1]])
    assert value("expert_per_group") == exactly(1)
    assert value("expert_global") == exactly(2 * 2 * (3 / 8 * 3 / 8 + 1 / 8 * 1 / 8))


@pytest.mark.parametrize("counts", [(2, 2), (2, 2, 2), (2, 2, 64)], ids=str)
def test_per_group_expert_loss(counts):
    """A third group, of whatever size, has no traffic and does not count. Ids 0 and `second` are group 0."""
    layout, routing = Layout(counts, (8, 16, 24)[: len(counts)]), Routing("two_level", 1, 1)
    first, second = layout.members(0)
    other = layout.members(1)[0]
    chosen = [[(first, 0.8)], [(first, 0.6)], [(second, 0.6)], [(other, 0.5)]]
    logits, group_logits = [[0.0] * layout.num_experts] * 4, [[0.0] * layout.num_groups] * 4
    value = by_hand(layout, routing, logits, chosen, group_logits, [[0], [0], [0], [1]])
    unbalanced, balanced = 2 * (2 / 3 * 1.4 / 2.0 + 1 / 3 * 0.6 / 2.0), 2 * 1.0
    assert value("expert_per_group") == exactly((unbalanced + balanced) / 2)


def test_masked_slots_of_top_p_are_no_expert():
    """Expert id E in a masked slot counts nowhere; f of the expert loss is still over T times the cap."""
    chosen = [[(2, 1.0), (3, 0.0)], [(0, 0.6), (2, 0.4)]]
    value = by_hand(Layout((3,), (8,)), Routing("top_p", 2, 1), [[0.0] * 3] * 2, chosen)
    assert value("load_balancing") == exactly(3 * (0.5 / 3 + 1.0 / 3))
    assert value("expert_global") == exactly(3 * (1 / 4 * 0.3 + 2 / 4 * 0.7))
