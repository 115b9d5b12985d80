"""The check before a push: does the folder, with its own code alone, compute what the model computes here?"""

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import mohge
from mohge.conversion.tokenizer import load_tokenizer
from mohge.loading import load_model
from mohge.modeling_mohge import AUTO_MAP

from .card import PROMPT
from .folder import read_json
from .reload import CACHE_TOLERANCE
from .reload import __file__ as RELOAD
from .writing import temporary_folder


TOLERANCE = 1e-4
"""Largest relative error of a token's logits, in float32 whatever the dtype of the weights: half precision rounds so
much that the same weights may send a token to other experts."""


_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
_ENVIRONMENT += ("TMPDIR", "TEMP", "TMP", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""All of this process's variables that the verifying one gets: what Python and torch need, and no secret."""


class ReloadError(RuntimeError):
    """A folder does not compute what its original computes."""


def verify(folder: Path, original: Path | PreTrainedModel):
    """
    Load `folder` with `trust_remote_code=True` in a process where mohge is missing, offline, and compare its logits in
    float32 with those of `original`, on tokens drawn with a seed and, if there is a tokenizer, on the card's prompt.
    Generation with a cache must there also compute what a forward without one does. All the code that is trusted is
    this package's own, byte for byte.

    Args:
        folder (`Path`): Folder to check, with the model's code.
        original (`Path` or `PreTrainedModel`):
            Folder to load in this process with the installed mohge, or the model itself.

    Raises:
        ReloadError: if `folder` has other code, does not load, or its logits differ, are not finite or change with a
            cache.
        ValueError: if `original` does not load.
    """
    check_code(folder)
    model = (
        load_model(original, dtype=torch.float32) if isinstance(original, Path) else copy.deepcopy(original).float()
    )
    length = min(32, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    inputs = {"tokens": ids}
    tokenizer = load_tokenizer(folder)
    if tokenizer is not None:
        encoded = tokenizer(PROMPT, return_tensors="pt")["input_ids"].long()
        if encoded.numel():
            inputs["prompt"] = encoded
    expected = _logits(model, inputs)
    del model  # before another one is loaded
    actual = _reload(folder, inputs)
    for name, logits in expected.items():
        _compare(logits, actual[name])
    error = actual["cache_error"].item()
    if not error <= CACHE_TOLERANCE:
        raise ReloadError(
            f"generation with a cache computes other logits than a forward without one: relative error {error:.2g}, "
            f"of which rounding explains {CACHE_TOLERANCE:g}"
        )


def check_code(folder: Path):
    """
    Check that the code in `folder`, and what its config names, is that of the installed mohge.

    Raises:
        ReloadError: naming what is not.
    """
    package = Path(mohge.__file__).parent
    for file in folder.rglob("*.py"):
        own = package / file.name
        if file.parent != folder or not (own.is_file() and own.read_bytes() == file.read_bytes()):
            raise ReloadError(f"{file.relative_to(folder)} is code, and not that of the installed mohge")
    named = read_json(folder / "config.json").get("auto_map", {})
    if not named.items() <= {"AutoConfig": "configuration_mohge.MoHGEConfig", **AUTO_MAP}.items():
        raise ReloadError(f"`auto_map` in its config.json names other code than that of the installed mohge: {named}")


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.eval().set_experts_implementation("grouped_mm")  # what the copied code runs without kernels
    try:
        return {name: model(ids).logits for name, ids in inputs.items()}
    except IndexError as error:
        raise ValueError(f"the tokenizer has tokens above `vocab_size` {model.config.vocab_size}: {error}") from error


def _reload(folder: Path, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with temporary_folder(Path(tempfile.gettempdir()), "push") as scratch:
        given, computed = (str(scratch / name) for name in ("inputs.safetensors", "outputs.safetensors"))
        save_file(inputs, given)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        environment |= {"HF_HUB_OFFLINE": "1", **dict.fromkeys(("HOME", "HF_HOME", "HF_MODULES_CACHE"), str(scratch))}
        command = [sys.executable, "-I", RELOAD, str(folder), given, computed, PROMPT]
        result = subprocess.run(
            command, env=environment, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if result.returncode:
            reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[-1]
            raise ReloadError(f"the folder does not load where mohge is missing: {reason}")
        return load_file(computed)


def _compare(expected: torch.Tensor, actual: torch.Tensor):
    if not (expected.isfinite().all() and actual.isfinite().all()):
        raise ReloadError("the model computes logits that are not finite")
    error = ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
    if not error <= TOLERANCE:
        raise ReloadError(
            f"loaded where mohge is missing, the folder computes other logits: relative error {error:.2g}, of which "
            f"rounding explains {TOLERANCE:g}"
        )
