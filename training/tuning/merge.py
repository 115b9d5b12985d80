"""Merging an adapter into the weights of its base model, with a check that the result computes the same."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.conversion.tokenizer import load_tokenizer
from mohge.loading import load_model
from mohge.model_cards.card import make_card
from mohge.model_cards.folder import ADAPTER_CONFIG, matching_files
from mohge.model_cards.shipped import load_config
from mohge.model_cards.writing import new_folder, write_file

from .lora import base_name, known_patterns, read_adapter


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative error of the logits, by the dtype that the merged weights are rounded to."""

_RECORDS = ("recipe.yaml", "trainer_state.json", "traffic.json")  # of the run, which the merged model is the result of
_CHECK_SHAPE = (8, 64)


@dataclass
class MergeCheck:
    """
    How far a merged model is from base and adapter. Both are relative errors of the logits, the median over tokens.

    Args:
        error (`float`): Between the merged model, reloaded, and base and adapter.
        effect (`float`): Between the base alone, and base and adapter.
        dtype (`torch.dtype`): What the merged weights are rounded to.
    """

    error: float
    effect: float
    dtype: torch.dtype

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance of the dtype, and at most half the adapter's effect: what rounds
        the adapter away has not merged it."""
        return self.error <= min(TOLERANCES[self.dtype], max(self.effect / 2, 1e-5))


def is_quantized(config: MoHGEConfig) -> bool:
    """Whether the model of this config is saved quantised."""
    return getattr(config, "quantization_config", None) is not None


def check_merge(base: MoHGEConfig, name: str, target: str | Path):
    """
    Check that adapters on the base model can be merged into it, and the result written to `target`.

    Raises:
        ValueError: if the base model is saved quantised.
        OSError: if `target` exists.
    """
    if Path(target).exists():
        raise FileExistsError(f"`merge`: {target} exists: name another folder, or remove it first")
    if is_quantized(base):
        raise ValueError(
            f"`merge`: {name} is saved quantised, and cannot take an adapter in: train on the model that it was "
            "made of, with `quantize`"
        )


def merge_adapter(adapter: str | Path, target: str | Path, dtype: torch.dtype | None = None) -> MergeCheck:
    """
    Merge the adapter in the folder `adapter` into its base model, and write the plain model, with tokenizer and the
    records of the run, to `target`. That is created only if the check passes.

    The merge is done in float32 and rounded once. The check compares logits in float32 on random tokens, which no
    training has seen and which spread over many experts, with the merged weights read back from disk.

    Args:
        adapter (`str` or `Path`): Folder of an adapter.
        target (`str` or `Path`): Folder to create.
        dtype (`torch.dtype`, *optional*): Of the merged weights; by default that of the base model's.

    Raises:
        ValueError: if there is no adapter, or its base model is saved quantised.
        OSError: if `target` exists, or the base model cannot be read.
    """
    adapter, target = Path(adapter), Path(target)
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(f"{adapter} has no {ADAPTER_CONFIG}: give the folder of an adapter to merge")
    source = base_name(adapter)
    config = load_config(source)
    check_merge(config, source, target)
    adapter_config = read_adapter(adapter, config)
    with new_folder(target, "merge") as temporary:
        base = load_model(source, dtype=torch.float32).eval()
        tokens = torch.randint(config.vocab_size, _CHECK_SHAPE, generator=torch.Generator().manual_seed(0))
        before = _logits(base, tokens)
        with known_patterns():
            adapted = PeftModel.from_pretrained(base, adapter, config=adapter_config).eval()
        wanted = _logits(adapted, tokens)
        dtype = dtype or config.dtype or torch.float32
        merged = adapted.merge_and_unload(safe_merge=True).to(dtype)
        folder = temporary / "merged"
        config = save_without_config(merged, folder, load_tokenizer(adapter))
        for name in matching_files(adapter, _RECORDS):
            shutil.copy(adapter / name, folder)
        del base, adapted, merged
        reloaded = load_model(folder, config=config, dtype=torch.float32).eval()
        check = MergeCheck(_error(_logits(reloaded, tokens), wanted), _error(before, wanted), dtype)
        if check.passed:
            write_file(folder / "README.md", str(make_card(folder, target.name, config)))
            add_config(folder, target)
    return check


def save_without_config(
    model: MoHGEForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerBase | None
) -> MoHGEConfig:
    """Save model and tokenizer, but the config in a folder beside, so that nobody loads what has not been checked.
    Returns that config, read back."""
    config = model.config
    vars(config)["save_pretrained"] = lambda *arguments, **options: None
    try:
        model.save_pretrained(folder)
    finally:
        del vars(config)["save_pretrained"]
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    config.save_pretrained(folder.with_name("config"))
    return MoHGEConfig.from_pretrained(folder.with_name("config"))


def add_config(folder: Path, target: Path):
    """Complete what [`save_without_config`] has saved, and give it its place."""
    (folder.with_name("config") / "config.json").rename(folder / "config.json")
    folder.rename(target)


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens.to(model.device)).logits.double().cpu()


def _error(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


__all__ = ["TOLERANCES", "MergeCheck", "merge_adapter"]
