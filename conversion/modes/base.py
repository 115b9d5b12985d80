"""What the modes have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mohge import MoHGEConfig
from mohge.backbones_mohge import FeedForward
from mohge.model_cards.names import STANDARD_LIBRARY

from ..decoders import Expert, LayerWeights, MoHGE, Source
from ..recipe import Recipe
from ..statistics import LayerSaliency


Run = Callable[[Callable[[FeedForward], AbstractContextManager]], None]
"""Runs the calibration tokens through the source's layer, inside the context that the argument makes of its
feed-forward."""


class Layer(NamedTuple):
    """A layer that a mode is working on."""

    number: int
    block: str
    """What the names of the feed-forward's tensors begin with."""
    generator: torch.Generator
    tokens: int
    """Number T of calibration tokens."""
    difficulty: torch.Tensor | None
    """[T] loss of the source at each calibration token, for modes that want it."""
    device: str
    """Where to compute."""


class Converted(NamedTuple):
    """A layer of the result."""

    weights: LayerWeights
    squares: list[torch.Tensor] | None = None
    """With refit, for each expert read so far, three sums of squares over calibration tokens: of the output at the
    source's weights, and of its error without and with refit."""


class Mode(ABC):
    """
    A way to convert a checkpoint. A subclass for each entry of `Recipe.mode`.

    Args:
        recipe ([`Recipe`]): The options.
        source ([`Source`] or [`MoHGE`]): The source.

    Raises:
        ValueError: if an option is missing, does not apply, or does not fit the source.
    """

    name: str
    takes: tuple[str, ...]
    """What it converts: "dense", "mixture" or "mohge"."""
    options: frozenset[str] = frozenset()
    """The options that it knows, beside those that every mode knows."""
    needs_difficulty = False
    """Whether `Layer.difficulty` is wanted."""

    def __init__(self, recipe: Recipe, source: Source | MoHGE):
        self.recipe, self.source = recipe, source
        kind = "mohge" if isinstance(source, MoHGE) else "dense" if source.experts is None else "mixture"
        if kind not in self.takes:
            fits = ", ".join(sorted(n for n, mode in MODES.items() if kind in mode.takes))
            taken = " or a ".join(_KINDS[kind] for kind in self.takes)
            raise ValueError(
                f"`mode` {self.name} takes a {taken}, and this {source.model_type} checkpoint is a {_KINDS[kind]}: "
                f"use {fits}"
            )
        every_option = frozenset().union(*(mode.options for mode in MODES.values()))
        for option in sorted(every_option - self.options):
            if getattr(recipe, option) is not None and getattr(recipe, option) is not False:
                raise ValueError(f"`{option}` does not apply to mode {self.name}: leave it out")
        if kind != "dense" and not source.equivalent.sparse_layers:
            source.refuse("all of its layers are dense")
        try:
            self.target = self.make_target()
        except ValueError as error:
            message = str(error)
            for option in self.options & _FIELDS.keys():  # the message should name what the user gave
                field = _FIELDS[option]
                message = message.replace(f"`{field}`", f"`{option}`").replace(f"{field}=", f"{option}=")
            raise ValueError(message) from error
        if self.needs_calibration and recipe.calibration is None:
            recipe.calibrate_with(STANDARD_LIBRARY)

    @property
    def exact(self) -> bool:
        """Whether the logits stay equal up to rounding."""
        return True

    @property
    @abstractmethod
    def reason(self) -> str:
        """Why it is exact or not."""

    @property
    def notes(self) -> list[str]:
        """Where the result would be wrong that the receipt cannot try."""
        return []

    @property
    def needs_calibration(self) -> bool:
        """Whether it takes a text; where none is given, one that is always there."""
        return False

    @property
    def criterion(self) -> str | None:
        """What tells which neurons matter, see [`Survey`]; None for modes that do not ask before they begin."""
        return None

    @property
    def refits(self) -> bool:
        """Whether what the survey says is lost takes a refit into account."""
        return False

    @property
    def keeps_statistics(self) -> bool:
        """Whether statistics are those of the survey, kept on disk, instead of `observe`'s."""
        return False

    def settle(self, layers: list[LayerSaliency], tokens: int) -> None:
        """Decide what depends on the survey of so many calibration tokens, such as `target`."""
        return None

    def forecast(self) -> dict[str, str]:
        """What the survey says of the result, by name."""
        return {}

    @property
    def observes(self) -> bool:
        """Whether it takes statistics of calibration tokens."""
        return type(self).observe is not Mode.observe

    def resolved(self, revision: str | None) -> Recipe:
        """The recipe with every choice written out."""
        config, chosen = self.target.config, {"revision": revision}
        for option in self.options & _FIELDS.keys():
            unchosen = getattr(self.recipe, option) is None
            if unchosen and (option != "top_groups" or config.router_type == "two_level"):
                chosen[option] = getattr(config, _FIELDS[option])
        return replace(self.recipe, **chosen)

    @abstractmethod
    def make_target(self) -> Source | MoHGE:
        """The model that results."""

    def mohge(self, **fields) -> MoHGE:
        """A MoHGE model with the source as its backbone."""
        return MoHGE(MoHGEConfig(backbone_config=self.source.config, dtype=self.source.config.dtype, **fields))

    def observe(self, layer: Layer, weights: LayerWeights, run: Run) -> Any:
        """What `convert` needs to know of calibration tokens; `run` may be called several times, or not at all."""
        return None

    @abstractmethod
    def convert(self, layer: Layer, weights: LayerWeights, statistics: Any) -> Converted:
        """The layer of the result."""

    def convert_dense(self, layer: Layer, weights: LayerWeights) -> Converted:
        """The layer of the result, where there are no experts."""
        return Converted(weights)

    def on_disk(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors, by the names that transformers has for them, as they are written."""
        return tensors

    def expert_counts(self, total: int, groups: int | None = None) -> list[int]:
        """Experts in each group, of a source that has `total`; by default as many in each of `groups`."""
        given = self.recipe.experts_per_group
        if given is None:
            given = total // groups if groups else self.required("experts_per_group")
        counts = given if isinstance(given, list) else [given] * (groups or total // max(given, 1))
        if sum(counts) != total or min(counts) < 1:
            raise ValueError(
                f"`experts_per_group` makes groups of {counts} experts, and the source has {total}: give numbers that "
                "add up to it"
            )
        return counts

    def required(self, option: str) -> Any:
        """The value of an option that must be given."""
        value = getattr(self.recipe, option)
        if value is None:
            raise ValueError(f"mode {self.name} needs `{option}`: give it")
        return value

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MODES[cls.name] = cls


MODES: dict[str, type[Mode]] = {}
"""Every mode by its name; a subclass of [`Mode`] enters itself."""
_FIELDS = {
    "widths": "moe_intermediate_sizes",
    "experts_per_group": "num_experts_per_group",
    "top_k": "num_experts_per_tok",
    "top_groups": "num_groups_per_tok",
    "router": "router_type",
}
"""Options that are a field of [`MoHGEConfig`] under another name."""
_KINDS = {"dense": "dense model", "mixture": "mixture of experts", "mohge": "MoHGE model"}


def slice_neurons(expert: Expert, index: torch.Tensor) -> Expert:
    """The expert with only these neurons, in this order: one index set for all three matrices."""
    gate_bias, up_bias = (bias if bias is None else bias[index] for bias in (expert.gate_bias, expert.up_bias))
    return Expert(expert.gate[index], expert.up[index], expert.down[:, index], gate_bias, up_bias, expert.down_bias)


def widen(expert: Expert, width: int, generator: torch.Generator | None, std: float = 0.0) -> Expert:
    """
    The expert with idle neurons appended up to `width`: their columns of the down projection are zero. With a
    `generator` their rows are drawn with `std`, so that they can learn; without, they are zero as well.
    """
    missing = width - expert.gate.shape[0]
    size = (missing, expert.gate.shape[1])
    if generator is None:
        gate, up = torch.zeros(size), torch.zeros(size)
    else:
        gate, up = (torch.randn(size, generator=generator) * std for _ in range(2))
    dtype = expert.gate.dtype
    gate_bias, up_bias = (b if b is None else F.pad(b, (0, missing)) for b in (expert.gate_bias, expert.up_bias))
    return Expert(
        torch.cat([expert.gate, gate.to(dtype)]),
        torch.cat([expert.up, up.to(dtype)]),
        torch.cat([expert.down, expert.down.new_zeros(expert.down.shape[0], missing)], dim=1),
        gate_bias,
        up_bias,
        expert.down_bias,
    )
