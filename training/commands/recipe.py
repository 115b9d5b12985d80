"""Training commands: arguments from a recipe and the command line, and runs that can be stopped and go on."""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.utils import gather_object
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, logging

from mohge.model_cards.names import parse_yaml
from mohge.model_cards.writing import sole_writer, write_file
from mohge.training.data.sources import TextSource, absolute, parse_sources
from mohge.training.loop.callbacks import LogLineCallback, StopSignalCallback
from mohge.training.loop.failure import RunFailed, is_lost_touch, writing
from mohge.training.loop.trainer import MoHGETrainer
from mohge.training.loop.watchdog import meet

from .flags import DEFAULTS, RECIPE_NAME, read_recipe


logger = logging.get_logger(__name__)

_NOT_RECORDED = {"resume_from_checkpoint", "hub_token"}
_PATHS = {"model", "tokenizer", "datasets", "eval_datasets", "chat_template"}
_MAY_DIFFER = {
    *("output_dir", "report_to", "run_name", "project", "trackio_space_id"),
    *("disable_tqdm", "log_level", "log_level_replica", "save_total_limit", "num_proc"),
}
"""Arguments of which a run that goes on may have others: what it computes does not depend on them."""

_NUMBERS = {
    name: (wanted, fits)
    for wanted, fits, names in (
        ("a whole number of at least 1, or -1 to count epochs", lambda n: n >= 1 or n == -1, ["max_steps"]),
        ("a number from 0 to below 1", lambda x: 0 <= x < 1, ["adam_beta1", "adam_beta2", "label_smoothing_factor"]),
        ("a number above 0", lambda x: x > 0, ["num_train_epochs", "logging_steps", "save_steps", "eval_steps"]),
        (
            "a number of at least 0",
            lambda x: x >= 0,
            ["learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps", "neftune_noise_alpha"],
        ),
        (
            "a whole number of at least 1",
            lambda n: n >= 1,
            [
                *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
                *("eval_accumulation_steps", "dataloader_prefetch_factor", "shuffle_buffer", "num_proc"),
            ],
        ),
    )
    for name in names
}
"""Arguments that are numbers -> which are meant, in words, and whether one is."""


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def parse_recipe(
    prog: str, description: str, dataclass_types: Iterable[type], arguments: list[str]
) -> tuple[list[Any], dict[str, Any]]:
    """
    Parse `[RECIPE] [--flag value ...]`. Flags go before the recipe's values.

    Args:
        prog (`str`): The command.
        description (`str`): What it does, for `--help`.
        dataclass_types (`Iterable[type]`): Dataclasses of the arguments, in the form of `HfArgumentParser`.
        arguments (`list[str]`): The command line.

    Returns:
        `tuple[list, dict]`: An instance of each dataclass, and the values that differ from their defaults.

    Raises:
        ValueError: if there is no such recipe, or a name or a value is wrong.
    """
    parser = _Parser(
        dataclass_types,
        prog=prog,
        usage="%(prog)s [RECIPE] [--flag value ...]",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)
        # Or else accelerate takes each process of a CPU run for the only one.
        os.environ.setdefault("ACCELERATE_USE_CPU", "1")
    parser.add_argument(
        "recipe", nargs="?", help="YAML file, or name of a shipped recipe, with values of the flags below"
    )
    recipe = parser.parse_args(arguments).recipe
    values = parser.parse_args([] if recipe is None else _as_arguments(recipe, parser))
    if values.recipe is not None:
        raise ValueError(f"{recipe} has a list where one value belongs, of which {values.recipe} is too many")
    values = vars(parser.parse_args(arguments, values))
    del values["recipe"]
    defaults = vars(parser.parse_args([]))
    given = {name: value for name, value in values.items() if value != defaults[name]}
    for name, value in given.items():
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                parse_yaml(value)
            except ValueError as error:
                raise ValueError(f"`{name}` is {value:.80}, which is no mapping ({error}): mend it") from error
    _check_numbers(values)
    store = meet()
    with one_line_errors():
        parsed = list(parser.parse_dict(values))  # `TrainingArguments` makes the process group
    del store
    # Ranks that do not do the same wait for each other for ever.
    first, *others = gather_object([{name: given[name] for name in given.keys() - _PATHS - _MAY_DIFFER}])
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            one, another = (values.get(name, "by default") for values in (first, other))
            if one != another:
                raise ValueError(f"`{name}` is {one} on rank 0 and {another} on rank {rank}: give all ranks the same")
    for training in (part for part in parsed if isinstance(part, TrainingArguments)):
        _check_schedule(training)
    return parsed, given


