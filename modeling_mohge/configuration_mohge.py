"""MoHGE model configuration."""

# First: it says in one line what the imports below cannot, where transformers is too old for them.
from .versions_mohge import OLDEST_TRANSFORMERS  # isort: skip # noqa: F401

import copy
import dataclasses
import difflib
import math
from collections.abc import Iterator
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .backbones_mohge import is_mixture, layers_without_experts
from .checks_mohge import MAX_EXPERTS, check_backbone, check_finite, check_form, value_errors


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


_DEFAULT_BACKBONE = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 15,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""The shape of MoHGE-3B with ordinary attention."""

_MOVED_FIELDS = {
    "qk_norm": '"qwen3" (per head) or "olmo2" (over all heads)',
    "clip_qkv": '"olmoe"',
    "attention_out_bias": '"qwen2"',
    "sliding_window": '"mistral" or "qwen3"',
    "layer_types": '"qwen3"',
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), '"deepseek_v2"'
    ),
}
"""Field of attention that the first version had -> backbones that have it."""
_SHARED_FIELDS = ("output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type")
"""Fields of every config that the backbone reads in its own."""
_DERIVED_FIELDS = {
    "num_experts": "num_experts_per_group",
    "num_local_experts": "num_experts_per_group",
    "moe_intermediate_size": "moe_intermediate_sizes",
}
_PER_LAYER_FIELDS = {"moe_intermediate_sizes", "num_experts_per_group", "num_experts_per_tok", "num_groups_per_tok"}


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@value_errors
@strict
class MoHGEConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MoHGEModel`]: a decoder of transformers, the backbone, whose feed-forward layers are mixtures
    of gated experts in groups of different width. The defaults give the shape of MoHGE-3B
    (https://huggingface.co/papers/2604.23108) with ordinary attention. A homogeneous MoE is the case of equal widths.

    Experts are numbered set by set: with `P = gcd(num_experts_per_group)` sets, set `p` holds the experts
    `[p N_g / P, (p + 1) N_g / P)` of every group `g`, and ids ascend by (set, group, index in group). Any number of
    devices that divides `P` then owns a contiguous range of ids with the same parameters on each.

    Args:
        backbone_config (`PreTrainedConfig`, `dict` or `str`, *optional*):
            The decoder whose feed-forward is replaced: the config of any text decoder of transformers, its fields with
            `model_type`, or a Hub id or folder. Everything about attention, norms, embeddings, rotary embeddings and
            caches is there. Fields of the backbone are also read and set on this config (`config.hidden_size`), and
            may be given here by name: without `backbone_config` they make a Llama.
        mlp_only_layers (`list[int]`, *optional*):
            Layers that keep the backbone's own feed-forward. By default none or, with `router_type="source"`, those
            that have no experts.
        moe_intermediate_sizes (`list[int]`, *optional*, defaults to `[384, 512, ..., 1280]`):
            Intermediate width `W_g` of the experts of each group, ascending (equal widths are allowed). 0 is for
            experts that have been removed: the router still chooses them, but they add nothing, hold no parameters and
            cost nothing.
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
        router_type (`str`, *optional*):
            `"two_level"` (MoHGE), `"top_k"` or `"top_p"` over all experts (HMoE, MoDSE and every homogeneous MoE), or
            `"grouped_top_k"` (Hi-MoE: the same number of experts from each group). These replace the backbone's whole
            feed-forward. `"source"` replaces the experts of a mixture alone: its own router and shared experts stay.
            Defaults to `"source"` for a backbone that is a mixture, else to `"two_level"`.
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
    sub_configs = {"backbone_config": AutoConfig}
    keys_to_ignore_at_inference = [
        "cache",
        "aux_loss",
        "lm_loss",
        "router_losses",
        "tokens_per_expert",
        "router_logits",
        "group_logits",
    ]
    attribute_map = {"num_local_experts": "num_experts"}

    backbone_config: PreTrainedConfig | dict | str | None = None
    mlp_only_layers: list[int] | None = None
    moe_intermediate_sizes: list[int] | tuple[int, ...] = (384, 512, 640, 768, 896, 1024, 1152, 1280)
    num_experts_per_group: int | list[int] | tuple[int, ...] = 8
    num_experts_per_tok: int | None = None
    num_groups_per_tok: int | None = None
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    router_type: Literal["two_level", "top_k", "top_p", "grouped_top_k", "source"] | None = None
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
        check_form({**kwargs, "dtype": self.dtype})
        self.backbone_config, kwargs = _make_backbone(self.backbone_config, kwargs)
        for name, derive in _DERIVED_DEFAULTS.items():
            if getattr(self, name) is None:
                setattr(self, name, derive(self))
        self.mlp_only_layers = list(self.mlp_only_layers)
        self.moe_intermediate_sizes = list(self.moe_intermediate_sizes)
        if not isinstance(self.num_experts_per_group, int):
            self.num_experts_per_group = list(self.num_experts_per_group)
        self._refuse_near_misses(kwargs)
        for name, field in _DERIVED_FIELDS.items():
            if name in kwargs:
                raise ValueError(f"`{name}` follows from the groups: set `{field}` instead")
        if self.router_type != "two_level" and self.num_groups_per_tok != self.num_groups:
            raise ValueError(
                f'`num_groups_per_tok` ({self.num_groups_per_tok}) applies to router_type="two_level" only: leave it '
                f'None for "{self.router_type}", which keeps all groups'
            )
        if self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label, self.label2id = self.backbone_config.id2label, self.backbone_config.label2id
        self.problem_type = self.problem_type or self.backbone_config.problem_type
        super().__post_init__(**kwargs)
        for name in _SHARED_FIELDS:
            setattr(self.backbone_config, name, getattr(self, name))
        for name in sorted((self.per_layer_attributes or set()) - _PER_LAYER_FIELDS):
            raise ValueError(
                f"`{name}` cannot differ between layers: remove it from `per_layer_config`, which may hold "
                f"{', '.join(sorted(_PER_LAYER_FIELDS))}"
            )
        # A strict config wraps what its validators raise: run ours here first, for plain messages.
        self.validate_numbers()
        self.validate_experts()
        self.validate_router()
        self.validate_router_losses()

    def _refuse_near_misses(self, fields: dict):
        """Refuse a field that nothing here has, and whose name is almost that of one: transformers keeps whatever it
        is given, and would say nothing."""
        inherited = {*PreTrainedConfig.__dataclass_fields__, *_fields_of(self.backbone_config.model_type)}
        own = type(self).__dataclass_fields__.keys() - inherited | _DERIVED_FIELDS.keys()
        for name in sorted(fields.keys() - inherited - _DERIVED_FIELDS.keys()):
            # Backbones have many fields, and other models some that differ from them in a letter or two.
            near = difflib.get_close_matches(name, own, 1, 0.87) or difflib.get_close_matches(name, inherited, 1, 0.95)
            if near:
                raise ValueError(f"`{name}` is no field: did you mean `{_DERIVED_FIELDS.get(near[0], near[0])}`?")

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """See `PreTrainedConfig.from_dict`. Our fields in `kwargs` are checked together with the others; those of the
        backbone are set afterwards, as transformers does."""
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        changed = fields.get("backbone_config")
        if isinstance(changed, dict) and "model_type" not in changed:  # only some of its fields
            fields["backbone_config"] = {**(config_dict.get("backbone_config") or _DEFAULT_BACKBONE), **changed}
        layers = kwargs.get("num_hidden_layers")
        if layers is not None and "mlp_only_layers" in config_dict:  # what was said of layers that go is void
            kept = [index for index in config_dict["mlp_only_layers"] if index < layers]
            fields.setdefault("mlp_only_layers", kept)
        return super().from_dict({**config_dict, **fields}, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """See `PreTrainedConfig.to_dict`. Fields that follow from others are left out, so that who loads it may change
        what they follow from; the router, which readers ask for, stays."""
        output = super().to_dict()
        if not self.is_heterogeneous:
            for name, derive in _DERIVED_DEFAULTS.items():
                if name != "router_type" and output.get(name) == derive(self):
                    output.pop(name, None)
        return output

    # Fields of the backbone are read and set through this config, as `config.hidden_size` is by everybody.

    def __getattr__(self, name: str) -> Any:
        backbone = self.__dict__.get("backbone_config")
        if name.startswith("_") or not isinstance(backbone, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__} has no attribute `{name}`")
        if isinstance(own := getattr(type(self), name, None), property):
            return own.fget(self)  # which raised AttributeError, and does so again
        return getattr(backbone, name)

    def __setattr__(self, name: str, value: Any):
        backbone = self.__dict__.get("backbone_config")
        if isinstance(backbone, PreTrainedConfig) and not name.startswith("_"):
            shared = name in _SHARED_FIELDS
            if shared or (not hasattr(type(self), name) and hasattr(backbone, name)):
                setattr(backbone, name, value)
                if not shared:
                    return
        super().__setattr__(name, value)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "MoHGEConfig":
        """See `PreTrainedConfig.get_text_config`: this config, which has the backbone's fields too."""
        return self

    # Parallel plans of the base model: the backbone's, to which the model adds its experts.

    @property
    def base_model_tp_plan(self) -> dict[str, str] | None:
        """See `PreTrainedConfig.base_model_tp_plan`."""
        return self.backbone_config.base_model_tp_plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]):
        # transformers before 5.24 adds to the plan where embeddings are tied.
        self.backbone_config.base_model_tp_plan = plan

    @property
    def base_model_ep_plan(self) -> dict[str, str] | None:
        """See `PreTrainedConfig.base_model_ep_plan`."""
        return self.backbone_config.base_model_ep_plan

    @property
    def base_model_pp_plan(self) -> dict | None:
        """See `PreTrainedConfig.base_model_pp_plan`."""
        return self.backbone_config.base_model_pp_plan

    @property
    def base_model_fsdp_plan(self) -> dict:
        """See `PreTrainedConfig.base_model_fsdp_plan`."""
        return self.backbone_config.base_model_fsdp_plan

    @property
    def keeps_router(self) -> bool:
        """Whether the backbone's own router stays, and only its experts are replaced."""
        return self.router_type == "source"

    def _of_backbone(self, *names: str) -> Any:
        """The first of these fields that the backbone has."""
        return next((value for name in names if (value := getattr(self.backbone_config, name, None))), None)

    @property
    def backbone_is_mixture(self) -> bool:
        """Whether the backbone has layers with experts of its own."""
        # The field alone says little: some configs have it for decoders that may be mixtures. To know, one is built.
        return self._of_backbone(*_NUM_EXPERTS) is not None and is_mixture(self.backbone_config)

    def _derive_router_type(self) -> str:
        return "source" if self.backbone_is_mixture else "two_level"

    def _derive_num_groups_per_tok(self) -> int:
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
    def kept_groups(self) -> range:
        """Groups whose experts have parameters: all but those of width 0, which come first."""
        return range(self.moe_intermediate_sizes.count(0), self.num_groups)

    @property
    def expert_counts(self) -> list[int]:
        """Number of experts `N_g` of each group."""
        if isinstance(self.num_experts_per_group, int):
            return [self.num_experts_per_group] * self.num_groups
        return list(self.num_experts_per_group)

    @property
    def num_experts(self) -> int:
        """Number of routed experts `E` of a layer, where all layers have the same."""
        numbers = {sum(layer.expert_counts) for layer in self._distinct_layers()}
        if len(numbers) > 1:
            raise AttributeError("layers have different numbers of experts: see `sparse_layers`")
        return numbers.pop()

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

    # Validation. `strict` runs every `validate_*` again when a config is saved.

    # Of the fields that those of `PreTrainedConfig` read, the backbone's config has checked its own.

    def validate_architecture(self):
        """See `PreTrainedConfig.validate_architecture`."""

    def validate_layer_type(self):
        """See `PreTrainedConfig.validate_layer_type`."""

    def validate_rope(self):
        """See `RotaryEmbeddingConfigMixin.validate_rope`."""

    def validate_numbers(self):
        """Check that no number is NaN or infinite, and that those of the backbone make a model."""
        check_finite(self)
        check_finite(self.backbone_config)
        check_backbone(self.backbone_config)

    def validate_experts(self):
        """Check the fields that shape the expert groups."""
        for layer in self._distinct_layers():
            widths = layer.moe_intermediate_sizes
            if not widths or min(widths) < 0:
                raise ValueError(
                    f"`moe_intermediate_sizes` is {widths}: give one width for each group, such as [384, 512], or 0 "
                    "for experts that are removed"
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
            if sum(counts) > MAX_EXPERTS:
                raise ValueError(
                    f"`num_experts_per_group` gives a layer {sum(counts):,} experts: use at most {MAX_EXPERTS:,}"
                )
        outside = [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        if outside:
            raise ValueError(
                f"`mlp_only_layers` names the layers {outside}, but there are layers 0 to "
                f"{self.num_hidden_layers - 1} only: remove them"
            )
        if self.keeps_router:
            self._validate_source()
        if self.shared_expert_intermediate_size < 0:
            raise ValueError("`shared_expert_intermediate_size` is negative: use 0 for no shared expert")
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ValueError(
                "`shared_expert_gate` needs a shared expert: set `shared_expert_intermediate_size`, or leave it False"
            )

    def _validate_source(self):
        has = self._of_backbone(*_NUM_EXPERTS)
        if has is None:
            raise ValueError(
                f'`router_type="source"` keeps the router of a mixture, and a backbone of `model_type` '
                f'"{self.backbone_config.model_type}" has none: use "two_level", "top_k", "top_p" or "grouped_top_k"'
            )
        for layer in self._distinct_layers():
            if layer.num_experts != has:
                raise ValueError(
                    f"`num_experts_per_group` gives {layer.num_experts} experts, but the backbone's router chooses "
                    f"among {has}: give as many"
                )
        chosen = self._of_backbone(*_EXPERTS_PER_TOKEN)
        if self.num_experts_per_tok != chosen:
            raise ValueError(
                f'`num_experts_per_tok` is {self.num_experts_per_tok}, but with `router_type="source"` the backbone '
                f"decides, and takes {chosen}: leave it None, or change it in `backbone_config`"
            )
        if self.shared_expert_intermediate_size or self.routed_scaling_factor != 1:
            raise ValueError(
                "`shared_expert_intermediate_size` and `routed_scaling_factor` belong to our routers: leave them at "
                'their defaults with `router_type="source"`, which keeps the backbone\'s own'
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


_DERIVED_DEFAULTS = {
    "router_type": MoHGEConfig._derive_router_type,
    "num_experts_per_tok": lambda self: self._of_backbone(*_EXPERTS_PER_TOKEN) if self.keeps_router else 6,
    "shared_expert_intermediate_size": lambda self: 0 if self.keeps_router else 2048,
    "mlp_only_layers": lambda self: layers_without_experts(self.backbone_config) if self.keeps_router else [],
    "router_group_aux_loss_coef": lambda self: 1e-5 if self.router_type == "two_level" else 0.0,
    "num_groups_per_tok": MoHGEConfig._derive_num_groups_per_tok,
}
"""Fields that follow from others where they are not given -> how, each from those above it."""
_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "experts_per_token")


def _fields_of(model_type: str) -> set[str]:
    """Names that a config of this type takes, old spellings included, and `PreTrainedConfig` does not."""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f'`backbone_config` has `model_type` "{model_type}", which transformers does not have: use one that it has'
        )
    cls = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    if "rope_parameters" in names:
        names |= {"rope_theta", "rope_scaling"}
    return names - PreTrainedConfig.__dataclass_fields__.keys()


def _make_backbone(given: PreTrainedConfig | dict | str | None, fields: dict) -> tuple[PreTrainedConfig, dict]:
    """The backbone's config, and those of `fields` that are not its own."""
    if isinstance(given, str):
        given = AutoConfig.from_pretrained(given)
    if isinstance(given, PreTrainedConfig):
        given = given.get_text_config()
        values, model_type = given.to_dict(), given.model_type
    else:
        values = dict(_DEFAULT_BACKBONE if given is None else given)
        model_type = values.pop("model_type", None)
        if not isinstance(model_type, str):
            raise ValueError('`backbone_config` lacks `model_type`: give it, such as "model_type": "llama"')
        check_form(values)
    names = _fields_of(model_type)
    own = {name: value for name, value in fields.items() if name in names}
    rest = {name: value for name, value in fields.items() if name not in names}
    _refuse_moved(rest, model_type)
    if isinstance(given, PreTrainedConfig) and not own:
        return copy.deepcopy(given), rest
    return CONFIG_MAPPING[model_type](**values | own).get_text_config(), rest


def _refuse_moved(fields: dict, model_type: str):
    """Take fields that the first version had out of `fields` where they say nothing, and refuse the others."""
    if fields.get("kv_lora_rank") is None:
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            fields.pop(name, None)
    if set(fields.get("layer_types") or ()) == {"full_attention"}:
        del fields["layer_types"]
    for name in _MOVED_FIELDS.keys() & fields.keys():
        if not fields.pop(name):
            continue
        raise ValueError(
            f'`{name}` is a field of the backbone, and one of `model_type` "{model_type}" has none: give a '
            f"`backbone_config` with `model_type` {_MOVED_FIELDS[name]}"
        )


__all__ = ["ROUTER_COEFFICIENTS", "MoHGEConfig", "divisors"]
