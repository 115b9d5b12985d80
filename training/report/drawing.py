"""How figures are drawn: as SVG, once for wide and once for narrow screens, and never by colour alone."""

import base64
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


WIDE, NARROW = 760, 350
"""Widths of the two drawings of a figure, in CSS pixels."""
LINES = 8
"""Groups that can be told apart as lines; more are drawn as a heat map."""

_STYLE = {
    "font.size": 9.5,  # points: 12.7 CSS pixels
    **dict.fromkeys(
        ("axes.labelsize", "axes.titlesize", "legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 9.5
    ),
    "text.color": "#1c2127",
    "axes.labelcolor": "#1c2127",
    "axes.edgecolor": "#6b7480",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "xtick.color": "#454d57",
    "ytick.color": "#454d57",
    "image.cmap": "cividis",
    "image.interpolation": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text, in a font of the reader's machine
    "svg.hashsalt": "mohge",  # the same figure gives the same bytes
}
REMOVED = "#d5d9de"
"""Color of what is not there."""
_QUIET = "#6b7480"
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")


class Exhibit(NamedTuple):
    """A figure of the page with its numbers."""

    title: str
    caption: str
    alternative: str
    """What the figure shows, for those who do not see it."""
    draw: Callable[[Figure, bool], None]
    """Draws on an empty figure, given whether it is the narrow one."""
    heights: tuple[int, int]
    """Heights of the wide and the narrow drawing, in CSS pixels."""
    columns: list[str]
    rows: list[list]
    """The numbers, row by row under `columns`."""


def as_svg(exhibit: Exhibit, narrow: bool = False) -> bytes:
    """Draw a figure as an SVG image, on white whatever is around it."""
    with matplotlib.rc_context(_STYLE):
        size = (NARROW if narrow else WIDE) / 96, exhibit.heights[narrow] / 96
        figure = Figure(figsize=size, layout="constrained")
        exhibit.draw(figure, narrow)
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return content.getvalue()


def as_data_uri(exhibit: Exhibit, narrow: bool) -> str:
    """Draw a figure as an SVG image in a `data:` address."""
    return f"data:image/svg+xml;base64,{base64.b64encode(as_svg(exhibit, narrow)).decode()}"


def group_styles(number: int) -> list[dict]:
    """Line styles of `number` groups, at most `LINES`: dark to light, each with a marker and a dash pattern."""
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.8, number))
    return [
        {"color": color, "marker": _MARKERS[i], "linestyle": _DASHES[i % len(_DASHES)]}
        for i, color in enumerate(colors)
    ]


def draw_lines(axes: Axes, x: Sequence[float], lines: np.ndarray, labels: list[str]):
    """Draw a line for each group, `lines` `[G, X]`, with its label at its end."""
    for line, style in zip(lines, group_styles(len(lines)), strict=True):
        axes.plot(x, line, markevery=max(1, len(x) // 8), **style)
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.08 * np.nanmax(lines))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    label_right(axes, lines[:, -1], labels)


def label_right(axes: Axes, values: Sequence[float], labels: list[str]):
    """Write a label right of the axes at each value, moved apart where they would touch."""
    bottom, top = axes.get_ylim()
    wanted = (np.nan_to_num(np.asarray(values, float)) - bottom) / (top - bottom)
    pixels = axes.figure.get_figheight() * 96 / axes.get_subplotspec().get_gridspec().nrows
    step = 18 / max(pixels - 70, 60)
    connector = {"arrowstyle": "-", "color": _QUIET, "linewidth": 0.6, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)}
    order = np.argsort(wanted, kind="stable")
    room = step * np.arange(len(order))  # upwards, none touches the one below, and the last one stays inside
    places = np.minimum(np.maximum.accumulate(wanted[order] - room), 1 - room[-1]) + room
    for index, place in zip(order, places, strict=True):
        axes.annotate(
            labels[index],
            xy=(1.0, wanted[index]),
            xytext=(1.04, place),
            xycoords="axes fraction",
            va="center",
            arrowprops=connector,
        )


def draw_reference(axes: Axes, value: float, label: str, right: bool = True):
    """Draw a dashed line across the axes with its meaning above it, on the right or on the left."""
    axes.axhline(value, color=_QUIET, linestyle="--" if right else ":", linewidth=1.2)
    axes.annotate(
        label,
        xy=(right, value),
        xytext=(0, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right" if right else "left",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},  # a line may pass below
    )


def draw_heat_map(axes: Axes, values: np.ndarray, largest: float, numbers: bool = False):
    """Draw `values` `[R, C]` from 0 to `largest`, row 0 on top, grey where they are NaN."""
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", vmin=0, vmax=max(largest, 1e-9))
    axes.set_facecolor(REMOVED)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                color = "white" if value < 0.55 * largest else "black"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=color)
    return image


def add_color_bar(figure: Figure, image, axes, label: str, capped: bool = False):
    """Add the scale of a heat map below its axes."""
    bar = figure.colorbar(
        image, ax=axes, location="bottom", label=label, extend="max" if capped else "neither", aspect=40, pad=0.02
    )
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(4)


def mark_bands(axes: Axes, sizes: list[int], labels: list[str], vertical: bool, number: int = 8):
    """Mark groups of neighbouring columns (or, if `vertical`, rows) by borders and labels, at most `number` labels."""
    ends = np.cumsum(sizes)
    draw_border = axes.axhline if vertical else axes.axvline
    if len(sizes) <= 32:  # more would cover what they separate
        for end in ends[:-1]:
            draw_border(end - 0.5, color="white", linewidth=1.5)
    shown = range(0, len(sizes), -(-len(sizes) // number))
    ticks, names = [ends[i] - sizes[i] / 2 - 0.5 for i in shown], [labels[i] for i in shown]
    (axes.set_yticks if vertical else axes.set_xticks)(ticks, names)
    axes.tick_params(length=0)


def mark_layers(axes: Axes, numbers: list[int]):
    """Label the rows of a heat map, one for each layer, with at most 12 labels."""
    shown = range(0, len(numbers), -(-len(numbers) // 12))
    axes.set_yticks(shown, [numbers[row] for row in shown])
    axes.set_ylabel("layer")


def mark_steps(axes: Axes, steps: list[int], number: int):
    """Label `number` columns of a heat map, which are log entries of these steps."""
    shown = evenly(range(len(steps)), number)
    axes.set_xticks(shown, [steps[column] for column in shown])


def evenly(values: Sequence, number: int) -> list:
    """At most `number` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= number:
        return list(values)
    return [values[round(i * (len(values) - 1) / (number - 1))] for i in range(number)]
