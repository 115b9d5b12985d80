"""The conversion itself: layer by layer calibrate, convert, check and write."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from mohge.model_cards.card import make_card
from mohge.modeling_mohge import AUTO_MAP, save_code

from .architectures import Architecture, LayerWeights, MoHGE
from .calibration import Tokens, random_tokens, read_tokens
from .checkpoint import SIDE_FILES
from .modes import Converted, Layer
from .plan import Plan
from .receipt import LogitComparison, make_report
from .staging import Staging, write_file
from .window import Stream, layer_window


_BATCH_TOKENS = 4096
_LOGITS = 2**24
"""Most logits of a model that are computed at once, for large vocabularies."""
_EMBEDDING, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


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
    if plan.recipe.calibration is None:
        tokens = random_tokens(plan.source, plan.recipe.seed)
    else:
        tokens = read_tokens(plan.recipe, plan.checkpoint.folder, plan.source.config, plan.mode.observes)
        fitted = tokens.ids[: -tokens.held_out].numel()
        if plan.mode.observes and fitted < plan.target.config.num_experts:
            raise ValueError(
                f"`calibration_tokens` leaves {fitted} tokens for {plan.target.config.num_experts} experts: raise it"
            )
    shards = plan.source.config.num_hidden_layers + 2
    staging = Staging(Path(plan.recipe.output), shards, _identity(plan, tokens))
    try:
        with ThreadPoolExecutor(1) as writer:
            return _Conversion(plan, tokens, staging, writer, progress).run()
    finally:
        staging.close()


def _identity(plan: Plan, tokens: Tokens) -> str:
    """What has to be the same for a run to go on with the work of another."""
    sources = {file: (plan.checkpoint.folder / file).stat() for file in plan.checkpoint.order}
    places = torch.arange(1, tokens.ids.numel() + 1).view_as(tokens.ids)
    facts = {
        "recipe": plan.recipe.to_yaml(),
        "config": plan.fields,
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in sources.items()},
        "tokens": [*tokens.ids.shape, (tokens.ids * places).sum().item()],
    }
    return json.dumps(facts, indent=1)


class _Conversion:
    def __init__(self, plan: Plan, tokens: Tokens, staging: Staging, writer: ThreadPoolExecutor, progress: bool):
        self.plan, self.tokens, self.staging, self.progress = plan, tokens, staging, progress
        # Writes, one after the other, while the next thing is computed: the disk and the processor need not wait for
        # each other. Tensors are let go before the next layer is read.
        self.writer = writer
        self.checkpoint, self.device = plan.checkpoint, plan.recipe.device
        self.layers = plan.source.config.num_hidden_layers
        # What enters a layer of the source, of the result, and what enters and leaves the source's feed-forward.
        self.source, self.target = Stream(staging.scratch, "source"), Stream(staging.scratch, "target")
        self.entering, self.leaving = Stream(staging.scratch, "entering"), Stream(staging.scratch, "leaving")
        sequences = max(1, _BATCH_TOKENS // tokens.ids.shape[1])
        fitted, held_out = tokens.ids.split([len(tokens.ids) - tokens.held_out, tokens.held_out])
        self.batches = [batch for part in (fitted, held_out) for batch in part.split(sequences) if len(batch)]
        self.fitted = range(-(-len(fitted) // sequences))
        """Batches that statistics are taken over."""
        self.held_out = range(len(self.fitted), len(self.batches))
        self.fitted_tokens = fitted.numel()

    def run(self) -> dict:
        plan, staging = self.plan, self.staging
        sealed = self._copy_shard(1, [_EMBEDDING])
        self._embed()
        difficulty = self._difficulty() if plan.mode.needs_difficulty else None
        reports = [staging.scratch / f"layer-{number}.json" for number in range(self.layers)]
        for number in tqdm(range(self.layers), "layers", disable=not self.progress):
            if not reports[number].exists():
                notes = self._layer(number, difficulty)
                sealed.append(self.writer.submit(self._seal, number, reports[number], notes))
        last = [_NORM] if plan.target.config.tie_word_embeddings else [_NORM, _HEAD]
        sealed += self._copy_shard(self.layers + 2, last)
        for future in sealed:
            future.result()
        layers = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
        logits = self._compare_logits().result(self.tokens.text)
        report = make_report(plan, self.tokens, self.fitted_tokens, staging.index(), layers, logits)
        self._finish(report)
        return report

    def _seal(self, number: int, report: Path, notes: dict):
        """A layer counts as done when its report is there."""
        self.staging.seal_shard(2 + number)
        write_file(report, json.dumps(notes))
        for stream in (self.source, self.target, self.entering, self.leaving):
            stream.drop(number)

    def _copy_shard(self, number: int, names: list[str]) -> list[Future]:
        """Write a shard of tensors that stay as they are; what remains to be waited for."""
        if self.staging.has_shard(number):
            return []
        with self.checkpoint.open() as read:
            self.staging.write_shard(number, {name: read(name) for name in names})
        return [self.writer.submit(self.staging.seal_shard, number)]

    def _embed(self):
        """The states that enter the first layer."""
        if (self.staging.scratch / "layer-0.json").exists():
            return
        with self.checkpoint.open() as read:
            embedding = read(_EMBEDDING)
            for batch, ids in enumerate(self.batches):
                states = F.embedding(ids, embedding)
                self.source.save(0, batch, states)
                if batch in self.held_out:
                    self.target.save(0, batch, states)

    @contextmanager
    def _window(self, number: int, architecture: Architecture, state: dict[str, torch.Tensor]) -> Iterator[nn.Module]:
        norm = None
        if number == self.layers - 1:
            with self.checkpoint.open() as read:
                norm = read(_NORM).clone()
        with layer_window(architecture, number, state, norm, self.device) as decoder:
            yield decoder

    def _source_state(self, number: int) -> dict[str, torch.Tensor]:
        with self.checkpoint.open_layer(number) as (read, names):
            return self.plan.source.module_state(number, read, names)

    def _forward(self, decoder: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return decoder(inputs_embeds=states.to(self.device), use_cache=False).last_hidden_state

    def layer(self, number: int, difficulty: torch.Tensor | None) -> Layer:
        """What modes are told of a layer; its generator does not depend on other layers."""
        generator = torch.Generator().manual_seed(self.plan.recipe.seed * 1_000_003 + number)
        return Layer(number, generator, self.fitted_tokens, difficulty, self.device)

    def _layer(self, number: int, difficulty: torch.Tensor | None) -> dict:
        """Convert a layer and write its shard; what the receipt says of it."""
        layer = self.layer(number, difficulty)
        statistics = self.observe(layer)
        tensors, squares = self._convert(layer, statistics)
        del statistics
        prefix = f"model.layers.{number}."
        named = {prefix + name: tensor for name, tensor in tensors.items()}
        writing = self.writer.submit(self.staging.write_shard, 2 + number, named)
        notes = {"layer": number, **self._check(number, tensors)}
        writing.result()
        if squares:
            whole, without, refitted = torch.stack(squares).sum(0).tolist()
            notes["calibration_error_without_refit"] = math.sqrt(without / whole) if whole else 0.0
            notes["calibration_error"] = math.sqrt(refitted / whole) if whole else 0.0
        return notes

    def _convert(self, layer: Layer, statistics: Any) -> tuple[dict[str, torch.Tensor], list[torch.Tensor] | None]:
        plan, number = self.plan, layer.number
        with self.checkpoint.open_layer(number) as (read, names):
            weights = plan.source.read_layer(number, read, names)
            converted = plan.mode.convert(layer, weights, statistics) if self._changes(weights) else Converted(weights)
            return plan.target.write_layer(number, converted.weights), converted.squares

    def _changes(self, weights: LayerWeights) -> bool:
        """Whether the mode has something to convert: not in the layers of a mixture that are dense."""
        return weights.expert is not None or self.plan.mode.takes == "dense"

    def observe(self, layer: Layer) -> Any:
        """Run a layer of the source on all tokens; what the mode makes of those that are not held out."""
        number, statistics, ran = layer.number, None, False
        with self._window(number, self.plan.source, self._source_state(number)) as decoder:

            def run(observing: Callable[[nn.Module], AbstractContextManager] = nullcontext):
                nonlocal ran
                with observing(decoder):
                    for batch in tqdm(self.fitted, "calibration", leave=False, disable=not self.progress):
                        states = self._forward(decoder, self.source.load(number, batch))
                        if not ran:
                            self.source.save(number + 1, batch, states)
                ran = True

            with self.checkpoint.open_layer(number) as (read, names):
                weights = self.plan.source.read_layer(number, read, names)
                if self._changes(weights):
                    statistics = self.plan.mode.observe(layer, weights, run)
                del weights
            if not ran:
                run()
            for batch in self.held_out:

                def keep(module, args, output, batch=batch):
                    self.entering.save(number, batch, args[0])
                    self.leaving.save(number, batch, output)

                hook = decoder.layers[0].mlp.register_forward_hook(keep)
                self.source.save(number + 1, batch, self._forward(decoder, self.source.load(number, batch)))
                hook.remove()
        return statistics

    def _check(self, number: int, tensors: dict[str, torch.Tensor]) -> dict:
        """Run a layer of the result: its error where the source's feed-forward had the same input, and the experts
        that no token came to."""
        target, chosen = self.plan.target, []
        whole = missed = torch.zeros((), dtype=torch.float64)
        state = target.module_state(number, tensors.__getitem__, list(tensors))
        with self._window(number, target, state) as decoder:
            feed_forward = decoder.layers[0].mlp
            for batch in self.held_out:
                output = feed_forward(self.entering.load(number, batch).to(self.device)).cpu()
                expected = self.leaving.load(number, batch)
                whole = whole + expected.square().sum(dtype=torch.float64)
                missed = missed + (output - expected).square().sum(dtype=torch.float64)
            routed = hasattr(feed_forward, "gate")
            if routed:
                feed_forward.gate.register_forward_hook(
                    lambda module, args, output: chosen.append(output[2].flatten())
                )
            for batch in self.held_out:
                self.target.save(number + 1, batch, self._forward(decoder, self.target.load(number, batch)))
            experts = feed_forward.experts.num_experts if routed else 0
        counts = torch.cat(chosen).bincount(minlength=experts)[:experts] if routed else torch.empty(0)
        return {
            "relative_error": (missed / whole).sqrt().item() if whole else missed.item(),
            "dead_experts": (counts == 0).nonzero().flatten().tolist(),
        }

    def _difficulty(self) -> torch.Tensor:
        """[T] loss of the source at each calibration token; where no token follows, the mean."""
        path = self.staging.scratch / "difficulty.safetensors"
        if path.exists():
            return load_file(path)["losses"]
        stream = Stream(self.staging.scratch, "plain")
        for number in tqdm(range(self.layers), "difficulty of tokens", disable=not self.progress):
            before = stream if number else self.source
            with self._window(number, self.plan.source, self._source_state(number)) as decoder:
                for batch in self.fitted:
                    stream.save(number + 1, batch, self._forward(decoder, before.load(number, batch)))
            stream.drop(number)
        losses = []
        for batch in self.fitted:
            for targets, logits in self._logits(self.batches[batch], stream.load(self.layers, batch)):
                losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        stream.drop(self.layers)
        losses_T = torch.cat(losses)
        followed = torch.cat([_targets(self.batches[batch]) for batch in self.fitted]) >= 0
        losses_T[~followed] = losses_T[followed].mean()
        save_file({"losses": losses_T}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        return losses_T

    def _compare_logits(self) -> LogitComparison:
        comparison = LogitComparison()
        for batch in self.held_out:
            states = [stream.load(self.layers, batch) for stream in (self.source, self.target)]
            for logits in self._logits(self.batches[batch], *states):
                comparison.add(*logits)
        return comparison

    def _logits(self, ids: torch.Tensor, *states: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Targets [t], and logits [t, V] of each of `states`, a few tokens at a time."""
        with self.checkpoint.open() as read:
            head = read(_EMBEDDING if self.plan.source.config.tie_word_embeddings else _HEAD).to(self.device)
            step = max(64, _LOGITS // head.shape[0])
            parts = (_targets(ids), *(s.flatten(0, 1) for s in states))
            for part in zip(*(part.to(self.device).split(step) for part in parts), strict=True):
                logits = (torch.cat([F.linear(s, rows.float()) for rows in head.split(8192)], -1) for s in part[1:])
                yield part[0], *logits

    def _finish(self, report: dict):
        plan, folder = self.plan, self.staging.folder
        for pattern in SIDE_FILES:
            for file in filter(Path.is_file, self.checkpoint.folder.glob(pattern)):
                copied = folder / file.relative_to(self.checkpoint.folder)
                copied.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copied)
        write_file(folder / "conversion_recipe.yaml", plan.mode.resolved(plan.revision).to_yaml())
        write_file(folder / "conversion_report.json", json.dumps(report, indent=2) + "\n")
        config = plan.target.config if isinstance(plan.target, MoHGE) else None
        write_file(folder / "README.md", str(make_card(folder, Path(plan.recipe.output).name, config)))
        if isinstance(plan.target, MoHGE):
            save_code(folder)
        self.staging.finish(self._write_config)

    def _write_config(self, folder: Path):
        plan, config = self.plan, self.plan.target.config
        if not isinstance(plan.target, MoHGE):
            fields = dict(plan.source.config.source_config)
            if config.dtype != self.checkpoint.dtype:  # it has been trained in another one since
                fields.pop("torch_dtype", None)
                fields["dtype"] = str(self.checkpoint.dtype).removeprefix("torch.")
            write_file(folder / "config.json", json.dumps(fields, indent=2) + "\n")
            return
        if not isinstance(plan.source, MoHGE):
            config.source_config = plan.fields
        config.architectures, config.auto_map = ["MoHGEForCausalLM"], dict(AUTO_MAP)
        config.save_pretrained(folder)


def _targets(ids: torch.Tensor) -> torch.Tensor:
    """The token that follows each token of `ids` [B, S], -100 for none; flat."""
    return F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
