"""Trainers and adapters of others, with their default settings: Hugging Face Trainer, TRL, LoRA by habit."""

import logging
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from finetune_cases import TEMPLATE, make_workplace, messages, questions
from model_cases import make_config, make_ids, make_model
from peft import LoraConfig, get_peft_model
from trainer_runs import collate, config, logged, rows, train
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer
from transformers import TrainingArguments as Arguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from mohge import MoHGEForCausalLM
from mohge.training import MoHGETrainer


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def said(caplog, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


# Hugging Face Trainer


@pytest.mark.parametrize("router_logits", [False, True])
def test_metrics_get_logits_alone(router_logits, tmp_path):
    """Not a tuple of all that the model returns."""
    seen = {}

    def keep_most_likely(logits, labels):
        seen["preprocessed"] = logits.shape
        return logits.argmax(-1)

    def accuracy(prediction):
        seen["predictions"] = prediction.predictions.shape
        hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"accuracy": float(hits[prediction.label_ids[:, 1:] != -100].mean())}

    model = MoHGEForCausalLM(config("expert", output_router_logits=router_logits))
    arguments = Arguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=8)
    options = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": keep_most_likely}
    trainer = Trainer(model, arguments, data_collator=collate, eval_dataset=rows(), **options)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert seen == {"preprocessed": (8, 19, 50), "predictions": (8, 19)}
    trainer.preprocess_logits_for_metrics = None
    trainer.compute_metrics = None
    predictions = trainer.predict(rows()).predictions
    assert isinstance(predictions, np.ndarray)
    assert predictions.shape == (8, 19, 50)


@pytest.mark.parametrize("trainer_class", [Trainer, MoHGETrainer])
@pytest.mark.parametrize("average_tokens", [True, False], ids=["by target", "by batch"])
def test_step_without_any_target_changes_nothing_but_router_losses(trainer_class, average_tokens, tmp_path):
    class NoTargets(trainer_class):
        def get_batch_samples(self, *args):
            batches, number = super().get_batch_samples(*args)
            for batch in batches:
                batch["labels"][:] = -100
            return batches, number * 0 if average_tokens else None

    trainer = train(config("expert"), str(tmp_path), NoTargets, accumulation=2, steps=1)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    assert all(math.isfinite(value) for key in ("loss", "grad_norm") for value in logged(trainer, key))


def test_forward_without_targets_has_loss_zero():
    model = make_model().train()
    ids = make_ids()
    labels = torch.full_like(ids, -100)
    for items in (None, 0, torch.tensor(0)):
        model.zero_grad()
        outputs = model(ids, labels=labels, num_items_in_batch=items)
        assert outputs.lm_loss == 0
        assert torch.equal(outputs.loss, outputs.aux_loss)
        outputs.loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.eval()(ids, labels=labels).loss == 0


# TRL


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    # The router and the loss of Mixtral, which TRL knows.
    losses = {"router_aux_loss_coef": 0.0, "router_expert_aux_loss_coef": 0.125}
    return make_workplace(tmp_path_factory.mktemp("place"), router_type="top_k", **losses)


def trl_trainer(kind: str, place, folder, **options):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = TEMPLATE
    prompts, answers = [[{"role": "user", "content": q}] for q, _ in questions()], [a for _, a in questions()]
    turns = [messages(*pair) for pair in questions()]
    worse = [messages(question, "no") for question, _ in questions()]
    rows = {
        "sft": {"messages": turns},
        "dpo": {"prompt": prompts, "chosen": [t[1:] for t in turns], "rejected": [w[1:] for w in worse]},
        "grpo": {"prompt": prompts, "answer": answers},
        "reward": {"chosen": turns, "rejected": worse},
    }[kind]
    trainer_class, config_class = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "grpo": (GRPOTrainer, GRPOConfig),
        "reward": (RewardTrainer, RewardConfig),
    }[kind]
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(place / "base", num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(place / "base")
    arguments = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        **options,
    }
    more = {}
    if kind == "grpo":
        arguments |= {"num_generations": 2, "max_completion_length": 4}
        more = {"reward_funcs": lambda completions, **kwargs: [float(len(str(text))) for text in completions]}
    return trainer_class(
        model,
        args=config_class(**arguments),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        **more,
    )


@pytest.mark.usefixtures("new_warnings")
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo", "reward"])
def test_trl_with_defaults_names_the_losses_that_it_leaves_out(kind, place, tmp_path, caplog):
    trainer = trl_trainer(kind, place, tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (message,) = said(caplog, "left out where a loss is computed outside")
    assert "`router_expert_aux_loss_coef`" in message


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_trl_adds_the_load_balancing_loss(kind, place, tmp_path):
    """By the argument of its own, in Mixtral's form: over all layers at once."""
    trainer = trl_trainer(kind, place, tmp_path, router_aux_loss_coef=0.5)
    found = []
    compute_loss = trainer.compute_loss

    def compare(model, inputs, *args, **kwargs):
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:  # GRPO
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        outputs = trainer.model(ids, attention_mask=mask, output_router_logits=True)
        found.append(load_balancing_loss_func(outputs.router_logits, 12, 3, mask))
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = compare
    trainer.train()
    (aux_loss,) = [entry["aux_loss"] for entry in trainer.state.log_history if "aux_loss" in entry]
    assert aux_loss == pytest.approx(float(found[0]), rel=1e-4)


# PEFT


@pytest.mark.usefixtures("new_warnings")
@pytest.mark.parametrize(
    ("targets", "warned"),
    [("all-linear", True), (SEVEN, True), (r".*self_attn\.(q|v)_proj", False)],
    ids=["all-linear", "seven names", "pattern"],
)
def test_adapters_that_leave_the_experts_out_say_so(targets, warned, caplog):
    # one message for each share of parameters, in a process
    model = make_model(mlp_only_layers=[0], vocab_size=900 if targets == SEVEN else 90)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, task_type="CAUSAL_LM")).train()
    ids = make_ids()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            adapted(ids, labels=ids).loss.backward()
    messages = said(caplog, "leave the routed experts as they are")
    assert len(messages) == warned
    if warned:
        names = {"target_parameters": ["experts.gate_up_proj_0", "experts.down_proj_0"]}
        assert all(name in messages[0] for name in names["target_parameters"])
        again = get_peft_model(make_model(), LoraConfig(target_modules=SEVEN, **names)).train()
        caplog.clear()
        again(ids, labels=ids)
        assert not said(caplog, "leave the routed experts as they are")


def test_config_has_one_number_of_experts_where_layers_agree():
    assert make_config().num_experts == 12
    assert make_config(per_layer_config={1: {"moe_intermediate_sizes": [16, 40, 64]}}).num_experts == 12
    groups = {"moe_intermediate_sizes": [8, 16, 24, 64], "num_experts_per_group": [2, 4, 4, 4]}
    with pytest.raises(AttributeError, match="`sparse_layers`"):
        _ = make_config(per_layer_config={1: groups}).num_experts
