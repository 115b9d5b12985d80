"""PyTorch MoHGE model: a decoder with mixtures of SwiGLU experts of different width."""

# First: it says in one line what the imports below cannot, where transformers is too old for them.
from .versions_mohge import OLDEST_TRANSFORMERS  # isort: skip # noqa: F401

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.integrations import use_experts_implementation
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torch_distributed_available, is_torchdynamo_compiling
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_mohge import MoHGEConfig
from .experts_mohge import HeterogeneousExpertsInterface
from .losses_mohge import has_router_losses, router_losses
from .routing_mohge import MoHGERouter, RouterOutput


if is_torch_distributed_available():
    from .parallel_mohge import check_layout, check_ranks_agree

logger = logging.get_logger(__name__)


@dataclass
class MoHGEModelOutputWithPast(MoeModelOutputWithPast):
    r"""
    Output of [`MoHGEModel`]. Each router field is a tuple with one tensor for each layer that has experts; T counts
    all tokens of the batch, padding included.

    Args:
        router_logits (`tuple(torch.FloatTensor)`, each `[T, E]`, *optional*):
            Expert logits in id order, with `output_router_logits=True`.
        group_logits (`tuple(torch.FloatTensor)`, each `[T, G]`, *optional*):
            Group logits, with `output_router_logits=True`; where the router has none, the logsumexp of the logits of
            each group's experts.
        router_weights (`tuple(torch.FloatTensor)`, each `[T, K]`, *optional*):
            Combine weights before `routed_scaling_factor`, with `output_router_weights=True`.
        router_index (`tuple(torch.LongTensor)`, each `[T, K]`, *optional*):
            Ids of the chosen experts, E in a slot left empty, with `output_router_index=True`.
        group_index (`tuple(torch.LongTensor)`, each `[T, J]`, *optional*):
            Groups kept by the two-level router, with `output_group_index=True`.
    """

    group_logits: tuple[torch.FloatTensor, ...] | None = None
    router_weights: tuple[torch.FloatTensor, ...] | None = None
    router_index: tuple[torch.LongTensor, ...] | None = None
    group_index: tuple[torch.LongTensor, ...] | None = None


