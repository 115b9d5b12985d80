"""Mixtral: every layer a mixture, the weights of the chosen experts add up to 1."""

from .base import Architecture, Expert, ExpertLayout


class Mixtral(Architecture):
    model_type = "mixtral"
    expert_names = Expert(
        gate="block_sparse_moe.experts.{expert}.w1.weight",
        up="block_sparse_moe.experts.{expert}.w3.weight",
        down="block_sparse_moe.experts.{expert}.w2.weight",
    )
    renamed = {"mlp.gate.weight": "block_sparse_moe.gate.weight"}

    @property
    def experts(self) -> ExpertLayout:
        config = self.config
        return ExpertLayout(config.num_local_experts, config.intermediate_size, config.num_experts_per_tok, True)

    def attention(self) -> dict:
        return {"sliding_window": self.config.sliding_window}
