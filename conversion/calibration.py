"""Text for calibration, as blocks of tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import AutoTokenizer, PreTrainedConfig

from .architectures import Architecture
from .recipe import Recipe


_FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_HELD_OUT = 8


class Tokens(NamedTuple):
    """Blocks of tokens, the last of them held out from all statistics for the check."""

    ids: torch.Tensor
    """[N, S]"""
    held_out: int
    """Number of blocks held out."""
    text: bool
    """Whether they are text, not random."""


def random_tokens(architecture: Architecture, seed: int) -> Tokens:
    """Tokens for a check where no text is given: two sequences, in which an expert is chosen 8 times on average."""
    config, layout = architecture.config, architecture.experts
    length = 16 if layout is None else max(16, 4 * layout.count // layout.per_token)
    size = (2, min(length, config.max_position_embeddings))
    generator = torch.Generator().manual_seed(seed)
    return Tokens(torch.randint(config.vocab_size, size, generator=generator), size[0], False)


def read_tokens(recipe: Recipe, source: Path, config: PreTrainedConfig) -> Tokens:
    """
    Tokenise `recipe.calibration` with the source's tokenizer: documents one after the other, each ended by the
    end-of-sequence token, cut into blocks. A column `input_ids` is taken as it is.

    Raises:
        ValueError: if the data cannot be read, has no text, or is too short.
    """
    name, column = recipe.calibration, recipe.calibration_column
    rows = _rows(recipe)
    columns = next(rows, {}).keys()
    if not columns:
        raise ValueError(f"`calibration` {name} has no text: give a data set with rows")
    pretokenised = "input_ids" in columns
    if not pretokenised and column not in columns:
        raise ValueError(
            f"`calibration` {name} has no column `{column}`: name the text column with `calibration_column`, one of "
            f"{', '.join(columns)}"
        )
    tokenizer = None if pretokenised else _tokenizer(source)
    length = min(recipe.calibration_length, config.max_position_embeddings)
    wanted = recipe.calibration_tokens // length * length
    if wanted < 2 * length:
        raise ValueError(
            f"`calibration_tokens` ({recipe.calibration_tokens}) must be at least two sequences of "
            f"`calibration_length` ({length}): raise it, or shorten the sequences"
        )
    ids: list[int] = []
    for row in _rows(recipe):
        if pretokenised:
            ids.extend(row["input_ids"])
        elif row[column] and row[column].strip():
            ids.extend(tokenizer(row[column], verbose=False)["input_ids"])
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
        if len(ids) >= wanted:
            break
    if not ids:
        raise ValueError(f"`calibration` {name} has no text in its column `{column}`: give a data set with text")
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
    blocks = torch.tensor(ids[:wanted]).view(-1, length)
    return Tokens(blocks, max(1, len(blocks) // _HELD_OUT), True)


def _rows(recipe: Recipe) -> Iterator[dict]:
    """The rows, read as they are needed: nothing is downloaded or cached as a whole."""
    name, path = recipe.calibration, Path(recipe.calibration)
    try:
        options = {"split": recipe.calibration_split, "streaming": True}
        if path.is_file():
            if path.suffix not in _FORMATS:
                raise ValueError(f"its ending is {path.suffix or 'missing'}, not one of {', '.join(_FORMATS)}")
            whole = {"sample_by": "document"} if path.suffix == ".txt" else {}
            name, options = _FORMATS[path.suffix], options | whole | {"data_files": str(path)}
        yield from load_dataset(name, **options)
    except (DatasetNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"`calibration` {recipe.calibration} cannot be read ({error})") from error


def _tokenizer(source: Path):
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{source} has no tokenizer that transformers can load ({' '.join(str(error).split())[:200]}): put one "
            "there, or give calibration data with a column `input_ids`"
        ) from error
