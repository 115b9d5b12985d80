"""What a folder records of its model, without the places of the machine that made it."""

import json
import re
from pathlib import Path, PurePath

import yaml

from mohge import MoHGEConfig
from mohge.info import Routing

from .names import is_hub_id, parse_yaml


_SECRETS = ("hub_token",)
_FOLDERS = ("output", "output_dir", "logging_dir")
_ABSOLUTE = re.compile(r"/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\")
_PLACE = re.compile(
    r"(?<![\w/\\:.<~@?-])(?:file:/{1,3})?"  # not inside of a URL, a tag, a pattern or a relative path
    r"(?:(?:~[\w.-]*|\.{1,2})/|[A-Za-z]:[/\\]+|\\\\(?=[\w.-]+\\)|//?(?=[\w.@+-][\w.@+ -]*/))"
    r"(?:[\w.@+-][\w.@+ -]*[/\\]+)*(?=[\w.@+-])"
)
"""What goes before the last part of a path of some machine, which may stand in a longer text."""
_OWN_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Fields that transformers adds, which mean nothing elsewhere."""


def read_record(folder: Path, name: str) -> dict:
    """
    Read a record. Of the paths in it only the last parts are left, and no token.

    Returns:
        `dict`: Its content, empty if there is no such file.

    Raises:
        ValueError: if it cannot be read.
    """
    file = folder / name
    if not file.exists():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = parse_yaml(text) if file.suffix == ".yaml" else json.loads(text)
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}): mend or remove it") from error
    return _portable(content)


def recorded_routings(folder: Path, config: MoHGEConfig) -> list[Routing]:
    """
    Where the tokens of a text went, as `mohge eval`, a training run and `mohge convert` record it in a model's folder.

    Raises:
        ValueError: if a record cannot be read, or does not belong to the model.
    """
    found = []
    readers = {"evaluation.json": _evaluated, "traffic.json": _trained, "conversion_report.json": _converted}
    for name, read in readers.items() if config.sparse_layers else ():
        file = folder / name
        try:
            record = read_record(folder, name)
            routing = read(file, record, config) if record else None
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} does not have the form that mohge writes ({type(error).__name__}: {error}): mend or remove it"
            ) from error
        if routing is not None:
            found.append(routing)
    return found


def _evaluated(file: Path, evaluation: dict, config: MoHGEConfig) -> Routing | None:
    router = evaluation.get("router", {})
    if router.get("tokens_per_expert") is None:  # once it was not recorded
        return None
    _check_counts(file, router["tokens_per_expert"], router["tokens"], config)
    return Routing(name_tokens(router["texts"], router["tokens"]), router["tokens"], router["tokens_per_expert"])


def _trained(file: Path, record: dict, config: MoHGEConfig) -> Routing:
    from mohge.training import RouterTraffic  # which imports this package

    traffic = RouterTraffic.load(file)
    traffic.check(config)
    tokens = sum(traffic.tokens)
    counts = [traffic.layer_counts(layer).sum(0).long().tolist() for layer in range(len(config.sparse_layers))]
    return Routing(f"the last passes of training, {tokens:,} tokens", tokens, counts)


def _converted(file: Path, report: dict, config: MoHGEConfig) -> Routing | None:
    counts = [layer["tokens_per_expert"] for layer in report.get("layers", []) if layer.get("tokens_per_expert")]
    if not counts:  # once it was not recorded
        return None
    _check_counts(file, counts, report["check"]["tokens"], config)
    return Routing(checked_text(report), report["check"]["tokens"], counts)


def name_tokens(texts: list[str], tokens: int) -> str:
    """So many tokens of some texts, in words."""
    return f"{' and '.join(texts)}, {tokens:,} tokens"


def checked_text(report: dict) -> str:
    """What a conversion was checked on."""
    tokens = report["check"]["tokens"]
    if report["check"]["text"] == "random":
        return f"{tokens:,} random tokens"
    return name_tokens([report["calibration"]["dataset"]], tokens) + " held out"


def _check_counts(file: Path, counts: list[list[int]], tokens: int, config: MoHGEConfig):
    fits = [*map(len, counts)] == [layer.num_experts for layer in config.sparse_layers]
    if not (fits and type(tokens) is int and all(type(n) is int and 0 <= n <= tokens for row in counts for n in row)):
        raise ValueError(
            f"{file} says of other experts than the model's how many tokens came to each, or is damaged: remove it"
        )


def write_record(file: Path, content: dict):
    """Write what [`read_record`] read."""
    is_yaml = file.suffix == ".yaml"
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True) if is_yaml else json.dumps(content, indent=2)
    file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def without_places(value):
    """A value of a config file without paths of this machine, of which the last parts stay. Chat templates are part of
    the model, and stay as they are."""
    if isinstance(value, dict):
        return {
            _PLACE.sub("", key): entry if key == "chat_template" else without_places(entry)
            for key, entry in value.items()
            if key not in _OWN_PLACES or is_hub_id(entry)
        }
    if isinstance(value, list):
        return [without_places(entry) for entry in value]
    return _PLACE.sub("", value) if isinstance(value, str) else value


def _portable(value):
    if isinstance(value, dict):
        kept = {_PLACE.sub("", str(key)): _portable(entry) for key, entry in value.items() if key not in _SECRETS}
        return kept | {key: PurePath(kept[key]).name for key in _FOLDERS if isinstance(kept.get(key), str)}
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    if not isinstance(value, str):
        return value
    text = _PLACE.sub("", value)
    return PurePath(text).name if _is_path(value) else text


def _is_path(text: str) -> bool:
    if _ABSOLUTE.match(text):
        return True
    if text.startswith("file:"):
        return True
    return "/" in text and not is_hub_id(text) and "://" not in text and len(text.split()) == 1
