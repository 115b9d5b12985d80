"""Trainer runs that tests compare, in this process or in one of several ranks."""

import os
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.configuration_mohge import ROUTER_COEFFICIENTS
from mohge.training import MoHGETrainer, RouterScheduleCallback


LENGTHS = (5, 19, 8, 12, 3, 16, 10, 7)
"""Tokens of the rows of a batch: unequal, so that padding and shares matter."""
MIXTURE = {
    "backbone_config": {
        "model_type": "olmoe",
        "num_key_value_heads": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "pad_token_id": None,
        "eos_token_id": None,
    },
    "num_groups_per_tok": None,
    "shared_expert_intermediate_size": 0,
}
"""A mixture that keeps its router."""


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    data = []
    for length in LENGTHS:
        ids = torch.randint(0, 50, (length,), generator=generator).tolist()
        data.append({"input_ids": ids, "labels": [-100, *ids[1:]] if length > 10 else ids})
    return data


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)

    def pad(values: list[int], fill: int) -> list[int]:
        return values + [fill] * (longest - len(values))

    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in batch]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in batch]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch]),
    }


def config(loss: str | None = None, **overrides) -> MoHGEConfig:
    """A tiny config with the one router loss `loss` switched on, at coefficient 1."""
    coefficients = {field: float(name == loss) for name, field in ROUTER_COEFFICIENTS.items()}
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "moe_intermediate_sizes": [8, 24],
        "num_experts_per_group": [2, 4],
        "num_experts_per_tok": 2,
        "num_groups_per_tok": 1,
        "shared_expert_intermediate_size": 16,
        "group_aux_loss_start": 0.0,
        "initializer_range": 0.3,
    }
    return MoHGEConfig(**{**values, **coefficients, **overrides})


def train(model_config: MoHGEConfig, folder: str, trainer_class=Trainer, accumulation=1, ranks=1, steps=2, **kwargs):
    """Train on the 8 rows for `steps` steps, each over all of them, and return the trainer."""
    set_seed(0)
    model = MoHGEForCausalLM(model_config)
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": len(LENGTHS) // accumulation // ranks,
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    own = {name: kwargs.pop(name) for name in ("compute_loss_func", "callbacks") if name in kwargs}
    resume = kwargs.pop("resume_from_checkpoint", None)
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**{**arguments, **kwargs}),
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=collate,
        **own,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def every_loss(accumulation: int, ranks: int, folder: str, trainer_class=Trainer) -> dict[str, dict]:
    """Logged loss and gradient norm of both steps, for each router loss and for the corrected logits of Hi-MoE."""
    runs = {loss: config(loss) for loss in ROUTER_COEFFICIENTS}
    runs["expert, per group"] = config("expert", router_expert_aux_loss_type="per_group")
    runs["logit correction"] = config(
        "load_balancing", router_type="grouped_top_k", num_groups_per_tok=None, router_logit_ema_strength=0.5
    )
    runs["mixture"] = config("load_balancing", router_z_loss_coef=1.0, **MIXTURE)
    results = {}
    for name, run in runs.items():
        callbacks = [RouterScheduleCallback()] if trainer_class is Trainer else []
        trainer = train(run, folder, trainer_class, accumulation, ranks, callbacks=callbacks)
        results[name] = {key: logged(trainer, key) for key in ("loss", "grad_norm")}
    return results


def logged_figures(folder: str, ranks: int) -> list[dict[str, float]]:
    """The numbers that MoHGETrainer logs, but for the speed."""
    trainer = train(config("expert", router_z_loss_coef=0.5), folder, MoHGETrainer, ranks=ranks)
    apart = ("router_load", "tokens_per_second")
    return [
        {name: value for name, value in entry.items() if name not in apart} for entry in trainer.state.log_history[:2]
    ]


def mean_after_a_forward_on_one_rank() -> torch.Tensor:
    """Running mean of the logits after a training step whose only forward ran on the first rank."""
    set_seed(0)
    correction = {"router_type": "grouped_top_k", "num_groups_per_tok": None, "router_logit_ema_strength": 0.5}
    model = MoHGEForCausalLM(config(**correction)).train()
    model.set_training_progress(0.0)
    if int(os.environ.get("RANK", 0)) == 0:
        model(**collate(rows()))
    model.set_training_progress(1.0)
    return model.routers[0].logit_ema_E


def save_sharded(folder: Path) -> None:
    """Save a model whose experts are spread over two ranks."""
    source = folder / "source"
    if int(os.environ["RANK"]) == 0:
        set_seed(0)
        MoHGEForCausalLM(config()).save_pretrained(source)
    torch.distributed.barrier()
    sharding = DistributedConfig(fsdp_size=2, ep_size=2)
    model = MoHGEForCausalLM.from_pretrained(source, distributed_config=sharding)
    model.save_pretrained(folder / "sharded")


def compare_ranks(target: Path) -> None:
    """Leave in `target` what two ranks log, and beside it a model that they have saved."""
    outcome = {
        "losses": every_loss(accumulation=1, ranks=2, folder=str(target.parent)),
        "figures": logged_figures(str(target.parent), ranks=2),
        "mean": mean_after_a_forward_on_one_rank(),
    }
    save_sharded(target.parent)
    if torch.distributed.get_rank() == 0:
        torch.save(outcome, target)
