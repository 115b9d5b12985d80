"""Checkpoints on disk, local or from the Hub, read tensor by tensor."""

import json
import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from safetensors import SafetensorError, safe_open


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SIDE_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
SIDE_FILES += ("chat_template*", "additional_chat_templates/*", "generation_config.json", "LICENSE*", "NOTICE*")
"""What is copied from a source as it is."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_config(folder: Path) -> dict:
    """
    The config.json of a checkpoint.

    Raises:
        ValueError: if there is none.
    """
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no config.json that can be read ({error}): give a checkpoint") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{folder / 'config.json'} is no config: give a checkpoint")
    return fields


def find_source(source: str, revision: str | None, check: Callable[[dict], object]) -> tuple[Path, str | None, dict]:
    """
    The folder of `source`, a local folder or a Hub id, the commit if it came from the Hub, and its config.json. From
    the Hub, weights are fetched after `check` has accepted the config.

    Raises:
        ValueError: if there is no such folder, and no such repository on the Hub or in its local cache.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` applies to a source on the Hub, and {source} is a folder: leave it out")
        fields = read_config(path)
        check(fields)
        return path, None, fields
    if path.exists() or source.count("/") > 1:
        raise ValueError(f"{source} is not a folder: give the folder of a checkpoint, or a Hub id such as org/name")
    try:
        path = Path(snapshot_download(source, revision=revision, allow_patterns=["config.json", INDEX, *SIDE_FILES]))
        fields = read_config(path)
        check(fields)
        shards = _indexed(path / INDEX) if (path / INDEX).is_file() else [SINGLE]
        snapshot_download(source, revision=path.name, allow_patterns=shards)
    except (OSError, HFValidationError) as error:
        raise ValueError(f"{source} is neither a folder nor a reachable Hub repository ({error})") from error
    return path, path.name, fields


def _indexed(index: Path) -> list[str]:
    """The shards that an index names."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not all(isinstance(name, str) for name in names):
            raise TypeError("its weight_map does not name files")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors shards ({error}): fetch it again") from error
    return names


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
        self.expected: list[str] = []
        self._ahead: set[str] = set()
        self.files: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.order = self._file_names()
        for file in self.order:
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
        if (self.folder / SINGLE).is_file():
            return [SINGLE]
        if not index.is_file():
            reason = f"shards but no {INDEX}" if any(self.folder.glob("*.safetensors")) else "no safetensors weights"
            raise ValueError(f"{self.folder} has {reason}: give the folder of a complete checkpoint")
        names = _indexed(index)
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(f"{self.folder} lacks the shards {', '.join(missing)}: fetch them")
        return names

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        sizes = Counter()
        for name, dtype in self.dtypes.items():
            sizes[dtype] += math.prod(self.shapes[name])
        return sizes.most_common(1)[0][0]

    def check(self, expected: dict[str, torch.Size], tied: bool):
        """
        Compare the tensors with those that the config asks for.

        Args:
            expected (`dict[str, torch.Size]`): Shape of each tensor.
            tied (`bool`): Whether the output projection is the embedding.

        Raises:
            ValueError: naming the first tensor that is missing, of another shape, or would be lost.
        """
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ValueError(f"{self.folder} lacks the tensor {name}: its config.json asks for it")
            if self.shapes[name] != tuple(shape):
                raise ValueError(
                    f"{name} in {self.folder} has shape {list(self.shapes[name])}, but its config.json asks for "
                    f"{list(shape)}: the two do not belong together"
                )
        self.expected = list(expected)
        for name in sorted(self.shapes.keys() - expected.keys()):
            if name == "lm_head.weight" and tied:
                with self.open() as read:
                    if torch.equal(read(name), read("model.embed_tokens.weight")):
                        continue
                raise ValueError(
                    f"{name} in {self.folder} differs from the embedding, but its config.json ties them: set "
                    "`tie_word_embeddings` to false"
                )
            if not name.endswith("rotary_emb.inv_freq"):  # old checkpoints have it; it follows from the config
                raise ValueError(f"{name} in {self.folder} is not known here and would be lost: remove it first")
        layers = {}
        for name in expected:
            if ".experts." in name:
                layers.setdefault(name.split(".experts.")[0], set()).add(self.dtypes[name])
        mixed = sorted(layer for layer, dtypes in layers.items() if len(dtypes) > 1)
        if mixed:
            raise ValueError(f"the experts of {mixed[0]} in {self.folder} have several dtypes: convert them to one")

    def _read_ahead(self, file: str):
        """Bring a file, and the one after it, into the system's cache in the background: page by page, as views touch
        it, a disk is slow."""
        for ahead in self.order[self.order.index(file) :][:2]:
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

    @contextmanager
    def open_layer(self, number: int):
        """Within this context, a function that brings a tensor of a layer by its name inside it, and those names."""
        prefix = f"model.layers.{number}."
        names = [name.removeprefix(prefix) for name in self.expected if name.startswith(prefix)]
        with self.open() as read:
            yield lambda name: read(prefix + name), names


def _read_through(path: Path):
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
