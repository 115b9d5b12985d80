"""The conversion itself: plan, then layer by layer calibrate, convert, check and write."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from mohge.info import ParameterCounts, parameter_counts
from mohge.modeling_mohge import AUTO_MAP, save_code

from .architectures import Architecture, LayerWeights, MoHGE
from .calibration import Tokens, random_tokens, read_tokens
from .checkpoint import SIDE_FILES, Checkpoint, Staging, find_source, write_file
from .loading import make_architecture, read_config
from .modes import MODES, Converted, Layer, Mode
from .receipt import LogitComparison, judge, model_card
from .recipe import Recipe
from .window import Stream, layer_window


_BATCH_TOKENS = 4096
_LOGITS = 2**26
"""Most logits that are held at once, for large vocabularies."""
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass
class Plan:
    """A conversion that has been found possible. Nothing is written yet."""

    recipe: Recipe
    folder: Path
    revision: str | None
    fields: dict
    """The source's config.json."""
    checkpoint: Checkpoint
    mode: Mode
    before: ParameterCounts
    after: ParameterCounts
    shapes: dict[str, torch.Size]
    """Shape of every tensor of the source."""
    size: int
    """Bytes of weights to be written."""

    @property
    def source(self) -> Architecture:
        return self.mode.source

    @property
    def target(self) -> Architecture:
        return self.mode.target

    def describe(self) -> str:
        """The plan as text."""
        recipe, mode = self.recipe, self.mode
        lines = {
            "source": f"{recipe.source} ({self.source.model_type}{', ' + self.revision if self.revision else ''})",
            "output": f"{recipe.output} ({self.target.model_type})",
            "mode": f"{mode.name}, {'exact' if mode.exact else 'not exact'}: {mode.reason}",
            "total parameters": f"{self.before.total:,} -> {self.after.total:,}",
            "activated per token": f"{self.before.activated:,} -> {self.after.activated:,}",
            "weights to be written": f"{self.size:,} bytes",
        }
        config = self.target.equivalent()
        if config.sparse_layers and not config.is_heterogeneous:
            groups = zip(config.expert_counts, config.moe_intermediate_sizes, strict=True)
            lines["expert groups"] = ", ".join(f"{count} of width {width}" for count, width in groups)
        return "\n".join(f"{name:<22}  {value}" for name, value in lines.items())


def make_plan(recipe: Recipe) -> Plan:
    """
    Read the source's config and the headers of its weights, and check that the conversion is possible.

    Raises:
        ValueError: if it is not, naming the option or the file and the remedy.
    """
    if Path(recipe.output).exists():
        raise ValueError(f"`output` {recipe.output} exists: name another folder, or remove it first")
    try:
        torch.zeros(1, device=recipe.device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"`device` {recipe.device} cannot be used here ({error}): use cpu or cuda") from error
    folder, revision = find_source(recipe.source, recipe.revision)
    fields = read_config(folder)
    mode = MODES[recipe.mode](recipe, make_architecture(fields))
    checkpoint = Checkpoint(folder)
    shapes = mode.source.shapes()
    checkpoint.check(shapes)
    item = min(dtype.itemsize for dtype in checkpoint.dtypes.values())
    size = item * sum(shape.numel() for shape in mode.target.shapes().values())
    before, after = (parameter_counts(architecture.equivalent()) for architecture in (mode.source, mode.target))
    return Plan(recipe, folder, revision, fields, checkpoint, mode, before, after, shapes, size)


def convert(plan: Plan, progress: bool = False) -> dict:
    """
    Carry out a conversion, or go on with one that was interrupted.

    Args:
        plan ([`Plan`]): From `make_plan`.
        progress (`bool`, *optional*, defaults to `False`): Whether to show progress bars.

    Returns:
        `dict`: The receipt, as in conversion_report.json.

    Raises:
        ValueError: if the calibration data does not do, or another process writes to the same folder.
    """
    config = plan.source.config
    if plan.recipe.calibration is None:
        tokens = random_tokens(plan.source, plan.recipe.seed)
    else:
        tokens = read_tokens(plan.recipe, plan.folder, config)
    staging = Staging(Path(plan.recipe.output), _identity(plan, tokens))
    try:
        return _Conversion(plan, tokens, staging, progress).run()
    finally:
        staging.close()


