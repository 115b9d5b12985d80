"""`mohge convert`: bad input is refused before anything is written; dry runs; recipes."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conversion_cases import (
    COPY,
    DENSE_OPTIONS,
    REGROUP,
    TRIM,
    TWO_EACH,
    add_tokenizer,
    assert_refused,
    calibration,
    convert,
    load,
    make_source,
    read_report,
    tree,
)
from model_cases import make_model
from safetensors.torch import load_file, save_file

from mohge.conversion import load_recipe, make_plan
from mohge.info import parameter_counts


SPLIT_KEPT = ["--mode", "split", "--keep-active"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    make_source("llama", folder / "llama")
    add_tokenizer(make_source("olmoe", folder / "olmoe"))
    make_model().save_pretrained(folder / "mohge")
    trained_on = calibration(folder / "rows.jsonl")
    assert convert(folder / "olmoe", folder / "trimmed", *TRIM, *trained_on) == 0
    return folder


def shards(source):
    found = sorted(source.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def _truncate(source):
    file = shards(source)[-1]  # a reader that goes from first to last finds it late
    file.write_bytes(file.read_bytes()[:-100])


def _truncate_header(source):
    shards(source)[-1].write_bytes(shards(source)[-1].read_bytes()[:5])


def _empty_shard(source):
    shards(source)[-1].write_bytes(b"")


def _lose_shard(source):
    shards(source)[-1].unlink()


def _lose_tensor(source):
    file = shards(source)[-2]  # the last has the output projection alone
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, {"format": "pt"})


def _lose_weights(source):
    for file in source.glob("model*"):
        file.unlink()


def _save_as_bin(source):
    _lose_weights(source)
    (source / "pytorch_model.bin").touch()


def _lose_config(source):
    (source / "config.json").unlink()


def _break_config(source):
    (source / "config.json").write_text("{")


def _break_index(source):
    (source / "model.safetensors.index.json").write_text("{")


def _rewrite(source, number, change):
    file = shards(source)[number]
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})


def _twice(source):
    """In another shard too, with other values."""
    [head] = load_file(shards(source)[-1]).values()
    _rewrite(source, 0, lambda weights: weights.update({"lm_head.weight": head + 1}))


def _unknown_to_index(source):
    _rewrite(source, 0, lambda weights: weights.update({"lm_head.bias": torch.zeros(3)}))


def _only_in_index(source):
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.bias"] = shards(source)[0].name
    path.write_text(json.dumps(index))


def _only_tables(source):
    _lose_weights(source)
    save_file({"table": torch.arange(3)}, source / "model.safetensors", {"format": "pt"})


def _config(**fields):
    def change(source):
        path = source / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def _biases(source):
    shutil.rmtree(source)
    make_source("llama", source, mlp_bias=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"model-0000(\d)-of-0000\1\.safetensors"),
        (_truncate_header, r"model-0000(\d)-of-0000\1\.safetensors"),
        (_empty_shard, r"model-0000(\d)-of-0000\1\.safetensors"),
        (_lose_shard, r"model-0000(\d)-of-0000\1\.safetensors"),
        (_lose_tensor, r"model\.norm\.weight"),
        (_lose_weights, "safetensors"),
        (_save_as_bin, r"\.bin.*save_pretrained"),
        (_lose_config, r"config\.json"),
        (_break_config, r"config\.json"),
        (_break_index, r"index"),
        (_twice, r"lm_head\.weight.*differs.*model-00001.*model-"),
        (_unknown_to_index, r"lm_head\.bias is in model-00001.*not in model\.safetensors\.index"),
        (_only_in_index, r"lm_head\.bias is in no shard"),
        (_only_tables, "no weights"),
        (_config(intermediate_size=40), r"shape|intermediate_size|\[44, 32\]"),
        (_config(num_hidden_layers=3), r"model\.layers\.2|num_hidden_layers"),
        (_config(model_type="gpt2"), "gpt2"),
        (_config(model_type="olmo2"), r"model\.layers\.0\.input_layernorm"),
        (_config(model_type=None), "model_type"),
        (_config(quantization_config={"quant_method": "fp8"}), "quanti"),
        (_biases, "biases"),
    ],
    ids=[
        *("truncated shard", "truncated header", "empty shard", "missing shard", "missing tensor", "no weights"),
        *("bin weights", "no config", "broken config", "broken index", "tensor twice", "tensor of no index"),
        *("tensor of no shard", "tables alone", "other width", "missing layer", "unknown architecture"),
        *("another architecture", "no model type", "quantised", "biases in the feed-forward"),
    ],
)
def test_bad_source(damage, message, sources, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(sources / "llama", source)
    damage(source)
    assert re.search(message, assert_refused([source, tmp_path / "out", *COPY], tmp_path, capsys))


# source, options, what the message names
OPTIONS = {
    "no mode": ("llama", [], "mode"),
    "unknown mode": ("llama", ["--mode", "nonsense"], "nonsense"),
    "unknown option": ("llama", [*COPY, "--widht", "3"], "widht"),
    "regroup of a dense model": ("llama", REGROUP, r"regroup.*llama|llama.*regroup"),
    "trim of a dense model": ("llama", TRIM, r"trim.*llama|llama.*trim"),
    "copy of a mixture": ("olmoe", COPY, r"copy.*olmoe|olmoe.*copy"),
    "shards of a mixture": ("olmoe", ["--mode", "shards", *DENSE_OPTIONS[:4]], r"shards.*olmoe|olmoe.*shards"),
    "regroup of MoHGE": ("mohge", REGROUP, r"regroup.*mohge|mohge.*regroup"),
    "export of a dense model": ("llama", ["--mode", "export"], r"export.*llama|llama.*export"),
    "export of what was not regrouped": ("mohge", ["--mode", "export"], "regroup"),
    "export of what was trimmed": ("trimmed", ["--mode", "export"], "olmoe|regroup"),
    "experts that miss the source's": ("olmoe", ["--mode", "regroup", "--experts-per-group", "2,3"], r"\b6\b"),
    "experts that do not divide": ("olmoe", ["--mode", "regroup", "--experts-per-group", "4"], r"\b6\b"),
    "trimmed experts that miss the source's": ("olmoe", [*TRIM, "--experts-per-group", "2,2,1"], r"\b6\b"),
    "shards that miss the width": ("llama", ["--mode", "shards", "--widths", "12,31", *TWO_EACH], r"\b44\b"),
    "split above the width": ("llama", ["--mode", "split", *DENSE_OPTIONS, "--widths", "20,24"], r"\b44\b"),
    "kept share of one": ("llama", ["--mode", "split", "--keep-active", "1"], "keep_active"),
    "kept share beside widths": ("llama", [*SPLIT_KEPT, "0.9", "--widths", "3,6"], "widths.*keep_active"),
    "kept share beside a top k": ("llama", [*SPLIT_KEPT, "0.9", "--top-k", "2"], "top_k.*keep_active"),
    "kept share without data": ("llama", [*SPLIT_KEPT, "0.9", "--saliency", "magnitude"], "saliency.*keep_active"),
    "split by the gradient": ("llama", ["--mode", "split", "--saliency", "gradient"], "saliency.*magnitude"),
    "kept share that is out of reach": ("llama", [*SPLIT_KEPT, "0.1"], r"keep_active.*\b44\b"),
    "kept share without calibration": ("llama", [*SPLIT_KEPT, "0.9"], "calibration"),
    "kept share of a trim": ("olmoe", [*TRIM, "--keep-active", "0.9"], "keep_active"),
    "descending widths": ("llama", [*COPY, "--widths", "51,44"], "ascend|51"),
    "width of zero": ("llama", [*COPY, "--widths", "0,44"], "width"),
    "widths that are no numbers": ("llama", [*COPY, "--widths", "44,wide"], "width"),
    "no widths": ("llama", ["--mode", "copy", *DENSE_OPTIONS[2:]], "width"),
    "more counts than widths": ("llama", [*COPY, "--experts-per-group", "2,2,2"], "experts.per.group"),
    "more experts per token than experts": ("llama", [*COPY, "--top-k", "5"], r"\b5\b"),
    "more groups per token than groups": ("llama", [*COPY, "--top-groups", "3"], r"\b3\b"),
    "unknown router": ("llama", [*COPY, "--router", "nonsense"], "nonsense"),
    "fraction above one": ("llama", [*COPY, "--reinit", "1.5"], "reinit"),
    "widths of a regroup": ("olmoe", [*REGROUP, "--widths", "20,20,20"], "widths"),
    "reinit of residual": ("llama", ["--mode", "residual", *DENSE_OPTIONS, "--reinit", "0.5"], "reinit"),
    "unknown device": ("llama", [*COPY, "--device", "nonsense"], "nonsense"),
    "split without calibration": ("llama", ["--mode", "split", *DENSE_OPTIONS, "--widths", "3,6"], "calibration"),
    "narrow copy without calibration": ("llama", [*COPY, "--widths", "20,44"], "calibration"),
    "narrow residual without calibration": (
        "llama",
        ["--mode", "residual", *DENSE_OPTIONS, "--widths", "20,44"],
        "calibration",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, sources, tmp_path, capsys):
    kind, options, message = OPTIONS[name]
    source = tmp_path / "source"
    shutil.copytree(sources / kind, source)
    assert re.search(message, assert_refused([source, tmp_path / "out", *options], tmp_path, capsys))


def test_kept_shares_in_reach(sources, tmp_path):
    """The message names the least and the most, and both are taken."""

    options = {"source": str(sources / "llama"), "output": str(tmp_path / "out"), "mode": "split"}

    def plan(share):
        make_plan(load_recipe(None, keep_active=share, **options))

    with pytest.raises(ValueError, match="keep_active") as refused:
        plan(0.1)
    least, most = map(float, re.search(r"give ([\d.]+) to ([\d.]+)", str(refused.value)).groups())
    plan(least)
    plan(most)
    with pytest.raises(ValueError, match=f"to {most}"):
        plan(most + 0.001)


CALIBRATIONS = {
    "no such file": ("missing.jsonl", None, "missing.jsonl"),
    "empty file": ("empty.txt", "", "empty.txt|calibration"),
    "blank lines": ("blank.txt", "\n \n\n", "blank.txt|calibration"),
    "too little text": ("short.txt", "w3 w4 w5\n", "tokens|calibration"),
    "empty texts": ("empty.jsonl", '{"text": ""}\n' * 9, "empty.jsonl|calibration"),
    "other column": ("other.jsonl", '{"content": "w3 w4 w5"}\n' * 99, "text"),
    "no JSON": ("broken.jsonl", "{not json\n", "broken.jsonl"),
    "too few ids": ("short.jsonl", '{"input_ids": [3, 4, 5]}\n', "tokens|calibration"),
    "ids beyond the vocabulary": ("beyond.jsonl", '{"input_ids": [3, 4, 5, 640, 7, 8]}\n' * 99, "640|vocab"),
}


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_bad_calibration(name, sources, tmp_path, capsys):
    file, content, message = CALIBRATIONS[name]
    shutil.copytree(sources / "olmoe", tmp_path / "olmoe")
    if content is not None:
        (tmp_path / file).write_text(content)
    options = [*TRIM, "--calibration", tmp_path / file, "--calibration-tokens", 256, "--calibration-length", 32]
    line = assert_refused([tmp_path / "olmoe", tmp_path / "out", *options], tmp_path, capsys)
    assert re.search(message, line)


def test_text_for_a_source_without_tokenizer(sources, tmp_path, capsys):
    shutil.copytree(sources / "llama", tmp_path / "llama")
    (tmp_path / "words.txt").write_text("w3 w4 w5 w6\n" * 99)
    options = [*COPY, "--calibration", tmp_path / "words.txt", "--calibration-tokens", 256]
    line = assert_refused([tmp_path / "llama", tmp_path / "out", *options], tmp_path, capsys)
    assert "tokenizer" in line


def test_source_that_does_not_exist(tmp_path, capsys):
    assert "nowhere" in assert_refused([tmp_path / "nowhere", tmp_path / "out", *COPY], tmp_path, capsys)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_output_that_exists(kind, sources, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
    if kind == "folder":
        (out / "config.json").write_text("mine")
    assert "FOLDER/out" in assert_refused([sources / "llama", out, *COPY], tmp_path, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mode: [copy", "recipe.yaml"),
        ("- mode\n- copy\n", "recipe.yaml"),
        ("mode: copy\nwidhts: [44, 51]\n", "widhts"),
        ("mode: nonsense\n", "nonsense"),
        ("mode: copy\nwidths: wide\nexperts_per_group: 2\ntop_k: 2\n", "width"),
        ("mode: copy\nwidths: [44, 51]\nexperts_per_group: 2\ntop_k: many\n", "top.k|many"),
        (None, "recipe.yaml"),
    ],
    ids=["broken", "no mapping", "unknown key", "unknown mode", "text as widths", "text as number", "missing"],
)
def test_bad_recipe(content, message, sources, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_text(content)
    arguments = ["--recipe", recipe, sources / "llama", tmp_path / "out"]
    assert re.search(message, assert_refused(arguments, tmp_path, capsys))


def test_exit_status_of_the_process(sources, tmp_path):
    shutil.copytree(sources / "olmoe", tmp_path / "olmoe")
    _truncate(tmp_path / "olmoe")
    before = tree(tmp_path)
    command = [sys.executable, "-m", "mohge.commands.main", "convert", "olmoe", "out", *REGROUP]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    printed = re.search("^mohge.*", done.stderr, re.MULTILINE | re.DOTALL)[0]  # libraries may print before
    assert re.fullmatch(r"mohge convert: .*\.safetensors.*\n", printed)
    assert tree(tmp_path) == before


def mentions(printed: str, count: int) -> bool:
    """Whether a number stands there, in full or as `mohge info` writes it."""
    return any(text in printed for text in (f"{count:,}", str(count), f"{count / 1000:.3f}K"))


@pytest.mark.parametrize(
    ("kind", "options"), [("olmoe", REGROUP), ("llama", COPY), ("llama", [*COPY, "--reinit", "0.5"])]
)
def test_dry_run_prints_what_a_run_then_does(kind, options, sources, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(sources / kind, out, *options, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert convert(sources / kind, out, *options) == 0
    report, counts = read_report(out), parameter_counts(load(out).config)
    assert options[1] in printed
    assert mentions(printed, counts.total)
    assert mentions(printed, counts.activated)
    for stage in ("before", "after"):
        assert mentions(printed, report["parameters"][stage]["total"])
        assert mentions(printed, report["parameters"][stage]["activated"])
    assert re.search(r"\bbytes?\b|\d\s*[KMG]i?B\b", printed)
    stated = r"\bexact\b" if report["exact"] else r"\b(not |in)exact|exact\W+(no|false)\b"
    assert re.search(stated, printed, re.IGNORECASE)
    assert " ".join(report["reason"].split()) in " ".join(printed.split())
