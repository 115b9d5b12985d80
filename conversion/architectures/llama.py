"""Llama."""

from .base import Architecture


class Llama(Architecture):
    model_type = "llama"
