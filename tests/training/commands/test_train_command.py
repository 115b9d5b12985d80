"""`mohge train`: what its arguments do, what it saves and reports, and what it refuses."""

import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
import yaml
from pretrain_runs import (
    VOCABULARY,
    arguments,
    assert_same_weights,
    contents,
    documents,
    history,
    log,
    make_inputs,
    make_tokenizer,
    save_config,
    train,
    weights,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.commands.main import main
from mohge.commands.train import PretrainArguments
from mohge.training.data.packing import TextSource, packed_blocks


STEPS, WARMUP, DECAY = 8, 2, 3
SAVE = {"save_strategy": "steps", "save_steps": STEPS // 2}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = make_inputs(tmp_path_factory.mktemp("inputs"), router_z_loss_coef=0.1)
    write_jsonl(folder / "b.jsonl", documents(30, seed=1))
    write_jsonl(folder / "held_out.jsonl", [*documents(20, seed=2), *(f"{n}\n" for n in range(100))])
    return folder


@pytest.fixture(scope="module")
def run(inputs) -> Path:
    """A whole run with checkpoints and evaluation."""
    values = {"eval_datasets": inputs / "held_out.jsonl", "eval_strategy": "steps", "eval_steps": STEPS // 2}
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": WARMUP, "max_steps": STEPS}
    return train(inputs, inputs / "run", per_device_eval_batch_size=3, **values, **schedule, **SAVE)


@pytest.fixture(scope="module")
def plain(inputs) -> Path:
    """A run of 4 steps."""
    return train(inputs, inputs / "plain")


def losses(run: Path, name: str = "loss") -> list[float]:
    return [entry[name] for entry in log(run)]


def loss_of_documents(model_folder: Path, rows) -> float:
    """Mean over all targets, each document of a packed row on its own."""
    model, total, targets = AutoModelForCausalLM.from_pretrained(model_folder).eval(), 0.0, 0
    for row in rows:
        ids, positions = torch.as_tensor(row["input_ids"]).long(), torch.as_tensor(row["position_ids"])
        starts = (positions == 0).nonzero().flatten().tolist()
        for document in ids.tensor_split(starts[1:]):
            with torch.no_grad():
                logits = model(document[None]).logits[0, :-1]
            total += F.cross_entropy(logits, document[1:], reduction="sum").item()
            targets += len(document) - 1
    return total / targets


# What a run is.


def test_loss_falls(run):
    assert [entry["step"] for entry in log(run)] == list(range(1, STEPS + 1))
    assert losses(run)[-1] < 0.9 * losses(run)[0]


def test_trained_model_is_the_last_checkpoint_and_loads_with_its_tokenizer(run, inputs):
    last = run / f"checkpoint-{STEPS}"
    assert_same_weights(run, last)
    ids = torch.tensor([make_tokenizer()(documents()[0])["input_ids"]])
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (run, last)]
    assert torch.equal(*logits)
    assert AutoTokenizer.from_pretrained(run)(documents()[0])["input_ids"] == ids[0].tolist()
    saved, given = (MoHGEConfig.from_pretrained(folder).to_dict() for folder in (run, inputs / "model"))
    saved, given = ({**values.pop("backbone_config"), **values} for values in (saved, given))
    different = {name for name in saved if saved[name] != given.get(name)}
    assert different <= {"architectures", "auto_map", "dtype", "eos_token_id", "pad_token_id", "use_cache"}


def test_cosine_schedule(run):
    peak = 1e-2
    for step, rate in enumerate(losses(run, "learning_rate")):
        progress = (step - WARMUP) / (STEPS - WARMUP)
        falling = peak * 0.5 * (1 + math.cos(math.pi * progress))
        assert rate == pytest.approx(peak * step / WARMUP if step < WARMUP else falling, rel=1e-6)


def test_warmup_stable_decay_schedule(inputs, tmp_path):
    shape = {"num_decay_steps": DECAY, "min_lr_ratio": 0.1, "decay_type": "linear"}
    schedule = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": json.dumps(shape)}
    wsd = train(inputs, tmp_path / "wsd", max_steps=STEPS, warmup_steps=WARMUP, **schedule)
    rates = [0.1, 0.55, 1, 1, 1, 1, 1 - 0.9 / 3, 1 - 0.9 * 2 / 3]
    assert losses(wsd, "learning_rate") == pytest.approx([1e-2 * rate for rate in rates], rel=1e-6)


def test_evaluation_loss_is_the_mean_over_targets(run, inputs):
    """Whatever batch they are in: rows of short documents have fewer, since first tokens are none."""
    rows = packed_blocks([TextSource(str(inputs / "held_out.jsonl"))], AutoTokenizer.from_pretrained(run), 32)
    logged = {entry["step"]: entry["eval_loss"] for entry in history(run) if "eval_loss" in entry}
    for step in (STEPS // 2, STEPS):
        expected = loss_of_documents(run / f"checkpoint-{step}", rows)
        assert logged[step] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("start", ["config", "model"])
def test_streamed_run_starts_at_the_loss_of_its_model_on_the_first_rows(start, run, inputs, tmp_path):
    begun = {"config": {}, "model": {"model": run, "tokenizer": None}}[start]
    output = train(inputs, tmp_path / "run", streaming=True, shuffle_buffer=1, max_steps=2, **begun)
    rows = packed_blocks([TextSource(str(inputs / "a.jsonl"))], AutoTokenizer.from_pretrained(run), 32).select(
        range(4)
    )
    set_seed(TrainingArguments("unused").seed)
    MoHGEForCausalLM(MoHGEConfig.from_pretrained(inputs / "model")).save_pretrained(tmp_path / "initial")
    expected = loss_of_documents(run if start == "model" else tmp_path / "initial", rows)
    assert losses(output, "lm_loss")[0] == pytest.approx(expected, rel=1e-5)
    assert (output / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()


def test_epochs_are_counted_in_sequences(inputs, tmp_path):
    rows = packed_blocks([TextSource(str(inputs / "a.jsonl"))], make_tokenizer(), 32)
    output = train(inputs, tmp_path / "run", max_steps=None, num_train_epochs=2)
    assert log(output)[-1]["step"] == 2 * math.ceil(len(rows) / 4)


VARIANTS = {
    "bf16": ({"bf16": True}, 1e-2),
    "bfloat16": ({"dtype": "bfloat16"}, 1e-2),
    "gradient checkpointing": ({"gradient_checkpointing": True}, 1e-6),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
    "accumulated": ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 1e-5),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_trains_and_starts_at_the_same_loss(name, plain, inputs, tmp_path):
    values, tolerance = VARIANTS[name]
    found, expected = losses(train(inputs, tmp_path / "run", **values)), losses(plain)
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[-1] < 0.95 * found[0]
    if "bf" in name:
        assert found[0] != expected[0]
    else:
        assert found == pytest.approx(expected, rel=1e-3)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {dtype}


def test_config_without_tokenizer_gets_one_of_the_text(inputs, tmp_path):
    output = train(inputs, tmp_path / "run", tokenizer=None, max_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.decode(tokenizer(documents()[1])["input_ids"]) == documents()[1]


def test_folder_with_config_and_tokenizer_keeps_its_tokenizer(inputs, tmp_path):
    save_config(tmp_path / "model", vocab_size=VOCABULARY + 1)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["times"])
    tokenizer.save_pretrained(tmp_path / "model")
    output = train(inputs, tmp_path / "run", model=tmp_path / "model", tokenizer=None, max_steps=1)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == tokenizer.get_vocab()


# Recipes.


def test_flags_go_before_the_recipe(inputs, tmp_path):
    values = {"learning_rate": 3e-3, "max_steps": 50, "logging_steps": 1, "save_strategy": "no"}
    values |= {"model": str(inputs / "model"), "sequence_length": 32}
    values |= {"datasets": [str(inputs / "a.jsonl")], "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    flags = ["--max_steps", "2", "--learning_rate=2e-3"]
    assert main(["train", str(tmp_path / "recipe.yaml"), *flags]) == 0
    assert losses(tmp_path / "run", "learning_rate") == [2e-3, 1e-3]
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved == {**values, "max_steps": 2, "learning_rate": 2e-3}


def test_recipe_may_end_with_a_list(inputs, tmp_path):
    values = {"model": str(inputs / "model"), "datasets": [str(inputs / "a.jsonl"), str(inputs / "b.jsonl")]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    flags = arguments(inputs, tmp_path / "run", model=None, datasets=None, max_steps=1)
    assert main(["train", str(tmp_path / "recipe.yaml"), *flags]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["datasets"] == values["datasets"]


def test_recipe_of_a_run_repeats_it_bit_for_bit(inputs, tmp_path):
    mixture = [f"{{path: {inputs / name}.jsonl, weight: {weight}}}" for name, weight in (("a", 0.7), ("b", 0.3))]
    options = {"streaming": True, "lr_scheduler_type": "cosine_with_min_lr", "seed": 5, "tokenizer": None}
    options["lr_scheduler_kwargs"] = '{"min_lr_rate": 0.1}'
    first = train(inputs, tmp_path / "first", datasets=mixture, **options)
    assert main(["train", str(first / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert_same_weights(tmp_path / "again", first)
    assert losses(tmp_path / "again") == losses(first)
    before, after = (yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in (first, tmp_path / "again"))
    assert before | {"output_dir": str(tmp_path / "again")} == after
    other = train(inputs, tmp_path / "other", datasets=mixture, **options | {"seed": 6})
    assert losses(other) != losses(first)


def test_shipped_recipe_trains_by_its_name(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ["--datasets", str(inputs / "a.jsonl"), "--eval_datasets", str(inputs / "b.jsonl")]
    small = ["--max_steps", "1", "--sequence_length", "32", "--report_to", "none", "--use_cpu"]
    assert main(["train", "tiny", *text, *small]) == 0
    assert MoHGEConfig.from_pretrained("mohge-tiny").moe_intermediate_sizes == [64, 128, 192, 256]


def test_every_flag_is_explained(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    explained = {}
    for entry in re.split(r"\n  (?=-)", capsys.readouterr().out)[1:]:
        flags, _, text = re.sub(r"\s*\(default: .*\)\s*$", "", entry, flags=re.DOTALL).strip().partition("  ")
        text = text or entry.partition("\n")[2]
        explained.update(dict.fromkeys(re.findall(r"--(\w+)", flags), text.strip()))
    expected = {field.name for cls in (PretrainArguments, TrainingArguments) for field in fields(cls) if field.init}
    assert expected <= explained.keys()
    assert not [name for name in expected if len(explained[name]) < 10]


# Reports.


def test_a_line_for_each_entry_of_the_log_and_what_comes_next(inputs, tmp_path, capsys):
    evaluated = {"eval_datasets": inputs / "b.jsonl", "eval_strategy": "steps", "eval_steps": 4}
    output = train(inputs, tmp_path / "run", **evaluated)
    *steps, held_out, written, generate, report = capsys.readouterr().out.splitlines()
    form = r"step {}/4  loss \S+  perplexity \S+  [\d,]+ tokens/s  \d:\d\d:\d\d left  max_vio \d\.\d\d"
    assert all(re.fullmatch(form.format(number), line) for number, line in enumerate(steps, 1)), steps
    assert len(steps) == 4
    assert re.fullmatch(r"step 4/4  held-out loss \S+  perplexity \S+", held_out)
    loss, perplexity = (float(text.replace(",", "")) for text in re.findall(r"(?:loss|perplexity) (\S+)", steps[0]))
    assert perplexity == pytest.approx(math.exp(losses(output, "lm_loss")[0]), rel=1e-3)
    assert loss == pytest.approx(losses(output, "lm_loss")[0], rel=1e-3)
    assert written == f"written: {output}"
    assert (generate, report) == (f'next: mohge generate {output} "PROMPT"', f"next: mohge report {output}")


def test_tensorboard_gets_the_figures(inputs, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    output = train(inputs, tmp_path / "run", report_to="tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    assert not [tag for tag in events.Tags()["scalars"] if "router_load" in tag]
    for name in ("loss", "lm_loss", "router/max_vio", "router/load_balancing", "router/tokens_group_0"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert [step for step, _ in found] == [1, 2, 3, 4]
        assert [value for _, value in found] == pytest.approx(losses(output, name), rel=1e-5)


def test_trackio_gets_the_figures_in_a_process_that_reads_the_cache(inputs, plain, cache, tmp_path):
    pytest.importorskip("trackio")
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")}
    assert before
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache), "PYTHONHASHSEED": "7"}
    environment["TRACKIO_DIR"] = str(tmp_path / "trackio")
    values = arguments(inputs, tmp_path / "run", report_to="trackio", project="small", run_name="one")
    done = subprocess.run(
        [sys.executable, "-m", "mohge", "train", *values],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.arrow")} == before
    assert_same_weights(tmp_path / "run", plain)
    with sqlite3.connect(tmp_path / "trackio" / "small.db") as database:
        entries = [json.loads(row[0]) for row in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    for name in ("loss", "lm_loss", "router/max_vio", "router/tokens_group_1"):
        found = [entry[f"train/{name}"] for entry in entries if f"train/{name}" in entry]
        assert found == pytest.approx(losses(plain, name), rel=1e-6)


# What is refused.


REFUSED = {
    "unknown flag": ({"leaning_rate": 1}, "--leaning_rate"),
    "shortened flag": ({"save_step": 1}, "--save_step"),
    "no number": ({"max_steps": "many"}, "--max_steps"),
    "no rate": ({"learning_rate": "high"}, "--learning_rate"),
    "no truth": ({"streaming": "perhaps"}, "--streaming"),
    "unknown schedule": ({"lr_scheduler_type": "sudden"}, "--lr_scheduler_type"),
    "unknown reporter": ({"report_to": "paper"}, "paper"),
    "broken mapping": ({"lr_scheduler_kwargs": "{a"}, "lr_scheduler_kwargs"),
    "no model": ({"model": None}, "`model` is missing: name a config, a model or one of"),
    "missing model": ({"model": "no/such/model.json"}, "no/such/model.json does not exist"),
    "missing tokenizer": ({"tokenizer": "no/such/tokenizer"}, "no/such/tokenizer"),
    "missing text": ({"datasets": "no/such/text.jsonl"}, "no/such/text.jsonl does not exist"),
    "missing text, tokenizer": ({"datasets": "no/such/text.jsonl", "tokenizer": None}, "no/such/text.jsonl does not"),
    "missing held-out text": (
        {"eval_datasets": "no/such/text.jsonl", "eval_strategy": "steps"},
        "no/such/text.jsonl does not exist",
    ),
    "broken source": ({"datasets": "{path: a, wieght: 1}"}, "`datasets` has an entry with the unknown key `wieght`"),
    "broken held-out source": ({"eval_datasets": "{path: 1}"}, "`eval_datasets`"),
    "nothing to evaluate on": ({"eval_strategy": "steps"}, "eval_dataset"),
    "endless stream": ({"streaming": True, "max_steps": None}, "`streaming` needs `max_steps`"),
    "short text": ({"sequence_length": 4096}, "shorter than `sequence_length` (4096 tokens): give more text"),
    "short context": ({"sequence_length": 4097}, "and the model's `max_position_embeddings` 4096"),
    "schedule": ({"lr_scheduler_type": "warmup_stable_decay"}, "`lr_scheduler_kwargs` is None, which does not fit"),
    "reporter": ({"report_to": "wandb"}, "wandb"),
    "no tokens": ({"sequence_length": 0}, "`sequence_length` is 0"),
    "no targets": ({"sequence_length": 1}, "`sequence_length` is 1"),
    **{
        f"{name} {value}": ({name: value}, f"`{name}` is {value}: give ")
        for name, value in (
            ("per_device_train_batch_size", 0),
            ("per_device_eval_batch_size", -2),
            ("gradient_accumulation_steps", 0),
            ("max_steps", 0),
            ("num_train_epochs", "inf"),
            ("learning_rate", "nan"),
            ("learning_rate", -1.0),
            ("weight_decay", "nan"),
            ("max_grad_norm", "nan"),
            ("adam_beta1", 1.0),
            ("adam_beta2", -0.1),
            ("save_steps", 0.0),
        )
    },
    "many levels": ({"datasets": "{path: " + "[" * 3000}, "`datasets` has {path: [[["),
    "compilation": ({"torch_compile_mode": "x"}, "`torch_compile_mode` is x, which torch.compile does not have"),
    "metric": ({"metric_for_best_model": "x"}, "`metric_for_best_model` is x, which no evaluation has: give loss"),
    "many levels of options": ({"lr_scheduler_kwargs": "{a: " + "[" * 3000}, "`lr_scheduler_kwargs` is {a: [[["),
    "endless sequences": ({"sequence_length": 2**60}, "`sequence_length` is 1152921504606846976"),
    "unknown dtype": ({"dtype": "float17"}, "--dtype: invalid choice: 'float17'"),
    "too few processes": ({"fsdp_size": 2}, "launch with --num_processes 2"),
    "no checkpoint": ({"resume_from_checkpoint": "no/checkpoint-3"}, "no/checkpoint-3"),
    "no last checkpoint": ({"resume_from_checkpoint": True}, "`resume_from_checkpoint` is True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_misuse_is_refused_and_leaves_nothing(name, inputs, tmp_path, capsys):
    values, reason = REFUSED[name]
    check_refusal(reason, ["train", *arguments(inputs, tmp_path / "run", **values)], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("small vocabulary", "`vocab_size` is 100, and the tokenizer has 300 tokens"),
        ("large token", "no tokens of the tokenizer"),
        ("impossible config", "`num_experts_per_tok`"),
        ("other model", '`model_type` "olmoe"'),
        ("impossible backbone", "transformers cannot build this llama"),
        ("output is a file", "run"),
    ],
)
def test_input_that_does_not_fit_is_refused_and_leaves_nothing(kind, reason, inputs, tmp_path, capsys):
    values = {}
    if kind == "small vocabulary":
        save_config(tmp_path / "model", vocab_size=100)
        values["model"] = tmp_path / "model"
    elif kind == "large token":
        (tmp_path / "a.jsonl").write_text(f'{{"input_ids": {list(range(200, 400))}}}\n' * 10)
        values["datasets"] = tmp_path / "a.jsonl"
    elif kind == "output is a file":
        (tmp_path / "run").write_text("mine")
    else:
        fields = {
            "other model": {"model_type": "olmoe"},
            "impossible config": {"model_type": "mohge", "num_experts_per_tok": 100},
            "impossible backbone": {"model_type": "mohge", "pad_token_id": 999999},
        }
        (tmp_path / "config.json").write_text(json.dumps(fields[kind]))
        values["model"] = tmp_path / "config.json"
    before = contents(tmp_path)
    check_refusal(reason, ["train", *arguments(inputs, tmp_path / "run", **values)], capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is neither a file nor a shipped recipe"),
        ("max_steps: many", "--max_steps"),
        ("max_stesp: 2", "--max_stesp"),
        ("{max_steps: 2", "cannot be read as a YAML recipe"),
        ("- max_steps", "is no recipe"),
        ("max_steps", "is no recipe"),
        ("", "is no recipe"),
        ("null", "is no recipe"),
        ("max_steps: [1, 2]", "has a list where one value belongs, of which 2 is too many"),
        ("max_stesp: null", "--max_stesp"),
        ("accelerator_config: {x: 1}", "unexpected keyword argument 'x'"),
        pytest.param("max_steps: " + "[" * 3000, "cannot be read as a YAML recipe (it has too many", id="many levels"),
        ("max_steps: 2024-99-99", "cannot be read as a YAML recipe"),
        ("max_steps: {a: 1}", "--max_steps"),
        ("datasets: []", "--datasets"),
        ("datasets: [{path: a, weight: -1}]", "`datasets`: `weight` of a is -1"),
        ("model: {a: 1}", "model"),
        ("1: 2", "--1"),
        ("help: true", "help"),
        ("recipe: tiny", "recipe"),
    ],
)
def test_broken_recipe_is_refused(content, reason, inputs, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    given = next((name for name in ("model", "datasets", "max_steps") if content and name in content), "seed")
    values = arguments(inputs, tmp_path / "run", **{given: None})  # flags go before the recipe
    check_refusal(reason, ["train", str(recipe), *values], capsys)
    assert not (tmp_path / "run").exists()


def check_refusal(reason: str, command: list[str], capsys):
    capsys.readouterr()
    assert main(command) == 2
    printed = capsys.readouterr().err
    (line,) = re.findall("^mohge.*", printed, re.MULTILINE)
    assert line.startswith("mohge train: ")
    assert reason in line
    assert "Traceback" not in printed
    assert printed.rstrip().endswith(line)
