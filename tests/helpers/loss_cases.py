"""Routers' outputs with known choices, their losses, and the comparison of these with tests/reference.py."""

from dataclasses import replace
from functools import partial

import pytest
import reference
import torch
from reference import batch_value, choose, count_tokens, group_logsumexp
from router_cases import UNEQUAL, Case, build_case, make_config

from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.losses_mohge import RouterLosses, router_losses
from mohge.routing_mohge import MoHGERouter, RouterOutput


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

# Losses look at a group router's logits, not at the scores it makes of them.
ROUTERS = ["two_level_sigmoid", "two_level_expert_logsumexp", "top_k", "top_p", "grouped_top_k"]

# True where there is a token: a full row, one padded on the left, one padded on the right
MASK = [[True] * 3, [False, True, True], [True, False, False]]
WEIGHTS = [0.5, 0.125, 0.375]


def all_losses(router, regularizer="quadratic", expert_type="global"):
    """Coefficients for every loss that is defined for a router."""
    losses = ["load_balancing", "z", "parameter_penalty", "entropy", f"expert_{expert_type}"]
    losses += [f"intra_group_{regularizer}", f"inter_group_{regularizer}"]
    if router.startswith("two_level"):
        losses.append("group")
    return {loss: 0.25 + 0.5 * i for i, loss in enumerate(losses)}


def config_fields(losses):
    """Config fields for the coefficients of some losses, and 0 for those of all others."""
    fields = dict.fromkeys(ROUTER_COEFFICIENTS.values(), 0.0)
    for loss, coefficient in losses.items():
        name, further, _ = LOSSES[loss]
        fields |= {ROUTER_COEFFICIENTS[name]: coefficient, **further}
    return fields


def reference_values(losses, case, layers, mask=MASK, sequence_weights=None):
    """Value of each loss by its name, from the tokens of each layer."""
    values = {}
    for name, _, loss in (LOSSES[loss] for loss in losses):
        loss = partial(loss, layout=case.layout, routing=case.routing)
        values[name] = batch_value(loss, layers, mask, sequence_weights)
    return values


class Batch:
    """Random outputs of a router for the positions of a mask, as tensors that are leaves and as tokens."""

    def __init__(
        self,
        case: Case,
        losses: dict[str, float],
        mask=MASK,
        seed=0,
        scale=1.5,
        logits=None,
        group_logits=None,
        **fields,
    ):
        torch.manual_seed(seed)
        layout, routing = case.layout, case.routing
        self.case, self.losses, self.mask = case, losses, mask
        self.config = make_config(case, **config_fields(losses) | fields)
        length = len(mask) * len(mask[0])

        def leaf(values, size):
            values = scale * torch.randn(length, size) if values is None else values
            return values.double().requires_grad_()

        self.logits = leaf(logits, layout.num_experts)
        self.leaves = [self.logits]
        if routing.has_group_router:
            self.group_logits = leaf(group_logits, layout.num_groups)
            self.leaves.append(self.group_logits)
        else:
            self.group_logits = torch.stack([torch.stack(group_logsumexp(list(row), layout)) for row in self.logits])

        index = torch.full((length, routing.experts_per_tok), layout.num_experts)
        weights = torch.zeros(length, routing.experts_per_tok, dtype=torch.float64)
        tokens = [
            choose(*map(list, rows), layout, routing) for rows in zip(self.logits, self.group_logits, strict=True)
        ]
        for t, token in enumerate(tokens):
            for slot, (e, w) in enumerate(token.weights.items()):
                index[t, slot], weights[t, slot] = e, w.item()
        self.leaves.append(weights.requires_grad_())
        self.tokens = [
            replace(token, weights=dict(zip(token.weights, row, strict=False)))
            for token, row in zip(tokens, weights, strict=True)
        ]
        group_logits = group_index = None
        if routing.router_type == "two_level":
            group_logits = self.group_logits
            group_index = torch.tensor([sorted(token.groups) for token in self.tokens])
        self.output = RouterOutput(self.logits, weights, index, group_logits, group_index)

    def rows(self, *rows):
        """The output for these rows of the mask."""
        taken = torch.tensor([b in rows for b in range(len(self.mask))]).repeat_interleave(len(self.mask[0]))
        return RouterOutput(*(None if value is None else value[taken] for value in self.output))

    def gradients(self, value):
        return torch.autograd.grad(value, self.leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def run(config, outputs, mask=MASK, sequence_weights=None, progress=-1.0) -> RouterLosses:
    """Losses of layers with the same config."""
    if sequence_weights is not None:
        sequence_weights = torch.tensor(sequence_weights, dtype=torch.float64)
    routers = [MoHGERouter(config) for _ in outputs]
    return router_losses(routers, outputs, torch.tensor(mask), sequence_weights, torch.tensor(progress))


def assert_same_gradients(actual, expected):
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


def assert_matches(*layers: Batch, sequence_weights=None, progress=-1.0, factors=None) -> RouterLosses:
    """
    The losses of a batch, one `Batch` for each layer, against the reference: each value, their sum weighted by
    coefficient and schedule (`factors` by name; 1 by default), its gradients, and the counts.
    """
    first = layers[0]
    result = run(first.config, [layer.output for layer in layers], first.mask, sequence_weights, progress)
    tokens = [layer.tokens for layer in layers]
    expected = reference_values(first.losses, first.case, tokens, first.mask, sequence_weights)
    wanted = {name: value.item() for name, value in expected.items()}
    assert {name: value.item() for name, value in result.values.items()} == pytest.approx(wanted, rel=1e-10, abs=1e-14)

    share = 1 if sequence_weights is None else sum(sequence_weights)
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for (name, value), coefficient in zip(expected.items(), first.losses.values(), strict=True):
        total = total + coefficient * (factors or {}).get(name, 1) * share * value
    assert result.aux_loss.shape == ()
    assert result.aux_loss.item() == pytest.approx(total.item(), rel=1e-10, abs=1e-14)

    present = [token for row in first.mask for token in row]
    for layer, counts in zip(layers, result.tokens_per_expert, strict=True):
        assert_same_gradients(layer.gradients(result.aux_loss), layer.gradients(total))
        chosen = [token for token, there in zip(layer.tokens, present, strict=True) if there]
        assert counts.tolist() == count_tokens(chosen, first.case.layout)
        assert not counts.requires_grad
    return result


def every_loss(router, layout=UNEQUAL, expert_type="global", **kwargs):
    """A `Batch` with every loss that is defined for a router."""
    return Batch(build_case(router, layout), all_losses(router, expert_type=expert_type), **kwargs)
