"""Figures of a training run: what its log says, step by step."""

import math
import re

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mohge import MoHGEConfig

from .drawing import (
    BLUE,
    INK,
    LINES,
    ORANGE,
    Exhibit,
    add_load_bar,
    draw_lines,
    draw_loads,
    draw_reference,
    evenly,
    group_styles,
    legend_below,
    mark_bands,
    mark_last,
    mark_steps,
    plot,
)
from .layout import as_perplexity, as_text, expert_order, group_labels, group_sizes, layer_numbers


_ROWS = 50
"""Rows of a figure's table at most."""
_OBJECTIVE = "training, without router losses"
"""The curve of a loss that is not the language model's: a divergence from a teacher, say."""
_PANELS = 6
"""Layers at most whose experts are drawn over time."""


def loss_curves(history: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """The losses that were logged, by name, as steps and values."""
    training = [entry for entry in history if "loss" in entry]
    curves = {}
    for key, name in (("lm_loss", "training, language model"), ("objective", _OBJECTIVE)):
        if any(key in entry for entry in training):
            curves[name] = [(e["step"], e[key]) for e in training if key in e]
    curves["training, with router losses" if curves else "training"] = [(e["step"], e["loss"]) for e in training]
    for entry in history:
        for key in entry:
            if match := re.fullmatch(r"eval_(?:(.+)_)?loss", key):
                name = "held out" if match[1] is None else f"held out, {match[1]}"
                curves.setdefault(name, []).append((entry["step"], entry[key]))
    return {name: points for name, points in curves.items() if points}


def loss_exhibit(history: list[dict]) -> Exhibit | None:
    """The losses, or None if none was logged."""
    curves = loss_curves(history)
    if not curves:
        return None

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        held_out = ("o", "s", "D", "^")
        for index, (name, points) in enumerate(curves.items()):
            steps, losses = zip(*points, strict=True)
            if name.startswith("training"):
                style = {"color": BLUE} if index == 0 else {"color": ORANGE, "linestyle": "--"}
            else:
                style = {"color": INK, "linestyle": ":", "marker": held_out[index % 4], "linewidth": 1}
            plot(axes, steps, losses, name, **style)
        axes.set(xlabel="step", ylabel="loss, nats per token")
        mark_last(axes, sorted({step for points in curves.values() for step, _ in points}))
        legend_below(axes)

    ends = [
        f"{name}: {p[0][1]:.3f} at step {p[0][0]}, {p[-1][1]:.3f} at step {p[-1][0]}" for name, p in curves.items()
    ]
    name, points = next(iter(curves.items()))
    (step, first), (last_step, last) = points[0], points[-1]
    perplexity = f", that is a perplexity of {as_perplexity(math.exp(min(last, 700)))} on the text it is trained on"
    by_step = {name: dict(points) for name, points in curves.items()}
    steps = evenly(sorted({step for points in by_step.values() for step in points}), _ROWS)
    return Exhibit(
        "Loss",
        "Mean loss of a predicted token, in nats. The dashed line is what the optimizer sees. The axis does not "
        "begin at 0.",
        f"The loss in training went from {first:.3f} at step {step:,} to {last:.3f} at step {last_step:,}"
        f"{'' if name == _OBJECTIVE else perplexity}.",
        f"Line chart of the loss against the step. {'; '.join(ends)}.",
        draw,
        (300 + 20 * len(curves), 280 + 20 * len(curves)),
        ["step", *curves],
        [[step, *(points.get(step) for points in by_step.values())] for step in steps],
    )


def training_losses(histories: dict[str, list[dict]]) -> dict[str, list[tuple[int, float]]]:
    """The language-model loss in training of each run that has logged one, as steps and values."""
    curves = {source: loss_curves(history) for source, history in histories.items()}
    return {source: next(iter(losses.values())) for source, losses in curves.items() if losses}


def compare_training(curves: dict[str, list[tuple[int, float]]]) -> Exhibit:
    """The [`training_losses`] of several runs on the same axes."""
    caption = "Language-model loss, in nats per token. The axis does not begin at 0."
    return compare("Loss in training", caption, "step", curves)


def compare(title: str, caption: str, label: str, curves: dict[str, list[tuple[int, float]]]) -> Exhibit:
    """A curve of each of several models, at most `LINES`, on the same axes, against steps or from 0 on."""

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        for (source, points), style in zip(curves.items(), group_styles(len(curves)), strict=True):
            x, y = zip(*points, strict=True)
            plot(axes, x, y, source, markevery=max(1, len(x) // 8), **style)
        axes.set_xlabel(label)
        if label == "step":
            mark_last(axes, sorted({x for points in curves.values() for x, _ in points}))
        else:
            axes.set_ylim(0, 1.1 * max(1, *(y for points in curves.values() for _, y in points)))
        legend_below(axes)

    height = 290 + 20 * len(curves)
    ends = [f"{source}: {points[0][1]:.4g} to {points[-1][1]:.4g}" for source, points in curves.items()]
    places = sorted({x for points in curves.values() for x, _ in points})
    values = [dict(points) for points in curves.values()]
    return Exhibit(
        title,
        caption,
        f"From the first point to the last, {'; '.join(ends)}.",
        f"Line chart of {len(curves)} models on the same axes.",
        draw,
        (height, height),
        [label, *curves],
        [[x, *(points.get(x) for points in values)] for x in evenly(places, 50)],
    )


_OPTIMIZER = {"learning_rate": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}


def optimizer_exhibit(history: list[dict]) -> Exhibit | None:
    """Learning rate, gradient norm and speed over time, as far as they were logged, or None."""
    logged = {name: [e for e in history if "loss" in e and e.get(name) is not None] for name in _OPTIMIZER}
    logged = {name: entries for name, entries in logged.items() if entries}
    if not logged:
        return None

    def draw(figure: Figure, narrow: bool):
        panels = figure.subplots(*((len(logged), 1) if narrow else (1, len(logged))), squeeze=False).flat
        for axes, (name, entries) in zip(panels, logged.items(), strict=True):
            steps = [entry["step"] for entry in entries]
            plot(axes, steps, [entry[name] for entry in entries], _OPTIMIZER[name], color=BLUE)
            axes.set_ylim(0)
            axes.yaxis.set_major_formatter(EngFormatter(sep="") if name == "tokens_per_second" else "{x:g}")
            axes.set(title=_OPTIMIZER[name], xlabel="step")
            mark_last(axes, steps)

    said = []
    for name, entries in logged.items():
        values = [entry[name] for entry in entries]
        largest = max(range(len(values)), key=values.__getitem__)
        said.append(
            f"{_OPTIMIZER[name]} had a median of {as_text(float(np.median(values)))} and was at most "
            f"{as_text(values[largest])}, at step {entries[largest]['step']:,}"
        )
    entries = [entry for entry in history if any(name in entry for name in logged) and "loss" in entry]
    return Exhibit(
        "Optimizer and speed",
        "Learning rate, norm of the gradient before it is clipped, and tokens per second, at each entry of the log.",
        f"The {'; '.join(said)}.",
        f"{len(logged)} line charts against the step.",
        draw,
        (230, 210 * len(logged)),
        ["step", *(_OPTIMIZER[name] for name in logged)],
        [[entry["step"], *(entry.get(name) for name in logged)] for entry in evenly(entries, _ROWS)],
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
            values = [entry[name] for entry in entries]
            plot(axes, steps, values, label, color=BLUE)
            if name == "router/activated_parameters":
                axes.yaxis.set_major_formatter(EngFormatter())
                draw_reference(axes, even, "if experts were equally likely")
                if measured is not None:
                    axes.axhline(measured, color=ORANGE, linestyle=":", label="on the text")
                legend_below(axes, 1)
            elif name == "router/group_entropy":
                draw_reference(axes, entropy, "if groups were equally likely")
                legend_below(axes, 1)
            axes.set_ylim(0, 1.1 * max(*values, axes.get_ylim()[1], 0.1))
            if name == "router/dead_experts":
                axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set(title=label, xlabel="step")
            mark_last(axes, steps)

    first, last = entries[0], entries[-1]
    changes = [f"{label}, {as_text(first[name])} to {as_text(last[name])}" for name, label in _FIGURES.items()]
    return Exhibit(
        "Router",
        "Over the tokens of each logging interval. Entropy and MaxVio (the busiest expert's load over the mean, minus "
        "1) are means over layers; dead experts, those without a token, are counted over all layers. Axes begin at 0.",
        f"From the first entry to the last, MaxVio went from {first['router/max_vio']:.2f} to "
        f"{last['router/max_vio']:.2f} and dead experts from {first['router/dead_experts']:,.0f} to "
        f"{last['router/dead_experts']:,.0f}.",
        f"Four line charts against the step, first to last: {'; '.join(changes)}.",
        draw,
        (520, 900),
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
    even = np.array(group_sizes(config), float) / sum(group_sizes(config))
    most = int(np.argmax(np.abs(shares[-1] - shares[0])))

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        axes.set_xlabel("step")
        if len(labels) <= LINES:
            draw_lines(axes, steps, shares.T, labels)
            axes.set_ylabel("share of choices")
            return
        loads = (shares / even).T
        image = draw_loads(axes, loads, lambda row, column: f"group {labels[row]}, step {steps[column]:,}")
        mark_bands(axes, [1] * len(labels), labels, vertical=True)
        mark_steps(axes, steps, 5)
        axes.set_ylabel("group: width")
        add_load_bar(figure, image, axes)

    ends = [f"{label}, {a:.1%} to {b:.1%}" for label, a, b in zip(labels, shares[0], shares[-1], strict=True)]
    return Exhibit(
        "Load per group",
        "Share of each group in the choices of each logging interval, over all layers. Labels are group: width.",
        f"Group {labels[most]} changed most, from {shares[0][most]:.1%} of the choices to {shares[-1][most]:.1%}; an "
        f"even share would be {even[most]:.1%}.",
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
    most = max(shown, key=lambda i: loads[i].max())
    busiest, when = np.unravel_index(np.argmax(loads[most]), loads[most].shape)

    def draw(figure: Figure, narrow: bool):
        high = panel_rows[narrow]
        wide = -(-len(shown) // high)
        grid = figure.subplots(high, wide, squeeze=False)
        for axes in grid.flat[len(shown) :]:
            axes.remove()
        for place, i in enumerate(shown):
            axes = grid.flat[place]
            experts = expert_order(layers[i])
            image = draw_loads(
                axes, loads[i], lambda row, column, ids=experts: f"expert {ids[row]}, step {steps[column]:,}"
            )
            names = [str(group) for group in range(layers[i].num_groups)]
            mark_bands(axes, layers[i].expert_counts, names, vertical=True)
            mark_steps(axes, steps, 2 if narrow else 3)
            axes.set_title(f"layer {numbers[i]}")
            if place % wide == 0:
                axes.set_ylabel("group")
            if place + wide >= len(shown):
                axes.set_xlabel("step")
        add_load_bar(figure, image, [*grid.flat[: len(shown)]])

    some = evenly(range(len(steps)), 5)
    of_all = "" if len(shown) == len(layers) else f" {len(shown)} of the {len(layers)} layers with experts."
    panel_rows = -(-len(shown) // 3), -(-len(shown) // 2)
    return Exhibit(
        "Load per expert",
        f"Tokens that chose each expert in a logging interval, over the layer's mean.{of_all} A row is an expert, "
        "sorted by group and then by id; groups are numbered from narrow to wide.",
        f"The largest load was {loads[most][busiest, when]:.2f} times an even one, of expert "
        f"{expert_order(layers[most])[busiest]} of layer {numbers[most]}, at step {steps[when]:,}.",
        "Heat maps of the load of every expert against the step, one for each layer.",
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
