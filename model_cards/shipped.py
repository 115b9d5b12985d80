"""The recipes that come with the package: folders beside this file, each with a card, a config and a recipe."""

from pathlib import Path


_FOLDER = Path(__file__).parent


def shipped_recipes() -> list[str]:
    """Names of the recipes."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/recipe.yaml"))


def shipped_file(recipe: str, name: str) -> Path | None:
    """The file `name` of the shipped recipe `recipe`; None if there is no such recipe."""
    return _FOLDER / recipe / name if recipe in shipped_recipes() else None
