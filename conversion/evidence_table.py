"""Tables and a plot of what `mohge.conversion.evidence` measured, for `python -m mohge.conversion.evidence_table`."""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .evidence import read_rows


_DRAWN = {"unequal": "o-", "unequal, by work": "s--", "uniform": "D:"}
"""Contestants in the plot, with their markers."""
_AXES = {"kept": "kept (memory)", "used": "used as routed (work)"}


def perplexity(row: dict) -> float:
    """Of the held-out text."""
    return math.exp(np.mean(row["losses"]))


def rise(row: dict, source: dict) -> np.ndarray:
    """[blocks] what each held-out block's loss has risen by, in nats per token."""
    return np.array(row["losses"]) - np.array(source["losses"])


def table(rows: list[dict]) -> str:
    """One source's results as Markdown: means and standard deviations over calibration seeds."""
    [source] = [row for row in rows if row["contestant"] == "source"]
    cells = defaultdict(list)
    for row in rows:
        if row is not source:
            cells[row["keep"], row["contestant"]].append(row)
    head = ["keep", "contestant", "kept", "used", "perplexity", "KL", "rise of the loss", "rise / uniform's"]
    lines = [
        f"{source['source']}: perplexity {perplexity(source):.2f}, {source['used']:.0f} neurons used per token; "
        f"{source['machine']}, {source['date']}; {len(source['losses'])} held-out blocks, {source['calibration']:,} "
        f"calibration tokens",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for keep, contestant in sorted(cells, key=lambda key: (-key[0], list(cells).index(key))):
        same = cells[keep, contestant]
        values = [perplexity(row) for row in same]
        blocks = np.mean([rise(row, source) for row in same], axis=0)
        uniform = {row["seed"]: perplexity(row) - perplexity(source) for row in cells[keep, "uniform"]}
        ratios = [
            (value - perplexity(source)) / uniform[row["seed"]]
            for row, value in zip(same, values, strict=True)
            if row["seed"] in uniform
        ]
        lines.append(
            f"| {keep} | {contestant} | {np.mean([row['kept'] for row in same]):.1%} | "
            f"{np.mean([row['used'] for row in same]) / source['used']:.1%} | {_spread(values, 2)} | "
            f"{_spread([row['kl'] for row in same], 3)} | {blocks.mean():.3f} +- "
            f"{blocks.std(ddof=1) / math.sqrt(len(blocks)):.3f} | {_spread(ratios, 2)} |"
        )
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def plot(rows_of: dict[str, list[dict]], path: Path):
    """Perplexity against neurons kept and against neurons used, for each source."""
    figure = Figure(figsize=(8, 2.8 * len(rows_of)), layout="constrained")
    grid = figure.subplots(len(rows_of), 2, squeeze=False)
    for axes_of_source, (name, rows) in zip(grid, rows_of.items(), strict=True):
        [source] = [row for row in rows if row["contestant"] == "source"]
        for axes, (key, label) in zip(axes_of_source, _AXES.items(), strict=True):
            for contestant, style in _DRAWN.items():
                points = defaultdict(list)
                for row in rows:
                    if row["contestant"] == contestant:
                        points[row["keep"]].append((row[key] / source[key], perplexity(row)))
                drawn = np.array([np.mean(points[keep], axis=0) for keep in sorted(points)])
                if len(drawn):
                    axes.plot(100 * drawn[:, 0], drawn[:, 1], style, label=contestant)
            axes.axhline(perplexity(source), color="grey", linewidth=0.8)
            axes.set(xlabel=f"neurons {label}, %", ylabel="perplexity", yscale="log", title=name)
            for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                axis_format("{x:g}")
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, help="SVG file to write")
    options = parser.parse_args()
    rows_of = defaultdict(list)
    for row in read_rows(options.results):
        rows_of[row["source"]].append(row)
    print("\n\n".join(map(table, rows_of.values())))
    if options.plot is not None:
        plot(rows_of, options.plot)


if __name__ == "__main__":
    main()
