"""Figures of a training run: what its log says, step by step."""

import re

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mohge import MoHGEConfig

from .drawing import (
    LINES,
    Exhibit,
    add_color_bar,
    draw_heat_map,
    draw_lines,
    draw_reference,
    evenly,
    mark_bands,
    mark_steps,
)
from .layout import as_text, expert_order, group_labels, layer_numbers


_ROWS = 50
"""Rows of a figure's table at most."""
_PANELS = 6
"""Layers at most whose experts are drawn over time."""
LOAD_LIMIT = 4.0
"""Load, relative to an even one, beyond which colours do not change: one busy expert would darken all others."""


def loss_exhibit(history: list[dict]) -> Exhibit | None:
    """The losses, or None if none was logged."""
    training = [entry for entry in history if "loss" in entry]
    curves = {}
    if any("lm_loss" in entry for entry in training):
        curves["training, language model"] = [(e["step"], e["lm_loss"]) for e in training if "lm_loss" in e]
        curves["training, with router losses"] = [(e["step"], e["loss"]) for e in training]
    else:
        curves["training"] = [(e["step"], e["loss"]) for e in training]
    for entry in history:
        for key in entry:
            if match := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
                name = "held out" if match[1] is None else f"held out, {match[1]}"
                curves.setdefault(name, []).append((entry["step"], entry[key]))
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        held_out = ("o", "s", "D", "^")
        for index, (name, points) in enumerate(curves.items()):
            steps, losses = zip(*points, strict=True)
            if name.startswith("training"):
                style = {"color": "#0072B2"} if index == 0 else {"color": "#D55E00", "linestyle": "--"}
            else:
                style = {"color": "black", "linestyle": ":", "marker": held_out[index % 4], "linewidth": 1}
            axes.plot(steps, losses, label=name, **style)
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="upper right")

    ends = [
        f"{name}: {p[0][1]:.3f} at step {p[0][0]}, {p[-1][1]:.3f} at step {p[-1][0]}" for name, p in curves.items()
    ]
    by_step = {name: dict(points) for name, points in curves.items()}
    steps = evenly(sorted({step for points in by_step.values() for step in points}), _ROWS)
    return Exhibit(
        "Loss",
        "Mean loss of a predicted token. The dashed line is what the optimizer sees.",
        f"Line chart of the loss against the step. {'; '.join(ends)}.",
        draw,
        (300, 280),
        ["step", *curves],
        [[step, *(points.get(step) for points in by_step.values())] for step in steps],
    )


_FIGURES = {
    "router/activated_parameters": "activated parameters per token",
    "router/group_entropy": "entropy of group choice, nats",
    "router/max_vio": "MaxVio",
    "router/dead_experts": "dead experts",
}


