"""Packages whose names are imported when they are asked for: torch and transformers take seconds to import, and who
wants a command's help, or another part, should not wait for them."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy_names(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """
    `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package (`str`): Name of the package.
        modules (`Mapping[str, str]`): Names that it offers -> the module that has each, relative to the package.
    """

    def __getattr__(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{modules[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        # Its modules too, but not what it has imported from elsewhere.
        own = {
            name
            for name, value in vars(sys.modules[package]).items()
            if name.startswith("__") or getattr(value, "__name__", "").startswith(f"{package}.")
        }
        return sorted({*own, *modules})

    return __getattr__, __dir__


__all__ = ["lazy_names"]
