"""Plots and a self-contained page about a trained model's routing."""

import base64
import html
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F

from mohge import MoHGEForCausalLM

from .metrics import RouterStatistics


matplotlib.use("Agg")
from matplotlib import pyplot


class RoutingEvaluation(NamedTuple):
    """Routing of some text, token by token."""

    statistics: RouterStatistics
    token_loss: torch.Tensor
    """[T] loss of each predicted token, in nats."""
    group_share: torch.Tensor
    """[T, G] share of each group in the choices of the token that made the prediction, over all layers."""
    activated_width: torch.Tensor
    """[T] intermediate width that this token activated, mean over layers."""


@torch.no_grad()
def evaluate_routing(model: MoHGEForCausalLM, input_ids: torch.Tensor, batch_size: int = 8) -> RoutingEvaluation:
    """Run `model` on `input_ids` `[B, S]` (no padding) and record where each token went."""
    model.eval()
    config = model.config
    statistics = RouterStatistics(config, model.num_parameters() - config.routed_parameters)
    losses, shares, widths = [], [], []
    for batch in input_ids.split(batch_size):
        outputs = model.model(batch, output_router_index=True)
        logits = model.lm_head(outputs.last_hidden_state)[:, :-1].float()
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
        choices = torch.zeros(batch.numel(), statistics.num_groups, device=batch.device)
        width = torch.zeros(batch.numel(), device=batch.device)
        counts = []
        for router, index in zip(model.model.routers, outputs.router_index, strict=True):
            groups, experts = router.membership_GE.shape
            chosen = torch.zeros(batch.numel(), experts + 1, device=batch.device).scatter_(1, index, 1.0)
            chosen = chosen[:, :-1]  # empty slots have id E
            counts.append(chosen.sum(0))
            per_group = chosen @ router.membership_GE.float().T
            choices[:, :groups] += per_group
            width += per_group @ router.widths_G.float()
        statistics.add(counts, batch.numel())
        predicting = [x.unflatten(0, batch.shape)[:, :-1].flatten(0, 1) for x in (choices, width)]
        shares.append(predicting[0] / predicting[0].sum(1, keepdim=True))
        widths.append(predicting[1] / len(counts))
    return RoutingEvaluation(statistics, *(torch.cat(values).cpu() for values in (losses, shares, widths)))


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


def write_report(
    folder: Path, history: list[dict], routing: RoutingEvaluation, facts: dict[str, str], sample: str
) -> Path:
    """
    Write `loss.png`, `group_load.png`, `group_by_loss.png` and `report.html`, which holds them all, into `folder`.

    Args:
        folder (`Path`): An existing folder.
        history (`list[dict]`): `log_history` of a [`MoHGETrainer`].
        routing ([`RoutingEvaluation`]): Routing of held-out text.
        facts (`dict[str, str]`): Lines of the summary.
        sample (`str`): Generated text.

    Returns:
        `Path`: The page.
    """
    labels = [f"group {row['group']}, width {_values(row['widths'])}" for row in routing.statistics.table()]
    colors = pyplot.get_cmap("viridis")(torch.linspace(0.05, 0.9, len(labels)).numpy())
    figures = {
        "loss": ("Loss", _plot_loss(history)),
        "group_load": ("Load per group over training", _plot_group_load(history, labels, colors)),
        "group_by_loss": ("Group choice against token loss, held out", _plot_by_loss(routing, labels, colors)),
    }
    images = []
    for name, (title, figure) in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close(figure)
        data = base64.b64encode(path.read_bytes()).decode()
        images.append(f'<h2>{title}</h2>\n<img alt="{title}" src="data:image/png;base64,{data}">')
    summary = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    page = folder / "report.html"
    page.write_text(
        _PAGE.format(
            summary=summary,
            table=html.escape(format_router_table(routing.statistics)),
            images="\n".join(images),
            sample=html.escape(sample),
        ),
        encoding="utf-8",
    )
    return page


def _plot_loss(history: list[dict]) -> pyplot.Figure:
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for key, label in (("lm_loss", "training, language model"), ("loss", "training, with router losses")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry and "lm_loss" in entry]
        axes.plot(*zip(*points, strict=True), label=label)
    evaluated = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    axes.plot(*zip(*evaluated, strict=True), "o", label="held out")
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    return figure


def _plot_group_load(history: list[dict], labels: list[str], colors) -> pyplot.Figure:
    entries = [entry for entry in history if "router/tokens_group_0" in entry]
    load = torch.tensor([[entry[f"router/tokens_group_{g}"] for g in range(len(labels))] for entry in entries])
    share = load / load.sum(1, keepdim=True)
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for group, label in enumerate(labels):
        axes.plot([entry["step"] for entry in entries], share[:, group], color=colors[group], label=label)
    axes.set(xlabel="step", ylabel="share of choices", ylim=(0, None))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _plot_by_loss(routing: RoutingEvaluation, labels: list[str], colors) -> pyplot.Figure:
    deciles = routing.token_loss.argsort().tensor_split(min(10, len(routing.token_loss)))
    share = torch.stack([routing.group_share[tokens].mean(0) for tokens in deciles])
    width = torch.stack([routing.activated_width[tokens].mean() for tokens in deciles])
    position = torch.arange(1, len(deciles) + 1)
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    bottom = torch.zeros(len(deciles))
    for group, label in enumerate(labels):
        axes.bar(position, share[:, group], bottom=bottom, color=colors[group], label=label)
        bottom += share[:, group]
    axes.set(xlabel="decile of token loss (1 = easiest)", ylabel="share of choices", xticks=position.tolist())
    right = axes.twinx()
    right.plot(position, width, "o-", color="crimson", label="activated width")
    right.set_ylabel("activated width per layer")
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles, [*labels, "activated width"], loc="upper left", bbox_to_anchor=(1.12, 1))
    return figure


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mohge report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
th {{ text-align: left; padding-right: 2rem; font-weight: 600; }}
pre {{ background: #f4f4f4; padding: 1rem; overflow-x: auto; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>mohge report</h1>
<table>{summary}</table>
<h2>Router, held out</h2>
<pre>{table}</pre>
{images}
<h2>Sample</h2>
<pre>{sample}</pre>
</body>
</html>
"""

__all__ = ["RoutingEvaluation", "evaluate_routing", "format_router_table", "write_report"]
