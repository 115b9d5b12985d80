"""Our top-k router over one group is that of OLMoE, Qwen, Mixtral and DeepSeek."""

import pytest
import torch
from model_cases import (
    VOCABULARY,
    assert_close,
    gradients,
    make_ids,
    make_padded_ids,
)
from transformers import (
    DeepseekV2ForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3MoeForCausalLM,
)

from mohge import MoHGEConfig, MoHGEForCausalLM


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
OLMOE = {"intermediate_size": 24, "num_experts": 6}
# transformers' class, fields of its config, fields of ours
MODELS = {
    "olmoe": (OlmoeForCausalLM, OLMOE, {"topk_weight_normalization": "none"}),
    "olmoe_normalised": (OlmoeForCausalLM, {**OLMOE, "norm_topk_prob": True}, {}),
    "qwen3": (
        Qwen3MoeForCausalLM,
        {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 6, "norm_topk_prob": True},
        {},
    ),
    "qwen2": (
        Qwen2MoeForCausalLM,
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
            "num_experts": 6,
            "mlp_only_layers": [1],
        },
        {
            "shared_expert_intermediate_size": 28,
            "shared_expert_gate": True,
            "mlp_only_layers": [1],
            "topk_weight_normalization": "none",
        },
    ),
    "mixtral": (MixtralForCausalLM, {"intermediate_size": 24, "num_local_experts": 6}, {}),
    "deepseek": (
        DeepseekV2ForCausalLM,
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "intermediate_size": 40,
            "first_k_dense_replace": 1,
            "n_routed_experts": 6,
            "n_shared_experts": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.7,
            "topk_method": "greedy",
        },
        {
            "mlp_only_layers": [0],
            "shared_expert_intermediate_size": 48,
            "topk_weight_normalization": "none",
            "routed_scaling_factor": 1.7,
        },
    ),
}


def make_reference(model_class, **kwargs) -> torch.nn.Module:
    """Weights leave no term without effect: norms are away from 1, biases and routers away from 0."""
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SOURCE | kwargs)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def convert(reference: torch.nn.Module, **kwargs) -> MoHGEForCausalLM:
    """The same decoder with our router, and one group of experts with the weights of `reference`."""
    fields = {
        "router_type": "top_k",
        "moe_intermediate_sizes": [24],
        "num_experts_per_group": 6,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 0,
        "router_expert_aux_loss_coef": 0.0,
    }
    model = MoHGEForCausalLM(MoHGEConfig(backbone_config=reference.config, **fields | kwargs)).eval()
    weights = {}
    for name, weight in reference.state_dict().items():
        for projection in ("gate_up_proj", "down_proj"):
            name = name.replace(f"mlp.experts.{projection}", f"mlp.experts.{projection}_0")
        weights[name.replace("mlp.shared_experts.", "mlp.shared_expert.")] = weight
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_same_logits(name):
    model_class, theirs, ours = MODELS[name]
    reference = make_reference(model_class, **theirs)
    model = convert(reference, **ours)
    ids, mask = make_padded_ids()
    with torch.no_grad():
        assert_close(model(make_ids()).logits, reference(make_ids()).logits)
        padded = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, reference)]
    assert_close(*padded)


def test_same_training_loss_and_gradients_as_olmoe():
    """With one layer: over several, transformers multiplies means over all layers, and this package averages."""
    reference = make_reference(
        OlmoeForCausalLM, **OLMOE, num_hidden_layers=1, router_aux_loss_coef=0.5, output_router_logits=True
    ).train()
    model = convert(reference, topk_weight_normalization="none", router_aux_loss_coef=0.5).train()
    ids, mask = make_padded_ids()
    labels = ids.masked_fill(mask == 0, -100)
    actual, expected = (m(ids, attention_mask=mask, labels=labels) for m in (model, reference))
    assert_close(actual.loss, expected.loss)
    assert_close(actual.aux_loss, 0.5 * expected.aux_loss)
    actual.loss.backward()
    expected.loss.backward()
    expected = gradients(reference)
    for name, gradient in gradients(model).items():
        assert_close(gradient, expected[name.removesuffix("_0")], 1e-4)
