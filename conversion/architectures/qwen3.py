"""Qwen3: norms of queries and keys per head, and a sliding window in some layers."""

from .base import Architecture


class Qwen3(Architecture):
    model_type = "qwen3"

    def attention(self) -> dict:
        return super().attention() | {
            "qk_norm": "head",
            "sliding_window": self.config.sliding_window,
            "layer_types": list(self.config.layer_types),
        }
