"""OLMoE: norms of queries and keys over all heads, clipping, every layer a mixture."""

from .base import Architecture, ExpertLayout


class Olmoe(Architecture):
    model_type = "olmoe"

    @property
    def experts(self) -> ExpertLayout:
        config = self.config
        return ExpertLayout(
            config.num_experts, config.intermediate_size, config.num_experts_per_tok, config.norm_topk_prob
        )

    def attention(self) -> dict:
        return super().attention() | {"qk_norm": "hidden", "clip_qkv": self.config.clip_qkv}
