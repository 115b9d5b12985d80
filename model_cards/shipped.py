"""The recipes that come with the package: folders beside this file, each with a card, a config and a recipe."""

from pathlib import Path

from mohge import MoHGEConfig

from .folder import check_folder, read_json
from .records import is_hub_id


_FOLDER = Path(__file__).parent


def shipped_recipes() -> list[str]:
    """Names of the recipes."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/recipe.yaml"))


def shipped_file(recipe: str, name: str) -> Path | None:
    """The file `name` of the shipped recipe `recipe`; None if there is no such recipe."""
    return _FOLDER / recipe / name if recipe in shipped_recipes() else None


def load_config(source: str) -> MoHGEConfig:
    """
    Read a MoHGE config from a JSON file, a model folder, a Hub id or a shipped recipe. Of a folder, all that a command
    may read beside its weights is looked at.

    Raises:
        ValueError: if it is no config of a MoHGE model, or a file of the folder leads out of it or asks for code.
        OSError: if there is nothing to read.
    """
    path = Path(source)
    if not path.exists():
        path = shipped_file(source, "config.json") or path
    if path.is_file():
        values = read_json(path)
    elif path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{source} has no config.json: give the folder of a saved model")
    elif not path.exists() and not is_hub_id(source):
        raise FileNotFoundError(
            f"{source} does not exist: give a config.json, the folder of a saved model, or one of the recipes "
            f"{', '.join(shipped_recipes())}"
        )
    else:
        if path.is_dir():
            check_folder(path)
        values, _ = MoHGEConfig.get_config_dict(source)
    model_type = values.get("model_type")
    if model_type != "mohge":
        raise ValueError(f'{source} has `model_type` "{model_type}", not "mohge": give the config of a MoHGE model')
    try:
        return MoHGEConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source} is no valid config: {error}") from error
