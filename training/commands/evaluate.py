"""The command `mohge eval`: perplexity of text, tasks of lm-evaluation-harness, and what the router did."""

import argparse
import itertools
import json
import logging
import math
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # seconds to import, which `mohge --help` should not wait
    import torch
    from transformers import PreTrainedTokenizerBase

    from mohge import MoHGEForCausalLM
    from mohge.training.data.sources import TextSource
    from mohge.training.loop.metrics import RouterStatistics


EVALUATION_NAME = "evaluation.json"
"""File of a model's folder that holds its results."""
_PIECE = 64
"""Batches whose routing is held token by token at the same time."""


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments.

    Returns:
        `int`: 0, or 1 if a perplexity is not finite.

    Raises:
        ValueError: for bad usage or input; nothing is written then.
        OSError: if there is no such model.
    """
    from mohge.info import describe_counts
    from mohge.model_cards.records import name_tokens
    from mohge.model_cards.writing import write_file
    from mohge.training.data.packing import check_sequence_length
    from mohge.training.data.sources import absolute, parse_sources
    from mohge.training.report.measure import format_router_table

    from .models import config_with_weights, load_on_device

    if not options.datasets and not options.tasks:
        raise ValueError("--datasets and --tasks are missing: name text or tasks to evaluate on")
    for name in ("num_fewshot", "limit", "tokens", "sequence_length", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < (0 if name == "num_fewshot" else 1):
            raise ValueError(f"--{name.replace('_', '-')} is {value}: give a positive number")
    sources = parse_sources(options.datasets, "--datasets")
    config = config_with_weights(options.model)
    file = _output_file(options)
    _read_results(file)  # before anything is computed
    length = check_sequence_length(options.sequence_length, config)
    model, tokenizer = load_on_device(options, config)

    new, statistics = [], None
    for task, metrics in _evaluate_tasks(model, tokenizer, options).items():
        settings = {"num_fewshot": options.num_fewshot, "limit": options.limit}
        new.append({"task": task, "settings": settings, "metrics": metrics})
        print(f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    for source in sources:
        batches = _batches(source, tokenizer, length, options)
        metrics, statistics = evaluate_text(model, batches, statistics)
        if not metrics["tokens"]:
            raise ValueError(f"{source.path} has no two tokens in a row: give a longer text")
        named = {name: getattr(source, name) for name in ("name", "split", "revision")}
        settings = {"sequence_length": length, "first_tokens": options.tokens}
        new.append({"dataset": {"path": absolute(source.path), **named}, "settings": settings, "metrics": metrics})
        print(
            f"{source.path}: perplexity {metrics['perplexity']:.4g}, loss {metrics['loss']:.4f} nats per token, "
            f"{metrics['tokens']:,} tokens"
        )
        if not math.isfinite(metrics["perplexity"]):
            print("CHECK FAILED: the perplexity is not finite, nothing is written")
            return 1
    results = _read_results(file)  # others may have been added meanwhile
    if statistics is not None:
        routing = statistics.routing(name_tokens([source.path for source in sources], int(statistics.tokens)))
        results["router"] = {
            "summary": statistics.summary(),
            "table": statistics.table(),
            "texts": [absolute(source.path) for source in sources],
            "tokens": routing.tokens,
            "tokens_per_expert": routing.tokens_per_expert,
        }
        print(f"\n{format_router_table(statistics)}\n{describe_counts(config, [routing])}")
    kept = [old for old in results["results"] if not any(_same_subject(old, result) for result in new)]
    results["results"] = kept + new
    if file is not None:
        write_file(file, json.dumps(results, indent=2) + "\n")
        print(f"written: {file}")
    return 0


def _output_file(options: argparse.Namespace) -> Path | None:
    if options.output is None:
        folder = Path(options.model)
        return folder / EVALUATION_NAME if folder.is_dir() else None
    file = Path(options.output)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--output {file}: there is no folder {file.parent}, create it first")
    return file


def _read_results(file: Path | None) -> dict[str, Any]:
    """What earlier evaluations found."""
    from mohge.model_cards.folder import read_json

    if file is None or not file.exists():
        return {"results": []}
    try:
        results = read_json(file)
        results["results"] = [result for result in results["results"] if result["metrics"].items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no results of `mohge eval`: name another file with --output") from error
    return results


def _same_subject(one: dict, other: dict) -> bool:
    """Whether they are of the same data under the same conditions."""
    return all(one.get(name) == other.get(name) for name in ("task", "dataset", "settings"))


def _batches(
    source: "TextSource", tokenizer: "PreTrainedTokenizerBase", length: int, options: argparse.Namespace
) -> Iterator[dict[str, "torch.Tensor"]]:
    from mohge.training.data.packing import batches, packed_blocks

    blocks = packed_blocks([source], tokenizer, length, streaming=options.tokens is not None, drop_last=False)
    sequences = None if options.tokens is None else max(1, options.tokens // length)
    return batches(itertools.islice(blocks, sequences), options.batch_size)


def evaluate_text(
    model: "MoHGEForCausalLM",
    batches: Iterable[dict[str, "torch.Tensor"]],
    statistics: "RouterStatistics | None" = None,
) -> tuple[dict[str, float], "RouterStatistics"]:
    """
    Loss and perplexity of text, and what the router did with it.

    Args:
        model ([`MoHGEForCausalLM`]): The model.
        batches (`Iterable[dict[str, torch.Tensor]]`): Batches of [`mohge.training.data.packing.collate_packed`].
        statistics ([`RouterStatistics`], *optional*): Statistics to add to.

    Returns:
        `tuple[dict, RouterStatistics]`: `loss`, in nats per predicted token, `perplexity`, its exponential, and
        `tokens`, the number of predictions; and the statistics.
    """
    import torch

    from mohge.training.report.measure import evaluate_routing

    loss, predictions, tokens = 0.0, 0, 0
    batches = iter(batches)
    while piece := list(itertools.islice(batches, _PIECE)):
        evaluation = evaluate_routing(model, piece)
        loss += evaluation.token_loss.nansum(dtype=torch.float64).item()
        predictions += int(evaluation.token_loss.isfinite().sum())
        tokens += sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in piece)
        if statistics is None:
            statistics = evaluation.statistics
        else:
            statistics.add(evaluation.statistics.counts, evaluation.statistics.tokens)
    loss = loss / max(tokens, 1) if predictions == tokens else math.nan
    return {"perplexity": math.exp(min(loss, 700)), "loss": loss, "tokens": tokens}, statistics


def _evaluate_tasks(
    model: "MoHGEForCausalLM", tokenizer: "PreTrainedTokenizerBase", options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Metrics of each task, by its name."""
    if not options.tasks:
        return {}
    try:
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'mohge[evaluation]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of models that are given to it loaded
    evaluator.get_git_commit_hash = lambda: None  # or git prints that it finds no repository here
    subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    for request in ("loglikelihood", "loglikelihood_rolling", "generate_until"):  # their bars do not ask TQDM_DISABLE
        setattr(subject, request, partial(getattr(subject, request), disable_tqdm=not sys.stderr.isatty()))
    try:
        evaluated = evaluator.simple_evaluate(
            model=subject,
            tasks=options.tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            task_manager=TaskManager(include_path=options.include_path),
            log_samples=False,
        )
    except KeyError as error:
        raise ValueError(f"--tasks: {error.args[0]}: `lm-eval ls tasks` lists what there is") from error
    return {
        # Standard errors can be text or not a number, which JSON does not have.
        task: {
            name: float(value)
            for name, value in metrics.items()
            if name != "sample_len" and isinstance(value, int | float) and math.isfinite(value)
        }
        for task, metrics in evaluated["results"].items()
    }


__all__ = ["evaluate_text"]
