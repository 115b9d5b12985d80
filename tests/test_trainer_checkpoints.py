"""Checkpoints that MoHGETrainer writes in one process: what is pushed of them, and which one is the best."""

import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from trainer_runs import config, train
from transformers import Trainer

from mohge.training import MoHGETrainer


SAVE_EACH_STEP = {"save_strategy": "steps", "save_steps": 1}


class _Hub:
    """Notes what it is asked to upload, and what lies there at that moment."""

    def __init__(self):
        self.uploads: list[tuple[Path, set[str]]] = []

    def create_repo(self, name: str, **kwargs):
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, folder_path: str, **kwargs) -> Future:
        folder = Path(folder_path)
        self.uploads.append((folder, {path.name for path in folder.iterdir()}))
        done = Future()
        done.set_result(None)
        return done


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_complete_checkpoints_are_pushed(strategy, tmp_path, monkeypatch):
    hub = _Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    pushing = {"push_to_hub": True, "hub_model_id": "me/model", "hub_strategy": strategy}
    train(config(), str(tmp_path), MoHGETrainer, **SAVE_EACH_STEP, **pushing)
    pushed = [folder for step in (1, 2) for folder in (tmp_path, tmp_path / f"checkpoint-{step}")]
    assert [folder for folder, _ in hub.uploads] == (pushed if strategy == "checkpoint" else pushed[::2])
    saved = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= saved
    for folder, files in hub.uploads:
        assert not [name for name in files if name.startswith(".")]
        assert saved == files if folder != tmp_path else {"model.safetensors", "config.json"} < files


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
