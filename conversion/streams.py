"""What layers leave for the next, on the disk."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device


class Stream:
    """
    What is passed between layers, kept in files so that memory does not grow with the number of tokens.

    Args:
        folder (`Path`): Folder for the files.
        kind (`str`): Name of the model whose states these are.
    """

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind

    def _path(self, layer: int, batch: int) -> Path:
        return self.folder / f"{self.kind}-{layer}-{batch}.pt"

    def has(self, layer: int, batch: int) -> bool:
        """Whether something was saved, all of it."""
        return self._path(layer, batch).exists()

    def load(self, layer: int, batch: int) -> Any:
        """What was saved."""
        return torch.load(self._path(layer, batch), weights_only=True)

    def save(self, layer: int, batch: int, value: Any):
        """Keep `value`, tensors in tuples and dicts, for `layer`."""
        draft = self._path(layer, batch).with_suffix(".tmp")
        torch.save(send_to_device(value, "cpu"), draft)
        draft.replace(self._path(layer, batch))

    def drop(self, layer: int):
        """Remove what was saved for `layer`."""
        for path in self.folder.glob(f"{self.kind}-{layer}-*.pt"):
            path.unlink()
