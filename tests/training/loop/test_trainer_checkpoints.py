"""Checkpoints that MoHGETrainer writes in one process: which one is the best."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import config, train
from transformers import Trainer

from mohge.training import MoHGETrainer


SAVE_EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize("trainer_class", [Trainer, MoHGETrainer])
def test_best_checkpoint_is_kept_when_the_folder_moves(trainer_class, tmp_path):
    run = {
        "model_config": config(),
        "trainer_class": trainer_class,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,  # the loss falls
        **SAVE_EACH_STEP,
    }
    train(folder=str(tmp_path / "run"), steps=3, **run)
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    start = str(moved / "checkpoint-3")
    trainer = train(folder=str(moved), steps=5, resume_from_checkpoint=start, **run)
    assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-1")
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-5"}
    best, last = (load_file(moved / f"checkpoint-{step}" / "model.safetensors") for step in (1, 5))
    state = trainer.model.state_dict()
    assert all(torch.equal(state[name], best[name]) for name in best)
    assert not torch.equal(best["lm_head.weight"], last["lm_head.weight"])


def test_the_token_is_in_no_file(tmp_path):
    trainer = train(config(), str(tmp_path), MoHGETrainer, hub_token="hf_secret", **SAVE_EACH_STEP)
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret"
    contents = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert b"output_dir" in contents["training_args.bin"]
    assert not [name for name, content in contents.items() if b"hf_secret" in content]
