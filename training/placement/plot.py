"""The picture of `mohge place`."""

from pathlib import Path

from .costs import AllocationCosts


_PANELS = {
    "parameters, millions": lambda costs: [count / 1e6 for count in costs.parameters],
    "memory, GiB": lambda costs: [size / 2**30 for size in costs.total_memory],
    "expert FLOPs per token, millions": lambda costs: [flops / 1e6 for flops in costs.expert_flops],
    "all-to-all bytes per token, thousands": lambda costs: [size / 1e3 for size in costs.exchanged_bytes],
}


def plot_placement(costs: dict[str, AllocationCosts], path: Path):
    """
    Draw what each device has to hold and to do under each allocation.

    Args:
        costs (`dict[str, AllocationCosts]`): Costs by the name of the rule.
        path (`Path`): Picture to write, .png or .svg.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 2 + 0.8 * len(costs)), sharey=True, layout="constrained")
    for axes, (label, values_of) in zip(panels.flat, _PANELS.items(), strict=True):
        for row, allocation in enumerate(costs.values()):
            values = values_of(allocation)
            axes.hlines(row, min(values), max(values), color="#0072B2", linewidth=1)
            axes.plot(
                values, [row] * len(values), "o", color="#0072B2", alpha=0.5, label="a device" if row == 0 else None
            )
            mean = sum(values) / len(values)
            axes.plot(mean, row, "|", color="black", markersize=18, label="mean" if row == 0 else None)
        axes.set(xlabel=label, yticks=range(len(costs)), yticklabels=[*costs])
        axes.set_xlim(left=0, right=axes.get_xlim()[1] * 1.05)
        axes.set_ylim(len(costs) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


__all__ = ["plot_placement"]
