"""Real text that is on every machine with Python, and a tokenizer for it."""

import itertools
import random
import re
import sysconfig
import zlib
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mohge.model_cards.names import STANDARD_LIBRARY


_DATA = re.compile(r"""\s*[\[({]*\s*[\d'"\\]""")
"""How a line of a table begins: with a number or a string."""


def standard_library_texts(characters: int = 5_000_000) -> tuple[list[str], list[str]]:
    """
    Texts of the standard library, to train on and held out: sources, with their docstrings, and the language reference
    of `pydoc`, up to about `characters`, of which a twentieth is held out. Whole families are held out, a top-level
    module or package with what is named like it (`pickle`, `_pickle`), so that hardly a held-out line is trained on.
    Tables, such as those of `encodings`, and files that mostly repeat others are left out.

    Raises:
        OSError: if this Python has no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    random.Random(0).shuffle(paths)
    paths.sort(key=lambda path: path.parent.name != "pydoc_data")  # prose first, whatever the limit cuts off
    held_out = [is_held_out(path.relative_to(root).parts[0]) for path in paths]
    known: set[str] = set()
    parts = []
    for part, share in ((False, 0.95), (True, 0.05)):
        texts, total = [], 0
        for path in itertools.compress(paths, (held == part for held in held_out)):
            if total >= share * characters:
                break
            text = path.read_text(encoding="utf-8", errors="replace")
            lines = [line for line in text.splitlines() if line.strip()]
            table = path.parent.name != "pydoc_data" and 2 * sum(map(bool, map(_DATA.match, lines))) > len(lines)
            long = long_lines(text)
            if table or 2 * sum(line in known for line in long) >= len(long):
                continue
            known.update(long)
            texts.append(text)
            total += len(text)
        parts.append(texts)
    if sum(map(len, itertools.chain(*parts))) < 100_000:
        raise FileNotFoundError(f"{root} has no Python sources to train on: run the demo with a full Python")
    return parts[0], parts[1]


def is_held_out(module: str) -> bool:
    """Whether a top-level module or package of the standard library is held out: one of 20 is, by its name."""
    return zlib.crc32(module.removesuffix(".py").strip("_").encode()) % 20 == 10


def long_lines(text: str) -> list[str]:
    """The lines that say something: those longer than 20 characters."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) > 20]


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
