"""The sweep of kernels/benchmarks/campaign.py: what it tries is compared first, and what wins is what kernels read."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


pytest.importorskip("triton", reason="needs triton")

from mohge_kernels import tuning
from mohge_kernels.tuning import Config


BASE, RIGHT, WRONG, KNOWN = (Config(16, 16, block_k, 4, 2, 1) for block_k in (16, 32, 64, 128))


@pytest.fixture
def pieces_module(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield __import__("pieces")
    for name in ("benchmark_experts", "campaign", "layers", "phases", "pieces", "rivals"):
        sys.modules.pop(name, None)


def fake_pieces(seconds: dict[Config, float]) -> SimpleNamespace:
    """Of one kernel that writes the same with any tile but WRONG, with which some stays as it was."""
    output = torch.zeros(2, 3)

    def chosen() -> Config:
        return tuning.config("up")

    def run():
        output[: 1 if chosen() == WRONG else 2] = 7.0

    return SimpleNamespace(
        run={"up": run},
        written={"up": [output]},
        seconds=lambda name, replays=5: seconds[chosen()],
        layer=SimpleNamespace(tiles=lambda kernel: (chosen(), {})),
    )


@pytest.mark.parametrize(("right", "winner"), [(0.9, RIGHT), (0.99, BASE), (1.5, BASE)])
def test_the_fastest_tile_that_is_right_wins(right, winner, pieces_module, monkeypatch):
    monkeypatch.setattr(tuning, "config", lambda kernel: BASE)
    pieces = fake_pieces({BASE: 1.0, RIGHT: right, WRONG: 0.1})
    records = list(pieces_module.sweep(pieces, "up", [RIGHT, WRONG, KNOWN], {KNOWN}, decode=False))
    tried = {record["config"]: record for record in records if record["kind"] == "tile"}
    assert tried.keys() == {RIGHT, WRONG}
    assert tried[RIGHT]["error"] == 0
    assert "wrong by" in tried[WRONG]["problem"]
    assert records[-1] == {
        "kind": "tuned",
        "config": winner,
        "us": 1e6 * min(right, 1.0) if winner == RIGHT else 1e6,
        "before": 1e6,
    }
    assert tuning.config("up") == BASE


@pytest.mark.usefixtures("triton_interpreter")
def test_the_sweep_writes_the_table_that_kernels_read(pieces_module, tmp_path, monkeypatch):
    monkeypatch.setenv("MOHGE_KERNELS_INTERPRET", "1")
    monkeypatch.setattr(tuning, "TABLE", tuning.TABLE)
    phases = __import__("phases")
    (tmp_path / "results.jsonl").touch()
    campaign = phases.Phases(str(tmp_path), "paper", dry=True, until=math.inf)
    monkeypatch.setattr(
        pieces_module.Pieces, "seconds", lambda self, name, replays=5: -self.layer.tiles("down")[0].block_k
    )
    campaign.sweep("decode")
    tiles = campaign.recorded("tile")
    assert {tile["config"][-1] for tile in tiles} == {"", "descriptors", "split", "table"}
    assert max(tile["error"] for tile in tiles) < 1e-2
    assert tmp_path / "tuning_table.json" == tuning.TABLE
    table = json.loads(tuning.TABLE.read_text())
    assert table["9.0"]["16 bits"]["decode"].keys() == {"up", "down"}
