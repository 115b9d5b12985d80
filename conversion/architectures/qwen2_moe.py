"""Qwen2-MoE: a gated shared expert, dense layers in between, biases in queries, keys and values."""

from .base import Architecture, ExpertLayout


def sparse_layout(config, **shared) -> ExpertLayout:
    """The layout of a Qwen mixture, where `decoder_sparse_step` and `mlp_only_layers` choose the dense layers."""
    dense = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    ]
    return ExpertLayout(
        config.num_experts,
        config.moe_intermediate_size,
        config.num_experts_per_tok,
        config.norm_topk_prob,
        tuple(dense),
        **shared,
    )


class Qwen2Moe(Architecture):
    model_type = "qwen2_moe"

    @property
    def experts(self) -> ExpertLayout:
        return sparse_layout(self.config, shared_width=self.config.shared_expert_intermediate_size, shared_gate=True)

    def attention(self) -> dict:
        return {
            "attention_bias": self.config.qkv_bias,
            "attention_out_bias": False,
            "sliding_window": self.config.sliding_window or None,
            "layer_types": list(self.config.layer_types),
        }