def _check_numbers(values: dict[str, Any]):
    """What `TrainingArguments` takes, and fails at later or not at all."""
    for name, value in values.items():
        wanted, fits = _NUMBERS.get(name, (None, None))
        if wanted is not None and value is not None and not (fits(value) and value < math.inf):
            raise ValueError(f"`{name}` is {value}: give {wanted}")


def _check_schedule(training: TrainingArguments):
    """Try the learning-rate schedule out, which `Trainer` does after everything else, and look at the name of what it
    compares models by."""
    if training.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"`metric_for_best_model` is {training.metric_for_best_model}, which no evaluation has: give loss"
        )
    if training.torch_compile_mode not in (None, *torch._inductor.list_mode_options()):
        raise ValueError(f"`torch_compile_mode` is {training.torch_compile_mode}, which torch.compile does not have")
    optimizer = torch.optim.SGD([torch.zeros(1)])
    if training.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        return  # which need more than a number of steps
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=max(training.max_steps, 1),
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`lr_scheduler_kwargs` is {training.lr_scheduler_kwargs}, which does not fit `lr_scheduler_type` "
            f"{training.lr_scheduler_type.value}: {error}"
        ) from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within this context, what a `Trainer` or its arguments lack (a reporter, a device) is a ValueError."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError) as error:
        if isinstance(error, RunFailed) or is_lost_touch(error):
            raise
        raise ValueError(str(error)) from error


def _as_arguments(recipe: str, parser: _Parser) -> list[str]:
    values = read_recipe(recipe)
    arguments = []
    for name, value in values.items():
        if f"--{name}" not in parser._option_string_actions:  # also without a value, which argparse does not see
            raise ValueError(f"{recipe} has --{name}, which is no flag: look for it in --help")
        if isinstance(value, list):
            arguments += [f"--{name}", *map(_as_text, value)]
        elif value is not None:
            arguments.append(f"--{name}={_as_text(value)}")
    return arguments


def _as_text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)  # a date, say


def held_out_sources(entries: list[str] | None, training: TrainingArguments) -> list[TextSource]:
    """The sources of `eval_datasets`, or none, with a warning, if nothing evaluates on them."""
    sources = parse_sources(entries or [], "eval_datasets")
    if sources and training.eval_strategy == "no":
        logger.warning("`eval_datasets` is not used: `eval_strategy` is no")
        return []
    return sources


@contextmanager
def sole_run(training: TrainingArguments) -> Iterator[None]:
    """
    Within this context no other run writes to `output_dir`: those ranks that save hold a lock there, which ends with
    their process. Folders that were made for nothing are removed.

    Raises:
        ValueError: on all ranks, if another process holds it.
    """
    folder, error = Path(training.output_dir), None
    with ExitStack() as stack:
        if training.should_save:
            try:
                stack.enter_context(sole_writer(folder / ".lock", folder))
            except (ValueError, OSError) as refused:
                error = refused
        for refused in gather_object([error]):
            if refused is not None:
                raise refused
        try:
            yield
        except KeyboardInterrupt:
            last = get_last_checkpoint(training.output_dir) if folder.is_dir() else None
            left = f"the same command goes on from {last}" if last else "no checkpoint was there yet"
            raise KeyboardInterrupt(left) from None


