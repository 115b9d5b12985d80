"""What of a model folder goes to the Hub."""

import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import ModelCard

from mohge.modeling_mohge import AUTO_MAP, save_code

from .card import draw_widths, keep_card, make_card
from .folder import INDEX, PICTURE, RECORDS, SIDE_FILES, copy_side_files, matching_files, read_json, weight_files
from .records import read_record, without_places, write_record
from .shipped import load_config


_STALE = (
    *("*.safetensors", INDEX, "pytorch_model*", "adapter_*", "training_args.bin", "*_mohge.py", *RECORDS, PICTURE),
    *(pattern for pattern in SIDE_FILES if not pattern.startswith(("LICENSE", "NOTICE"))),
)
"""What a push removes from the repository unless it brings it: what `from_pretrained` would read, and records."""


def is_stale(path: str) -> bool:
    """Whether a file that lies in the repository, and is not pushed, would be read as part of the model."""
    return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in _STALE)


def stage(folder: Path, target: Path, name: str, **about) -> ModelCard:
    """
    Put into `target` what is pushed of the model in `folder`: config, weights (as links), the model's code as this
    version of mohge has it, tokenizer, generation config, license, records, and the card with its picture. Nothing
    else is pushed, so no checkpoint, optimizer or log.

    Args:
        folder (`Path`): Folder of a saved MoHGE model.
        target (`Path`): An empty folder.
        name (`str`): Name of the model on the Hub.
        about: What else to tell [`make_card`].

    Returns:
        `ModelCard`: The card.

    Raises:
        ValueError: if `folder` holds no complete MoHGE model in safetensors.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the folder of a saved model")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter: merge it into its model first, and push that")
    config = load_config(str(folder))
    if config.architectures and "MoHGEForCausalLM" not in config.architectures:
        raise ValueError(f"{folder} holds a {config.architectures[0]}: push a MoHGEForCausalLM")
    weights, indexed = weight_files(folder)
    for file in [*weights, *([] if indexed is None else [INDEX])]:
        os.symlink((folder / file).resolve(), target / file)
    copy_side_files(folder, target)
    for record in RECORDS:
        if content := read_record(folder, record):
            write_record(target / record, content)
    config.architectures, config.auto_map = ["MoHGEForCausalLM"], dict(AUTO_MAP)
    config.save_pretrained(target)
    save_code(target)
    for file in matching_files(target, ("*config.json", "special_tokens_map.json")):
        content = without_places(read_json(target / file))
        (target / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        made = make_card(folder, name, config, **about)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(
            f"a record in {folder} does not have the form that mohge writes ({type(error).__name__}: {error}): mend "
            "or remove it"
        ) from error
    card = keep_card(folder / "README.md", made, about.get("license"))
    card.save(target / "README.md")
    draw_widths(config, target)
    _refuse_places(folder, target)
    return card


def _refuse_places(folder: Path, target: Path):
    """What [`without_places`] has not been let change: texts, and the tokenizer itself, whose vocabulary may well have
    pieces of paths."""
    own = "|".join(re.escape(str(place)) for place in (folder.absolute(), folder.resolve(), Path.home()) if place.name)
    pattern = re.compile(rf"(?<![\w./-])(?:{own})(?=/[\w.]|\W*$)")
    for name in pushed_files(target):
        if name.endswith((".safetensors", ".py")):
            continue
        if name.endswith(".json"):
            texts = _strings(read_json(target / name))
        else:
            texts = (target / name).read_text(encoding="utf-8", errors="replace").splitlines()
        if place := next(filter(None, map(pattern.search, texts)), None):
            raise ValueError(
                f"{folder / name} would be pushed and names {place[0]} of this machine: take that out of it"
            )


def _strings(value) -> Iterator[str]:
    """Every text in a value of JSON; the keys, which are the vocabulary, are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def pushed_files(target: Path) -> list[str]:
    """Paths of the files that [`stage`] put into `target`."""
    paths = (path.relative_to(target) for path in sorted(target.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if not path.parts[0].startswith(".")]
