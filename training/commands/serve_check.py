"""The command `mohge serve-check`: whether a serving engine finds the tokens that we find."""

import argparse
import itertools
import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:  # seconds to import, which `mohge --help` should not wait
    import torch

    from mohge import MoHGEForCausalLM

TOLERANCE = 1e-3
"""Between log-probabilities in float32, which engines add up in another order."""
ENGINES = {"vllm": "VLLM_PYTHON", "llama.cpp": "LLAMA_CPP_PYTHON"}
"""Engines, and what names the Python that has each."""
_LENGTH = 64
"""Tokens of a prompt with its continuation, where the model's context is not shorter."""
_PROMPT_LENGTHS = (5, 9, 17, 30)


def run(options: argparse.Namespace) -> int:
    """
    Run the command with parsed arguments.

    Returns:
        `int`: 0, or 1 if the engine fails or finds something else.

    Raises:
        ValueError: for bad usage or input, or where there is no engine.
        OSError: if there is no such model.
    """
    from mohge.loading import load_model

    if options.prompts < 1:
        raise ValueError(f"--prompts is {options.prompts}: give a positive number")
    python = options.engine_python or os.environ.get(ENGINES[options.engine])
    if python is None:
        raise ValueError(
            f"--engine-python is missing: name the Python that has {options.engine}, or set {ENGINES[options.engine]}"
        )
    _check_gguf(options)
    requests = [_request(folder, options) for folder in options.folders]
    results = _ask(python, options.engine, requests)
    engine = f"{options.engine} {results[0]['version']}"
    print(f"{engine} and mohge, float32, {options.prompts} prompts\n")
    print(f"{'tokens':>7} {'same':>7} {'ties':>5} {'largest difference':>19}  folder")
    failures, ties = [], 0
    for folder, request, result in zip(options.folders, requests, results, strict=True):
        if "error" in result:
            failures.append(f"{folder}: {engine} failed: {' '.join(result['error'].split())}")
            continue
        steps = [*_steps(load_model(folder, dtype="float32").eval(), request, result)]
        same, tied = sum(step.token == step.ours for step in steps), sum(step.is_tie for step in steps)
        largest = max(step.difference for step in steps)
        print(f"{len(steps):>7} {same:>7} {tied:>5} {largest:>19.1e}  {folder}")
        ties += tied
        failures += [f"{folder}: {step.describe(options.engine)}" for step in steps if not step.agrees][:1]
    if ties:
        print(
            f"\nties: log-probabilities of two tokens closer than {TOLERANCE:g}, of which each took another one; what "
            f"follows was compared on the tokens of {options.engine}"
        )
    for failure in failures:
        print(f"CHECK FAILED: {failure}")
    return 1 if failures else 0


class _Step(NamedTuple):
    """A token that the engine took, and the one that we take after the same tokens."""

    prompt: int
    position: int
    token: int
    ours: int
    engine_logprobs: dict[int, float]
    our_logprobs: "torch.Tensor"

    @property
    def difference(self) -> float:
        """Of the log-probabilities of the engine's token; infinite where one is not finite."""
        difference = abs(self.engine_logprobs[self.token] - float(self.our_logprobs[self.token]))
        return difference if math.isfinite(difference) else math.inf

    @property
    def is_tie(self) -> bool:
        """Whether the engine took another token, and both are as likely as each other there and here."""
        here = float(self.our_logprobs[self.ours] - self.our_logprobs[self.token])
        there = self.engine_logprobs[self.token] - self.engine_logprobs.get(self.ours, -math.inf)
        return self.token != self.ours and max(here, there) < TOLERANCE

    @property
    def agrees(self) -> bool:
        return (self.token == self.ours or self.is_tie) and self.difference < TOLERANCE

    def describe(self, engine: str) -> str:
        """The step in one line."""
        return (
            f"prompt {self.prompt}, position {self.position}: {engine} takes token {self.token}, log-probability "
            f"{self.engine_logprobs[self.token]:.6f}; mohge takes {self.ours}, {self.our_logprobs[self.ours]:.6f}"
        )


def _check_gguf(options: argparse.Namespace):
    if options.engine == "vllm":
        if options.gguf is not None:
            raise ValueError("--gguf is for --engine llama.cpp: leave it out")
    elif options.gguf is None:
        raise ValueError("--gguf is missing: name the file that was made of FOLDER")
    elif len(options.folders) > 1:
        raise ValueError(f"--gguf is of one model, and there are {len(options.folders)} folders: give one")
    elif not Path(options.gguf).is_file():
        raise FileNotFoundError(f"--gguf {options.gguf} is no file: name the file that was made of FOLDER")


def _request(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the engine is asked: prompts of text where there is a tokenizer, or of random ids."""
    import torch

    from mohge import MoHGEConfig
    from mohge.conversion.tokenizer import load_tokenizer
    from mohge.model_cards.shipped import load_config

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the folder of a saved model")
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        ids = torch.randint(config.vocab_size, (997,), generator=torch.Generator().manual_seed(0)).tolist()
    else:
        ids = tokenizer(MoHGEConfig.__doc__, add_special_tokens=False).input_ids
    half, ids = min(_LENGTH, config.max_position_embeddings) // 2, itertools.cycle(ids)
    lengths = itertools.islice(itertools.cycle(_PROMPT_LENGTHS), options.prompts)
    prompts = [list(itertools.islice(ids, min(length, half))) for length in lengths]
    engine = {"model": options.gguf or folder, "max_model_len": 2 * half}
    if options.engine == "vllm":
        engine |= {"dtype": "float32", "enforce_eager": True}
    return {"engine": engine, "prompts": prompts, "new_tokens": half, "logprobs": 5}


def _ask(python: str, engine: str, requests: list[dict]) -> list[dict]:
    """The engine's answers."""
    from mohge.training.loop.failure import RunFailed
    from mohge_engines import generate

    lines = "".join(f"{json.dumps(request)}\n" for request in requests)
    try:
        done = subprocess.run([python, "-I", generate.__file__, engine], input=lines, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(
            f"--engine-python {python} cannot be run ({error}): name a Python that has {engine}"
        ) from error
    if done.returncode == generate.NO_ENGINE:
        raise ValueError(f"--engine-python {python} has no {engine}: name a Python that has it")
    mark = generate.ANSWER
    answers = [json.loads(line[len(mark) :]) for line in done.stdout.splitlines() if line.startswith(mark)]
    if len(answers) < len(requests):
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing on standard error"]
        folder = requests[len(answers)]["engine"]["model"]
        raise RunFailed(f"{engine} ended at {folder} with exit status {done.returncode}: {said[-1]}")
    return answers


def _steps(model: "MoHGEForCausalLM", request: dict, result: dict) -> Iterator[_Step]:
    """The steps of all prompts, each after the tokens that the engine took before."""
    import torch

    answers = zip(request["prompts"], result["tokens"], result["logprobs"], strict=True)
    for index, (prompt, tokens, logprobs) in enumerate(answers):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        for position, (token, theirs, ours) in enumerate(
            zip(tokens, logprobs, logits.float().log_softmax(-1), strict=True)
        ):
            theirs = {int(key): value for key, value in theirs.items()}
            yield _Step(index, position, token, int(ours.argmax()), theirs, ours)


__all__ = ["run"]
