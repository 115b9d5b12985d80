"""Ranks compute what one process does, each with its share of the weights, and exchange no more than they must."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from model_cases import make_config
from parallel_cases import SCENARIOS, save_model
from parallel_launch import Launch, cases, names
from parallel_training_runs import Ranks
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEForCausalLM
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.parallel_mohge import check_layout


LAYOUTS = ["ep = fsdp", "ep = tp"]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """The launch of so many ranks."""
    return cache(lambda processes: Launch(processes, tmp_path_factory.mktemp(f"{processes}_ranks")))


@pytest.fixture
def launch(launches, request) -> Launch:
    """That of two ranks, where the test does not say how many."""
    return launches(request.node.callspec.params.get("processes", 2))


@pytest.mark.parametrize(("processes", "name"), cases("train_step", "evaluate", "adapted"))
def test_logits_are_those_of_one_process(processes, name, launch):
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


@pytest.mark.parametrize(("processes", "name"), cases("train_step"))
def test_gradients_are_those_of_one_process(processes, name, launch):
    check_gradients(launch, name)


@pytest.mark.parametrize(("processes", "name"), cases("train_step"))
def test_losses_and_counts_are_those_of_one_process(processes, name, launch):
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


@pytest.mark.parametrize("layout", ["fsdp", "tp", *LAYOUTS])
def test_every_router_loss_is_compared(layout, launch):
    assert launch.one_process(f"{layout}, two_level")["router_losses"].keys() == ROUTER_COEFFICIENTS.keys()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", ["bfloat16", "autocast"])
def test_bfloat16_is_as_close_as_its_rounding(run, layout, launch):
    name = f"{layout}, {run}"
    expected = launch.one_process(name)["logits"].float()
    assert expected.isfinite().all()
    for batch in launch.batches(name):
        logits = torch.cat([part["logits"] for part in batch]).float()
        assert (logits - expected).norm() <= 0.02 * expected.norm()
    check_gradients(launch, name, tolerance=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("idle", [0, 1])
def test_idle_rank_has_no_token(idle, layout, launch):
    name = f"{layout}, rank {idle} idle"
    config = launch.config(name)
    counts = launch.one_process(name)["tokens_per_expert"][0].chunk(2)
    assert counts[idle].sum() == 0
    assert counts[1 - idle].sum() == 8 * 9 * config.num_experts_per_tok


@pytest.mark.parametrize("processes", [4])
@pytest.mark.parametrize("name", [name for name in names(4, "train_step") if name.endswith("one set only")])
def test_ranks_of_other_sets_have_no_token(processes, name, launch):
    config = launch.config(name)
    *others, last = launch.one_process(name)["tokens_per_expert"][0].chunk(config.num_expert_sets)
    assert [int(counts.sum()) for counts in others] == [0, 0, 0]
    assert last.sum() == 8 * 9 * config.num_experts_per_tok


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_slots_are_empty_with_top_p(layout, launch):
    result, config = launch.one_process(f"{layout}, top_p"), launch.config(f"{layout}, top_p")
    for counts in result["tokens_per_expert"]:
        assert 0.3 < counts.sum() / (len(result["logits"]) * config.num_experts_per_tok) < 0.95


@pytest.mark.parametrize(
    ("processes", "name"), [case for case in cases("train_step") if "ep_size" in SCENARIOS[case[0]][case[1]].layout]
)
def test_rank_holds_its_range_of_experts(processes, name, launch):
    """Each rank holds `N_g / ep_size` experts of each group, those of its range of ids, or a share of these."""
    source = launch.one_process(name)["held"]
    layout = launch.scenarios[name].layout
    ep_size = layout["ep_size"]
    copies = layout.get("fsdp_size", 1) * layout.get("tp_size", 1) // ep_size
    layers, dense = launch.config(name).per_layer_config, launch.config(name).mlp_only_layers
    for layer, config in ((i, layers[i]) for i in range(2) if i not in dense):
        for group in config.kept_groups:
            ids, count = config.expert_id_table[group], config.expert_counts[group]
            for parameter in (f"model.layers.{layer}.mlp.experts.{kind}_proj_{group}" for kind in ("gate_up", "down")):
                for rank, results in enumerate(launch.ranks(name)):
                    first = rank % ep_size * config.num_experts // ep_size
                    owned = range(first, first + config.num_experts // ep_size)
                    slots = [slot for slot, expert in enumerate(ids) if expert in owned]
                    assert len(slots) == count // ep_size
                    expected = source[parameter][slots].chunk(copies)[rank // ep_size % copies]
                    assert torch.equal(results["held"][parameter], expected)


@pytest.mark.parametrize(
    ("processes", "name"), [case for case in cases("train_step") if SCENARIOS[case[0]][case[1]].tp_size == 1]
)
def test_no_parameter_is_held_twice(processes, name, launch):
    held = sum(tensor.numel() for rank in launch.ranks(name) for tensor in rank["held"].values())
    whole = sum(tensor.numel() for tensor in launch.one_process(name)["held"].values())
    assert held == whole * launch.scenarios[name].layout.get("dp_replicate_size", 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_own_implementation_is_the_default(layout, launch):
    for name, expected in {"two_level": "mohge", "mohge": "mohge", "all_to_all": "all_to_all"}.items():
        assert {rank["implementation"] for rank in launch.ranks(f"{layout}, {name}")} == {expected}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [2, 6])
def test_one_exchange_of_counts_and_one_of_rows_each_way(groups, layout, launch):
    for rank in launch.ranks(f"{layout}, exchanges of {groups} groups"):
        layers = 2
        assert [_kind(dtype) for dtype, _ in rank["forward"]] == ["counts", "rows", "rows"] * layers
        assert [_kind(dtype) for dtype, _ in rank["backward"]] == ["rows", "rows"] * layers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", ["of 6 groups", "with empty slots", "with removed experts"])
def test_each_choice_of_an_expert_that_is_there_travels_once(run, layout, launch):
    run = f"exchanges {run}"
    ranks = launch.ranks(f"{layout}, {run}")
    layers = launch.config(f"{layout}, {run}").sparse_layers
    for layer, counts in enumerate(launch.one_process(f"{layout}, {run}")["tokens_per_expert"]):
        choices = sum(int(n) for n, width in zip(counts, layers[layer].expert_widths, strict=True) if width)
        _, there, back = zip(*(rank["forward"][3 * layer : 3 * layer + 3] for rank in ranks), strict=True)
        assert choices > 0
        assert sum(shape[0] for _, shape in there) == sum(shape[0] for _, shape in back) == choices


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", ["in bfloat16", "under autocast"])
def test_rows_travel_in_the_dtype_of_the_computation(run, layout, launch):
    for rank in launch.ranks(f"{layout}, exchanges {run}"):
        for direction in ("forward", "backward"):
            rows = [dtype for dtype, _ in rank[direction] if _kind(dtype) == "rows"]
            assert rows == ["torch.bfloat16"] * 4


def _kind(dtype: str) -> str:
    return "counts" if "int" in dtype else "rows"


@pytest.mark.parametrize("name", names(2, "generate"))
def test_generated_tokens_are_those_of_one_process(name, launch):
    expected = launch.one_process(name)["tokens"]
    for rank in launch.ranks(name):
        assert all(torch.equal(actual, tokens) for actual, tokens in zip(rank["tokens"], expected, strict=True))


@pytest.mark.parametrize(("processes", "name"), cases("save"))
def test_saved_checkpoint_is_the_source_bit_by_bit(processes, name, launch):
    source, saved = launch.one_process(name), launch.ranks(name)[0]
    assert "distributed_config" not in saved["config"]
    assert saved["config"] == source["config"]
    assert saved["files"] == source["files"]
    assert saved["weights"].keys() == source["weights"].keys()
    assert all(torch.equal(saved["weights"][parameter], weight) for parameter, weight in source["weights"].items())
    model = MoHGEForCausalLM.from_pretrained(launch.scenarios[name].saved(launch.folder))
    assert all(torch.equal(model.state_dict()[parameter], weight) for parameter, weight in source["weights"].items())


@pytest.mark.parametrize(("processes", "name"), cases("train_step"))
def test_nothing_waits_for_tokens_after_the_backward(processes, name, launch):
    assert [rank["waiting"] for rank in launch.ranks(name)] == [[]] * processes


def differentiate_twice(model: Path):
    dist.init_process_group("gloo")
    layout = DistributedConfig(tp_size=2, ep_size=2)
    sharded = MoHGEForCausalLM.from_pretrained(model, distributed_config=layout).train().requires_grad_(False)
    embeddings = torch.randn(2, 9, sharded.config.hidden_size, requires_grad=True)
    logits = sharded(inputs_embeds=embeddings).logits
    (gradient,) = torch.autograd.grad(logits.square().sum(), embeddings, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_second_derivatives_are_refused(tmp_path):
    save_model("two_level", tmp_path)
    ranks = Ranks(2, tmp_path / "logs", differentiate_twice, tmp_path / "two_level")
    assert ranks.wait() == [0, 0], ranks.errors()


@pytest.mark.parametrize(("experts", "ep_size", "fsdp_size"), [(10, 2, 8), (4, 4, 8), (14, 2, 12), (6, 2, 8)])
def test_remedy_for_ranks_without_experts_fits(experts, ep_size, fsdp_size):
    config = make_config(num_experts_per_group=experts)
    with pytest.raises(ValueError, match="without a share of the") as refusal:
        check_layout(config, DistributedConfig(fsdp_size=fsdp_size, ep_size=ep_size))
    most = int(re.search(r"use (\d+) ranks", str(refusal.value)).group(1))
    assert ep_size <= most < fsdp_size
    check_layout(config, DistributedConfig(fsdp_size=most, ep_size=ep_size))
