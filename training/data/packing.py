"""Text to train and evaluate on: any source of `datasets`, as sequences of one length with documents kept apart."""

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    interleave_datasets,
    load_dataset,
)
from transformers import PreTrainedTokenizerBase

from mohge import MoHGEConfig
from mohge.model_cards.names import STANDARD_LIBRARY

from .corpus import standard_library_texts
from .sources import TextSource, check_text_there


FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Ending of a data file -> the builder of `datasets` that reads it. Text files, `.txt`, are read here."""

_PIECE = 2**20  # characters
_BEGINS, _ENDS = "mohge_begins", "mohge_ends"  # columns: whether a document begins with the row, or ends with it
_BLOCK = Features({name: List(Value("int32")) for name in ("input_ids", "position_ids")})


def check_sequence_length(sequence_length: int | None, config: MoHGEConfig) -> int:
    """
    The length itself, or 1024 tokens or the model's context, whichever is shorter, if it is None.

    Raises:
        ValueError: if the model's context is shorter.
    """
    context = config.max_position_embeddings
    if sequence_length is not None and sequence_length > context:
        raise ValueError(
            f"`sequence_length` is {sequence_length}, and the model's `max_position_embeddings` {context}: lower the "
            "one, or raise the other in the model's config"
        )
    return min(1024, context) if sequence_length is None else sequence_length


def read_rows(source: TextSource, streaming: bool = False) -> Dataset | IterableDataset:
    """
    The rows of a source with all their columns. Of text files, a row is a piece of a document, in the column
    `source.column`; `mohge_begins` and `mohge_ends` say whether it is the first and the last one.

    Raises:
        ValueError: if it cannot be read, or has no rows.
    """
    try:
        rows = _rows(source, streaming)
        next(iter(rows))
    except StopIteration as error:
        raise ValueError(f"{source.path} has no rows in its split `{source.split}`: give text") from error
    except Exception as error:  # those of `datasets` and of all that reads for it
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"{source.path} cannot be read as text ({reason})") from error
    return rows


def _rows(source: TextSource, streaming: bool) -> Dataset | IterableDataset:
    path = Path(source.path)
    files = [path] if path.suffix == ".txt" and path.is_file() else sorted(path.rglob("*.txt"))
    if path.is_dir() and any(any(path.rglob(f"*{ending}")) for ending in FORMATS):
        files = []  # a licence or the like, beside the data
    if source.path == STANDARD_LIBRARY:
        splits = ("train", "validation")
        generator, state = _standard_library_rows, {"python": sys.version, "rule": "families"}
    elif files:
        splits = ("train",)
        state = {"stamps": tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)}
        generator = _text_file_rows
    elif path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"its ending is {path.suffix or 'missing'}, not one of .txt, {', '.join(FORMATS)}")
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split=source.split, streaming=streaming)
    else:
        check_text_there(source.path)
        return load_dataset(
            source.path, source.name, split=source.split, revision=source.revision, streaming=streaming
        )
    if source.split not in splits:
        raise ValueError(f"it has no split `{source.split}`: use {' or '.join(splits)}")
    kind = IterableDataset if streaming else Dataset
    # `state` also tells the cache when the text has changed.
    return kind.from_generator(generator, gen_kwargs={"column": source.column, "split": source.split, **state})


def _standard_library_rows(column: str, split: str, python: str, rule: str) -> Iterator[dict]:
    texts = standard_library_texts()[0 if split == "train" else 1]
    yield from ({column: text, _BEGINS: True, _ENDS: True} for text in texts)


def _text_file_rows(column: str, split: str, stamps: tuple[tuple[str, int, int]]) -> Iterator[dict]:
    """Each file in pieces of whole lines, about a million characters each."""
    for file, *_ in stamps:
        with open(file, encoding="utf-8") as opened:
            piece, begins = "".join(opened.readlines(_PIECE)), True
            while piece:
                after = "".join(opened.readlines(_PIECE))
                yield {column: piece, _BEGINS: begins, _ENDS: not after}
                piece, begins = after, False


def tokenized(
    source: TextSource, tokenizer: PreTrainedTokenizerBase | None, streaming: bool = False, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """
    A source as rows of tokens: `input_ids`, with the end-of-sequence token where a document ends, and what else the
    tokenizer puts in front where one begins; and `ends`, whether one does. Unless streaming, they are cached on disk.

    Raises:
        ValueError: if the source cannot be read, has neither text nor tokens, or has text and there is no tokenizer.
    """
    rows = read_rows(source, streaming)
    columns = list(next(iter(rows)))
    if "input_ids" not in columns and source.column not in columns:
        raise ValueError(
            f"{source.path} has no column `{source.column}`: name its text column as `column`, one of "
            f"{', '.join(columns)}"
        )
    if "input_ids" not in columns and tokenizer is None:
        raise ValueError(f"{source.path} has text, and the model has no tokenizer: name one as `tokenizer`")
    options = {"fn_kwargs": {"tokenizer": tokenizer, "source": source}, "remove_columns": columns}
    if not streaming:
        options |= {"num_proc": num_proc, "desc": f"tokenizing {source.path}"}
    # Pieces of text files are long, and a thousand of them, the usual batch, take gigabytes.
    return rows.map(_tokenize, batched=True, batch_size=4 if _ENDS in columns else 1000, **options)


def _tokenize(
    batch: dict[str, list], tokenizer: PreTrainedTokenizerBase | None, source: TextSource
) -> dict[str, list]:
    if "input_ids" in batch:
        largest = math.inf if tokenizer is None else len(tokenizer) - 1
        for row in batch["input_ids"]:
            if not isinstance(row, list) or not all(type(token) is int and 0 <= token <= largest for token in row):
                raise ValueError(
                    f"{source.path} has rows whose `input_ids` are no tokens of the tokenizer: take the column out, "
                    "or name the tokenizer that made it as `tokenizer`"
                )
        return {"input_ids": batch["input_ids"], "ends": [True] * len(batch["input_ids"])}
    texts = batch[source.column]
    if not all(isinstance(text, str | None) for text in texts):
        raise ValueError(f"{source.path} has no text in its column `{source.column}`: name another as `column`")
    begins, ends = (batch.get(name, [True] * len(texts)) for name in (_BEGINS, _ENDS))
    tokens = tokenizer([text or "" for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    first = _in_front(tokenizer)
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = [
        first * begin + row + last * end if row else [] for row, begin, end in zip(tokens, begins, ends, strict=True)
    ]
    return {"input_ids": rows, "ends": ends}


def _in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text, such as a beginning-of-sequence token."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
    return whole[: starts[0]] if plain and starts else []


def packed_blocks(
    sources: list[TextSource],
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    streaming: bool = False,
    num_proc: int | None = None,
    seed: int = 0,
    shuffle_buffer: int = 1,
    drop_last: bool = True,
) -> Dataset | IterableDataset:
    """
    Documents joined and cut into sequences of `sequence_length` tokens, without padding.

    `position_ids` start again at 0 with each document, which is how transformers' attention masks are told to keep
    documents apart (in `DataCollatorWithFlattening` too).

    Args:
        sources (`list[TextSource]`):
            Sources. With weights, sequences are drawn from them in these proportions until each was used up at least
            once, so that smaller ones repeat; without, all are used once (streaming: drawn with equal weights).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Not needed where all sources have a column `input_ids`.
        sequence_length (`int`): Tokens of a sequence.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether rows are read as they are needed, instead of being tokenized and cached first.
        num_proc (`int`, *optional*): Processes that tokenize.
        seed (`int`, *optional*, defaults to 0): Seed of the mixture and of streams' shuffling.
        shuffle_buffer (`int`, *optional*, defaults to 1):
            Sequences of a stream among which the next one is drawn; above 1, its files come in random order too.
        drop_last (`bool`, *optional*, defaults to `True`): Whether to leave out what is too short for a sequence.

    Returns:
        Rows of `input_ids` and `position_ids`, `sequence_length` integers each, for [`collate_packed`].

    Raises:
        ValueError: if a source cannot be read, or is shorter than a sequence.
    """
    if sequence_length < 2:
        raise ValueError(f"`sequence_length` is {sequence_length}: it must be at least 2, a token and one to predict")
    blocks = []
    for source in sources:
        tokens = tokenized(source, tokenizer, streaming, num_proc)
        if streaming and shuffle_buffer > 1:
            tokens = tokens.shuffle(seed=seed, buffer_size=1)  # the files; rows may be pieces of a document
        if next(_pack(tokens, sequence_length, drop_last), None) is None:
            raise ValueError(
                f"{source.path} is shorter than `sequence_length` ({sequence_length} tokens): give more text"
            )
        packed = type(tokens).from_generator(
            _pack,
            features=None if streaming else _BLOCK,  # a stream of known features is a stream of lists, not arrays
            gen_kwargs={"rows": tokens, "length": sequence_length, "drop_last": drop_last},
        )
        if streaming and shuffle_buffer > 1:
            packed = packed.shuffle(seed=seed, buffer_size=shuffle_buffer)
        blocks.append(packed if streaming else packed.with_format("numpy"))  # a stream is slow in any format
    if len(blocks) == 1:
        return blocks[0]
    weights = [source.weight for source in sources]
    if weights[0] is None:
        if not streaming:
            return concatenate_datasets(blocks)
        weights = [1] * len(blocks)
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(blocks, shares, seed=seed, stopping_strategy="all_exhausted")


def _pack(rows: Iterable[dict], length: int, drop_last: bool) -> Iterator[dict[str, np.ndarray]]:
    tokens = positions = np.empty(0, np.int32)
    position = 0
    waiting, held = [], 0  # rows not yet cut into sequences, so that a short row does not copy what came before
    for row in rows:
        new = np.asarray(row["input_ids"], np.int32)
        waiting.append((new, np.arange(position, position + len(new), dtype=np.int32)))
        position = 0 if row["ends"] else position + len(new)
        held += len(new)
        if held < length:
            continue
        tokens, positions = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
        whole = held // length * length
        for start in range(0, whole, length):
            yield _block(tokens[start : start + length], positions[start : start + length])
        waiting, held = [(tokens[whole:], positions[whole:])], held - whole
    if held and not drop_last:
        yield _block(*(np.concatenate(parts) for parts in zip(*waiting, strict=True)))


def _block(tokens: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
    """A sequence, in which also a document that began before it starts at position 0."""
    first_document = np.cumprod(positions == positions[0] + np.arange(len(positions))).astype(bool)
    return {"input_ids": tokens, "position_ids": np.where(first_document, positions - positions[0], positions)}


def collate_packed(rows: list[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
    """
    A batch of packed sequences: `input_ids`, `position_ids` and `labels`, each `[B, S]`. A document's first token is
    no target, since nothing of the document comes before it.
    """
    names = ("input_ids", "position_ids")
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])).long() for name in names}
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)}


def batches(blocks: Iterable[dict[str, Sequence[int]]], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of [`collate_packed`], in order, of up to `batch_size` sequences of one length: what `drop_last=False`
    left is a batch of its own, and needs no padding."""
    for _, same in itertools.groupby(blocks, key=lambda row: len(row["input_ids"])):
        while rows := list(itertools.islice(same, batch_size)):
            yield collate_packed(rows)


__all__ = [
    "FORMATS",
    "TextSource",
    "batches",
    "check_sequence_length",
    "collate_packed",
    "packed_blocks",
    "read_rows",
    "tokenized",
]