@dataclass
class MoHGECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    Output of [`MoHGEForCausalLM`].

    Args:
        loss (`torch.FloatTensor`, *optional*):
            Language-model loss, in nats per token; in training plus `aux_loss`.
        lm_loss (`torch.FloatTensor`, *optional*):
            Language-model loss alone, without gradient.
        aux_loss (`torch.FloatTensor`, *optional*):
            Weighted sum of the router losses. Under gradient accumulation or data parallelism it is this forward's
            part of the whole batch's sum.
        router_losses (`dict[str, torch.FloatTensor]`, *optional*):
            Value of each router loss that is switched on, without its coefficient and schedule.
        tokens_per_expert (`tuple(torch.FloatTensor)`, each `[E]`, *optional*):
            Number of tokens that chose each expert, for each layer that has experts, padding left out.
        router_logits (`tuple(torch.FloatTensor)`, each `[T, E]`, *optional*):
            Expert logits in id order, with `output_router_logits=True`.
        group_logits (`tuple(torch.FloatTensor)`, each `[T, G]`, *optional*):
            Group logits, with `output_router_logits=True`; where the router has none, the logsumexp of the logits of
            each group's experts.
    """

    lm_loss: torch.FloatTensor | None = None
    group_logits: tuple[torch.FloatTensor, ...] | None = None
    router_losses: dict[str, torch.FloatTensor] | None = None
    tokens_per_expert: tuple[torch.FloatTensor, ...] | None = None


class MoHGERMSNorm(LlamaRMSNorm):
    pass


class MoHGERotaryEmbedding(LlamaRotaryEmbedding):
    pass


class MoHGEMLP(nn.Module):
    """Dense SwiGLU feed-forward: a dense layer, or the shared expert."""

    def __init__(self, config: MoHGEConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class MoHGEAttention(nn.Module):
    """Grouped-query attention with the options of Llama, Qwen and OLMoE: biases, norms of queries and keys, clipping,
    a sliding window."""

    def __init__(self, config: MoHGEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None

        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_out_bias)
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.q_norm = MoHGERMSNorm(self.head_dim if per_head else query_size, eps=config.rms_norm_eps)
            self.k_norm = MoHGERMSNorm(self.head_dim if per_head else key_value_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        qk_norm, clip = self.config.qk_norm, self.config.clip_qkv

        query_states, key_states, value_states = (
            projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if qk_norm == "hidden":
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        if clip is not None:
            query_states, key_states, value_states = (
                states.clamp(min=-clip, max=clip) for states in (query_states, key_states, value_states)
            )
        query_states, key_states, value_states = (
            states.view(hidden_shape) for states in (query_states, key_states, value_states)
        )
        if qk_norm == "head":
            query_states, key_states = self.q_norm(query_states), self.k_norm(key_states)
        query_states, key_states, value_states = (
            states.transpose(1, 2) for states in (query_states, key_states, value_states)
        )
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


@use_experts_implementation(experts_interface=HeterogeneousExpertsInterface())
class MoHGEExperts(nn.Module):
    """
    The routed experts of a layer, one stack of weights for each group g and projection: `gate_up_proj_{g}`
    `[N_g, 2 W_g, H]` and `down_proj_{g}` `[N_g, H, W_g]`.

    Args:
        config ([`MoHGEConfig`]): Config of the model, which names the experts implementation.
        layer_config ([`MoHGEConfig`]): Config of the layer, which has its widths.
    """

    def __init__(self, config: MoHGEConfig, layer_config: MoHGEConfig):
        super().__init__()
        self.num_experts = layer_config.num_experts
        self.num_groups = layer_config.num_groups
        self.expert_groups, self.expert_slots = layer_config.expert_groups, layer_config.expert_slots
        for group, (count, width) in enumerate(
            zip(layer_config.expert_counts, layer_config.moe_intermediate_sizes, strict=True)
        ):
            gate_up = nn.Parameter(torch.empty(count, 2 * width, config.hidden_size))
            down = nn.Parameter(torch.empty(count, config.hidden_size, width))
            self.register_parameter(f"gate_up_proj_{group}", gate_up)
            self.register_parameter(f"down_proj_{group}", down)
        self.hidden_act = config.hidden_act
        self.act_fn = ACT2FN[config.hidden_act]
        self.keys_per_group = max(layer_config.expert_counts)
        self.key_of_expert: torch.Tensor
        self.register_buffer("key_of_expert", self._key_table(), persistent=False)
        self.meanwhile: Callable | None = None  # what expert parallelism runs while tokens travel

    def _key_table(self) -> torch.Tensor:
        return torch.tensor(self.expert_groups) * self.keys_per_group + torch.tensor(self.expert_slots)

    @torch.no_grad()
    def init_weights(self, std: float):
        """Draw the weights from a normal distribution and fill the table."""
        for parameter in self.parameters():
            init.normal_(parameter, mean=0.0, std=std)
        self.fill_table()

    def fill_table(self):
        """Fill the table of sort keys, which no checkpoint holds."""
        init.copy_(self.key_of_expert, self._key_table())

    def groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`gate_up_proj` and `down_proj` of each group."""
        return [(getattr(self, f"gate_up_proj_{g}"), getattr(self, f"down_proj_{g}")) for g in range(self.num_groups)]

    def sort_keys(self, top_k_index: torch.Tensor) -> torch.Tensor:
        """`group * keys_per_group + slot` of each id; `num_groups * keys_per_group` for slots to skip."""
        skipped = top_k_index >= self.num_experts
        keys = self.key_of_expert[top_k_index.masked_fill(skipped, 0)]
        return keys.masked_fill(skipped, self.num_groups * self.keys_per_group)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, H] -> [T, H]: the weighted sum of the outputs of the experts `top_k_index` [T, K]."""
        final_hidden_states = torch.zeros_like(hidden_states)
        groups = self.groups()
        # Experts without tokens run on zero rows: data parallelism waits for the gradient of every weight.
        for expert in range(self.num_experts):
            gate_up_proj, down_proj = groups[self.expert_groups[expert]]
            slot = self.expert_slots[expert]
            token_idx, top_k_pos = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token_idx], gate_up_proj[slot]).chunk(2, dim=-1)
            expert_output = F.linear(self.act_fn(gate) * up, down_proj[slot])
            expert_output = expert_output * top_k_weights[token_idx, top_k_pos, None]
            final_hidden_states.index_add_(0, token_idx, expert_output.to(final_hidden_states.dtype))
        return final_hidden_states


class MoHGESparseMoeBlock(nn.Module):
    """Router, routed experts and, where configured, the shared expert."""

    def __init__(self, config: MoHGEConfig, layer_config: MoHGEConfig):
        super().__init__()
        self.gate = MoHGERouter(layer_config)
        self.experts = MoHGEExperts(config, layer_config)
        self.routed_scaling_factor = config.routed_scaling_factor
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = MoHGEMLP(config, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat_hidden_states = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing: RouterOutput = self.gate(flat_hidden_states)
        weights = (routing.weights * self.routed_scaling_factor).to(hidden_states.dtype)
        if self.shared_expert is None:
            return self.experts(flat_hidden_states, routing.index, weights).view(hidden_states.shape)

        experts = _unwrap(self.experts)
        if not experts._is_expert_parallel:
            output = self.experts(flat_hidden_states, routing.index, weights).view(hidden_states.shape)
            return output + self._shared_output(hidden_states)
        # Tokens that travel to other ranks leave time to compute the shared expert.
        shared_output = experts.meanwhile = functools.cache(functools.partial(self._shared_output, hidden_states))
        try:
            output = self.experts(flat_hidden_states, routing.index, weights).view(hidden_states.shape)
        finally:  # gradient checkpointing ends its second run with an exception
            experts.meanwhile = None
        return output + shared_output()

    def _shared_output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shared = self.shared_expert(hidden_states)
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(hidden_states).sigmoid() * shared
        return shared


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside the adapter that PEFT may have put around it."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


class MoHGEDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: MoHGEConfig, layer_idx: int):
        super().__init__()
        attention_class = MoHGEAttention if config.kv_lora_rank is None else DeepseekV2Attention
        self.self_attn = attention_class(config, layer_idx)
        if layer_idx in config.mlp_only_layers:
            self.mlp = MoHGEMLP(config, config.intermediate_size)
        else:
            self.mlp = MoHGESparseMoeBlock(config, config.per_layer_config[layer_idx])
        self.input_layernorm = MoHGERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MoHGERMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            cache=cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MoHGEPreTrainedModel(PreTrainedModel):
    config: MoHGEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MoHGEDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(MoHGERouter, index=0),
        "router_weights": OutputRecorder(MoHGERouter, index=1),
        "router_index": OutputRecorder(MoHGERouter, index=2),
        "group_logits": OutputRecorder(MoHGERouter, index=3),
        "group_index": OutputRecorder(MoHGERouter, index=4),
        "hidden_states": MoHGEDecoderLayer,
        "attentions": [MoHGEAttention, DeepseekV2Attention],
    }

    def __init__(self, config: MoHGEConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if config.router_logit_ema_strength:
            self._keep_in_fp32_modules_strict = {"logit_ema_E", "logit_pending"}

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """See `DistributedMixin.maybe_distribute_model`. Checks first that all ranks load the same model and that
        it can be spread that way; `ep_implementation="auto"` means `"mohge"`."""
        if mesh_manager is not None:
            check_ranks_agree(model.config)
            check_layout(model.config, distributed_config)
            if distributed_config.ep_implementation == "auto":
                distributed_config = replace(distributed_config, ep_implementation="mohge")
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def gather_sharded_state_dict_for_save(self, model_to_save, state_dict, distributed_config, **kwargs):
        """See `DistributedMixin.gather_sharded_state_dict_for_save`; tied weights, gathered twice, are saved once."""
        state_dict = super().gather_sharded_state_dict_for_save(
            model_to_save, state_dict, distributed_config, **kwargs
        )
        if distributed_config is not None:
            for name in model_to_save.all_tied_weights_keys:
                state_dict.pop(name, None)
        return state_dict

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """See `PreTrainedModel.get_correct_experts_implementation`; the default is `"mohge"`."""
        return super().get_correct_experts_implementation(requested_experts or "mohge")

    def initialize_weights(self):
        """See `PreTrainedModel.initialize_weights`, which passes over modules whose weights are quantised already."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, MoHGEExperts):
                module.fill_table()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, MoHGERouter | MoHGEExperts):
            module.init_weights(self.config.initializer_range)
        elif isinstance(module, MoHGEForCausalLM):
            init.constant_(module.training_progress, -1.0)

    def refuse_unknown(self, arguments: dict):
        """
        Check that some part of the model, or of transformers around it, takes each of these keyword arguments.

        Every forward here hands on what it does not know, as transformers' models do. A name that changed inside
        transformers would otherwise be lost without a word, and with it the cache, say.

        Raises:
            TypeError: naming the arguments that nothing takes.
        """
        unknown = arguments.keys() - _KNOWN_ARGUMENTS
        if unknown:
            unknown -= _names_taken_by(self.config._attn_implementation)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.forward() got {', '.join(f'`{name}`' for name in sorted(unknown))}, which no "
                "part of the model takes: remove it, or mend its name"
            )

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """See `PreTrainedModel.save_pretrained`. The checkpoint carries this code and loads as `AutoModel` and as
        `AutoModelForCausalLM`, whichever of the two was saved."""
        self.config.auto_map = dict(AUTO_MAP)
        # Left alone, transformers copies the module of the object's class, which for a sharded model is torch's.
        cls, auto_class = type(self), vars(type(self)).get("_auto_class")
        cls._auto_class = None
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        finally:
            if auto_class is None:
                del cls._auto_class
            else:
                cls._auto_class = auto_class
        if is_main_process:
            save_code(save_directory)


