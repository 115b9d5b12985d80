"""
What unequal widths are worth when a model is compressed: `python -m mohge.conversion.evidence`.

    evidence mixture DENSE OUT --text TEXT      # splits a dense model into 8 equal experts and trains them a little
    evidence measure SOURCE --text TEXT --held-out TEXT --results FILE
    evidence uniform SOURCE OUT --keep F --text TEXT                     # the control of `mohge convert --mode trim`
    evidence compare SOURCE FOLDER... --held-out TEXT --results FILE     # what `mohge convert` made of SOURCE
    evidence task OUT --held-out TEXT           # for `mohge eval FOLDER --tasks continuation --include-path OUT`

`measure` narrows the experts of SOURCE, a mixture or a dense model, in memory, with survey, allocation and refit as in
`mohge convert --mode trim`, and measures perplexity, KL divergence to SOURCE, and both axes: neurons kept, and neurons
used as routed. The calibration text of seed n is the n-th piece of the end of TEXT; `mixture` trains on the beginning.
`compare` also takes what `mohge eval` says of tasks. What FILE has is not measured again.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers import __version__ as TRANSFORMERS

from mohge.backbones_mohge import feed_forwards
from mohge.training.benchmarks.machine import processor

from .allocation import Choices, allocate, choices, even
from .checkpoint import Checkpoint, NamedTensors, read_config
from .decoders import make_decoder
from .pipeline import convert
from .plan import make_plan
from .recipe import load_recipe
from .saliency import Survey
from .statistics import ExpertStatistics, LayerSaliency, observe_experts, refit


LENGTH = 512
"""Tokens of a block, of models that take as many."""
KEEP = (0.9, 0.8, 0.75, 0.6, 0.5)
_OTHERS_AT = (0.75, 0.5)
"""Where the other ways are measured, by one calibration text."""
_PIECE = 36
"""Words of a piece in the task."""
_CALIBRATION = 0.3
"""Share of the text, at its end, that calibration takes its pieces from."""


def blocks(text: Path, folder: Path, count: int, start: float = 0.0) -> torch.Tensor:
    """[count, S] tokens of a text, from the fraction `start` of it on, for the model in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = min(LENGTH, getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", LENGTH))
    characters = text.read_text(encoding="utf-8")
    characters = characters[int(start * len(characters)) :][: count * length * 8]
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]
    step = length - len(first)
    if len(ids) < count * step:
        raise ValueError(f"{text} has too few tokens: give a longer one, or ask for fewer")
    return torch.tensor([first + ids[i * step : (i + 1) * step] for i in range(count)])