def open_run(training: TrainingArguments, given: dict[str, Any]) -> str | None:
    """
    Look at `output_dir`, before anything else is done, and write nothing.

    A run that was cut off goes on from its last checkpoint when the same command is given again, with the same values.
    `resume_from_checkpoint` goes on from any checkpoint, whatever the values.

    Args:
        training (`TrainingArguments`): Where to save, and what to resume from.
        given (`dict`): Arguments that differ from their defaults, of [`parse_recipe`].

    Returns:
        `str`, *optional*: The checkpoint to go on from.

    Raises:
        ValueError: if the folder holds a model or a run with other arguments, or there is no such checkpoint.
    """
    folder = Path(training.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    checkpoint, asked = last, training.resume_from_checkpoint
    if asked is not None and str(asked).lower() != "false":
        checkpoint = last if str(asked).lower() == "true" else str(asked)
        if checkpoint is None or not Path(checkpoint).is_dir():
            raise ValueError(
                f"`resume_from_checkpoint` is {asked}, and there is no checkpoint: give the folder of one, or leave "
                "it out"
            )
    elif (folder / TRAINER_STATE_NAME).exists() or (
        (folder / CONFIG_NAME).exists() and not (folder / RECIPE_NAME).exists()
    ):
        raise ValueError(
            f"`output_dir` {folder} holds a model already: name another folder, or go on from one of its checkpoints "
            "with `resume_from_checkpoint`"
        )
    elif last is not None:
        _check_same_run(folder, given)
    return checkpoint


def is_finished(training: TrainingArguments, given: dict[str, Any]) -> bool:
    """
    Whether `output_dir` holds this run, finished.

    Raises:
        ValueError: if it holds a finished run with other arguments.
    """
    folder = Path(training.output_dir)
    if not (folder / TRAINER_STATE_NAME).exists():
        return False
    _check_same_run(folder, given)
    return True


def _check_same_run(folder: Path, given: dict[str, Any]):
    if not (folder / RECIPE_NAME).exists():
        return
    try:
        before = parse_yaml((folder / RECIPE_NAME).read_text(encoding="utf-8")) or {}
        if not isinstance(before, dict):
            raise ValueError("it is no mapping")
    except ValueError as error:
        raise ValueError(f"{folder / RECIPE_NAME} cannot be read ({error}): name another `output_dir`") from error
    now = _plain(given)
    for name in sorted(before.keys() | now.keys()):
        if name not in _MAY_DIFFER and before.get(name) != now.get(name):
            raise ValueError(
                f"`output_dir` {folder} holds a run with `{name}` {before.get(name, 'by default')}, and here it is "
                f"{now.get(name, 'by default')}: give the same to go on, name another folder, or go on with other "
                "values with `resume_from_checkpoint`"
            )


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """As YAML has it: with mappings that a command line gives as text, and paths that hold wherever it is read."""

    def plain(value):
        if isinstance(value, list):
            return [plain(entry) for entry in value]
        return parse_yaml(value) if isinstance(value, str) and value.lstrip().startswith("{") else value

    def placed(value):
        if isinstance(value, list):
            return [placed(entry) for entry in value]
        return {**value, "path": absolute(value["path"])} if isinstance(value, dict) else absolute(value)

    kept = {name: plain(value) for name, value in given.items() if name not in _NOT_RECORDED}
    kept |= {name: placed(kept[name]) for name in _PATHS & kept.keys()}
    return json.loads(json.dumps(kept, default=str))  # enumerations become their text


def print_stopped(command: str, training: TrainingArguments):
    """Say that the signal to stop has ended the run, and how it goes on."""
    way = (
        "and with `save_only_model` it cannot go on"
        if training.save_only_model
        else "the same command goes on from here"
    )
    print(f"mohge {command}: stopped, {way}: {get_last_checkpoint(training.output_dir)}", file=sys.stderr)


def print_written(training: TrainingArguments, *commands: str):
    """Say what is there now, and which commands may come next."""
    if training.should_save:
        print(f"written: {training.output_dir}")
        print(*(f"next: {command}" for command in commands), sep="\n", flush=True)


class _RecipeCallback(TrainerCallback):
    """Writes the recipe once everything that may be refused has been looked at."""

    def __init__(self, given: dict[str, Any]):
        self._given = given

    def on_train_begin(self, args, state, control, **kwargs):
        if args.should_save:
            text = yaml.safe_dump(_plain(self._given), sort_keys=False, allow_unicode=True)
            with writing(args.output_dir):
                write_file(Path(args.output_dir) / RECIPE_NAME, text)


def train_and_save(trainer: MoHGETrainer, given: dict[str, Any], checkpoint: str | None) -> bool:
    """
    Train, and save the model, the trainer's `processing_class` and at last the record of the run in `output_dir`.

    Args:
        trainer ([`MoHGETrainer`]): The trainer.
        given (`dict`): Arguments that differ from their defaults, for `recipe.yaml`.
        checkpoint (`str`, *optional*): Checkpoint to go on from, of [`open_run`].

    Returns:
        `bool`: Whether the run is complete; it is not if a signal to stop came, and can then go on.
    """
    if not trainer.load_finished(checkpoint):
        stop = StopSignalCallback()
        for callback in (stop, _RecipeCallback(given), LogLineCallback(trainer)):
            trainer.add_callback(callback)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            stop.release()
        if stop.stopped:
            return False
    with writing(trainer.args.output_dir):
        trainer.save_model()
        trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    return True
