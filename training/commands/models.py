"""Models that commands run: with their tokenizer, on a device."""

import argparse
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.conversion.tokenizer import required_tokenizer
from mohge.model_cards.names import shipped_file
from mohge.model_cards.shipped import load_config
from mohge.training.tuning.lora import base_name, load_adapted


def config_with_weights(name: str) -> MoHGEConfig:
    """[`load_config`] of a model, or of what an adapter was trained on; of a recipe, which has no weights, raises a
    `ValueError`."""
    if shipped_file(name, "config.json") and not Path(name).exists():
        raise ValueError(f"{name} is a recipe without weights: train it first (mohge train {name})")
    return load_config(base_name(name))


def load_on_device(
    options: argparse.Namespace, config: MoHGEConfig
) -> tuple[MoHGEForCausalLM, PreTrainedTokenizerBase]:
    """
    The model or adapter `options.model`, whose config is `config`, in `options.dtype` and ready for inference on
    `options.device`, and its tokenizer.

    Raises:
        ValueError: if a part of it is missing, or there is no such device.
    """
    device = options.device or torch.accelerator.current_accelerator() or "cpu"
    tokenizer = required_tokenizer(options.model)
    model = load_adapted(options.model, config, dtype=options.dtype).eval()
    try:
        return model.to(device), tokenizer
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device}: {error}") from error


__all__ = ["config_with_weights", "load_on_device"]
