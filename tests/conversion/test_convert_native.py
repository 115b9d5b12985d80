"""`mohge convert --mode export --to ARCH`: models that leave as a mixture that every engine has."""

import json
import re

import pytest
import torch
from conversion_cases import IDS, LLAMA3, assert_refused, convert, load, logits, read_report
from model_cases import MIXTURE, VARIANTS, assert_close, make_model
from transformers import (
    DeepseekV2ForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from mohge.conversion.modes import native
from mohge.conversion.receipt import summary


NO_SHARED = {"shared_expert_intermediate_size": 0}
TOP_K = {"router_type": "top_k"}
LOGSUMEXP = {"group_score_function": "expert_logsumexp", "num_groups_per_tok": 3}


def backbone(model_type, **fields):
    heads = {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    return {"backbone_config": {"model_type": model_type, **heads, **fields}, "router_type": "top_k"}


# fields of the model, options, class of the result, width of its experts
CASES = {
    "top_k of uneven groups, widths by layer, scaling": (
        {**TOP_K, **NO_SHARED, "routed_scaling_factor": 2.5, **VARIANTS["wider_second_layer"]},
        ["--to", "mixtral"],
        (MixtralForCausalLM, 64),
    ),
    "logsumexp, removed experts, tied": (
        {**LOGSUMEXP, **NO_SHARED, "moe_intermediate_sizes": [0, 24, 40], "tie_word_embeddings": True},
        ["--to", "mixtral", "--multiple", "32"],
        (MixtralForCausalLM, 64),
    ),
    "one group with a router that says nothing": (
        {**VARIANTS["one_group"], **NO_SHARED},
        ["--to", "mixtral"],
        (MixtralForCausalLM, 16),
    ),
    "sliding window": (
        {**backbone("mistral", sliding_window=4, head_dim=16), **NO_SHARED},
        ["--to", "mixtral"],
        (MixtralForCausalLM, 40),
    ),
    "shared expert, dense layer, weights as they are, scaled positions": (
        {
            **backbone("llama", rope_parameters=LLAMA3),
            **{"mlp_only_layers": [0], "topk_weight_normalization": "none", "routed_scaling_factor": 3.0},
        },
        ["--to", "qwen2_moe", "--multiple", "32"],
        (Qwen2MoeForCausalLM, 64),
    ),
    "no shared expert": (
        {**TOP_K, **NO_SHARED, "topk_weight_normalization": "none"},
        ["--to", "qwen2_moe"],
        (Qwen2MoeForCausalLM, 40),
    ),
    "gated shared expert, biases, tied, mixed windows": (
        {
            **backbone("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=2),
            **{"shared_expert_gate": True, "tie_word_embeddings": True},
        },
        ["--to", "qwen2_moe"],
        (Qwen2MoeForCausalLM, 40),
    ),
    "norms of queries and keys, dense layer, biases": (
        {**backbone("qwen3", head_dim=16, attention_bias=True), **NO_SHARED, "mlp_only_layers": [1]},
        ["--to", "qwen3_moe"],
        (Qwen3MoeForCausalLM, 40),
    ),
    "our router on a mixture": (
        {**backbone("olmoe", clip_qkv=0.7, num_experts=4), **NO_SHARED, **LOGSUMEXP, "router_type": "two_level"},
        ["--to", "olmoe"],
        (OlmoeForCausalLM, 40),
    ),
    "a mixture's own router, shared experts as wide as two": (
        {
            **VARIANTS["latent"],
            **{"router_type": "source", "shared_expert_intermediate_size": 0},
            "backbone_config": {
                **VARIANTS["latent"]["backbone_config"],
                **{"n_routed_experts": 12, "num_experts_per_tok": 3, "n_shared_experts": 2},
                **{"moe_intermediate_size": 40, "first_k_dense_replace": 1},
            },
        },
        ["--to", "deepseek_v2", "--multiple", "16"],
        (DeepseekV2ForCausalLM, 48),
    ),
    "a mixture's own router": (
        VARIANTS["removed_experts_of_a_mixture"],
        ["--to", "source", "--multiple", "16"],
        (OlmoeForCausalLM, 48),
    ),
}


def make_folder(fields, folder, dtype=torch.float32):
    """Weights of all parts count: norms and biases are random, the ids of a mixture's experts in disorder."""
    model = make_model(**fields).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=0.3)
        for feed_forward in model.sparse_feed_forwards:
            if model.config.keeps_router:
                feed_forward.experts.expert_ids.copy_(torch.randperm(12))
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_it_leaves_as_a_mixture_that_engines_have(name, tmp_path):
    fields, options, (model_class, width) = CASES[name]
    source = load(make_folder(fields, tmp_path / "source"))
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", *options) == 0
    model, out = load(tmp_path / "out"), tmp_path / "out"
    assert type(model) is model_class
    assert {stack.shape[2] for key, stack in model.state_dict().items() if key.endswith("down_proj")} == {width}
    multiple = int(options[3]) if "--multiple" in options else 1
    shared = [w for key, w in model.state_dict().items() if "shared" in key and key.endswith("down_proj.weight")]
    assert not any(down.shape[1] % multiple for down in shared)
    if model_class is Qwen2MoeForCausalLM:  # vLLM's has them always, and does not say so where they are missing
        assert "model.layers.0.self_attn.q_proj.bias" in model.state_dict()
    assert_close(logits(model), logits(source))
    assert torch.equal(model.generate(IDS, max_new_tokens=8), source.generate(IDS, max_new_tokens=8))
    report, config = read_report(out), json.loads((out / "config.json").read_text())
    assert report["exact"] is report["passed"] is True
    assert report["parameters"]["after"]["total"] == model.num_parameters()
    assert config["architectures"] == [model_class.__name__]
    assert "auto_map" not in config
    assert not list(out.glob("*.py"))


def test_half_precision_stays_exact(tmp_path):
    """The gate that is half open is not 0, and opens no further."""
    for dtype in (torch.bfloat16, torch.float16):
        out = tmp_path / f"out-{dtype}"
        fields = {**TOP_K, "topk_weight_normalization": "none", "routed_scaling_factor": 2.0}
        source = make_folder(fields, tmp_path / f"{dtype}", dtype)
        assert convert(source, out, "--mode", "export", "--to", "qwen2_moe") == 0
        model = load(out)
        assert model.dtype == dtype
        assert all(layer.mlp.shared_expert_gate.weight.all() for layer in model.model.layers)
        assert_close(logits(model.float()), logits(load(source).float()))


def test_padding_to_a_multiple(tmp_path):
    source = make_folder(VARIANTS["top_p"], tmp_path / "source")
    assert convert(source, tmp_path / "out", "--mode", "export", "--pad", "--multiple", "48") == 0
    model = load(tmp_path / "out")
    assert model.config.moe_intermediate_size == 48
    report = read_report(tmp_path / "out")
    assert report.pop("notes") == []
    assert summary(report)  # of receipts from before there were notes, too
    assert_close(logits(model), logits(load(source)))


def test_a_wrong_map_is_found(tmp_path, monkeypatch):
    make_folder(TOP_K, tmp_path / "source")
    monkeypatch.setattr(native, "_FAINT", 1e-3)
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", "--to", "qwen2_moe") == 1


ROUTED = {**TOP_K, **NO_SHARED}
# fields of the model, options, what the refusal says
REFUSED = {
    "a group router": (NO_SHARED, ["--to", "mixtral"], "2 of 3 groups, scored by sigmoid.*`pad`"),
    "groups that are dropped": (
        {**NO_SHARED, **LOGSUMEXP, "num_groups_per_tok": 2},
        ["--to", "mixtral"],
        "2 of 3 groups, scored by expert_logsumexp",
    ),
    "a set of any size": ({**NO_SHARED, "router_type": "top_p"}, ["--to", "mixtral"], "top_p"),
    "as many of each group": ({**NO_SHARED, "router_type": "grouped_top_k"}, ["--to", "mixtral"], "grouped_top_k"),
    "softmax of the chosen": (
        {**ROUTED, "topk_weight_normalization": "softmax"},
        ["--to", "qwen2_moe"],
        "`topk_weight_normalization` is softmax, not sum or none",
    ),
    "weights as they are": (
        {**ROUTED, "topk_weight_normalization": "none"},
        ["--to", "mixtral"],
        "`topk_weight_normalization` is none, not sum; use qwen2_moe",
    ),
    "a shared expert": (TOP_K, ["--to", "mixtral"], "`shared_expert_intermediate_size` 16; use qwen2_moe"),
    "dense layers": ({**ROUTED, "mlp_only_layers": [0]}, ["--to", "mixtral"], "`mlp_only_layers`.*use qwen2_moe"),
    "another backbone": (ROUTED, ["--to", "qwen3_moe"], "`backbone_config` is a llama; use mixtral or qwen2_moe"),
    "norms after": ({**ROUTED, **backbone("olmo2")}, ["--to", "olmoe"], "`backbone_config` is a olmo2; `pad`"),
    "biases": ({**ROUTED, **backbone("llama", attention_bias=True)}, ["--to", "mixtral"], "k_proj.bias would be lost"),
    "wider heads": (
        {**ROUTED, **backbone("mistral", head_dim=16, sliding_window=None)},
        ["--to", "qwen2_moe"],
        "k_proj.weight would be .* use mixtral",
    ),
    "windows": ({**ROUTED, **VARIANTS["mixed_windows"]}, ["--to", "qwen3_moe"], r"`sliding_window`.*\[4, None\]"),
    "windows that would be lost": (
        {**ROUTED, **backbone("mistral", sliding_window=4)},
        ["--to", "qwen2_moe"],
        "`sliding_window`.*use mixtral",
    ),
    "another activation": ({**ROUTED, **backbone("llama", hidden_act="gelu")}, ["--to", "mixtral"], "is gelu"),
    "what no engine has": (ROUTED, ["--to", "gpt"], "`to` is gpt.*mixtral or qwen2_moe or qwen3_moe or olmoe"),
    "a source that is no mixture": (ROUTED, ["--to", "source"], "`to` is llama.*mixtral"),
    "another router than its own": (MIXTURE, ["--to", "mixtral"], "can only become olmoe"),
    "all experts removed": (VARIANTS["removed_experts_of_one_layer"], ["--to", "mixtral"], "experts of layer 1"),
    "more experts in a layer": (
        {**ROUTED, "per_layer_config": {1: {"num_experts_per_group": [2, 4, 7]}}},
        ["--to", "mixtral"],
        r"`num_experts_per_group`.*\[12, 13\] experts",
    ),
    "multiple of what": (ROUTED, ["--multiple", "32"], "`multiple`.*`pad` or `to`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, tmp_path, capsys):
    fields, options, expected = REFUSED[name]
    make_folder(fields, tmp_path / "source")
    arguments = [tmp_path / "source", tmp_path / "out", "--mode", "export", *options]
    assert re.search(expected, assert_refused(arguments, tmp_path, capsys))


def test_half_precision_has_no_room_for_a_factor(tmp_path, capsys):
    make_folder({**ROUTED, "routed_scaling_factor": 2.5}, tmp_path / "source", torch.bfloat16)
    arguments = [tmp_path / "source", tmp_path / "out", "--mode", "export", "--to", "mixtral"]
    assert "`routed_scaling_factor` 2.5" in assert_refused(arguments, tmp_path, capsys)


NOTES = {
    "mixtral": (ROUTED, ["--to", "mixtral"], []),
    "divided": (TOP_K, ["--to", "qwen2_moe"], ["does not divide the weights"]),
    "tied": (
        {**TOP_K, "topk_weight_normalization": "none", "tie_word_embeddings": True},
        ["--to", "qwen2_moe"],
        ["has no tied embeddings"],
    ),
    "dense": ({**ROUTED, **backbone("qwen3"), "mlp_only_layers": [0]}, ["--to", "qwen3_moe"], ["has no dense layers"]),
    "not divided": (
        {**ROUTED, **backbone("qwen3", attention_bias=True), "topk_weight_normalization": "none"},
        ["--to", "qwen3_moe"],
        ["divides the weights", "bias on the output"],
    ),
    "olmoe": (
        {
            **VARIANTS["mixture"],
            "backbone_config": {**MIXTURE["backbone_config"], "num_key_value_heads": 2, "clip_qkv": 1.0},
        },
        ["--to", "olmoe"],
        ["llama.cpp, which has as many heads", "vLLM or llama.cpp, which does not clip"],
    ),
    "window": ({**ROUTED, **backbone("mistral", sliding_window=4)}, ["--to", "mixtral"], ["lets every layer see all"]),
    "padded": (ROUTED, ["--pad"], []),
    "padded, another activation": (
        {**ROUTED, **VARIANTS["soft_capped"]},
        ["--pad"],
        ["vLLM's own experts compute SiLU"],
    ),
    "padded, biases": (
        {
            **backbone("gpt_oss", num_local_experts=12, num_experts_per_tok=3, head_dim=8),
            **NO_SHARED,
            "router_type": "source",
        },
        ["--pad"],
        ["another activation", "no biases"],
    ),
    "padded, scaled input": (
        {
            **backbone("llama4_text", num_local_experts=12, num_experts_per_tok=1, head_dim=8, pad_token_id=None),
            **{**NO_SHARED, "router_type": "source", "num_experts_per_tok": 1},
        },
        ["--pad"],
        ["their input"],
    ),
}
"""Fields of the model, options, what the plan notes, in this order."""


@pytest.mark.parametrize("name", NOTES)
def test_where_the_result_would_be_wrong_is_noted(name, tmp_path, capsys):
    fields, options, expected = NOTES[name]
    make_folder(fields, tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", "--mode", "export", *options, "--dry-run") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOTE: ")]
    assert len(notes) == len(expected)
    for note, words in zip(notes, expected, strict=True):
        assert words in note
