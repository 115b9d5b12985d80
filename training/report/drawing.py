"""How figures are drawn: as SVG, once for wide and once for narrow screens, and never by colour alone."""

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation


WIDE, NARROW = 680, 350
"""Widths of the two drawings of a figure, in CSS pixels."""
LINES = 8
"""Groups that can be told apart as lines; more are drawn as a heat map."""

INK, BLUE, ORANGE, GAP = "#1c2127", "#0072b2", "#d55e00", "#fefefe"
"""Colors of text and lines, and of what separates areas."""
REMOVED = "#d5d9de"
"""Color of what is not there."""
LOAD_LIMIT = 4.0
"""Load, relative to an even one, beyond which colours do not change, nor below its inverse."""
_QUIET = "#6b7480"
_CELLS = 600
"""Cells of a heat map at most that show their value under the pointer."""

_STYLE = {
    "figure.dpi": 72,  # that of SVG, so that places of marks are those of the drawing
    "text.parse_math": False,  # names of others may have a dollar sign
    "font.size": 9.5,  # points: 12.7 CSS pixels
    **dict.fromkeys(
        ("axes.labelsize", "axes.titlesize", "legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 9.5
    ),
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": _QUIET,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
    "xtick.color": "#454d57",
    "ytick.color": "#454d57",
    "axes.facecolor": "none",
    "image.interpolation": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text, in a font of the reader's machine
    "svg.hashsalt": "mohge",  # the same figure gives the same bytes
}
_MARKERS = "osD^vPX*"
_DASHES = ("-", "--", "-.", ":")


def _group_color(place: float, dark: bool = False) -> str:
    """Of a group between the narrowest, 0, and the widest, 1."""
    return to_hex(matplotlib.colormaps["viridis"](0.35 + 0.65 * place if dark else 0.8 * place))


_PLACES = sorted({place for number in range(1, LINES + 1) for place in np.linspace(0, 1, number)})
_IN_THE_DARK = {
    **{_group_color(place): _group_color(place, dark=True) for place in _PLACES},
    **{INK: "#e7eaee", BLUE: "#56b4e9", ORANGE: "#f0883e", GAP: "#14171b", REMOVED: "#3a4048", _QUIET: "#8d98a5"},
    **{"#e3e6ea": "#2b3138", "#454d57": "#b6bec8"},
}
"""Color on a light page -> on a dark one."""


# Purple for little and orange for much, without the darkest shades, which would be lost on a dark page.
_AROUND_ONE = ListedColormap(matplotlib.colormaps["PuOr_r"](np.linspace(0.12, 0.88, 256)))


class Exhibit(NamedTuple):
    """A figure of the page with its numbers."""

    title: str
    caption: str
    """How to read it."""
    finding: str
    """One sentence: what it shows here."""
    alternative: str
    """What kind of figure it is, for those who do not see it."""
    draw: Callable[[Figure, bool], None]
    """Draws on an empty figure, given whether it is the narrow one."""
    heights: tuple[int, int]
    """Heights of the wide and the narrow drawing, in CSS pixels."""
    columns: list[str]
    rows: list[list]
    """The numbers, row by row under `columns`."""


class _Canvas(Figure):
    """A figure with values that show under the pointer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.tips: list[tuple[Axes, float, float, tuple[float, float] | None, str]] = []


def as_svg(exhibit: Exhibit) -> bytes:
    """Draw a figure as an SVG image, on white whatever is around it."""
    return _draw(exhibit, False, "white")[0].encode()


def as_inline(exhibit: Exhibit, narrow: bool) -> str:
    """Draw a figure as SVG for inside of a page: in its colours, light or dark, and with values under the pointer."""
    drawing, figure = _draw(exhibit, narrow, "none")
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", drawing, flags=re.DOTALL)
    name = f"{re.sub(r'[^a-z]+', '-', exhibit.title.lower())}-{'narrow' if narrow else 'wide'}"
    drawing = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", drawing)  # a page has each id once
    drawing = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _in_both_schemes, drawing)
    label = html.escape(f"{exhibit.alternative} {exhibit.finding}")
    drawing = drawing.replace(
        "<svg ", f'<svg class="{"narrow" if narrow else "wide"}" role="img" aria-label="{label}" ', 1
    )
    return drawing.replace("</svg>", "".join(_tips(figure)) + "</svg>")


def _draw(exhibit: Exhibit, narrow: bool, paper: str) -> tuple[str, _Canvas]:
    with matplotlib.rc_context(_STYLE):
        size = (NARROW if narrow else WIDE) / 96, exhibit.heights[narrow] / 96
        figure = _Canvas(figsize=size, layout="constrained", facecolor=paper)
        exhibit.draw(figure, narrow)
        content = io.StringIO()
        figure.savefig(
            content, format="svg", facecolor=paper, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return content.getvalue(), figure


def _in_both_schemes(match: re.Match) -> str:
    what, color = match.groups()
    dark = _IN_THE_DARK.get(color)
    # Browsers that do not know `light-dark` keep what stands before it.
    return match[0] if dark is None else f"{match[0]}; {what}: light-dark({color}, {dark})"


def _tips(figure: _Canvas):
    height = figure.get_figheight() * 72
    for axes, x, y, size, text in figure.tips:
        if not np.isfinite([x, y]).all():
            continue
        title = f' fill-opacity="0"><title>{html.escape(text)}</title>'
        if size is None:
            left, bottom = axes.transData.transform((x, y))
            yield f'<circle cx="{left:.1f}" cy="{height - bottom:.1f}" r="6"{title}</circle>'
        else:
            corners = axes.transData.transform([(x, y), (x + size[0], y + size[1])])
            (left, bottom), (right, top) = corners.min(0), corners.max(0)
            place = f'x="{left:.1f}" y="{height - top:.1f}" width="{right - left:.1f}" height="{top - bottom:.1f}"'
            yield f"<rect {place}{title}</rect>"


def hover(axes: Axes, x: float, y: float, text: str, size: tuple[float, float] | None = None):
    """Show `text` under the pointer at a point, or over an area of `size` whose corner it is."""
    axes.figure.tips.append((axes, x, y, size, text))


def group_styles(number: int) -> list[dict]:
    """Line styles of `number` groups, at most `LINES`: dark to light, each with a marker and a dash pattern."""
    return [
        {"color": _group_color(place), "marker": _MARKERS[i], "linestyle": _DASHES[i % len(_DASHES)]}
        for i, place in enumerate(np.linspace(0, 1, number))
    ]


def plot(axes: Axes, x: Sequence[float], y: Sequence[float], label: str, tips: int = 60, **style):
    """Draw a line whose values show under the pointer."""
    axes.plot(x, y, label=label, **style)
    for place in evenly(range(len(x)), tips):
        hover(axes, x[place], y[place], f"{label}: {y[place]:,.4g} at {x[place]:,g}")


def draw_lines(axes: Axes, x: Sequence[float], lines: np.ndarray, labels: list[str]):
    """Draw a line for each group, `lines` `[G, X]`, with its label at its end."""
    for line, label, style in zip(lines, labels, group_styles(len(lines)), strict=True):
        plot(axes, x, line, label, 16, markevery=max(1, len(x) // 8), **style)
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.08 * np.nanmax(lines))
    mark_last(axes, x)
    label_right(axes, lines[:, -1], labels)


def mark_last(axes: Axes, steps: Sequence[float]):
    """Ticks at round steps and at the last one."""
    first, last = steps[0], steps[-1]
    ticks = MaxNLocator(4, integer=True).tick_values(first, last)
    axes.set_xticks([*(tick for tick in ticks if first <= tick < last - 0.15 * (last - first)), last])
    axes.xaxis.set_major_formatter("{x:,.0f}")


def legend_below(axes: Axes, first: int = 0):
    """Name the lines of a chart, from the one numbered `first`, below the axis' label, where no line is."""
    below = axes.transAxes + ScaledTranslation(0, -40 / 96, axes.figure.dpi_scale_trans)
    axes.legend(
        handles=axes.lines[first:], loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0
    )


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


def draw_reference(axes: Axes, value: float, label: str):
    """Draw a line across the axes, named in the legend."""
    axes.axhline(value, color=_QUIET, linestyle="--", linewidth=1.2, label=label)


def draw_loads(axes: Axes, loads: np.ndarray, name: Callable[[int, int], str], numbers: list[list[str]] | None = None):
    """
    Draw `loads` `[R, C]`, relative to even ones, row 0 on top, grey where they are NaN. Colours go from `1 /
    LOAD_LIMIT` over 1 to `LOAD_LIMIT`, everywhere the same.

    Args:
        name (`Callable[[int, int], str]`): Of a row and a column, for the pointer.
        numbers (`list[list[str]]`, *optional*): What to write into the cells.
    """
    shown = np.clip(np.ma.masked_invalid(loads), 1 / LOAD_LIMIT, LOAD_LIMIT)
    image = axes.imshow(shown, aspect="auto", cmap=_AROUND_ONE, norm=LogNorm(1 / LOAD_LIMIT, LOAD_LIMIT))
    axes.set_facecolor(REMOVED)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(loads):
        if np.isfinite(value) and numbers is not None:
            color = "black" if 0.45 < value < 2.2 else "white"
            axes.text(column, row, numbers[row][column], ha="center", va="center", color=color)
        if np.isfinite(value) and loads.size <= _CELLS:
            hover(axes, column - 0.5, row - 0.5, f"{name(row, column)}: {value:.2f} times even", (1, 1))
    return image


def add_load_bar(figure: Figure, image, axes):
    """Add the scale of loads below the axes."""
    bar = figure.colorbar(image, ax=axes, location="bottom", extend="both", aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=["1/4", "1/2", "1 = even", "2", "4"])
    bar.ax.minorticks_off()
    bar.set_label("times an even load")


def mark_bands(axes: Axes, sizes: list[int], labels: list[str], vertical: bool, number: int = 8):
    """Mark groups of neighbouring columns (or, if `vertical`, rows) by borders and labels, at most `number` labels."""
    ends = np.cumsum(sizes)
    draw_border = axes.axhline if vertical else axes.axvline
    if len(sizes) <= 32:  # more would cover what they separate
        for end in ends[:-1]:
            draw_border(end - 0.5, color=GAP, linewidth=1.5)
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
