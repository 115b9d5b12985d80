"""The model: equality with the architectures it generalises, caches, masks, losses, saving and loading."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.generation import ContinuousBatchingConfig
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from mohge import MoHGEConfig, MoHGEForCausalLM, MoHGEModel


VOCABULARY = 64

ROUTERS = {
    "two_level": {},
    "two_level_softmax": {"group_score_function": "softmax", "topk_weight_normalization": "softmax"},
    "two_level_logsumexp": {"group_score_function": "expert_logsumexp"},
    "top_k": {"router_type": "top_k"},
    "top_p": {"router_type": "top_p"},
    "grouped_top_k": {"router_type": "grouped_top_k", "router_logit_ema_strength": 0.5},
}
ROUTER_TYPES = ["two_level", "top_k", "top_p", "grouped_top_k"]

LATENT_ATTENTION = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
ATTENTIONS = {
    "grouped_query": {"num_key_value_heads": 2},
    "all_options": {"num_key_value_heads": 2, "attention_bias": True, "qk_norm": "hidden", "clip_qkv": 1.0},
    "sliding_window": {"num_key_value_heads": 2, "sliding_window": 4, "qk_norm": "head", "head_dim": 16},
    "mixed_windows": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "latent": LATENT_ATTENTION,
    "latent_with_query_rank": {**LATENT_ATTENTION, "q_lora_rank": 20},
}
VARIANTS = {
    **ROUTERS,
    **ATTENTIONS,
    "dense_first_layer": {"mlp_only_layers": [0]},
    "gated_shared_expert": {"shared_expert_gate": True, "routed_scaling_factor": 2.5},
    "no_shared_expert": {"shared_expert_intermediate_size": 0},
    "one_group": {"moe_intermediate_sizes": [16], "num_experts_per_group": 4, "num_experts_per_tok": 2},
    "wider_second_layer": {"per_layer_config": {1: {"moe_intermediate_sizes": [16, 40, 64]}}},
    "tied": {"tie_word_embeddings": True},
}

LOSSES = {
    "router_expert_aux_loss_coef": 0.05,
    "router_aux_loss_coef": 0.02,
    "router_z_loss_coef": 0.01,
    "router_parameter_penalty_coef": 0.03,
    "router_entropy_coef": 0.02,
    "router_intra_group_coef": 0.1,
    "router_inter_group_coef": 0.05,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The matrices are too small to share: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_config(**kwargs) -> MoHGEConfig:
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "moe_intermediate_sizes": [8, 24, 40],
        "num_experts_per_group": [2, 4, 6],
        "num_experts_per_tok": 3,
        "shared_expert_intermediate_size": 16,
        "group_aux_loss_start": 0,
    }
    return MoHGEConfig(**values | kwargs)


def make_model(**kwargs) -> MoHGEForCausalLM:
    return MoHGEForCausalLM(make_config(**kwargs)).eval()


def make_ids(batch_size: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(7))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative_error: float = 1e-5):
    """The largest error against the largest value, which must not be zero."""
    assert actual.shape == expected.shape
    magnitude = expected.abs().max()
    assert magnitude > 0
    error = (actual.double() - expected.double()).abs().max()
    assert error <= relative_error * magnitude, f"error {error:.3g}, largest value {magnitude:.3g}"


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# Equality with architectures of transformers


def randomise(model: torch.nn.Module):
    """Weights that leave no term without effect: norms away from 1, biases and routers away from 0."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)


def convert(reference: torch.nn.Module, **kwargs) -> MoHGEForCausalLM:
    """A homogeneous model of one group with the weights of `reference`."""
    source = reference.config
    config = make_config(
        **{
            "num_attention_heads": source.num_attention_heads,
            "num_key_value_heads": source.num_key_value_heads,
            "rms_norm_eps": source.rms_norm_eps,
            "rope_parameters": dict(source.rope_parameters),
            "router_type": "top_k",
            "moe_intermediate_sizes": [24],
            "num_experts_per_group": 6,
            "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 0,
            "router_expert_aux_loss_coef": 0.0,
            **kwargs,
        }
    )
    model = MoHGEForCausalLM(config).eval()
    weights = {}
    for name, weight in reference.state_dict().items():
        for projection in ("gate_up_proj", "down_proj"):
            name = name.replace(f"mlp.experts.{projection}", f"mlp.experts.{projection}_0")
        weights[name.replace("mlp.shared_experts.", "mlp.shared_expert.")] = weight
    if config.attention_bias:  # Qwen2 has biases in q, k and v only
        for name in model.state_dict().keys() - weights.keys():
            assert name.endswith("o_proj.bias")
            weights[name] = torch.zeros(config.hidden_size)
    model.load_state_dict(weights, strict=True)
    return model


