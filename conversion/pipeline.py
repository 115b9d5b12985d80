"""The conversion itself: layer by layer calibrate, convert, check and write."""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from mohge.backbones_mohge import FeedForward
from mohge.info import parameter_counts
from mohge.model_cards.card import make_card
from mohge.model_cards.folder import copy_side_files
from mohge.model_cards.writing import write_file
from mohge.modeling_mohge import AUTO_MAP, save_code

from .calibration import Tokens, random_tokens, read_tokens
from .decoders import Decoder, LayerWeights, MoHGE, Passed
from .gradients import neuron_saliency
from .modes import Converted, Layer
from .plan import Plan
from .receipt import LogitComparison, make_report
from .staging import Staging
from .streams import Stream
from .tokenizer import about, compare


_BATCH_TOKENS = 4096
_LOGITS = 2**24
"""Most logits of a model that are computed at once, for large vocabularies."""


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
        tokens = read_tokens(plan.recipe, plan.tokenizer, plan.source.config, plan.mode.observes)
        fitted = tokens.ids[: -tokens.held_out].numel()
        if plan.mode.observes and fitted < plan.target.config.num_experts:
            raise ValueError(
                f"`calibration_tokens` leaves {fitted} tokens for {plan.target.config.num_experts} experts: raise it"
            )
    shards = plan.source.num_layers + 1
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
        self.device, self.layers = plan.recipe.device, plan.source.num_layers
        # What comes before a layer of the source, of the result, and what enters and leaves the source's feed-forward.
        self.source, self.target = Stream(staging.scratch, "source"), Stream(staging.scratch, "target")
        self.entering, self.leaving = Stream(staging.scratch, "entering"), Stream(staging.scratch, "leaving")
        sequences = max(1, _BATCH_TOKENS // tokens.ids.shape[1])
        fitted, held_out = tokens.ids.split([len(tokens.ids) - tokens.held_out, tokens.held_out])
        self.batches = [batch for part in (fitted, held_out) for batch in part.split(sequences) if len(batch)]
        self.fitted = range(-(-len(fitted) // sequences))
        """Batches that statistics are taken over."""
        self.held_out = range(len(self.fitted), len(self.batches))
        self.batches = [batch.to(self.device) for batch in self.batches]
        self.fitted_tokens = fitted.numel()

    def run(self) -> dict:
        plan, staging = self.plan, self.staging
        folder = staging.prepare()
        if plan.mode.needs_saliency:
            plan.mode.survey(self._saliency())
            plan.after = parameter_counts(plan.target.equivalent)
        tokenizer = self._write_side_files(folder)
        with plan.tensors.open() as read:
            outer = {name: read(name) for name in plan.source.outer_names}
        sealed = self._copy_outer(outer)
        for decoder in (plan.source, plan.target):
            decoder.load_outer(outer, self.device)
        difficulty = self._difficulty() if plan.mode.needs_difficulty else None
        reports = [staging.scratch / f"layer-{number}.json" for number in range(self.layers)]
        for number in tqdm(range(self.layers), "layers", disable=not self.progress):
            if not reports[number].exists():
                notes = self._layer(number, difficulty)
                sealed.append(self.writer.submit(self._seal, number, reports[number], notes))
        for future in sealed:
            future.result()
        layers = [json.loads(report.read_text(encoding="utf-8")) for report in reports]
        logits = self._compare_logits().result(self.tokens.text)
        report = make_report(plan, self.tokens, self.fitted_tokens, staging.index(), layers, logits, tokenizer)
        write_file(folder / "conversion_recipe.yaml", plan.mode.resolved(plan.revision).to_yaml())
        write_file(folder / "conversion_report.json", json.dumps(report, indent=2) + "\n")
        config = plan.target.config if isinstance(plan.target, MoHGE) else None
        write_file(folder / "README.md", str(make_card(folder, Path(plan.recipe.output).name, config)))
        staging.finish()
        return report

    def _seal(self, number: int, report: Path, notes: dict):
        """A layer counts as done when its report is there."""
        self.staging.seal_shard(2 + number)
        write_file(report, json.dumps(notes))
        for stream in (self.source, self.target, self.entering, self.leaving):
            stream.drop(number)

    def _copy_outer(self, tensors: dict[str, torch.Tensor]) -> list[Future]:
        """Write the first shard, of the tensors outside of the layers; what remains to be waited for."""
        if self.staging.has_shard(1):
            return []
        self.staging.write_shard(1, self.plan.mode.on_disk(tensors))
        return [self.writer.submit(self.staging.seal_shard, 1)]

    def _advance(self, decoder: Decoder, number: int, batch: int, stream: Stream) -> tuple:
        """The fields of [`Passed`]: what a layer makes of a batch."""
        before = Passed(*stream.load(number, batch)) if number else None
        return tuple(decoder.run(number, self.batches[batch], before))

    def layer(self, number: int, difficulty: torch.Tensor | None) -> Layer:
        """What modes are told of a layer; its generator does not depend on other layers."""
        generator = torch.Generator().manual_seed(self.plan.recipe.seed * 1_000_003 + number)
        return Layer(number, self.plan.source.block(number), generator, self.fitted_tokens, difficulty, self.device)

    def _layer(self, number: int, difficulty: torch.Tensor | None) -> dict:
        """Convert a layer and write its shard; what the receipt says of it."""
        plan, layer = self.plan, self.layer(number, difficulty)
        state = plan.tensors.layer(number)
        weights = plan.source.read_layer(number, state)
        statistics = self.observe(layer, state, weights)
        converted = Converted(weights) if weights.expert is None else plan.mode.convert(layer, weights, statistics)
        tensors, squares = plan.target.write_layer(number, converted.weights), converted.squares
        del state, weights, statistics, converted
        prefix = f"{plan.target.prefix}{number}."
        named = plan.mode.on_disk({prefix + name: tensor for name, tensor in tensors.items()})
        writing = self.writer.submit(self.staging.write_shard, 2 + number, named)
        notes = {"layer": number, **self._check(number, tensors)}
        writing.result()
        if squares:
            whole, without, refitted = torch.stack(squares).sum(0).tolist()
            notes["calibration_error_without_refit"] = math.sqrt(without / whole) if whole else 0.0
            notes["calibration_error"] = math.sqrt(refitted / whole) if whole else 0.0
        return notes

    def observe(self, layer: Layer, state: dict[str, torch.Tensor], weights: LayerWeights) -> Any:
        """Run a layer of the source on all tokens; what the mode makes of those that are not held out."""
        number, source, statistics, ran = layer.number, self.plan.source, None, False
        with source.layer(number, state, self.device) as found:

            def run(observing: Callable[[FeedForward], AbstractContextManager] = lambda found: nullcontext()):
                nonlocal ran
                with observing(found):
                    for batch in tqdm(self.fitted, "calibration", leave=False, disable=not self.progress):
                        states = self._advance(source, number, batch, self.source)
                        if not ran:
                            self.source.save(number + 1, batch, states)
                ran = True

            if weights.expert is not None:
                statistics = self.plan.mode.observe(layer, weights, run)
            if not ran:
                run()
            for batch in self.held_out:

                def keep(module, args, kwargs, output, batch=batch):
                    self.entering.save(number, batch, (args, kwargs))
                    self.leaving.save(number, batch, _states(output))

                hook = _measured(found).register_forward_hook(keep, with_kwargs=True)
                self.source.save(number + 1, batch, self._advance(source, number, batch, self.source))
                hook.remove()
        return statistics

    def _check(self, number: int, tensors: dict[str, torch.Tensor]) -> dict:
        """Run a layer of the result: its error where the source's feed-forward had the same input, and the experts
        that no token came to."""
        target = self.plan.target
        whole = missed = torch.zeros((), dtype=torch.float64)
        with target.layer(number, tensors, self.device) as found:
            for batch in self.held_out:
                args, kwargs = send_to_device(self.entering.load(number, batch), self.device)
                output, expected = _states(_measured(found)(*args, **kwargs)).cpu(), self.leaving.load(number, batch)
                whole = whole + expected.square().sum(dtype=torch.float64)
                missed = missed + (output - expected).square().sum(dtype=torch.float64)
            chosen = []
            experts = 0 if found.experts is None else found.experts.num_experts
            if experts:
                hook = found.experts.register_forward_pre_hook(lambda module, args: chosen.append(args[1].flatten()))
            for batch in self.held_out:
                self.target.save(number + 1, batch, self._advance(target, number, batch, self.target))
            if experts:
                hook.remove()
        counts = torch.cat(chosen).bincount(minlength=experts)[:experts] if experts else torch.empty(0)
        return {
            "relative_error": (missed / whole).sqrt().item() if whole else missed.item(),
            "dead_experts": (counts == 0).nonzero().flatten().tolist(),
        }

    def _saliency(self) -> torch.Tensor:
        """See `neuron_saliency`; kept, as a run that goes on must come to the same layout."""
        path = self.staging.scratch / "saliency.safetensors"
        if not path.exists():
            saliency_LD = neuron_saliency(self.plan.checkpoint.folder, self.tokens.ids[: -self.tokens.held_out])
            save_file({"saliency": saliency_LD}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        return load_file(path)["saliency"]

    def _difficulty(self) -> torch.Tensor:
        """[T] loss of the source at each calibration token; where no token follows, the mean."""
        path = self.staging.scratch / "difficulty.safetensors"
        if path.exists():
            return load_file(path)["losses"]
        stream = Stream(self.staging.scratch, "plain")
        for number in tqdm(range(self.layers), "difficulty of tokens", disable=not self.progress):
            with self.plan.source.layer(number, self.plan.tensors.layer(number), self.device):
                for batch in self.fitted:
                    stream.save(number + 1, batch, self._advance(self.plan.source, number, batch, stream))
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
            last = [stream.load(self.layers, batch) for stream in (self.source, self.target)]
            for logits in self._logits(self.batches[batch], *last):
                comparison.add(*logits)
        return comparison

    def _logits(self, ids: torch.Tensor, *last: tuple) -> Iterator[tuple[torch.Tensor, ...]]:
        """Targets [t], and the logits [t, V] that follow from each of `last`, a few tokens at a time."""
        source, targets = self.plan.source, _targets(ids).view_as(ids)
        step = max(1, _LOGITS // source.config.vocab_size // len(ids))
        for positions in torch.arange(ids.shape[1], device=self.device).split(step):
            logits = (source.logits(ids, Passed(*passed), positions).flatten(0, 1) for passed in last)
            yield targets[:, positions].flatten(), *logits

    def _write_side_files(self, folder: Path) -> dict | None:
        """Write config, code, tokenizer and what else belongs to a model; what the receipt says of the tokenizer."""
        source, tokenizer = self.plan.checkpoint.folder, self.plan.tokenizer
        self._write_config(folder)
        copy_side_files(source, folder)
        if tokenizer is None:
            return None
        # AutoTokenizer decides by the model's kind too, which changes: what it has chosen is named. The files stay, as
        # a class does not save all that it reads.
        fields = get_tokenizer_config(source) | {"tokenizer_class": type(tokenizer).__name__}
        write_file(folder / "tokenizer_config.json", json.dumps(fields, indent=2, ensure_ascii=False) + "\n")
        return about(tokenizer, self.plan.source.config.vocab_size) | compare(tokenizer, folder)

    def _write_config(self, folder: Path):
        plan, config = self.plan, self.plan.target.config
        if not isinstance(plan.target, MoHGE):
            fields = {name: value for name, value in plan.source.config.source_config.items() if name != "auto_map"}
            if config.dtype != self.plan.checkpoint.dtype:  # it has been trained in another one since
                fields.pop("torch_dtype", None)
                fields["dtype"] = str(self.plan.checkpoint.dtype).removeprefix("torch.")
            write_file(folder / "config.json", json.dumps(fields, indent=2) + "\n")
            return
        if not isinstance(plan.source, MoHGE):
            config.source_config = plan.fields
        config.architectures, config.auto_map = ["MoHGEForCausalLM"], dict(AUTO_MAP)
        config.save_pretrained(folder)
        save_code(folder)


def _measured(found: FeedForward) -> nn.Module:
    """What is compared of a feed-forward: all of it, or where it lies beside a dense one, its experts."""
    return found.module if found.name else found.experts


def _states(output: torch.Tensor | tuple) -> torch.Tensor:
    """The states that a feed-forward returns, some with router logits beside them."""
    return output[0] if isinstance(output, tuple) else output


def _targets(ids: torch.Tensor) -> torch.Tensor:
    """The token that follows each token of `ids` [B, S], -100 for none; flat."""
    return F.pad(ids[:, 1:], (0, 1), value=-100).flatten()
