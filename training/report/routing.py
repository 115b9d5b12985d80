"""Figures of where tokens went: of a text, or of the newest part of a training run."""

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mohge import MoHGEConfig

from ..loop.metrics import RouterStatistics
from .drawing import (
    LINES,
    Exhibit,
    add_color_bar,
    draw_heat_map,
    draw_reference,
    group_styles,
    label_right,
    mark_bands,
    mark_layers,
)
from .layout import group_labels, group_sizes, layer_numbers
from .measure import RoutingEvaluation, deciles
from .over_time import LOAD_LIMIT


def load_exhibit(statistics: RouterStatistics, config: MoHGEConfig) -> Exhibit:
    """Load of each expert of each layer."""
    numbers, sizes = layer_numbers(config), group_sizes(config)
    starts = np.cumsum([0, *sizes])
    loads = np.full((len(numbers), starts[-1]), np.nan)
    for row, layer, count in zip(loads, statistics.layers, statistics.counts, strict=True):
        columns = starts[list(layer.expert_groups)] + np.array(layer.expert_slots)
        row[columns] = (count / count.mean().clamp(min=1e-9)).tolist()
    largest, dead = np.nanmax(loads), np.argwhere(loads == 0)

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        image = draw_heat_map(axes, loads, min(largest, LOAD_LIMIT))
        if len(dead):
            size = 3 if len(numbers) > 16 or loads.shape[1] > 64 else 6
            axes.plot(dead[:, 1], dead[:, 0], "x", color="white", markersize=size, rasterized=len(dead) > 300)
        mark_bands(axes, sizes, group_labels(config), vertical=False, number=4 if narrow else 8)
        mark_layers(axes, numbers)
        axes.set_xlabel("group: width")
        add_color_bar(figure, image, axes, "load, 1 = even", capped=largest > LOAD_LIMIT)

    height = 150 + min(28 * len(numbers), 480)
    return Exhibit(
        "Load per expert and layer",
        "Tokens that chose each expert over the layer's mean. A column is an expert, sorted by group and then by id. "
        "A cross is an expert that no token chose; a layer has no expert where it is grey.",
        f"Heat map of the load of {starts[-1]} experts in {len(numbers)} layers. The largest load is {largest:.2f} "
        f"times an even one; {len(dead)} experts have no token.",
        draw,
        (height, height + 20),
        ["layer", "group", "load of its experts, by id"],
        [
            [
                number,
                group,
                ", ".join(f"{x:.2f}" for x in row[starts[group] : starts[group + 1]] if np.isfinite(x)),
            ]
            for number, row in zip(numbers, loads, strict=True)
            for group in range(len(sizes))
        ],
    )


def group_exhibit(statistics: RouterStatistics, config: MoHGEConfig) -> Exhibit:
    """Share of each group in the choices of each layer."""
    numbers, labels = layer_numbers(config), group_labels(config)
    shares = 100 * statistics.group_share().cpu().double().numpy()
    for row, layer in zip(shares, statistics.layers, strict=True):
        row[layer.num_groups :] = np.nan

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        numbered = len(numbers) <= 16 and len(labels) <= (8 if narrow else 12)
        image = draw_heat_map(axes, shares, np.nanmax(shares), numbered)
        mark_bands(axes, [1] * len(labels), labels, vertical=False, number=4 if narrow else 8)
        mark_layers(axes, numbers)
        axes.set_xlabel("group: width")
        add_color_bar(figure, image, axes, "% of the layer's choices")

    height = 150 + min(28 * len(numbers), 480)
    layer, group = np.unravel_index(np.nanargmax(shares), shares.shape)
    return Exhibit(
        "Groups per layer",
        "Share of each group in the choices of each layer, in %.",
        f"Heat map of the share of {len(labels)} groups in the choices of {len(numbers)} layers. The largest is "
        f"{shares[layer, group]:.1f}%, of group {group} in layer {numbers[layer]}.",
        draw,
        (height, height + 20),
        ["layer", *labels],
        [
            [number, *row[: layer.num_groups]]
            for number, layer, row in zip(numbers, statistics.layers, shares.tolist(), strict=True)
        ],
    )


