"""Checkpoints on disk: lazy reading of sharded safetensors, and writing that never leaves half a model."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


INDEX = "model.safetensors.index.json"
SIDE_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
SIDE_FILES += ("chat_template*", "additional_chat_templates/*", "generation_config.json", "LICENSE*", "NOTICE*")
"""What is copied from a source as it is."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def find_source(source: str, revision: str | None) -> tuple[Path, str | None]:
    """
    The folder of `source`, a local folder or a Hub id, and the commit if it came from the Hub.

    Raises:
        ValueError: if there is no such folder, and no such repository on the Hub or in its local cache.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` applies to a source on the Hub, and {source} is a folder: leave it out")
        return path, None
    if path.exists() or source.count("/") > 1:
        raise ValueError(f"{source} is not a folder: give the folder of a checkpoint, or a Hub id such as org/name")
    try:
        path = Path(
            snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json", *SIDE_FILES])
        )
    except (OSError, HFValidationError) as error:
        raise ValueError(f"{source} is neither a folder nor a reachable Hub repository ({error})") from error
    return path, path.name


class Checkpoint:
    """
    The tensors of a folder, read one by one.

    Args:
        folder (`Path`): Folder with `model.safetensors`, or with shards and their index.

    Raises:
        ValueError: if a file is missing, cut off or of a dtype that cannot be converted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._ahead: set[str] = set()
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in self._file_names():
            try:
                with safe_open(folder / file, "pt") as handle:
                    names = handle.keys()
                    for name in names:
                        view = handle.get_slice(name)
                        self.files[name] = file
                        self.shapes[name] = tuple(view.get_shape())
                        if view.get_dtype() not in _DTYPES:
                            raise ValueError(
                                f"{name} in {file} has dtype {view.get_dtype()}: give the checkpoint in float32, "
                                "bfloat16 or float16"
                            )
                        self.dtypes[name] = _DTYPES[view.get_dtype()]
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{folder / file} is damaged or cut off ({error}): fetch it again") from error

    def _file_names(self) -> list[str]:
        index = self.folder / INDEX
        if not index.is_file():
            if (self.folder / "model.safetensors").is_file():
                return ["model.safetensors"]
            reason = f"shards but no {INDEX}" if any(self.folder.glob("*.safetensors")) else "no safetensors weights"
            raise ValueError(f"{self.folder} has {reason}: give the folder of a complete checkpoint")
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index} is not an index of safetensors shards ({error}): fetch it again") from error
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(f"{self.folder} lacks the shards {', '.join(missing)}: fetch them")
        return names

    def check(self, expected: dict[str, torch.Size]):
        """
        Compare names and shapes of the tensors with those that the config asks for.

        Raises:
            ValueError: naming the first tensor that is missing, of another shape, or would be dropped.
        """
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ValueError(f"{self.folder} lacks the tensor {name}: its config.json asks for it")
            if self.shapes[name] != tuple(shape):
                raise ValueError(
                    f"{name} in {self.folder} has shape {list(self.shapes[name])}, but its config.json asks for "
                    f"{list(shape)}: the two do not belong together"
                )
        for name in self.shapes.keys() - expected.keys():
            # Tied projections and tables of old checkpoints carry no information of their own.
            if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{name} in {self.folder} is not known here and would be lost: remove it first")

    def _read_ahead(self, file: str):
        """Bring a file, and the one after it, into the system's cache in the background: page by page, as views touch
        it, a disk is slow."""
        order = sorted(set(self.files.values()))
        for ahead in order[order.index(file) :][:2]:
            if ahead not in self._ahead:
                self._ahead.add(ahead)
                Thread(target=_read_through, args=(self.folder / ahead,), daemon=True).start()

    @contextmanager
    def open(self):
        """Within this context, a function that brings a tensor by its name, as a view of the file."""
        with ExitStack() as stack:
            handles = {}

            def read(name: str) -> torch.Tensor:
                file = self.files[name]
                if file not in handles:
                    self._read_ahead(file)
                    handles[file] = stack.enter_context(safe_open(self.folder / file, "pt"))
                return handles[file].get_tensor(name)

            yield read


def _read_through(path: Path):
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


class Staging:
    """
    The folder in which an output grows, `.OUT.partial` beside it, until it is complete.

    Args:
        output (`Path`): Folder to create.
        identity (`str`): Text that tells this conversion from others. Work left by an interrupted run is taken up if
            it is the same.

    Raises:
        ValueError: if another process is writing there, or work on another conversion was left.
    """

    def __init__(self, output: Path, identity: str):
        self.output = output
        self.folder = output.parent / f".{output.name}.partial"
        self.scratch = self.folder / "scratch"
        output.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(output.parent / f".{output.name}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process is writing {output}: wait for it, or name another folder") from None
        marker = self.scratch / "identity"
        if not marker.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.scratch.mkdir(parents=True)
            write_file(marker, identity)
        elif marker.read_text(encoding="utf-8") != identity:
            self.close()
            raise ValueError(
                f"{self.folder} holds an unfinished conversion of another source or recipe: finish that one with its "
                "own command, or remove the folder"
            )
        self.weight_map: dict[str, str] = {}
        self.size = 0

    def close(self):
        """Let other processes write here."""
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def add_shard(self, number: int, count: int, make: Callable[[], dict[str, torch.Tensor]]):
        """Write shard `number` of `count`, unless an earlier run did; `make` brings its tensors."""
        name = f"model-{number:05}-of-{count:05}.safetensors"
        path = self.folder / name
        if not path.exists():
            temporary = self.scratch / name
            save_file(make(), temporary, metadata={"format": "pt"})
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
                if hasattr(os, "posix_fadvise"):  # leave the system's cache to what is still to be read
                    os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(temporary, path)
        with safe_open(path, "pt") as handle:
            names = handle.keys()
            for tensor in names:
                self.weight_map[tensor] = name
                self.size += handle.get_tensor(tensor).nbytes

    def finish(self, write_config: Callable[[], None]):
        """Write the index, then the config, without which nothing loads, and give the folder its name."""
        index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(self.weight_map.items()))}
        write_file(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        write_config()
        shutil.rmtree(self.scratch)
        self.folder.rename(self.output)


def write_file(path: Path, text: str):
    """Write a text file so that it is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
