"""The width of every expert, where layers differ: a figure for the page and for the model card."""

from collections import Counter

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from mohge import MoHGEConfig

from .drawing import REMOVED, Exhibit, evenly, mark_layers
from .layout import layer_numbers


_SHADES = 12
"""Widths at most that the legend names."""


def width_exhibit(config: MoHGEConfig) -> Exhibit | None:
    """The width of every expert of every layer; None where all layers have the same."""
    layers = [sorted(Counter(layer.expert_widths).items()) for layer in config.sparse_layers]
    if all(layer == layers[0] for layer in layers):
        return None
    numbers = layer_numbers(config)
    widths = sorted({width for layer in layers for width, _ in layer})
    most = max(layer.num_experts for layer in config.sparse_layers)
    removed = sum(count for layer in layers for width, count in layer if width == 0)

    def color(width: int) -> tuple | str:
        return matplotlib.colormaps["cividis"](width / widths[-1]) if width else REMOVED

    def draw(figure: Figure, narrow: bool):
        axes = figure.subplots()
        for row, layer in enumerate(layers):
            left = 0
            for width, count in layer:
                axes.barh(row, count, left=left, height=0.9, color=color(width))
                if count * (20 if narrow else 50) > 2 * most:  # there is room for a number
                    dark = 0 < width < 0.55 * widths[-1]
                    place = (left + count / 2, row)
                    axes.annotate(str(width), place, ha="center", va="center", color="white" if dark else "black")
                left += count
        if most <= 64:
            axes.vlines(range(1, most), -0.5, len(layers) - 0.5, color="white", linewidth=0.8)
        axes.set(xlim=(0, most), ylim=(len(layers) - 0.5, -0.5), xlabel="experts, the narrow ones first")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(False)
        mark_layers(axes, numbers)
        names = [(width, str(width) if width else "removed") for width in evenly(widths, _SHADES)]
        handles = [Patch(color=color(width), label=name) for width, name in names]
        figure.legend(handles=handles, loc="outside lower center", ncols=3 if narrow else 6, title="width")

    height = 130 + 19 * len(layers)
    return Exhibit(
        "Width of every expert",
        "A row is a layer, a cell an expert."
        + (" Experts of width 0 have been removed: they compute nothing and hold nothing." if removed else ""),
        f"Widths go from {widths[0]} to {widths[-1]} neurons, and {removed} experts are removed.",
        f"Widths of {sum(layer.num_experts for layer in config.sparse_layers)} experts in {len(layers)} layers, "
        f"{widths[0]} to {widths[-1]}. The table below has the same numbers.",
        draw,
        (height, height + 30),
        ["layer", "experts", "of width"],
        [
            [number, sum(count for _, count in layer), ", ".join(f"{width} x {count}" for width, count in layer)]
            for number, layer in zip(numbers, layers, strict=True)
        ],
    )
