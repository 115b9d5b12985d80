"""Names that a command is given: of files here, of the Hub, of what comes with the package. Imports little, so that
help and mistakes are answered at once."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


DATA_FILES = (".txt", ".json", ".jsonl", ".csv", ".parquet", ".yaml")
STANDARD_LIBRARY = "standard-library"
"""Name, among the sources of text, of the one that is always there: Python's own."""
A_TOKENIZER = "the folder of a tokenizer, or a Hub id such as org/name"
_FOLDER = Path(__file__).parent


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package, folders beside this file."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/recipe.yaml"))


def shipped_file(recipe: str, name: str) -> Path | None:
    """The file `name` of the shipped recipe `recipe`; None if there is no such recipe."""
    return _FOLDER / recipe / name if recipe in shipped_recipes() else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """What a message about an unknown word ends with: a word like it among those that are known, or nothing."""
    near = get_close_matches(word, [*known], 1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def did_you_mean_path(name: str) -> str:
    """[`did_you_mean`] of the name of something that is not there: what is, under a name like it, here or shipped."""
    path = Path()
    try:
        for part in Path(name).parts:
            near = [part] if (path / part).exists() else get_close_matches(part, os.listdir(path), 1, cutoff=0.7)
            path /= near[0]
    except (OSError, ValueError, IndexError):  # there is no such folder, or nothing like it in it
        return did_you_mean(name, shipped_recipes())
    return f"; did you mean {path}?" if path.parts else ""


def may_be_on_hub(name: str) -> bool:
    """
    Whether to ask the Hub for `name`, which takes long where there is no network: not for what is more probably a path
    with a mistake in it, because its folder or something of a like name is here.
    """
    return is_hub_id(name) and (_is_in_cache(name) or not (Path(name).parent.is_dir() or did_you_mean_path(name)))


def check_there(name: str, wanted: str | None = None):
    """
    Look, before anything that takes long, whether there can be something under the name that a command is given.

    Args:
        name (`str`): The name.
        wanted (`str`, *optional*): What to give; by default a model, which a recipe is too.

    Raises:
        FileNotFoundError: if there is nothing.
    """
    recipes = [] if wanted else shipped_recipes()
    if not Path(name).exists() and name not in recipes and not may_be_on_hub(name):
        wanted = wanted or (
            f"a config.json, the folder of a saved model, a Hub id or one of the recipes {', '.join(recipes)}"
        )
        raise FileNotFoundError(not_found(name, wanted))


def not_found(name: str, wanted: str) -> str:
    """What to say of a name that is neither here nor, by [`may_be_on_hub`], of the Hub."""
    hub = f" (a model or data set {name} of the Hub: run `hf download {name}` first)" if is_hub_id(name) else ""
    return f"{name} does not exist: give {wanted}{hub}{did_you_mean_path(name)}"


def _is_in_cache(name: str) -> bool:
    from huggingface_hub import constants

    folder = name.replace("/", "--")
    return any((Path(constants.HF_HUB_CACHE) / f"{kind}--{folder}").exists() for kind in ("models", "datasets"))


def is_hub_id(text: object) -> bool:
    """Whether `text` has the form `namespace/name` of the Hub, and is nothing on this machine."""
    if not isinstance(text, str) or not text.isprintable() or text.count("/") != 1 or text.endswith(DATA_FILES):
        return False
    if Path(text).exists():
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def parse_yaml(text: str) -> Any:
    """
    What YAML text says.

    Raises:
        ValueError: if it is none, or has too many levels.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it has too many levels") from error
