"""One launch of many scenarios, and the comparison of its ranks with one process."""

from functools import cache
from pathlib import Path

import parallel_runs
import pytest
import torch
from parallel_cases import SCENARIOS, save_adapter, save_model
from parallel_training_runs import Ranks

from mohge import MoHGEConfig, MoHGEForCausalLM


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


def names(processes: int, run: str = "train_step") -> list[str]:
    """The scenarios of one kind whose ranks agree with one process up to the rounding of float32."""
    return [name for name, scenario in SCENARIOS[processes].items() if scenario.run == run and scenario.exact]


def check_logits(launch: Launch, name: str):
    expected = launch.one_process(name)["logits"]
    for batch in launch.batches(name):
        torch.testing.assert_close(torch.cat([part["logits"] for part in batch]), expected, rtol=0, atol=1e-5)


def check_gradients(launch: Launch, name: str, tolerance: float = 1e-4):
    expected = launch.one_process(name)["gradients"]
    assert all(gradient.isfinite().all() for gradient in expected.values())
    assert sum(bool(gradient.any()) for gradient in expected.values()) > 0.8 * len(expected)
    for rank in launch.ranks(name):
        gradients, wrong = rank["gradients"], {}
        assert gradients.keys() == expected.keys()
        assert [parameter for parameter, gradient in gradients.items() if gradient is None] == []
        for parameter, gradient in gradients.items():
            norm, error = expected[parameter].norm(), (gradient - expected[parameter]).norm()
            if not error <= tolerance * norm:
                wrong[parameter] = float(error / norm)
        assert wrong == {}


def check_statistics(launch: Launch, name: str):
    """Losses, counts and running means of one process, in sum over the parts of the batch."""
    one = launch.one_process(name)
    for batch in launch.batches(name):
        for key in ("loss", "aux_loss"):
            assert sum(float(part[key]) for part in batch) == pytest.approx(float(one[key]), rel=1e-5)
        for loss, value in one["router_losses"].items():
            assert value != 0
            assert sum(float(part["router_losses"][loss]) for part in batch) == pytest.approx(float(value), rel=1e-5)
        for layer, counts in enumerate(one["tokens_per_expert"]):
            assert torch.equal(sum(part["tokens_per_expert"][layer] for part in batch), counts)
    for rank in launch.ranks(name):
        for mean, expected in zip(rank["logit_means"], one["logit_means"], strict=True):
            torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


def check_own_experts(launch: Launch, name: str):
    """Each rank holds `N_g / ep_size` experts of each group, those of its range of ids, or a share of these."""
    source = launch.one_process(name)["held"]
    layout = launch.scenarios[name].layout
    ep_size = layout["ep_size"]
    copies = layout.get("fsdp_size", 1) * layout.get("tp_size", 1) // ep_size
    layers, dense = launch.config(name).per_layer_config, launch.config(name).mlp_only_layers
    for layer, config in ((i, layers[i]) for i in range(2) if i not in dense):
        for group, (ids, count) in enumerate(zip(config.expert_id_table, config.expert_counts, strict=True)):
            for parameter in (f"model.layers.{layer}.mlp.experts.{kind}_proj_{group}" for kind in ("gate_up", "down")):
                for rank, results in enumerate(launch.ranks(name)):
                    first = rank % ep_size * config.num_experts // ep_size
                    owned = range(first, first + config.num_experts // ep_size)
                    slots = [slot for slot, expert in enumerate(ids) if expert in owned]
                    assert len(slots) == count // ep_size
                    expected = source[parameter][slots].chunk(copies)[rank // ep_size % copies]
                    assert torch.equal(results["held"][parameter], expected)


def check_nothing_is_held_twice(launch: Launch, name: str):
    held = sum(tensor.numel() for rank in launch.ranks(name) for tensor in rank["held"].values())
    whole = sum(tensor.numel() for tensor in launch.one_process(name)["held"].values())
    assert held == whole * launch.scenarios[name].layout.get("dp_replicate_size", 1)


def check_checkpoint(launch: Launch, name: str):
    source, saved = launch.one_process(name), launch.ranks(name)[0]
    assert "distributed_config" not in saved["config"]
    assert saved["config"] == source["config"]
    assert saved["files"] == source["files"]
    assert saved["weights"].keys() == source["weights"].keys()
    assert all(torch.equal(saved["weights"][parameter], weight) for parameter, weight in source["weights"].items())
    model = MoHGEForCausalLM.from_pretrained(launch.scenarios[name].saved(launch.folder))
    assert all(torch.equal(model.state_dict()[parameter], weight) for parameter, weight in source["weights"].items())
