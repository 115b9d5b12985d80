"""How text is named. Imports little, so that mistakes are answered at once."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from mohge.model_cards.names import STANDARD_LIBRARY, check_there, parse_yaml


@dataclass
class TextSource:
    """
    Where text comes from.

    Args:
        path (`str`):
            Hub id of a data set, a folder, a file (txt, jsonl, json, csv, parquet), or `standard-library`: the Python
            standard library's own text, with the splits `train` and `validation`.
        name (`str`, *optional*): Configuration of the data set, where it has several.
        split (`str`, *optional*, defaults to `"train"`): Split, or part of one such as `train[:1%]`.
        column (`str`, *optional*, defaults to `"text"`):
            Column of the text. A column `input_ids` is taken as it is.
        weight (`float`, *optional*): Share of this source in the tokens of a mixture, relative to the others.
        revision (`str`, *optional*): Revision of a data set on the Hub.
    """

    path: str
    name: str | None = None
    split: str = "train"
    column: str = "text"
    weight: float | None = None
    revision: str | None = None


def parse_sources(entries: list[str], argument: str) -> list[TextSource]:
    """
    Sources as a recipe or a command line gives them.

    Args:
        entries (`list[str]`): Paths, or YAML mappings such as `{path: a.jsonl, weight: 0.3}`.
        argument (`str`): Name of the argument they come from, for messages.

    Raises:
        ValueError: if an entry is neither, or has an unknown or missing key.
        FileNotFoundError: if there can be nothing under a path.
    """
    known = [field.name for field in fields(TextSource)]
    sources = []
    for entry in entries:
        try:
            values = parse_yaml(entry) if entry.lstrip().startswith("{") else {"path": entry}
        except ValueError as error:
            raise ValueError(f"`{argument}` has {entry:.80}, which is no YAML mapping ({error}): mend it") from error
        if unknown := sorted(map(str, values.keys() - set(known))):
            raise ValueError(f"`{argument}` has an entry with the unknown key `{unknown[0]}`: use {', '.join(known)}")
        if not values.get("path"):
            raise ValueError(f"`{argument}` has an entry without `path`: name a Hub id, a folder or a file")
        for name, value in values.items():
            if name == "weight":
                if type(value) not in (int, float) or not 0 < value < math.inf:
                    raise ValueError(f"`{argument}`: `weight` of {values['path']} is {value}: give a positive number")
            elif not isinstance(value, str) or not value:
                raise ValueError(f"`{argument}`: `{name}` of {values['path']} is {value!r}: give text, in quotes")
        try:
            check_text_there(values["path"])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"`{argument}`: {error}") from None
        sources.append(TextSource(**values))
    weighted = [source for source in sources if source.weight is not None]
    if weighted and len(weighted) < len(sources):
        raise ValueError(f"`{argument}` has entries with and without `weight`: give one to each, or to none")
    return sources


def check_text_there(path: str):
    """
    Look whether there can be text under the path of a source.

    Raises:
        FileNotFoundError: if there is none.
    """
    if path != STANDARD_LIBRARY:
        check_there(path, "a file or folder, or a Hub id such as org/name")


def absolute(path: str) -> str:
    """A path that holds wherever it is read, if there is something at `path`; else `path`, which may be a Hub id."""
    return str(Path(path).resolve()) if Path(path).exists() else path
