"""`mohge report`: what its page says, where it goes, and what it makes of bad input."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from report_runs import CONTEXT, EDGES, TAG, TEXT, Page, save_model, train_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohge.commands.main import main
from mohge.info import parameter_counts
from mohge.training import RouterTraffic
from mohge.training.report.record import read_record


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_run(folder)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copy(trained.with_name("text.txt"), tmp_path)
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory) -> Path:
    """A page without text, of a copy of the run that has no weights, in a folder of its own."""
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("written") / "run"))
    for file in run.glob("**/*.safetensors"):
        file.unlink()
    target = run.parent / "new" / "folder" / "page.html"
    assert main(["report", str(run), "--output", str(target)]) == 0
    return target


def make_page(*arguments) -> Page:
    assert main(["report", *map(str, arguments)]) == 0
    return Page((Path(arguments[0]) / "report.html").read_text(encoding="utf-8"))


# The page.


def test_page_of_a_run_with_text_has_every_part(run):
    page = make_page(run, "--text", run.with_name("text.txt"))
    assert page.titles == [
        *("run", "Verdict", "Width against difficulty", "By loss", "By frequency"),
        *("Training", "Loss", "Optimizer and speed"),
        *("Routing during training", "Load per group", "Load per expert", "Router"),
        *("Routing", "Load per expert and layer", "Groups per layer", "Entropy and balance of each layer"),
        *("Top tokens per width", "width 8", "width 16", "width 24", "width 40", "Facts"),
    ]
    assert page.pictures == 10 * ["wide", "narrow"]
    assert len(set(page.alternatives)) == 10
    assert any(re.fullmatch(r"training, language model: [\d.]+ at 24", tip) for tip in page.tips)
    assert any(re.fullmatch(r"layer 2, group 3: [\d.]+ times even", tip) for tip in page.tips)
    assert page.facts["router"] == "two_level: 3 of 16 experts, from 2 of 4 groups"
    assert page.facts["router losses"] == "load_balancing 0.02, group 1e-05, expert 0.005"
    assert page.facts["training"] == "24 steps"


def test_figures_of_the_text_are_those_of_the_model(run):
    tokenizer, model = AutoTokenizer.from_pretrained(run), AutoModelForCausalLM.from_pretrained(run).eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, : CONTEXT - 5]
    with torch.no_grad():
        outputs = model(ids, output_router_logits=True)
    loss = F.cross_entropy(outputs.logits[0, :-1], ids[0, 1:])
    counts = outputs.tokens_per_expert
    page = make_page(run, "--text", run.with_name("text.txt"), "--tokens", CONTEXT - 5)
    assert page.facts["perplexity"] == f"{math.exp(loss):.2f}"
    assert page.facts["MaxVio"] == f"{sum(float(c.max() / c.mean()) - 1 for c in counts) / 3:.2f}"
    assert page.facts["dead experts"] == str(sum(int((c == 0).sum()) for c in counts))
    assert page.facts["text"].endswith(f"text.txt, first {CONTEXT - 5} tokens")
    assert page.facts["activated, equal traffic"] == f"{parameter_counts(model.config).activated:,}"
    used = sum(
        3 * model.config.hidden_size * layer.expert_widths[expert] * int(count[expert])
        for layer, count in zip(model.config.sparse_layers, counts, strict=True)
        for expert in range(layer.num_experts)
    )
    activated = model.num_parameters() - model.config.routed_parameters + used / (CONTEXT - 5)
    assert page.facts["activated, as routed"].startswith(f"{round(activated):,} (")
    assert f" FLOPs forward) on {page.facts['text']}; " in page.facts["activated, as routed"]


def test_without_text_the_record_is_enough_and_weights_are_not_read(written, trained):
    page = Page(written.read_text(encoding="utf-8"))
    assert "By loss" not in page.titles
    assert {"Load per group", "Load per expert", "Load per expert and layer"} < set(page.titles)
    assert "give text: --text FILE" in page.text
    traffic = RouterTraffic.load(trained / "traffic.json")
    loads = [traffic.layer_counts(layer).sum(0) for layer in range(3)]
    assert page.facts["MaxVio"] == f"{sum(float(load.max() / load.mean()) - 1 for load in loads) / 3:.2f}"
    assert "in the last 24 forward passes of training" in page.text
    assert f" on the last passes of training, {sum(traffic.tokens):,} tokens" in page.facts["activated, as routed"]


def test_loss_table_has_what_was_logged(written, trained):
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    words = Page(written.read_text(encoding="utf-8")).words
    start = words.index("training, language model")
    row = words[words.index("8", start) :][:4]  # step 8 was evaluated, too
    at_8 = {name: value for entry in history if entry["step"] == 8 for name, value in entry.items()}
    assert row == ["8", *(f"{at_8[name]:.4g}" for name in ("lm_loss", "loss", "eval_loss"))]


def test_run_that_goes_on_is_read_from_its_newest_checkpoint(run):
    for file in [*run.glob("*.json"), *run.glob("*.safetensors")]:
        file.unlink()
    shutil.rmtree(run / "checkpoint-24")
    page = make_page(run, "--text", run.with_name("text.txt"))
    assert page.facts["training"] == "16 steps"
    assert "By loss" in page.titles


def test_finished_run_that_is_trained_further_is_read_from_its_newest_checkpoint(run):
    shutil.copy(run / "checkpoint-8" / "trainer_state.json", run)
    record = read_record(str(run))
    assert record.model == str(run / "checkpoint-24")
    assert record.history[-1]["step"] == 24


def test_without_traffic_the_last_logged_load_is_shown(run):
    (run / "traffic.json").unlink()
    page = make_page(run)
    assert "in the logging interval that ended at step 24" in page.text
    assert "Load per expert and layer" in page.titles


def test_record_of_a_plain_trainer_shows_its_loss_and_says_what_is_missing(run):
    (run / "traffic.json").unlink()
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"] = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}, {"step": 2, "eval_b_loss": 2.6}]
    (run / "trainer_state.json").write_text(json.dumps(state))
    page = make_page(run)
    assert "The run logged no router figures" in page.text
    assert "held out, b: 2.600 at step 2" in page.alternatives[0]
    assert "from 3.000 at step 1 to 2.500 at step 2" in page.text
    assert "Load per group" not in page.titles


def test_config_alone_makes_a_page_that_says_what_is_missing(run, tmp_path):
    folder = tmp_path / "config"
    folder.mkdir()
    shutil.copy(run / "config.json", folder)
    page = make_page(folder)
    assert "There is no training record here" in page.text
    assert "give text: --text FILE" in page.text
    assert not page.pictures
    assert page.facts["parameters"] == "158 k"


@pytest.mark.parametrize("name", EDGES)
def test_page_of_an_unusual_model(name, tmp_path):
    model = save_model(tmp_path, **EDGES[name])
    (tmp_path / "text.txt").write_text(TEXT[:3000], encoding="utf-8")
    page = make_page(tmp_path, "--text", tmp_path / "text.txt")
    layers = model.config.sparse_layers
    groups = max(layer.num_groups for layer in layers)
    loads = [text for text in page.alternatives if text.startswith("Heat map of the")]
    assert f"of {groups} groups" in loads[-1] or groups == 1
    assert f"in {len(layers)} layers" in loads[0]
    assert "no clear difference" in page.text or "neurons per layer and the easiest tenth" in page.text
    assert ("Groups per layer" in page.titles) == (groups > 1)
    assert "nan" not in page.text.split()
    assert page.titles[-2].startswith("Top tokens" if name == "one group" else ("width", "group"))
    if name == "many groups":
        assert "16 of 128 widths are shown" in page.text


def test_text_of_others_is_escaped(run):
    renamed = run.rename(run.with_name("run <img src=x onerror=alert(1)>"))
    text = renamed.with_name("text.txt")
    text.write_text(f"x = {TAG}\n" * 50, encoding="utf-8")  # so few tokens that all are listed
    assert TAG in make_page(renamed, "--text", text).text
    content = (renamed / "report.html").read_text(encoding="utf-8")
    assert TAG not in content
    assert "&lt;/script&gt;&lt;b&gt;" in content
    assert "<img src=x" not in content
    assert "<script" not in content


def test_runs_are_compared_on_the_same_axes_and_in_one_table(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree("run", "other$1$")
    state = json.loads(Path("other$1$", "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry |= {name: entry[name] + 1 for name in ("lm_loss", "loss", "eval_loss") if name in entry}
    Path("other$1$", "trainer_state.json").write_text(json.dumps(state))
    assert main(["report", "run", "other$1$"]) == 0
    page = Page(Path("report.html").read_text(encoding="utf-8"))
    assert page.titles == ["2 models", "Verdict", "Loss in training", "Held-out loss"]
    assert page.text.count("run has the best of the figures below, a loss of") == 1
    config = read_record("run").config
    rows = [page.words[page.words.index(name, page.words.index("run") + 1) :][:4] for name in ("run", "other$1$")]
    total = f"{parameter_counts(config).total:,}"
    logged = [e["router/activated_parameters"] for e in state["log_history"] if "router/activated_parameters" in e]
    activated = f"{round(logged[-1]):,}"
    assert [row[1:] for row in rows] == 2 * [["two_level", total, activated]]
    assert any(tip.startswith("other$1$: ") for tip in page.tips)


# Where the page goes, and bad input.


def test_page_goes_where_output_says_and_is_the_same_page_for_the_same_run(written):
    run, before = written.parents[2] / "run", written.read_bytes()
    assert main(["report", str(run), "--output", str(written)]) == 0  # a page of ours is replaced
    assert written.read_bytes() == before
    assert Page(written.read_text(encoding="utf-8")).titles[0] == "run"
    assert [path.name for path in written.parent.iterdir()] == ["page.html"]
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["run", "--output", "mine.html"], "--output mine.html exists"),
        (["run", "--output", "run"], "--output run exists"),
        (["run", "--tokens", "1"], "--tokens is 1"),
        (["run", "run"], "names run twice"),
        (["run", "nowhere"], "nowhere does not exist"),
        ([f"run{n}" for n in range(9)], "names 9: compare at most 8"),
        (["run", "--text", "text.md"], "its ending is .md"),
        (["run", "--text", "empty.txt"], "empty.txt"),
        (["run", "--text", "one.jsonl"], "--text one.jsonl has no two tokens in a row"),
        (["run", "--text", "large.jsonl"], "no tokens of the tokenizer"),
        (["bare", "--text", "text.txt"], "bare has no tokenizer"),
        (["empty"], "has no config.json"),
        (["broken"], "trainer_state.json is no state of a Trainer"),
        (["other"], "recorded with other experts"),
        (["dense"], "no layer with experts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.html").write_text("<p>mine</p>")
    Path("empty.txt").write_text("")
    Path("text.md").write_text("x = 1")
    Path("one.jsonl").write_text(json.dumps({"input_ids": [3]}))
    Path("large.jsonl").write_text(json.dumps({"input_ids": [3, 9999]}))
    for name in ("bare", "empty", "broken", "other", "dense", *(f"run{n}" for n in range(9))):
        Path(name).mkdir()
    for name in ("bare", "broken"):
        shutil.copy(run / "config.json", name)
    Path("broken", "trainer_state.json").write_text('{"log_history": [')
    save_model(Path("other"), moe_intermediate_sizes=[8, 16, 24, 32])
    shutil.copy(run / "traffic.json", "other")
    save_model(Path("dense"), mlp_only_layers=[0, 1, 2])
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("mohge report: ")
    assert message in line
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("mine.html").read_text() == "<p>mine</p>"
