"""Writing a model so that there never is half of one."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mohge.model_cards.folder import INDEX
from mohge.model_cards.writing import LOCK, hold, remove_contents, remove_folder, write_file


class Staging:
    """
    The folder in which an output grows, `.OUT.partial` beside it, until it is complete. What else a run has to
    remember is in `.OUT.scratch`, so that the output is there at once when its folder is given its name.

    Args:
        output (`Path`): Folder to create.
        shards (`int`): Number of shards that the weights will have, counted from 1.
        identity (`str`): Text that tells this conversion from others. Work left by an interrupted run is taken up if
            it is the same.

    Raises:
        ValueError: if `output` exists, another process is writing there, work on another conversion was left, or one
            of the two folders is somebody else's.
    """

    def __init__(self, output: Path, shards: int, identity: str):
        self.output, self.shards = output, shards
        self.folder = output.parent / f".{output.name}.partial"
        self.scratch = output.parent / f".{output.name}.scratch"
        self._prepared = self.scratch / "prepared"
        self._refuse_foreign()
        self.scratch.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.scratch / LOCK, output)
        try:
            self._claim(identity)
        except ValueError:
            self.close()
            raise

    def _claim(self, identity: str):
        if self.output.exists():
            raise ValueError(f"{self.output} exists: name another folder, or remove it first")
        marker = self.scratch / "identity"
        if not self.folder.exists():
            remove_contents(self.scratch)
            write_file(marker, identity)  # before the folder, which it tells from others'
            self.folder.mkdir()
        elif marker.read_text(encoding="utf-8") != identity:
            raise ValueError(
                f"{self.folder} holds an unfinished conversion of another source, recipe or version: finish that one "
                f"with its own command, or remove the folder"
            )

    def _refuse_foreign(self):
        marker, folder = self.scratch / "identity", self.folder
        known = not folder.is_symlink() and (marker.is_file() or not folder.exists())
        for path, ours in ((self.scratch, _is_ours(self.scratch)), (folder, known)):
            if not ours:
                raise ValueError(
                    f"{path}, which a conversion to {self.output} needs, is there and of something else: move it "
                    "away, or name another output"
                )

    def close(self):
        """Let other processes write here."""
        if not self.folder.exists():
            remove_folder(self.scratch)
        self._lock.release()

    def has_shard(self, number: int) -> bool:
        """Whether shard `number` has been finished."""
        return self._path(number).exists()

    def write_shard(self, number: int, tensors: dict[str, torch.Tensor]):
        """Write a shard. Until `seal_shard` it does not count."""
        try:
            save_file(tensors, self._draft(number), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{self._path(number)} cannot be written ({error})") from error

    def seal_shard(self, number: int):
        """Bring a shard to the disk and give it its name."""
        with self._draft(number).open("rb") as written:
            os.fsync(written.fileno())
        os.replace(self._draft(number), self._path(number))

    def _path(self, number: int) -> Path:
        return self.folder / f"model-{number:05}-of-{self.shards:05}.safetensors"

    def _draft(self, number: int) -> Path:
        return self.scratch / self._path(number).name

    def index(self) -> int:
        """Write the index of all shards; bytes of their tensors."""
        weight_map, size = {}, 0
        for number in range(1, self.shards + 1):
            with safe_open(self._path(number), "pt") as shard:
                names = shard.keys()
                for name in names:
                    weight_map[name] = self._path(number).name
                    size += shard.get_tensor(name).nbytes
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        write_file(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        return size

    def prepare(self) -> Path:
        """An empty folder for what lies beside the weights."""
        shutil.rmtree(self._prepared, ignore_errors=True)
        self._prepared.mkdir()
        return self._prepared

    def finish(self):
        """Give the folder what was prepared, last the config, without which nothing loads, and at once its name."""
        files = filter(Path.is_file, self._prepared.rglob("*"))
        for path in sorted(files, key=lambda path: path.name == "config.json"):
            target = self.folder / path.relative_to(self._prepared)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
        self.folder.rename(self.output)


def clear_left(output: Path):
    """Remove what a run that was killed at its very end left beside its complete output."""
    scratch = output.parent / f".{output.name}.scratch"
    if scratch.is_dir() and _is_ours(scratch):
        with suppress(OSError, Timeout), FileLock(scratch / LOCK, timeout=0):
            remove_folder(scratch)


def _is_ours(scratch: Path) -> bool:
    """Whether there is nothing of that name, or what a run has made."""
    lock = scratch / LOCK
    if scratch.is_symlink() or lock.is_symlink():
        return False
    return lock.is_file() or not scratch.exists() or (scratch.is_dir() and not any(scratch.iterdir()))
