"""Checkpoints on disk, local or from the Hub, read tensor by tensor."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from threading import Thread

import torch
from huggingface_hub import snapshot_download
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mohge.model_cards.folder import (
    INDEX,
    SIDE_FILES,
    SINGLE,
    check_folder,
    open_weights,
    read_index,
    read_json,
    weight_files,
)
from mohge.model_cards.names import may_be_on_hub, not_found

from .decoders import Decoder, own


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TABLE_DTYPES = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
"""Of tables such as the one that says which expert here is which of the source's router."""


def read_config(folder: Path) -> dict:
    """
    The config.json of a checkpoint, in whose folder nothing leads elsewhere or asks for code to be run.

    Raises:
        ValueError: if there is none that can be read, or something does.
    """
    check_folder(folder)
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder} has no config.json: give the folder of a checkpoint")
    return read_json(folder / "config.json")


def find_source(
    source: str, revision: str | None, check: Callable[[Path, dict], object]
) -> tuple[Path, str | None, dict]:
    """
    The folder of `source`, a local folder or a Hub id, the commit if it came from the Hub, and its config.json. From
    the Hub, weights are fetched after `check` has accepted the folder of all else and the config.

    Raises:
        ValueError: if there is no such folder, and no such repository on the Hub or in its local cache.
    """
    path = Path(source)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"`revision` applies to a source on the Hub, and {source} is a folder: leave it out")
        fields = read_config(path)
        check(path, fields)
        return path, None, fields
    if path.exists():
        raise ValueError(f"{source} is not a folder: give the folder of a checkpoint, or a Hub id such as org/name")
    if not may_be_on_hub(source):
        raise ValueError(not_found(source, "the folder of a checkpoint, or a Hub id such as org/name"))
    try:
        path = Path(snapshot_download(source, revision=revision, allow_patterns=["config.json", INDEX, *SIDE_FILES]))
        fields = read_config(path)
        check(path, fields)
        shards = [*set(read_index(path).values())] if (path / INDEX).is_file() else [SINGLE]
        snapshot_download(source, revision=path.name, allow_patterns=shards)
    except OSError as error:
        raise ValueError(f"{source} is neither a folder nor a reachable Hub repository ({error})") from error
    return path, path.name, fields


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
        self.order, indexed = weight_files(folder)
        for file in self.order:
            with open_weights(folder, file) as handle:
                names = handle.keys()
                for name in names:
                    view = handle.get_slice(name)
                    dtype = (_DTYPES | _TABLE_DTYPES).get(view.get_dtype())
                    if dtype is None:
                        _refuse_dtype(name, file, view.get_dtype())
                    if name in self.files:
                        self._check_same(name, handle.get_tensor(name), file)
                    self.files[name] = file
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = dtype
        for name in sorted(self.files.keys() ^ (self.files if indexed is None else indexed).keys()):
            raise ValueError(
                f"{name} is in {'no shard' if name in indexed else self.files[name]} of {folder}, and "
                f"{'in' if name in indexed else 'not in'} {INDEX}: the two do not belong together, fetch them again"
            )
        if not set(self.dtypes.values()) & set(_DTYPES.values()):
            raise ValueError(f"{folder} has no weights in {', '.join(self.order)}: fetch them again")

    def _check_same(self, name: str, tensor: torch.Tensor, file: str):
        with open_weights(self.folder, self.files[name]) as handle:
            other = handle.get_tensor(name)
            if other.dtype != tensor.dtype or not torch.equal(other, tensor):
                raise ValueError(
                    f"{name} in {self.folder} differs between {self.files[name]} and {file}: remove the wrong one"
                )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights."""
        sizes = Counter()
        for name, dtype in self.dtypes.items():
            if dtype not in _DTYPES.values():
                continue
            sizes[dtype] += math.prod(self.shapes[name])
        return sizes.most_common(1)[0][0]

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
                    handles[file] = stack.enter_context(open_weights(self.folder, file))
                return handles[file].get_tensor(name)

            yield read


class NamedTensors:
    """
    The tensors of a checkpoint by the names that transformers' model has for them, made of what is on the disk as
    transformers makes them: renamed, and the experts of a layer stacked.

    Args:
        checkpoint ([`Checkpoint`]): The tensors on the disk.
        decoder ([`Decoder`]): The model.

    Raises:
        ValueError: naming a tensor that is missing, of another shape, or would be lost.
    """

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder):
        self.checkpoint, self.decoder = checkpoint, decoder
        model, expected = decoder.model, decoder.tensors
        tied = dict(model.all_tied_weights_keys)
        transforms = get_model_conversion_mapping(model)
        renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._converters = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected]
        known = {**expected, **tied}
        self._parts: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        """Name of the first tensor that is made -> the tensors on the disk it is made of, and what they match."""
        copies = {}
        for name in sorted(checkpoint.shapes, key=_natural):
            first, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if first not in known and name in known:
                first, pattern = name, None
            if first in tied:
                copies[name] = tied[first]
            elif first in expected:
                self._parts[first].append((name, pattern))
            elif not name.endswith("rotary_emb.inv_freq") and not any(i.search(name) for i in ignored):
                self._refuse_lost(name)
        for name, first in copies.items():
            if first in self._parts:
                self._check_tied(name, first)
            else:  # the tied matrix is there under the other of its names
                self._parts[first].append((name, None))
        self._first: dict[str, str] = {}
        """Name of a tensor -> first name of those that are made with it."""
        for first, parts in self._parts.items():
            if len({checkpoint.dtypes[name] for name, _ in parts}) > 1:
                raise ValueError(f"{first} in {checkpoint.folder} is stored in several dtypes: convert them to one")
            for name, tensor in self._make(first, self._on_meta).items():
                self._check(name, tensor)
                self._first[name] = first
        for name in expected:
            if name not in self._first:
                raise ValueError(f"{checkpoint.folder} lacks the tensor {name}: its config.json asks for it")

    def _check_tied(self, name: str, first: str):
        with self.checkpoint.open() as read:
            if not torch.equal(read(name), self._make(first, read)[first]):
                raise ValueError(
                    f"{name} in {self.checkpoint.folder} differs from the embedding, but its config.json ties them: "
                    "set `tie_word_embeddings` to false"
                )

    def _refuse_lost(self, name: str):
        raise ValueError(
            f"{name} in {self.checkpoint.folder} belongs to no part of a {self.decoder.model_type} model and would be "
            "lost: remove it first, or save the text model alone"
        )

    def _on_meta(self, name: str) -> torch.Tensor:
        return torch.empty(self.checkpoint.shapes[name], dtype=self.checkpoint.dtypes[name], device="meta")

    def _check(self, name: str, tensor: torch.Tensor):
        expected = self.decoder.tensors.get(name)
        if expected is None:
            self._refuse_lost(name)
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} in {self.checkpoint.folder} has shape {list(tensor.shape)}, but its config.json asks for "
                f"{list(expected.shape)}: the two do not belong together"
            )
        if tensor.is_floating_point() != expected.is_floating_point():
            _refuse_dtype(name, self.checkpoint.folder, tensor.dtype)

    def _make(self, first: str, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors that are made together with `first`, by name."""
        parts = self._parts[first]
        if parts[0][1] is None:
            return {first: read(parts[0][0])}
        converter = deepcopy(self._converters[parts[0][1]])
        for name, pattern in parts:
            converter.add_tensor(first, name, pattern, read(name))
        try:
            made = converter.convert(first, model=self.decoder.model, config=self.decoder.config)
        except Exception as error:
            raise ValueError(
                f"{first} cannot be made of the {len(parts)} tensors that {self.checkpoint.folder} has for it "
                f"({' '.join(str(error).split())[:200]}): fetch the checkpoint again"
            ) from error
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    @contextmanager
    def open(self) -> Iterator[Callable[[str], torch.Tensor]]:
        """Within this context, a function that brings a tensor by its name, a view of the file where it can be."""
        with self.checkpoint.open() as read:
            yield lambda name: self._make(self._first[name], read)[name]

    def layer(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a layer, by name inside it; no views, which would keep what has been read of their file in
        memory."""
        names = self.decoder.layer_names(number)
        prefix = f"{self.decoder.prefix}{number}."
        tensors = {}
        with self.checkpoint.open() as read:
            for first in {self._first[name]: None for name in names}:
                made = self._make(first, read)
                tensors |= made if len(self._parts[first]) > 1 else {name: own(part) for name, part in made.items()}
        return {name.removeprefix(prefix): tensors[name] for name in names}


def _refuse_dtype(name: str, place: str | Path, dtype: str | torch.dtype):
    raise ValueError(f"{name} in {place} has dtype {dtype}: give the checkpoint in float32, bfloat16 or float16")


def _natural(name: str) -> list[int | str]:
    """Sorts expert 10 after expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _read_through(path: Path):
    buffer = bytearray(2**22)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
