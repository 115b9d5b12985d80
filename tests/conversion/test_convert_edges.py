"""`mohge convert` on unusual checkpoints, calibration texts and moments of interruption."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conversion_cases import (
    COPY,
    REGROUP,
    TRIM,
    add_tokenizer,
    assert_refused,
    assert_same_tensors,
    calibration,
    convert,
    load,
    logits,
    make_source,
    read_report,
    tensors,
    write_ids,
)
from filelock import FileLock
from model_cases import assert_close, make_model
from safetensors.torch import save_file
from tokenizers import processors
from transformers import AutoTokenizer

from mohge import MoHGEConfig
from mohge.conversion import calibration as calibration_module
from mohge.conversion import load_recipe
from mohge.conversion.staging import Staging
from mohge.training.data import packing


def save_as_one(folder: Path, weights: dict[str, torch.Tensor]):
    for file in folder.glob("model*"):
        file.unlink()
    save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **fields):
    config = json.loads((folder / "config.json").read_text())
    for name, value in fields.items():
        config.pop(name, None)
        if value is not ...:
            config[name] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("step", ["write_config", "rename"])
def test_interrupted_while_the_last_files_are_written(step, tmp_path, monkeypatch):
    make_source("olmoe", tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "undisturbed", *REGROUP) == 0

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", interrupt)
        else:
            patch.setattr("mohge.MoHGEConfig.save_pretrained", interrupt)
        assert convert(tmp_path / "source", tmp_path / "out", *REGROUP) == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "config.json").exists() == (
        step == "rename"
    )  # everything else is there by then
    assert convert(tmp_path / "source", tmp_path / "out", *REGROUP) == 0
    assert_same_tensors(tensors(tmp_path / "out"), tensors(tmp_path / "undisturbed"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "undisturbed"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "undisturbed").iterdir()}


def test_two_runs_do_not_write_the_same_folder(tmp_path, capsys):
    make_source("olmoe", tmp_path / "source")
    other = Staging(tmp_path / "out", 4, "another run")
    assert "another process" in assert_refused([tmp_path / "source", tmp_path / "out", *REGROUP], tmp_path, capsys)
    other.close()


def test_what_is_left_beside_a_complete_output_goes(tmp_path, capsys):
    """Of a run that was killed after its last rename; not while another run holds it, nor what is somebody else's."""
    source, out, scratch = make_source("olmoe", tmp_path / "source"), tmp_path / "out", tmp_path / ".out.scratch"
    for folder in (out, scratch / "prepared"):
        folder.mkdir(parents=True)
    (scratch / "precious").touch()
    assert "exists" in assert_refused([source, out, *REGROUP], tmp_path, capsys)
    with FileLock(scratch / "lock"):
        assert "exists" in assert_refused([source, out, *REGROUP], tmp_path, capsys)
    (scratch / "lock").touch()
    assert convert(source, out, *REGROUP) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_tied_checkpoint_with_another_output_projection(tmp_path, capsys):
    """transformers does not tie them then."""
    source = make_source("llama", tmp_path / "source")
    weights = tensors(source)
    edit_config(source, tie_word_embeddings=True)
    save_as_one(source, {**weights, "lm_head.weight": 2 * weights["model.embed_tokens.weight"]})
    assert "tie_word_embeddings" in assert_refused([source, tmp_path / "out", *COPY], tmp_path, capsys)
    save_as_one(source, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    assert convert(source, tmp_path / "out", *COPY) == 0
    assert_close(logits(load(tmp_path / "out")), logits(load(source)))


def test_calibration_text_that_repeats_one_token(tmp_path):
    """Nothing to learn from it, and nothing to break."""
    source = make_source("llama", tmp_path / "source")
    ones = torch.ones(64, 47, dtype=torch.long)
    assert convert(source, tmp_path / "out", *COPY, *calibration(tmp_path / "ids.jsonl", ones)) == 0
    assert read_report(tmp_path / "out")["exact"]


def test_experts_of_several_dtypes(tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    weights = tensors(source)
    down = "model.layers.1.mlp.experts.2.down_proj.weight"
    save_as_one(source, {**weights, down: weights[down].bfloat16()})
    assert "model.layers.1.mlp" in assert_refused([source, tmp_path / "out", *REGROUP], tmp_path, capsys)


def test_values_that_are_not_finite(tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    weights = tensors(source)
    weights["model.layers.1.mlp.experts.2.down_proj.weight"][3, 3] = float("nan")
    save_as_one(source, weights)
    assert convert(source, tmp_path / "out", *REGROUP) == 1
    report = read_report(tmp_path / "out")
    assert not report["passed"]
    assert "not finite" in report["failures"][0]


@pytest.mark.parametrize("stated", [..., "float32", "bfloat16"], ids=["unstated", "wrong", "right"])
def test_half_precision_shards_whatever_the_config_says(stated, tmp_path):
    """bfloat16 cannot hold three times a weight, but twice."""
    source = make_source("llama", tmp_path / "source", torch.bfloat16)
    edit_config(source, dtype=stated)
    width = json.loads((source / "config.json").read_text())["intermediate_size"]
    widths = f"8,12,{width - 20}"
    assert convert(source, tmp_path / "out", "--mode", "shards", "--widths", widths, "--experts-per-group", 2) == 0
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert load(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gelu", "relu"])
def test_padding_is_exact_for_other_activations(name, tmp_path):
    make_model(hidden_act=name).save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", "--pad") == 0
    assert_close(logits(load(tmp_path / "out")), logits(load(tmp_path / "source")))


def test_modes_without_statistics_hold_all_text_out(tmp_path):
    source = make_source("olmoe", tmp_path / "source")
    assert convert(source, tmp_path / "out", *REGROUP, *calibration(tmp_path / "ids.jsonl")) == 0
    report = read_report(tmp_path / "out")
    assert report["check"] == {"tokens": 64 * 47, "text": "calibration"}
    assert report["calibration"]["tokens"] == 0
    assert report["logits"]["perplexity_after"] == pytest.approx(report["logits"]["perplexity_before"], rel=1e-5)


BAD_CONFIGS = {
    "model_type": [],
    "num_experts": 0,
    "num_experts_per_tok": 9,
    "hidden_size": "wide",
    "num_attention_heads": 0,
}


@pytest.mark.parametrize("field", BAD_CONFIGS)
def test_config_with_a_senseless_field(field, tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    edit_config(source, **{field: BAD_CONFIGS[field]})
    assert assert_refused([source, tmp_path / "out", *REGROUP], tmp_path, capsys)


def test_config_with_a_senseless_step(tmp_path, capsys):
    source = make_source("qwen3_moe", tmp_path / "source")
    edit_config(source, decoder_sparse_step=0)
    assert "config.json" in assert_refused([source, tmp_path / "out", *REGROUP], tmp_path, capsys)


@pytest.mark.parametrize("weight_map", [None, {"a": 1}, [], {"a": "missing.safetensors"}])
def test_index_that_names_no_files(weight_map, tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    line = assert_refused([source, tmp_path / "out", *REGROUP], tmp_path, capsys)
    assert "model.safetensors.index.json" in line or "missing.safetensors" in line


OPTIONS = {
    "seed": [*REGROUP, "--seed", "4611686018427387904"],
    "device": [*REGROUP, "--device", "meta"],
    "calibration_tokens": [*REGROUP, "--calibration-tokens", "64"],
    "top_k": [*TRIM, "--router", "two_level", "--top-k", "9"],
    "top_groups": [*TRIM, "--router", "two_level", "--top-groups", "4"],
    "router": [*TRIM, "--router", "top_p"],
    "widths": ["--mode", "trim", "--widths", "28,12,20"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_messages_name_the_option(option, tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    arguments = [source, tmp_path / "out", *OPTIONS[option]]
    if "trim" in arguments:
        arguments += calibration(tmp_path / "ids.jsonl")
    assert f"`{option}`" in assert_refused(arguments, tmp_path, capsys)


@pytest.mark.parametrize("value", ["top_k: 0", "reinit: 0", "widths: []"])
def test_zero_counts_as_given(value, tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text(value)
    arguments = [source, tmp_path / "out", *REGROUP, "--recipe", tmp_path / "recipe.yaml"]
    assert f"`{value.partition(':')[0]}`" in assert_refused(arguments, tmp_path, capsys)


def test_output_below_a_file(tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    (tmp_path / "file").touch()
    assert "`output`" in assert_refused([source, tmp_path / "file" / "out", *REGROUP], tmp_path, capsys)


def test_folder_among_the_tokenizer_files(tmp_path):
    source = add_tokenizer(make_source("olmoe", tmp_path / "source"))
    (source / "tokenizer_old").mkdir()
    assert convert(source, tmp_path / "out", *REGROUP) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


ROWS = {
    "numbers": {"text": 3},
    "null_ids": {"input_ids": None},
    "nested_ids": {"input_ids": [[1, 2], [3]]},
    "text_ids": {"input_ids": "abc"},
}


@pytest.mark.parametrize("row", ROWS)
def test_calibration_rows_of_another_kind(row, tmp_path, capsys):
    source = add_tokenizer(make_source("olmoe", tmp_path / "source"))
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(ROWS[row])] * 3))
    arguments = [source, tmp_path / "out", *TRIM, "--calibration", tmp_path / "rows.jsonl"]
    assert "`calibration`" in assert_refused(arguments, tmp_path, capsys)


def test_fewer_calibration_tokens_than_experts(tmp_path, capsys):
    source = make_source("llama", tmp_path / "source")
    rows = write_ids(tmp_path / "ids.jsonl", torch.ones(4, 2, dtype=torch.long))
    arguments = [source, tmp_path / "out", "--mode", "copy", "--widths", "60", "--experts-per-group", "8"]
    arguments += ["--top-k", "2", "--calibration", rows, "--calibration-tokens", "4", "--calibration-length", "2"]
    assert "`calibration_tokens`" in assert_refused(arguments, tmp_path, capsys)


def test_text_is_read_in_pieces_and_only_as_far_as_needed(tmp_path, monkeypatch):
    source = add_tokenizer(make_source("olmoe", tmp_path / "source"))
    lines = [f"w{i % 7} w{i % 11}\n" for i in range(4000)]
    (tmp_path / "text.txt").write_text("".join(lines))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("".join(lines[:1000]))
    (folder / "b.txt").write_text("".join(lines[1000:]))
    tokenizer = AutoTokenizer.from_pretrained(source)
    whole = tokenizer("".join(lines))["input_ids"]
    config = load(source).config
    read = []

    def rows(recipe, _rows=calibration_module._rows):
        for row in _rows(recipe):
            read.append(row)
            yield row

    monkeypatch.setattr(calibration_module, "_rows", rows)
    monkeypatch.setattr(packing, "_PIECE", 500)
    options = {"source": str(source), "output": "out", "mode": "trim", "calibration_length": 10}
    few = load_recipe(None, **options, calibration=str(tmp_path / "text.txt"), calibration_tokens=100)
    ids = calibration_module.read_tokens(few, tokenizer, config, True).ids
    assert ids.flatten().tolist() == whole[:100]
    assert len(read) == 1
    many = load_recipe(None, **options, calibration=str(tmp_path / "text.txt"), calibration_tokens=8000)
    assert calibration_module.read_tokens(many, tokenizer, config, True).ids.flatten().tolist() == whole[:8000]
    of_folder = load_recipe(None, **options, calibration=str(folder), calibration_tokens=8000)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    expected = [*whole[:2000], *end, *whole[2000:]][:8000]
    assert calibration_module.read_tokens(of_folder, tokenizer, config, True).ids.flatten().tolist() == expected

    tokenizer.bos_token = "w0"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="w0 $A", special_tokens=[("w0", tokenizer.bos_token_id)]
    )
    begun = calibration_module.read_tokens(few, tokenizer, config, True).ids
    assert begun.shape == (10, 10)
    assert begun[:, 0].tolist() == [tokenizer.bos_token_id] * 10
    assert begun[:, 1:].flatten().tolist() == whole[:90]


def test_recipe_beside_the_weights_has_every_choice(tmp_path):
    source = make_source("olmoe", tmp_path / "source")
    arguments = [source, tmp_path / "out", "--mode", "trim", "--widths", "12,20,28", "--router", "two_level"]
    assert convert(*arguments, *calibration(tmp_path / "ids.jsonl")) == 0
    recipe = yaml.safe_load((tmp_path / "out" / "conversion_recipe.yaml").read_text())
    assert recipe["experts_per_group"] == [2, 2, 2]
    assert recipe["top_k"] == 2
    assert recipe["top_groups"] == 3
    assert recipe["calibration_column"] == "text"
    assert recipe["seed"] == 0


def test_router_of_the_source_is_written_out_and_decides_how_many_experts(tmp_path, capsys):
    source = make_source("olmoe", tmp_path / "source")
    arguments = [source, tmp_path / "out", *TRIM, *calibration(tmp_path / "ids.jsonl")]
    assert "`top_k` is the source's own" in assert_refused([*arguments, "--top-k", "3"], tmp_path, capsys)
    assert convert(*arguments) == 0
    recipe = yaml.safe_load((tmp_path / "out" / "conversion_recipe.yaml").read_text())
    assert (recipe["router"], recipe["top_k"]) == ("source", 2)
    assert "top_groups" not in recipe


def test_width_of_all_experts_follows_from_the_groups():
    with pytest.raises(ValueError, match="moe_intermediate_sizes"):
        MoHGEConfig(moe_intermediate_size=8)
    assert MoHGEConfig(moe_intermediate_sizes=[8, 8]).moe_intermediate_size == 8
    assert not hasattr(MoHGEConfig(moe_intermediate_sizes=[8, 16]), "moe_intermediate_size")
