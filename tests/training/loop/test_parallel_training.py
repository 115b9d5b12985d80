"""Training on several ranks: the loss curve, the checkpoints and the traffic are those of one process."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from parallel_training_runs import (
    CONFIGS,
    LAYOUTS,
    LENGTH,
    ROWS,
    STEPS,
    Ranks,
    Runs,
    load_different_models,
    load_with_other_version,
    number_of_ranks,
    pretrain,
    pretrain_and_die,
    pretrain_without_variable,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import get_last_checkpoint

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.commands.main import main
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.training import RouterTraffic


RUN = ("grouped_top_k", "fsdp 2, ep 2")
"""The run that others resume: with tied weights and a buffer."""
SHARDED = [("two_level", "fsdp 2, ep 2"), RUN, ("grouped_top_k", "fsdp 4, ep 2")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("parallel_training"))


def curve(run: Path) -> list[dict[str, float]]:
    """What was logged at each step, as numbers."""
    state = json.loads((run / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    apart = ("router_load", "tokens_per_second")
    return [{name: value for name, value in entry.items() if name not in apart} for entry in entries]


def assert_same_curve(actual: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float):
    for entry, expected_entry in zip(actual, expected, strict=True):
        assert entry == pytest.approx(expected_entry, rel=tolerance)


@pytest.mark.parametrize(("config", "layout"), SHARDED)
def test_loss_curve_is_that_of_one_process(config, layout, runs):
    actual, expected = curve(runs(config, layout)), curve(runs(config, "one process"))
    assert expected[-1]["lm_loss"] < 0.95 * expected[0]["lm_loss"]
    assert_same_curve(actual[:1], expected[:1], 1e-5)
    assert_same_curve(actual[1:], expected[1:], 1e-3)


def test_loss_curve_does_not_depend_on_accumulation(runs):
    accumulated = runs(*RUN, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_curve(curve(accumulated), curve(runs("grouped_top_k", "one process")), 1e-3)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the ranks would train on the accelerator")
def test_ranks_on_cpu_find_each_other_by_themselves(runs):
    output = runs.folder / "without_variable"
    Ranks(2, output / "logs", pretrain_without_variable, *runs.arguments(output, *RUN)).succeed()
    assert_same_curve(curve(output), curve(runs(*RUN)), 1e-6)


@pytest.mark.parametrize("layout", ["one process", "fsdp 2, ep 2"])
def test_model_is_saved_in_the_dtype_asked_for(layout, runs):
    run = runs("grouped_top_k", layout, dtype="bfloat16", max_steps=1, save_steps=1)
    for folder in (run / "checkpoint-1", run):
        weights = load_file(folder / "model.safetensors")
        # Running means stay in float32.
        dtypes = {weight.dtype for name, weight in weights.items() if not name.endswith(("logit_ema_E", "_pending"))}
        assert dtypes == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("config", CONFIGS)
def test_every_router_loss_is_in_the_curve(config, runs):
    for entry in curve(runs(config, "fsdp 2, ep 2")):
        logged = {name for name in ROUTER_COEFFICIENTS if entry.get(f"router/{name}")}
        assert logged == ROUTER_COEFFICIENTS.keys() - ({"group"} if config == "grouped_top_k" else set())


def logits(model_folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids = torch.randint(0, 257, (4, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", ["checkpoint-2", "checkpoint-4", "."])
@pytest.mark.parametrize(("config", "layout"), SHARDED)
def test_saved_model_is_that_of_one_process(config, layout, name, runs):
    one_process = runs(config, "one process")
    expected = logits(one_process / name)
    assert (expected - logits(runs.initial(config))).abs().max() > 0.1
    torch.testing.assert_close(logits(runs(config, layout) / name), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("config", "layout"), SHARDED)
def test_final_model_is_the_last_checkpoint_bit_by_bit(config, layout, runs):
    run = runs(config, layout)
    last, final = (load_file(path / "model.safetensors") for path in (run / f"checkpoint-{STEPS}", run))
    assert last.keys() == final.keys() >= load_file(runs.initial(config) / "model.safetensors").keys()
    assert all(torch.equal(last[name], final[name]) for name in final)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != RUN[1]])
def test_resumed_run_goes_on_as_if_uninterrupted_on_another_layout(layout, runs):
    resumed = runs("grouped_top_k", layout, resume_from_checkpoint=runs(*RUN) / "checkpoint-2")
    assert_same_curve(curve(resumed), curve(runs(*RUN)), 1e-4)


def test_true_resumes_from_the_last_checkpoint(runs):
    run, output = runs(*RUN), runs.folder / "from_last"
    last = shutil.copytree(run / "checkpoint-2", output / "checkpoint-2")
    (last / "mark.txt").touch()  # a run from the start would replace it
    values = runs.arguments(output, *RUN, resume_from_checkpoint=True)
    Ranks(2, output / "logs", pretrain, *values).succeed()
    assert (last / "mark.txt").exists()
    assert_same_curve(curve(output), curve(run), 1e-6)


def test_resumed_run_needs_the_optimizer_state(runs):
    # The scheduler's state is not at stake here; steps are long enough to tell what they are made of.
    constant = {"lr_scheduler_type": "constant", "learning_rate": 3e-2}
    whole = runs(*RUN, **constant)
    start = shutil.copytree(whole / "checkpoint-2", runs.folder / "other_optimizer" / "checkpoint-2")
    shutil.rmtree(start / "optimizer")
    shutil.copytree(whole / "checkpoint-4" / "optimizer", start / "optimizer")
    without = runs(*RUN, resume_from_checkpoint=start, **constant)
    expected, actual = ([entry["lm_loss"] for entry in curve(run)] for run in (whole, without))
    assert actual[2] == pytest.approx(expected[2], rel=1e-6)  # before the first update
    for loss, other in zip(actual[3:], expected[3:], strict=True):
        assert abs(loss - other) > 100 * 1e-4 * other


def test_checkpoint_of_an_earlier_run_is_replaced(runs):
    run, output = runs(*RUN), runs.folder / "replaced"
    old = shutil.copytree(run / "checkpoint-4", output / "checkpoint-4")
    (old / "model.safetensors").write_bytes(b"old")
    (old / "old.txt").touch()
    values = runs.arguments(output, *RUN, resume_from_checkpoint=run / "checkpoint-2")
    Ranks(2, output / "logs", pretrain, *values).succeed()
    assert_same_curve(curve(output), curve(run), 1e-6)
    assert digests(old).keys() == digests(run / "checkpoint-4").keys()
    torch.testing.assert_close(logits(old), logits(run / "checkpoint-4"))
    assert list(output.glob(".*")) == []


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_rank_that_dies_in_a_save_leaves_the_previous_checkpoint(runs):
    """Each run begins with what those before it have left behind."""
    run, output = runs(*RUN), runs.folder / "killed"
    previous = shutil.copytree(run / "checkpoint-2", output / "checkpoint-2")
    before = digests(previous)
    values = runs.arguments(output, *RUN, resume_from_checkpoint=previous, save_total_limit=1)
    for victims in ([0], [1], [0, 1]):
        ranks = Ranks(2, output / f"logs_{victims}", pretrain_and_die, victims, *values)
        assert ranks.wait() == [-9 if rank in victims else 1 for rank in range(2)], ranks.errors()[-6000:]
        assert digests(previous) == before
        assert get_last_checkpoint(output) == str(previous)
        assert (output / ".incomplete").exists()

    Ranks(2, output / "logs_of_resumed", pretrain, *values).succeed()
    assert_same_curve(curve(output), curve(run), 1e-6)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not (output / ".incomplete").exists()


MISUSE = {
    "sets": ({"num_experts_per_group": [3, 6, 3]}, {}, r"`ep_size` 2 does not divide the 3 sets .*: use 1 or 3"),
    "heads": (
        {"num_key_value_heads": 1},
        {"ep_size": 1, "fsdp_size": 1, "tp_size": 2},
        r"`tp_size` 2 does not divide `num_key_value_heads` \(1\): use 1",
    ),
    "sizes": ({}, {"ep_size": 3}, r"`ep_size` must divide `fsdp_size \* tp_size`"),
    "processes": ({}, {"fsdp_size": 4}, r"2 processes were started: launch with --num_processes 4"),
    "text": (
        {"max_position_embeddings": 100_000},
        {"sequence_length": 100_000},
        r"`sequence_length` \(100000 tokens\): give more text",
    ),
    "model": ({}, {"model": "no/such/file.json"}, r"no/such/file.json does not exist: give a config.json"),
    "vocabulary": ({"vocab_size": 100}, {}, r"`vocab_size` is 100, and the tokenizer has \d+ tokens: raise it"),
    "best model": ({}, {"load_best_model_at_end": True}, r"load_best_model_at_end requires .* eval"),
    "checkpoint": ({}, {"resume_from_checkpoint": "no/checkpoint-2"}, r"no/checkpoint-2"),
}


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_refused(name, runs):
    fields, more, expected = MISUSE[name]
    runs.save_config(f"misuse_{name}", "two_level", **fields)
    check_refusal(expected, runs, f"misuse_{name}", "fsdp 2, ep 2", **more)


def test_ranks_without_experts_are_refused(runs):
    runs.save_config("few", "two_level", num_experts_per_group=[2, 4, 2])
    check_refusal(r"`fsdp_size` 4 .* the 2 experts of a group: use 2 ranks", runs, "few", "fsdp 4, ep 2")


def test_checkpoint_of_another_config_is_refused(runs):
    runs.save_config("wider", "grouped_top_k", moe_intermediate_sizes=[8, 24, 48])
    expected = r"`moe_intermediate_sizes` is \[8, 24, 40\] there and \[8, 24, 48\] in this model: load the model with"
    check_refusal(expected, runs, "wider", "fsdp 2, ep 2", resume_from_checkpoint=runs(*RUN) / "checkpoint-2")


def test_optimizer_of_one_process_is_refused_by_sharded_run(runs):
    checkpoint = runs("grouped_top_k", "one process") / "checkpoint-2"
    expected = r"checkpoint-2 holds the optimizer of a run that was not spread over ranks: resume it that way"
    check_refusal(expected, runs, *RUN, resume_from_checkpoint=checkpoint)


def check_refusal(expected: str, runs: Runs, config: str, layout: str, **more):
    """All ranks end with status 2, and one line says why."""
    output = runs.folder / f"refused_{config}"
    values = runs.arguments(output, config, layout, **more)
    ranks = Ranks(number_of_ranks(layout), output / "logs", pretrain, *values)
    assert set(ranks.wait()) == {2}, ranks.errors()
    (line,) = re.findall("^mohge.*", ranks.errors(), re.MULTILINE)
    assert line.startswith("mohge train: ")
    assert re.search(expected, line), line
    assert "Traceback" not in ranks.errors()


@pytest.mark.parametrize("differing", ["versions", "models", "layouts that fit"])
def test_ranks_that_differ_all_say_so(differing, runs):
    models = [runs.initial(config) for config in CONFIGS]
    if differing == "versions":
        ranks = Ranks(2, runs.folder / differing, load_with_other_version, models[0])
        name, first, second = "transformers", transformers.__version__, "4.0.0"
    else:
        name, first, second = "config.backbone_config.tie_word_embeddings", "false", "true"
        if differing == "layouts that fit":  # two ranks cannot share the 3 sets of the second model
            models[1] = runs.save_config("three_sets", "two_level", num_experts_per_group=[3, 6, 3])
            MoHGEForCausalLM(MoHGEConfig.from_pretrained(models[1])).save_pretrained(models[1])
            name, first, second = "config.num_experts_per_group", [4, 8, 4], [3, 6, 3]
        ranks = Ranks(2, runs.folder / differing, load_different_models, models)
    assert ranks.wait() == [1, 1]
    for rank in range(2):
        assert f"ValueError: ranks differ: {name} is {first} on rank 0 and {second} on rank 1" in ranks.errors(rank)


def test_traffic_of_all_ranks_is_recorded(runs, capsys):
    run, one_process = runs("two_level", "fsdp 2, ep 2"), runs("two_level", "one process")
    traffic, expected = (RouterTraffic.load(folder / "traffic.json") for folder in (run, one_process))
    config = MoHGEConfig.from_pretrained(run)
    traffic.check(config)
    assert traffic.tokens == [ROWS // 2 * LENGTH] * 2 * STEPS
    for layer in range(config.num_hidden_layers):
        counts = traffic.layer_counts(layer)
        assert counts.sum(1).tolist() == [tokens * config.num_experts_per_tok for tokens in traffic.tokens]
        assert not torch.equal(counts[0], counts[1])
        assert torch.equal(counts[0] + counts[1], expected.layer_counts(layer)[0])
    assert main(["place", str(run), "--devices", "2", "--traffic", str(run / "traffic.json")]) == 0
    assert f"traffic: {STEPS * ROWS * LENGTH:,} recorded tokens" in capsys.readouterr().out


def test_trained_model_keeps_its_tokenizer(runs):
    """A tokenizer of the new text would make nonsense of what the model has learnt."""
    source, output = runs("two_level", "one process"), runs.folder / "continued"
    (runs.folder / "other.txt").write_text("Other words, of another text altogether. " * 400)
    values = runs.arguments(output, "two_level", "one process", model=source, datasets=runs.folder / "other.txt")
    Ranks(1, output / "logs", pretrain, *values).succeed()
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
