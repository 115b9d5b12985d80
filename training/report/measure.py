"""Where the tokens of a text go: expert choices and loss, token by token."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mohge import MoHGEForCausalLM, record_routing

from ..loop.metrics import RouterStatistics, dense_parameters


_POSITIONS = 512
"""Positions whose logits exist in float32 at the same time."""


@dataclass
class RoutingEvaluation:
    """Routing and loss of a text. The T tokens come in the order of the text."""

    statistics: RouterStatistics
    widths: list[int]
    """The W distinct widths of the model's experts, ascending."""
    token_ids: torch.Tensor
    """[T]"""
    token_loss: torch.Tensor
    """[T] loss of the prediction made at each token, in nats; NaN where there is nothing to predict."""
    group_choices: torch.Tensor
    """[T, G] how many experts of each group the token was sent to, over all layers."""
    width_choices: torch.Tensor
    """[T, W] how many experts of each width the token was sent to, over all layers."""

    @property
    def activated_width(self) -> torch.Tensor:
        """[T] intermediate width that each token activated, mean over layers."""
        return self.width_choices @ torch.tensor(self.widths).float() / len(self.statistics.layers)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss."""
        return float(self.token_loss.nanmean().exp())


@torch.no_grad()
def evaluate_routing(model: MoHGEForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> RoutingEvaluation:
    """
    Run a model on text and record where each token goes.

    Args:
        model ([`MoHGEForCausalLM`]): The model; it is put into evaluation mode.
        batches (`Iterable[dict[str, torch.Tensor]]`):
            Batches without padding: `input_ids` `[B, S]`, which may differ in shape from batch to batch, and, where
            documents are packed, `position_ids` and `labels` as `collate_packed` makes them.
    """
    model.eval()
    config = model.config
    statistics = RouterStatistics(config, dense_parameters(model))
    widths = sorted({width for layer in statistics.layers for width in layer.expert_widths})
    # Column of each expert in the sums over groups and over widths; that of an empty slot, with id E, is the last.
    columns = [
        (
            torch.tensor([*layer.expert_groups, statistics.num_groups], device=model.device),
            torch.tensor([*map(widths.index, layer.expert_widths), len(widths)], device=model.device),
        )
        for layer in statistics.layers
    ]
    records = []
    for batch in batches:
        labels = batch.get("labels", batch["input_ids"]).to(model.device)
        inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
        with record_routing() as routing:
            logits = model(**inputs, use_cache=False).logits
        tokens = labels.numel()
        groups = torch.zeros(tokens, statistics.num_groups + 1, device=model.device)
        chosen_widths = torch.zeros(tokens, len(widths) + 1, device=model.device)
        counts = []
        for layer, routed, (group_of, width_of) in zip(statistics.layers, routing, columns, strict=True):
            index, one = routed.index, torch.ones(routed.index.shape, device=model.device)
            groups.scatter_add_(1, group_of[index], one)
            chosen_widths.scatter_add_(1, width_of[index], one)
            counts.append(index.flatten().bincount(minlength=layer.num_experts + 1)[:-1])
        statistics.add(counts, tokens)
        records.append([inputs["input_ids"].flatten(), _losses(logits, labels), groups[:, :-1], chosen_widths[:, :-1]])
        records[-1] = [values.cpu() for values in records[-1]]
    return RoutingEvaluation(statistics, widths, *(torch.cat(values) for values in zip(*records, strict=True)))


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B S]: loss of the prediction at each position, NaN where the next label is -100."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    pieces = zip(logits.flatten(0, 1).split(_POSITIONS), targets.split(_POSITIONS), strict=True)
    losses = [F.cross_entropy(x.float(), target, reduction="none") for x, target in pieces]
    return torch.cat(losses).masked_fill(targets == -100, float("nan"))


class Decile(NamedTuple):
    """A tenth of the tokens of a text, as equally difficult as can be."""

    difficulty: tuple[float, float]
    """Smallest and largest value of what the tokens were ordered by."""
    activated_width: float
    error: float
    """Of `activated_width`, for 95%."""
    group_share: torch.Tensor
    """[G] share of each group in the choices of these tokens."""


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Mean of the values, and how far that of all such may lie from it: 1.96 standard errors, or NaN for one value."""
    deviation = values.std(correction=1) if len(values) > 1 else math.nan
    return float(values.mean()), 1.96 * float(deviation) / math.sqrt(len(values))


def deciles(evaluation: RoutingEvaluation, difficulty: torch.Tensor) -> list[Decile]:
    """Order the tokens by `difficulty` `[T]`, leave out those where it is NaN, and sum up each tenth."""
    known = difficulty.isfinite().nonzero().flatten()
    order = known[difficulty[known].argsort(stable=True)]
    widths, parts = evaluation.activated_width, []
    for tokens in order.tensor_split(min(10, len(order))):
        choices = evaluation.group_choices[tokens].sum(0)
        limits = float(difficulty[tokens[0]]), float(difficulty[tokens[-1]])
        parts.append(Decile(limits, *mean_and_error(widths[tokens]), choices / choices.sum()))
    return parts


class TopTokens(NamedTuple):
    """The tokens that choose experts of one width more than other tokens do."""

    share: float
    """Share of the width in the choices of all tokens."""
    tokens: list[tuple[int, int, float]]
    """Id, number of occurrences, and share of the width in this token's choices over `share`; the largest first."""


def top_tokens(token_ids: torch.Tensor, choices: torch.Tensor, minimum: int, number: int = 12) -> list[TopTokens]:
    """
    Tokens that prefer each width, after Table 3 of HMoE (https://huggingface.co/papers/2408.10681).

    Args:
        token_ids (`torch.Tensor`): `[T]`.
        choices (`torch.Tensor`): `[T, W]`, how often each token chose each width (or group).
        minimum (`int`): Occurrences that a token must have: few say nothing.
        number (`int`, *optional*, defaults to 12): Tokens per width at most.

    Returns:
        `list[TopTokens]`: One for each width.
    """
    kinds, kind_of, counts = token_ids.unique(return_inverse=True, return_counts=True)
    per_kind = torch.zeros(len(kinds), choices.shape[1]).index_add_(0, kind_of, choices)
    share = choices.sum(0) / choices.sum()
    lift = per_kind / per_kind.sum(1, keepdim=True) / share
    lift[counts < minimum] = 0
    result = []
    for width in range(choices.shape[1]):
        best = lift[:, width].nan_to_num().topk(min(number, len(kinds)))
        tokens = [
            (int(kinds[i]), int(counts[i]), value) for value, i in zip(*map(torch.Tensor.tolist, best), strict=True)
        ]
        result.append(TopTokens(float(share[width]), [token for token in tokens if token[2] > 1]))
    return result


def format_router_table(statistics: RouterStatistics) -> str:
    """The router table as text."""
    header = (
        f"{'group':>5} {'width':>6} {'experts':>8} {'choices':>10} {'share':>7} {'even':>7} {'MaxVio':>7} {'dead':>5}"
    )
    rows = [
        f"{row['group']:>5} {_values(row['widths']):>6} {_values(row['experts']):>8} {row['choices']:>10,} "
        f"{row['share']:>7.1%} "
        f"{row['even_share']:>7.1%} {row['max_vio']:>7.2f} {row['dead_experts']:>5}"
        for row in statistics.table()
    ]
    return "\n".join([header, *rows])


def _values(values: list[int]) -> str:
    return "/".join(map(str, values))


__all__ = [
    "Decile",
    "RoutingEvaluation",
    "TopTokens",
    "deciles",
    "evaluate_routing",
    "format_router_table",
    "mean_and_error",
    "top_tokens",
]
