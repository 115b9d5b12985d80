"""Tiny configs for the text decoders of transformers, by model type."""

import dataclasses

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "query_pre_attn_scalar": 8,
    # mixtures
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 6),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 2),
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": "auto",
}
_LINEAR = ["linear_attention", "full_attention"]
_INKLING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 16}
_ZAMBA = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]}
_SPECIAL = {
    "bailing_hybrid": {"layer_types": _LINEAR},
    "bamba": {"attn_layer_indices": [1]},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8, "num_local_experts": 6},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "inkling2_loop_text": {
        **_INKLING,
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "unpadded_vocab_size": 60,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "loop_gate_rank": 8,
    },
    "inkling2_text": {**_INKLING, "unpadded_vocab_size": 60},
    "inkling_text": {**_INKLING, "unpadded_vocab_size": 60, "mlp_layer_types": ["dense", "sparse"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 8},
    "kimi_linear": {"layer_types": _LINEAR, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size": 24, "moe_layers": [1]},
    "longcat_flash": {"num_layers": 1, "zero_expert_num": 2, "expert_ffn_hidden_size": 24, "ffn_hidden_size": 48},
    "mamba2": {"num_heads": 8},
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_5_moe_text": {"layer_types": _LINEAR},
    "qwen3_next": {"layer_types": _LINEAR},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        **{"d_model": 32, "n_heads": 4, "n_layers": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 6, "moe_top_k": 2},
    },
    "qwen4_exp_text": {
        "layer_types": _LINEAR,
        "ngram_vocab_size_base": 100,
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64},
        "indexer_compress_ratio": 4,
    },
    "xlstm": {"hidden_size": 128, "num_heads": 2},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
_OUT = """
bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text electra ernie
git marian mbart megatron-bert moshi musicgen musicgen_melody mvp pegasus plbart prophetnet reformer rembert roberta
roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod
emu3 mllama phi4_multimodal
gemma4_assistant gemma4_unified_assistant mohge
"""
"""Encoders, decoders of encoder-decoders, speech and music; models whose text decoder is no causal language model
without the rest; drafters that run on the states of another model, and ours."""
BACKBONES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - set(_OUT.split()))
"""The model types of transformers' text decoders, and of models around one."""


def tiny_config(model_type: str, **fields):
    """The config of a tiny text decoder; of the one inside, for a model around one."""
    cls = type(CONFIG_MAPPING[model_type]().get_text_config())
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    values = {name: value for name, value in _SMALL.items() if name in names}
    if "kv_lora_rank" in names:
        values["num_key_value_heads"] = 4
    return cls(**(values | _SPECIAL.get(cls.model_type, {}) | fields)).get_text_config()
