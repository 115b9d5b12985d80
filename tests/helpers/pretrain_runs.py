"""Runs of `mohge train` on small texts, and processes in which they are cut off at a chosen moment."""

import hashlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from trainer_runs import config
from transformers import PreTrainedTokenizerFast, Trainer, modeling_utils

from mohge import MoHGEConfig
from mohge.commands.main import main
from mohge.training import MoHGETrainer
from mohge.training.data.corpus import train_tokenizer
from mohge.training.loop import watchdog


VOCABULARY = 300


def documents(count: int = 40, seed: int = 0) -> list[str]:
    """Documents of 1 to 10 lines, in no order of length."""
    numbers = random.Random(seed)
    return [
        "".join(f"{n} times {m} is {n * m}.\n" for m in numbers.sample(range(100), numbers.randint(1, 10)))
        for n in range(count)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(documents(), VOCABULARY)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_inputs(folder: Path, **fields) -> Path:
    """A folder with a config as `model`, its `tokenizer`, and the text `a.jsonl`."""
    save_config(folder / "model", **fields)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "a.jsonl", documents())
    return folder


def save_config(folder: Path, loss: str = "load_balancing", **fields) -> MoHGEConfig:
    made = config(loss, **{"vocab_size": VOCABULARY, **fields})
    made.save_pretrained(folder)
    return made


def arguments(inputs: Path, output: Path, **values) -> list[str]:
    """Of `mohge train`, for a run of a second; None leaves one out."""
    values = {
        "model": inputs / "model",
        "tokenizer": inputs / "tokenizer",
        "datasets": inputs / "a.jsonl",
        "output_dir": output,
        "sequence_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **values,
    }
    flags = []
    for name, value in values.items():
        if value is not None:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def train(inputs: Path, output: Path, **values) -> Path:
    """Run the command here, which must end well."""
    assert main(["train", *arguments(inputs, output, **values)]) == 0
    return output


def log(run: Path) -> list[dict]:
    """What was logged at each step, but for the speed."""
    entries = [entry for entry in history(run) if "loss" in entry]
    return [{name: value for name, value in entry.items() if name != "tokens_per_second"} for entry in entries]


