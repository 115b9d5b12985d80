"""`mohge eval`, on a tiny model and real files."""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from trainer_runs import config as make_config
from transformers import AutoTokenizer

from mohge import MoHGEForCausalLM, record_routing
from mohge.commands.main import main
from mohge.training.data.corpus import train_tokenizer


TEXTS = ["one two three four five six seven\n" * 3, "seven eight nine\n", "ten eleven one two\n" * 9]
LENGTH = 16


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    torch.manual_seed(0)
    MoHGEForCausalLM(make_config("expert", vocab_size=280, mlp_only_layers=[0])).save_pretrained(folder / "model")
    train_tokenizer(TEXTS, 280).save_pretrained(folder / "model")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


@pytest.fixture
def model(saved):
    yield saved / "model"
    (saved / "model" / "evaluation.json").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def tasks(saved):
    """A folder with a task of our own. The harness lists all its tasks once, which takes it ten seconds."""
    harness = pytest.importorskip("lm_eval.tasks", reason="lm-evaluation-harness is not installed")
    task = {
        "task": "mohge_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(saved / "questions.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{a}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    tasks = saved / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text(yaml.safe_dump(task))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", functools.cache(harness.TaskManager))
        yield tasks


def expected_losses(folder) -> torch.Tensor:
    """Loss of each token but the first of each document and of each sequence, by a forward pass for each piece."""
    model, tokenizer = MoHGEForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    losses, room = [], LENGTH
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        while ids:
            piece, ids = torch.tensor([ids[:room]]), ids[room:]
            room = (room - piece.shape[1]) or LENGTH
            with torch.no_grad():
                logits = model(piece).logits[0, :-1]
            losses.append(F.cross_entropy(logits, piece[0, 1:], reduction="none"))
    return torch.cat(losses)


def evaluate(*arguments) -> int:
    return main(["eval", *map(str, arguments)])


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_perplexity_is_that_of_each_document_alone(batch_size, saved, model, capsys):
    arguments = (model, "--datasets", saved / "text.jsonl", "--sequence-length", LENGTH, "--batch-size", batch_size)
    assert evaluate(*arguments) == 0
    (result,) = json.loads((model / "evaluation.json").read_text())["results"]
    losses = expected_losses(model)
    assert result["metrics"]["tokens"] == len(losses)
    assert result["metrics"]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result["metrics"]["perplexity"] == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert f"perplexity {losses.mean().exp().item():.4g}" in capsys.readouterr().out


def test_router_report_counts_every_token(saved, model):
    assert evaluate(model, "--datasets", saved / "text.jsonl", "--sequence-length", LENGTH) == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in TEXTS)
    router = json.loads((model / "evaluation.json").read_text())["router"]
    assert sum(row["choices"] for row in router["table"]) == tokens * 2  # two experts per token, one sparse layer
    assert router["summary"]["activated_parameters"] > 0