SOURCE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def assert_same_logits(reference: torch.nn.Module, model: MoHGEForCausalLM):
    ids = make_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        assert_close(model(ids).logits, reference(ids).logits)
        padded = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, reference)]
    assert_close(*padded)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("clip_qkv", [None, 0.7])
def test_equals_olmoe(norm_topk_prob, clip_qkv):
    source = OlmoeConfig(
        **SOURCE, intermediate_size=24, num_experts=6, norm_topk_prob=norm_topk_prob, clip_qkv=clip_qkv
    )
    reference = OlmoeForCausalLM(source).eval()
    randomise(reference)
    normalization = "sum" if norm_topk_prob else "none"
    model = convert(reference, qk_norm="hidden", clip_qkv=clip_qkv, topk_weight_normalization=normalization)
    assert_same_logits(reference, model)


def test_training_loss_and_gradients_equal_olmoe():
    """With one layer: over several, transformers multiplies means over all layers, and this package averages."""
    source = OlmoeConfig(
        **SOURCE | {"num_hidden_layers": 1},
        intermediate_size=24,
        num_experts=6,
        router_aux_loss_coef=0.5,
        output_router_logits=True,
    )
    reference = OlmoeForCausalLM(source).train()
    randomise(reference)
    model = convert(
        reference,
        num_hidden_layers=1,
        qk_norm="hidden",
        topk_weight_normalization="none",
        router_aux_loss_coef=0.5,
    ).train()
    ids = make_ids()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    labels = ids.masked_fill(mask == 0, -100)
    outputs = [m(ids, attention_mask=mask, labels=labels) for m in (model, reference)]
    assert_close(outputs[0].loss, outputs[1].loss)
    assert_close(outputs[0].aux_loss, 0.5 * outputs[1].aux_loss)
    for output in outputs:
        output.loss.backward()
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name.removesuffix("_0")], 1e-4)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_equals_qwen3_moe(norm_topk_prob):
    source = Qwen3MoeConfig(
        **SOURCE,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=6,
        norm_topk_prob=norm_topk_prob,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    reference = Qwen3MoeForCausalLM(source).eval()
    randomise(reference)
    normalization = "sum" if norm_topk_prob else "none"
    model = convert(reference, head_dim=16, qk_norm="head", topk_weight_normalization=normalization)
    assert_same_logits(reference, model)


@pytest.mark.parametrize("mlp_only_layers", [[], [1]], ids=["all_sparse", "one_dense_layer"])
def test_equals_qwen2_moe(mlp_only_layers):
    source = Qwen2MoeConfig(
        **SOURCE,
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=28,
        num_experts=6,
        mlp_only_layers=mlp_only_layers,
    )
    reference = Qwen2MoeForCausalLM(source).eval()
    randomise(reference)
    model = convert(
        reference,
        attention_bias=True,
        shared_expert_intermediate_size=28,
        shared_expert_gate=True,
        mlp_only_layers=mlp_only_layers,
        topk_weight_normalization="none",
    )
    assert_same_logits(reference, model)


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_equals_mixtral(sliding_window):
    source = MixtralConfig(**SOURCE, intermediate_size=24, num_local_experts=6, sliding_window=sliding_window)
    reference = MixtralForCausalLM(source).eval()
    randomise(reference)
    assert_same_logits(reference, convert(reference, sliding_window=sliding_window))


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}


