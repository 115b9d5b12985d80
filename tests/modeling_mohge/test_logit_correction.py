"""Hi-MoE's running mean of the router logits, in a model: when it moves, over which tokens, and who sees it."""

import copy

import pytest
import torch
from reference import Layout, Routing
from router_cases import Case, make_config

from mohge import MoHGEForCausalLM


DECAY = 0.75
EXPERTS = 6
PADDED = [[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]


def make_model(**kwargs):
    torch.manual_seed(0)
    config = make_config(
        Case(Layout((2, 4), (8, 16)), Routing("grouped_top_k", 2, 2, ema_strength=2.0)),
        **{
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "router_aux_loss_coef": 0.01,
            "router_expert_aux_loss_coef": 0.0,
            "router_logit_ema_decay": DECAY,
            "initializer_range": 0.5,
        }
        | kwargs,
    )
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
    return torch.stack([router.logit_ema_E for router in model.routers]).detach().clone()


def set_ema(model, values):
    with torch.no_grad():
        for router, value in zip(model.routers, values, strict=True):
            router.logit_ema_E.copy_(value)
    return model


def mean_logits(*runs):
    """Mean over the tokens that are no padding of several (output, batch) pairs, by layer."""
    means = []
    for layer in range(2):
        logits = [out.router_logits[layer][batch["attention_mask"].flatten() == 1] for out, batch in runs]
        means.append(torch.cat(logits).mean(0).detach())
    return torch.stack(means)


def assert_ema(model, expected):
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(ema(model), expected, rtol=1e-10, atol=1e-12)


def test_starts_at_zero_and_moves_at_the_next_step():
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
    assert not any(router.logit_ema_E.requires_grad for router in model.routers)


def test_new_weights_begin_a_step_where_gradients_are_zeroed_instead_of_cleared():
    model, batch = make_model(), make_batch()
    first = forward_backward(model, batch)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.zero_grad(set_to_none=False)
    forward_backward(model, batch)
    assert_ema(model, (1 - DECAY) * mean_logits((first, batch)))


def test_forward_routes_by_the_mean_it_has_just_updated():
    model, batch, later = make_model(), make_batch(0), make_batch(1)
    first = forward_backward(model, batch)
    model.zero_grad(set_to_none=True)
    updated = (1 - DECAY) * mean_logits((first, batch))
    with_new, with_old = (
        forward(set_ema(copy.deepcopy(model).eval(), mean), later) for mean in (updated, 0 * updated)
    )
    out = forward(model, later)
    keep = later["attention_mask"] == 1
    torch.testing.assert_close(out.logits[keep], with_new.logits[keep], rtol=1e-9, atol=1e-10)
    assert (out.logits - with_old.logits)[keep].abs().max() > 1e-2
    # the input of the first layer's router does not depend on routing: its raw logits do not change with the mean
    torch.testing.assert_close(out.router_logits[0], with_old.router_logits[0], rtol=1e-10, atol=1e-12)


def test_micro_batches_of_a_step_see_the_same_mean():
    """Their tokens count together: the parts hold different numbers, so a mean of their means would be another."""
    batch, later = make_batch(0), make_batch(1)
    start = torch.randn(2, EXPERTS, dtype=torch.float64)
    model = set_ema(make_model(), start)
    fixed = copy.deepcopy(model).eval()
    runs = []
    for part in (rows(batch, 0, 1), rows(batch, 2), rows(batch, 3)):
        runs.append((forward_backward(model, part), part))
        assert torch.equal(ema(model), start)
        keep = part["attention_mask"] == 1
        torch.testing.assert_close(runs[-1][0].logits[keep], forward(fixed, part).logits[keep], rtol=1e-9, atol=1e-10)
    model.zero_grad(set_to_none=True)
    forward_backward(model, later)
    assert_ema(model, DECAY * start + (1 - DECAY) * mean_logits(*runs))


def test_evaluation_leaves_the_mean_alone():
    model, batch, later = make_model(), make_batch(0), make_batch(1)
    model.eval()
    with torch.no_grad():
        forward(model, later)
    model.train()
    first = forward_backward(model, batch)
    assert (ema(model) == 0).all()
    model.eval()
    with torch.no_grad():
        forward(model, later)
    forward(model, later)
    model.zero_grad(set_to_none=True)
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            forward(model, later)
        assert (ema(model) == 0).all()
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
        for step in (batch, later, batch):
            model.zero_grad(set_to_none=True)
            forward_backward(model, rows(step, 0, 1))
            forward_backward(model, rows(step, 2, 3))
        results.append((ema(model), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (mean, gradients), (other_mean, other_gradients) = results
    assert mean.abs().max() > 0.05
    torch.testing.assert_close(other_mean, mean, rtol=1e-10, atol=1e-12)
    if not use_reentrant:
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-9, atol=1e-12)


def test_mean_is_float32_in_a_bfloat16_model(tmp_path):
    """The router works in float32 whatever the model's dtype: bfloat16 cannot even count 301 tokens."""
    make_model(router_logit_ema_decay=0.9).float().save_pretrained(tmp_path)
    model = MoHGEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert model.lm_head.weight.dtype == torch.bfloat16
    ids = torch.randint(0, 32, (7, 43))
    output = model(ids, output_router_logits=True)
    model(ids[:1, :3])  # takes the step before into the mean
    for router, logits in zip(model.routers, output.router_logits, strict=True):
        expected = 0.1 * logits.mean(0).detach()
        assert router.logit_ema_E.dtype == torch.float32
        assert (router.logit_ema_E - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_mean_stays_float32_when_a_model_changes_dtype():
    model = make_model(router_logit_ema_decay=0.9).float().train()
    model(torch.randint(0, 32, (7, 43)))
    before = [router.logit_pending.clone() for router in model.routers]
    model.to(torch.bfloat16)
    for router, pending in zip(model.routers, before, strict=True):
        assert router.weight.dtype == torch.bfloat16
        torch.testing.assert_close(router.logit_pending, pending, rtol=0, atol=0)
        assert pending[-1] == 301
