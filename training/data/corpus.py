"""Real text that is on every machine with Python, and a tokenizer for it."""

import itertools
import random
import sysconfig
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mohge.model_cards.names import STANDARD_LIBRARY


def standard_library_texts(characters: int = 5_000_000) -> tuple[list[str], list[str]]:
    """
    Texts of the standard library, to train on and held out: sources, with their docstrings, and the language reference
    of `pydoc`, up to about `characters`. Every 20th file is held out.

    Raises:
        OSError: if this Python has no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    random.Random(0).shuffle(paths)
    paths.sort(key=lambda path: path.parent.name != "pydoc_data")  # prose first, whatever the limit cuts off
    texts, total = [], 0
    for path in paths:
        if total >= characters:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        texts.append(text)
        total += len(text)
    if total < 100_000:
        raise FileNotFoundError(f"{root} has no Python sources to train on: run the demo with a full Python")
    held_out = texts[10::20]
    return [text for i, text in enumerate(texts) if i % 20 != 10], held_out


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens, which ends and pads with `<eos>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def token_blocks(texts: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Dataset:
    """Files joined by end-of-sequence tokens and cut into blocks of `length` tokens."""
    tokens = list(
        itertools.chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"])
    )
    blocks = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


__all__ = ["STANDARD_LIBRARY", "standard_library_texts", "token_blocks", "train_tokenizer"]
