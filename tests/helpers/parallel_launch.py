"""One launch of many scenarios, and the comparison of its ranks with one process."""

from functools import cache
from pathlib import Path

import parallel_runs
import torch
from parallel_cases import SCENARIOS, save_adapter, save_model
from parallel_training_runs import Ranks

from mohge import MoHGEConfig


class Launch:
    """
    The results of all scenarios of so many ranks, from one launch, and of one process.

    Args:
        processes (`int`): Number of ranks.
        folder (`Path`): An empty folder.
    """

    def __init__(self, processes: int, folder: Path):
        self.scenarios, self.folder = SCENARIOS[processes], folder
        for model in sorted({scenario.model for scenario in self.scenarios.values()}):
            save_model(model, folder)
        save_adapter(folder)
        ranks = Ranks(processes, folder / "logs", parallel_runs.run_all, folder)
        statuses = ranks.wait(seconds=10 * parallel_runs.SECONDS)
        assert statuses == [0] * processes, ranks.errors()[-4000:]
        self.results = [torch.load(folder / f"rank_{rank}.pt") for rank in range(processes)]
        self.one_process = cache(lambda name: parallel_runs.run(self.scenarios[name], folder))

    def ranks(self, name: str) -> list[dict]:
        """The results of each rank."""
        for rank, results in enumerate(self.results):
            assert isinstance(results[name], dict), f"rank {rank}: {results[name]}"
        return [results[name] for results in self.results]

    def batches(self, name: str) -> list[list[dict]]:
        """The results of the ranks that share a batch out; each rank of a tensor-parallel group, and each pipeline
        stage, is in another list."""
        scenario, ranks = self.scenarios[name], self.ranks(name)
        copies = scenario.tp_size * scenario.layout.get("pp_size", 1)
        return [ranks[first::copies] for first in range(copies)]

    def config(self, name: str) -> MoHGEConfig:
        return MoHGEConfig.from_pretrained(self.folder / self.scenarios[name].model)


def names(processes: int, *runs: str) -> list[str]:
    """The scenarios of these kinds whose ranks agree with one process up to the rounding of float32."""
    return [name for name, scenario in SCENARIOS[processes].items() if scenario.run in runs and scenario.exact]


def cases(*runs: str) -> list[tuple[int, str]]:
    """The same of two ranks and of four."""
    return [(processes, name) for processes in SCENARIOS for name in names(processes, *runs)]
