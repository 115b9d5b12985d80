"""MoHGE model configuration."""

# First: it says in one line what the imports below cannot, where transformers is too old for them.
from .versions_mohge import OLDEST_TRANSFORMERS  # isort: skip # noqa: F401

import math
from collections.abc import Iterator
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters


ROUTER_COEFFICIENTS = {
    "load_balancing": "router_aux_loss_coef",
    "z": "router_z_loss_coef",
    "parameter_penalty": "router_parameter_penalty_coef",
    "entropy": "router_entropy_coef",
    "intra_group": "router_intra_group_coef",
    "inter_group": "router_inter_group_coef",
    "group": "router_group_aux_loss_coef",
    "expert": "router_expert_aux_loss_coef",
}
"""Name of each router loss -> the config field that holds its coefficient."""


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
_DERIVED_FIELDS = {
    "num_experts": "num_experts_per_group",
    "num_local_experts": "num_experts_per_group",
    "moe_intermediate_size": "moe_intermediate_sizes",
}
_PER_LAYER_FIELDS = {"moe_intermediate_sizes", "num_experts_per_group", "num_experts_per_tok", "num_groups_per_tok"}


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@strict
class MoHGEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MoHGEModel`]: a pre-norm decoder whose feed-forward layers are mixtures of SwiGLU experts in
    groups of different width. The defaults give the shape of MoHGE-3B (https://huggingface.co/papers/2604.23108) with
    ordinary attention. A homogeneous MoE is the case of equal widths.

    Experts are numbered set by set: with `P = gcd(num_experts_per_group)` sets, set `p` holds the experts
    `[p N_g / P, (p + 1) N_g / P)` of every group `g`, and ids ascend by (set, group, index in group). Any number of
    devices that divides `P` then owns a contiguous range of ids with the same parameters on each.

    Args:
        vocab_size (`int`, *optional*, defaults to 128256):
            Number of tokens in the vocabulary.
        hidden_size (`int`, *optional*, defaults to 1024):
            Width of the residual stream.
        intermediate_size (`int`, *optional*, defaults to 4096):
            Width of the dense SwiGLU feed-forward of the layers in `mlp_only_layers`.
        num_hidden_layers (`int`, *optional*, defaults to 15):
            Number of decoder layers.
        num_attention_heads (`int`, *optional*, defaults to 16):
            Number of query heads.
        num_key_value_heads (`int`, *optional*):
            Number of key and value heads (grouped-query attention); defaults to `num_attention_heads`.
        head_dim (`int`, *optional*):
            Width of a head; defaults to `hidden_size // num_attention_heads`. With multi-head latent attention it is
            always `qk_rope_head_dim`, the part that is rotated.
        hidden_act (`str`, *optional*, defaults to `"silu"`):
            Activation of the gate projection in experts and dense feed-forwards.
        max_position_embeddings (`int`, *optional*, defaults to 4096):
            Longest sequence, in tokens.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the normal initialisation of every weight matrix.
        rms_norm_eps (`float`, *optional*, defaults to 1e-05):
            Epsilon of the RMS norms.
        use_cache (`bool`, *optional*, defaults to `True`):
            Whether the model returns its key-value cache.
        pad_token_id (`int`, *optional*): Padding token.
        bos_token_id (`int`, *optional*): Beginning-of-sequence token.
        eos_token_id (`int` or `list[int]`, *optional*): End-of-sequence token.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`):
            Whether the output projection is the input embedding.
        rope_parameters (`dict`, *optional*):
            Rotary embedding: `rope_theta` (10000 by default), `rope_type` and the parameters of that type.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the attention projections have biases.
        attention_out_bias (`bool`, *optional*):
            Whether the output projection of attention has one; defaults to `attention_bias`. Qwen2 has biases in
            queries, keys and values only.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout probability of the attention weights.
        clip_qkv (`float`, *optional*):
            If set, queries, keys and values are clipped to `[-clip_qkv, clip_qkv]`, as in OLMoE.
        qk_norm (`str`, *optional*):
            RMS norm of queries and keys: `"head"` per head (Qwen3), `"hidden"` over all heads at once (OLMoE), `None`
            for no norm.
        sliding_window (`int`, *optional*):
            Attention window, in tokens, of the layers whose type is `"sliding_attention"`.
        layer_types (`list[str]`, *optional*):
            `"full_attention"` or `"sliding_attention"` for each layer; by default all sliding if `sliding_window` is
            set, else all full.
        q_lora_rank (`int`, *optional*):
            Multi-head latent attention: rank of the query compression; `None` for a plain query projection.
        kv_lora_rank (`int`, *optional*):
            Multi-head latent attention: rank of the key-value compression. Setting it chooses multi-head latent
            attention, as DeepSeek-V2 has it (https://huggingface.co/papers/2405.04434).
        qk_nope_head_dim (`int`, *optional*, defaults to 128):
            Multi-head latent attention: width of the part of a query or key head that is not rotated.
        qk_rope_head_dim (`int`, *optional*, defaults to 64):
            Multi-head latent attention: width of the rotated part of a query or key head.
        v_head_dim (`int`, *optional*, defaults to 128):
            Multi-head latent attention: width of a value head.
        mlp_only_layers (`list[int]`, *optional*, defaults to `[]`):
            Layers that have a dense feed-forward of `intermediate_size` instead of experts.
        moe_intermediate_sizes (`list[int]`, *optional*, defaults to `[384, 512, ..., 1280]`):
            Intermediate width `W_g` of the experts of each group, ascending (equal widths are allowed).
        num_experts_per_group (`int` or `list[int]`, *optional*, defaults to 8):
            Number of experts `N_g` in each group; one number for all groups or one per group.
        num_experts_per_tok (`int`, *optional*, defaults to 6):
            Experts chosen per token, over all groups together. The cap of the set for `router_type="top_p"`.
        num_groups_per_tok (`int`, *optional*):
            Groups kept per token, `router_type="two_level"` only. By default half of the groups, at least two,
            or as many as it takes to hold `num_experts_per_tok` experts. The other routers keep all groups.
        shared_expert_intermediate_size (`int`, *optional*, defaults to 2048):
            Width of the shared expert, which every token passes through; 0 for none.
        shared_expert_gate (`bool`, *optional*, defaults to `False`):
            Whether the shared expert's output is scaled by a sigmoid gate, as in Qwen2-MoE.
        router_type (`str`, *optional*, defaults to `"two_level"`):
            `"two_level"` (MoHGE), `"top_k"` or `"top_p"` over all experts (HMoE, MoDSE and every homogeneous MoE), or
            `"grouped_top_k"` (Hi-MoE: the same number of experts from each group).
        group_score_function (`str`, *optional*, defaults to `"sigmoid"`):
            Score of a group in the two-level router: `"sigmoid"` (the authors' release) or `"softmax"` of a linear
            group router, or `"expert_logsumexp"`, which has no group weight: the softmax over groups of the logsumexp
            of their experts' logits, so that group and expert probability multiply to the flat softmax.
        topk_weight_normalization (`str`, *optional*, defaults to `"sum"`):
            How the chosen scores become combine weights: divided by their sum (`"sum"`), softmax over the chosen
            (`"softmax"`, what the authors' release computes), or unchanged (`"none"`).
        routed_scaling_factor (`float`, *optional*, defaults to 1.0):
            Factor on the combine weights.
        router_top_p (`float`, *optional*, defaults to 0.6):
            Probability that the set chosen by `router_type="top_p"` must reach.
        router_group_aux_loss_coef (`float`, *optional*, defaults to 1e-05):
            Coefficient of the group-wise loss, which pulls tokens to small groups. Two-level router only; it is 0
            for the others. The number is the release's, which adds up its 15 layers; here losses are averaged.
        group_aux_loss_start (`float`, *optional*, defaults to 0.5):
            Fraction of training after which the group-wise loss is active.
        group_size_interval (`int`, *optional*, defaults to 1024):
            Interval `D` of the size factor `(W_g - W_min + D) / D` of the group-wise loss.
        router_expert_aux_loss_coef (`float`, *optional*, defaults to 0.005):
            Coefficient of the loss that balances experts. The number is the release's, as above.
        router_expert_aux_loss_type (`str`, *optional*, defaults to `"global"`):
            `"global"` is the paper's form, hence the default; over all experts at once it also pushes groups towards
            equal traffic. `"per_group"` normalises each group by its own traffic and balances inside groups only.
        router_aux_loss_coef (`float`, *optional*, defaults to 0.0):
            Coefficient of the Switch load-balancing loss.
        router_z_loss_coef (`float`, *optional*, defaults to 0.0):
            Coefficient of the z-loss of ST-MoE.
        router_parameter_penalty_coef (`float`, *optional*, defaults to 0.0):
            Coefficient of HMoE's parameter penalty.
        router_entropy_coef (`float`, *optional*, defaults to 0.0):
            Coefficient of the router entropy, which is minimised.
        router_intra_group_coef (`float`, *optional*, defaults to 0.0):
            Coefficient of Hi-MoE's specialisation inside groups.
        router_intra_group_warmup (`float`, *optional*, defaults to 0.0):
            Fraction of training over which the intra-group loss rises linearly from 0.
        router_inter_group_coef (`float`, *optional*, defaults to 0.0):
            Coefficient of Hi-MoE's balance between groups.
        router_regularizer (`str`, *optional*, defaults to `"quadratic"`):
            Form of the intra- and inter-group losses: `"quadratic"` or `"entropy"` (Shannon).
        router_logit_ema_decay (`float`, *optional*, defaults to 0.9):
            Decay of the running mean of the router logits (Hi-MoE), updated once per optimizer step.
        router_logit_ema_strength (`float`, *optional*, defaults to 0.0):
            Share of the running mean that is subtracted from the logits before routing; 0 switches the correction
            off. The paper uses 0.01 with `"grouped_top_k"`, the only router that supports it.
        output_router_logits (`bool`, *optional*, defaults to `False`):
            Whether the model returns router and group logits.

    `moe_intermediate_sizes`, `num_experts_per_group`, `num_experts_per_tok` and `num_groups_per_tok` may differ
    between layers, through transformers' `per_layer_config`.

    Raises:
        ValueError: if fields contradict each other; the message names the field and the remedy.

    ```python
    >>> from mohge import MoHGEConfig, MoHGEForCausalLM

    >>> config = MoHGEConfig(moe_intermediate_sizes=[512, 1024], num_experts_per_group=4, num_experts_per_tok=2)
    >>> config.expert_groups  # group of each expert, by id
    (0, 1, 0, 1, 0, 1, 0, 1)
    >>> model = MoHGEForCausalLM(config)
    ```
    """

    model_type = "mohge"
    keys_to_ignore_at_inference = [
        "cache",
        "aux_loss",
        "router_losses",
        "tokens_per_expert",
        "router_logits",
        "group_logits",
    ]
    attribute_map = {"num_local_experts": "num_experts"}

    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 128256
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 15
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_out_bias: bool | None = None
    attention_dropout: float | int = 0.0
    clip_qkv: float | int | None = None
    qk_norm: Literal["head", "hidden"] | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    mlp_only_layers: list[int] | None = None
    moe_intermediate_sizes: list[int] | tuple[int, ...] = (384, 512, 640, 768, 896, 1024, 1152, 1280)
    num_experts_per_group: int | list[int] | tuple[int, ...] = 8
    num_experts_per_tok: int = 6
    num_groups_per_tok: int | None = None
    shared_expert_intermediate_size: int = 2048
    shared_expert_gate: bool = False
    router_type: Literal["two_level", "top_k", "top_p", "grouped_top_k"] = "two_level"
    group_score_function: Literal["sigmoid", "softmax", "expert_logsumexp"] = "sigmoid"
    topk_weight_normalization: Literal["sum", "softmax", "none"] = "sum"
    routed_scaling_factor: float | int = 1.0
    router_top_p: float | int = 0.6
    router_group_aux_loss_coef: float | int | None = None
    group_aux_loss_start: float | int = 0.5
    group_size_interval: int = 1024
    router_expert_aux_loss_coef: float | int = 5e-3
    router_expert_aux_loss_type: Literal["global", "per_group"] = "global"
    router_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    router_parameter_penalty_coef: float | int = 0.0
    router_entropy_coef: float | int = 0.0
    router_intra_group_coef: float | int = 0.0
    router_intra_group_warmup: float | int = 0.0
    router_inter_group_coef: float | int = 0.0
    router_regularizer: Literal["quadratic", "entropy"] = "quadratic"
    router_logit_ema_decay: float | int = 0.9
    router_logit_ema_strength: float | int = 0.0
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.kv_lora_rank is not None:
            self.head_dim = self.qk_rope_head_dim  # what the rotary embedding and the cache go by
        elif self.head_dim is None:
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)
        if self.attention_out_bias is None:
            self.attention_out_bias = self.attention_bias
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self.mlp_only_layers = [] if self.mlp_only_layers is None else list(self.mlp_only_layers)
        self.moe_intermediate_sizes = list(self.moe_intermediate_sizes)
        if not isinstance(self.num_experts_per_group, int):
            self.num_experts_per_group = list(self.num_experts_per_group)
        if self.router_group_aux_loss_coef is None:
            self.router_group_aux_loss_coef = 1e-5 if self.router_type == "two_level" else 0.0
        for name, field in _DERIVED_FIELDS.items():
            if name in kwargs:
                raise ValueError(f"`{name}` follows from the groups: set `{field}` instead")
        if self.num_groups_per_tok is None:
            self.num_groups_per_tok = self._default_num_groups_per_tok()
        elif self.router_type != "two_level" and self.num_groups_per_tok != self.num_groups:
            raise ValueError(
                f'`num_groups_per_tok` ({self.num_groups_per_tok}) applies to router_type="two_level" only: leave it '
                f'None for "{self.router_type}", which keeps all groups'
            )
        super().__post_init__(**kwargs)
        for name in sorted((self.per_layer_attributes or set()) - _PER_LAYER_FIELDS):
            raise ValueError(
                f"`{name}` cannot differ between layers: remove it from `per_layer_config`, which may hold "
                f"{', '.join(sorted(_PER_LAYER_FIELDS))}"
            )
        # A strict config wraps what its validators raise in an error that is no ValueError: run ours here first.
        self.validate_backbone()
        self.validate_experts()
        self.validate_router()
        self.validate_router_losses()

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """See `PreTrainedConfig.from_dict`. Fields in `kwargs` are checked together with the others."""
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in cls.__annotations__}
        return super().from_dict({**config_dict, **fields}, **kwargs)

    def _default_num_groups_per_tok(self) -> int:
        counts = sorted(self.expert_counts)
        if self.router_type != "two_level":
            return len(counts)
        kept = min(max(2, (len(counts) + 1) // 2), len(counts))  # the score of a single group would always be 1
        while kept < len(counts) and sum(counts[:kept]) < self.num_experts_per_tok:
            kept += 1
        return kept

    # The rules of the expert layout, each in this one place.

    @property
    def num_groups(self) -> int:
        """Number of expert groups `G`."""
        return len(self.moe_intermediate_sizes)

    @property
    def expert_counts(self) -> list[int]:
        """Number of experts `N_g` of each group."""
        if isinstance(self.num_experts_per_group, int):
            return [self.num_experts_per_group] * self.num_groups
        return list(self.num_experts_per_group)

    @property
    def num_experts(self) -> int:
        """Number of routed experts `E` of a layer."""
        return sum(self.expert_counts)

    @property
    def moe_intermediate_size(self) -> int:
        """The width that all experts share, where they share one; otherwise the config has no such attribute."""
        widths = {width for layer in self._distinct_layers() for width in layer.moe_intermediate_sizes}
        if len(widths) > 1:
            raise AttributeError("experts have different widths: see `moe_intermediate_sizes`")
        return widths.pop()

    @property
    def num_expert_sets(self) -> int:
        """Number of sets `P`; expert parallelism works on every number of devices that divides it."""
        return math.gcd(*self.expert_counts)

    @property
    def expert_groups(self) -> tuple[int, ...]:
        """Group of each expert, by id."""
        return tuple(group for group, _ in self._experts_in_id_order())

    @property
    def expert_slots(self) -> tuple[int, ...]:
        """Index of each expert inside its group, by id."""
        return tuple(slot for _, slot in self._experts_in_id_order())

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """Intermediate width of each expert, by id."""
        return tuple(self.moe_intermediate_sizes[group] for group in self.expert_groups)

    def _experts_in_id_order(self) -> Iterator[tuple[int, int]]:
        sets = self.num_expert_sets
        for p in range(sets):
            for group, count in enumerate(self.expert_counts):
                for slot in range(p * count // sets, (p + 1) * count // sets):
                    yield group, slot

    def expert_parameters(self, width: int) -> int:
        """Number of parameters of one routed expert of `width`: gate, up and down projection."""
        return 3 * self.hidden_size * width

    @property
    def expert_id_table(self) -> list[list[int]]:
        """Id of each expert by group and slot, `[G, max N_g]`; short groups are filled up with `num_experts`."""
        table = [[self.num_experts] * max(self.expert_counts) for _ in range(self.num_groups)]
        for expert, (group, slot) in enumerate(self._experts_in_id_order()):
            table[group][slot] = expert
        return table

    @property
    def routed_parameters(self) -> int:
        """Number of parameters of all routed experts of the model."""
        return sum(layer.expert_parameters(width) for layer in self.sparse_layers for width in layer.expert_widths)

    @property
    def sparse_layers(self) -> list["MoHGEConfig"]:
        """The config of each layer that has experts, in order (they differ only under `per_layer_config`)."""
        return [self.per_layer_config[i] for i in range(self.num_hidden_layers) if i not in self.mlp_only_layers]

    # Parallel plans name every group's weights, so they depend on the number of groups.

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor-parallel style of each module and parameter."""
        if self.kv_lora_rank is not None:
            attention = {
                "q_b_proj" if self.q_lora_rank is not None else "q_proj": "colwise",
                "kv_a_proj_with_mqa": "mla_kv_a_proj",
                "kv_b_proj": "colwise",
                "o_proj": "rowwise",
            }
        elif self.qk_norm == "hidden":  # the norm needs all heads
            attention = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise_gather_output")
            attention["o_proj"] = "rowwise_split_input"
        else:
            attention = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
            if self.qk_norm == "head":
                attention |= dict.fromkeys(("q_norm", "k_norm"), "replicated_with_grad_allreduce")
        feed_forward = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
        plan = {f"layers.*.self_attn.{name}": style for name, style in attention.items()}
        if self.mlp_only_layers:
            plan |= {f"layers.*.mlp.{name}": style for name, style in feed_forward.items()}
        if self.shared_expert_intermediate_size:
            plan |= {f"layers.*.mlp.shared_expert.{name}": style for name, style in feed_forward.items()}
        return plan | self._experts_plan("packed_colwise", "rowwise", "moe_tp_experts")

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert-parallel style of the experts and each of their parameters."""
        return self._experts_plan("heterogeneous_experts", "heterogeneous_experts", "ep_dispatch_experts")

    def _experts_plan(self, gate_up: str, down: str, experts: str) -> dict[str, str]:
        groups = max((layer.num_groups for layer in self._distinct_layers()), default=0)
        plan = {}
        for group in range(groups):
            plan[f"layers.*.mlp.experts.gate_up_proj_{group}"] = gate_up
            plan[f"layers.*.mlp.experts.down_proj_{group}"] = down
        return plan | {"layers.*.mlp.experts": experts}

    # Validation. `strict` runs every `validate_*` again when a config is saved.

    def validate_backbone(self):
        """Check the fields of attention and of the dense layers."""
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                off = ", or None" if type(self).__dataclass_fields__[name].default is None else ""
                raise ValueError(f"`{name}` is {value}: it must be at least 1{off}")
        if self.clip_qkv is not None and self.clip_qkv <= 0:
            raise ValueError(f"`clip_qkv` is {self.clip_qkv}: it must be above 0, or None for no clipping")
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` is {self.attention_dropout}: it is a probability, in [0, 1)")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"`pad_token_id` is {self.pad_token_id}: it must be below `vocab_size`, or None")
        for name in ("initializer_range", "rms_norm_eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it must not be negative")
        self._validate_rope()
        if self.hidden_act not in ACT2FN:
            raise ValueError(f'`hidden_act` is "{self.hidden_act}", which transformers does not have: use "silu"')
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads}): change one of the two"
            )
        if self.head_dim % 2:
            name = "head_dim" if self.kv_lora_rank is None else "qk_rope_head_dim"
            raise ValueError(f"`{name}` is {self.head_dim}: rotary embeddings need an even number")
        kinds = {"full_attention", "sliding_attention"}
        if len(self.layer_types) != self.num_hidden_layers or not kinds.issuperset(self.layer_types):
            raise ValueError(
                f"`layer_types` is {self.layer_types}: leave it None, or give `num_hidden_layers` "
                f"({self.num_hidden_layers}) entries, each {' or '.join(sorted(kinds))}"
            )
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            raise ValueError(
                '`layer_types` has "sliding_attention" but `sliding_window` is None: set `sliding_window` to a number '
                "of tokens"
            )
        if self.kv_lora_rank is not None:
            for name in ("qk_norm", "clip_qkv", "sliding_window"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` does not apply to multi-head latent attention: leave it or `kv_lora_rank` None"
                    )
            if self.num_key_value_heads != self.num_attention_heads:
                raise ValueError(
                    "`num_key_value_heads` must equal `num_attention_heads` with multi-head latent attention, which "
                    "shares a latent instead of heads: leave it None"
                )
        elif self.q_lora_rank is not None:
            raise ValueError("`q_lora_rank` belongs to multi-head latent attention: set `kv_lora_rank` as well")
        outside = [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"`mlp_only_layers` names the layers {outside}, but there are layers 0 to "
                f"{self.num_hidden_layers - 1} only: remove them"
            )

    def _validate_rope(self):
        rope_type = self.rope_parameters.get("rope_type")
        if rope_type != "default" and rope_type not in ROPE_INIT_FUNCTIONS:
            raise ValueError(
                f'`rope_parameters` has rope_type "{rope_type}": use one of default, '
                f"{', '.join(ROPE_INIT_FUNCTIONS)}, the same for all layers"
            )
        if not self.rope_parameters.get("rope_theta", 0) > 0:
            raise ValueError("`rope_parameters` needs a `rope_theta` above 0, such as 10000.0")
        if rope_type != "default":
            try:
                ROPE_INIT_FUNCTIONS[rope_type](self)
            except (KeyError, TypeError) as error:
                raise ValueError(f'`rope_parameters` lacks {error} for rope_type "{rope_type}": give it') from error

    def validate_experts(self):
        """Check the fields that shape the expert groups."""
        for layer in self._distinct_layers():
            widths = layer.moe_intermediate_sizes
            if not widths or min(widths) < 1:
                raise ValueError(
                    f"`moe_intermediate_sizes` is {widths}: give one width of at least 1 for each group, such as "
                    "[384, 512]"
                )
            if sorted(widths) != list(widths):
                raise ValueError(f"`moe_intermediate_sizes` must ascend, got {widths}: use {sorted(widths)}")
            counts = layer.expert_counts
            if len(counts) != len(widths):
                raise ValueError(
                    f"`num_experts_per_group` has {len(counts)} entries for {len(widths)} widths in "
                    "`moe_intermediate_sizes`: give one number, or one per group"
                )
            if min(counts) < 1:
                raise ValueError(f"`num_experts_per_group` is {layer.num_experts_per_group}: each must be at least 1")
        if self.shared_expert_intermediate_size < 0:
            raise ValueError("`shared_expert_intermediate_size` is negative: use 0 for no shared expert")
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ValueError(
                "`shared_expert_gate` needs a shared expert: set `shared_expert_intermediate_size`, or leave it False"
            )

    def validate_router(self):
        """Check that every token can be given its experts."""
        for index, layer in enumerate(self._distinct_layers()):
            try:
                self._validate_choice(layer)
            except ValueError as error:
                where = f"`per_layer_config`, sparse layer {index}: " if self.is_heterogeneous else ""
                raise ValueError(f"{where}{error}") from None
        if self.router_type == "top_p" and not 0 < self.router_top_p <= 1:
            raise ValueError(f"`router_top_p` is {self.router_top_p}: it is a probability in (0, 1]")
        if self.routed_scaling_factor <= 0:
            raise ValueError(f"`routed_scaling_factor` is {self.routed_scaling_factor}: it must be above 0")
        if self.router_logit_ema_strength and self.router_type != "grouped_top_k":
            raise ValueError(
                f'`router_logit_ema_strength` works with router_type="grouped_top_k", not "{self.router_type}": '
                "set it to 0"
            )
        if self.router_logit_ema_strength < 0:
            raise ValueError(
                f"`router_logit_ema_strength` is {self.router_logit_ema_strength}: use 0 to switch it off"
            )
        if not 0 <= self.router_logit_ema_decay < 1:
            raise ValueError(f"`router_logit_ema_decay` is {self.router_logit_ema_decay}: it must be in [0, 1)")

    @staticmethod
    def _validate_choice(layer: "MoHGEConfig"):
        chosen, kept, groups, counts = (
            layer.num_experts_per_tok,
            layer.num_groups_per_tok,
            layer.num_groups,
            layer.expert_counts,
        )
        if not 1 <= chosen <= layer.num_experts:
            raise ValueError(f"`num_experts_per_tok` is {chosen}: it must be 1 to {layer.num_experts} (all experts)")
        if layer.router_type == "two_level":
            if not 1 <= kept <= groups:
                raise ValueError(f"`num_groups_per_tok` is {kept}: it must be 1 to {groups}, the number of groups")
            held = sum(sorted(counts)[:kept])
            if chosen > held:
                raise ValueError(
                    f"`num_experts_per_tok` ({chosen}) exceeds the {held} experts that {kept} groups can hold: raise "
                    f"`num_groups_per_tok`, or lower `num_experts_per_tok` to {held}"
                )
        if layer.router_type == "grouped_top_k":
            if chosen % groups:
                raise ValueError(
                    f"`num_experts_per_tok` ({chosen}) must be a multiple of the {groups} groups for "
                    f'router_type="grouped_top_k": use {max(1, round(chosen / groups)) * groups}'
                )
            if chosen // groups > min(counts):
                raise ValueError(
                    f"`num_experts_per_tok` ({chosen}) asks for {chosen // groups} experts of each group, but a group "
                    f"has only {min(counts)}: lower it to {min(counts) * groups}"
                )

    def validate_router_losses(self):
        """Check coefficients and schedules of the router losses."""
        for name in ROUTER_COEFFICIENTS.values():
            if not getattr(self, name) >= 0:  # NaN too
                raise ValueError(f"`{name}` is {getattr(self, name)}: use 0 to switch the loss off")
        if self.router_group_aux_loss_coef and self.router_type != "two_level":
            raise ValueError(
                f'`router_group_aux_loss_coef` needs groups to be chosen, and router_type="{self.router_type}" keeps '
                'all: set it to 0, or use router_type="two_level"'
            )
        for name in ("group_aux_loss_start", "router_intra_group_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it is a fraction of training, 0 to 1")
        if self.group_size_interval < 1:
            raise ValueError(f"`group_size_interval` is {self.group_size_interval}: it must be at least 1")

    def _distinct_layers(self) -> list["MoHGEConfig"]:
        return self.sparse_layers if self.is_heterogeneous else [self]


__all__ = ["ROUTER_COEFFICIENTS", "MoHGEConfig", "divisors"]
