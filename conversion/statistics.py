"""What calibration measures in a layer, and what follows from it: importance, refit, and first rows for routers.

Shapes: T tokens, H hidden size, D or W width of a feed-forward, E experts. A suffix names the shape of a tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from mohge.backbones_mohge import FeedForward


Observer = Callable[[torch.Tensor, torch.Tensor], None]
"""Called for each batch with the input [T, H] of a feed-forward, after its norm, and its activations [T, D]."""

_SAMPLE = 8192
"""Most tokens of a sample."""
_RIDGE = 1e-2
"""Strength of the ridge, relative to the Gram matrix's diagonal."""


@contextmanager
def observe_dense(found: FeedForward, observer: Observer) -> Iterator[None]:
    """Let `observer` see a dense feed-forward."""
    inputs = []  # of the feed-forward and then of its projections, the last of which is down
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
        for module in (found.module, *(m for m in found.module.modules() if isinstance(m, nn.Linear)))
    ]

    def observe(module, args, output):
        observer(inputs[0], inputs[-1])
        inputs.clear()

    hooks.append(found.module.register_forward_hook(observe))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class DenseStatistics:
    """
    Sums over calibration tokens of a dense feed-forward, and a sample of its inputs.

    Args:
        width (`int`): Width D of the feed-forward.
        tokens (`int`): Number of tokens that will come.
        gram (`bool`): Whether to take the Gram matrix of the activations.
        device (`str`, *optional*, defaults to `"cpu"`): Where to add up.
    """

    def __init__(self, width: int, tokens: int, gram: bool, device: str = "cpu"):
        self.tokens = 0
        self.activation_D = torch.zeros(width, device=device)
        """Sum of the activations' magnitudes."""
        self.gram_DD = torch.zeros(width, width, device=device) if gram else None
        """Sum of the outer products of the activations."""
        self._stride = -(-tokens // _SAMPLE)
        self._inputs: list[torch.Tensor] = []
        self._positions: list[torch.Tensor] = []

    def __call__(self, inputs_TH: torch.Tensor, activations_TD: torch.Tensor):
        """Take in a batch."""
        self.activation_D += activations_TD.abs().sum(0)
        if self.gram_DD is not None:
            self.gram_DD.addmm_(activations_TD.T, activations_TD)
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
        experts (`int`): Number of experts E.
        width (`int`): Their width W.
        device (`str`, *optional*, defaults to `"cpu"`): Where to add up.
    """

    def __init__(self, experts: int, width: int, device: str = "cpu"):
        self.tokens_E = torch.zeros(experts, device=device)
        self.saliency_E = torch.zeros(experts, device=device)
        """Sum of combine weight times norm of the output (REAP, https://huggingface.co/papers/2510.13999)."""
        self.activation_EW = torch.zeros(experts, width, device=device)
        """Sum of the activations' magnitudes."""
        self.gram_EWW = torch.zeros(experts, width, width, device=device)
        """Sum of the outer products of the activations, scaled by the combine weight."""

    def add(self, expert: int, activations_TW: torch.Tensor, output_TH: torch.Tensor, weights_T: torch.Tensor):
        """Take in the tokens of one expert; `output_TH` is already scaled by `weights_T`."""
        self.tokens_E[expert] += len(weights_T)
        self.saliency_E[expert] += output_TH.norm(dim=-1).sum()
        self.activation_EW[expert] += activations_TW.abs().sum(0)
        scaled_TW = activations_TW * weights_T[:, None]
        self.gram_EWW[expert].addmm_(scaled_TW.T, scaled_TW)


@contextmanager
def observe_experts(found: FeedForward, statistics: ExpertStatistics) -> Iterator[None]:
    """Let `statistics` see the routed experts of a mixture, of transformers' own class."""

    def linear(self, x, name, expert):
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        return F.linear(x, weight.T if self.is_transposed else weight, bias)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token_idx, position = torch.where(top_k_index == expert)
            weights = top_k_weights[token_idx, position]
            activations = self._apply_gate(linear(self, hidden_states[token_idx], "gate_up_proj", expert))
            result = linear(self, activations, "down_proj", expert) * weights[:, None]
            statistics.add(expert, activations, result, weights)
            output.index_add_(0, token_idx, result)
        return output

    config, name = found.experts.config, "mohge_statistics"
    before = config._experts_implementation
    ALL_EXPERTS_FUNCTIONS[name] = forward
    config._experts_implementation = name
    try:
        yield
    finally:
        config._experts_implementation = before
        del ALL_EXPERTS_FUNCTIONS[name]


def important_neurons(activation_W: torch.Tensor, down_HW: torch.Tensor, count: int) -> torch.Tensor:
    """
    Indices, ascending, of the `count` neurons whose activation magnitude times norm of their column of the down
    projection is largest. Where nothing was activated, the columns alone decide.
    """
    norms_W = down_HW.float().norm(dim=0)
    importance_W = activation_W * norms_W if activation_W.any() else norms_W
    return importance_W.topk(count).indices.sort().values


def refit(down_HW: torch.Tensor, kept: torch.Tensor, gram_WW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The down projection of an expert that keeps only some neurons, by ridge regression of the full expert's output on
    the kept activations. The ridge pulls towards the columns as they were, so that without tokens nothing changes,
    and with any the calibration error cannot rise.

    Args:
        down_HW (`torch.Tensor`): Down projection of the full expert.
        kept (`torch.Tensor`): Indices of the neurons it keeps.
        gram_WW (`torch.Tensor`): Sum over tokens of the outer products of the full expert's activations.

    Returns:
        The new columns, [H, kept], and three sums of squares over tokens: of the full output, and of its error
        without refit and with it.
    """
    down_HW, count = down_HW.float(), len(kept)
    dropped = torch.ones(down_HW.shape[1], dtype=torch.bool)
    dropped[kept] = False
    order = torch.cat([kept, dropped.nonzero().flatten()])
    gram_WW, lost_HW = gram_WW[order[:, None], order], down_HW[:, dropped]
    # New columns = old columns + correction, and the correction alone solves a ridge regression towards zero.
    correction_HW = ridge(gram_WW[:count, :count], gram_WW[:count, count:] @ lost_HW.T).T
    whole, without = square(down_HW[:, order], gram_WW), square(lost_HW, gram_WW[count:, count:])
    refitted = square(torch.cat([-correction_HW, lost_HW], dim=1), gram_WW)
    if refitted > without:  # rounding, where there is nothing to gain
        return down_HW[:, kept], torch.stack([whole, without, without])
    return down_HW[:, kept] + correction_HW, torch.stack([whole, without, refitted])


def square(matrix_HW: torch.Tensor, gram_WW: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of ||matrix a||^2."""
    return ((matrix_HW @ gram_WW) * matrix_HW).sum(dtype=torch.float64).clamp(min=0)


def ridge(gram: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Solve (gram + ridge) x = moments, with a ridge on the diagonal."""
    damped = gram.clone()
    diagonal = damped.diagonal()
    if not diagonal.isfinite().all():
        raise ValueError("the source computes values that are not finite on the calibration tokens: check its weights")
    # For each input its own: a few neurons are far more active than others, and would drown them.
    diagonal.mul_(1 + _RIDGE).add_(1e-6 * diagonal.mean() if diagonal.any() else 1.0)
    torch.linalg.cholesky(damped, out=damped)
    return torch.cholesky_solve(moments, damped)


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
