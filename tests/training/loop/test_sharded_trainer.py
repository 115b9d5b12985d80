"""MoHGETrainer with a model, or an adapter on it, that is spread over two ranks."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from parallel_cases import save_model
from parallel_training_runs import Ranks
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEForCausalLM
from mohge.training import MoHGETrainer


BEST_IS_FIRST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "load_best_model_at_end": True,
    "greater_is_better": True,  # the loss falls
}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
# With this each step whose loss is below that of the first lowers the learning rate.
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "max", "patience": 0}}


def build_trainer(
    model: Path, folder: Path, trainer_class=MoHGETrainer, adapter: LoraConfig | None = None, **arguments
) -> Trainer:
    ids = torch.randint(0, 50, (16, 12), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    training = TrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], **arguments
    )
    layout = DistributedConfig(fsdp_size=2, ep_size=2)
    trained = MoHGEForCausalLM.from_pretrained(model, distributed_config=layout)
    if adapter is not None:
        trained = get_peft_model(trained, adapter)
    return trainer_class(trained, training, train_dataset=rows, eval_dataset=rows[:4])


def try_trainers(model: Path, folder: Path):
    """What Trainer and MoHGETrainer say to a sharded model, and the weights at the end of a run that loads its best
    model."""
    outcome = {"save_only_model": []}
    try:
        build_trainer(model, folder, Trainer)
    except ValueError as error:
        outcome["refusal"] = str(error)
    for save_only_model in (True, False):
        run = folder / f"save_only_model_{save_only_model}"
        trainer = build_trainer(model, run, max_steps=3, save_only_model=save_only_model, **BEST_IS_FIRST)
        outcome["save_only_model"].append(trainer.args.save_only_model)
        trainer.train()
        trainer.save_model(str(folder / f"best_{save_only_model}"))
    if dist.get_rank() == 0:
        torch.save(outcome, folder / "outcome.pt")


def train_and_resume(model: Path, folder: Path, arguments: dict):
    """Train for 4 steps, and again from the checkpoint of the second."""
    start = None
    for number, name in enumerate(("whole", "resumed")):
        set_seed(number)
        trainer = build_trainer(model, folder / name, max_steps=4, **BEST_IS_FIRST, **arguments)
        trainer.train(resume_from_checkpoint=start)
        start = str(folder / name / "checkpoint-2")
        trainer.save_model(str(folder / name / "best"))
    trained = {name: parameter.detach() for name, parameter in trainer.model.named_parameters() if "lora" in name}
    torch.save(trained, folder / f"adapter_of_rank_{dist.get_rank()}.pt")


def train_as_if_alone(model: Path, folder: Path):
    """Train with and without what tells accelerate that this is a CPU run."""
    del os.environ["ACCELERATE_USE_CPU"]
    with pytest.raises(ValueError, match=r"1 processes, .* spread over 2: on CPU pass use_cpu=True"):
        build_trainer(model, folder)
    trainer = build_trainer(model, folder, max_steps=1, use_cpu=True)
    assert trainer.args.world_size == 2
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded_trainer")
    save_model("two_level", folder)
    return folder


def launch(folder: Path, name: str, function, *arguments) -> Path:
    """Where two ranks have left what `function` writes."""
    Ranks(2, folder / name / "logs", function, folder / "two_level", folder / name, *arguments).succeed()
    return folder / name


@pytest.fixture(scope="module")
def trainers(folder) -> Path:
    return launch(folder, "trainers", try_trainers)


@pytest.fixture(scope="module")
def adapters(folder) -> Path:
    return launch(folder, "adapters", train_and_resume, {"adapter": LORA})


def test_trainer_refuses_and_own_trainer_saves_the_optimizer(trainers):
    outcome = torch.load(trainers / "outcome.pt")
    assert "save_only_model" in outcome["refusal"]
    assert outcome["save_only_model"] == [True, False]
    assert not (trainers / "save_only_model_True" / "checkpoint-3" / "optimizer").exists()
    assert (trainers / "save_only_model_False" / "checkpoint-3" / "optimizer").is_dir()


@pytest.mark.parametrize("save_only_model", [True, False])
def test_best_model_is_loaded_at_the_end(save_only_model, trainers):
    run = trainers / f"save_only_model_{save_only_model}"
    check_best(trainers / f"best_{save_only_model}", run, "model.safetensors", last=3)


@pytest.mark.parametrize("run", ["whole", "resumed"])
def test_best_adapter_is_loaded_at_the_end(run, adapters):
    check_best(adapters / run / "best", adapters / run, "adapter_model.safetensors", last=4)


def check_best(loaded: Path, run: Path, file: str, last: int):
    """The first checkpoint is the best."""
    state = json.loads((run / f"checkpoint-{last}" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name == "checkpoint-1"
    loaded, expected, other = (load_file(path / file) for path in (loaded, best, run / f"checkpoint-{last}"))
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not any(torch.equal(loaded[name], other[name]) for name in other)


def curve(run: Path) -> list[dict[str, float]]:
    """What was logged and evaluated at each step, as numbers."""
    state = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())
    measured = ("runtime", "per_second", "router_load")
    return [{k: v for k, v in entry.items() if not k.endswith(measured)} for entry in state["log_history"]]


def check_resumed(run: Path):
    whole, resumed = curve(run / "whole"), curve(run / "resumed")
    assert [entry["step"] for entry in whole if "loss" in entry] == [1, 2, 3, 4]
    assert whole[-2]["loss"] < whole[0]["loss"]
    for entry, expected in zip(resumed, whole, strict=True):
        assert entry == pytest.approx(expected, rel=1e-6)


def test_resumed_adapter_goes_on_as_if_uninterrupted(adapters):
    check_resumed(adapters)


def test_ranks_have_the_same_adapter(adapters):
    first, second = (torch.load(adapters / f"adapter_of_rank_{rank}.pt") for rank in range(2))
    assert len(first) == 8
    assert all(first[name].any() and torch.equal(first[name], second[name]) for name in first)


def test_learning_rate_of_a_plateau_is_resumed(folder):
    run = launch(folder, "plateau", train_and_resume, PLATEAU)
    check_resumed(run)
    rates = [entry["learning_rate"] for entry in curve(run / "whole") if "loss" in entry]
    assert rates[3] < rates[2] < rates[0]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the ranks would train on the accelerator")
def test_ranks_that_take_themselves_for_alone_are_refused(folder):
    launch(folder, "alone", train_as_if_alone)