def layer_exhibit(statistics: RouterStatistics, config: MoHGEConfig) -> Exhibit:
    """Entropy of the choice of groups, and MaxVio, of each layer."""
    numbers = layer_numbers(config)
    entropies = torch.special.entr(statistics.group_share()).sum(1).tolist()
    limits = [float(np.log(layer.num_groups)) for layer in statistics.layers]
    busiest = [float(count.max() / count.mean().clamp(min=1e-9)) - 1 for count in statistics.counts]

    charts = {"entropy of group choice, nats": entropies, "MaxVio": busiest}
    if statistics.num_groups == 1:
        del charts["entropy of group choice, nats"]

    def draw(figure: Figure, narrow: bool):
        panels = figure.subplots(*((len(charts), 1) if narrow else (1, len(charts))), squeeze=False).flat
        for axes, (title, values) in zip(panels, charts.items(), strict=True):
            axes.plot(numbers, values, "o-", color="#0072B2")
            if values is entropies:
                axes.plot(numbers, limits, "--_", color="#6b7480", label="groups equally likely")
                axes.legend(loc="lower right")
            axes.set(title=title, xlabel="layer", xlim=(numbers[0] - 0.5, numbers[-1] + 0.5))
            axes.set_ylim(0, 1.15 * max(*axes.get_ylim(), 0.1))
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    return Exhibit(
        "Entropy and balance of each layer",
        "How evenly each layer's choices fall on groups, and how far the busiest expert is above the mean (MaxVio).",
        f"Two charts against the layer: entropy of group choice, {min(entropies):.2f} to {max(entropies):.2f} nats; "
        f"MaxVio, {min(busiest):.2f} to {max(busiest):.2f}.",
        draw,
        (260, 220 * len(charts)),
        ["layer", "entropy, nats", "entropy if groups were equally likely", "MaxVio"],
        [list(row) for row in zip(numbers, entropies, limits, busiest, strict=True)],
    )


def difficulty_exhibit(
    evaluation: RoutingEvaluation, config: MoHGEConfig, difficulty: torch.Tensor, name: tuple[str, str], caption: str
) -> Exhibit:
    """Width and group chosen against a difficulty `[T]`, with its name and what its first decile is."""
    of, first = name
    parts, labels = deciles(evaluation, difficulty), group_labels(config)
    position = np.arange(1, len(parts) + 1)
    widths = [part.activated_width for part in parts]
    shares = np.stack([part.group_share.numpy() for part in parts], axis=1)  # [G, deciles]

    def draw(figure: Figure, narrow: bool):
        count = 1 if len(labels) == 1 else 2
        panels = figure.subplots(*((count, 1) if narrow else (1, count)), squeeze=False).flat
        for axes in panels:
            axes.set(xlabel=f"decile of token {of} ({first})", xticks=position)
        panels[0].plot(position, widths, "o-", color="#0072B2")
        panels[0].set(title="activated width per layer")
        draw_reference(panels[0], float(evaluation.activated_width.mean()), "all tokens")
        panels[0].margins(y=0.25)
        if count == 2:
            panels[1].set(title="share of groups")
            draw_shares(panels[1], position, shares, labels)

    return Exhibit(
        f"By {of}",
        caption,
        f"Activated width per layer against the decile of token {of} ({first}): {widths[0]:.1f} in the first, "
        f"{widths[-1]:.1f} in the last.",
        draw,
        (300, 540 if len(labels) > 1 else 280),
        ["decile", f"{of}, from", "to", "activated width", *labels],
        [
            [int(n), *part.difficulty, part.activated_width, *part.group_share.tolist()]
            for n, part in zip(position, parts, strict=True)
        ],
    )


def draw_shares(axes, position: np.ndarray, shares: np.ndarray, labels: list[str]):
    """Draw shares `[G, X]` as stacked bars, or as a heat map where there are many groups."""
    if len(labels) > LINES:
        image = draw_heat_map(axes, shares, shares.max())
        mark_bands(axes, [1] * len(labels), labels, vertical=True)
        axes.set_xticks(position - 1, position)
        add_color_bar(axes.figure, image, axes, "share of choices")
        return
    bottoms = np.cumsum(shares, axis=0) - shares
    for bottom, share, style in zip(bottoms, shares, group_styles(len(labels)), strict=True):
        axes.bar(position, share, 0.9, bottom=bottom, color=style["color"], edgecolor="white", linewidth=0.8)
    axes.set(ylim=(0, 1), xlim=(0.4, position[-1] + 0.6))
    label_right(axes, bottoms[:, -1] + shares[:, -1] / 2, labels)
