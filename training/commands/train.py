"""
Pretraining and continued training: `mohge train RECIPE`, and on several devices
`accelerate launch --config_file accelerate.yaml -m mohge train RECIPE`; `mohge place` writes a launch.
"""

import argparse
import copy
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.commands.flags import PretrainArguments
from mohge.commands.main import run_process
from mohge.conversion.tokenizer import required_tokenizer
from mohge.info import model_without_memory
from mohge.loading import load_model
from mohge.model_cards.names import shipped_file, shipped_recipes
from mohge.model_cards.shipped import load_config
from mohge.parallel_mohge import check_layout
from mohge.training.data.corpus import train_tokenizer
from mohge.training.data.packing import (
    check_sequence_length,
    collate_packed,
    packed_blocks,
    read_rows,
)
from mohge.training.data.sources import TextSource, parse_sources
from mohge.training.loop.checkpointing import check_same_model, reading
from mohge.training.loop.failure import writing
from mohge.training.loop.trainer import MoHGETrainer

from .recipe import (
    held_out_sources,
    one_line_errors,
    open_run,
    parse_recipe,
    print_stopped,
    print_written,
    sole_run,
    train_and_save,
)


TOKENIZER_TEXT = 50_000_000
"""Characters of the training text that a tokenizer is trained on, where none is given."""


def _layout(own: PretrainArguments, config: MoHGEConfig) -> DistributedConfig | None:
    """How the model of `config` is spread over ranks; None if it is not.

    Raises:
        ValueError: if the sizes contradict each other, the config or the number of processes.
    """
    layout = DistributedConfig(
        tp_size=own.tp_size,
        ep_size=own.ep_size,
        fsdp_size=own.fsdp_size,
        dp_replicate_size=own.dp_replicate_size,
    )
    wanted, started = layout.dp_size * layout.tp_size, int(os.environ.get("WORLD_SIZE", "1"))
    if wanted == 1:
        return None  # on several processes Trainer copies the model to each
    if wanted != started:
        raise ValueError(
            f"`fsdp_size` * `tp_size` * `dp_replicate_size` is {wanted}, and {started} processes were started: "
            f"launch with --num_processes {wanted}"
        )
    check_layout(config, layout)
    if layout.tp_size > 1 and not torch.accelerator.is_available():
        raise ValueError("`tp_size` above 1 needs GPUs under Trainer: on CPU use `fsdp_size` with `ep_size`")
    return layout


def run(options: argparse.Namespace) -> int:
    """
    The command `mohge train`: train a model, and save it with its tokenizer in `output_dir`.

    Returns:
        `int`: Exit status: 0, or 1 if the run was stopped and can go on.

    Raises:
        ValueError: if arguments contradict each other, the model or the text.
        OSError: if a file cannot be read.
    """
    (own, training), given = parse_recipe(
        "mohge train", __doc__, [PretrainArguments, TrainingArguments], options.arguments
    )
    if own.model is None:
        raise ValueError(f"`model` is missing: name a config, a model or one of {', '.join(shipped_recipes())}")
    with sole_run(training):
        if _pretrain(own, training, given):
            folder = training.output_dir
            print_written(training, f'mohge generate {folder} "PROMPT"', f"mohge report {folder}")
            return 0
    print_stopped("train", training)
    return 1


