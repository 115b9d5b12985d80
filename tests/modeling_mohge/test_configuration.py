"""Configuration: defaults, the numbering of experts, errors, and the way to JSON and back."""

import copy
import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.configuration_mohge import ROUTER_COEFFICIENTS


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "moe_intermediate_sizes": [8, 24, 40],
    "num_experts_per_group": [2, 4, 6],
    "num_experts_per_tok": 3,
    "shared_expert_intermediate_size": 16,
}


# Defaults


def test_defaults_have_the_shape_of_mohge_3b():
    config = MoHGEConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (1024, 15, 16)
    assert config.moe_intermediate_sizes == [384, 512, 640, 768, 896, 1024, 1152, 1280]
    assert (config.num_groups, config.expert_counts, config.num_experts) == (8, [8] * 8, 64)
    assert (config.num_groups_per_tok, config.num_experts_per_tok) == (4, 6)
    assert config.shared_expert_intermediate_size == 2 * 1024
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config.vocab_size, config.max_position_embeddings) == (128256, 4096)
    assert config.router_type == "two_level"
    assert config.group_score_function == "sigmoid"
    assert config.topk_weight_normalization == "sum"
    assert (config.router_group_aux_loss_coef, config.router_expert_aux_loss_coef) == (1e-5, 5e-3)
    assert (config.group_aux_loss_start, config.group_size_interval) == (0.5, 1024)
    others = ROUTER_COEFFICIENTS.keys() - {"group", "expert"}
    assert all(getattr(config, ROUTER_COEFFICIENTS[name]) == 0 for name in others)
    with torch.device("meta"):
        model = MoHGEForCausalLM(config)
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert routed == 15 * 8 * 3 * 1024 * (384 + 512 + 640 + 768 + 896 + 1024 + 1152 + 1280) == 2_453_667_840


@pytest.mark.parametrize("router_type", ["top_k", "top_p", "grouped_top_k"])
def test_other_routers_keep_all_groups_and_have_no_group_loss(router_type):
    config = MoHGEConfig(router_type=router_type, num_experts_per_tok=8)
    assert config.num_groups_per_tok == config.num_groups == 8
    assert config.router_group_aux_loss_coef == 0


@pytest.mark.parametrize(
    ("counts", "chosen", "kept"),
    [
        ([8] * 8, 6, 4),
        ([4] * 5, 2, 3),  # half, rounded up
        ([4], 4, 1),
        ([2] * 4, 6, 3),  # as many as it takes to hold the chosen
        ([1, 1, 1, 8], 3, 3),  # whichever groups they are
        ([1, 1, 1, 8], 4, 4),
        ([2] * 4, 8, 4),
    ],
)
def test_default_num_groups_per_tok(counts, chosen, kept):
    config = MoHGEConfig(
        moe_intermediate_sizes=[8] * len(counts), num_experts_per_group=counts, num_experts_per_tok=chosen
    )
    assert config.num_groups_per_tok == kept