@pytest.mark.parametrize(
    "rope_parameters", [{"rope_type": "default", "rope_theta": 500.0}, YARN], ids=["rope", "yarn"]
)
@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "experts"])
def test_equals_deepseek_v2(dense, q_lora_rank, rope_parameters):
    source = DeepseekV2Config(
        **SOURCE | {"num_key_value_heads": 4},
        **LATENT_ATTENTION,
        q_lora_rank=q_lora_rank,
        rope_parameters=rope_parameters,
        intermediate_size=40,
        first_k_dense_replace=2 if dense else 0,
        n_routed_experts=6,
        n_shared_experts=2,
        moe_intermediate_size=24,
        routed_scaling_factor=1.7,
        topk_method="greedy",
    )
    reference = DeepseekV2ForCausalLM(source).eval()
    randomise(reference)
    model = convert(
        reference,
        **LATENT_ATTENTION,
        q_lora_rank=q_lora_rank,
        mlp_only_layers=[0, 1] if dense else [],
        shared_expert_intermediate_size=48,
        topk_weight_normalization="none",
        routed_scaling_factor=1.7,
    )
    assert_same_logits(reference, model)


# Implementations of attention and experts


@pytest.mark.parametrize("padded", [False, True], ids=["no_padding", "left_padding"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_implementations_agree(name, padded):
    model = make_model(**ATTENTIONS[name])
    ids = make_ids()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    logits = {}
    # Without compilation flex attention is slow but the same function, and there is no compiler to wait for.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for implementation in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            logits[implementation] = model(ids, attention_mask=mask).logits[mask.bool()]
    assert_close(logits["sdpa"], logits["eager"])
    assert_close(logits["flex_attention"], logits["eager"])


def test_sliding_window_hides_what_lies_before_it():
    model = make_model(sliding_window=3, num_hidden_layers=1)
    ids = make_ids(1, 10)
    changed = ids.clone()
    changed[0, 2] = (changed[0, 2] + 1) % VOCABULARY
    with torch.no_grad():
        difference = (model(ids).logits - model(changed).logits).abs().amax(-1)[0]
    assert (difference[2:5] > 1e-3).all()
    assert (difference[[0, 1, 5, 6, 7, 8, 9]] < 1e-5).all()


@pytest.mark.parametrize("name", [*ROUTERS, "wider_second_layer"])
def test_experts_implementations_agree(name):
    model = make_model(**VARIANTS[name])
    assert model.config._experts_implementation == "grouped_mm"  # the default
    ids = make_ids()
    logits = {}
    with torch.no_grad():
        for implementation in ("grouped_mm", "eager", "batched_mm"):
            model.set_experts_implementation(implementation)
            for layer in model.model.layers:
                assert layer.mlp.experts.config._experts_implementation == implementation
            logits[implementation] = model(ids).logits
    assert_close(logits["grouped_mm"], logits["eager"])
    assert_close(logits["batched_mm"], logits["eager"])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_implementation_is_an_argument_of_from_config(implementation):
    model = AutoModelForCausalLM.from_config(make_config(), experts_implementation=implementation)
    assert model.model.layers[0].mlp.experts.config._experts_implementation == implementation


# Caches and generation


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_step_by_step_equals_the_full_forward(name):
    """Position ids are left to the model, and come from the cache."""
    model = make_model(**VARIANTS[name])
    ids = make_ids(2, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        parts = []
        for chunk in ids.split([5, 1, 2, 1, 1, 1, 1], dim=1):
            output = model(chunk, past_key_values=cache)
            assert output.past_key_values is cache
            parts.append(output.logits)
    assert_close(torch.cat(parts, 1), expected)


def test_position_ids_are_used():
    model = make_model()
    ids = make_ids()
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        default = model(ids).logits
        assert torch.equal(model(ids, position_ids=positions).logits, default)
        assert_close(model(ids, position_ids=positions + 20).logits, default)  # rotary embeddings are relative
        assert (model(ids, position_ids=2 * positions).logits - default).abs().max() > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_is_the_same_for_every_cache(name):
    model = make_model(**VARIANTS[name])
    ids = make_ids(2, 6)
    arguments = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    results = {
        kind: model.generate(ids, **arguments, **options)
        for kind, options in {
            "none": {"use_cache": False},
            "dynamic": {"cache_implementation": "dynamic"},
            "static": {"cache_implementation": "static"},
        }.items()
    }
    expected = results["none"]
    assert expected.sequences.shape == (2, 14)
    for kind in ("dynamic", "static"):
        assert torch.equal(results[kind].sequences, expected.sequences)
        assert_close(torch.stack(results[kind].logits), torch.stack(expected.logits))


@pytest.mark.parametrize("name", [*ROUTERS, "sliding_window", "mixed_windows", "all_options", "wider_second_layer"])
def test_continuous_batching_equals_generate(name):
    model = make_model(**VARIANTS[name])
    prompts = [row[:length].tolist() for row, length in zip(make_ids(3, 9), (9, 4, 6), strict=True)]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    outputs = model.generate_batch(
        inputs=prompts,
        generation_config=settings,
        continuous_batching_config=ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=32),
    )
    assert [outputs[name].generated_tokens for name in sorted(outputs)] == expected


@pytest.mark.parametrize("name", [*ROUTERS, *ATTENTIONS])
def test_left_padding_changes_no_logits(name):
    model = make_model(**VARIANTS[name])
    ids = make_ids(1, 7)
    padded_ids = F.pad(ids, (5, 0), value=0)
    mask = F.pad(torch.ones_like(ids), (5, 0), value=0)
    other = make_ids(2, 12)[1:]
    batch, masks = torch.cat([padded_ids, other]), torch.cat([mask, torch.ones_like(other)])
    with torch.no_grad():
        expected = model(ids).logits[0]
        assert_close(model(batch, attention_mask=masks).logits[0, 5:], expected)
        positions = (masks.cumsum(-1) - 1).clamp(min=0)
        assert_close(model(batch, attention_mask=masks, position_ids=positions).logits[0, 5:], expected)


def test_generation_with_left_padding():
    model = make_model()
    ids = make_ids(1, 6)
    other = make_ids(2, 9)[1:]
    batch = torch.cat([F.pad(ids, (3, 0)), other])
    mask = torch.cat([F.pad(torch.ones_like(ids), (3, 0)), torch.ones_like(other)])
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **arguments)[:, 9:]
    assert torch.equal(together[:1], model.generate(ids, **arguments)[:, 6:])
    assert torch.equal(together[1:], model.generate(other, **arguments)[:, 9:])


def test_exactly_one_kind_of_input():
    model = make_model()
    ids = make_ids()
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(embedded, model(ids).logits)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": torch.zeros(2, 11, 32)}):
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            model(**arguments)


# Outputs and losses


@pytest.mark.parametrize("name", [*ROUTERS, "dense_first_layer", "wider_second_layer"])
def test_router_outputs(name):
    model = make_model(**VARIANTS[name])
    ids = make_ids()
    with torch.no_grad():
        plain = model(ids)
        output = model(ids, output_router_logits=True, output_hidden_states=True)
    sparse_layers = 2 - len(model.config.mlp_only_layers)
    assert torch.equal(output.logits, plain.logits)
    assert plain.router_logits is None
    assert plain.group_logits is None
    assert [x.shape for x in output.router_logits] == [(22, 12)] * sparse_layers
    assert [x.shape for x in output.group_logits] == [(22, 3)] * sparse_layers
    assert [x.shape for x in output.tokens_per_expert] == [(12,)] * sparse_layers
    assert all(x.std() > 0.1 for x in (*output.router_logits, *output.group_logits))
    assert len(output.hidden_states) == 3
    if model.config.router_type != "top_p":
        assert all(counts.sum() == 22 * 3 for counts in output.tokens_per_expert)
    else:
        assert all(22 <= counts.sum() < 22 * 3 for counts in output.tokens_per_expert)


def test_tokens_per_expert_leaves_padding_out():
    model = make_model()
    ids = make_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_router_logits=True)
    assert all(counts.sum() == (22 - 4) * 3 for counts in output.tokens_per_expert)
    assert all(logits.shape == (22, 12) for logits in output.router_logits)