def _pretrain(own: PretrainArguments, training: TrainingArguments, given: dict[str, Any]) -> bool:
    """Whether the run is complete."""
    config = load_config(own.model)
    model_without_memory(copy.deepcopy(config))  # which says in one line what cannot be built
    layout = _layout(own, config)
    check_sequence_length(own.sequence_length, config)
    sources = parse_sources(own.datasets, "datasets")
    held_out = held_out_sources(own.eval_datasets, training)
    if own.streaming and training.max_steps <= 0:
        raise ValueError("`streaming` needs `max_steps`: the length of a stream is not known")
    with training.main_process_first(local=False):
        checkpoint = open_run(training, given)
    if checkpoint is not None:
        check_same_model(config, checkpoint)
    tokenizer = _tokenizer(own, config, sources, training, checkpoint)
    with training.main_process_first():  # the others read its cache
        options = {"tokenizer": tokenizer, "sequence_length": own.sequence_length, "num_proc": own.num_proc}
        shuffled = {"streaming": own.streaming, "seed": training.seed, "shuffle_buffer": own.shuffle_buffer}
        text = packed_blocks(sources, **options, **shuffled)
        eval_text = packed_blocks(held_out, **options) if held_out else None
    if own.streaming:
        text = text.repeat(None)  # Trainer cannot go on in the second epoch of a stream
    dtype = own.dtype or config.dtype or "float32"
    with _start(own, config, training, checkpoint) as start, one_line_errors(), reading(start):
        trainer = MoHGETrainer(
            # A checkpoint's own config has the tokenizer's padding token, whose embedding then gets no gradient.
            load_model(start, config=config, dtype=dtype, distributed_config=layout),
            training,
            train_dataset=text,
            eval_dataset=eval_text,
            data_collator=collate_packed,
            processing_class=tokenizer,
        )
    return train_and_save(trainer, given, checkpoint)


def _tokenizer(
    own: PretrainArguments,
    config: MoHGEConfig,
    sources: list[TextSource],
    training: TrainingArguments,
    checkpoint: str | None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or that of the checkpoint or model, or one made from the text on the first rank."""
    path = Path(own.model)
    has_none = path.is_file() or not (any(path.glob("tokenizer*")) or _is_on_hub(own.model))
    if own.tokenizer is not None or checkpoint is not None or not has_none:
        tokenizer = required_tokenizer(own.tokenizer or checkpoint or own.model)
    else:
        made = [None]
        if training.process_index == 0:
            try:
                made = [train_tokenizer(_characters(sources, TOKENIZER_TEXT), config.vocab_size)]
            except (ValueError, OSError) as error:
                made = [error]  # for all ranks, which would wait for a tokenizer
        (tokenizer,) = broadcast_object_list(made)
        if isinstance(tokenizer, Exception):
            raise tokenizer
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"`vocab_size` is {config.vocab_size}, and the tokenizer has {len(tokenizer)} tokens: raise it, or name "
            "another `tokenizer`"
        )
    return tokenizer


def _is_on_hub(model: str) -> bool:
    return not Path(model).exists() and shipped_file(model, "config.json") is None


@contextmanager
def _start(
    own: PretrainArguments, config: MoHGEConfig, training: TrainingArguments, checkpoint: str | None
) -> Iterator[str]:
    """The model to start from: a checkpoint, `own.model`, or a folder with random weights, for as long as it takes."""
    path = Path(own.model)
    if checkpoint is not None or _is_on_hub(own.model) or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        yield checkpoint or own.model
        return
    folder = Path(training.output_dir) / ".initial"
    try:
        with training.main_process_first(local=False):
            if training.should_save:
                set_seed(training.seed)
                with writing(folder):
                    # which notes things in the config
                    MoHGEForCausalLM(copy.deepcopy(config)).save_pretrained(folder)
        yield str(folder)
        PartialState().wait_for_everyone()
    finally:
        if training.should_save:
            shutil.rmtree(folder, ignore_errors=True)


def _characters(sources: list[TextSource], limit: int) -> Iterator[str]:
    """The first text of the sources, in equal parts."""
    for source in sources:
        left = limit // len(sources)
        for row in read_rows(source, streaming=True):
            text = row.get(source.column)
            if text is None and source.column in row:
                continue
            if not isinstance(text, str):
                raise ValueError(f"{source.path} has no text in its column `{source.column}`: name it as `column`")
            yield text
            left -= len(text)
            if left <= 0:
                break


if __name__ == "__main__":
    run_process(["train", *sys.argv[1:]])
