"""Qwen2: biases in queries, keys and values, and a sliding window in some layers."""

from .base import Architecture


class Qwen2(Architecture):
    model_type = "qwen2"

    def attention(self) -> dict:
        return {
            "attention_bias": True,
            "attention_out_bias": False,
            "sliding_window": self.config.sliding_window,
            "layer_types": list(self.config.layer_types),
        }