def test_output_router_logits_in_the_config():
    model = make_model(output_router_logits=True)
    with torch.no_grad():
        assert len(model(make_ids()).router_logits) == 2
        assert model(make_ids(), output_router_logits=False).router_logits is None


def test_base_model_returns_what_the_routers_chose():
    model = make_model().model
    names = ("router_logits", "router_weights", "router_index", "group_logits", "group_index")
    with torch.no_grad():
        output = model(make_ids(), **{f"output_{name}": True for name in names})
    for logits, weights, index, group_logits, groups in zip(*(output[name] for name in names), strict=True):
        assert (logits.shape, group_logits.shape) == ((22, 12), (22, 3))
        assert weights.shape == index.shape == (22, 3)
        assert groups.shape == (22, 2)
        assert_close(weights.sum(-1), torch.ones(22), 1e-6)
        assert all(len(set(row)) == 3 for row in index.tolist())


def test_attentions_are_returned():
    for attention in (ATTENTIONS["grouped_query"], LATENT_ATTENTION):
        model = make_model(**attention)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            output = model(make_ids(), output_attentions=True)
        assert [x.shape for x in output.attentions] == [(2, 4, 11, 11)] * 2


def lm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", ROUTERS)
def test_loss_in_evaluation_is_the_language_model_loss(name):
    model = make_model(**ROUTERS[name], **LOSSES)
    ids = make_ids()
    labels = ids.clone()
    labels[0, 3:6] = -100
    for collect in (False, True):
        output = model(ids, labels=labels, output_router_logits=collect)
        assert_close(output.loss, lm_loss(output.logits, labels), 1e-6)
        assert (output.aux_loss is None) == (not collect)