def _identity(plan: Plan, tokens: Tokens) -> str:
    """What has to be the same for a run to go on with the work of another."""
    sources = {file: (plan.folder / file).stat() for file in sorted(set(plan.checkpoint.files.values()))}
    facts = {
        "recipe": plan.recipe.to_yaml(),
        "config": plan.fields,
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in sources.items()},
        "tokens": [
            list(tokens.ids.shape),
            int((tokens.ids * torch.arange(1, tokens.ids.numel() + 1).view_as(tokens.ids)).sum()),
        ],
    }
    return json.dumps(facts, indent=1)


class _Conversion:
    def __init__(self, plan: Plan, tokens: Tokens, staging: Staging, progress: bool):
        self.plan, self.tokens, self.staging, self.progress = plan, tokens, staging, progress
        self.layers = plan.source.config.num_hidden_layers
        self.device = plan.recipe.device
        self.source_stream = Stream(staging.scratch, "source")
        self.target_stream = Stream(staging.scratch, "target")
        length = tokens.ids.shape[1]
        sequences = max(1, _BATCH_TOKENS // length)
        fitted, held_out = tokens.ids.split([len(tokens.ids) - tokens.held_out, tokens.held_out])
        self.batches = [batch for part in (fitted, held_out) for batch in part.split(sequences) if len(batch)]
        self.fitted = -(-len(fitted) // sequences)
        """Number of batches that statistics are taken over; those after them are held out."""
        self.fitted_tokens = fitted.numel()

    def run(self) -> dict:
        plan, staging = self.plan, self.staging
        shards = self.layers + 2
        tied = plan.target.config.tie_word_embeddings
        self._embed()
        difficulty = self._difficulty() if plan.mode.needs_difficulty else None
        with plan.checkpoint.open() as read:
            staging.add_shard(1, shards, lambda: {_EMBEDDING: read(_EMBEDDING)})
        layers = []
        for number in tqdm(range(self.layers), "layers", disable=not self.progress):
            done = staging.scratch / f"layer-{number}.json"
            if not done.exists():
                notes = self._layer(number, shards, difficulty)
                write_file(done, json.dumps(notes))
            else:
                staging.add_shard(2 + number, shards, dict)
            for stream in (self.source_stream, self.target_stream):
                stream.drop(number)
            layers.append(json.loads(done.read_text(encoding="utf-8")))
        with plan.checkpoint.open() as read:
            last = [_NORM] if tied else [_NORM, _HEAD]
            staging.add_shard(shards, shards, lambda: {name: read(name) for name in last})
        report = self._report(layers)
        self._finish(report)
        return report

    def _embed(self):
        """The states that enter the first layer."""
        if (self.staging.scratch / "layer-0.json").exists():
            return
        with self.plan.checkpoint.open() as read:
            embedding = read(_EMBEDDING)
            for batch, ids in enumerate(self.batches):
                states = F.embedding(ids, embedding)
                self.source_stream.save(0, batch, states)
                if batch >= self.fitted:
                    self.target_stream.save(0, batch, states)

    @contextmanager
    def _window(self, number: int, architecture: Architecture, state: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
        norm = None
        if number == self.layers - 1:
            with self.plan.checkpoint.open() as read:
                norm = read(_NORM).clone()
        with layer_window(architecture, number, state, norm, self.device) as decoder:
            yield decoder

    def _source_state(self, number: int) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{number}."
        with self.plan.checkpoint.open() as read:
            return self.plan.source.module_state(number, lambda name: read(prefix + name), self._names(number))

    def _names(self, number: int) -> list[str]:
        prefix = f"model.layers.{number}."
        return [name.removeprefix(prefix) for name in self.plan.shapes if name.startswith(prefix)]

    def _forward(self, decoder: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return decoder(inputs_embeds=states.to(self.device), use_cache=False).last_hidden_state

    def layer(self, number: int, difficulty: torch.Tensor | None) -> Layer:
        """What modes are told of a layer; its generator does not depend on other layers."""
        generator = torch.Generator().manual_seed(self.plan.recipe.seed * 1_000_003 + number)
        return Layer(number, generator, self.fitted_tokens, difficulty)

    def _layer(self, number: int, shards: int, difficulty: torch.Tensor | None) -> dict:
        """Convert a layer and write its shard; what the receipt says of it."""
        plan = self.plan
        layer = self.layer(number, difficulty)
        statistics, probes = self._observe(layer)
        with plan.checkpoint.open() as read:
            weights = self._read_layer(number, read)
            converted = plan.mode.convert(layer, weights, statistics) if self._changes(weights) else Converted(weights)
            tensors = plan.target.write_layer(number, converted.weights)
            squares = converted.squares
            del weights, converted, statistics
        notes = {"layer": number, **self._check(number, tensors, probes)}
        if squares:
            whole, without, refitted = torch.stack(squares).sum(0).tolist()
            notes["calibration_error_without_refit"] = math.sqrt(without / whole) if whole else 0.0
            notes["calibration_error"] = math.sqrt(refitted / whole) if whole else 0.0
        prefix = f"model.layers.{number}."
        self.staging.add_shard(2 + number, shards, lambda: {prefix + name: t for name, t in tensors.items()})
        return notes

    def _read_layer(self, number: int, read: Callable[[str], torch.Tensor]) -> LayerWeights:
        prefix = f"model.layers.{number}."
        return self.plan.source.read_layer(number, lambda name: read(prefix + name), self._names(number))

    def _changes(self, weights: LayerWeights) -> bool:
        """Whether the mode has something to convert: not in the layers of a mixture that are dense."""
        return weights.expert is not None or self.plan.mode.takes == "dense"

    def _observe(self, layer: Layer) -> tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run a layer of the source: what the mode makes of it, and input and output of the feed-forward for each
        batch held out."""
        number, stream, probes = layer.number, self.source_stream, []
        statistics, ran = None, False
        with self._window(number, self.plan.source, self._source_state(number)) as decoder:

            def run(observing: Callable[[nn.Module], AbstractContextManager] = nullcontext):
                nonlocal ran
                with observing(decoder):
                    for batch in tqdm(range(self.fitted), "calibration", leave=False, disable=not self.progress):
                        states = self._forward(decoder, stream.load(number, batch))
                        if not ran:
                            stream.save(number + 1, batch, states)
                ran = True

            with self.plan.checkpoint.open() as read:
                weights = self._read_layer(number, read)
                if self._changes(weights):
                    statistics = self.plan.mode.observe(layer, weights, run)
                del weights
            if not ran:
                run()
            decoder.layers[0].mlp.register_forward_hook(
                lambda module, args, output: probes.append((args[0].cpu(), output.cpu()))
            )
            for batch in range(self.fitted, len(self.batches)):
                stream.save(number + 1, batch, self._forward(decoder, stream.load(number, batch)))
        return statistics, probes

    def _check(self, number: int, tensors: dict[str, torch.Tensor], probes: list) -> dict:
        """Run a layer of the result: its error where the source's feed-forward had the same input, and the experts
        that no token came to."""
        target, stream, chosen = self.plan.target, self.target_stream, []
        state = target.module_state(number, tensors.__getitem__, list(tensors))
        with self._window(number, target, state) as decoder:
            feed_forward = decoder.layers[0].mlp
            missed = sum(
                (feed_forward(x.to(self.device)).cpu() - y).square().sum(dtype=torch.float64) for x, y in probes
            )
            routed = hasattr(feed_forward, "gate")
            if routed:
                feed_forward.gate.register_forward_hook(
                    lambda module, args, output: chosen.append(output[2].flatten())
                )
            for batch in range(self.fitted, len(self.batches)):
                stream.save(number + 1, batch, self._forward(decoder, stream.load(number, batch)))
            experts = feed_forward.experts.num_experts if routed else 0
        whole = sum(y.square().sum(dtype=torch.float64) for _, y in probes)
        counts = torch.cat(chosen).bincount(minlength=experts)[:experts] if routed else torch.empty(0)
        return {
            "relative_error": math.sqrt(missed / whole) if whole else 0.0,
            "dead_experts": (counts == 0).nonzero().flatten().tolist(),
        }

    def _difficulty(self) -> torch.Tensor:
        """[T] loss of the source at each calibration token; where no token follows, the mean."""
        path = self.staging.scratch / "difficulty.safetensors"
        if path.exists():
            return load_file(path)["losses"]
        stream = Stream(self.staging.scratch, "plain")
        for number in tqdm(range(self.layers), "difficulty of tokens", disable=not self.progress):
            before = stream if number else self.source_stream
            with self._window(number, self.plan.source, self._source_state(number)) as decoder:
                for batch in range(self.fitted):
                    stream.save(number + 1, batch, self._forward(decoder, before.load(number, batch)))
            stream.drop(number)
        losses = []
        for batch in range(self.fitted):
            for targets, logits in self._logits(self.batches[batch], stream.load(self.layers, batch)):
                losses.append(F.cross_entropy(logits, targets, reduction="none"))
        stream.drop(self.layers)
        losses_T = torch.cat(losses)
        followed = torch.cat([self._targets(ids) for ids in self.batches[: self.fitted]]) >= 0
        losses_T[~followed] = losses_T[followed].mean()
        save_file({"losses": losses_T}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        return losses_T

    @staticmethod
    def _targets(ids: torch.Tensor) -> torch.Tensor:
        return F.pad(ids[:, 1:], (0, 1), value=-100).flatten()

    def _logits(self, ids: torch.Tensor, *states: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Targets [t], and logits [t, V] of each of `states`, a few tokens at a time."""
        with self.plan.checkpoint.open() as read:
            head = read(_EMBEDDING if self.plan.source.config.tie_word_embeddings else _HEAD)
            step = max(64, _LOGITS // head.shape[0])
            parts = (self._targets(ids), *(s.flatten(0, 1) for s in states))
            for targets, *some in zip(*(part.split(step) for part in parts), strict=True):
                logits = (torch.cat([F.linear(s, rows.float()) for rows in head.split(8192)], -1) for s in some)
                yield targets, *logits

    def _report(self, layers: list[dict]) -> dict:
        plan, recipe = self.plan, self.plan.recipe
        comparison = LogitComparison()
        for batch in range(self.fitted, len(self.batches)):
            states = [stream.load(self.layers, batch) for stream in (self.source_stream, self.target_stream)]
            for logits in self._logits(self.batches[batch], *states):
                comparison.add(*logits)
        calibration = {"dataset": recipe.calibration, "tokens": self.fitted_tokens} if self.tokens.text else None
        report = {
            "mode": plan.mode.name,
            "exact": plan.mode.exact,
            "reason": plan.mode.reason,
            "source": {"path": recipe.source, "revision": plan.revision, "model_type": plan.source.model_type},
            "parameters": {
                when: {"total": counts.total, "activated": counts.activated}
                for when, counts in (("before", plan.before), ("after", plan.after))
            },
            "bytes_written": self.staging.size,
            "layers": layers,
            "logits": comparison.result(self.tokens.text),
            "check": {
                "tokens": self.tokens.held_out * self.tokens.ids.shape[1],
                "text": "calibration" if self.tokens.text else "random",
            },
            "calibration": calibration,
        }
        report["failures"] = judge(report, recipe.max_kl)
        report["passed"] = not report["failures"]
        return report

    def _finish(self, report: dict):
        plan, folder = self.plan, self.staging.folder
        for pattern in SIDE_FILES:
            for file in plan.folder.glob(pattern):
                target = folder / file.relative_to(plan.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
        resolved = replace(plan.recipe, revision=plan.revision)
        write_file(folder / "conversion_recipe.yaml", resolved.to_yaml())
        write_file(folder / "conversion_report.json", json.dumps(report, indent=2) + "\n")
        write_file(folder / "README.md", model_card(report))
        self.staging.finish(lambda: self._write_config(folder))

    def _write_config(self, folder: Path):
        plan, config = self.plan, self.plan.target.config
        if not isinstance(plan.target, MoHGE):
            fields = dict(plan.source.config.source_config)
            if config.dtype != plan.source.config.dtype:  # it has been trained in another one since
                fields.pop("torch_dtype", None)
                fields["dtype"] = str(plan.source.config.dtype).removeprefix("torch.")
            write_file(folder / "config.json", json.dumps(fields, indent=2) + "\n")
            return
        if not isinstance(plan.source, MoHGE):
            config.source_config = plan.fields
        config.architectures, config.auto_map = ["MoHGEForCausalLM"], dict(AUTO_MAP)
        save_code(folder)
        config.save_pretrained(folder)
