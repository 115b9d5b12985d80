"""The command `mohge chat`."""

from .generate import run_chat as run


__all__ = ["run"]