@pytest.mark.parametrize("name", ROUTERS)
def test_loss_in_training_includes_the_router_losses(name):
    model = make_model(**ROUTERS[name], **LOSSES).train()
    ids = make_ids()
    output = model(ids, labels=ids)
    assert output.aux_loss.abs() > 1e-3
    assert_close(output.loss, lm_loss(output.logits, ids) + output.aux_loss, 1e-6)
    coefficients = {
        "expert": 0.05,
        "load_balancing": 0.02,
        "z": 0.01,
        "parameter_penalty": 0.03,
        "entropy": 0.02,
        "intra_group": 0.1,
        "inter_group": 0.05,
    }
    if model.config.router_type == "two_level":
        coefficients["group"] = 1e-5
    assert output.router_losses.keys() == coefficients.keys()
    total = sum(coefficient * output.router_losses[loss] for loss, coefficient in coefficients.items())
    assert_close(output.aux_loss, total, 1e-5)


def test_training_without_router_losses_computes_none():
    off = dict.fromkeys((*LOSSES, "router_group_aux_loss_coef"), 0.0)
    model = make_model(**off).train()
    ids = make_ids()
    output = model(ids, labels=ids)
    assert output.aux_loss is None
    assert output.router_losses is None
    assert output.tokens_per_expert is None
    assert_close(output.loss, lm_loss(output.logits, ids), 1e-6)


def test_all_layers_dense():
    model = make_model(mlp_only_layers=[0, 1]).train()
    ids = make_ids()
    output = model(ids, labels=ids, output_router_logits=True)
    assert_close(output.loss, lm_loss(output.logits, ids), 1e-6)
    output.loss.backward()
    gradients(model)


def test_logits_to_keep():
    model = make_model()
    with torch.no_grad():
        logits = model(make_ids()).logits
        assert_close(model(make_ids(), logits_to_keep=2).logits, logits[:, -2:], 1e-6)
        assert_close(model(make_ids(), logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]], 1e-6)


# Gradients


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_gets_a_gradient(name, implementation):
    """Even with so few tokens that most experts get none: data parallelism waits for all gradients."""
    model = make_model(**VARIANTS[name], **LOSSES).train()
    model.set_experts_implementation(implementation)
    ids = make_ids(1, 3)
    model(ids, labels=ids).loss.backward()
    values = gradients(model)
    assert all(value.isfinite().all() for value in values.values())
    zero = [parameter for parameter, value in values.items() if not value.any()]
    # A group that no token chose has zero gradients, and so has the choice among one group. Nothing else has.
    one_group = model.model.routers[0].membership_GE.shape[0] == 1
    assert all("experts." in parameter or (one_group and "group_weight" in parameter) for parameter in zero), zero


