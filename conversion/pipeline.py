"""The conversion itself: layer by layer calibrate, convert, check and write."""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from mohge.backbones_mohge import FeedForward
from mohge.model_cards.card import draw_widths, make_card
from mohge.model_cards.folder import copy_side_files
from mohge.model_cards.writing import write_file
from mohge.modeling_mohge import AUTO_MAP, save_code

from .calibration import Tokens, random_tokens, read_tokens
from .decoders import Decoder, LayerWeights, MoHGE, Passed, targets_of
from .modes import Layer
from .plan import Plan
from .receipt import LogitComparison, make_report
from .saliency import Survey
from .staging import Staging
from .streams import Stream
from .tokenizer import about, compare


_BATCH_TOKENS = 4096


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
    tokens = _tokens(plan)
    shards = plan.source.num_layers + 1
    staging = Staging(Path(plan.recipe.output), shards, _identity(plan, tokens))
    try:
        with ThreadPoolExecutor(1) as writer:
            return _Conversion(plan, tokens, staging, writer, progress).run()
    finally:
        staging.close()


def settle(plan: Plan, progress: bool = False):
    """
    Find out what `plan.target` is where that takes calibration tokens, and write nothing.

    Raises:
        ValueError: if the calibration data does not do.
    """
    if plan.mode.criterion is None:
        return
    with TemporaryDirectory() as folder, torch.no_grad():
        with plan.tensors.open() as read:
            plan.source.load_outer({name: read(name) for name in plan.source.outer_names}, plan.recipe.device)
        tokens = _tokens(plan)
        batches = _batches(tokens.ids[: -tokens.held_out], plan.recipe.device) if plan.mode.observes else []
        _survey(plan, batches, Path(folder), progress)


def _survey(
    plan: Plan, batches: list[torch.Tensor], folder: Path, progress: bool, keeps_statistics: bool = False
) -> Survey:
    survey = Survey(
        plan.source,
        plan.tensors,
        batches,
        folder,
        plan.recipe.device,
        refits=plan.mode.refits,
        keeps=keeps_statistics,
        progress=progress,
    )
    plan.mode.settle(survey.measure(plan.mode.criterion), sum(batch.numel() for batch in batches))
    return survey


def _tokens(plan: Plan) -> Tokens:
    if plan.recipe.calibration is None:
        return random_tokens(plan.source, plan.recipe.seed)
    tokens = read_tokens(plan.recipe, plan.tokenizer, plan.source.config, plan.mode.observes)
    if plan.mode.observes:
        fitted = tokens.ids[: -tokens.held_out].numel()
        experts = max(layer.num_experts for layer in plan.target.config.sparse_layers)
        if fitted < experts:
            raise ValueError(f"`calibration_tokens` leaves {fitted} tokens for {experts} experts: raise it")
    return tokens


