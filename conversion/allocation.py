"""Which width each expert gets: those that lose the least saliency under a budget, few different ones in a layer."""

import itertools
import math
from typing import NamedTuple

import numpy as np

from .statistics import LayerSaliency


_QUANTA = 2048
"""Parts that the cost of a layer is counted in, where it is no small whole number by itself."""
_APART = 3.0
"""By how much layers that lose the same may seem to differ."""
_MOST_SETS = 20_000
"""Most sets of widths that are tried for a layer."""


class Choices(NamedTuple):
    """What the experts of a layer may become. Where several must share a width, they are one row."""

    widths: list[int]
    """[C] ascending."""
    lost: np.ndarray
    """[E, C] saliency that an expert of each width has lost."""
    cost: np.ndarray
    """[E, C] what an expert of each width takes of the budget."""


def choices(layer: LayerSaliency, multiple: int, budget: str) -> Choices:
    """
    What experts may become that keep their most salient neurons: as wide as they are, or a multiple of `multiple`.

    Args:
        layer ([`LayerSaliency`]): What the survey says of them.
        multiple (`int`): What widths are multiples of.
        budget (`str`): What is counted, see [`prices`].
    """
    own = max(len(curve) - 1 for curve in layer.lost)
    widths = [*range(0, own, multiple), own]
    lost = np.stack([curve.numpy()[np.minimum(widths, len(curve) - 1)] for curve in layer.lost])
    return Choices(widths, lost, np.outer(prices(layer, budget), widths))


def prices(layer: LayerSaliency, budget: str) -> np.ndarray:
    """[E] what a neuron of each expert takes of a budget of `"memory"`, or of `"work"`: its share of the tokens."""
    if budget == "memory":
        return np.ones(len(layer.tokens))
    return (layer.tokens / layer.tokens.sum().clamp(min=1)).numpy()


