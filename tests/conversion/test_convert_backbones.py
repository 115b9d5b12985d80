"""`mohge convert` of every kind of decoder, and the list of them."""

import copy
import json

import pytest
import torch
from backbone_cases import tiny_config
from conversion_cases import (
    add_tokenizer,
    assert_refused,
    assert_same_tensors,
    calibration,
    load,
    logits,
    read_report,
    tensors,
)
from model_cases import assert_close, make_ids
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from mohge.commands.main import main
from mohge.conversion import convert, listing, load_recipe, make_plan
from mohge.conversion.checkpoint import Checkpoint, NamedTensors, read_config
from mohge.conversion.decoders import make_decoder


DENSE = ["cohere2", "exaone4", "falcon_h1", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "glm4", "granite"]
DENSE += ["lfm2", "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_5_text"]
DENSE += ["seed_oss", "smollm3"]
MIXTURES = ["deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "glm_moe_dsa", "gpt_oss"]
MIXTURES += ["granitemoe", "granitemoehybrid", "hunyuan_v1_moe", "hy_v4", "llama4_text", "minimax_m2", "mixtral"]
MIXTURES += ["olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "zaya"]
SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
"""The last two layers use keys and values of the first two again."""
IDS = make_ids(2, 9)


def make_source(model_type, folder, **fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **fields))
    model.save_pretrained(folder)
    return load(folder)


def read_source(folder):
    """All tensors of a checkpoint, by the names that transformers has for them."""
    decoder = make_decoder(read_config(folder))
    with NamedTensors(Checkpoint(folder), decoder).open() as read:
        return {name: read(name) for name in decoder.tensors}


def run(source, output, **options):
    plan = make_plan(load_recipe(None, source=str(source), output=str(output), **options))
    report = convert(plan)
    assert report["passed"], report["failures"]
    return plan


def assert_runs_by_layers(plan, model):
    """One layer at a time, the source computes what it computes at once."""
    source = plan.source
    with plan.tensors.open() as read:
        source.load_outer({name: read(name) for name in source.outer_names}, "cpu")
    passed = None
    for number in range(source.num_layers):
        with source.layer(number, plan.tensors.layer(number), "cpu"):
            passed = source.run(number, IDS, passed)
    assert_close(source.logits(IDS, passed, torch.arange(IDS.shape[1])), logits(model, IDS))


@pytest.mark.parametrize(
    ("model_type", "fields"), [*((kind, {}) for kind in DENSE), ("gemma3n_text", SHARED), ("gemma4_text", SHARED)]
)
def test_dense(model_type, fields, tmp_path):
    model = make_source(model_type, tmp_path / "source", **fields)
    width = make_decoder(read_config(tmp_path / "source")).width
    options = {"mode": "copy", "widths": [width, width + 8], "experts_per_group": 2, "top_k": 2}
    plan = run(tmp_path / "source", tmp_path / "out", **options)
    assert_runs_by_layers(plan, model)
    assert_close(logits(load(tmp_path / "out"), IDS), logits(model, IDS))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixture(model_type, tmp_path):
    model = make_source(model_type, tmp_path / "source")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False, max_shard_size="20KB")
    assert_same_tensors(*(read_source(tmp_path / layout) for layout in ("stacked", "source")))
    plan = run(tmp_path / "source", tmp_path / "out", mode="regroup", experts_per_group=3)
    assert_runs_by_layers(plan, model)
    assert_close(logits(load(tmp_path / "out"), IDS), logits(model, IDS))
    run(tmp_path / "out", tmp_path / "back", mode="export")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(tmp_path / "source"))
    width = plan.source.experts.width
    _, file, _, tokens, _, length = calibration(tmp_path / "rows.jsonl", make_ids(32, 31))
    text = {"calibration": str(file), "calibration_tokens": tokens, "calibration_length": length}
    run(tmp_path / "source", tmp_path / "trimmed", mode="trim", widths=[width // 2, width], **text)
    report = read_report(tmp_path / "trimmed")
    assert 0 < report["logits"]["kl"] < float("inf")
    assert torch.isfinite(logits(load(tmp_path / "trimmed"), IDS)).all()


@pytest.mark.parametrize("model_type", ["gpt_oss", "minimax_m2", "phimoe"])
def test_half_precision_is_run_in_float32(model_type, tmp_path):
    """Matrices that are multiplied without a linear layer, norms that want one dtype, and routers that round what they
    look at to their own."""
    AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.bfloat16).save_pretrained(
        tmp_path / "source"
    )
    plan = run(tmp_path / "source", tmp_path / "out", mode="regroup", experts_per_group=2)
    assert_runs_by_layers(plan, load(tmp_path / "source").float())
    assert read_report(tmp_path / "out")["logits"]["relative_error_max"] < 1e-5


def test_multipliers_do_not_fit_into_half_precision(tmp_path):
    """Those of Falcon-H1 are no powers of two."""
    config = tiny_config("falcon_h1", mlp_multipliers=[0.3, 0.5])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    options = {"mode": "copy", "widths": [48], "experts_per_group": 4, "top_k": 2}
    with pytest.raises(ValueError, match="multipliers: give it in float32"):
        run(tmp_path / "source", tmp_path / "out", **options)


def test_list_has_a_line_for_every_decoder(monkeypatch, capsys):
    """Of a few kinds here; all of them take half a minute."""
    kinds = ["llama", "olmoe", "deepseek_v3", "gpt2", "dbrx"]
    monkeypatch.setattr(listing, "MODEL_FOR_CAUSAL_LM_MAPPING", [CONFIG_MAPPING[kind] for kind in kinds])
    assert main(["convert", "--list"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.pop("gpt2").startswith("no: GPT2MLP has")
    assert lines.pop("dbrx").startswith("unknown: its default config makes no model")
    assert lines == {
        "llama": "dense    copy, residual, shards, split; export --to mixtral, qwen2_moe",
        "olmoe": "mixture  regroup, trim; router: source, two_level; export --to olmoe",
        "deepseek_v3": "mixture  regroup, trim; router: source",
    }


def test_text_model_of_a_multimodal_checkpoint(tmp_path, capsys):
    """What transformers cannot take for a text model, because there is more in it, is refused."""
    text = tiny_config("gemma3_text").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "source")
    options = ["--mode", "copy", "--widths", "48", "--experts-per-group", "2", "--top-k", "1"]
    line = assert_refused([tmp_path / "source", tmp_path / "out", *options], tmp_path, capsys)
    assert "text model alone" in line


def test_adapter_of_the_source_works_on_the_result(tmp_path):
    """One on attention changes what it changed there."""
    torch.manual_seed(0)
    model = make_source("llama", tmp_path / "source")
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    options = {"mode": "copy", "widths": [48, 56], "experts_per_group": 2, "top_k": 2}
    run(tmp_path / "source", tmp_path / "out", **options)
    ours = PeftModel.from_pretrained(load(tmp_path / "out"), tmp_path / "adapter").eval()
    assert_close(logits(ours, IDS), logits(adapted, IDS))
    assert (logits(adapted, IDS) - logits(model, IDS)).abs().max() > 0.01
    assert_close(logits(ours.merge_and_unload(), IDS), logits(adapted, IDS))


def test_tied_matrix_under_the_name_of_the_head(tmp_path):
    """Both names are one matrix, and a checkpoint may have either."""
    model = make_source("llama", tmp_path / "source", tie_word_embeddings=True)
    weights = tensors(tmp_path / "source")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    run(tmp_path / "source", tmp_path / "out", mode="copy", widths=[48], experts_per_group=2, top_k=1)
    assert_close(logits(load(tmp_path / "out"), IDS), logits(model, IDS))


def test_what_travels_along(tmp_path):
    make_source("llama", tmp_path / "source")
    add_tokenizer(tmp_path / "source")
    files = ["chat_template.jinja", "tokenizer.json", "tekken.json", "spiece.model"]
    files += ["additional_chat_templates/tool.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE"]
    for file in files:
        (tmp_path / "source" / file).parent.mkdir(exist_ok=True)
        if file != "tokenizer.json":
            (tmp_path / "source" / file).write_text(json.dumps({"content": file}))
    options = {"mode": "copy", "widths": [48], "experts_per_group": 2, "top_k": 1}
    run(tmp_path / "source", tmp_path / "out", **options)
    for file in files:
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "source" / file).read_text()