MIXTURE = {"model_type": "olmoe", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 6}
MIXTURE |= {"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
MIXTURE_FIELDS = {"moe_intermediate_sizes": [8, 16], "num_experts_per_group": 3}


def test_a_mixture_keeps_its_router():
    config = MoHGEConfig(backbone_config=MIXTURE, **MIXTURE_FIELDS)
    assert (config.router_type, config.num_experts_per_tok, config.mlp_only_layers) == ("source", 2, [])
    assert (config.shared_expert_intermediate_size, config.router_group_aux_loss_coef) == (0, 0)
    assert MoHGEConfig(backbone_config=MIXTURE, router_type="top_k").num_experts == 64


def test_dense_layers_of_a_mixture_are_found():
    fields = {"num_hidden_layers": 4, "n_routed_experts": 6, "num_experts_per_tok": 2, "first_k_dense_replace": 2}
    mixture = {"model_type": "deepseek_v3", "hidden_size": 32, "n_group": 1, "topk_group": 1, **fields}
    config = MoHGEConfig(backbone_config=mixture, **MIXTURE_FIELDS)
    assert config.mlp_only_layers == [0, 1]
    assert len(config.sparse_layers) == 2


@pytest.mark.parametrize(("model_type", "experts"), [("gemma4_text", None), ("doge", 16)])
def test_a_decoder_that_may_be_a_mixture_and_is_none_gets_our_router(model_type, experts):
    config = MoHGEConfig(backbone_config={"model_type": model_type, "num_experts": experts, "num_hidden_layers": 2})
    assert config.router_type == "two_level"


def test_fields_of_the_backbone_are_read_and_set_through_the_config():
    config = MoHGEConfig(backbone_config={"model_type": "qwen3"}, hidden_size=48, head_dim=16, num_key_value_heads=2)
    assert config.backbone_config.model_type == "qwen3"
    assert (config.hidden_size, config.backbone_config.head_dim, config.num_key_value_heads) == (48, 16, 2)
    config.hidden_size = 64
    assert config.backbone_config.hidden_size == 64
    assert "hidden_size" not in config.to_dict()
    assert config.get_text_config() is config  # it has the fields of both


def test_a_config_of_the_first_version_still_loads(tmp_path):
    """It had all fields in one place, and ordinary attention where nothing else was asked for."""
    old = {
        **{"model_type": "mohge", "architectures": ["MoHGEForCausalLM"], "vocab_size": 64, "hidden_size": 32},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        **{"qk_norm": None, "clip_qkv": None, "sliding_window": None, "attention_out_bias": None},
        **{"kv_lora_rank": None, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "layer_types": ["full_attention"] * 2, "mlp_only_layers": []},
        **{"moe_intermediate_sizes": [8, 24], "num_experts_per_group": 2, "num_experts_per_tok": 3},
        **{"num_groups_per_tok": 2, "shared_expert_intermediate_size": 16, "router_type": "two_level"},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-6},
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.backbone_config.model_type == "llama"
    assert (config.head_dim, config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (8, 1e-6, 5e5)
    assert MoHGEForCausalLM(config).model.layers[0].self_attn.k_proj.weight.shape == (16, 32)


def test_configs_share_no_lists():
    first, second = MoHGEConfig(), MoHGEConfig()
    first.moe_intermediate_sizes.append(2000)
    first.mlp_only_layers.append(1)
    assert len(second.moe_intermediate_sizes) == len(MoHGEConfig().moe_intermediate_sizes) == 8
    assert second.mlp_only_layers == []


# Numbering of experts


def test_ids_go_set_by_set():
    config = MoHGEConfig(**SMALL)
    assert config.num_expert_sets == 2
    assert list(zip(config.expert_groups, config.expert_slots, strict=True)) == [
        *[(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)],
        *[(0, 1), (1, 2), (1, 3), (2, 3), (2, 4), (2, 5)],
    ]
    assert config.expert_widths == (8, 24, 24, 40, 40, 40, 8, 24, 24, 40, 40, 40)
    assert config.num_experts == config.num_local_experts == 12


def test_ids_of_equal_groups_run_over_the_groups_first():
    config = MoHGEConfig(**SMALL | {"num_experts_per_group": 4})
    assert config.expert_counts == [4, 4, 4]
    assert config.expert_groups == (0, 1, 2) * 4
    assert config.expert_slots == (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3)


def test_ids_of_coprime_groups_go_group_by_group():
    config = MoHGEConfig(**SMALL | {"num_experts_per_group": [2, 3, 5]})
    assert config.num_expert_sets == 1
    assert config.expert_groups == (0, 0, 1, 1, 1, 2, 2, 2, 2, 2)
    assert config.expert_slots == (0, 1, 0, 1, 2, 0, 1, 2, 3, 4)


@pytest.mark.parametrize("counts", [[2, 4, 6], [8] * 8, [12, 4, 8], [3, 5], [7], [6, 6, 9, 30]])
def test_every_device_owns_a_contiguous_range_with_its_share_of_each_group(counts):
    config = MoHGEConfig(
        moe_intermediate_sizes=list(range(8, 8 + len(counts))), num_experts_per_group=counts, num_experts_per_tok=1
    )
    pairs = list(zip(config.expert_groups, config.expert_slots, strict=True))
    assert sorted(pairs) == [(group, slot) for group, count in enumerate(counts) for slot in range(count)]
    assert config.num_expert_sets == math.gcd(*counts)
    for devices in (d for d in range(1, 31) if math.gcd(*counts) % d == 0):
        share = len(pairs) // devices
        for device in range(devices):
            owned = pairs[device * share : (device + 1) * share]
            assert sorted(owned) == [
                (group, slot)
                for group, count in enumerate(counts)
                for slot in range(device * count // devices, (device + 1) * count // devices)
            ]
            # Local ids number a device's experts like the first device's.
            first = pairs[:share]
            assert [(g, slot - device * counts[g] // devices) for g, slot in owned] == first


# Errors

BAD = {
    "num_experts": ({"num_experts": 8}, "num_experts", "set `num_experts_per_group` instead"),
    "num_local_experts": ({"num_local_experts": 8}, "num_local_experts", "set `num_experts_per_group` instead"),
    "unknown_backbone": ({"backbone_config": {"model_type": "nonsense"}}, "backbone_config", "use"),
    "backbone_without_type": ({"backbone_config": {"vocab_size": 64}}, "backbone_config", "give it"),
    "old_query_norms": ({"qk_norm": "head"}, "qk_norm", 'give a `backbone_config` with `model_type` "qwen3"'),
    "old_clipping": ({"clip_qkv": 8.0}, "clip_qkv", 'give a `backbone_config` with `model_type` "olmoe"'),
    "old_window": ({"sliding_window": 8}, "sliding_window", "give a `backbone_config`"),
    "old_latent_attention": ({"kv_lora_rank": 16}, "kv_lora_rank", 'with `model_type` "deepseek_v2"'),
    "source_of_a_dense_decoder": ({"router_type": "source"}, 'router_type="source"', 'use "two_level"'),
    "other_number_of_experts": (
        {"backbone_config": MIXTURE, "num_experts_per_tok": None, "shared_expert_intermediate_size": None},
        "num_experts_per_group",
        "give as many",
    ),
    "chosen_against_the_source": (
        {
            "backbone_config": MIXTURE,
            "num_experts_per_group": 2,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": None,
        },
        "num_experts_per_tok",
        "leave it None",
    ),
    "shared_expert_of_the_source": (
        {"backbone_config": MIXTURE, "num_experts_per_group": 2, "num_experts_per_tok": None},
        "shared_expert_intermediate_size",
        "leave them",
    ),
    "nan_coefficient": ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef", "give finite numbers"),
    "infinite_frequency": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        "rope_parameters",
        "give finite numbers",
    ),
    "layers_in_a_list": ({"per_layer_config": [1]}, "per_layer_config", "give the fields of each layer"),
    "rope_in_a_list": ({"rope_parameters": [1]}, "rope_parameters", "give the rotary embedding's"),
    "quantisation_by_name": ({"quantization_config": "int8"}, "quantization_config", "leave it out"),
    "millions_of_layers": ({"num_hidden_layers": 2 * 10**6}, "num_hidden_layers", "give at most 2,000"),
    "millions_of_experts": ({"num_experts_per_group": 10**7}, "num_experts_per_group", "use at most 65,536"),
    "millions_of_experts_in_a_layer": (
        {"per_layer_config": {1: {"num_experts_per_group": 10**7}}},
        "num_experts_per_group",
        "use at most 65,536",
    ),
    "dense_layer_outside": ({"mlp_only_layers": [0, 2]}, "mlp_only_layers", "remove"),
    "dense_layer_negative": ({"mlp_only_layers": [-1]}, "mlp_only_layers", "remove"),
    "no_groups": ({"moe_intermediate_sizes": []}, "moe_intermediate_sizes", "give one width"),
    "negative_width": ({"moe_intermediate_sizes": [-1, 8, 24]}, "moe_intermediate_sizes", "or 0 for"),
    "width_0_not_first": ({"moe_intermediate_sizes": [8, 0, 24]}, "moe_intermediate_sizes", "use [0, 8, 24]"),
    "widths_descend": ({"moe_intermediate_sizes": [8, 40, 24]}, "moe_intermediate_sizes", "use [8, 24, 40]"),
    "too_few_counts": ({"num_experts_per_group": [2, 4]}, "num_experts_per_group", "one per group"),
    "too_many_counts": ({"num_experts_per_group": [2, 4, 6, 8]}, "num_experts_per_group", "one per group"),
    "count_0": ({"num_experts_per_group": [2, 0, 6]}, "num_experts_per_group", "at least 1"),
    "all_counts_0": ({"num_experts_per_group": 0}, "num_experts_per_group", "at least 1"),
    "negative_shared_expert": (
        {"shared_expert_intermediate_size": -1},
        "shared_expert_intermediate_size",
        "use 0",
    ),
    "gate_without_shared_expert": (
        {"shared_expert_intermediate_size": 0, "shared_expert_gate": True},
        "shared_expert_gate",
        "set `shared_expert_intermediate_size`",
    ),
    "no_expert_chosen": ({"num_experts_per_tok": 0}, "num_experts_per_tok", "must be 1 to 12"),
    "more_chosen_than_there_are": ({"num_experts_per_tok": 13}, "num_experts_per_tok", "must be 1 to 12"),
    "no_group_kept": ({"num_groups_per_tok": 0}, "num_groups_per_tok", "must be 1 to 3"),
    "more_groups_kept_than_there_are": ({"num_groups_per_tok": 4}, "num_groups_per_tok", "must be 1 to 3"),
    "groups_cannot_hold_the_chosen": (
        {"num_groups_per_tok": 2, "num_experts_per_tok": 7},  # the two smallest groups have 2 + 4
        "num_experts_per_tok",
        "lower `num_experts_per_tok` to 6",
    ),
    "groups_kept_by_top_k": ({"router_type": "top_k", "num_groups_per_tok": 2}, "num_groups_per_tok", "leave it None"),
    "groups_kept_by_top_p": ({"router_type": "top_p", "num_groups_per_tok": 2}, "num_groups_per_tok", "leave it None"),
    "chosen_not_divisible": (
        {"router_type": "grouped_top_k", "num_experts_per_tok": 4},
        "num_experts_per_tok",
        "use 3",
    ),
    "fewer_chosen_than_groups": (
        {"router_type": "grouped_top_k", "num_experts_per_tok": 1},
        "num_experts_per_tok",
        "use 3",
    ),
    "more_chosen_than_a_group_has": (
        {"router_type": "grouped_top_k", "num_experts_per_tok": 9},
        "num_experts_per_tok",
        "lower it to 6",
    ),
    "probability_0": ({"router_type": "top_p", "router_top_p": 0.0}, "router_top_p", "(0, 1]"),
    "probability_above_1": ({"router_type": "top_p", "router_top_p": 1.5}, "router_top_p", "(0, 1]"),
    "scaling_factor_0": ({"routed_scaling_factor": 0.0}, "routed_scaling_factor", "above 0"),
    "running_mean_of_other_router": (
        {"router_type": "top_k", "router_logit_ema_strength": 0.01},
        "router_logit_ema_strength",
        "set it to 0",
    ),
    "negative_running_mean": (
        {"router_type": "grouped_top_k", "router_logit_ema_strength": -0.01},
        "router_logit_ema_strength",
        "",
    ),
    "decay_1": ({"router_logit_ema_decay": 1.0}, "router_logit_ema_decay", "[0, 1)"),
    "negative_decay": ({"router_logit_ema_decay": -0.1}, "router_logit_ema_decay", "[0, 1)"),
    "group_loss_without_choice_of_groups": (
        {"router_type": "top_k", "router_group_aux_loss_coef": 1e-5},
        "router_group_aux_loss_coef",
        "set it to 0",
    ),
    "start_above_1": ({"group_aux_loss_start": 1.1}, "group_aux_loss_start", "0 to 1"),
    "negative_start": ({"group_aux_loss_start": -0.5}, "group_aux_loss_start", "0 to 1"),
    "warmup_in_steps": ({"router_intra_group_warmup": 1000}, "router_intra_group_warmup", "0 to 1"),
    "interval_0": ({"group_size_interval": 0}, "group_size_interval", "at least 1"),
    **{
        f"negative_{field}": ({field: -0.1}, field, "use 0 to switch the loss off")
        for field in ROUTER_COEFFICIENTS.values()
    },
    "layer_that_does_not_exist": ({"per_layer_config": {2: {"num_experts_per_tok": 2}}}, "per_layer_config", "[0, 2)"),
    "widths_of_a_layer_descend": (
        {"per_layer_config": {1: {"moe_intermediate_sizes": [24, 8, 40]}}},
        "moe_intermediate_sizes",
        "use [8, 24, 40]",
    ),
    "counts_of_a_layer": (
        {"per_layer_config": {1: {"num_experts_per_group": [2, 4]}}},
        "num_experts_per_group",
        "one per group",
    ),
    "chosen_in_a_layer": (
        {"per_layer_config": {1: {"num_experts_per_tok": 20}}},
        "num_experts_per_tok",
        "must be 1 to 12",
    ),
    "other_shared_expert_in_a_layer": (
        {"per_layer_config": {1: {"shared_expert_intermediate_size": 2}}},
        "shared_expert_intermediate_size",
        "remove",
    ),
}


OWN_FIELDS = [name for name in MoHGEConfig.__annotations__ if name in MoHGEConfig.__dataclass_fields__]


@pytest.mark.parametrize("name", [*OWN_FIELDS, "initializer_range", "dtype", "per_layer_config"])
def test_any_value_is_taken_or_refused_by_name(name):
    """Of the types that JSON has: no other error than one that names the field."""
    values = [None, True, "many", "", -1, 2**62, 0.5, float("nan"), float("-inf"), [], [None], [[1]], [2**62], ["a"]]
    values += [{}, {"a": 1}, {"1": None}, {"model_type": 3}, {"model_type": "llama", "hidden_size": [1]}]
    if name == "backbone_config":  # a name is looked up
        values = [value for value in values if not isinstance(value, str)]
    messages = []
    for value in values:
        try:
            MoHGEConfig(**SMALL | {name: value})
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > len(values) / 2
    assert all(name in message or name == "backbone_config" for message in messages), messages
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("name", BAD)
def test_error_names_the_field_and_the_remedy(name):
    kwargs, field, remedy = BAD[name]
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        MoHGEConfig(**SMALL | kwargs)
    message = str(error.value)
    assert remedy in message
    # The remedy comes after the finding.
    assert any(word in message for word in ("must", "set", "use", "leave", "give", "lower", "remove", "it is", "need"))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("router_type", "top_2", "grouped_top_k"),
        ("group_score_function", "tanh", "expert_logsumexp"),
        ("topk_weight_normalization", "mean", "softmax"),
        ("router_expert_aux_loss_type", "local", "per_group"),
        ("router_regularizer", "cubic", "quadratic"),
        ("moe_intermediate_sizes", [8.5, 24, 40], "int"),
        ("num_experts_per_group", "4", "int"),
        ("num_experts_per_tok", 2.0, "int"),
        ("router_top_p", "0.6", "float"),
    ],
)
def test_wrong_type_or_choice_is_refused(field, value, allowed):
    """These errors come from transformers and huggingface_hub."""
    with pytest.raises(ValueError, match=field) as error:
        MoHGEConfig(**SMALL | {field: value})
    assert allowed in str(error.value)


@pytest.mark.parametrize("field", ["num_experts_per_tok", "num_groups_per_tok"])
def test_values_changed_later_are_checked_when_the_config_is_saved(field, tmp_path):
    config = MoHGEConfig(**SMALL)
    setattr(config, field, 100)
    with pytest.raises((ValueError, StrictDataclassError), match=f"`{field}`"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_experts_per_tok": 12},
        {"num_experts_per_tok": 6, "num_groups_per_tok": 2},
        {"moe_intermediate_sizes": [8], "num_experts_per_group": 1, "num_experts_per_tok": 1},
        {"moe_intermediate_sizes": [8, 8, 8]},
        {"router_type": "grouped_top_k", "num_experts_per_tok": 6},
        {"router_type": "top_p", "router_top_p": 1, "num_experts_per_tok": 12},
        {"router_type": "top_k", "num_groups_per_tok": 3},
        {"router_type": "top_k", "router_group_aux_loss_coef": 0},
        {"mlp_only_layers": [0, 1]},
        {"group_aux_loss_start": 1, "router_intra_group_warmup": 1},
        {"router_logit_ema_decay": 0},
        {"moe_intermediate_sizes": (8, 24, 40), "num_experts_per_group": (2, 4, 6)},
    ],
)
def test_values_at_the_edge_are_accepted(kwargs):
    config = MoHGEConfig(**SMALL | kwargs)
    for field, value in kwargs.items():
        assert getattr(config, field) == (list(value) if isinstance(value, tuple) else value)


# JSON

ROUND_TRIPS = {
    "defaults": {},
    "two_level": {**SMALL, "group_score_function": "softmax", "topk_weight_normalization": "softmax"},
    "two_level_without_group_loss": {**SMALL, "router_group_aux_loss_coef": 0.0, "num_groups_per_tok": 3},
    "top_k": {**SMALL, "router_type": "top_k", "topk_weight_normalization": "none", "router_aux_loss_coef": 0.01},
    "top_p": {**SMALL, "router_type": "top_p", "router_top_p": 0.7, "router_entropy_coef": 0.03},
    "grouped_top_k": {
        **SMALL,
        "router_type": "grouped_top_k",
        "router_logit_ema_strength": 0.01,
        "router_regularizer": "entropy",
        "router_intra_group_coef": 0.1,
        "router_inter_group_coef": 0.05,
    },
    "backbone": {
        **SMALL,
        "backbone_config": {
            "model_type": "qwen3",
            "sliding_window": 8,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
        "tie_word_embeddings": True,
        "eos_token_id": [1, 2],
    },
    "mixture": {"backbone_config": MIXTURE, **MIXTURE_FIELDS},
    "dense_layer": {**SMALL, "mlp_only_layers": [1]},
    "widths_by_layer": {**SMALL, "per_layer_config": {1: {"moe_intermediate_sizes": [16, 32, 64]}}},
    "layout_by_layer": {
        **SMALL,
        "per_layer_config": {
            "0": {"num_experts_per_group": [4, 4, 4], "num_experts_per_tok": 2},
            "1": {"moe_intermediate_sizes": [16, 32], "num_experts_per_group": 3},
        },
    },
}


def layers(config: MoHGEConfig) -> list[tuple]:
    return [
        (c.moe_intermediate_sizes, c.expert_counts, c.expert_groups, c.num_experts_per_tok, c.num_groups_per_tok)
        for c in config.sparse_layers
    ]


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_json_round_trip(name, tmp_path):
    config = MoHGEConfig(**ROUND_TRIPS[name])
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "mohge"
    loaded = [
        MoHGEConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        MoHGEConfig.from_dict(saved),
        MoHGEConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
    ]
    for again in loaded:
        assert type(again) is MoHGEConfig
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert layers(again) == layers(config)
    # What was asked for is there, not only what was saved.
    everything = saved["backbone_config"] | saved
    for field, value in ROUND_TRIPS[name].items():
        if field == "backbone_config":
            assert value.items() <= saved[field].items()
        elif field != "per_layer_config" and field not in saved.get("per_layer_config", {}).get("1", {}):
            assert everything[field] == value, field
    again.save_pretrained(tmp_path / "second")
    assert json.loads((tmp_path / "second" / "config.json").read_text()) == saved


def test_per_layer_config_reaches_the_layers(tmp_path):
    MoHGEConfig(**ROUND_TRIPS["layout_by_layer"]).save_pretrained(tmp_path)
    first, second = MoHGEConfig.from_pretrained(tmp_path).sparse_layers
    assert (first.moe_intermediate_sizes, first.expert_counts) == ([8, 24, 40], [4, 4, 4])
    assert (second.moe_intermediate_sizes, second.expert_counts) == ([16, 32], [3, 3])
    assert (first.num_experts, second.num_experts) == (12, 6)
    assert (first.num_experts_per_tok, second.num_experts_per_tok) == (2, 3)
    assert second.expert_groups == (0, 1) * 3


def test_auto_config_knows_the_model_type():
    config = AutoConfig.for_model("mohge", **SMALL)
    assert type(config) is MoHGEConfig
    assert config.to_dict() == MoHGEConfig(**SMALL).to_dict()


def test_fields_are_replaced_on_loading(tmp_path):
    MoHGEConfig(**SMALL).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, num_experts_per_tok=2, router_expert_aux_loss_coef=0.1)
    assert (config.num_experts_per_tok, config.router_expert_aux_loss_coef) == (2, 0.1)


def test_fields_replaced_on_loading_are_checked(tmp_path):
    MoHGEConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`num_experts_per_tok`"):
        AutoConfig.from_pretrained(tmp_path, num_experts_per_tok=13)


def test_what_follows_from_a_field_follows_from_its_replacement(tmp_path):
    """Only what was given is saved as given."""
    MoHGEConfig(**SMALL).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, num_experts_per_tok=12).num_groups_per_tok == 3
    config = AutoConfig.from_pretrained(tmp_path, router_type="top_k")
    assert (config.num_groups_per_tok, config.router_group_aux_loss_coef) == (3, 0)

    MoHGEConfig(**SMALL, num_groups_per_tok=2, router_group_aux_loss_coef=0.25).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_groups_per_tok, config.router_group_aux_loss_coef) == (2, 0.25)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mlp_only_layers": [1]},
        {"num_groups_per_tok": 2, "per_layer_config": {1: {"num_experts_per_tok": 2}}},
        {"backbone_config": {"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 2}},
        {"backbone_config": {"model_type": "qwen3_moe", "num_experts": 12}},
    ],
    ids=["plain", "dense layer", "per layer", "layer types", "source"],
)
def test_model_can_be_cut_to_its_first_layers(fields, tmp_path):
    """On loading and afterwards, as the models of transformers, and so for an assistant that exits early."""
    mixture = "num_experts" in fields.get("backbone_config", {})
    values = {**SMALL, "num_hidden_layers": 2, "vocab_size": 32} | fields
    if mixture:
        for name in ("num_experts_per_tok", "shared_expert_intermediate_size"):
            del values[name]
    torch.manual_seed(0)
    model = MoHGEForCausalLM(MoHGEConfig(**values)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(10)[None]
    whole = model(ids).logits
    model.config.num_hidden_layers = 1
    cut = MoHGEForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)
    assert len(cut.model.layers) == 1
    torch.testing.assert_close(model(ids).logits, cut(ids).logits, rtol=0, atol=0)
    assert not torch.allclose(model(ids).logits, whole, atol=1e-3)
    assert model(ids, labels=ids, output_router_logits=True).aux_loss is not None or mixture
    model.config.num_hidden_layers = 2
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, assistant_early_exit=1).equal(expected)


def test_every_field_is_documented():
    for field in MoHGEConfig.__annotations__:
        if field[0] != "_" and field not in ("model_type", "attribute_map", "keys_to_ignore_at_inference"):
            assert f"\n        {field} (`" in MoHGEConfig.__doc__, field
