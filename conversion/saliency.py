"""
How much each neuron of a model's experts matters.

Calibration tokens pass once through all layers and, for the gradient, once back, one layer after the other: states and
gradients between layers are on the disk, a layer is computed anew on the way back, and memory holds no more of the
model than a conversion does.

Shapes: T tokens, H hidden size, E experts, W_e width of expert e. The feed-forward of a dense model is one expert.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_flatten, tree_map
from tqdm.auto import tqdm

from .checkpoint import NamedTensors
from .decoders import Expert, MoHGE, Passed, Source
from .statistics import ExpertStatistics, LayerSaliency, magnitude, observe_experts
from .streams import Stream


_LISTS = ("neurons", "order", "lost")
"""What of [`LayerSaliency`] has one entry for each expert."""


class _Sums:
    """Adds up over batches what [`LayerSaliency`] follows from, and statistics for a refit where they are wanted."""

    def __init__(self, widths: list[int], device: str, statistics: ExpertStatistics | None):
        self.neurons = [torch.zeros(width, device=device) for width in widths]
        self.tokens = torch.zeros(len(widths), device=device)
        self.statistics = statistics

    def _add(self, expert: int, activations: torch.Tensor, weights: torch.Tensor):
        self.tokens[expert] += len(weights)
        if self.statistics is not None:
            self.statistics(expert, activations.detach(), weights.detach())

    def contribution(self, expert: int, activations: torch.Tensor, weights: torch.Tensor):
        """Take in the sum over tokens of combine weight times magnitude."""
        self._add(expert, activations, weights)
        self.neurons[expert] += weights @ activations.abs()

    def gradient(self, expert: int, activations: torch.Tensor, weights: torch.Tensor):
        """Take in the sum over tokens of (a dL/da)^2, when the gradient comes."""
        self._add(expert, activations, weights)
        held = activations.detach()

        def take(gradient: torch.Tensor):
            self.neurons[expert] += (held * gradient).square().sum(0)

        activations.register_hook(take)


class Survey:
    """
    Measures the saliency of all neurons of a model, or goes on with what an interrupted run has measured.

    Args:
        source ([`Source`] or [`MoHGE`]): The model; what lies outside of its layers is loaded.
        tensors ([`NamedTensors`]): Its tensors.
        batches (`list[torch.Tensor]`): Calibration tokens, [b, S] each, where to compute.
        folder (`Path`): Where to keep states and results.
        device (`str`, *optional*, defaults to `"cpu"`): Where to compute.
        refits (`bool`, *optional*, defaults to `True`):
            Whether what is left will be refitted, so that neurons count less which others can stand in for.
        keeps (`bool`, *optional*, defaults to `False`): Whether to keep what a refit needs for `statistics`, on disk.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.
    """

    def __init__(
        self,
        source: Source | MoHGE,
        tensors: NamedTensors,
        batches: list[torch.Tensor],
        folder: Path,
        device: str = "cpu",
        refits: bool = True,
        keeps: bool = False,
        progress: bool = False,
    ):
        self.source, self.tensors, self.batches = source, tensors, batches
        self.folder, self.device, self.progress = folder, device, progress
        self.refits, self.keeps = refits, keeps
        self.states, self.gradients = Stream(folder, "survey"), Stream(folder, "gradient")

    def measure(self, criterion: str) -> list[LayerSaliency]:
        """
        The saliency of each layer's neurons.

        Args:
            criterion (`str`):
                - `"gradient"`: sum over tokens of `(a dL/da)^2`, `a` the activation before the down projection and `L`
                  the loss of the next token. To second order, with the empirical Fisher matrix for the Hessian, twice
                  what the loss rises by if the neuron goes (Optimal Brain Damage, LeCun et al. 1989; for experts as in
                  https://huggingface.co/papers/2509.22299).
                - `"contribution"`: sum over tokens of combine weight times magnitude of the activation, times norm of
                  the neuron's column of the down projection.
                - `"magnitude"`: product of the norms of the neuron's rows and of its column, without tokens.
        """
        if criterion == "gradient":
            self._forward(None)
            self._loss()
            self._backward()
        elif criterion == "contribution":
            self._forward(_Sums.contribution)
        numbers = range(self.source.num_layers)
        if criterion == "magnitude":
            return [self._magnitude(number) for number in self._bar(numbers, "weights of neurons")]
        return [self._load(number) for number in numbers]

    def statistics(self, number: int) -> ExpertStatistics:
        """What a refit of a layer's experts needs, if it was kept."""
        made = ExpertStatistics(self.source.expert_widths(number), self.device)
        kept = load_file(self._kept(number))
        for expert, gram in enumerate(made.grams):
            gram.parts = [kept[f"{expert}.{part}"] for part in range(len(gram.parts))]
        return made

    def drop(self, number: int):
        """Remove what was kept of a layer."""
        self._kept(number).unlink(missing_ok=True)

    def _kept(self, number: int) -> Path:
        return self.folder / f"statistics-{number}.safetensors"

    def _bar(self, numbers: range, text: str) -> Iterator[int]:
        return tqdm(numbers, text, disable=not self.progress)

    def _experts(self, number: int) -> Iterator[Expert]:
        weights = self.source.read_layer(number, self.tensors.layer(number))
        return map(weights.expert, range(len(self.source.expert_widths(number))))

    def _magnitude(self, number: int) -> LayerSaliency:
        neurons = list(map(magnitude, self._experts(number)))
        return LayerSaliency.of(neurons, torch.ones(len(neurons)))

    def _load(self, number: int) -> LayerSaliency:
        measured = load_file(self._path(number))
        tokens = measured.pop("tokens")
        lists = ([measured[f"{name}.{expert}"] for expert in range(len(tokens))] for name in _LISTS)
        return LayerSaliency(*lists, tokens)

    def _path(self, number: int) -> Path:
        return self.folder / f"saliency-{number}.safetensors"

    def _run(self, number: int, batch: int, before: Passed | None) -> Passed:
        return self.source.run(number, self.batches[batch], before)

    def _forward(self, take: Callable | None):
        """Run all layers; the states between them stay where they are needed on the way back."""
        last = len(self.batches) - 1
        for number in self._bar(range(self.source.num_layers), "calibration, forward"):
            if self._path(number).exists() or (take is None and self.states.has(number + 1, last)):
                continue
            with self._layer(number, take):
                for batch in range(len(self.batches)):
                    before = Passed(*self.states.load(number, batch)) if number else None
                    self.states.save(number + 1, batch, tuple(self._run(number, batch, before)))
            if take is not None:
                self.states.drop(number)

    @contextmanager
    def _layer(self, number: int, take: Callable | None) -> Iterator[None]:
        """A layer with its weights; what `take` adds up of its experts is kept at the end."""
        with self.source.layer(number, self.tensors.layer(number), self.device) as found:
            widths = self.source.expert_widths(number)
            statistics = ExpertStatistics(widths, self.device) if self.refits or self.keeps else None
            sums = _Sums(widths, self.device, statistics)
            with observe_experts(found, partial(take, sums)) if take is not None and widths else nullcontext():
                yield
        if take is not None:
            if take is _Sums.contribution:
                for neurons, expert in zip(sums.neurons, self._experts(number), strict=True):
                    neurons *= expert.down.to(neurons).norm(dim=0)
            if self.keeps:
                parts = {}
                for expert, gram in enumerate(statistics.grams):
                    parts |= {f"{expert}.{n}": part.cpu() for n, part in enumerate(gram.parts)}
                save_file(parts, self._kept(number))
                del parts
            grams = ()
            if self.refits:  # one after the other, and each is let go
                grams = (statistics.grams.pop(0).sum() for _ in widths)
            layer = LayerSaliency.of(sums.neurons, sums.tokens, grams)
            entries = {f"{name}.{e}": each for name in _LISTS for e, each in enumerate(getattr(layer, name))}
            entries = {name: each.cpu() for name, each in (entries | {"tokens": sums.tokens}).items()}
            draft = self._path(number).with_suffix(".tmp")
            save_file(entries, draft)
            draft.replace(self._path(number))

    def _loss(self):
        """The gradient of the loss with respect to what the last layer returns."""
        last = self.source.num_layers
        for batch, ids in enumerate(self.batches):
            if self.gradients.has(last, batch) or self._path(last - 1).exists():
                continue
            passed, leaves = _leaves(Passed(*self.states.load(last, batch)), self.device)
            with torch.enable_grad():
                for targets, logits in self.source.logits_in_steps(ids, passed):
                    F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100).backward()
            self.gradients.save(last, batch, [_gradient(leaf) for leaf in leaves])

    def _backward(self):
        numbers = range(self.source.num_layers - 1, -1, -1)
        for number in self._bar(numbers, "calibration, backward"):
            if self._path(number).exists():
                continue
            with self._layer(number, _Sums.gradient):
                for batch in range(len(self.batches)):
                    before, leaves = None, []
                    if number:
                        before, leaves = _leaves(Passed(*self.states.load(number, batch)), self.device)
                    with torch.enable_grad():
                        outputs = _floats(self._run(number, batch, before))
                    pairs = zip(outputs, self.gradients.load(number + 1, batch), strict=True)
                    reached = [(output, grad.to(output)) for output, grad in pairs if output.requires_grad]
                    if reached:
                        torch.autograd.backward(*map(list, zip(*reached, strict=True)))
                    self.gradients.save(number, batch, [_gradient(leaf) for leaf in leaves])
            self.gradients.drop(number + 1)
            self.states.drop(number + 1)


def _floats(passed: Passed) -> list[torch.Tensor]:
    leaves = tree_flatten(tuple(passed))[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _leaves(passed: Passed, device: str) -> tuple[Passed, list[torch.Tensor]]:
    """The same, with gradients to be taken, and the tensors that take them."""

    def leaf(value):
        return value.requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    passed = Passed(*tree_map(leaf, tuple(send_to_device(passed, device))))
    return passed, _floats(passed)


def _gradient(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
