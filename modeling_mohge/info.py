"""Parameter counts of a config, exact, without allocating the model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .backbones_mohge import feed_forwards
from .configuration_mohge import MoHGEConfig
from .losses_mohge import at_least_one
from .modeling_mohge import MoHGEForCausalLM


class ParameterCounts(NamedTuple):
    """Numbers of parameters of a model; a tied embedding counts once."""

    total: int
    embedding: int
    """Input embedding and, unless tied, output projection."""
    routed: int
    """All routed experts."""
    activated: int
    """What a token passes through on average if every expert is chosen equally often, embeddings included."""
    activated_min: int
    """The same with the narrowest experts chosen in every layer."""
    activated_max: int
    """The same with the widest experts chosen in every layer."""
    activated_ffn: int
    """The feed-forward part of `activated`: routed and shared experts and dense layers."""
    looked_up: int
    """Tables whose rows are looked up and not multiplied, such as an input embedding that is not tied."""


class Routing(NamedTuple):
    """Where the tokens of a text went."""

    text: str
    """What text, and how many tokens of it."""
    tokens: int
    tokens_per_expert: list[list[int]]
    """For each layer that has experts, how many tokens came to each, by id."""


class RoutedCounts(NamedTuple):
    """What a token takes on average, by the experts that the tokens of a text chose."""

    activated: int
    """Parameters that it passes through, embeddings included."""
    flops: int
    """Operations of its forward pass: two for each activated parameter, but for tables whose rows are looked up, such
    as an input embedding that is not tied. The scores of attention, which depend on its length, are not counted."""


def model_without_memory(config: MoHGEConfig) -> MoHGEForCausalLM:
    """
    The model of this config on the meta device, where tensors have a shape and no content.

    Raises:
        ValueError: if there is no such model.
    """
    try:
        with torch.device("meta"):
            return MoHGEForCausalLM(config)
    except (ArithmeticError, AssertionError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"`backbone_config`: transformers cannot build this {config.backbone_config.model_type} "
            f"({type(error).__name__}: {error}): mend that field"
        ) from error


def parameter_counts(config: MoHGEConfig) -> ParameterCounts:
    """Count the parameters of a [`MoHGEForCausalLM`] with this config."""
    model = model_without_memory(config)
    total = model.num_parameters()
    embeddings = {
        id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = feed_forwards(model)
    feed_forward = sum(p.numel() for found in layers for p in found.module.parameters())
    routers = [found.router for found in layers if found.experts is not None and found.router is not None]
    routing = sum(p.numel() for router in routers for p in router.parameters())
    routed = config.routed_parameters
    average = smallest = largest = 0
    for layer in config.sparse_layers:
        sizes = sorted(layer.expert_parameters(width) for width in layer.expert_widths)
        chosen = layer.num_experts_per_tok
        if layer.router_type == "grouped_top_k":  # the same number from each group, whatever the token
            per_group = chosen // layer.num_groups
            fixed = per_group * sum(layer.expert_parameters(width) for width in layer.moe_intermediate_sizes)
            average, smallest, largest = average + fixed, smallest + fixed, largest + fixed
        else:
            average += round(chosen * sum(sizes) / len(sizes))
            smallest += sizes[0] if layer.router_type == "top_p" else sum(sizes[:chosen])
            largest += sum(sizes[-chosen:])
    dense = total - routed
    return ParameterCounts(
        total=total,
        embedding=sum(embeddings.values()),
        routed=routed,
        activated=dense + average,
        activated_min=dense + smallest,
        activated_max=dense + largest,
        activated_ffn=feed_forward - routing - routed + average,
        looked_up=sum(size for table, size in tables.items() if table != id(model.get_output_embeddings().weight)),
    )


def counts_as_routed(
    config: MoHGEConfig,
    tokens_per_expert: Sequence[Sequence[float]],
    tokens: int,
    counts: ParameterCounts | None = None,
) -> RoutedCounts:
    """
    Count what a token takes where the experts are not chosen equally often: tokens prefer wide ones, say.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        tokens_per_expert (`Sequence[Sequence[float]]`):
            For each layer that has experts, how many tokens came to each, by id.
        tokens (`int`): Number of tokens.
        counts ([`ParameterCounts`], *optional*): Those of `config`, if they are there.
    """
    counts = counts or parameter_counts(config)
    chosen = chosen_parameters(config.sparse_layers, tokens_per_expert) / max(tokens, 1)
    activated = counts.total - counts.routed + chosen
    return RoutedCounts(round(activated), round(2 * (activated - counts.looked_up)))


def chosen_parameters(layers: Sequence[MoHGEConfig], tokens_per_expert: Sequence[Sequence[float]]) -> float:
    """Parameters of the routed experts that tokens came to, each as often as one did."""
    return sum(
        count * layer.expert_parameters(width)
        for layer, counts in zip(layers, tokens_per_expert, strict=True)
        for width, count in zip(layer.expert_widths, counts, strict=True)
    )


def describe(config: MoHGEConfig, routings: Sequence[Routing] = ()) -> str:
    """The group table, and total and activated parameters, as text; the latter also on the texts of `routings`."""
    return "\n".join([*_groups(config), describe_counts(config, routings)])


def _groups(config: MoHGEConfig) -> list[str]:
    lines = []
    distinct = config.sparse_layers if config.is_heterogeneous else config.sparse_layers[:1]
    for index, layer in enumerate(distinct):
        where = f"sparse layer {index}" if config.is_heterogeneous else f"each of {len(config.sparse_layers)} layers"
        lines += [f"{where}: {layer.num_experts} experts, {layer.num_experts_per_tok} per token, {_rule(layer)}", ""]
        lines.append(
            f"{'group':>5} {'width':>6} {'experts':>8} {'parameters each':>16} {'parameters':>14} {'share':>6}"
        )
        whole = at_least_one(sum(layer.expert_parameters(width) for width in layer.expert_widths))
        for group, (width, experts) in enumerate(zip(layer.moe_intermediate_sizes, layer.expert_counts, strict=True)):
            each = layer.expert_parameters(width)
            lines.append(
                f"{group:>5} {width:>6} {experts:>8} {each:>16,} {each * experts:>14,} {each * experts / whole:>6.1%}"
            )
        lines.append("")
    return lines


def describe_counts(config: MoHGEConfig, routings: Sequence[Routing] = ()) -> str:
    """Total and activated parameters as text."""
    counts = parameter_counts(config)
    lines = [
        f"total parameters      {_short(counts.total)}  of which routed experts {_short(counts.routed)}, embeddings "
        f"{_short(counts.embedding)}",
        f"activated per token   {_short(counts.activated)}  {_assumption(config)}; {_short(counts.activated_min)} to "
        f"{_short(counts.activated_max)} by routing",
        f"  of which FFN        {_short(counts.activated_ffn)}",
    ]
    for routing in routings:
        activated, flops = counts_as_routed(config, routing.tokens_per_expert, routing.tokens, counts)
        lines.append(f"  as routed           {_short(activated)}  on {routing.text}; {_short(flops)} FLOPs forward")
    if config.sparse_layers and not routings:
        lines.append("  as routed           not measured (mohge eval FOLDER --datasets TEXT does)")
    return "\n".join(lines)


def _assumption(config: MoHGEConfig) -> str:
    return "with equal traffic" + (", if every set is full" if config.router_type == "top_p" else "")


def _rule(layer: MoHGEConfig) -> str:
    if layer.router_type == "two_level":
        return (
            f"from {layer.num_groups_per_tok} of {layer.num_groups} groups (two_level, {layer.group_score_function})"
        )
    return "by the backbone's router" if layer.keeps_router else layer.router_type


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3f}{unit}"
    return str(count)


__all__ = [
    "ParameterCounts",
    "RoutedCounts",
    "Routing",
    "chosen_parameters",
    "counts_as_routed",
    "describe",
    "describe_counts",
    "model_without_memory",
    "parameter_counts",
]
