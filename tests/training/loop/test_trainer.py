"""Training with Trainer: the loss does not depend on how a batch is split, nothing is dropped, resume is exact."""

import json

import pytest
import torch
from parallel_training_runs import Ranks
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainer_runs import (
    MIXTURE,
    collate,
    compare_ranks,
    config,
    every_loss,
    logged,
    logged_figures,
    mean_after_a_forward_on_one_rank,
    rows,
    train,
)
from transformers import Trainer, TrainerCallback

from mohge import MoHGEForCausalLM
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.training import MoHGETrainer, RouterScheduleCallback
from mohge.training.report import evaluate_routing


@pytest.fixture(scope="module")
def whole_batch(tmp_path_factory):
    return every_loss(accumulation=1, ranks=1, folder=str(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory):
    return every_loss(accumulation=8, ranks=1, folder=str(tmp_path_factory.mktemp("accumulated")))


@pytest.fixture(scope="module")
def two_ranks(run_of_two_ranks):
    return torch.load(run_of_two_ranks)["losses"]


@pytest.fixture(scope="module")
def run_of_two_ranks(tmp_path_factory):
    target = tmp_path_factory.mktemp("ranks") / "results.pt"
    Ranks(2, target.parent / "logs", compare_ranks, target).succeed()
    return target


RUNS = [*ROUTER_COEFFICIENTS, "expert, per group", "logit correction", "mixture"]


@pytest.mark.parametrize("split", ["accumulated", "two_ranks"])
@pytest.mark.parametrize("name", RUNS)
def test_loss_and_gradient_do_not_depend_on_the_split(name, split, whole_batch, request):
    other = request.getfixturevalue(split)
    for key in ("loss", "grad_norm"):
        (first, second), (other_first, other_second) = whole_batch[name][key], other[name][key]
        assert other_first == pytest.approx(first, rel=1e-5)
        assert other_second == pytest.approx(second, rel=5e-4)  # Adam makes much of the rounding of small gradients


@pytest.fixture(scope="module")
def without_router_loss(tmp_path_factory):
    """The first loss without router losses, of what the router losses are compared on."""
    folder = str(tmp_path_factory.mktemp("without"))
    correction = {"router_type": "grouped_top_k", "num_groups_per_tok": None, "router_logit_ema_strength": 0.5}
    models = {"own router": {}, "mixture": MIXTURE, "logit correction": correction}
    return {name: logged(train(config(**fields), folder, steps=1))[0] for name, fields in models.items()}


@pytest.mark.parametrize("name", RUNS)
def test_router_loss_is_in_the_training_loss(name, whole_batch, without_router_loss):
    without = without_router_loss.get(name, without_router_loss["own router"])
    assert abs(whole_batch[name]["loss"][0] - without) > 0.1


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("kind", ["label smoothing", "compute_loss_func"])
def test_own_losses_keep_the_router_losses(kind, accumulation, tmp_path):
    def summed_cross_entropy(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    own = {"label_smoothing_factor": 0.1} if kind == "label smoothing" else {"compute_loss_func": summed_cross_entropy}
    runs = {
        (trainer_class, loss): train(config(loss), str(tmp_path), trainer_class, accumulation, steps=1, **own)
        for trainer_class in (Trainer, MoHGETrainer)
        for loss in (None, "z")
    }
    values = {key: logged(trainer)[0] for key, trainer in runs.items()}
    # Trainer drops the loss; that it does is why MoHGETrainer exists.
    assert values[Trainer, "z"] == values[Trainer, None] == values[MoHGETrainer, None]
    z = logged(runs[MoHGETrainer, "z"], "router/z")[0]
    assert z > 0.1
    assert values[MoHGETrainer, "z"] == pytest.approx(values[MoHGETrainer, None] + z, rel=1e-5)
    assert logged(runs[MoHGETrainer, "z"], "objective")[0] == pytest.approx(values[Trainer, None], rel=1e-5)


def test_plain_trainer_smooths_labels_against_the_next_token(tmp_path):
    trainer = train(config(None), str(tmp_path), steps=1, label_smoothing_factor=0.1)
    with torch.no_grad():
        torch.manual_seed(0)
        model = MoHGEForCausalLM(config(None))
        batch = collate(rows())
        log_probabilities = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    log_probabilities, targets = log_probabilities[:, :-1], batch["labels"][:, 1:]
    counted = targets != -100
    negative = -log_probabilities.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)[counted].mean()
    smoothed = -log_probabilities.mean(-1)[counted].mean()
    assert logged(trainer)[0] == pytest.approx(float(0.9 * negative + 0.1 * smoothed), rel=1e-5)


@pytest.mark.parametrize("trainer_class", [Trainer, MoHGETrainer])
def test_evaluation_loss_is_the_language_model_loss(trainer_class, tmp_path):
    trainer = train(config("z"), str(tmp_path), trainer_class, steps=1)
    model = trainer.model.eval()
    loss, targets = 0.0, 0
    for row in rows():
        batch = collate([row])
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits[0, :-1]
        labels = batch["labels"][0, 1:]
        loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        targets += int((labels != -100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss / targets, rel=1e-5)


@pytest.mark.parametrize("overrides", [{}, MIXTURE], ids=["own router", "mixture"])
def test_logged_figures(overrides, tmp_path):
    trainer = train(config("expert", router_z_loss_coef=0.5, **overrides), str(tmp_path), MoHGETrainer, accumulation=2)
    for entry in trainer.state.log_history[:2]:
        total = entry["lm_loss"] + entry["router/expert"] + 0.5 * entry["router/z"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        tokens = sum(len(row["input_ids"]) for row in rows())
        assert entry["router/tokens_group_0"] + entry["router/tokens_group_1"] == tokens * 2
        dense = trainer.model.num_parameters() - trainer.model.config.routed_parameters
        # two layers, two experts each: of width 8 or 24, times three matrices of 32 columns
        assert dense + 2 * 2 * 8 * 96 <= entry["router/activated_parameters"] <= dense + 2 * 2 * 24 * 96
        assert entry["router/max_vio"] > 0
        assert entry["router/load_variation"] > 0
        assert 0 <= entry["router/group_entropy"] <= 0.6932
        assert entry["router/dead_experts"] >= 0


def test_logged_figures_of_two_ranks_are_those_of_one(run_of_two_ranks, tmp_path):
    for one, two in zip(logged_figures(str(tmp_path), 1), torch.load(run_of_two_ranks)["figures"], strict=True):
        assert one.keys() == two.keys()
        assert two == pytest.approx(one, rel=5e-4)


def test_forward_on_one_rank_alone_waits_for_no_other(run_of_two_ranks):
    """What it saw counts when the step ends, which all ranks say."""
    torch.testing.assert_close(torch.load(run_of_two_ranks)["mean"], mean_after_a_forward_on_one_rank())


def test_sharded_model_is_saved_whole_and_with_its_code(run_of_two_ranks):
    source, sharded = (run_of_two_ranks.parent / name for name in ("source", "sharded"))
    assert {path.name for path in sharded.iterdir()} == {path.name for path in source.iterdir()}
    auto_map = json.loads((sharded / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_mohge.MoHGEForCausalLM"
    expected, saved = (load_file(folder / "model.safetensors") for folder in (source, sharded))
    assert expected.keys() == saved.keys()
    assert all(torch.equal(expected[name], saved[name]) for name in expected)


@pytest.mark.parametrize("counts", [[2, 4], 4], ids=["unequal groups", "more groups in a layer"])
def test_figures_of_layers_that_differ(counts, tmp_path):
    sizes = [8, 24] if counts == 4 else [8, 40]
    layer = {"moe_intermediate_sizes": [*sizes, 48] if counts == 4 else sizes}
    run = config("expert", num_experts_per_group=counts, per_layer_config={1: layer})
    trainer = train(run, str(tmp_path), MoHGETrainer, steps=1)
    entry = trainer.state.log_history[0]
    groups = 3 if counts == 4 else 2
    per_layer = sum(entry[f"router/tokens_group_{g}"] for g in range(groups))
    assert per_layer == pytest.approx(2 * sum(len(row["input_ids"]) for row in rows()))
    routing = evaluate_routing(trainer.model, [{"input_ids": torch.randint(0, 50, (3, 12))}])
    assert [row["group"] for row in routing.statistics.table()] == list(range(groups))
    assert sum(row["choices"] for row in routing.statistics.table()) == 2 * 2 * 36
    torch.testing.assert_close(routing.group_choices.sum(1), torch.full((36,), 4.0))  # two in each of two layers


def test_model_without_experts_trains(tmp_path):
    trainer = train(config(mlp_only_layers=[0, 1], intermediate_size=16), str(tmp_path), MoHGETrainer, steps=1)
    assert trainer.state.log_history[0]["lm_loss"] == pytest.approx(trainer.state.log_history[0]["loss"], rel=1e-6)


def test_missing_labels_are_reported_by_trainer(tmp_path):
    trainer = train(config("z"), str(tmp_path), MoHGETrainer, steps=1)
    batch = collate(rows())
    del batch["labels"]
    trainer.model.train()
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.compute_loss(trainer.model, batch)


def test_running_mean_of_a_frozen_router_moves_once_per_step(tmp_path):
    means = []
    for accumulation in (1, 4):
        run = config(router_type="grouped_top_k", num_groups_per_tok=None, router_logit_ema_strength=0.5)
        torch.manual_seed(0)
        trainer = train(
            run, str(tmp_path), accumulation=accumulation, callbacks=[RouterScheduleCallback(), _FreezeRouters()]
        )
        means.append(trainer.model.routers[0].logit_ema_E)
    assert means[0].abs().max() > 1e-3
    torch.testing.assert_close(means[1], means[0], rtol=1e-4, atol=1e-6)


class _FreezeRouters(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for router in model.routers:
            router.requires_grad_(False)


def test_group_loss_starts_on_schedule(tmp_path):
    for trainer_class, extra in ((MoHGETrainer, {}), (Trainer, {"callbacks": [RouterScheduleCallback()]})):
        late = logged(train(config("group", group_aux_loss_start=0.5), str(tmp_path), trainer_class, steps=4, **extra))
        never = logged(train(config(None), str(tmp_path), steps=4))
        assert late[:2] == never[:2]
        assert late[2] > never[2] + 0.5


@pytest.mark.parametrize(
    "overrides",
    [
        {"loss": "group", "group_aux_loss_start": 0.75},
        {"loss": "intra_group", "router_intra_group_warmup": 1.0, "router_regularizer": "entropy"},
        {
            "loss": "load_balancing",
            "router_type": "grouped_top_k",
            "num_groups_per_tok": None,
            "router_logit_ema_strength": 0.5,
        },
        {"loss": "z", **MIXTURE},
    ],
    ids=["group schedule", "warm-up", "logit correction", "mixture"],
)
def test_resume_is_bit_identical(overrides, tmp_path):
    run = {"model_config": config(**overrides), "trainer_class": MoHGETrainer, "accumulation": 2, "steps": 4}
    straight = train(folder=str(tmp_path), save_strategy="steps", save_steps=2, **run)
    resumed = train(folder=str(tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **run)
    assert resumed.state.global_step == 4
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    keys = ("loss", "grad_norm", "lm_loss", "router/max_vio")
    for one, other in zip(straight.state.log_history[2:4], resumed.state.log_history[2:4], strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]


def test_gradient_checkpointing_trains_the_same(tmp_path):
    runs = [
        train(config("expert", router_z_loss_coef=1.0), str(tmp_path), gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    torch.testing.assert_close(logged(runs[1]), logged(runs[0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(logged(runs[1], "grad_norm"), logged(runs[0], "grad_norm"), rtol=1e-5, atol=0)


def test_lora_on_experts_and_router_trains_and_merges():
    torch.manual_seed(0)
    model = MoHGEForCausalLM(config("z"))
    targets = [f"mlp.experts.{name}_proj_{group}" for name in ("gate_up", "down") for group in (0, 1)]
    targets += ["mlp.gate.weight", "mlp.gate.group_weight"]
    adapted = get_peft_model(model, LoraConfig(r=4, target_parameters=targets))
    batch = collate(rows())
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # the second factor of an adapter starts at 0
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
