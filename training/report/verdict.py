"""What the figures of a page say, in sentences."""

import math

import torch

from .layout import as_perplexity
from .measure import Decile, deciles, mean_and_error
from .subject import Report, span


def verdict(report: Report) -> list[str]:
    """What matters most about a run or a model, from its own figures."""
    sentences = []
    if report.control is not None:
        sentences.append(against_control(report))
    evaluation = report.evaluation
    if evaluation is not None:
        sentences.append(compare_tenths(deciles(evaluation, evaluation.token_loss), "easiest", "hardest"))
    statistics, where = report.newest_routing
    if statistics is not None:
        summary, experts = statistics.summary(), sum(map(len, statistics.counts))
        sentences.append(
            f"The busiest expert of a layer takes {1 + summary['max_vio']:.2f} times an even load, mean over layers, "
            f"and {summary['dead_experts']:.0f} of {experts:,} experts are dead (get no token), {where}."
        )
    return sentences


_PARTS = 64
"""Parts of a text whose mean losses are compared: tokens in a row have too much in common to count one by one."""


def against_control(report: Report) -> str:
    """One sentence that compares a model with its control on the same text, by quality, size and work."""
    control, differences = report.control, report.evaluation.token_loss - report.control.evaluation.token_loss
    parts = [float(part.nanmean()) for part in differences.tensor_split(min(_PARTS, len(differences) // 2))]
    mean, error = mean_and_error(torch.tensor(parts))
    gap = f"{abs(mean):.3f} nats per token in loss, +-{error:.3f} for 95%"
    if not abs(mean) > error:  # also where there is no error
        winner = f"a draw on this text ({gap})"
    elif mean < 0:
        winner = f"the unequal experts win by {gap}"
    else:
        winner = f"the uniform control wins by {gap}"
    return (
        f"Perplexity {_perplexity(report)} with {_experts(report)} against {_perplexity(control)} with "
        f"{_experts(control)}, both on {report.text}, with {report.sizes.total:,} against {control.sizes.total:,} "
        f"parameters in all, and {_flops(report):,} against {_flops(control):,} FLOPs forward per "
        f"token as routed: {winner}, and one seed each."
    )


def _perplexity(report: Report) -> str:
    return as_perplexity(report.evaluation.perplexity)


def _flops(report: Report) -> int:
    return report.as_routed()[0][1].flops


def _experts(report: Report) -> str:
    widths = report.evaluation.widths
    number = span(layer.num_experts for layer in report.config.sparse_layers)
    return f"{number} experts of {span(widths)} neurons ({report.config.router_type})"


def compare_tenths(parts: list[Decile], first: str, last: str) -> str:
    """One sentence on whether tokens of the last of `parts` used more neurons than those of the first."""
    before, after = parts[0], parts[-1]
    change, error = after.activated_width - before.activated_width, math.hypot(before.error, after.error)
    relation = "no clear difference"
    if abs(change) > error:
        relation = f"{abs(change) / max(before.activated_width, 1e-9):.1%} {'more' if change > 0 else 'less'}"
    return (
        f"The {last} tenth of the tokens used {after.activated_width:.1f} neurons per layer and the {first} tenth "
        f"{before.activated_width:.1f}: {relation} ({change:+.1f}, +-{error:.1f} for 95%)."
    )
