"""The flags of `mohge train` and `mohge finetune`: ours, and those of `TrainingArguments`, which are read from its
source. Importing it takes seconds, and help and misspelt flags are answered at once."""

import argparse
import ast
import re
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mohge.model_cards.names import (
    A_TOKENIZER,
    STANDARD_LIBRARY,
    check_there,
    did_you_mean,
    did_you_mean_path,
    parse_yaml,
    shipped_file,
)
from mohge.training.data.sources import parse_sources


@dataclass
class PretrainArguments:
    """What to train, on which text, and spread how."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Config.json, model folder, Hub id or shipped recipe. A config without weights starts from random "
            "weights, anything else goes on from its weights."
        },
    )
    datasets: list[str] = field(
        default_factory=lambda: [STANDARD_LIBRARY],
        metadata={
            "help": "Text to train on: Hub ids, folders, files (txt, jsonl, json, csv, parquet) or standard-library, "
            "Python's own sources. Several make a mixture. An entry may be a mapping with options, such as "
            "'{path: org/name, name: configuration, split: train, column: text, weight: 0.3}'; weights are shares of "
            "the tokens."
        },
    )
    eval_datasets: list[str] | None = field(
        default=None, metadata={"help": "Text to evaluate on, in the same form; give eval_strategy too."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read text as it is needed, instead of tokenizing it all first. Needs max_steps."},
    )
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Sequences of a stream among which the next one is drawn (streaming)."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the tokenizer. By default the model's; for a config, one of the text."},
    )
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "Of the weights, float32 or bfloat16. By default the config's, or float32."}
    )
    sequence_length: int = field(
        default=256,
        metadata={"help": "Tokens of a training sequence. Documents are packed into it and do not see each other."},
    )
    ep_size: int = field(
        default=1, metadata={"help": "Ranks that hold different experts; divides fsdp_size * tp_size."}
    )
    fsdp_size: int = field(default=1, metadata={"help": "Ranks that hold different shards of the dense weights."})
    tp_size: int = field(default=1, metadata={"help": "Ranks that share a batch and split each dense weight."})
    dp_replicate_size: int = field(default=1, metadata={"help": "Copies of the whole model."})


@dataclass
class FinetuneArguments:
    """What to fine-tune, on what, and how."""

    model: str | None = field(
        default=None, metadata={"help": "Model folder or Hub id; to merge without training, an adapter's folder."}
    )
    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Data to train on: Hub ids, folders or files (txt, jsonl, json, csv, parquet), of text or of "
            "conversations, which have a column messages, or prompt and completion. An entry may be a mapping with "
            "options, such as '{path: org/name, name: configuration, split: train, column: text, weight: 0.3}'."
        },
    )
    eval_datasets: list[str] | None = field(
        default=None, metadata={"help": "Data to evaluate on, in the same form; give eval_strategy too."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the tokenizer. By default the model's."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "Jinja file with the chat template, saved with the tokenizer. By default the tokenizer's."},
    )
    assistant_only_loss: bool = field(
        default=True,
        metadata={
            "help": "Train on the assistant's turns of messages only; the chat template must tell them by "
            "{%% generation %%}. Of prompt and completion, completions are trained on."
        },
    )
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None, metadata={"help": "Of the weights, float32 or bfloat16. By default the model's."}
    )
    sequence_length: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a sequence: documents are packed into it, conversations are cut off there, and left "
            "out if no answer begins before. By default 1024, or the model's context if that is shorter."
        },
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train adapters (LoRA) of this rank instead of all weights. On experts, groups get ranks "
            "proportional to their width, with no more parameters than at this rank everywhere."
        },
    )
    lora_targets: Literal["attention", "experts", "all"] = field(
        default="all",
        metadata={"help": "Where adapters are: all also has the shared expert and dense layers. Never on routers."},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank. By default 2 lora_rank."}
    )
    distill: str | None = field(
        default=None,
        metadata={
            "help": "Model folder or Hub id whose logits are the targets, instead of the text's next tokens: the "
            "source that this model was made of, say."
        },
    )
    merge: str | None = field(
        default=None,
        metadata={"help": "Folder to create for a plain model with the adapter merged in, checked against both."},
    )
    quantize: Literal["int8", "float8"] | None = field(
        default=None,
        metadata={
            "help": "Quantise the experts (torchao), to train adapters on the attention beside them, or to save."
        },
    )
    quantize_min_width: int = field(
        default=0, metadata={"help": "Groups of experts narrower than this are not quantised."}
    )


_MOST_USED = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "bf16", "activation_checkpointing"),
    *("logging_steps", "eval_strategy", "eval_steps", "save_steps", "save_total_limit", "report_to", "seed"),
    "resume_from_checkpoint",
)

DEFAULTS = {"logging_steps": 10}
"""Defaults of ours, where those of `TrainingArguments` leave a short run without a word."""


class _Flag(NamedTuple):
    """A flag for its help."""

    name: str
    group: str
    type: str
    default: Any
    help: str


def _own_flags(arguments: type) -> list[_Flag]:
    """The flags of one of the classes above."""
    return [
        _Flag(
            entry.name,
            "flags of mohge",
            getattr(entry.type, "__name__", str(entry.type)) if isinstance(entry.type, type) else str(entry.type),
            entry.default if entry.default_factory is MISSING else " ".join(entry.default_factory()),
            entry.metadata["help"],
        )
        for entry in fields(arguments)
    ]


def _trainer_flags() -> list[_Flag]:
    """The flags of `TrainingArguments`, under the headings of its source."""
    text = (Path(find_spec("transformers").origin).parent / "training_args.py").read_text(encoding="utf-8")
    headings = [(text.count("\n", 0, match.start()) + 1, match[1]) for match in _HEADING.finditer(text)]
    (body,) = (node.body for node in ast.parse(text).body if getattr(node, "name", "") == "TrainingArguments")
    flags = []
    for node in body:
        if not (isinstance(node, ast.AnnAssign) and getattr(getattr(node.value, "func", None), "id", "") == "field"):
            continue
        values = {keyword.arg: keyword.value for keyword in node.value.keywords}
        above = [heading for number, heading in headings if number < node.lineno]
        default = values.get("default")
        flags.append(
            _Flag(
                node.target.id,
                above[-1] if above else "others",
                ast.unparse(node.annotation),
                DEFAULTS.get(node.target.id, default.value if isinstance(default, ast.Constant) else None),
                _help(values["metadata"]),
            )
        )
    return flags


def _help(metadata: ast.Dict) -> str:
    """The help of a field; what its source computes there is left out."""
    (text,) = (value for key, value in zip(metadata.keys, metadata.values, strict=True) if key.value == "help")
    return " ".join(node.value for node in ast.walk(text) if isinstance(node, ast.Constant)).strip()


_HEADING = re.compile(r"^    # --- (.+) ---$", re.MULTILINE)
_VALUES = {"bool": "BOOL", "int": "N", "float": "X", "dict": "MAPPING"}


def add_flags(parser: argparse.ArgumentParser, own: type):
    """Add the flags of a command to the parser of its help: its `own`, then the most used of `TrainingArguments`, then
    the others as transformers has them in groups."""
    parser.usage = "%(prog)s [RECIPE] [--flag value ...]"
    parser.add_argument(
        "recipe", nargs="?", help="YAML file, or name of a shipped recipe, with values of the flags below"
    )
    trainer = {flag.name: flag for flag in _trainer_flags()}
    most_used = [
        trainer.pop(name)._replace(group="most used flags of TrainingArguments")
        for name in _MOST_USED
        if name in trainer
    ]
    groups: dict[str, argparse._ArgumentGroup] = {}
    for flag in [*_own_flags(own), *most_used, *trainer.values()]:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        value = next((value for kind, value in _VALUES.items() if flag.type.startswith(kind)), "VALUE")
        choices = re.search(r"Literal\[([^]]*)\]", flag.type)
        default = "" if flag.default in (None, "") else f" (default: {str(flag.default).replace('%', '%%')})"
        groups[flag.group].add_argument(
            f"--{flag.name}",
            nargs="+" if "list" in flag.type else None,
            choices=re.findall(r"'([^']*)'", choices[1]) if choices else None,
            metavar=None if choices else value,
            help=flag.help + default,
        )


def check_flags(arguments: Iterable[str], known: Iterable[str]):
    """
    Look at the names of the flags in a command line.

    Raises:
        ValueError: if one is not among those `known`.
    """
    known = {*known}
    for argument in arguments:
        name = argument.partition("=")[0]
        plain = name.replace("-", "_").removeprefix("__").removeprefix("no_")
        if name.startswith("--") and " " not in argument and plain and f"--{plain}" not in known:
            raise ValueError(f"unrecognized arguments: {name}{did_you_mean(f'--{plain}', known)}")


RECIPE_NAME = "recipe.yaml"
"""File of a run's folder that holds its arguments, those that differ from their defaults."""


