"""What a page is about, and the facts on top of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from mohge import MoHGEConfig
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.info import ParameterCounts, RoutedCounts, Routing, counts_as_routed, parameter_counts

from ..loop.metrics import RouterStatistics
from ..loop.traffic import RouterTraffic
from .drawing import evenly
from .layout import as_perplexity, group_labels
from .measure import RoutingEvaluation
from .sample import Sample


@dataclass
class Report:
    """
    What a page is about.

    Args:
        source (`str`): Folder or Hub id of the run or model.
        config ([`MoHGEConfig`]): The model's config.
        history (`list[dict]`, *optional*): `log_history` of a [`MoHGETrainer`].
        traffic ([`RouterTraffic`], *optional*): The newest routing of the run.
        routings (`list[Routing]`, *optional*): All that is recorded of where tokens went.
        evaluation ([`RoutingEvaluation`], *optional*): Routing of a text.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Needed with `evaluation`.
        text (`str`, *optional*): What the text is.
        facts (`dict[str, str]`, *optional*): More lines for the list of facts.
        sample ([`Sample`], *optional*): A text, and what the model makes of its beginning.
        control (`Report`, *optional*): A model to compare this one with, evaluated on the same text.
    """

    source: str
    config: MoHGEConfig
    history: list[dict] = field(default_factory=list)
    traffic: RouterTraffic | None = None
    routings: list[Routing] = field(default_factory=list)
    evaluation: RoutingEvaluation | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    text: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    sample: Sample | None = None
    control: "Report | None" = None

    @cached_property
    def sizes(self) -> ParameterCounts:
        """Parameter counts of the model."""
        return parameter_counts(self.config)

    @cached_property
    def newest_routing(self) -> tuple[RouterStatistics | None, str]:
        """Counts of the text, or else of the newest part of the run, and what they are counts of."""
        if self.evaluation is not None:
            return self.evaluation.statistics, "on the text"
        statistics = RouterStatistics(self.config, self.sizes.total - self.sizes.routed)
        if self.traffic is not None:
            for tokens, layers in self.traffic.records:
                statistics.add([torch.tensor(layer) for layer in layers], tokens)
            return statistics, f"in the last {len(self.traffic.records):,} forward passes of training"
        loads = [entry for entry in self.history if "router_load" in entry]
        if loads:
            # How many tokens made these choices was not logged, and only `activated_parameters` would ask.
            statistics.add([torch.tensor(layer) for layer in loads[-1]["router_load"]], 0)
            return statistics, f"in the logging interval that ended at step {loads[-1]['step']:,}"
        return None, ""

    def tiles(self) -> list[tuple[str, str, str]]:
        """The figures that matter most: name, value, and what the value is of."""
        total, tiles = self.sizes.total, []
        if self.evaluation is not None and self.control is None:  # which the verdict compares it with
            tiles.append(("perplexity", as_perplexity(self.evaluation.perplexity), "on the text"))
        tiles.append(("parameters", _short(total), f"{total:,}"))
        activated, when = self.activated()
        tiles.append(("activated per token", _short(activated), f"{activated / total:.1%}, {when}"))
        statistics, where = self.newest_routing
        if statistics is not None:
            summary, experts = statistics.summary(), sum(map(len, statistics.counts))
            tiles.append(("MaxVio", f"{summary['max_vio']:.2f}", f"busiest expert's load over even, minus 1, {where}"))
            tiles.append(
                ("dead experts", f"{summary['dead_experts']:,.0f}", f"without a token, of {experts:,}, {where}")
            )
        return tiles

    def activated(self) -> tuple[float, str]:
        """Parameters that a token passes through, and what that was counted on."""
        if self.evaluation is not None:
            return self.evaluation.statistics.activated_parameters(), "on the text"
        logged = [entry for entry in self.history if "router/activated_parameters" in entry]
        if logged:
            return logged[-1]["router/activated_parameters"], f"logged at step {logged[-1]['step']:,}"
        return self.sizes.activated, "if experts are equally likely"

    def as_routed(self) -> list[tuple[str, RoutedCounts]]:
        """What a token takes, for each text whose routing is known; first the one that was evaluated."""
        measured = [] if self.evaluation is None else [self.evaluation.statistics.routing(self.text or "the text")]
        return [
            (text, counts_as_routed(self.config, per_expert, tokens, self.sizes))
            for text, tokens, per_expert in [*measured, *self.routings]
        ]

    def all_facts(self) -> dict[str, str]:
        """Lines about model, training and text."""
        config, layers = self.config, self.config.sparse_layers
        coefficients = {name: getattr(config, field) for name, field in ROUTER_COEFFICIENTS.items()}
        chosen, experts, kept, groups = (
            span(getattr(layer, name) for layer in layers)
            for name in ("num_experts_per_tok", "num_experts", "num_groups_per_tok", "num_groups")
        )
        rule = (
            f"{config.router_type}: {'at most ' if config.router_type == 'top_p' else ''}{chosen} of {experts} experts"
        )
        labels = group_labels(config)
        facts = {
            "router": rule + (f", from {kept} of {groups} groups" if config.router_type == "two_level" else ""),
            "groups": f"{len(labels)}; of width {', '.join(label.split(': ')[1] for label in evenly(labels, 16))}",
            "router losses": ", ".join(f"{name} {value:g}" for name, value in coefficients.items() if value) or "none",
            "layers": f"{config.num_hidden_layers}, {len(layers)} with experts",
            "activated, equal traffic": f"{self.sizes.activated:,}",
            "activated, as routed": "; ".join(
                f"{counts.activated:,} ({counts.flops:,} FLOPs forward) on {text}" for text, counts in self.as_routed()
            )
            or "not measured",
        }
        if self.history:
            facts["training"] = f"{max(entry['step'] for entry in self.history):,} steps"
        if self.text is not None:
            facts["text"] = self.text
        return {**facts, **self.facts}


def span(values: Iterable[int]) -> str:
    """`a`, or `a to b` where the values differ."""
    values = list(values)
    return " to ".join(map(str, sorted({min(values), max(values)})))


def _short(count: float) -> str:
    for unit, size in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
