"""How layers, groups and experts of a model are named and ordered on the page, and how numbers are written."""

from mohge import MoHGEConfig


def layer_numbers(config: MoHGEConfig) -> list[int]:
    """Number of each layer that has experts, among all layers."""
    return [layer for layer in range(config.num_hidden_layers) if layer not in config.mlp_only_layers]


def expert_order(layer: MoHGEConfig) -> list[int]:
    """Ids of a layer's experts, group by group."""
    groups = layer.expert_groups
    return sorted(range(layer.num_experts), key=lambda expert: (groups[expert], expert))


def group_labels(config: MoHGEConfig) -> list[str]:
    """`group: width` of each group, with the smallest and the largest width where layers differ."""
    layers, labels = config.sparse_layers, []
    for group in range(max(layer.num_groups for layer in layers)):
        widths = {layer.moe_intermediate_sizes[group] for layer in layers if group < layer.num_groups}
        labels.append(f"{group}: {'-'.join(map(str, sorted({min(widths), max(widths)})))}")
    return labels


def group_sizes(config: MoHGEConfig) -> list[int]:
    """Number of experts of each group in the layer that has most of them."""
    layers = config.sparse_layers
    return [
        max(layer.expert_counts[group] for layer in layers if group < layer.num_groups)
        for group in range(max(layer.num_groups for layer in layers))
    ]


def as_text(value: str | float | None) -> str:
    """A number with four digits, or a whole one with all of them; nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else value


def as_perplexity(value: float) -> str:
    """A perplexity as it stands everywhere."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
