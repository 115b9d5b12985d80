"""Processes that talk to the Hub of `hub_server`, and the folders that they push."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from hub_server import TOKEN, HubServer
from model_cases import make_model
from processes import WITHOUT_PACKAGE

from mohge.training.data.corpus import train_tokenizer


VOCABULARY = 300
TEXT = ["Once upon a time there was a tokenizer, and it was small.\n"] * 20

_WORKER = """
import contextlib, io, json, os, sys, traceback, types
import torch
import huggingface_hub.utils._http as http

http.time = types.SimpleNamespace(sleep=lambda seconds: None)  # before it tries again, which it does for half a minute

torch.set_num_threads(1)
answers, sys.stdout = sys.stdout, sys.stderr
tasks, sys.stdin = sys.stdin, open(os.devnull)  # nobody to ask whether code may be trusted
for line in tasks:
    task, printed, errors, status = json.loads(line), io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            if isinstance(task, list):
                from mohge.commands.main import main

                status = main(task)
            else:
                exec(task, {})
        except BaseException:
            traceback.print_exc()
            status = -1
    answers.write(json.dumps([status, printed.getvalue(), errors.getvalue()]) + "\\n")
    answers.flush()
"""


class Result(NamedTuple):
    status: int | None
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line that the command itself has on stderr."""
        lines = [line for line in self.err.splitlines() if line.startswith("mohge push: ")]
        assert len(lines) == 1, self.err
        return lines[0]


def hub_environment(hub: HubServer, home: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    own["TQDM_DISABLE"] = "1"  # which the command sets too late where tqdm has been imported
    return environment | own | {"HF_TOKEN": TOKEN}


class Shell:
    """A process in which commands run one after the other, so that they import torch once, and the Hub they see. If
    not `package`, mohge is missing there."""

    def __init__(self, hub: HubServer, home: Path, package: bool = True):
        self.hub, self.home = hub, home
        command = ["-c", _WORKER] if package else ["-I", "-c", WITHOUT_PACKAGE + _WORKER]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            env=hub_environment(hub, home),
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, task: list | str) -> Result:
        """Run the arguments of a `mohge` command, or Python code."""
        task = task if isinstance(task, str) else [str(argument) for argument in task]
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return Result(*json.loads(self.process.stdout.readline()))

    def push(self, *arguments) -> Result:
        return self.run(["push", *arguments])

    @contextlib.contextmanager
    def reloads_here(self):
        """What is pushed is loaded in this process to check it. For tests that ask nothing of that check: in a process
        of its own, which has to import transformers, it takes longer than the rest of a push."""
        code = """
import torch
from mohge.model_cards import verify
from mohge.model_cards.reload import cache_error

def reload(folder, inputs):
    model = verify.load_model(folder, dtype=torch.float32)
    error = torch.tensor(cache_error(model, inputs["tokens"]))
    return {**verify._logits(model, inputs), "cache_error": error}

verify.elsewhere, verify._reload = verify._reload, reload
"""
        assert self.run(code).status is None
        yield
        self.run("from mohge.model_cards import verify; verify._reload = verify.elsewhere")

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()


def save_model(folder: Path, tokenizer: bool = True, max_shard_size: str = "50GB", dtype=None, **kwargs) -> Path:
    model = make_model(vocab_size=VOCABULARY, **kwargs)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        train_tokenizer(TEXT, VOCABULARY).save_pretrained(folder)
    return folder