def test_info_says_what_was_used_as_routed(saved, model, capsys):
    """By what each piece of each document chooses alone."""
    assert main(["info", str(model)]) == 0
    assert "as routed           not measured (mohge eval FOLDER" in capsys.readouterr().out
    assert evaluate(model, "--datasets", saved / "text.jsonl", "--sequence-length", 512) == 0
    net, tokenizer = MoHGEForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    (layer,), counts, tokens = net.config.sparse_layers, torch.zeros(6, dtype=torch.long), 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad(), record_routing() as routing:
            net(ids)
        counts, tokens = counts + routing[0].index.flatten().bincount(minlength=6), tokens + ids.numel()
    router = json.loads((model / "evaluation.json").read_text())["router"]
    assert (router["tokens"], router["tokens_per_expert"]) == (tokens, [counts.tolist()])
    used = sum(n * 3 * net.config.hidden_size * w for n, w in zip(counts.tolist(), layer.expert_widths, strict=True))
    activated = net.num_parameters() - net.config.routed_parameters + used / tokens
    line = f"as routed           {activated / 1000:.3f}K  on text.jsonl, {tokens:,} tokens; "
    assert line.replace("text.jsonl", str(saved / "text.jsonl")) in capsys.readouterr().out
    assert main(["info", str(model)]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        {"tokens_per_expert": [[1] * 5]},
        {"tokens_per_expert": []},
        {"tokens_per_expert": [[-1] * 6]},
        {"tokens_per_expert": [["1"] * 6]},
        {"tokens_per_expert": [[0.5] * 6]},
        {"tokens_per_expert": 3},
        {"tokens_per_expert": [3]},
        {"tokens": 1},
        {"tokens": "many"},
        {"tokens": None},
        {"texts": None},
        {"texts": [3]},
        None,
        "{",
        "[]",
        '{"router": 3}',
    ],
    ids=str,
)
def test_info_on_a_damaged_record_is_one_line(change, model, capsys):
    router = {"texts": ["a"], "tokens": 9, "tokens_per_expert": [[3] * 6]}
    text = change if isinstance(change, str) else json.dumps({"router": router | change if change else [1]})
    (model / "evaluation.json").write_text(text)
    assert main(["info", str(model)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "evaluation.json" in printed.err


def test_first_tokens_only(saved, model):
    assert evaluate(model, "--datasets", saved / "text.jsonl", "--sequence-length", LENGTH, "--tokens", 40) == 0
    (result,) = json.loads((model / "evaluation.json").read_text())["results"]
    assert result["metrics"]["tokens"] == len(expected_losses(model)[: 2 * (LENGTH - 1)])  # no document ends there


def test_results_are_added_and_replaced(saved, model):
    other = saved / "other.txt"
    other.write_text(TEXTS[2])
    text = saved / "text.jsonl"
    for source, length in ((text, LENGTH), (other, 8), (text, 8), (text, LENGTH)):
        assert evaluate(model, "--datasets", source, "--sequence-length", length) == 0
    assert evaluate(model, "--datasets", text, "--sequence-length", LENGTH, "--tokens", 20) == 0  # is no replacement
    results = json.loads((model / "evaluation.json").read_text())["results"]
    found = [(result["dataset"]["path"], *result["settings"].values()) for result in results]
    places = [str(other), str(text), str(text), str(text)]
    assert found == list(zip(places, (8, 8, LENGTH, LENGTH), (None, None, None, 20), strict=True))
    assert results[2]["metrics"]["tokens"] == len(expected_losses(model))


def test_text_without_anything_to_predict_is_refused(saved, model, tmp_path, capsys):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [5]}\n' * 40)
    assert evaluate(model, "--datasets", tmp_path / "ids.jsonl") == 2
    assert "no two tokens in a row" in capsys.readouterr().err
    assert not (model / "evaluation.json").exists()


def test_task_of_the_harness(saved, model, tasks, capfd, caplog, monkeypatch):
    monkeypatch.chdir(saved)  # which is in no git repository
    net, tokenizer = MoHGEForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    questions, choices = ["one two", "seven", "nine ten"], [" three", " eight", " one two"]

    def log_likelihood(question: str, choice: str) -> float:
        start, whole = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (question, question + choice))
        with torch.no_grad():
            log_probabilities = net(whole).logits[0].log_softmax(-1)
        positions = range(start.shape[1], whole.shape[1])
        return sum(log_probabilities[i - 1, whole[0, i]].item() for i in positions)

    best = [max(range(3), key=lambda c: log_likelihood(question, choices[c])) for question in questions]
    targets = [best[0], best[1], (best[2] + 1) % 3]  # the last one is answered wrongly
    rows = [{"q": q, "c": choices, "a": a} for q, a in zip(questions, targets, strict=True)]
    (saved / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(model, "--tasks", "mohge_choice", "--include-path", tasks, "--batch-size", 2) == 0
    (result,) = json.loads((model / "evaluation.json").read_text())["results"]
    assert result["task"] == "mohge_choice"
    assert result["metrics"]["acc,none"] == pytest.approx(2 / 3)
    printed = capfd.readouterr().err
    assert "loglikelihood" not in printed  # no bar of the harness where there is no terminal
    assert "git" not in printed
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


def test_weights_that_are_not_finite_are_refused(saved, tmp_path, capsys):
    model = MoHGEForCausalLM.from_pretrained(saved / "model")
    with torch.no_grad():
        model.lm_head.weight[0] = math.nan
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(saved / "model").save_pretrained(tmp_path)
    assert evaluate(tmp_path, "--datasets", saved / "text.jsonl") == 2
    assert "`lm_head.weight` of" in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--datasets and --tasks are missing"),
        (["--datasets", "no/such.jsonl"], "no/such.jsonl does not exist"),
        (["--datasets", "{path: a.jsonl, colum: b}"], "unknown key `colum`"),
        (["--datasets", "standard-library", "--batch-size", "0"], "--batch-size is 0"),
        (["--datasets", "standard-library", "--sequence-length", "-3"], "--sequence-length is -3"),
        (["--datasets", "standard-library", "--output", "no/folder/file.json"], "there is no folder no/folder"),
        (["--tasks", "no_such_task_at_all"], "no_such_task_at_all"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, model, request, capsys):
    before = sorted(path.name for path in model.iterdir())
    if "--tasks" in arguments:
        arguments = [*arguments, "--include-path", request.getfixturevalue("tasks")]
    assert evaluate(model, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mohge eval: ")]
    assert message in line
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_file_that_is_something_else_is_left_alone(saved, model, tmp_path, capsys):
    other = tmp_path / "notes.json"
    other.write_text('{"notes": 1}')
    assert evaluate(model, "--datasets", saved / "text.jsonl", "--output", other) == 2
    assert "holds no results" in capsys.readouterr().err
    assert other.read_text() == '{"notes": 1}'


def test_a_model_without_tokenizer_is_refused(saved, tmp_path, capsys):
    MoHGEForCausalLM.from_pretrained(saved / "model").save_pretrained(tmp_path)
    assert evaluate(tmp_path, "--datasets", saved / "text.jsonl") == 2
    assert "no tokenizer" in capsys.readouterr().err
