"""Small models of every kind, and what their tests compare."""

import torch
import torch.nn.functional as F

from mohge import MoHGEConfig, MoHGEForCausalLM


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

LATENT_ATTENTION = {
    "backbone_config": {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "router_type": "two_level",
}

MIXTURE = {
    "backbone_config": {
        "model_type": "olmoe",
        "num_key_value_heads": 4,
        "num_experts": 12,
        "num_experts_per_tok": 3,
        "pad_token_id": None,
        "eos_token_id": None,
    },
    "shared_expert_intermediate_size": 0,
}
"""A mixture that keeps its router."""


def _backbone(model_type: str, **fields) -> dict:
    return {"backbone_config": {"model_type": model_type, "bos_token_id": None, "eos_token_id": None, **fields}}


ATTENTIONS = {
    "grouped_query": {"num_key_value_heads": 2},
    "clipped": _backbone("olmo", num_key_value_heads=2, clip_qkv=1.0),
    "sliding_window": _backbone("mistral", num_key_value_heads=2, sliding_window=4, head_dim=16),
    "mixed_windows": _backbone(
        "qwen3",
        num_key_value_heads=2,
        head_dim=8,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "post_norm": _backbone("olmo2", num_key_value_heads=2),
    "soft_capped": _backbone("gemma2", num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "latent": LATENT_ATTENTION,
}
VARIANTS = {
    **ROUTERS,
    **ATTENTIONS,
    "dense_first_layer": {"mlp_only_layers": [0]},
    "gated_shared_expert": {"shared_expert_gate": True, "routed_scaling_factor": 2.5},
    "no_shared_expert": {"shared_expert_intermediate_size": 0},
    "one_group": {"moe_intermediate_sizes": [16], "num_experts_per_group": 4, "num_experts_per_tok": 2},
    "wider_second_layer": {"per_layer_config": {1: {"moe_intermediate_sizes": [16, 40, 64]}}},
    "removed_experts": {"moe_intermediate_sizes": [0, 24, 40]},
    "removed_experts_of_one_layer": {
        "router_type": "top_p",
        "per_layer_config": {1: {"moe_intermediate_sizes": [0] * 3}},
    },
    "removed_experts_of_a_mixture": MIXTURE
    | {"moe_intermediate_sizes": [8, 24, 40], "per_layer_config": {0: {"moe_intermediate_sizes": [0, 0, 16]}}},
    "tied": {"tie_word_embeddings": True},
    "mixture": MIXTURE,
}

LOSSES = {
    "router_expert_aux_loss_coef": 0.05,
    "router_aux_loss_coef": 0.02,
    "router_z_loss_coef": 0.01,
    "router_parameter_penalty_coef": 0.03,
    "router_entropy_coef": 0.04,
    "router_intra_group_coef": 0.1,
    "router_inter_group_coef": 0.06,
}


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
    torch.manual_seed(0)
    return MoHGEForCausalLM(make_config(**kwargs)).eval()


def make_ids(batch_size: int = 2, length: int = 11, seed: int = 7) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def make_padded_ids(padding: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences and their mask: the first has padding on the left."""
    ids = make_ids()
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids.masked_fill(mask == 0, 0), mask


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


def lm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def train(model: torch.nn.Module, steps: int) -> torch.Tensor:
    """Two micro-batches a step. The losses, and the gradients of the last step in `.grad`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(2):
            ids = make_ids(2, 9, seed=2 * step + part)
            loss = model(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
    return torch.stack(losses)