def even(layers: list[LayerSaliency], tables: list[Choices]) -> list[Choices]:
    """
    The choices of layers with their losses on one scale: where all experts have half of their width, layers lose the
    same, unless they differ by more than `_APART`. Narrowed one at a time, layers do cost what saliency says, the
    first ones most; narrowed together, what is taken from the last ones to spare the first costs more than it saves
    (on the mixture made of SmolLM2, whether layers are weighed by saliency or by the KL divergence that each causes).
    """
    halves = np.array([sum(curve[len(curve) // 2].item() for curve in layer.lost) for layer in layers])
    typical = np.median(halves[halves > 0]) if halves.any() else 1.0
    scales = 1 / np.clip(halves / typical, 1 / _APART, _APART)
    return [table._replace(lost=scale * table.lost) for table, scale in zip(tables, scales, strict=True)]


def allocate(layers: list[Choices], budget: float, groups: int) -> list[list[int]]:
    """
    The widths of all experts of a model: of all that cost at most `budget` and have at most `groups` different widths
    in a layer, those that lose the least. Exact where costs are whole multiples of something; otherwise up to the
    rounding of a layer's cost to one part in some thousands.

    Args:
        layers (`list[Choices]`): The choices in each layer.
        budget (`float`): What all experts together may cost.
        groups (`int`): Most different widths in a layer.

    Returns:
        `list[list[int]]`: For each layer and row, the index of its width.

    Raises:
        ValueError: if there are too many sets of widths to try them all, or nothing fits the budget.
    """
    quantum = _quantum(layers)
    whole = math.floor(budget / quantum + 1e-6)
    costs = [np.rint(layer.cost / quantum).astype(np.int64) for layer in layers]
    tables = [_Layer(layer.lost, cost, groups) for layer, cost in zip(layers, costs, strict=True)]
    while True:
        chosen = _choose(tables, whole)
        spent = sum(layer.cost[range(len(row)), row].sum() for layer, row in zip(layers, chosen, strict=True))
        if spent <= budget * (1 + 1e-9):
            return chosen
        whole -= math.ceil((spent - budget) / quantum)  # costs had been rounded down


def _choose(tables: list["_Layer"], whole: int) -> list[list[int]]:
    """The widths that lose the least for so many quanta."""
    best = np.zeros(max(whole, 0) + 1)
    taken = []
    for table in tables:
        after, spent = np.full(len(best), np.inf), np.zeros(len(best), dtype=np.int32)
        for cost in table.steps:  # only where more room loses less
            if cost > whole:
                break
            candidate = best[: whole + 1 - cost] + table.lost[cost]
            better = candidate < after[cost:]
            after[cost:][better], spent[cost:][better] = candidate[better], cost
        best = after
        taken.append(spent)
    if whole < 0 or not np.isfinite(best[-1]):
        raise ValueError("`keep` is below what the narrowest experts take: raise it")
    chosen = []
    for table, spent in zip(reversed(tables), reversed(taken), strict=True):
        cost = int(spent[whole])
        chosen.append(table.choose(cost))
        whole -= cost
    return chosen[::-1]


def _quantum(layers: list[Choices]) -> float:
    """What costs are counted in: what they are multiples of or, where that is too small, a part of a layer's."""
    largest = max(layer.cost[:, -1].sum() for layer in layers)
    costs = np.unique(np.concatenate([layer.cost.ravel() for layer in layers]))
    if np.equal(np.mod(costs, 1), 0).all():
        common = np.gcd.reduce(costs.astype(np.int64))
        if 0 < largest / max(common, 1) <= 2 * _QUANTA:
            return float(common)
    return max(largest / _QUANTA, 1e-12)


class _Layer:
    """
    The best that a layer can do with each cost.

    Args:
        lost (`np.ndarray`): [E, C] as in [`Choices`].
        cost (`np.ndarray`): [E, C] the same in whole numbers.
        groups (`int`): Most different widths.
    """

    def __init__(self, lost: np.ndarray, cost: np.ndarray, groups: int):
        self._lost, self._cost = lost.astype(np.float32), cost
        choices = lost.shape[1]
        size = choices if groups >= len(lost) else min(groups, choices)
        if math.comb(choices, size) > _MOST_SETS:
            raise ValueError(
                f"`multiple` and `groups` leave {math.comb(choices, size):,} sets of widths for a layer: raise "
                "`multiple`, or lower `groups`"
            )
        self._sets = np.array(list(itertools.combinations(range(choices), size)))
        self._room = int(cost.max(1).sum())
        table = np.zeros((len(self._sets), self._room + 1), dtype=np.float32)
        for expert in range(len(lost)):
            table = self._add(table, expert, self._sets)[0]
        self._set = table.argmin(0)
        self.lost = table.min(0)
        """[cost + 1] the least that is lost for at most this cost."""
        self.steps = np.flatnonzero(np.diff(self.lost, prepend=np.inf) < 0).tolist()
        """The costs at which less is lost than below."""

    def _add(self, table: np.ndarray, expert: int, sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S, cost + 1] the least lost with one more expert, and which width of the set it has."""
        best = np.full_like(table, np.inf)
        which = np.zeros(table.shape, dtype=np.int8)
        for position, choice in enumerate(sets.T):
            # Sets that have the same width here are shifted together.
            for width in np.unique(choice):
                rows, shift = np.flatnonzero(choice == width), self._cost[expert, width]
                candidate = table[rows, : self._room + 1 - shift] + self._lost[expert, width]
                better = candidate < best[rows, shift:]
                best[rows, shift:] = np.where(better, candidate, best[rows, shift:])
                which[rows, shift:] = np.where(better, position, which[rows, shift:])
        return best, which

    def choose(self, cost: int) -> list[int]:
        """The width of each expert, as an index, that loses the least for at most this cost."""
        sets = self._sets[self._set[cost]][None]
        table, taken = np.zeros((1, self._room + 1), dtype=np.float32), []
        for expert in range(len(self._lost)):
            table, which = self._add(table, expert, sets)
            taken.append(which[0])
        chosen = []
        for expert in reversed(range(len(taken))):
            width = sets[0, taken[expert][cost]]
            chosen.append(int(width))
            cost -= self._cost[expert, width]
        return chosen[::-1]
