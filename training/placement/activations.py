"""What a forward pass keeps for backward, in bytes per token, from the config alone.

For the kernels that MoHGE models use by default, and attention kernels that keep no matrix of scores (sdpa, flash).
What router losses keep is left out: a few numbers per expert at most.
"""

import torch

from mohge import MoHGEConfig


def layer_bytes(config: MoHGEConfig, index: int, element: int) -> int:
    """
    Bytes per token that decoder layer `index` keeps, but for what depends on where its experts are.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
        index (`int`): Number of the layer.
        element (`int`): Bytes of a number in the model's dtype.
    """
    size = 2 * norm_bytes(config.hidden_size, element) + _attention_bytes(config, element)
    if index in config.mlp_only_layers:
        return size + _mlp_bytes(config.intermediate_size, element)
    layer = config.per_layer_config[index]
    size += 4 * layer.num_experts  # log-probabilities
    size += (8 + 4 + element) * layer.num_experts_per_tok  # ids, and weights in float32 and in the model's dtype
    if element < 4:
        size += 4 * config.hidden_size  # the router computes in float32
    if config.shared_expert_gate:
        size += (config.hidden_size + 1) * element
    return size + _mlp_bytes(config.shared_expert_intermediate_size, element)


def norm_bytes(size: int, element: int) -> int:
    """Bytes per token of an RMS norm over `size` numbers: input in float32, normalised input, output."""
    return size * (4 + 2 * element)


def expert_bytes(layer: MoHGEConfig, element: int, dispatched: bool) -> torch.Tensor:
    """
    `[E]`, float64: bytes that each expert, by id, keeps for each token it computes: gate and up before SwiGLU and two
    indices; if tokens are `dispatched` to other devices, also the row that came and its unit weight.
    """
    row = layer.hidden_size + 1 if dispatched else 0
    widths = torch.tensor(layer.expert_widths, dtype=torch.float64)
    return (row + 2 * widths) * element + 2 * 4


def sender_bytes(layer: MoHGEConfig, element: int) -> int:
    """Bytes that a token's own device keeps for each of its choices if they are dispatched: the output row, which is
    multiplied by its weight there, and two indices."""
    return layer.hidden_size * element + 2 * 8


def _attention_bytes(config: MoHGEConfig, element: int) -> int:
    """Queries, keys, values, output and the logsumexp of each query's scores, and what is before queries and keys."""
    heads = config.num_attention_heads
    if config.kv_lora_rank is not None:
        query_key = 2 * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        value = heads * (config.qk_nope_head_dim + config.v_head_dim)  # a view into what holds the keys as well
        norms = sum(norm_bytes(rank, element) for rank in (config.kv_lora_rank, config.q_lora_rank or 0))
        return (query_key + value + heads * config.v_head_dim) * element + norms + 4 * heads
    query, key = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    kept = 2 * (query + key) * element + 4 * heads
    if config.qk_norm is not None:
        kept += (query + key) * (4 + element)
    if config.clip_qkv is not None:
        kept += (query + 2 * key) * element
    return kept


def _mlp_bytes(width: int, element: int) -> int:
    """Gate and up, the activated gate, and its product with up."""
    return 4 * width * element


__all__ = ["expert_bytes", "layer_bytes", "norm_bytes", "sender_bytes"]
