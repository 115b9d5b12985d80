"""`mohge convert` as it is run: from recipes, on text, killed and run again, from the Hub's cache. Its output where
mohge is not installed."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from conversion_cases import (
    IDS,
    REGROUP,
    add_tokenizer,
    assert_same_tensors,
    calibration,
    convert,
    load,
    logits,
    make_source,
    read_report,
    tensors,
    tree,
)
from datasets import Dataset
from huggingface_hub import constants
from model_cases import assert_close, make_ids
from parallel_training_runs import Ranks
from pretrain_runs import signal_in
from processes import WITHOUT_PACKAGE, run_python
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mohge.backbones_mohge import feed_forwards
from mohge.commands.main import main
from mohge.conversion.staging import Staging


COPY = ["--mode", "copy", "--widths", "44,51", "--experts-per-group", "2", "--top-k", "2"]


def test_recipe_and_command_line(tmp_path):
    """The command line goes before the recipe, and the resolved recipe gives the same weights again."""
    source = make_source("olmoe", tmp_path / "source")
    rows = calibration(tmp_path / "rows.jsonl")
    recipe = {
        "source": str(source),
        "output": str(tmp_path / "unused"),
        "mode": "trim",
        "widths": [8, 20, 28],
        "experts_per_group": 2,
        "top_k": 3,
        "router": "two_level",
        "seed": 4,
        "calibration": str(rows[1]),
        "calibration_tokens": rows[3],
        "calibration_length": rows[5],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    first, second = tmp_path / "first", tmp_path / "second"
    overrides = ["--widths", "12,20,28", "--top-k", "1"]
    assert convert("--recipe", tmp_path / "recipe.yaml", source, first, *overrides) == 0
    assert not (tmp_path / "unused").exists()
    config = load(first).config
    assert config.moe_intermediate_sizes == [12, 20, 28]
    assert config.num_experts_per_tok == 1
    resolved = yaml.safe_load((first / "conversion_recipe.yaml").read_text())
    expected = {**recipe, "output": str(first), "widths": [12, 20, 28], "top_k": 1}
    assert {name: resolved[name] for name in expected} == expected
    assert resolved.get("revision") is None
    assert convert("--recipe", first / "conversion_recipe.yaml", source, second) == 0
    assert_same_tensors(tensors(second), tensors(first))
    again = yaml.safe_load((second / "conversion_recipe.yaml").read_text())
    assert again == {**resolved, "output": str(second)}


def test_recipe_alone(tmp_path):
    source, out = make_source("llama", tmp_path / "source"), tmp_path / "out"
    recipe = f"source: {source}\noutput: {out}\nmode: shards\nwidths: [12, 32]\nexperts_per_group: [2, 1]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert convert("--recipe", tmp_path / "recipe.yaml") == 0
    assert load(out).config.expert_counts == [2, 1]
    resolved = yaml.safe_load((out / "conversion_recipe.yaml").read_text())
    assert resolved["seed"] == 0
    assert resolved["experts_per_group"] == [2, 1]


@pytest.mark.parametrize("form", ["txt", "jsonl", "json", "csv", "parquet"])
def test_calibration_text(form, tmp_path):
    source, out = add_tokenizer(make_source("llama", tmp_path / "source")), tmp_path / "out"
    GenerationConfig(max_new_tokens=7, repetition_penalty=1.5).save_pretrained(source)
    texts = [" ".join(f"w{i}" for i in row) for row in make_ids(64, 47).tolist()]
    file, dataset = tmp_path / f"words.{form}", Dataset.from_dict({"number": list(range(64)), "words": texts})
    match form:
        case "txt":
            file.write_text("\n".join(texts))
        case "csv":
            dataset.to_csv(file)
        case "parquet":
            dataset.to_parquet(file)
        case _:
            dataset.to_json(file, lines=form == "jsonl")
    column = [] if form == "txt" else ["--calibration-column", "words"]
    options = [*COPY, "--widths", "20,44", "--calibration", file, *column]
    assert convert(source, out, *options, "--calibration-tokens", 2048, "--calibration-length", 32) == 0
    report = read_report(out)
    assert report["check"] == {"tokens": 256, "text": "calibration"}
    assert report["calibration"] == {"dataset": str(file), "tokens": 1792}
    model = load(out)
    ids = AutoTokenizer.from_pretrained(out)(texts, return_tensors="pt")["input_ids"]
    assert torch.equal(ids, make_ids(64, 47))
    # Other tokens of the same distribution have nearly the perplexity that the receipt has for those held out.
    for name, m in (("perplexity_before", load(source)), ("perplexity_after", model)):
        perplexity = torch.nn.functional.cross_entropy(
            logits(m, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).exp()
        assert report["logits"][name] == pytest.approx(perplexity.item(), rel=0.5)
    assert model.generation_config.max_new_tokens == 7
    assert model.generation_config.repetition_penalty == 1.5


def _used_by(model, ids) -> tuple[list[list[int]], float]:
    """Tokens that came to each expert of each layer, and parameters that a token took on average, by running the whole
    model and adding up the weights of the experts that each token chose."""
    sparse, chosen, counts = [found for found in feed_forwards(model) if found.experts is not None], {}, []
    for found in sparse:

        def keep(module, args, number=found.layer_idx):
            chosen[number] = args[1].flatten().tolist()

        found.experts.register_forward_pre_hook(keep)
    logits(model, ids)
    used = model.num_parameters() - sum(p.numel() for found in sparse for p in found.experts.parameters())
    for found in sparse:
        experts, stacks = found.experts.num_experts, dict(found.experts.named_parameters())
        if hasattr(found.experts, "expert_groups"):
            names = [f"down_proj_{group}" for group in found.experts.expert_groups]
            widths = [stacks[name].shape[2] if name in stacks else 0 for name in names]
        else:
            widths = [stacks["down_proj"].shape[2]] * experts
        counts.append([0] * experts)
        for expert in chosen[found.layer_idx]:
            if expert < experts:
                counts[-1][expert] += 1
                used += 3 * model.config.hidden_size * widths[expert] / ids.numel()
    return counts, used


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("olmoe", ["--mode", "trim", "--widths", "8,20,28", "--experts-per-group", "2"]),
        ("qwen2_moe", ["--mode", "trim", "--keep", "0.6", "--multiple", "5", "--router", "two_level"]),
        ("olmoe_normalised_tied_biased", ["--mode", "trim", "--keep", "0.6", "--multiple", "5"]),
        ("llama", [*COPY, "--widths", "20,44", "--router", "top_p"]),
    ],
)
def test_receipt_counts_what_held_out_tokens_used(name, options, tmp_path, capsys):
    source, rows, out = make_source(name, tmp_path / "source"), make_ids(64, 47), tmp_path / "out"
    assert convert(source, out, *options, *calibration(tmp_path / "rows.jsonl", rows)) == 0
    report, printed = read_report(out), capsys.readouterr().out
    text = f"{tmp_path / 'rows.jsonl'}, {8 * 47} tokens held out"
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    for when, folder in (("before", source), ("after", out)):
        model = load(folder)
        counts, used = _used_by(model, rows[-8:])
        field = "tokens_per_expert" + "_before" * (when == "before")
        assert [layer[field] for layer in report["layers"] if layer[field]] == counts
        found, tied = report["parameters"][when], model.config.tie_word_embeddings
        assert found["activated_as_routed"] == round(used)
        looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
        assert found["flops_per_token"] == round(2 * (used - looked_up))
    card, layers = (out / "README.md").read_text(), load(out).config.sparse_layers
    assert f"{after['activated_as_routed']:,} (" in card
    differ = len({layer.expert_widths for layer in layers}) > 1
    assert ("](widths.svg)" in card) is (out / "widths.svg").exists() is differ is ("--keep" in options)
    assert f"{before['activated']:,} -> {after['activated']:,} with equal traffic" in printed
    routed = f"{before['activated_as_routed']:,} -> {after['activated_as_routed']:,}"
    assert f"{routed} on {text}" in printed
    assert f"{before['flops_per_token']:,} -> {after['flops_per_token']:,}" in printed
    assert main(["info", str(out)]) == 0
    assert f"{after['activated_as_routed'] / 1000:.3f}K  on {text.rpartition('/')[2]}" in capsys.readouterr().out


def test_receipt_says_so_if_the_tokens_were_random(tmp_path, capsys):
    assert convert(make_source("olmoe", tmp_path / "source"), tmp_path / "out", *REGROUP) == 0
    report = read_report(tmp_path / "out")
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    assert before["activated_as_routed"] == after["activated_as_routed"] == before["activated"]  # of one width
    assert f"on {report['check']['tokens']} random tokens" in capsys.readouterr().out
    for layer in report["layers"]:
        assert sorted(layer["tokens_per_expert"]) == sorted(layer["tokens_per_expert_before"])
        assert sum(layer["tokens_per_expert"]) == 2 * report["check"]["tokens"]
    record = tmp_path / "out" / "conversion_report.json"
    for change in (
        {"layers": [layer | {"tokens_per_expert": [1, 2]} for layer in report["layers"]]},
        {"layers": report["layers"][:1]},
        {"layers": [3]},
        {"layers": None},
        {"check": None},
        {"check": {"tokens": "x", "text": "random"}},
        {"check": {"tokens": 32, "text": "calibration"}},
        {"check": {"tokens": 1, "text": "random"}},
    ):
        record.write_text(json.dumps(report | change))
        assert main(["info", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert "conversion_report.json" in printed.err
    for layer in report["layers"]:
        del layer["tokens_per_expert"]
    record.write_text(json.dumps(report))  # as it was before these numbers were recorded
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "as routed           not measured" in capsys.readouterr().out


def _weights_and_config(folder):
    files = {name: content for name, content in tree(folder).items() if name.startswith(("model", "config."))}
    assert sum(name.endswith(".safetensors") for name in files) > 3
    assert "config.json" in files
    return files


def _finished(folder):
    """The finished shards, by what tells a file from one written anew."""
    return {(s.st_ino, s.st_mtime_ns): file.name for file in folder.glob("model-*.safetensors") if (s := file.stat())}


def convert_until_the_third_shard(folder, *arguments):
    """`mohge convert`, run in `folder`, that is killed when two shards are finished and the third is a draft."""
    os.chdir(folder)
    signal_in(Staging, "seal_shard", lambda staging, number: len(_finished(staging.folder)) == 2, signal.SIGKILL)
    convert(*arguments)


@pytest.mark.parametrize("kind", ["drawn anew", "refitted", "split"])
def test_killed_run_leaves_nothing_that_loads_and_goes_on(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_source("llama", tmp_path / "source", hidden_size=64, intermediate_size=256, num_hidden_layers=5)
    options = ["--mode", "copy", "--experts-per-group", "4", "--top-k", "2"]
    text = map(str, calibration(tmp_path / "rows.jsonl"))
    match kind:
        case "drawn anew":
            options += ["--widths", "256,300", "--reinit", "0.5"]
        case "refitted":
            options += ["--widths", "150,256", *text]
        case "split":  # whose layout follows from the text
            options = ["--mode", "split", "--keep-active", "0.8", *text]
    whole = tmp_path / "whole" / "out"
    whole.parent.mkdir()
    assert convert(tmp_path / "source", whole, *options) == 0
    expected = _weights_and_config(whole)

    command, partial = [tmp_path / "source", "out", *options], tmp_path / ".out.partial"
    ranks = Ranks(1, tmp_path / "logs", convert_until_the_third_shard, tmp_path, *command)
    assert ranks.wait() == [-signal.SIGKILL], ranks.errors()
    assert not (tmp_path / "out").exists()
    assert not (partial / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(partial)
    finished = _finished(partial)
    assert 0 < len(finished) < sum(name.endswith(".safetensors") for name in expected)
    kept = tmp_path / "kept"
    shutil.copytree(partial, kept)

    assert convert(*command) == 0
    assert _weights_and_config(tmp_path / "out") == expected
    assert finished.keys() & _finished(tmp_path / "out").keys()  # not converted again
    assert not partial.exists()
    divergences = [read_report(folder)["logits"]["kl"] for folder in (tmp_path / "out", whole)]
    assert divergences[0] == pytest.approx(divergences[1], rel=1e-3)

    # Another command does not go on with these layers: it starts anew, or says that they are in its way.
    shutil.rmtree(tmp_path / "out")
    kept.rename(partial)
    status = convert(tmp_path / "source", tmp_path / "out", *options, "--seed", 1)
    if status == 0:
        shutil.rmtree(whole)
        assert convert(tmp_path / "source", whole, *options, "--seed", 1) == 0
        assert _weights_and_config(tmp_path / "out") == _weights_and_config(whole)
    else:
        assert status == 2
        assert not (tmp_path / "out").exists()


def test_hub_id_from_the_cache(tmp_path, monkeypatch, capsys):
    repository = tmp_path / "cache" / "models--someone--small-olmoe"
    revisions = {"main": "0123456789abcdef" * 2 + "01234567", "older": "fedcba9876543210" * 2 + "fedcba98"}

    def halve(model):
        model.model.embed_tokens.weight *= 0.5

    (repository / "refs").mkdir(parents=True)
    for name, revision in revisions.items():
        (repository / "refs" / name).write_text(revision)
        make_source("olmoe", repository / "snapshots" / revision, change=halve if name == "older" else None)
    commands = [
        ["someone/small-olmoe", "main", *REGROUP],
        ["someone/small-olmoe", "older", *REGROUP, "--revision", "older"],
        ["someone/else", "nothing", *REGROUP],
    ]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert [main(["convert", *command]) for command in commands] == [0, 0, 2]
    assert "someone/else" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "main", "older"]
    for name, revision in revisions.items():
        source, out = repository / "snapshots" / revision, tmp_path / name
        assert read_report(out)["source"] == {
            "path": "someone/small-olmoe",
            "revision": revision,
            "model_type": "olmoe",
        }
        recipe = yaml.safe_load((out / "conversion_recipe.yaml").read_text())
        assert (recipe["source"], recipe["revision"]) == ("someone/small-olmoe", revision)
        assert_close(logits(load(out)), logits(load(source)))


LOAD = """
import json
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
ids, *paths = sys.argv[1:]
found = {}
with torch.no_grad():
    for path in map(Path, paths):
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        base = AutoModel.from_pretrained(path, trust_remote_code=True)
        outputs = [model(torch.load(ids)).logits, model.lm_head(base(torch.load(ids)).last_hidden_state)]
        torch.save(outputs, path.with_suffix(".pt"))
        found[path.name] = [type(model).__name__, type(model).__module__.split(".")[0]]
