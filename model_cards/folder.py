"""
The folder of a checkpoint, which may come from anybody: what of it is read, copied and pushed. Every command looks at
a folder here before something else opens it. Only plain files inside it count, no code in it is run, and weights are
safetensors.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer*.json", "tokenizer*.txt", "vocab*.json", "vocab*.txt", "vocab.bpe", "merges.txt")
TOKENIZER_FILES += (
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "*.model",
    "*.model.v*",
    "*.tiktoken",
)
"""What a tokenizer may be made of."""
_TERMS = tuple(f"{name}{end}" for name in ("LICENSE", "NOTICE") for end in ("", "*[A-Z0-9]", "*.txt", "*.md"))
SIDE_FILES = (*TOKENIZER_FILES, "chat_template.json", "chat_template*.jinja", "additional_chat_templates/*.jinja")
SIDE_FILES += ("*processor_config.json", "generation_config.json", *_TERMS)
"""What belongs to a model beside its config and weights: data, never code."""
RECORDS = ("recipe.yaml", "conversion_recipe.yaml", "conversion_report.json", "evaluation.json")
"""Files that say how a model was made and what was measured of it."""
PICTURE = "widths.svg"
"""File of a picture in the card; it is drawn anew with every card, never copied."""
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

_CONFIGS = ("*config.json", "special_tokens_map.json", "added_tokens.json")
_READ = (*_CONFIGS, *SIDE_FILES, *RECORDS, "*.safetensors", INDEX, "trainer_state.json", "traffic.json", "README.md")
_DEPTH = 64


def read_json(file: Path) -> dict:
    """
    The object in a JSON file.

    Raises:
        ValueError: if it is something else.
        OSError: if it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        level = [content]
        for _ in range(_DEPTH):
            level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)]
            level = [inner for inner in level if isinstance(inner, dict | list)]
        if level:
            raise RecursionError(f"it is nested more than {_DEPTH} deep")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON that can be read ({error}): mend it, or fetch it again") from error
    return content


def check_file(folder: Path, name: str) -> Path:
    """
    The path of the file `name` of a folder, which must be a plain file inside it. A link may lead to the `blobs` of
    the same repository in the Hub's cache, whose folders are made of such links.

    Raises:
        ValueError: if it is missing or elsewhere.
    """
    file = folder / name
    if not name.isprintable() or PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\\" in name:
        raise ValueError(f"{str(file)!r} is no name of a file inside {folder}: fetch the checkpoint again")
    try:
        home, place = folder.resolve(), file.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ValueError(f"{file} cannot be followed ({error}): put the file itself there") from error
    in_cache = home.parent.name == "snapshots" and place.parent == home.parent.parent / "blobs"
    if not (place.is_relative_to(home) or in_cache):
        raise ValueError(f"{file} leads out of the folder, to {place}: put the file itself there")
    if not place.is_file():
        raise ValueError(f"{file} is missing, or no plain file: fetch it again")
    return file


def matching_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    """
    Names of the files of a folder that match one of the patterns.

    Raises:
        ValueError: if one of them is elsewhere, as in [`check_file`].
    """
    found = (file for pattern in patterns for file in sorted(folder.glob(pattern)) if not file.is_dir())
    names = list(dict.fromkeys(file.relative_to(folder).as_posix() for file in found))
    for name in names:
        check_file(folder, name)
    return names


def copy_side_files(folder: Path, target: Path):
    """Copy what belongs to a model beside its config and weights."""
    for name in matching_files(folder, SIDE_FILES):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def check_folder(folder: Path):
    """
    Check all that a command may read of a folder, except for what is in its weights.

    Raises:
        ValueError: if a file is elsewhere or cannot be read, or asks for code to be run.
    """
    matching_files(folder, _READ)
    if (folder / INDEX).exists():
        read_index(folder)
    if (folder / ADAPTER_CONFIG).exists():
        with open_weights(folder, ADAPTER):  # PEFT would take a pickle instead
            pass
    for name in matching_files(folder, _CONFIGS):
        content = read_json(folder / name)
        code = {} if name == "config.json" else content.get("auto_map")  # that of a model is the package's own
        if code:
            code = code.values() if isinstance(code, dict) else code if isinstance(code, list) else [code]
            raise ValueError(
                f"{folder / name} asks for code, {', '.join(map(str, code))}, which is not run: save it as a class of "
                f"transformers, or take `auto_map` out of {name} if such a class does"
            )
        for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if "/" in str(content.get(key)):
                raise ValueError(f"{folder / name} asks for code, `{key}` {content[key]}: take `{key}` out of it")


def read_index(folder: Path) -> dict[str, str]:
    """
    The file of each tensor, as the index of a folder's shards has it.

    Raises:
        ValueError: if it is no such index, or names something else than shards beside it.
    """
    files = read_json(check_file(folder, INDEX)).get("weight_map")
    if not (isinstance(files, dict) and files and all(isinstance(file, str) for file in files.values())):
        raise ValueError(
            f"{folder / INDEX} is not an index of safetensors shards, its `weight_map` does not name files: fetch it "
            "again"
        )
    for name in sorted(set(files.values())):
        if "/" in name or not name.isprintable() or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {name!r}, which is no shard beside it: fetch it again")
    return files


def weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
    """
    The weight files of a folder, and the file of each tensor as their index has it, None without an index.

    Raises:
        ValueError: if there are none in safetensors, one is missing or elsewhere, or their index is none.
    """
    if (folder / SINGLE).is_file():
        check_file(folder, SINGLE)
        return [SINGLE], None
    if not (folder / INDEX).is_file():
        reason = f"shards but no {INDEX}" if any(folder.glob("*.safetensors")) else "no safetensors weights"
        raise ValueError(
            f"{folder} has {reason}: give the folder of a complete checkpoint; one of .bin files has to be loaded and "
            "saved again with `save_pretrained`"
        )
    files = read_index(folder)
    names = sorted(set(files.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder} lacks the shards {', '.join(missing)}: fetch them")
    for name in names:
        check_file(folder, name)
    return names, files


def open_weights(folder: Path, name: str) -> safe_open:
    """
    A weight file of a folder, open.

    Raises:
        ValueError: if it is no complete safetensors file.
    """
    try:
        return safe_open(check_file(folder, name), "pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / name} is damaged or cut off ({error}): fetch it again") from error
