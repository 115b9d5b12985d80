"""The script that measures what unequal widths are worth, on a small mixture."""

import json
import math
import sys

import pytest
import torch
from conversion_cases import EXPERT_WIDTH, EXPERTS, LAYERS, add_tokenizer, convert, load, make_source

from mohge.conversion import evidence, evidence_table
from mohge.conversion.checkpoint import read_config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("evidence")
    add_tokenizer(make_source("olmoe", place / "olmoe"))
    words = torch.randint(1, 60, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    (place / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return place


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evidence", *map(str, arguments)])
    monkeypatch.setattr(evidence, "LENGTH", 24)
    evidence.main()


def test_measure_and_compare(place, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "KEEP", (0.5,))
    text = ["--text", place / "text.txt", "--held-out", place / "text.txt", "--blocks", 4, "--kl-blocks", 2]
    results = ["--results", place / "rows.jsonl", "--calibration-blocks", 6, "--multiple", 4, "--seeds", 1]
    run(monkeypatch, "measure", place / "olmoe", *text, *results)
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    source, *others = rows
    whole = LAYERS * EXPERTS * EXPERT_WIDTH
    assert source["used"] == pytest.approx(LAYERS * 2 * EXPERT_WIDTH)  # two experts for each token
    assert abs(source["kl"]) < 1e-3
    for row in others:
        kept = sum(map(sum, row["widths"])) / whole
        assert row["kept"] == pytest.approx(kept)
        assert row["kl"] > 1e-3
        if row["contestant"].startswith("unequal") and "work" not in row["contestant"]:
            assert kept <= row["keep"]
        if row["contestant"].startswith("uniform"):
            assert row["used"] == pytest.approx(row["keep"] * source["used"])
        if row["contestant"].startswith("unequal, by work"):  # as counted on other text
            assert row["used"] == pytest.approx(row["keep"] * source["used"], rel=0.1)
    before = (place / "rows.jsonl").read_text()
    run(monkeypatch, "measure", place / "olmoe", *text, *results)
    assert (place / "rows.jsonl").read_text() == before  # nothing is measured again

    options = ["--mode", "trim", "--keep", "0.4", "--saliency", "magnitude", "--multiple", "4"]
    assert convert(place / "olmoe", place / "trimmed", *options) == 0
    control = place / "control"
    run(monkeypatch, "uniform", place / "olmoe", control, "--keep", 0.5, *text[:2], "--calibration-blocks", 6)
    assert read_config(control)["moe_intermediate_sizes"] == [EXPERT_WIDTH // 2]
    metrics = {"acc,none": 0.5}
    evaluation = {
        "results": [{"task": "continuation", "metrics": metrics}, {"dataset": "text", "metrics": {"loss": 1}}]
    }
    (control / "evaluation.json").write_text(json.dumps(evaluation))
    (control / "conversion_report.json").unlink()  # as of a model that has been trained since
    folders = [place / "trimmed", control]
    run(monkeypatch, "compare", place / "olmoe", *folders, *text[2:], "--results", place / "made.jsonl")
    made, narrowed = [json.loads(line) for line in (place / "made.jsonl").read_text().splitlines()]
    assert narrowed["kept"] == 0.5
    assert narrowed["used"] == pytest.approx(source["used"] / 2)
    assert narrowed["tasks"] == {"continuation": metrics}
    assert "activated_as_routed" in made
    assert "activated_as_routed" not in narrowed
    ids = evidence.blocks(place / "text.txt", place / "olmoe", 4)
    with torch.no_grad():
        losses = [load(place / "trimmed")(ids[n][None], labels=ids[n][None]).loss.item() for n in range(4)]
    assert made["losses"] == pytest.approx(losses, rel=1e-4)

    monkeypatch.setattr(sys, "argv", ["table", str(place / "rows.jsonl"), "--plot", str(place / "plot.svg")])
    capsys.readouterr()
    evidence_table.main()
    printed = capsys.readouterr().out
    uniform = next(row for row in others if (row["contestant"], row["keep"]) == ("uniform", 0.5))
    assert f"{math.exp(sum(uniform['losses']) / 4):.2f}" in printed
    assert (place / "plot.svg").read_text().rstrip().endswith("</svg>")


def test_task_asks_for_what_follows(place, monkeypatch):
    run(monkeypatch, "task", place / "task", "--held-out", place / "text.txt", "--questions", 20)
    rows = [json.loads(line) for line in (place / "task" / "continuation.jsonl").read_text().splitlines()]
    text = (place / "text.txt").read_text()
    assert len({row["q"] for row in rows}) == 20
    assert {row["a"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert [row["q"] + choice in text for choice in row["c"]] == [n == row["a"] for n in range(4)]
    assert str(place / "task" / "continuation.jsonl") in (place / "task" / "continuation.yaml").read_text()
