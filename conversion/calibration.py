"""Text for calibration, as blocks of tokens."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .decoders import MoHGE, Source
from .recipe import Recipe


_HELD_OUT = 8


class Tokens(NamedTuple):
    """Blocks of tokens, the last of them held out from all statistics for the check."""

    ids: torch.Tensor
    """[N, S]"""
    held_out: int
    """Number of blocks held out."""
    text: bool
    """Whether they are text, not random."""


def random_tokens(source: Source | MoHGE, seed: int) -> Tokens:
    """Tokens for a check where no text is given: two sequences, in which an expert is chosen 8 times on average."""
    config, length = source.config, 16
    for layer in source.equivalent.sparse_layers:
        length = max(length, 4 * layer.num_experts // layer.num_experts_per_tok)
    size = (2, _at_most(config, length))
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randint(config.vocab_size, size, generator=generator), size[0], False)


def read_tokens(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig, observed: bool
) -> Tokens:
    """
    Tokenise `recipe.calibration` with the source's tokenizer: documents one after the other, each ended by the
    end-of-sequence token, cut into blocks, which begin as the tokenizer begins a text. A column `input_ids` is taken
    as it is. An eighth of the blocks is held out, or all of them if no statistics will be taken (`observed`).

    Raises:
        ValueError: if the data cannot be read, has no text, or is too short.
    """
    name = recipe.calibration
    length = _at_most(config, recipe.calibration_length)
    wanted = recipe.calibration_tokens // length * length
    if wanted < 2 * length:
        raise ValueError(
            f"`calibration_tokens` ({recipe.calibration_tokens}) must be at least two sequences of "
            f"`calibration_length` ({length}): raise it, or shorten the sequences"
        )
    rows = _rows(recipe)
    row = next(rows, {})
    first = [] if tokenizer is None or "input_ids" in row else _beginning(tokenizer)
    wanted -= wanted // length * len(first)
    ids: list[int] = []
    for document in _documents(recipe, tokenizer, itertools.chain([row] if row else [], rows)):
        ids.extend(document)
        if len(ids) >= wanted:
            break
    if not ids:
        raise ValueError(f"`calibration` {name} has no text in its column `{recipe.calibration_column}`: give text")
    if len(ids) < wanted:
        raise ValueError(
            f"`calibration` {name} has only {len(ids)} tokens, not {recipe.calibration_tokens}: give a longer one, or "
            "lower `calibration_tokens`"
        )
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise ValueError(
            f"`calibration` {name} has token ids outside of the source's vocabulary of {config.vocab_size}: use the "
            "source's own tokenizer"
        )
    pieces = torch.tensor(ids[:wanted]).view(-1, length - len(first))
    blocks = torch.cat([torch.tensor(first, dtype=torch.long).expand(len(pieces), -1), pieces], dim=1)
    return Tokens(blocks, max(1, len(blocks) // _HELD_OUT) if observed else len(blocks), True)


def _at_most(config: PreTrainedConfig, length: int) -> int:
    """A length that the model supports; some have no limit."""
    return min(length, getattr(config, "max_position_embeddings", length))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text. Models that were trained with it, such as Gemma, do not work without."""
    token = tokenizer.bos_token_id
    return [token] if token is not None and tokenizer("a")["input_ids"][:1] == [token] else []


def _documents(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, rows: Iterable[dict]) -> Iterator[list[int]]:
    """The tokens of each document, or piece of one."""
    name, column = recipe.calibration, recipe.calibration_column
    for row in rows:
        if "input_ids" in row:
            ids = row["input_ids"]
            if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
                raise ValueError(f"`calibration` {name} has rows whose `input_ids` is no list of numbers: mend it")
            yield ids
            continue
        if column not in row:
            raise ValueError(
                f"`calibration` {name} has no column `{column}`: name the text column with `calibration_column`, one "
                f"of {', '.join(row)}"
            )
        text = row[column]
        if not isinstance(text, str | None):
            raise ValueError(
                f"`calibration` {name} has something else than text in its column `{column}`: name another"
            )
        if text and text.strip():
            if tokenizer is None:
                raise ValueError(
                    f"{recipe.source} has no tokenizer: put one there, or give calibration data with a column "
                    "`input_ids`"
                )
            ends = not row.get("continues") and tokenizer.eos_token_id is not None
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            yield ids + ([tokenizer.eos_token_id] if ends else [])


def _rows(recipe: Recipe) -> Iterator[dict]:
    """The rows, read as they are needed: nothing is downloaded or cached as a whole."""
    from mohge.training.data.packing import TextSource, read_rows  # seconds, which other commands should not wait

    name, column = recipe.calibration, recipe.calibration_column
    try:
        source = TextSource(name, recipe.calibration_config, recipe.calibration_split, column)
        yield from read_rows(source, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"`calibration` {name} cannot be read ({error})") from error
