"""Configs by what a command is given."""

from pathlib import Path

from mohge import MoHGEConfig

from .folder import check_folder, read_json
from .names import check_there, shipped_file


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
    else:
        check_there(source)
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