def _batches(ids: torch.Tensor, device: str) -> list[torch.Tensor]:
    return [batch.to(device) for batch in ids.split(max(1, _BATCH_TOKENS // ids.shape[1])) if len(batch)]


def _identity(plan: Plan, tokens: Tokens) -> str:
    """What has to be the same for a run to go on with the work of another."""
    sources = {file: (plan.checkpoint.folder / file).stat() for file in plan.checkpoint.order}
    places = torch.arange(1, tokens.ids.numel() + 1).view_as(tokens.ids)
    facts = {
        "versions": {name: version(name) for name in ("mohge", "torch", "transformers")},
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
        fitted, held_out = tokens.ids.split([len(tokens.ids) - tokens.held_out, tokens.held_out])
        self.batches = _batches(fitted, self.device)
        self.fitted = range(len(self.batches))
        """Batches that statistics are taken over."""
        self.batches += _batches(held_out, self.device)
        self.held_out = range(len(self.fitted), len(self.batches))
        self.fitted_tokens = fitted.numel()

    @torch.no_grad()
    def run(self) -> dict:
        plan, staging = self.plan, self.staging
        with plan.tensors.open() as read:
            outer = {name: read(name) for name in plan.source.outer_names}
        sealed = self._copy_outer(outer)
        plan.source.load_outer(outer, self.device)
        if plan.mode.criterion is not None:
            batches = [self.batches[batch] for batch in self.fitted]
            self.survey = _survey(plan, batches, staging.scratch, self.progress, plan.mode.keeps_statistics)
            if plan.mode.keeps_statistics:
                self.fitted = range(0)
        plan.target.load_outer(outer, self.device)
        folder = staging.prepare()
        tokenizer = self._write_side_files(folder)
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
        if config is not None:
            draw_widths(config, folder)
        staging.finish()
        return report

    def _seal(self, number: int, report: Path, notes: dict):
        """A layer counts as done when its report is there."""
        self.staging.seal_shard(2 + number)
        write_file(report, json.dumps(notes))
        for stream in (self.source, self.target, self.entering, self.leaving):
            stream.drop(number)
        if self.plan.mode.keeps_statistics:
            self.survey.drop(number)

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
        statistics, tokens_before = self.observe(layer, state, weights)
        if weights.expert is None:
            converted = plan.mode.convert_dense(layer, weights)
        else:
            converted = plan.mode.convert(layer, weights, statistics)
        tensors, squares = plan.target.write_layer(number, converted.weights), converted.squares
        del state, weights, statistics, converted
        prefix = f"{plan.target.prefix}{number}."
        named = plan.mode.on_disk({prefix + name: tensor for name, tensor in tensors.items()})
        writing = self.writer.submit(self.staging.write_shard, 2 + number, named)
        notes = {"layer": number, **self._check(number, tensors), "tokens_per_expert_before": tokens_before}
        writing.result()
        if squares:
            whole, without, refitted = torch.stack(squares).sum(0).tolist()
            notes["calibration_error_without_refit"] = math.sqrt(without / whole) if whole else 0.0
            notes["calibration_error"] = math.sqrt(refitted / whole) if whole else 0.0
        return notes

    def observe(self, layer: Layer, state: dict[str, torch.Tensor], weights: LayerWeights) -> tuple[Any, list[int]]:
        """Run a layer of the source on all tokens; what the mode makes of those that are not held out, and how many of
        the others came to each expert."""
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

            if weights.expert is not None and self.plan.mode.keeps_statistics:
                statistics = self.survey.statistics(number)
            elif weights.expert is not None:
                statistics = self.plan.mode.observe(layer, weights, run)
            if not ran:
                run()
            with _counting(source, found) as counts:
                for batch in self.held_out:

                    def keep(module, args, kwargs, output, batch=batch):
                        self.entering.save(number, batch, (args, kwargs))
                        self.leaving.save(number, batch, _states(output))

                    hook = _measured(found).register_forward_hook(keep, with_kwargs=True)
                    self.source.save(number + 1, batch, self._advance(source, number, batch, self.source))
                    hook.remove()
        return statistics, counts.tolist()

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
            with _counting(target, found) as counts:
                for batch in self.held_out:
                    self.target.save(number + 1, batch, self._advance(target, number, batch, self.target))
        return {
            "relative_error": (missed / whole).sqrt().item() if whole else missed.item(),
            "dead_experts": (counts == 0).nonzero().flatten().tolist(),
            "tokens_per_expert": counts.tolist(),
        }

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
            for targets, logits in self.plan.source.logits_in_steps(
                self.batches[batch], Passed(*stream.load(self.layers, batch))
            ):
                losses.append(F.cross_entropy(logits, targets, reduction="none").cpu())
        stream.drop(self.layers)
        losses_T = torch.cat(losses)
        followed = torch.cat([targets_of(self.batches[batch]) for batch in self.fitted]) >= 0
        losses_T[~followed] = losses_T[followed].mean()
        save_file({"losses": losses_T}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        return losses_T

    def _compare_logits(self) -> LogitComparison:
        comparison = LogitComparison()
        for batch in self.held_out:
            last = [Passed(*stream.load(self.layers, batch)) for stream in (self.source, self.target)]
            for logits in self.plan.source.logits_in_steps(self.batches[batch], *last):
                comparison.add(*logits)
        return comparison

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
        if plan.recipe.to is not None:
            config.architectures = [type(plan.target.model).__name__]
            config.save_pretrained(folder)
            return
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


@contextmanager
def _counting(decoder: Decoder, found: FeedForward) -> Iterator[torch.Tensor]:
    """Within this context, counts how many tokens come to each routed expert; nothing where there are none."""
    if found.experts is None:
        yield torch.zeros(0, dtype=torch.long)
        return
    counts = torch.zeros(len(decoder.expert_widths(found.layer_idx)), dtype=torch.long)

    def count(module, args):
        counts.add_(args[1].flatten().cpu().bincount(minlength=len(counts))[: len(counts)])

    hook = found.experts.register_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def _states(output: torch.Tensor | tuple) -> torch.Tensor:
    """The states that a feed-forward returns, some with router logits beside them."""
    return output[0] if isinstance(output, tuple) else output
