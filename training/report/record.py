"""What there is to report on: a run or a model, its training record, and text to measure it on."""

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from mohge import MoHGEConfig
from mohge.conversion.tokenizer import required_tokenizer
from mohge.info import Routing
from mohge.model_cards.folder import read_json
from mohge.model_cards.records import recorded_routings
from mohge.model_cards.shipped import load_config

from ..data.packing import batches, packed_blocks
from ..data.sources import parse_sources
from ..loop.traffic import RouterTraffic
from ..tuning.lora import base_name, load_adapted
from .measure import RoutingEvaluation, evaluate_routing


BATCH = 8
"""Sequences of a forward pass."""
LENGTH = 1024
"""Tokens of a sequence at most."""


class Record(NamedTuple):
    """A run or a model, without its weights."""

    model: str
    """Folder or Hub id of weights and tokenizer."""
    config: MoHGEConfig
    history: list[dict]
    """`log_history` of the run's `Trainer`; empty for a model without a record."""
    traffic: RouterTraffic | None
    """The newest routing of the run, if it was recorded."""
    routings: list[Routing]
    """All that is recorded of where tokens went."""


def read_record(source: str) -> Record:
    """
    Read a run or a model. Of a run that is still going, the newest checkpoint is read.

    Args:
        source (`str`): Folder of a run or a model, or Hub id of a model.

    Raises:
        ValueError: if it is not of a MoHGE model, or its record cannot be read.
        OSError: if there is nothing to read.
    """
    folder = Path(source)
    if not folder.is_dir():
        return Record(source, load_config(source), [], None, [])
    checkpoint = get_last_checkpoint(source)
    places = [folder] if checkpoint is None else [folder, Path(checkpoint)]
    states = [(place, _read_state(place)) for place in places if (place / TRAINER_STATE_NAME).is_file()]
    # A finished run that is trained further has a state of its own, older than the checkpoints beside it.
    model, state = max(states, key=lambda entry: entry[1]["global_step"], default=(folder, {"log_history": []}))
    config = load_config(base_name(model))
    traffic = None
    if (folder / "traffic.json").is_file():
        traffic = RouterTraffic.load(folder / "traffic.json")
        traffic.check(config)
    return Record(str(model), config, state["log_history"], traffic, recorded_routings(folder, config))


def _read_state(folder: Path) -> dict:
    path = folder / TRAINER_STATE_NAME
    try:
        state = read_json(path)
        return {name: state[name] for name in ("global_step", "log_history")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no state of a Trainer ({type(error).__name__}: {error}): remove it") from error


def measure_text(record: Record, text: str, tokens: int) -> tuple[RoutingEvaluation, PreTrainedTokenizerBase]:
    """
    Load the model, on a GPU if there is one, and measure its routing of the first `tokens` tokens of `text`.

    Raises:
        ValueError: if the text cannot be read, or the model has no tokenizer.
        OSError: if the model cannot be loaded.
    """
    tokenizer = required_tokenizer(record.model)
    batches = read_text(text, tokenizer, record.config, tokens)
    model = load_adapted(record.model, record.config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return evaluate_routing(model, batches), tokenizer


def read_text(
    text: str, tokenizer: PreTrainedTokenizerBase, config: MoHGEConfig, tokens: int
) -> list[dict[str, torch.Tensor]]:
    """
    The first `tokens` tokens of a text, in batches of sequences as long as the model's context, at most 1024 tokens.
    A last shorter sequence is a batch of its own, so that there is no padding.

    Args:
        text (`str`): A source as `mohge train` takes it: a file, a folder, a Hub id, or a YAML mapping.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        config ([`MoHGEConfig`]): The model's config.
        tokens (`int`): Number of tokens at most.

    Raises:
        ValueError: if the text cannot be read, is too short, or has tokens that the model does not know.
    """
    length = min(config.max_position_embeddings, LENGTH)
    blocks = packed_blocks(parse_sources([text], "--text"), tokenizer, length, streaming=True, drop_last=False)
    rows = []
    for block in blocks:
        left = tokens - length * len(rows)
        rows.append({name: values[:left] for name, values in block.items()})
        if left <= length:
            break
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= config.vocab_size:
        raise ValueError(
            f"--text {text} has the token {largest}, and the model's `vocab_size` is {config.vocab_size}: use the "
            "tokenizer that the model was trained with"
        )
    made = list(batches(rows, BATCH))
    if all(batch["labels"][:, 1:].eq(-100).all() for batch in made):
        raise ValueError(f"--text {text} has no two tokens in a row: give a longer text, or raise --tokens")
    return made
