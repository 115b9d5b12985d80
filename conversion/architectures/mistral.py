"""Mistral: Llama with a sliding window in every layer."""

from .base import Architecture


class Mistral(Architecture):
    model_type = "mistral"

    def attention(self) -> dict:
        return {"sliding_window": self.config.sliding_window}