@torch.compiler.assume_constant_result
def _names_taken_by(attention: str) -> set[str]:
    """Names of the arguments of an attention implementation, an engine's own among them."""
    return set(inspect.signature(ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager_attention_forward)).parameters)


AUTO_MAP = {"AutoModel": "modeling_mohge.MoHGEModel", "AutoModelForCausalLM": "modeling_mohge.MoHGEForCausalLM"}
"""What the config of a checkpoint that carries its code says under `auto_map`."""


def save_code(save_directory):
    """Copy the model's code beside its weights."""
    custom_object_save(object.__new__(MoHGEForCausalLM), save_directory)


def _add_group_logits(forward: Callable) -> Callable:
    """Let `output_router_logits` bring the group logits too, for every router."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        wanted = kwargs.get("output_router_logits")
        if not (self.config.output_router_logits if wanted is None else wanted):
            return forward(self, *args, **kwargs)
        outputs = forward(self, *args, **{**kwargs, "output_group_logits": True})
        if isinstance(outputs, MoHGEModelOutputWithPast) and not outputs.group_logits:
            pairs = zip(self.routers, outputs.router_logits, strict=True)
            outputs.group_logits = tuple(router.group_logits(logits) for router, logits in pairs)
        return outputs

    return wrapper


class MoHGEModel(MoHGEPreTrainedModel):
    """
    The decoder without its output projection.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
    """

    def __init__(self, config: MoHGEConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([MoHGEDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = MoHGERMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        rotary_class = MoHGERotaryEmbedding if config.kv_lora_rank is None else DeepseekV2RotaryEmbedding
        self.rotary_emb = rotary_class(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def routers(self) -> list[MoHGERouter]:
        """The router of each layer that has experts, in order."""
        blocks = (getattr(layer, "mlp", None) for layer in self.layers)  # pipeline stages hold some layers only
        return [_unwrap(block.gate) for block in blocks if isinstance(block, MoHGESparseMoeBlock)]

    @_add_group_logits
    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoHGEModelOutputWithPast:
        r"""
        Run the decoder on `input_ids` `[B, S]` or `inputs_embeds` `[B, S, H]`; the other arguments are those of every
        transformers decoder. Each `output_*` argument named in [`MoHGEModelOutputWithPast`] fills its field.

        Raises:
            TypeError: if an argument is one that no part of the model takes.
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given.
        """
        self.refuse_unknown(kwargs)
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        causal_masks = attention_mask
        if not isinstance(causal_masks, dict):  # a compiled generation loop prepares its masks itself
            mask_arguments = {
                "config": self.config,
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "cache": cache,
                "position_ids": position_ids,
            }
            mask_functions = {
                "full_attention": create_causal_mask,
                "sliding_attention": create_sliding_window_causal_mask,
            }
            causal_masks = {kind: mask_functions[kind](**mask_arguments) for kind in set(self.config.layer_types)}

        corrected_routers = [router for router in self.routers if router.corrects_logits]
        if not (self.training and torch.is_grad_enabled()):
            corrected_routers = []
        for router in corrected_routers:
            router.fold_logit_mean()

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_masks[kind],
                position_ids=position_ids,
                cache=cache,
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)

        for router in corrected_routers:
            router.gather_logit_mean(_token_mask(attention_mask, hidden_states))
        return MoHGEModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)


def _token_mask(attention_mask: torch.Tensor | dict | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """[B, S]: 0 where a token is padding. Only a mask by token says so; without one, every token counts."""
    batch_size, sequence_length = hidden_states.shape[:2]
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -sequence_length:].to(hidden_states.device)
    return torch.ones(batch_size, sequence_length, device=hidden_states.device)


class MoHGEForCausalLM(MoHGEPreTrainedModel, GenerationMixin):
    """
    The decoder with its language-model head. In training mode its loss includes the router losses; in evaluation mode
    it is the language-model loss alone, so that its exponential is the perplexity.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MoHGEConfig):
        super().__init__(config)
        self.model = MoHGEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.training_progress: torch.Tensor
        self.register_buffer("training_progress", torch.tensor(-1.0), persistent=False)
        self._progress_is_known = False
        self.post_init()

    def set_training_progress(self, fraction: float):
        """Say that an optimizer step begins, and which fraction of training is done, 0 to 1. Without it, schedules of
        router losses stand at their end values. `RouterScheduleCallback` calls this at each step."""
        self.training_progress.fill_(fraction)
        self._progress_is_known = True
        for router in self.model.routers:
            router.step_begins = True

    def push_to_hub(self, repo_id: str, **kwargs):
        """See `PushToHubMixin.push_to_hub`, whose arguments it takes. With the package mohge, whatever is pushed is
        first loaded where mohge is missing and has to compute what this model computes, and it has a model card."""
        try:
            from mohge.model_cards.push import push_model
        except ImportError:  # this file also travels with checkpoints
            return super().push_to_hub(repo_id, **kwargs)
        return push_model(self, repo_id, **kwargs)

    def generate_batch(self, *args, **kwargs):
        """See `ContinuousMixin.generate_batch`."""
        if self.config.kv_lora_rank is not None:
            raise ValueError(
                "generate_batch does not work with `kv_lora_rank`: transformers' paged cache cannot hold the latents "
                "of multi-head latent attention. Use generate."
            )
        return super().generate_batch(*args, **kwargs)

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sequence_weights: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoHGECausalLMOutputWithPast:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `[B, S]`, *optional*):
                Targets, shifted inside; -100 is ignored.
            output_router_logits (`bool`, *optional*):
                Whether to return router and group logits, router losses and counts; by default as in the config.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last `logits_to_keep` positions (0 for all), or at these positions.
            sequence_weights (`torch.Tensor` of shape `[B]`, *optional*):
                Share of each sequence in the whole batch, for router losses without `labels`. With `labels` and
                `num_items_in_batch`, which `Trainer` passes, it is each sequence's share of the targets.

        Example:

        ```python
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> import mohge

        >>> model = AutoModelForCausalLM.from_pretrained("path/to/checkpoint")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/checkpoint")
        >>> inputs = tokenizer("def main(", return_tensors="pt")
        >>> tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
        ```
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        trained = self.training and (labels is not None or sequence_weights is not None)
        collect = output_router_logits or (trained and has_router_losses(self.config))
        captured = {f"output_{name}": collect for name in _ROUTER_OUTPUTS}

        outputs: MoHGEModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **captured,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        result = MoHGECausalLMOutputWithPast(
            loss=loss,
            lm_loss=None if loss is None else loss.detach().clone(),  # Trainer scales `loss` in place
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        if collect and outputs.router_logits:
            if sequence_weights is None and labels is not None:
                sequence_weights = _share_of_targets(labels, **kwargs)
            routing = _router_outputs(outputs)
            self._warn_of_idle_losses(routing)
            losses = router_losses(
                self.model.routers,
                routing,
                _token_mask(attention_mask, hidden_states),
                sequence_weights,
                self.training_progress,
            )
            result.tokens_per_expert = losses.tokens_per_expert
            if has_router_losses(self.config):
                result.aux_loss, result.router_losses = losses.aux_loss, losses.values
                if self.training and loss is not None:
                    result.loss = loss + losses.aux_loss.to(loss.device)
        if output_router_logits:
            result.router_logits = outputs.router_logits
            result.group_logits = outputs.group_logits
        return result

    def _warn_of_idle_losses(self, routing: list[RouterOutput]):
        if not self.training or is_torchdynamo_compiling() or not torch.is_grad_enabled():
            return
        if self.model.routers[0].weight.requires_grad and not routing[0].logits.requires_grad:
            logger.warning_once(
                "The router losses get no gradient under reentrant checkpointing: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        if self.config.router_group_aux_loss_coef and self.config.group_aux_loss_start and not self._progress_is_known:
            logger.warning_once(
                "`group_aux_loss_start` needs to know how far training is: pass RouterScheduleCallback() to Trainer, "
                "or use MoHGETrainer. Until then the group-wise loss is active from the first step."
            )


_ROUTER_OUTPUTS = ("router_logits", "router_weights", "router_index", "group_logits", "group_index")


def _router_outputs(outputs: MoHGEModelOutputWithPast) -> list[RouterOutput]:
    per_layer = [outputs[name] or [None] * len(outputs.router_logits) for name in _ROUTER_OUTPUTS]
    return [RouterOutput(*fields) for fields in zip(*per_layer, strict=True)]


def _share_of_targets(
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """[B]: each sequence's share of the targets of the whole batch, or None if this is the whole batch."""
    if num_items_in_batch is None:
        return None
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return targets.ne(-100).sum(-1) / num_items_in_batch


# What may be in the keyword arguments that forward functions hand on: what they name themselves, outputs to collect,
# and what transformers' loss, attention and continuous batching read.
_KNOWN_ARGUMENTS = frozenset(
    {f"output_{name}" for name in MoHGEPreTrainedModel._can_record_outputs}
    | TransformersKwargs.__annotations__.keys()
    | PagedAttentionArgs.__annotations__.keys()
    | {
        name
        for function in (MoHGEForCausalLM.forward, MoHGEModel.forward, MoHGEAttention.forward, ForCausalLMLoss)
        for name in inspect.signature(function).parameters
    }
) - {"labels", "kwargs"}

# Trainer shifts labels under label smoothing only for class names in this table, which `register` does not fill.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mohge", MoHGEForCausalLM.__name__)

__all__ = [
    "MoHGECausalLMOutputWithPast",
    "MoHGEForCausalLM",
    "MoHGEModel",
    "MoHGEModelOutputWithPast",
    "MoHGEPreTrainedModel",
]