def read_recipe(recipe: str) -> dict[str, Any]:
    """
    The values in a YAML file, or in a shipped recipe.

    Raises:
        ValueError: if there is no such recipe, or it is none.
    """
    path = Path(recipe) if Path(recipe).exists() else shipped_file(recipe, RECIPE_NAME)
    if path is None:
        raise ValueError(
            f"{recipe} is neither a file nor a shipped recipe: give a YAML file{did_you_mean_path(recipe)}"
        )
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{recipe} cannot be read as a YAML recipe ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{recipe} is no recipe: write one `name: value` per line")
    return values


_MODELS = {
    "model": None,
    "tokenizer": A_TOKENIZER,
    "distill": "a model folder, or a Hub id such as org/name",
}
"""Flags that name a model or a part of one -> what to give, as for [`check_there`]."""
_TEXTS = ("datasets", "eval_datasets")


def check_named(arguments: list[str]):
    """
    Look whether what a command line and its recipe name can be there, before anything that takes long.

    Raises:
        ValueError: if there is no such recipe, or an entry of `datasets` is none.
        FileNotFoundError: if there is no such model or text.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*_MODELS, *_TEXTS):
        parser.add_argument(
            f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="+" if name in _TEXTS else None
        )
    try:
        given = vars(parser.parse_known_args(arguments)[0])
    except argparse.ArgumentError:
        return  # a value is missing, which whoever reads all flags says
    if arguments and not arguments[0].startswith("-"):
        given = read_recipe(arguments[0]) | {name: value for name, value in given.items() if value is not None}
    for name, wanted in _MODELS.items():
        if isinstance(given.get(name), str):
            check_there(given[name], wanted)
    for name in _TEXTS:
        entries = given.get(name)
        if isinstance(entries, list) and all(isinstance(entry, str) for entry in entries):
            parse_sources(entries, name)