print(json.dumps([found, "mohge" in sys.modules]))
"""


def test_outputs_load_where_mohge_is_not_installed(tmp_path):
    for name in ("olmoe", "llama", "qwen3_dynamic_rope"):
        make_source(name, tmp_path / name)
    rows = calibration(tmp_path / "rows.jsonl")
    shards = ["--mode", "shards", "--widths", "12,32", "--experts-per-group", "2"]
    trim = ["--mode", "trim", "--widths", "12,20,28", "--experts-per-group", "2", *rows]
    split = ["--mode", "split", "--widths", "3,6", "--experts-per-group", "2", "--top-k", "2", *rows]
    conversions = {
        "regrouped": ["olmoe", *REGROUP],
        "trimmed": ["olmoe", *trim],
        "padded": ["trimmed", "--mode", "export", "--pad"],
        "copied": ["llama", *COPY, "--router", "top_p"],
        "with_residual": ["qwen3_dynamic_rope", "--mode", "residual", *COPY[2:]],
        "split": ["llama", *split],
        "sharded": ["llama", *shards],
    }
    for name, (source, *options) in conversions.items():
        assert convert(tmp_path / source, tmp_path / name, *options) == 0
    torch.save(IDS, tmp_path / "ids")
    paths = [tmp_path / name for name in conversions]
    found, imported = run_python(WITHOUT_PACKAGE + LOAD, tmp_path, tmp_path / "ids", *paths)
    assert not imported
    assert found == {name: ["MoHGEForCausalLM", "transformers_modules"] for name in conversions}
    for path in paths:
        expected = logits(load(path))
        for actual in torch.load(path.with_suffix(".pt")):
            assert_close(actual, expected)
