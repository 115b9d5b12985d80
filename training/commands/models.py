"""Models that commands run: with their tokenizer, on a device."""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.conversion.tokenizer import required_tokenizer
from mohge.loading import load_model
from mohge.model_cards.names import shipped_file
from mohge.model_cards.shipped import load_config
from mohge.training.tuning.lora import known_patterns


def config_with_weights(name: str) -> MoHGEConfig:
    """[`load_config`] of what is no recipe without weights, or else raises a `ValueError`."""
    if shipped_file(name, "config.json") and not Path(name).exists():
        raise ValueError(f"{name} is a recipe without weights: train it first (mohge train {name})")
    return load_config(name)


def load_on_device(options: argparse.Namespace) -> tuple[MoHGEForCausalLM, PreTrainedTokenizerBase]:
    """
    The model `options.model`, in `options.dtype` and ready for inference on `options.device`, and its tokenizer.

    Raises:
        ValueError: if a part of it is missing, or there is no such device.
    """
    device = options.device or torch.accelerator.current_accelerator() or "cpu"
    tokenizer = required_tokenizer(options.model)
    with known_patterns():  # of adapters
        model = load_model(options.model, dtype=options.dtype).eval()
    try:
        return model.to(device), tokenizer
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device}: {error}") from error


__all__ = ["config_with_weights", "load_on_device"]