def train(model: MoHGEForCausalLM, steps: int = 3) -> list[torch.Tensor]:
    """Two micro-batches a step. The losses, and the gradients of the last step in `.grad`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):
            ids = torch.randint(1, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2 * step + part))
            loss = model(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return losses


@pytest.mark.parametrize("name", [*ROUTERS, "latent", "gated_shared_expert"])
def test_gradient_checkpointing_changes_nothing(name):
    config = make_config(**VARIANTS[name], **LOSSES)
    losses, models = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = MoHGEForCausalLM(config).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            assert model.model.layers[0].gradient_checkpointing
        losses.append(torch.stack(train(model)))
        models.append(model)
    assert_close(losses[1], losses[0], 1e-6)
    expected = gradients(models[0])
    for parameter, gradient in gradients(models[1]).items():
        assert_close(gradient, expected[parameter], 1e-5)
    for (buffer, value), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.allclose(value.double(), other.double(), rtol=1e-5, atol=1e-7), buffer


@pytest.mark.parametrize("name", ["two_level", "top_p", "grouped_top_k", "latent"])
def test_training_compiles_without_graph_breaks(name):
    """Forward and backward of the whole model, all router losses and the running means included."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = make_model(**VARIANTS[name], **LOSSES)
        model(make_ids(1, 3), output_router_logits=True)  # transformers installs its hooks at the first such call
        model.train()
        function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        results.append((torch.stack(train(function, steps=2)), gradients(model), dict(model.named_buffers())))
    torch.compiler.reset()
    (expected_losses, expected_gradients, expected_buffers), (losses, values, buffers) = results
    assert_close(losses, expected_losses)
    for parameter, expected in expected_gradients.items():
        assert_close(values[parameter], expected, 1e-4)
    for buffer, expected in expected_buffers.items():
        assert torch.allclose(buffers[buffer].double(), expected.double(), rtol=1e-5, atol=1e-6), buffer


def test_reentrant_checkpointing_warns_that_router_losses_are_idle():
    model = make_model().train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    logger = logging.get_logger("mohge.modeling_mohge")
    logger.warning_once.cache_clear()
    with CaptureLogger(logger) as captured:
        model(make_ids(), labels=make_ids())
    assert "use_reentrant" in captured.out


# Saving and loading


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those that are not saved included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def saved_names(path: Path) -> set[str]:
    files = list(path.glob("*.safetensors"))
    assert files
    return {name for file in files for name in load_file(file)}