def router_exhibit(history: list[dict], config: MoHGEConfig, even: int, measured: float | None) -> Exhibit | None:
    """What [`RouterStatistics`] says over time, or None if nothing was logged. Activated parameters per token are
    compared with `even`, their number if experts are equally likely, and `measured`, their number on the text."""
    entries = [entry for entry in history if all(name in entry for name in _FIGURES)]
    if not entries:
        return None
    steps = [entry["step"] for entry in entries]
    entropy = float(np.mean([np.log(layer.num_groups) for layer in config.sparse_layers]))

    def draw(figure: Figure, narrow: bool):
        panels = figure.subplots(*((4, 1) if narrow else (2, 2))).flat
        for axes, (name, label) in zip(panels, _FIGURES.items(), strict=True):
            axes.plot(steps, [entry[name] for entry in entries], color="#0072B2")
            axes.margins(y=0.3)  # room for the references' labels
            if name == "router/activated_parameters":
                axes.yaxis.set_major_formatter(EngFormatter())
                draw_reference(axes, even, "experts equally likely", right=False)
                if measured is not None:
                    draw_reference(axes, measured, "on the text")
            elif name == "router/group_entropy":
                draw_reference(axes, entropy, "groups equally likely", right=False)
            else:
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=name == "router/dead_experts"))
            axes.set(title=label, xlabel="step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    first, last = entries[0], entries[-1]
    changes = [f"{label}, {as_text(first[name])} to {as_text(last[name])}" for name, label in _FIGURES.items()]
    return Exhibit(
        "Router",
        "Over the tokens of each logging interval. Entropy and MaxVio (the busiest expert's load over the mean, minus "
        "1) are means over layers; dead experts, those without a token, are counted over all layers.",
        f"Four line charts against the step, first to last: {'; '.join(changes)}.",
        draw,
        (420, 760),
        ["step", *_FIGURES.values()],
        [[entry["step"], *(entry[name] for name in _FIGURES)] for entry in evenly(entries, _ROWS)],
    )


def group_exhibit(history: list[dict], config: MoHGEConfig) -> Exhibit | None:
    """Share of each group over time, or None if it was not logged or there is one group."""
    labels = group_labels(config)
    names = [f"router/tokens_group_{group}" for group in range(len(labels))]
    entries = [entry for entry in history if names[-1] in entry]
    if not entries or len(labels) == 1:
        return None
    steps = [entry["step"] for entry in entries]
    choices = np.array([[entry[name] for name in names] for entry in entries])
    shares = choices / choices.sum(1, keepdims=True)

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        axes.set_xlabel("step")
        if len(labels) <= LINES:
            draw_lines(axes, steps, shares.T, labels)
            axes.set_ylabel("share of choices")
            return
        image = draw_heat_map(axes, shares.T, shares.max())
        mark_bands(axes, [1] * len(labels), labels, vertical=True)
        mark_steps(axes, steps, 5)
        axes.set_ylabel("group: width")
        add_color_bar(figure, image, axes, "share of choices")

    ends = [f"{label}, {a:.1%} to {b:.1%}" for label, a, b in zip(labels, shares[0], shares[-1], strict=True)]
    return Exhibit(
        "Load per group",
        "Share of each group in the choices of each logging interval, over all layers. Labels are group: width.",
        f"Share of each group in the choices against the step, first to last: {'; '.join(ends)}.",
        draw,
        (300, 300) if len(labels) <= LINES else (420, 460),
        ["step", *labels],
        [[step, *row] for step, row in evenly([*zip(steps, shares.tolist(), strict=True)], _ROWS)],
    )


def expert_exhibit(history: list[dict], config: MoHGEConfig) -> Exhibit | None:
    """Load of each expert over time, or None if it was not logged."""
    entries = [entry for entry in history if "router_load" in entry]
    if not entries:
        return None
    steps, layers, numbers = [entry["step"] for entry in entries], config.sparse_layers, layer_numbers(config)
    loads = []  # by layer: [E in order, entries]
    for index, layer in enumerate(layers):
        counts = torch.tensor([entry["router_load"][index] for entry in entries]).float()
        counts = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)
        loads.append(counts[:, expert_order(layer)].T.numpy())
    shown = evenly(range(len(layers)), _PANELS)
    largest = max(loads[i].max() for i in shown)

    def draw(figure: Figure, narrow: bool):
        high = panel_rows[narrow]
        wide = -(-len(shown) // high)
        grid = figure.subplots(high, wide, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        for place, i in enumerate(shown):
            axes = grid.flat[place]
            image = draw_heat_map(axes, loads[i], min(largest, LOAD_LIMIT))
            names = [str(group) for group in range(layers[i].num_groups)]
            mark_bands(axes, layers[i].expert_counts, names, vertical=True)
            mark_steps(axes, steps, 2 if narrow else 3)
            axes.set_title(f"layer {numbers[i]}")
            if place % wide == 0:
                axes.set_ylabel("group")
            if place + wide >= len(shown):
                axes.set_xlabel("step")
        add_color_bar(figure, image, [*grid.flat[: len(shown)]], "load, 1 = even", capped=largest > LOAD_LIMIT)

    some = evenly(range(len(steps)), 5)
    of_all = "" if len(shown) == len(layers) else f" {len(shown)} of the {len(layers)} layers with experts."
    panel_rows = -(-len(shown) // 3), -(-len(shown) // 2)
    return Exhibit(
        "Load per expert",
        f"Tokens that chose each expert in a logging interval, over the layer's mean.{of_all} A row is an expert, "
        "sorted by group and then by id; groups are numbered from narrow to wide.",
        f"Heat maps of the load of every expert against the step, one for each layer. The largest load is "
        f"{largest:.2f} times an even one.",
        draw,
        (100 + 200 * panel_rows[0], 110 + 170 * panel_rows[1]),
        ["layer", "expert", "group", *(f"step {steps[t]}" for t in some)],
        [
            [numbers[i], expert, group, *map(float, loads[i][row, some])]
            for i in shown
            for row, (expert, group) in enumerate(
                zip(expert_order(layers[i]), sorted(layers[i].expert_groups), strict=True)
            )
        ],
    )
