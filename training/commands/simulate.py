"""The command `mohge simulate`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from mohge import MoHGEConfig
from mohge.training.loop.traffic import RouterTraffic
from mohge.training.placement.costs import dense_flops
from mohge.training.simulation.hardware import Hardware
from mohge.training.simulation.simulator import allocate, draw_routing, expert_parallel_size, simulate

from .parsers import SIMULATION_LEGEND


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments.

    Raises:
        ValueError: for bad usage or input.
        OSError: if a file cannot be read or written.
    """
    from mohge.model_cards.shipped import load_config

    for name in ("tokens", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}: it must be at least 1")
    if min(options.devices) < 1:
        raise ValueError(f"--devices has {min(options.devices)}: give numbers of at least 1")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}: it must be at least 0")
    config = load_config(options.source)
    hardware = Hardware.load(options.hardware)
    traffic = None if options.traffic is None else RouterTraffic.load(options.traffic)
    report = {
        "config": options.source,
        "traffic": options.traffic,
        "recorded_passes": None if traffic is None else len(traffic.tokens),
        **{name: getattr(options, name) for name in ("tokens", "steps", "seed")},
        "hardware": asdict(hardware),
        "results": _results(config, hardware, options, traffic),
    }
    if options.plot is not None:
        _plot(report, Path(options.plot))
    print(json.dumps(report, indent=2) if options.format == "json" else _text(report))
    return 0


def _results(
    config: MoHGEConfig, hardware: Hardware, options: argparse.Namespace, traffic: RouterTraffic | None
) -> list[dict]:
    """One entry for each number of devices and allocation: these, `ep_size` and [`Simulation.summary`]."""
    # All numbers are checked before the first is simulated.
    sizes = [expert_parallel_size(config, devices, options.ep_size) for devices in options.devices]
    dense = options.tokens * sum(dense_flops(config, min(config.max_position_embeddings, 4096)).values())
    results = []
    for devices, ep_size in zip(options.devices, sizes, strict=True):
        routing = draw_routing(config, devices, options.steps, options.tokens, traffic, options.seed)
        simulations = simulate(config, hardware, routing, allocate(config, ep_size, traffic), dense)
        for name, simulation in simulations.items():
            results.append({"devices": devices, "ep_size": ep_size, "allocation": name, **simulation.summary()})
    return results


def _text(report: dict) -> str:
    routing = "balanced"
    if report["traffic"] is not None:
        routing = f"of {report['recorded_passes']} recorded passes"
    lines = [
        report["hardware"]["name"],
        f"{report['tokens']:,} tokens per device and step, {report['steps']} steps, routing {routing}",
        "",
        f"{'devices':>7} {'ep size':>7}  {'allocation':<10} {'expert time':>11} {'95%':>6} {'device time':>11} "
        f"{'step, ms':>9} {'waiting':>7}",
    ]
    lines += [
        f"{row['devices']:>7} {row['ep_size']:>7}  {row['allocation']:<10} {row['expert_time_max_over_mean']:>11.3f} "
        f"{row['expert_time_max_over_mean_p95']:>6.3f} {row['device_time_max_over_mean']:>11.3f} "
        f"{row['step_seconds'] * 1e3:>9.2f} {row['waiting_share']:>7.1%}"
        for row in report["results"]
    ]
    return "\n".join([*lines, "", SIMULATION_LEGEND])


_STYLES = {  # Okabe and Ito's colours, which the colour-blind can tell apart
    "all-size": {"color": "#0072B2", "marker": "o"},
    "contiguous": {"color": "#D55E00", "marker": "s"},
    "paired": {"color": "#009E73", "marker": "^"},
    "packed": {"color": "#CC79A7", "marker": "D"},
}


def _plot(report: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for axes, key, label, factor, bottom in (
        (panels[0], "expert_time_max_over_mean", "expert time, slowest device / mean", 1, 1),
        (panels[1], "step_seconds", "step, ms", 1e3, 0),
    ):
        for name, style in _STYLES.items():
            points = [(row["devices"], row[key] * factor) for row in report["results"] if row["allocation"] == name]
            axes.plot(*zip(*sorted(points), strict=True), label=name, markerfacecolor="none", **style)
        axes.set_xscale("log", base=2)
        counts = sorted({row["devices"] for row in report["results"]})
        axes.set_xticks(counts, counts)
        axes.set(xlabel="devices", ylabel=label)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=bottom)
    panels[1].legend(loc="lower center")  # where no line comes
    figure.suptitle(report["hardware"]["name"])
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except ValueError as error:
        raise ValueError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


__all__ = ["run"]
