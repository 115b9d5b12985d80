"""Qwen3-MoE: norms of queries and keys per head, dense layers in between."""

from .base import Architecture, ExpertLayout
from .qwen2_moe import sparse_layout


class Qwen3Moe(Architecture):
    model_type = "qwen3_moe"

    @property
    def experts(self) -> ExpertLayout:
        return sparse_layout(self.config)

    def attention(self) -> dict:
        return super().attention() | {"qk_norm": "head", "sliding_window": self.config.sliding_window}