def history(run: Path) -> list[dict]:
    return json.loads((run / "trainer_state.json").read_text())["log_history"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_same_weights(actual: Path, expected: Path):
    ours, theirs = weights(actual), weights(expected)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of change of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


# What processes run.


def run_command(cache: Path, *flags: str):
    """`mohge train` with these flags and a cache of its own."""
    datasets.config.HF_DATASETS_CACHE = cache
    os.environ.pop("LOCAL_RANK", None)  # or else only the first process says why it ends
    status = main(["train", *flags])
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def run_command_until(moment: str, cache: Path, *flags: str):
    """The same, but the process is killed at `moment`, one of `MOMENTS`."""
    owner, name, reached = MOMENTS[moment]
    signal_in(owner, name, reached, signal.SIGKILL)
    run_command(cache, *flags)


def run_command_terminated_in_step(
    step: int, rank: int | None, cache: Path, *flags: str, number: int = signal.SIGTERM
):
    """The same, but the signal `number` comes (to rank `rank`) in the middle of `step`."""

    def reached(trainer: Trainer, *args, **kwargs) -> bool:
        here = rank is None or dist.get_rank() == rank
        return here and trainer.state.global_step == step - 1

    signal_in(MoHGETrainer, "training_step", reached, number)
    run_command(cache, *flags)


def run_command_interrupted_in_step(step: int, cache: Path, *flags: str):
    """The same, with Ctrl-C in a terminal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes in the background ignore
    run_command_terminated_in_step(step, None, cache, *flags, number=signal.SIGINT)


def run_command_of_each(cache: Path, flags_of_ranks: list[list[str]]):
    """The same on several ranks, with flags of their own."""
    run_command(cache, *flags_of_ranks[int(os.environ["RANK"])])


def run_command_alone_of_two(rank: int, port: int, cache: Path, *flags: str):
    """The same as one rank of two, where the other one is not."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    watchdog.STARTING = timedelta(seconds=3)
    run_command(cache, *flags)


def run_command_stopped_in_step(step: int, cache: Path, *flags: str):
    """The same, but the process stops, and lives on, in the middle of `step`."""
    signal_in(MoHGETrainer, "training_step", lambda self, *args: self.state.global_step == step - 1, signal.SIGSTOP)
    run_command(cache, *flags)


def run_command_with_fault(fault: str, step: int, rank: int, cache: Path, *flags: str):
    """The same, with one of `FAULTS` on one rank."""
    if int(os.environ["RANK"]) == rank:
        FAULTS[fault](setattr, step)
    run_command(cache, *flags)


def run_command_with_little_space(place: str, cache: Path, *flags: str):
    """The same, but from when `place` in the run's folder is written no file can grow beyond 20 kB."""
    owner, name, reached = {
        "/.initial": (modeling_utils, "safe_save_file", _writing_weights_to(".initial")),
        "/checkpoint-4": (MoHGETrainer, "_save_checkpoint", lambda trainer, *args: trainer.state.global_step == 4),
        "": (MoHGETrainer, "save_model", lambda trainer, folder=None, **kwargs: folder is None),
    }[place]
    before_call(owner, name, reached, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    run_command(cache, *flags)


def signal_in(owner, name: str, reached: Callable[..., bool], number: signal.Signals):
    """Have this process get a signal when the function `name` is called as `reached` says."""
    before_call(owner, name, reached, lambda: os.kill(os.getpid(), number))


def before_call(owner, name: str, reached: Callable[..., bool], act: Callable[[], None]):
    """Have this process `act` when the function `name` is called as `reached` says."""
    function = getattr(owner, name)

    def interrupted(*args, **kwargs):
        if reached(*args, **kwargs):
            act()
        return function(*args, **kwargs)

    setattr(owner, name, interrupted)


def _fault(spoil: Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor]) -> Callable:
    def inject(set_attribute: Callable, step: int):
        training_step = Trainer.training_step

        def spoiled(trainer: Trainer, *args, **kwargs) -> torch.Tensor:
            loss = training_step(trainer, *args, **kwargs)
            if trainer.state.global_step == step - 1:
                weight = [parameter for parameter in trainer.model.parameters() if parameter.grad is not None][-1]
                return spoil(loss, weight)
            return loss

        set_attribute(Trainer, "training_step", spoiled)

    return inject


@torch.no_grad()
def _spoil_gradient(loss: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
    weight.grad.view(-1)[0] = torch.inf
    return loss


@torch.no_grad()
def _spoil_weight(loss: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
    weight.view(-1)[0] = torch.nan
    return loss


FAULTS = {
    "loss": _fault(lambda loss, weight: loss * torch.nan),
    "gradient": _fault(_spoil_gradient),
    "weight": _fault(_spoil_weight),
}
"""What is no number after one step -> a function that brings it about, with the means to replace an attribute."""


def _writing_weights_to(last_part: str) -> Callable[..., bool]:
    return lambda tensors, file, **kwargs: Path(file).parent.name == last_part


MOMENTS = {
    "the initial model is being written": (modeling_utils, "safe_save_file", _writing_weights_to(".initial")),
    "step 2": (MoHGETrainer, "training_step", lambda trainer, *args: trainer.state.global_step == 1),
    "weights of checkpoint 4 are being written": (
        modeling_utils,
        "safe_save_file",
        _writing_weights_to("checkpoint-4"),
    ),
    "checkpoint 4 has no random state yet": (
        MoHGETrainer,
        "_save_rng_state",
        lambda trainer, folder: trainer.state.global_step == 4,
    ),
    "step 6": (MoHGETrainer, "training_step", lambda trainer, *args: trainer.state.global_step == 5),
    "after the last step": (
        MoHGETrainer,
        "save_model",
        lambda trainer, folder=None, **kwargs: folder is None,
    ),
    "the trained model is being written": (modeling_utils, "safe_save_file", _writing_weights_to("run")),
    "the trained model lacks the record of the run": (MoHGETrainer, "save_state", lambda trainer: True),
}
"""Moment of a run in the folder `run` with a checkpoint every other step -> the function that is called then, and with
which arguments."""