@pytest.fixture
def uninitialised_memory_is_nan():
    """`torch.empty` gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("shards", [1, 5], ids=["one_file", "sharded"])
@pytest.mark.parametrize("name", VARIANTS)
def test_save_and_load_is_bit_identical(name, shards, tmp_path):
    model = make_model(**VARIANTS[name]).train()
    train(model, steps=2)  # running means that are not 0
    model.eval()
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "20KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    loaded = MoHGEForCausalLM.from_pretrained(tmp_path)
    assert_identical(all_tensors(loaded), all_tensors(model))
    with torch.no_grad():
        # Memory that a file is mapped to is aligned in another way, and matrix products may then round differently.
        assert_close(loaded(make_ids()).logits, model(make_ids()).logits, 1e-6)
    if model.config.router_logit_ema_strength:
        assert all(router.logit_ema_E.abs().max() > 1e-3 for router in loaded.model.routers)


def test_names_in_a_checkpoint(tmp_path):
    """One tensor for each group and projection; nothing is split or merged on the way."""
    model = make_model()
    model.save_pretrained(tmp_path)
    names = saved_names(tmp_path)
    assert names == set(model.state_dict())
    experts = {name.removeprefix("model.layers.0.mlp.experts.") for name in names if ".layers.0.mlp.experts." in name}
    assert experts == {f"{projection}_{g}" for projection in ("gate_up_proj", "down_proj") for g in range(3)}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mohge"
    assert config["architectures"] == ["MoHGEForCausalLM"]


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("name", VARIANTS)
def test_construction_on_meta_leaves_no_buffer_uninitialised(name, tmp_path):
    """`from_pretrained` builds on the meta device and fills only what the file has: here not even all parameters."""
    expected = make_model(**VARIANTS[name])
    expected.model.save_pretrained(tmp_path)
    model = MoHGEForCausalLM.from_pretrained(tmp_path)
    buffers, expected_buffers = dict(model.named_buffers()), dict(expected.named_buffers())
    assert len(buffers) > 4
    assert_identical(buffers, expected_buffers)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.lm_head.weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_parameters_are_initialised_with_the_configured_deviation():
    model = make_model(initializer_range=0.05, hidden_size=64, shared_expert_gate=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.25), name
            assert parameter.mean().abs() < 0.02, name


def test_base_model_and_causal_model_load_each_other(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert type(base) is MoHGEModel
    assert_identical(all_tensors(base), all_tensors(model.model))
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(again) is MoHGEForCausalLM
    assert_identical(all_tensors(again.model), all_tensors(model.model))


def test_tied_embeddings_are_one_tensor(tmp_path):
    model = make_model(tie_word_embeddings=True)
    untied = make_model()
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in saved_names(tmp_path)) + ("model.embed_tokens.weight" in saved_names(tmp_path)) == 1
    loaded = MoHGEForCausalLM.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert m.lm_head.weight is m.model.embed_tokens.weight
        assert m.lm_head.weight.data_ptr() == m.model.embed_tokens.weight.data_ptr()
        assert m.num_parameters() == untied.num_parameters() - 32 * VOCABULARY
        assert m.num_parameters() == sum(p.numel() for p in m.parameters())
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert not loaded.model.embed_tokens.weight.any()
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()


def test_layers_of_different_width(tmp_path):
    overrides = {1: {"moe_intermediate_sizes": [16, 40, 64]}, "2": {"num_experts_per_group": [3, 3, 3]}}
    model = make_model(num_hidden_layers=3, per_layer_config=overrides, **LOSSES)
    shapes = [
        [(tuple(gate_up.shape), tuple(down.shape)) for gate_up, down in layer.mlp.experts.groups()]
        for layer in model.model.layers
    ]
    assert shapes == [
        [((n, 2 * w, 32), (n, 32, w)) for n, w in zip(counts, widths, strict=True)]
        for counts, widths in [
            ([2, 4, 6], [8, 24, 40]),
            ([2, 4, 6], [16, 40, 64]),
            ([3, 3, 3], [8, 24, 40]),
        ]
    ]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_identical(all_tensors(loaded), all_tensors(model))
    ids = make_ids()
    with torch.no_grad():
        expected = model(ids, output_router_logits=True)
        assert [x.shape[-1] for x in expected.router_logits] == [12, 12, 9]
        for implementation in ("grouped_mm", "eager", "batched_mm"):
            loaded.set_experts_implementation(implementation)
            for layer in loaded.model.layers:
                assert layer.mlp.experts.config._experts_implementation == implementation
            assert_close(loaded(ids).logits, expected.logits)
    loaded.train()
    output = loaded(ids, labels=ids)
    assert_close(output.loss, lm_loss(output.logits, ids) + output.aux_loss, 1e-6)
    output.loss.backward()
    gradients(loaded)


@pytest.mark.parametrize("router_type", ["two_level", "top_k"])
def test_layers_with_different_numbers_of_groups(router_type):
    overrides = {1: {"moe_intermediate_sizes": [16, 40], "num_experts_per_group": [3, 4]}}
    model = make_model(router_type=router_type, per_layer_config=overrides, **LOSSES).train()
    ids = make_ids()
    output = model(ids, labels=ids, output_router_logits=True)
    assert [x.shape for x in output.group_logits] == [(22, 3), (22, 2)]
    output.loss.backward()
    gradients(model)


# bfloat16


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_model(name):
    model = make_model(**VARIANTS[name], **LOSSES)
    ids = make_ids()
    # The same weights in both models, so that only the arithmetic differs.
    model = model.to(torch.bfloat16)
    reference = MoHGEForCausalLM(model.config).eval()
    reference.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with torch.no_grad():
        output, expected = (m(ids, output_router_logits=True) for m in (model, reference))
    assert output.logits.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in (*output.router_logits, *output.group_logits))
    # The first layer's router sees nearly the same input in both; later ones may choose other experts.
    assert_close(output.router_logits[0], expected.router_logits[0], 5e-2)
    correlation = torch.corrcoef(torch.stack([output.logits.float().flatten(), expected.logits.flatten()]))[0, 1]
    assert correlation > 0.95
    model.train()
    loss = model(ids, labels=ids).loss
    assert_close(loss.detach(), reference.train()(ids, labels=ids).loss.detach(), 0.1)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert model.eval().generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 14)


def test_running_mean_of_the_logits_is_float32_in_a_bfloat16_model(tmp_path):
    """The router works in float32 whatever the model's dtype: bfloat16 cannot even count 301 tokens."""
    make_model(router_type="grouped_top_k", router_logit_ema_strength=0.01).save_pretrained(tmp_path)
    model = MoHGEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    assert model.lm_head.weight.dtype == torch.bfloat16
    output = model(make_ids(7, 43), output_router_logits=True)
    model(make_ids(1, 3))  # takes the step before into the mean
    for router, logits in zip(model.model.routers, output.router_logits, strict=True):
        assert_close(router.logit_ema_E, 0.1 * logits.mean(0).detach(), 1e-4)
