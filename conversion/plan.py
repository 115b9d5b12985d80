"""What a conversion would do, found out from configs and the headers of weight files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mohge.info import parameter_counts

from .checkpoint import Checkpoint, NamedTensors, find_source
from .decoders import MoHGE, Source, make_decoder
from .modes import MODES, Mode
from .recipe import Recipe
from .staging import clear_left
from .tokenizer import about, describe, load_tokenizer


@dataclass
class Plan:
    """A conversion that has been found possible. Nothing is written yet."""

    recipe: Recipe
    revision: str | None
    fields: dict
    """The source's config.json."""
    checkpoint: Checkpoint
    tensors: NamedTensors
    tokenizer: PreTrainedTokenizerBase | None
    mode: Mode

    @property
    def source(self) -> Source | MoHGE:
        return self.mode.source

    @property
    def target(self) -> Source | MoHGE:
        return self.mode.target

    def describe(self) -> str:
        """The plan as text."""
        recipe, mode = self.recipe, self.mode
        before, after = (parameter_counts(decoder.equivalent) for decoder in (self.source, self.target))
        lines = {
            "source": f"{recipe.source} ({self.source.model_type}{', ' + self.revision if self.revision else ''})",
            "output": f"{recipe.output} ({self.target.model_type})",
            "mode": f"{mode.name}, {'exact' if mode.exact else 'not exact'}: {mode.reason}",
            "total parameters": f"{before.total:,} -> {after.total:,}",
            "activated per token": f"{before.activated:,} -> {after.activated:,} with equal traffic",
            "weights to be written": f"{self.checkpoint.dtype.itemsize * after.total:,} bytes",
        }
        lines |= mode.forecast()
        config = self.target.equivalent
        sparse = [number for number in range(config.num_hidden_layers) if number not in config.mlp_only_layers]
        for number in sparse if config.is_heterogeneous else sparse[:1]:
            layer = config.per_layer_config[number]
            groups = zip(layer.expert_counts, layer.moe_intermediate_sizes, strict=True)
            name = f"layer {number}" if config.is_heterogeneous else "expert groups"
            lines[name] = ", ".join(f"{count} of width {width}" for count, width in groups)
        if self.tokenizer is not None:
            lines["tokenizer"] = describe(about(self.tokenizer, config.vocab_size))
        notes = [f"NOTE: {note}" for note in mode.notes]
        return "\n".join([*(f"{name:<22}  {value}" for name, value in lines.items()), *notes])


def make_plan(recipe: Recipe) -> Plan:
    """
    Read the source's config and the headers of its weights, and check that the conversion is possible.

    Raises:
        ValueError: if it is not, naming the option or the file and the remedy.
    """
    _check_output(Path(recipe.output))
    _check_device(recipe.device)

    def mode_for(fields: dict, dtype: torch.dtype | None = None) -> Mode:
        if dtype is not None:
            fields = {name: value for name, value in fields.items() if name != "torch_dtype"}
            fields["dtype"] = str(dtype).removeprefix("torch.")
        return MODES[recipe.mode](recipe, make_decoder(fields))

    def check(folder: Path, fields: dict):
        nonlocal tokenizer
        mode_for(fields)
        tokenizer = load_tokenizer(folder)

    # The mode is tried on the config before weights are fetched, and made again when their dtype is known.
    tokenizer = None
    folder, revision, fields = find_source(recipe.source, recipe.revision, check)
    checkpoint = Checkpoint(folder)
    mode = mode_for(fields, checkpoint.dtype)
    tensors = NamedTensors(checkpoint, mode.source)
    parameter_counts(mode.target.equivalent)  # says why there is no such model
    return Plan(recipe, revision, fields, checkpoint, tensors, tokenizer, mode)


def _check_output(output: Path):
    if output.exists():
        clear_left(output)
        raise ValueError(f"`output` {output} exists: name another folder, or remove it first")
    parent = next(parent for parent in output.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise ValueError(f"`output` {output} cannot be created, {parent} is not a folder: name another folder")


def _check_device(device: str):
    try:
        usable = torch.zeros(1, device=device).device.type != "meta"
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"`device` {device} cannot be used here ({error}): use cpu or cuda") from error
    if not usable:
        raise ValueError("`device` meta cannot compute: use cpu or cuda")
