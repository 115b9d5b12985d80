"""Figures of where tokens went: of a text, or of the newest part of a training run."""

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mohge import MoHGEConfig

from ..loop.metrics import RouterStatistics
from .drawing import (
    BLUE,
    GAP,
    LINES,
    Exhibit,
    add_load_bar,
    draw_loads,
    draw_reference,
    group_styles,
    hover,
    label_right,
    legend_below,
    mark_bands,
    mark_layers,
    plot,
)
from .layout import group_labels, group_sizes, layer_numbers
from .measure import RoutingEvaluation, deciles
from .verdict import compare_tenths


def load_exhibit(statistics: RouterStatistics, config: MoHGEConfig) -> Exhibit:
    """Load of each expert of each layer."""
    numbers, sizes = layer_numbers(config), group_sizes(config)
    starts = np.cumsum([0, *sizes])
    loads = np.full((len(numbers), starts[-1]), np.nan)
    for row, layer, count in zip(loads, statistics.layers, statistics.counts, strict=True):
        columns = starts[list(layer.expert_groups)] + np.array(layer.expert_slots)
        row[columns] = (count / count.mean().clamp(min=1e-9)).tolist()
    dead = np.argwhere(loads == 0)
    layer, busiest = np.unravel_index(np.nanargmax(loads), loads.shape)
    group_of = np.repeat(np.arange(len(sizes)), sizes)

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        image = draw_loads(axes, loads, lambda row, column: f"layer {numbers[row]}, group {group_of[column]}")
        if len(dead):
            size = 3 if len(numbers) > 16 or loads.shape[1] > 64 else 6
            axes.plot(dead[:, 1], dead[:, 0], "x", color="white", markersize=size, rasterized=len(dead) > 300)
        mark_bands(axes, sizes, group_labels(config), vertical=False, number=4 if narrow else 8)
        mark_layers(axes, numbers)
        axes.set_xlabel("group: width")
        add_load_bar(figure, image, axes)

    height = 150 + min(28 * len(numbers), 480)
    return Exhibit(
        "Load per expert and layer",
        "Tokens that chose each expert over the layer's mean. A column is an expert, sorted by group and then by id. "
        "A cross is a dead expert, which no token chose; a layer has no expert where it is grey.",
        f"The busiest expert, in group {group_of[busiest]} of layer {numbers[layer]}, has "
        f"{loads[layer, busiest]:.2f} times an even load, and {len(dead)} experts have no token.",
        f"Heat map of the load of {starts[-1]} experts in {len(numbers)} layers.",
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
    even = np.array(
        [[*layer.expert_counts, *[0] * (len(labels) - layer.num_groups)] for layer in statistics.layers], float
    )
    loads = shares / 100 / np.where(even, even, np.nan) * even.sum(1, keepdims=True)

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        numbered = len(numbers) <= 16 and len(labels) <= (8 if narrow else 12)
        cells = [[f"{share:.3g}" for share in row] for row in shares] if numbered else None
        image = draw_loads(axes, loads, lambda row, column: f"layer {numbers[row]}, group {labels[column]}", cells)
        mark_bands(axes, [1] * len(labels), labels, vertical=False, number=4 if narrow else 8)
        mark_layers(axes, numbers)
        axes.set_xlabel("group: width")
        add_load_bar(figure, image, axes)

    height = 150 + min(28 * len(numbers), 480)
    layer, group = np.unravel_index(np.nanargmax(shares), shares.shape)
    return Exhibit(
        "Groups per layer",
        "Share of each group in the choices of each layer, in % where there is room; colours compare it with its "
        "share if all experts were equally loaded.",
        f"The largest share is {shares[layer, group]:.1f}%, of group {group} in layer {numbers[layer]}.",
        f"Heat map of the share of {len(labels)} groups in the choices of {len(numbers)} layers.",
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
            plot(axes, numbers, values, title, marker="o", color=BLUE)
            if values is entropies:
                axes.plot(numbers, limits, "--_", color="#6b7480", label="if groups were equally likely")
                legend_below(axes, 1)
            axes.set(title=title, xlabel="layer", xlim=(numbers[0] - 0.5, numbers[-1] + 0.5))
            axes.set_ylim(0, 1.15 * max(*axes.get_ylim(), 0.1))
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    return Exhibit(
        "Entropy and balance of each layer",
        "How evenly each layer's choices fall on groups, and how far the load of the busiest expert is above the mean "
        "(MaxVio: its load over the mean, minus 1; 0 is even).",
        f"Layer {numbers[int(np.argmax(busiest))]} is the least even, with a MaxVio of {max(busiest):.2f}, and layer "
        f"{numbers[int(np.argmin(busiest))]} the most even, with {min(busiest):.2f}.",
        f"Two charts against the layer: entropy of group choice, {min(entropies):.2f} to {max(entropies):.2f} nats; "
        f"MaxVio, {min(busiest):.2f} to {max(busiest):.2f}.",
        draw,
        (260, 220 * len(charts)),
        ["layer", "entropy, nats", "entropy if groups were equally likely", "MaxVio"],
        [list(row) for row in zip(numbers, entropies, limits, busiest, strict=True)],
    )


def difficulty_exhibit(
    evaluation: RoutingEvaluation,
    config: MoHGEConfig,
    difficulty: torch.Tensor,
    name: tuple[str, str, str],
    caption: str,
) -> Exhibit:
    """Width and group chosen against a difficulty `[T]`, with its name and what its first and last deciles are."""
    of, first, last = name
    parts, labels = deciles(evaluation, difficulty), group_labels(config)
    position = np.arange(1, len(parts) + 1)
    widths = np.array([part.activated_width for part in parts])
    shares = np.stack([part.group_share.numpy() for part in parts], axis=1)  # [G, deciles]

    def draw(figure: Figure, narrow: bool):
        count = 1 if len(labels) == 1 else 2
        panels = figure.subplots(*((count, 1) if narrow else (1, count)), squeeze=False).flat
        for axes in panels:
            axes.set(xlabel=f"decile of token {of} (1 = {first})", xticks=position)
        panels[0].errorbar(position, widths, [part.error for part in parts], fmt="o-", capsize=3, color=BLUE)
        panels[0].set(title="neurons per layer", ylim=(0, 1.15 * max(widths.max(), 1)))
        draw_reference(panels[0], float(evaluation.activated_width.mean()), "all tokens")
        legend_below(panels[0], len(panels[0].lines) - 1)
        for n, part in zip(position, parts, strict=True):
            hover(panels[0], n, part.activated_width, f"decile {n}: {part.activated_width:.1f} +-{part.error:.1f}")
        if count == 2:
            panels[1].set(title="share of groups")
            _draw_shares(panels[1], position, shares, labels, config)

    return Exhibit(
        f"By {of}",
        f"{caption} Neurons are the width of a token's experts together, mean over layers; bars are errors of the "
        "mean for 95%, and the axis begins at 0.",
        compare_tenths(parts, first, last),
        f"Neurons per layer against the decile of token {of}: {widths[0]:.1f} in the first, the {first}, "
        f"{widths[-1]:.1f} in the last.",
        draw,
        (320, 580 if len(labels) > 1 else 300),
        ["decile", f"{of}, from", "to", "neurons per layer", "error", *labels],
        [
            [int(n), *part.difficulty, part.activated_width, part.error, *part.group_share.tolist()]
            for n, part in zip(position, parts, strict=True)
        ],
    )


def _draw_shares(axes, position: np.ndarray, shares: np.ndarray, labels: list[str], config: MoHGEConfig):
    """Draw shares `[G, X]` as stacked bars, or as a heat map where there are many groups."""
    if len(labels) > LINES:
        even = np.array(group_sizes(config), float)[:, None]
        loads = shares / even * even.sum()
        image = draw_loads(axes, loads, lambda row, column: f"group {labels[row]}, decile {position[column]}")
        mark_bands(axes, [1] * len(labels), labels, vertical=True)
        axes.set_xticks(position - 1, position)
        add_load_bar(axes.figure, image, axes)
        return
    bottoms = np.cumsum(shares, axis=0) - shares
    for label, bottom, share, style in zip(labels, bottoms, shares, group_styles(len(labels)), strict=True):
        axes.bar(position, share, 0.9, bottom=bottom, color=style["color"], edgecolor=GAP, linewidth=0.8)
        for x, y, height in zip(position, bottom, share, strict=True):
            hover(axes, x - 0.45, y, f"group {label}, decile {x}: {height:.1%}", (0.9, height))
    axes.set(ylim=(0, 1), xlim=(0.4, position[-1] + 0.6))
    label_right(axes, bottoms[:, -1] + shares[:, -1] / 2, labels)
