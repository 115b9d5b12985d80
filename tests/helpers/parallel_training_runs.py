"""
Training runs that tests compare, on one process and on several ranks. Ranks are processes with the environment that
torchrun would give them but without its agent, which would end the others when one is lost. They are forked from a
server that has imported the library, which takes longer than most runs.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from model_cases import LOSSES, make_config
from transformers import TrainingArguments, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEConfig, MoHGEForCausalLM, parallel_mohge
from mohge.training import MoHGETrainer


STEPS, ROWS, LENGTH = 4, 8, 64
"""Steps of a run, sequences of a step over all ranks, and tokens of a sequence."""

CONFIGS = {
    "two_level": {"router_group_aux_loss_coef": 0.07},
    "grouped_top_k": {
        "router_type": "grouped_top_k",
        "router_logit_ema_strength": 0.5,
        "tie_word_embeddings": True,
    },
}
LAYOUTS = {
    "one process": {},
    "fsdp 2": {"fsdp_size": 2},
    "fsdp 2, ep 2": {"fsdp_size": 2, "ep_size": 2},
    "fsdp 4, ep 2": {"fsdp_size": 4, "ep_size": 2},
    "fsdp 4, ep 4": {"fsdp_size": 4, "ep_size": 4},
}

SECONDS = 600
"""More than any run takes, however busy the machine is: a rank that has not ended by then hangs."""

_ACCELERATE_CONFIG = Path(__file__).parents[2] / "training" / "accelerate" / "cpu.yaml"
_ENVIRONMENT = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mohge.training.loop.trainer", "mohge.training.data.corpus", "mohge.commands.main"])


class Ranks:
    """
    Processes that have been started and run `function(*arguments)`; if there are several, each has its rank.

    Args:
        processes (`int`): Number of ranks.
        logs (`Path`): Folder to create, in which each writes its stderr.
        function (`Callable`): A function of a module.
        arguments: Its arguments.
        launcher (`bool`, *optional*, defaults to `True`):
            Whether the store through which ranks find each other is in the process that starts them, as with torchrun,
            or in rank 0.
    """

    def __init__(self, processes: int, logs: Path, function: Callable, *arguments, launcher: bool = True):
        logs.mkdir(parents=True)
        self.logs = [logs / f"rank_{rank}.txt" for rank in range(processes)]
        common = dict(_ENVIRONMENT)
        if processes > 1:
            # With port 0 the store takes a free one.
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if launcher else None
            common |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
            common["MASTER_PORT"] = str(self.store.port if launcher else _free_port())
            common |= {"TORCHELASTIC_USE_AGENT_STORE": str(launcher), "TORCHELASTIC_RESTART_COUNT": "0"}
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            self.processes.append(_SERVER.Process(target=_start, args=(common | own, log, function, arguments)))
            self.processes[-1].start()

    def signal(self, rank: int, number: signal.Signals):
        """Send a signal to one rank."""
        os.kill(self.processes[rank].pid, number)

    def wait(self, ranks: list[int] | None = None, seconds: float = SECONDS) -> list[int | None]:
        """Exit status of each rank (of `ranks`): negative after a signal, None if it hangs. Then none is left."""
        deadline = time.monotonic() + seconds
        waited = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        for process in waited:
            process.join(max(0.0, deadline - time.monotonic()))
        statuses = [process.exitcode for process in waited]
        for process in self.processes:
            process.kill()
            process.join()
        return statuses

    def errors(self, rank: int | None = None) -> str:
        """What a rank, or each after the other, has written to stderr."""
        return "".join(log.read_text() for log in (self.logs if rank is None else [self.logs[rank]]))

    def succeed(self) -> "Ranks":
        """Wait for the ranks, which must all end well."""
        statuses = self.wait()
        assert statuses == [0] * len(statuses), self.errors()[-6000:]
        return self


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _start(environment: dict[str, str], log: Path, function: Callable, arguments: tuple):
    gc.freeze()  # or else each collection would look through, and so copy, all that the server has imported
    os.environ.update(environment)
    with open(log, "w") as file, open(os.devnull, "w") as nothing:
        os.dup2(file.fileno(), sys.stderr.fileno())
        os.dup2(nothing.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    function(*arguments)


class Runs:
    """
    Runs of pretraining, each started when it is first asked for.

    Args:
        folder (`Path`): Where to put the configs, a text, and the runs with their checkpoints.
    """

    def __init__(self, folder: Path):
        self.folder, self._finished = folder, {}
        for name in CONFIGS:
            self.save_config(name, name)
        lines = [f"{n} times {m} is {n * m}, and {n} plus {m} is {n + m}.\n" for n in range(20) for m in range(20)]
        (folder / "text.txt").write_text("".join(lines))

    def save_config(self, name: str, base: str, **fields) -> Path:
        """Save a config of `CONFIGS` with four sets of experts and all router losses, and with other `fields`."""
        config = make_config(
            **{"vocab_size": 300, "num_experts_per_group": [4, 8, 4], **LOSSES, **CONFIGS[base], **fields}
        )
        config.save_pretrained(self.folder / name)
        return self.folder / name

    def initial(self, config: str) -> Path:
        """Folder of the model that runs of this config start from."""
        folder = self.folder / f"{config}_initial"
        if not folder.exists():
            set_seed(TrainingArguments("unused").seed)
            MoHGEForCausalLM(MoHGEConfig.from_pretrained(self.folder / config)).save_pretrained(folder)
        return folder

    def arguments(self, output: Path, config: str, layout: str, **more) -> list[str]:
        """Of pretraining. The steps are the same in all layouts."""
        values = {
            "model": self.folder / config,
            "datasets": self.folder / "text.txt",
            "output_dir": output,
            "sequence_length": LENGTH,
            "per_device_train_batch_size": ROWS // number_of_ranks(layout),
            "learning_rate": 1e-2,
            "max_steps": STEPS,
            "save_steps": STEPS // 2,
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **LAYOUTS[layout],
            **more,
        }
        return [text for name, value in values.items() for text in (f"--{name}", str(value))]

    def __call__(self, config: str, layout: str, **more) -> Path:
        """Folder of a finished run."""
        key = (config, layout, *more.items())
        if key not in self._finished:
            output = self.folder / f"run_{len(self._finished)}"
            values, ranks = self.arguments(output, config, layout, **more), number_of_ranks(layout)
            if config == "two_level" and ranks == 2:
                _launch(ranks, values)
            else:
                Ranks(ranks, output / "logs", pretrain, *values).succeed()
            self._finished[key] = output
        return self._finished[key]


def number_of_ranks(layout: str) -> int:
    return LAYOUTS[layout].get("fsdp_size", 1)


def _launch(ranks: int, values: list[str]):
    """As a user does."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(_ACCELERATE_CONFIG)]
    done = subprocess.run(
        [*command, "--num_processes", str(ranks), "-m", "mohge", "train", *values],
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "sign of life" not in done.stderr


# What ranks run.


def pretrain(*arguments: str):
    """`python -m mohge train` with these arguments."""
    sys.argv[1:] = ["train", *arguments]
    runpy.run_module("mohge", run_name="__main__", alter_sys=True)


def pretrain_without_variable(*arguments: str):
    """The same, where nobody has told accelerate that this is a CPU run."""
    del os.environ["ACCELERATE_USE_CPU"]
    pretrain(*arguments)


def pretrain_and_die(victims: list[int], *arguments: str):
    """The same, but the ranks `victims` are killed in the middle of writing the checkpoint of the last step."""
    save_rng_state = MoHGETrainer._save_rng_state

    def die(self, output_dir: str):
        if self.state.global_step == STEPS and dist.get_rank() in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        save_rng_state(self, output_dir)

    MoHGETrainer._save_rng_state = die
    pretrain(*arguments)


def load_with_other_version(model: Path):
    """Load a sharded model where rank 1 has another version of transformers."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        parallel_mohge.transformers_version = "4.0.0"
    MoHGEForCausalLM.from_pretrained(model, distributed_config=DistributedConfig(fsdp_size=2, ep_size=2))


def load_different_models(models: list[Path]):
    """Load a sharded model, on each rank another one."""
    dist.init_process_group("gloo")
    layout = DistributedConfig(fsdp_size=2, ep_size=2)
    MoHGEForCausalLM.from_pretrained(models[dist.get_rank()], distributed_config=layout)
