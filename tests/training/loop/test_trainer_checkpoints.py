"""Checkpoints that MoHGETrainer writes in one process: which one is the best."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_runs import config, train
from transformers import Trainer
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

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


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied embeddings"])
def test_run_goes_on_from_all_of_the_weights_and_without_a_word(tied, tmp_path):
    run = {
        "model_config": config(tie_word_embeddings=tied),
        "folder": str(tmp_path),
        "trainer_class": MoHGETrainer,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        **SAVE_EACH_STEP,
    }
    train(steps=2, **run)
    checkpoint = tmp_path / "checkpoint-2"
    with CaptureLogger(logging.get_logger("transformers")) as said:
        trainer = train(steps=3, **run, resume_from_checkpoint=str(checkpoint))
    assert said.out == ""
    assert (trainer.model.lm_head.weight is trainer.model.get_input_embeddings().weight) == tied

    whole = load_file(checkpoint / "model.safetensors")
    assert ("lm_head.weight" in whole) != tied
    name = "model.embed_tokens.weight"
    for tensors, reason in (
        ({key: whole[key] for key in whole if key != name}, f"it lacks the weight {name}"),
        ({**whole, "x": whole[name].clone()}, "it has a weight that its config has no place for, x"),
        ({**whole, name: whole[name][1:].clone()}, "size mismatch"),
    ):
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=rf"checkpoint-2 cannot be read \((?s:.*){reason}"):
            train(steps=3, **run, resume_from_checkpoint=str(checkpoint))


def test_the_token_is_in_no_file(tmp_path):
    trainer = train(config(), str(tmp_path), MoHGETrainer, hub_token="hf_secret", **SAVE_EACH_STEP)
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret"
    contents = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert b"output_dir" in contents["training_args.bin"]
    assert not [name for name, content in contents.items() if b"hf_secret" in content]
