"""What calibration measures in a layer, and what follows from it: importance, refit, and first rows for routers.

Shapes: T tokens, H hidden size, D or W width of a feed-forward, E experts. A suffix names the shape of a tensor.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mohge.backbones_mohge import FeedForward
from mohge.blocks_mohge import MoHGEExperts

from .decoders import Expert


Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Called for each batch with the input [T, H] of a feed-forward, after its norm, and its activations [T, D]."""
ExpertObserver = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called for each batch and expert that tokens came to, with its id, its activations [T, W] and its combine weights
[T]."""

_SAMPLE = 8192
"""Most tokens of a sample."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Strengths of the ridge to choose from, relative to the Gram matrix's diagonal."""
_TYPICAL = 0.3
"""A strength that does well, where none is chosen."""
_CHECKED = 4
"""One in so many tokens is held out to choose it."""
_OUTPUTS = 128
"""Errors of a refit are summed over fewer than twice so many outputs, evenly spaced: all of them would take several
times as long as the refit."""


class LayerSaliency(NamedTuple):
    """What calibration says of the experts of a layer."""

    neurons: list[torch.Tensor]
    """For each expert [W_e] how much each of its neurons matters; empty in a layer without routed experts."""
    order: list[torch.Tensor]
    """For each expert [W_e] its neurons, those that stay longest first, see [`eliminate`]."""
    lost: list[torch.Tensor]
    """For each expert [W_e + 1] what is lost where only the first n of them stay, n from 0 on."""
    tokens: torch.Tensor
    """[E] tokens that came to each expert."""

    def kept(self, expert: int, width: int) -> torch.Tensor:
        """[width] the neurons that an expert of this width keeps, ascending."""
        return self.order[expert][:width].sort().values

    @classmethod
    def of(
        cls, neurons: list[torch.Tensor], tokens: torch.Tensor, grams: Iterable[torch.Tensor] = ()
    ) -> "LayerSaliency":
        """From the saliency and, if what stays will be refitted, the Gram matrices [W_e, W_e] of the activations."""
        pairs = [eliminate(*taken) for taken in zip_longest(neurons, grams)]
        return cls(neurons, [order for order, _ in pairs], [lost for _, lost in pairs], tokens)


@contextmanager
def observe_dense(found: FeedForward, observer: Observer) -> Iterator[None]:
    """Let `observer` see a dense feed-forward. With gradients, activations get theirs."""
    inputs = []  # of the feed-forward and then of its projections, the last of which is down

    def enter(module, arguments):
        rows = _with_gradient(arguments[0]).flatten(0, -2)
        inputs.append(rows)
        return rows.view_as(arguments[0])

    linear = (module for module in found.module.modules() if isinstance(module, nn.Linear))
    hooks = [module.register_forward_pre_hook(enter) for module in (found.module, *linear)]

    def observe(module, args, output):
        observer(inputs[0], inputs[-1])
        inputs.clear()

    hooks.append(found.module.register_forward_hook(observe))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def observe_experts(found: FeedForward, observer: ExpertObserver) -> Iterator[None]:
    """Let `observer` see the routed experts of a mixture, or the feed-forward of a dense model as its expert 0. With
    gradients, activations get theirs."""
    if found.experts is None:
        with observe_dense(
            found, lambda _, activations: observer(0, activations, activations.new_ones(len(activations)))
        ):
            yield
        return
    # In place of the method: an implementation behind transformers' interface would see one group at a time.
    found.experts.forward = partial(_observed, found.experts, observer)
    try:
        yield
    finally:
        del found.experts.forward