class Subject:
    """A model in memory whose experts can be narrowed and brought back."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        self.model.set_experts_implementation("eager")
        self.layers = feed_forwards(self.model)
        self.source = make_decoder(read_config(folder))
        self.tensors = NamedTensors(Checkpoint(folder), self.source)
        self.widths = [self.source.expert_widths(number) for number in range(self.source.num_layers)]
        self.original = [[down.clone() for down in self._downs(number)] for number in range(len(self.layers))]

    def _downs(self, number: int) -> list[torch.Tensor]:
        """[H, W] the down projection of each expert, to be written to."""
        found = self.layers[number]
        if found.experts is None:
            return [[module for module in found.module.modules() if isinstance(module, nn.Linear)][-1].weight]
        experts = found.experts
        if not hasattr(experts, "expert_groups"):
            return [weight.T if experts.is_transposed else weight for weight in experts.down_proj]
        stacks = dict(zip(experts.kept_groups, (down for _, down in experts.groups()), strict=True))
        removed = torch.empty(self.model.config.hidden_size, 0)
        places = zip(experts.expert_groups, experts.expert_slots, strict=True)
        return [stacks[group][slot] if group in stacks else removed for group, slot in places]

    def survey(self, ids: torch.Tensor, criterion: str) -> list[LayerSaliency]:
        """The saliency of every neuron."""
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), self.tensors.open() as read:
            self.source.load_outer({name: read(name) for name in self.source.outer_names}, "cpu")
            batches = list(ids.split(8))
            return Survey(self.source, self.tensors, batches, Path(scratch)).measure(criterion)

    @torch.no_grad()
    def statistics(self, ids: torch.Tensor) -> list[ExpertStatistics]:
        """What the refit needs, of each layer."""
        made = [ExpertStatistics(widths) for widths in self.widths]
        with ExitStack() as stack:
            for found, statistics in zip(self.layers, made, strict=True):
                stack.enter_context(observe_experts(found, statistics))
            for batch in ids.split(8):
                self.model(batch, use_cache=False)
        return made

    @torch.no_grad()
    def narrow(
        self, saliency: list[LayerSaliency], widths: list[list[int]], statistics: list[ExpertStatistics] | None
    ):
        """Leave every expert its most salient neurons, refitted where there are statistics; the columns of the others
        are zero."""
        for number, (layer, kept_widths) in enumerate(zip(saliency, widths, strict=True)):
            for expert, (down, width) in enumerate(zip(self._downs(number), kept_widths, strict=True)):
                kept = layer.kept(expert, width)
                columns = self.original[number][expert][:, kept]
                if statistics is not None:
                    columns, _ = refit(self.original[number][expert], kept, statistics[number].grams[expert])
                down.zero_()
                down[:, kept] = columns

    @torch.no_grad()
    def restore(self):
        for number, originals in enumerate(self.original):
            for down, original in zip(self._downs(number), originals, strict=True):
                down.copy_(original)

    @torch.no_grad()
    def measure(self, ids: torch.Tensor, widths: list[list[int]], reference: list[torch.Tensor] | None) -> dict:
        """Losses of each block, KL to the `reference` where there is one, and neurons used per token."""
        used = [0.0]
        hooks = []
        for found, kept in zip(self.layers, widths, strict=True):
            if found.experts is None:
                used[0] += kept[0]
            else:
                table = torch.tensor([*kept, 0.0])

                def count(experts, arguments, table=table):
                    index = arguments[1].clamp(max=len(table) - 1)
                    used[0] += table[index].sum().item() / ids.numel()

                hooks.append(found.experts.register_forward_pre_hook(count))
        losses, kl, seen = [], 0.0, 0
        for number, block in enumerate(ids):
            log_probabilities = self._log_probabilities(block)
            losses.append(F.nll_loss(log_probabilities, block[1:]).item())
            if reference is not None and number < len(reference):
                before = reference[number].float()
                kl += (before.exp() * (before - log_probabilities)).sum().item()
                seen += len(before)
        for hook in hooks:
            hook.remove()
        return {"losses": losses, "used": used[0], "kl": kl / seen if seen else None}

    @torch.no_grad()
    def reference(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Log-probabilities of blocks, in half precision."""
        return [self._log_probabilities(block).half() for block in ids]

    def _log_probabilities(self, block: torch.Tensor) -> torch.Tensor:
        """[S - 1, V] of each next token of a block [S]."""
        return self.model(block[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)


class Contestant(NamedTuple):
    """A way to choose what goes."""

    name: str
    criterion: str
    shape: str
    """How widths are chosen: "unequal", "uniform" or "whole" (an expert stays or goes)."""
    budget: str = "memory"
    refits: bool = True


UNEQUAL = [Contestant("unequal", "gradient", "unequal"), Contestant("unequal, by work", "gradient", "unequal", "work")]
UNIFORM = [Contestant("uniform", "gradient", "uniform")]
WITHOUT_REFIT = [c._replace(name=f"{c.name}, no refit", refits=False) for c in UNEQUAL + UNIFORM]
OTHERS = [
    Contestant("whole experts", "gradient", "whole"),
    Contestant("unequal, contribution", "contribution", "unequal"),
    Contestant("uniform, contribution", "contribution", "uniform"),
    Contestant("unequal, magnitude", "magnitude", "unequal"),
    Contestant("uniform, magnitude", "magnitude", "uniform"),
    Contestant("unequal, random", "random", "unequal"),
    Contestant("unequal, reversed", "reversed", "unequal"),
]


def chosen_widths(
    contestant: Contestant, saliency: list[LayerSaliency], keep: float, multiple: int
) -> list[list[int]]:
    """[layers][E] the width of every expert."""
    widths = [[len(neurons) for neurons in layer.neurons] for layer in saliency]
    if contestant.shape == "uniform":
        return [[round(keep * width) for width in layer] for layer in widths]
    largest_width = max(max(layer) for layer in widths)
    multiple, groups = (largest_width, 2) if contestant.shape == "whole" else (multiple, 3)
    tables = [choices(layer, multiple, contestant.budget) for layer in saliency]
    budget = keep * sum(table.cost[:, -1].sum() for table in tables)
    picked = allocate(even(saliency, tables), budget, groups)
    return [[table.widths[index] for index in row] for table, row in zip(tables, picked, strict=True)]


def measure(options: argparse.Namespace):
    """Fill the file of results."""
    subject = Subject(options.source)
    held_out = blocks(options.held_out, options.source, options.blocks)
    done = {(row["contestant"], row["keep"], row["seed"]) for row in read_rows([options.results])}
    reference = subject.reference(held_out[: options.kl_blocks])
    facts = {"source": options.source.name, "machine": machine()}
    facts["calibration"] = options.calibration_blocks * held_out.shape[1]
    if ("source", 1.0, 0) not in done:
        row = subject.measure(held_out, subject.widths, reference)
        write_row(options.results, facts | {"contestant": "source", "keep": 1.0, "seed": 0, "kept": 1.0} | row)
    # Where there is one expert, as in a dense model, all tokens use it.
    main = UNEQUAL[: 1 if max(map(len, subject.widths)) == 1 else None] + UNIFORM
    plans = [(seed, [(c, keep) for keep in options.keep for c in main]) for seed in range(options.seeds)]
    plans.append((0, [(c, keep) for keep in options.keep if keep in _OTHERS_AT for c in WITHOUT_REFIT + OTHERS]))
    for seed, plan in plans:
        plan = [(c, keep) for c, keep in plan if (c.name, keep, seed) not in done]
        if not plan:
            continue
        start = 1 - _CALIBRATION * (seed + 1) / options.seeds
        ids = blocks(options.text, options.source, options.calibration_blocks, start)
        statistics = subject.statistics(ids)
        surveys = {}
        for contestant, keep in plan:
            began = time.perf_counter()
            for criterion in ("gradient", contestant.criterion):  # of which two controls are made
                if criterion not in surveys:
                    surveys[criterion] = survey(subject, ids, criterion, surveys)
            saliency = surveys[contestant.criterion]
            if not contestant.refits:
                saliency = [LayerSaliency.of(layer.neurons, layer.tokens) for layer in saliency]
            widths = chosen_widths(contestant, saliency, keep, options.multiple)
            subject.narrow(saliency, widths, statistics if contestant.refits else None)
            row = {"contestant": contestant.name, "keep": keep, "seed": seed}
            row["kept"] = sum(map(sum, widths)) / sum(map(sum, subject.widths))
            row |= subject.measure(held_out, widths, reference)
            row["widths"] = widths
            write_row(options.results, facts | row)
            perplexity = np.exp(np.mean(row["losses"]))
            print(
                f"{contestant.name:24} keep {keep} seed {seed}: perplexity {perplexity:8.2f} KL {row['kl']:.3f} "
                f"kept {row['kept']:.3f} used {row['used']:.0f} ({time.perf_counter() - began:.0f} s)",
                flush=True,
            )
            subject.restore()


def compare(options: argparse.Namespace):
    """Fill the file of results with models that were made of the source."""
    held_out = blocks(options.held_out, options.source, options.blocks)
    source = Subject(options.source)
    reference = source.reference(held_out[: options.kl_blocks])
    whole, done = sum(map(sum, source.widths)), {row["contestant"] for row in read_rows([options.results])}
    for folder in options.folders:
        if folder.name in done:
            continue
        subject = Subject(folder)
        shared = sum(
            found.module.shared_expert.up_proj.out_features
            for found in subject.layers
            if getattr(found.module, "shared_expert", None) is not None
        )
        row = subject.measure(held_out, subject.widths, reference)
        row |= {"used": row["used"] + shared, "kept": (sum(map(sum, subject.widths)) + shared) / whole}
        facts = {"source": options.source.name, "machine": machine(), "contestant": folder.name}
        receipt, evaluation = folder / "conversion_report.json", folder / "evaluation.json"
        if receipt.exists():  # a model that has been trained since has none
            facts |= json.loads(receipt.read_text(encoding="utf-8"))["parameters"]["after"]
        if evaluation.exists():
            results = json.loads(evaluation.read_text(encoding="utf-8"))["results"]
            facts["tasks"] = {result["task"]: result["metrics"] for result in results if "task" in result}
        write_row(options.results, facts | row)
        print(
            f"{folder.name}: perplexity {np.exp(np.mean(row['losses'])):.2f} KL {row['kl']:.3f} used {row['used']:.0f}"
        )


def survey(subject: Subject, ids: torch.Tensor, criterion: str, surveys: dict) -> list[LayerSaliency]:
    """A survey, or what is made of the gradient's for the two controls."""
    if criterion not in ("random", "reversed"):
        return subject.survey(ids, criterion)
    made, generator = [], torch.Generator().manual_seed(0)
    for layer in surveys["gradient"]:
        if criterion == "random":
            neurons = [torch.rand(len(n), generator=generator) for n in layer.neurons]
        else:
            neurons = [1 / (n + 1e-12) for n in layer.neurons]
        made.append(LayerSaliency.of(neurons, layer.tokens))
    return made


def make_mixture(options: argparse.Namespace):
    """Split a dense model into equal experts, and train them on the beginning of the text."""
    if not options.output.exists():
        width = read_config(options.dense)["intermediate_size"]
        recipe = load_recipe(
            None,
            source=str(options.dense),
            output=str(options.output),
            mode="split",
            widths=[width // 8],
            experts_per_group=8,
            top_k=6,
            calibration=str(options.text),
            calibration_tokens=24 * LENGTH,
            calibration_length=LENGTH,
        )
        convert(make_plan(recipe))
    trained = options.output.with_name(options.output.name + "-trained")
    if trained.exists():
        return
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(options.output, dtype=torch.float32).train()
    ids = blocks(options.text, options.output, options.steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
    for step, block in enumerate(ids):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1, (step + 1) / 10, 2 * (1 - step / len(ids)))
        loss = model(block[None], labels=block[None]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(trained)
    AutoTokenizer.from_pretrained(options.output).save_pretrained(trained)


def make_uniform(options: argparse.Namespace):
    """Narrow all experts to the same share of their width, with survey, order and refit as `trim --keep` has them."""
    recipe = load_recipe(
        None,
        source=str(options.source),
        output=str(options.output),
        mode="trim",
        keep=options.keep,
        multiple=1,
        calibration=str(options.text),
        calibration_tokens=options.calibration_blocks * LENGTH,
        calibration_length=LENGTH,
    )
    plan = make_plan(recipe)

    def pick(tables: list[Choices], budget: float) -> list[list[int]]:
        return [[t.widths.index(round(options.keep * t.widths[-1]))] * len(t.lost) for t in tables]

    plan.mode.pick = pick
    convert(plan)


def make_task(options: argparse.Namespace):
    """Write a task of lm-evaluation-harness that needs no download: which of four pieces follows a piece of text."""
    words = options.held_out.read_text(encoding="utf-8").split()
    pieces = [words[i : i + _PIECE] for i in range(0, len(words) - _PIECE, _PIECE)]
    generator = np.random.default_rng(0)
    rows = []
    for place in generator.permutation(len(pieces) - 1)[: options.questions]:
        others = generator.choice(len(pieces), 3, replace=False)
        endings = [pieces[place + 1], *(pieces[other] for other in others)]
        order = generator.permutation(4)
        choices = [" " + " ".join(endings[index][: _PIECE // 3]) for index in order]
        rows.append({"q": " ".join(pieces[place]), "c": choices, "a": int(np.flatnonzero(order == 0)[0])})
    options.output.mkdir()
    data = options.output / "continuation.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {
        "task": "continuation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (options.output / "continuation.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def machine() -> str:
    """Where and with what."""
    return f"{processor()}, torch {torch.__version__}, transformers {TRANSFORMERS}"


def read_rows(files: list[Path]) -> Iterator[dict]:
    """The results of some files."""
    for file in files:
        if file.exists():
            yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def write_row(file: Path, row: dict):
    """Add a result."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row | {"date": time.strftime("%Y-%m-%d")}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("mixture")
    command.add_argument("dense", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument("--text", type=Path, required=True)
    command.add_argument("--steps", type=int, default=200)
    command.add_argument("--learning-rate", type=float, default=1e-4)
    command.set_defaults(run=make_mixture)
    command = commands.add_parser("measure")
    command.add_argument("source", type=Path)
    command.add_argument("--text", type=Path, required=True)
    command.add_argument("--held-out", type=Path, required=True)
    command.add_argument("--results", type=Path, required=True)
    command.add_argument("--blocks", type=int, default=16)
    command.add_argument("--kl-blocks", type=int, default=4)
    command.add_argument("--calibration-blocks", type=int, default=44)
    command.add_argument("--multiple", type=int, default=16)
    command.add_argument("--keep", type=float, nargs="+", default=KEEP)
    command.add_argument("--seeds", type=int, default=3)
    command.set_defaults(run=measure)
    command = commands.add_parser("uniform")
    command.add_argument("source", type=Path)
    command.add_argument("output", type=Path)
    command.add_argument("--text", type=Path, required=True)
    command.add_argument("--keep", type=float, required=True)
    command.add_argument("--calibration-blocks", type=int, default=49)
    command.set_defaults(run=make_uniform)
    command = commands.add_parser("compare")
    command.add_argument("source", type=Path)
    command.add_argument("folders", type=Path, nargs="+")
    command.add_argument("--held-out", type=Path, required=True)
    command.add_argument("--results", type=Path, required=True)
    command.add_argument("--blocks", type=int, default=16)
    command.add_argument("--kl-blocks", type=int, default=4)
    command.set_defaults(run=compare)
    command = commands.add_parser("task")
    command.add_argument("output", type=Path)
    command.add_argument("--held-out", type=Path, required=True)
    command.add_argument("--questions", type=int, default=300)
    command.set_defaults(run=make_task)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
