"""Router losses at the edge: padding, parts of a batch, few tokens or experts, empty groups, schedules."""

import pytest
import torch
from loss_cases import (
    MASK,
    ROUTERS,
    WEIGHTS,
    Batch,
    all_losses,
    assert_matches,
    assert_same_gradients,
    every_loss,
    run,
)
from reference import Layout
from router_cases import UNEQUAL, build_case


@pytest.mark.parametrize("sequence_weights", [None, [0.625, 0.0, 0.375], WEIGHTS], ids=["whole", "zero", "weight"])
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", ROUTERS)
def test_a_fully_padded_sequence_adds_nothing(router, expert_type, sequence_weights):
    batch = every_loss(router, expert_type=expert_type, mask=[MASK[0], [False] * 3, MASK[2]], seed=7)
    assert_matches(batch, sequence_weights=sequence_weights)


@pytest.mark.parametrize("sequence_weights", [None, [0.5, 0.5], [0.0, 0.0]], ids=["whole", "weights", "zero_weights"])
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("regularizer", ["quadratic", "entropy"])
@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_but_padding_gives_finite_values(router, regularizer, expert_type, sequence_weights):
    losses = all_losses(router, regularizer, expert_type)
    batch = Batch(build_case(router), losses, mask=[[False] * 3] * 2)
    result = run(batch.config, [batch.output], batch.mask, sequence_weights)
    assert result.aux_loss.isfinite()
    assert len(result.values) == len(losses)
    assert all(value.isfinite() for value in result.values.values())
    assert all((gradient == 0).all() for gradient in batch.gradients(result.aux_loss))
    assert (result.tokens_per_expert[0] == 0).all()


@pytest.mark.parametrize("router", ROUTERS)
def test_sequences_add_up(router):
    """The auxiliary losses of the parts of a batch sum to that of the whole, gradients included."""
    batch = every_loss(router, seed=8)
    whole = run(batch.config, [batch.output], sequence_weights=WEIGHTS)
    total, counts = 0, 0
    for rows in ([1], [0, 2]):
        mask, weights = [MASK[b] for b in rows], [WEIGHTS[b] for b in rows]
        part = run(batch.config, [batch.rows(*rows)], mask, weights)
        total, counts = total + part.aux_loss, counts + part.tokens_per_expert[0]
    assert total.item() == pytest.approx(whole.aux_loss.item(), rel=1e-12)
    assert torch.equal(counts, whole.tokens_per_expert[0])
    assert_same_gradients(batch.gradients(total), batch.gradients(whole.aux_loss))
    pooled = run(batch.config, [batch.output]).aux_loss
    assert abs(pooled - whole.aux_loss) > 1e-3


@pytest.mark.parametrize("sequence_weights", [None, [1.0]], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("router", ROUTERS)
def test_single_token(router, sequence_weights):
    assert_matches(every_loss(router, mask=[[True]]), sequence_weights=sequence_weights)


@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", ROUTERS)
def test_one_expert(router, expert_type):
    values = assert_matches(every_loss(router, Layout((1,), (8,)), expert_type)).values
    for name in values.keys() & {"load_balancing", "parameter_penalty", "expert", "group"}:
        assert values[name].item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("sequence_weights", [None, WEIGHTS], ids=["whole_batch", "per_sequence"])
@pytest.mark.parametrize("expert_type", ["global", "per_group"])
@pytest.mark.parametrize("router", [router for router in ROUTERS if router != "grouped_top_k"])
def test_groups_without_traffic(router, expert_type, sequence_weights):
    """No token chooses group 0 (and, of the routers that keep all groups, none chooses group 2 either)."""
    torch.manual_seed(10)
    logits, group_logits = torch.randn(9, 12), torch.randn(9, 3)
    empty = [0] if router.startswith("two_level") else [0, 2]
    for g in empty:
        logits[:, UNEQUAL.members(g)] -= 20
        group_logits[:, g] -= 20
    losses = all_losses(router, expert_type=expert_type)
    batch = Batch(build_case(router, experts_per_tok=2), losses, logits=logits, group_logits=group_logits)
    result = assert_matches(batch, sequence_weights=sequence_weights)
    for g in empty:
        assert (result.tokens_per_expert[0][UNEQUAL.members(g)] == 0).all()


@pytest.mark.parametrize("regularizer", ["quadratic", "entropy"])
@pytest.mark.parametrize("router", ROUTERS)
def test_extreme_logits(router, regularizer):
    assert_matches(Batch(build_case(router), all_losses(router, regularizer), scale=400.0))


SCHEDULES = [
    # fields, progress, factors
    ({"group_aux_loss_start": 0.5}, -1.0, {}),  # not known: the end of every schedule
    ({"group_aux_loss_start": 0.5}, 0.4375, {"group": 0}),
    ({"group_aux_loss_start": 0.5}, 0.5, {}),
    ({"group_aux_loss_start": 0.0}, 0.0, {}),
    ({"group_aux_loss_start": 1.0}, 0.9375, {"group": 0}),
    ({"group_aux_loss_start": 1.0}, 1.0, {}),
    ({"router_intra_group_warmup": 0.5}, -1.0, {}),
    ({"router_intra_group_warmup": 0.5}, 0.0, {"intra_group": 0, "group": 0}),
    ({"router_intra_group_warmup": 0.5}, 0.125, {"intra_group": 0.25, "group": 0}),
    ({"router_intra_group_warmup": 0.5}, 0.5, {}),
    ({"router_intra_group_warmup": 0.5}, 0.75, {}),
    ({"router_intra_group_warmup": 1.0}, 0.75, {"intra_group": 0.75}),
    ({"router_intra_group_warmup": 0.0}, 0.0, {"group": 0}),
]


@pytest.mark.parametrize(("fields", "progress", "factors"), SCHEDULES)
def test_schedules(fields, progress, factors):
    """They change their own loss's part of the sum, and the value of none. By default groups start at 0.5."""
    assert_matches(every_loss("two_level_sigmoid", **fields), progress=progress, factors=factors)


def test_no_losses_at_all():
    batch = Batch(build_case("two_level_sigmoid"), {})
    result = run(batch.config, [batch.output])
    assert result.values == {}
    assert result.aux_loss.item() == 0
    assert result.tokens_per_expert[0].sum() == 6 * batch.case.routing.experts_per_tok