def _observed(
    experts: nn.Module,
    observer: ExpertObserver,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What the experts compute, one after the other."""
    output = torch.zeros_like(hidden_states)
    for expert in range(experts.num_experts):
        token_idx, position = torch.where(top_k_index == expert)
        if not len(token_idx) or (projections := _projections(experts, expert)) is None:
            continue
        gate_up, down = projections
        weights = top_k_weights[token_idx, position]
        activations = _with_gradient(experts._apply_gate(F.linear(hidden_states[token_idx], *gate_up)))
        observer(expert, activations, weights)
        result = F.linear(activations, *down) * weights[:, None]
        output = output.index_add(0, token_idx, result.to(output.dtype))
    return output


def _projections(experts: nn.Module, expert: int) -> tuple[tuple, tuple] | None:
    """Weight and bias of the two projections of an expert; None where nothing is left of it."""
    if isinstance(experts, MoHGEExperts):
        group, slot = experts.expert_groups[expert], experts.expert_slots[expert]
        if group not in experts.kept_groups:
            return None
        kept = experts.kept_groups.index(group)
        pairs = zip(experts.groups()[kept], experts.biases()[kept], strict=True)
        return tuple((weight[slot], bias if bias is None else bias[slot]) for weight, bias in pairs)
    made = []
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts, name)[expert]
        bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
        made.append((weight.T if experts.is_transposed else weight, bias))
    return tuple(made)


def _with_gradient(activations: torch.Tensor) -> torch.Tensor:
    """Activations that a gradient reaches, where there are gradients: nothing before the first layer asks for it."""
    if torch.is_grad_enabled() and not activations.requires_grad:
        activations.requires_grad_()
    return activations


class Gram:
    """
    Sums over tokens of the outer products of rows, one part of the tokens apart to choose a ridge by.

    Args:
        width (`int`): Width W of the rows.
        device (`str`, *optional*, defaults to `"cpu"`): Where to add up.
    """

    def __init__(self, width: int, device: str = "cpu"):
        self.parts = [torch.zeros(width, width, device=device) for _ in range(2)]
        """[W, W] of most tokens, and of those held out from them."""

    def add(self, rows_TW: torch.Tensor):
        """Take in a batch."""
        for part, rows in zip(
            self.parts, rows_TW.tensor_split([len(rows_TW) - len(rows_TW) // _CHECKED]), strict=True
        ):
            part.addmm_(rows.T, rows)

    def sum(self) -> torch.Tensor:
        """[W, W] of all tokens."""
        return self.parts[0] + self.parts[1]


class DenseStatistics:
    """
    Sums over calibration tokens of a dense feed-forward, and a sample of its inputs.

    Args:
        tokens (`int`): Number of tokens that will come.
        width (`int`, *optional*): Width D of the feed-forward, if the Gram matrix of the activations is wanted.
        device (`str`, *optional*, defaults to `"cpu"`): Where to add up.
    """

    def __init__(self, tokens: int, width: int | None, device: str = "cpu"):
        self.tokens = 0
        self.gram = None if width is None else Gram(width, device)
        """Of the activations."""
        self._stride = -(-tokens // _SAMPLE)
        self._inputs: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []

    def __call__(self, inputs_TH: torch.Tensor, activations_TD: torch.Tensor):
        """Take in a batch."""
        if self.gram is not None:
            self.gram.add(activations_TD)
        positions = torch.arange(self.tokens, self.tokens + len(inputs_TH))
        sampled = positions % self._stride == 0
        self._positions.append(positions[sampled])
        self._inputs.append(inputs_TH.cpu()[sampled])
        self.tokens += len(inputs_TH)

    def sample(self) -> torch.Tensor:
        """Inputs [T', H] of some tokens, evenly spaced."""
        return torch.cat(self._inputs)

    def sampled(self) -> torch.Tensor:
        """[T'] which tokens they are."""
        return torch.cat(self._positions)


class ExpertStatistics:
    """
    Sums over calibration tokens for each expert of a mixture.

    Args:
        widths (`list[int]`): Width W of each expert.
        device (`str`, *optional*, defaults to `"cpu"`): Where to add up.
    """

    def __init__(self, widths: list[int], device: str = "cpu"):
        self.grams = [Gram(width, device) for width in widths]
        """Of the activations, scaled by the combine weights."""

    def __call__(self, expert: int, activations_TW: torch.Tensor, weights_T: torch.Tensor):
        """Take in the tokens of one expert."""
        self.grams[expert].add(activations_TW * weights_T[:, None])


def magnitude(expert: Expert) -> torch.Tensor:
    """[W] saliency of an expert's neurons without data: the product of the norms of their rows and column."""
    return expert.down.float().norm(dim=0) * expert.gate.float().norm(dim=1) * expert.up.float().norm(dim=1)


def eliminate(neurons_W: torch.Tensor, gram_WW: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    In which order the neurons of an expert go, and what is lost with them. Without a refit, that is their saliency.
    With one, the others stand in for what goes: the next to go is the one that loses the least, its saliency times the
    share of its activation that those which stay do not tell (as in Optimal Brain Surgeon, Hassibi and Stork 1992).

    Args:
        neurons_W (`torch.Tensor`): Saliency.
        gram_WW (`torch.Tensor`, *optional*): Gram matrix of the activations, if what stays will be refitted.

    Returns:
        [W] the neurons, those that stay longest first, and [W + 1] what is lost where only the first n stay, n from 0
        on.
    """
    if gram_WW is None or not len(neurons_W):
        order = neurons_W.argsort(descending=True, stable=True)
        return order, F.pad(neurons_W.double()[order].flip(0).cumsum(0), (1, 0)).flip(0)
    damped_WW = _damped(gram_WW, _TYPICAL)
    scale_W = damped_WW.diagonal().rsqrt()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped_WW * scale_W * scale_W[:, None]))
    there, gone, costs = torch.ones_like(neurons_W, dtype=torch.bool), [], []
    block = -(-len(neurons_W) // 32)
    for left in range(len(neurons_W), 0, -block):
        # One by one among the likeliest, and the matrix of all the others only once for a number of them.
        saliency_W = (neurons_W / inverse.diagonal()).masked_fill(~there, torch.inf)
        likely = saliency_W.topk(min(2 * block, left), largest=False).indices
        small, saliency = inverse[likely[:, None], likely], neurons_W[likely]
        taken = []
        for _ in range(min(block, left)):
            cost = saliency / small.diagonal()
            cost[taken] = torch.inf
            next_one = int(cost.argmin())
            taken.append(next_one)
            costs.append(cost[next_one])
            small = small - torch.outer(small[:, next_one], small[next_one] / small[next_one, next_one])
        out = likely[taken]
        gone.append(out)
        there[out] = False
        across = inverse[out]
        inverse.addmm_(across.T, torch.linalg.solve(across[:, out], across), alpha=-1)
    return torch.cat(gone).flip(0), F.pad(torch.stack(costs).double().cumsum(0), (1, 0)).flip(0)


def refit(down_HW: torch.Tensor, kept: torch.Tensor, gram: Gram) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The down projection of an expert that keeps only some neurons, by ridge regression of the full expert's output on
    the kept activations. The ridge pulls towards the columns as they were, so that without tokens nothing changes; of
    several strengths, and no refit at all, the one is taken that does best on the tokens that were held out.

    Args:
        down_HW (`torch.Tensor`): Down projection of the full expert.
        kept (`torch.Tensor`): Indices of the neurons it keeps.
        gram ([`Gram`]): Of the full expert's activations.

    Returns:
        The new columns, [H, kept], and three sums of squares over tokens and some outputs: of the full output, and of
        its error without refit and with it.
    """
    down_HW, count = down_HW.float(), len(kept)
    dropped = torch.ones(down_HW.shape[1], dtype=torch.bool)
    dropped[kept] = False
    order = torch.cat([kept, dropped.nonzero().flatten()])
    fitted_WW, checked_WW = (part.cpu()[order[:, None], order] for part in gram.parts)
    gram_WW, lost_HW = fitted_WW + checked_WW, down_HW[:, dropped]
    some = slice(None, None, max(1, len(down_HW) // _OUTPUTS))
    # New columns = old columns + correction, and the correction alone solves a ridge regression towards zero.

    def correction(gram_WW: torch.Tensor, lost_HW: torch.Tensor, strength: float) -> torch.Tensor:
        return ridge(gram_WW[:count, :count], gram_WW[:count, count:] @ lost_HW.T, strength).T

    def error(gram_WW: torch.Tensor, correction_HW: torch.Tensor) -> torch.Tensor:
        return square(torch.cat([-correction_HW, lost_HW[some]], dim=1), gram_WW)

    whole, nothing = square(down_HW[some][:, order], gram_WW), torch.zeros(len(down_HW[some]), count)
    without = error(gram_WW, nothing)
    if not count or not lost_HW.any():
        return down_HW[:, kept], torch.stack([whole, without, without])
    errors = {strength: error(checked_WW, correction(fitted_WW, lost_HW[some], strength)) for strength in RIDGES}
    strength = min(errors, key=errors.get)
    best_HW = correction(gram_WW, lost_HW, strength)
    refitted = error(gram_WW, best_HW[some])
    if errors[strength] >= error(checked_WW, nothing) or refitted > without:
        return down_HW[:, kept], torch.stack([whole, without, without])
    return down_HW[:, kept] + best_HW, torch.stack([whole, without, refitted])


def square(matrix_HW: torch.Tensor, gram_WW: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of ||matrix a||^2."""
    return ((matrix_HW @ gram_WW) * matrix_HW).sum(dtype=torch.float64).clamp(min=0)


def ridge(gram: torch.Tensor, moments: torch.Tensor, strength: float = RIDGES[0]) -> torch.Tensor:
    """Solve (gram + ridge) x = moments, with a ridge of this strength, relative to the diagonal."""
    damped = _damped(gram, strength)
    torch.linalg.cholesky(damped, out=damped)
    return torch.cholesky_solve(moments, damped)


def _damped(gram: torch.Tensor, strength: float) -> torch.Tensor:
    """The Gram matrix with a ridge."""
    damped = gram.clone()
    diagonal = damped.diagonal()
    if not diagonal.isfinite().all():
        raise ValueError("the source computes values that are not finite on the calibration tokens: check its weights")
    # For each input its own: a few neurons are far more active than others, and would drown them.
    diagonal.mul_(1 + strength).add_(1e-6 * diagonal.mean() if diagonal.any() else 1.0)
    return damped


def linear_rows(gram_HH: torch.Tensor, moments_HE: torch.Tensor, tokens: int) -> torch.Tensor:
    """
    Router rows [E, H] whose logits predict targets by least squares, scaled so that logits vary by 1 over tokens.
    What all targets share is taken out: a softmax does not see it.

    Args:
        gram_HH (`torch.Tensor`): Sum over tokens of the outer products of the inputs.
        moments_HE (`torch.Tensor`): Sum over tokens of inputs times targets.
        tokens (`int`): Number of tokens.
    """
    rows_EH = ridge(gram_HH, moments_HE - moments_HE.mean(1, keepdim=True)).T
    variance = ((rows_EH @ gram_HH) * rows_EH).sum(1).mean() / tokens
    return rows_EH / variance.sqrt() if variance > 0 else rows_EH  # zero where tokens are all alike


def cluster(points: torch.Tensor, capacities: list[int], generator: torch.Generator, rounds: int = 20) -> torch.Tensor:
    """
    [N] cluster of each point of `points` [N, H], by k-means in which a cluster takes no more points than its capacity;
    capacities add up to at least N.
    """
    centroids = points[torch.randperm(len(points), generator=generator)[: len(capacities)]].clone()
    for _ in range(rounds):
        assigned_N = assign(torch.cdist(points, centroids), capacities)
        for c in assigned_N.unique():
            centroids[c] = points[assigned_N == c].mean(0)
    return assigned_N


def assign(distances_NC: torch.Tensor, capacities: list[int]) -> torch.Tensor:
    """[N] nearest cluster that has room; where a cluster has too many takers, the nearest are taken."""
    assigned_N = torch.full((len(distances_NC),), -1)
    room_C = torch.tensor(capacities)
    open_NC = distances_NC.clone()
    open_NC[:, room_C == 0] = float("inf")
    while (left := (assigned_N < 0).nonzero().flatten()).numel():
        distance, wish = open_NC[left].min(1)
        for c in wish.unique():
            takers = left[wish == c]
            takers = takers[distance[wish == c].argsort(stable=True)[: room_C[c]]]
            assigned_N[takers] = c
            room_C[c] -= len(takers)
            if room_C[c] == 0:
                open_NC[:, c] = float("inf")
    return assigned_N
