"""PyTorch MoHGE model: a decoder of transformers whose feed-forward layers are mixtures of experts of different width.

`MoHGEForCausalLM(config)` makes a subclass of the backbone's own class (`LlamaForCausalLM`, say), in which the
feed-forward of each layer, or only its experts, has been replaced. All else, names included, is the backbone's.

Shapes: B sequences of S tokens, T = B S tokens in all, H hidden size, E experts in id order, G groups, K experts per
token, J groups kept per token.
"""

# First: it says in one line what the imports below cannot, where transformers is too old for them.
from .versions_mohge import OLDEST_TRANSFORMERS, TRAINS  # isort: skip

import functools
import inspect
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.generation import GenerationMixin
from transformers.generation.continuous_batching.input_outputs import PagedAttentionArgs
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING,
)
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.import_utils import is_torch_distributed_available, is_torchdynamo_compiling
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

from .backbones_mohge import activation, replaceable
from .blocks_mohge import (
    MoHGEExperts,
    MoHGEMixtureExperts,
    MoHGESparseMoeBlock,
    by_our_ids,
    is_inside,
    record_logits,
    record_routing,
    recording,
    under_way,
    unwrap,
)
from .configuration_mohge import ROUTER_COEFFICIENTS, MoHGEConfig
from .expert_names_mohge import name_experts  # noqa: F401 - the import lets transformers load such names
from .llama4_mohge import adapt_llama4
from .losses_mohge import (
    RouterLosses,
    at_least_one,
    has_router_losses,
    router_losses,
    switched_on,
    targets_per_sequence,
)
from .routing_mohge import ExpertTables, MoHGERouter, RouterOutput


if TRAINS and is_torch_distributed_available():
    from .parallel_mohge import check_layout, check_ranks_agree

logger = logging.get_logger(__name__)


@dataclass
class MoHGECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    r"""
    Output of [`MoHGEForCausalLM`]. Each router field is a tuple with one tensor for each layer that has experts; T
    counts all tokens of the batch, padding included.

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


_OUTPUT_FIELDS = frozenset(field.name for field in fields(MoHGECausalLMOutputWithPast))


class MoHGEPreTrainedModel(PreTrainedModel):
    """Base of the model classes: makes the subclass of the backbone's class, and replaces its feed-forward."""

    config_class = MoHGEConfig

    @staticmethod
    def _backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        """The backbone's own class, for a backbone's config."""
        return MODEL_MAPPING[type(config)]

    _generic: type | None = None
    _source: type | None = None
    """The class here and the backbone's class that this class is made of; None for the classes here themselves."""
    _adds_router_loss = False
    """Whether the backbone's own forward may add a router loss, and takes the argument that says so."""
    _progress_is_known = False
    """Whether somebody says when an optimizer step ends."""
    _sparse_paths: tuple[str, ...] = ()
    """Names of the feed-forwards that have our experts; none yet while the backbone's own `__init__` runs."""

    def __new__(cls, config: MoHGEConfig | None = None, *args, **kwargs):
        # By its type's name: code that travels with a checkpoint may be there twice, once for the config.
        if cls._source is None and getattr(config, "model_type", None) == MoHGEConfig.model_type:
            cls = _class_with_backbone(cls, cls._backbone_class(config.backbone_config))
        return super().__new__(cls)

    def __reduce_ex__(self, protocol: int):
        # The class of this object is made at run time, and cannot be found by its name.
        return _blank, (self._generic, self._source), self.__dict__

    def __init__(self, config: MoHGEConfig):
        if getattr(config, "model_type", None) != MoHGEConfig.model_type:
            raise ValueError(
                f"{type(self).__name__} takes a MoHGEConfig, not {type(config).__name__}: give one, with that as its "
                "`backbone_config` if it is the config of another model"
            )
        backbone_config = config.backbone_config
        super().__init__(backbone_config)
        self.config, self.name_or_path = config, config.name_or_path
        config._attn_implementation_internal = backbone_config._attn_implementation_internal
        config._experts_implementation_internal = self._check_and_adjust_experts_implementation(
            config._experts_implementation
        )
        self._set_experts_of_backbone()
        adapt_llama4(self)
        self._sparse_paths = self._replace_feed_forwards()
        self._adopt_base_model()
        if config.router_logit_ema_strength:
            self._keep_in_fp32_modules_strict = {"logit_ema_E", "logit_pending"}
        # Those of the base model too: a pipeline hands it all that the head is given.
        self._known_arguments = self.base_model._known_arguments = self._names_taken()
        self.post_init()

    def _replace_feed_forwards(self) -> tuple[str, ...]:
        """Put our blocks, or our experts, in the layers that are to have them. Returns where they are."""
        config = self.config
        replaced = replaceable(self, config.keeps_router, config.mlp_only_layers)
        for found in replaced:
            layer_config = config.per_layer_config[found.layer_idx]
            if config.keeps_router:
                found.module.experts = MoHGEMixtureExperts(config, layer_config, found.experts)
                if found.router is not None:
                    found.router.register_forward_hook(record_logits)
            else:
                act_fn = activation(found.module, config.backbone_config)
                setattr(found.layer, found.name, MoHGESparseMoeBlock(config, layer_config, act_fn))
        return tuple(found.path for found in replaced)

    def _adopt_base_model(self):
        """Make the backbone's own base model, inside a model with a head, one of ours, so that it is saved as one."""
        inner = self.base_model
        if inner is self:
            return
        inner.__class__ = _class_with_backbone(MoHGEModel, type(inner))
        # By its class's name, which newer versions make of the model themselves, and serving engines' do not.
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(inner)), inner._can_record_outputs)
        inner.config, inner._is_part = self.config, True
        inner._sparse_paths = tuple(path.removeprefix(f"{self.base_model_prefix}.") for path in self._sparse_paths)

    @property
    def sparse_feed_forwards(self) -> list[nn.Module]:
        """The feed-forward of each layer that has our experts, in order: its `experts` are ours."""
        # By name: replicas of data parallelism are shallow copies, in which only the submodules are exchanged, and a
        # stage of a pipeline has only some of the layers.
        found = (functools.reduce(_child, path.split("."), self) for path in self._sparse_paths)
        return [module for module in found if module is not None]

    def _names_taken(self) -> frozenset[str]:
        """Names of the keyword arguments that some part of the model, or of transformers around it, takes."""
        functions = {type(module).forward for module in self.modules()} | {ForCausalLMLoss}
        names = {name for function in functions for name in inspect.signature(function).parameters}
        outputs = {f"output_{name}" for name in self.base_model._can_record_outputs or ()}
        passed = TransformersKwargs.__annotations__.keys() | PagedAttentionArgs.__annotations__.keys()
        # transformers' models take the cache by its old name until 5.40, outside of their signatures.
        return frozenset(names | outputs | passed | {"past_key_values", "return_dict"}) - {"self", "args", "kwargs"}

    def check_arguments(self, arguments: dict):
        """
        Check that some part of the model, or of transformers around it, takes each of these keyword arguments.

        Every forward of transformers hands on what it does not know. A name that changed would be lost without a word.

        Raises:
            TypeError: naming the arguments that nothing takes.
            ValueError: if there are no tokens.
        """
        unknown = arguments.keys() - self._known_arguments
        if unknown:
            unknown -= _names_taken_by(self.config._attn_implementation)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.forward() got {', '.join(f'`{name}`' for name in sorted(unknown))}, which no "
                "part of the model takes: remove it, or mend its name"
            )
        for name in ("input_ids", "inputs_embeds"):
            tokens = arguments.get(name)
            if tokens is not None and 0 in tokens.shape:
                raise ValueError(f"`{name}` has the shape {list(tokens.shape)}: give at least one token")

    @property
    def routers(self) -> list[ExpertTables]:
        """The router of each layer that has experts, in order; of the backbone's own, the tables of its experts."""
        if self.config.keeps_router:
            return [unwrap(module.experts).tables for module in self.sparse_feed_forwards]
        return [unwrap(module.gate) for module in self.sparse_feed_forwards]

    def _forward_backbone(self, arguments: dict, record: bool) -> tuple:
        """The output of the backbone's own forward and, if that is to be recorded, what the routers decided: a pair of
        a router and its output for each time that a layer ran."""
        self.check_arguments(arguments)
        self._warn_of_unadapted_experts()
        corrected = []
        if self.training and torch.is_grad_enabled():
            corrected = [router for router in self.routers if router.corrects_logits]
        for router in corrected:
            if not self._progress_is_known and router.step_seems_new():
                self._warn_of_separate_means()
                router.fold_logit_mean()
        others = None if is_torchdynamo_compiling() else under_way()
        recorded = [] if record or others is not None else None
        token = recording.set({} if recorded is None else {"routing": recorded})
        try:
            outputs = super().forward(**arguments)
        finally:
            recording.reset(token)
        if recorded is not None:
            recorded = [(router, by_our_ids(output, ids)) for router, output, ids in recorded]
        if others is not None:
            others.extend(output for _, output in recorded)
        for router in corrected:
            router.gather_logit_mean(_token_mask(arguments))
        return outputs, recorded

    def _warn_of_separate_means(self):
        # No collective here: nothing says that all ranks run this forward.
        if not is_torchdynamo_compiling() and torch.distributed.is_available() and torch.distributed.is_initialized():
            logger.warning_once(
                "`router_logit_ema_strength`: each rank keeps a running mean of its own until it is known when a step "
                "ends: pass RouterScheduleCallback() to Trainer, or use MoHGETrainer."
            )

    def _warn_of_left_out_losses(self, arguments: dict):
        """Of a forward that returns no loss: what computes one from its output does not know all router losses."""
        names = switched_on(self.config)
        if arguments.get("output_router_logits") and "load_balancing" in names:  # TRL's trainers compute that one
            names.remove("load_balancing")
        if names and self._is_trained_here():
            logger.warning_once(
                f"The router losses of {', '.join(f'`{ROUTER_COEFFICIENTS[name]}`' for name in names)} are left out "
                "where a loss is computed outside of the model, as TRL's trainers do. These add "
                "`router_aux_loss_coef`, where their arguments set it; for the others use MoHGETrainer, "
                "MoHGESFTTrainer or `mohge finetune`. Set coefficients to 0 to do without."
            )

    def _warn_of_unadapted_experts(self):
        """Names that reach the experts of other mixtures reach attention alone here."""
        adapted = getattr(self, "peft_config", {}).values()
        # Who writes a pattern knows the names of the modules.
        if all(isinstance(adapter.target_modules, str | None) for adapter in adapted) or not self._is_trained_here():
            return
        experts = [parameter for found in self.sparse_feed_forwards for parameter in found.experts.parameters()]
        if experts and not any(parameter.requires_grad for parameter in experts):
            share = sum(map(torch.numel, experts)) / sum(map(torch.numel, self.parameters()))
            logger.warning_once(
                f"The adapters leave the routed experts as they are, {share:.0%} of the parameters: name their stacks "
                'in `target_parameters`, ["experts.gate_up_proj_0", "experts.down_proj_0", ...], as '
                "`mohge.training.tuning.lora.lora_config(model.config)` does."
            )

    def _is_trained_here(self) -> bool:
        """Whether to warn of what concerns training."""
        return self.training and torch.is_grad_enabled() and not is_torchdynamo_compiling()

    def init_parallel_plans(self):
        """See `DistributedMixin.init_parallel_plans`. The backbone's plans, with the experts' own in them."""
        super().init_parallel_plans()
        present = {_pattern(name) for named in (self.named_modules(), self.named_parameters()) for name, _ in named}
        for block in {_pattern(path) for path in self._sparse_paths}:
            for plan in (self._tp_plan, self._ep_plan):
                for name in [name for name in plan if name.startswith(f"{block}.") and name not in present]:
                    del plan[name]
            experts = {name for name in present if name.startswith(f"{block}.experts.")}
            for name in experts:
                if ".gate_up_proj_" in name:
                    self._tp_plan[name], self._ep_plan[name] = "packed_colwise", "heterogeneous_experts"
                elif "_bias_" in name:
                    self._ep_plan[name] = "heterogeneous_experts"
                elif ".down_proj_" in name:
                    self._tp_plan[name], self._ep_plan[name] = "rowwise", "heterogeneous_experts"
            self._tp_plan[f"{block}.experts"] = "moe_tp_experts"
            self._ep_plan[f"{block}.experts"] = "ep_dispatch_experts"
            if f"{block}.shared_expert" in present and not self.config.keeps_router:
                for name, style in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise")):
                    self._tp_plan[f"{block}.shared_expert.{name}"] = style

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """See `DistributedMixin.maybe_distribute_model`. Checks first that all ranks load the same model and that
        it can be spread that way; `ep_implementation="auto"` means `"mohge"`."""
        if mesh_manager is not None:
            if not TRAINS:
                raise ValueError(
                    f"spreading a model over devices needs transformers {OLDEST_TRANSFORMERS} or later: run "
                    "`pip install -U transformers`"
                )
            check_ranks_agree(model.config)
            check_layout(model.config, distributed_config)
            if distributed_config.tp_size > 1 == distributed_config.ep_size and any(
                unwrap(module.experts).has_bias for module in model.sparse_feed_forwards
            ):
                raise ValueError(
                    f"`tp_size` {distributed_config.tp_size} cannot cut experts that have biases, as those of this "
                    "model: set `ep_size` to it"
                )
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

    def set_attn_implementation(self, attn_implementation: str | dict, **kwargs):
        """See `PreTrainedModel.set_attn_implementation`."""
        if isinstance(attn_implementation, str):  # or else that warns that it finds no model of the backbone's config
            chosen = self._check_and_adjust_attn_implementation(attn_implementation, is_init_check=False, **kwargs)
            self.config.backbone_config._attn_implementation_internal = chosen
        super().set_attn_implementation(attn_implementation, **kwargs)

    def set_experts_implementation(self, experts_implementation: str | dict):
        """See `PreTrainedModel.set_experts_implementation`."""
        super().set_experts_implementation(experts_implementation)
        self._set_experts_of_backbone()

    def _set_experts_of_backbone(self):
        """Layers may keep the backbone's own experts, for which our implementations are not made."""
        chosen, backbone_config = self.config._experts_implementation, self.config.backbone_config
        if self.config.backbone_is_mixture:
            chosen = super().get_correct_experts_implementation(None if chosen.startswith("mohge") else chosen)
        backbone_config._experts_implementation_internal = chosen

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers would find what it has noted down about the backbone's class.
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True if cls._source is None else cls._source._can_set_attn_implementation()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # transformers goes by the name of the class.
        return cls._source._supports_default_dynamic_cache()

    @classmethod
    def is_custom_code(cls) -> bool:
        # What says yes is taken to ignore that a weight was loaded, and modules without weights are passed over, which
        # leaves tables of some backbones empty.
        return False

    def initialize_weights(self):
        """See `PreTrainedModel.initialize_weights`. Our modules come first: they may lie in a part of the backbone
        that is a model itself and would initialise them as its own."""
        for feed_forward in self.sparse_feed_forwards:
            for module in feed_forward.modules():
                if isinstance(module, MoHGERouter | MoHGEExperts):
                    self._initialize_weights(module)
                    module.fill_tables()  # also where quantised weights are passed over
        super().initialize_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, MoHGERouter | MoHGEExperts):
            module.init_weights(getattr(self.config, "initializer_range", 0.02))
            return
        super()._init_weights(module)
        if "training_progress" in module._buffers:
            init.constant_(module.training_progress, -1.0)

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """See `PreTrainedModel.save_pretrained`. The checkpoint carries this code and loads as `AutoModel` and as
        `AutoModelForCausalLM`, whichever of the two was saved."""
        self.config.auto_map = dict(AUTO_MAP)
        self.config.backbone_config.dtype = self.dtype  # a model that was loaded has it
        # Names on disk are those of the model, not of the backbone's first release: its rules know no experts of ours.
        kwargs.setdefault("save_original_format", False)
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


@functools.cache
def _class_with_backbone(generic: type[MoHGEPreTrainedModel], source: type[PreTrainedModel]) -> type:
    """The class of models of our class `generic` with the backbone's class `source`."""

    def described(): ...

    def forward(self, *args, **kwargs):
        return generic.forward(self, **dict(zip(positional, args, strict=False)), **kwargs)

    # transformers goes by the signature: which arguments `generate` may pass, which columns Trainer keeps.
    signature = inspect.signature(source.forward)
    own = [p for p in inspect.signature(generic.forward).parameters.values() if p.kind is p.KEYWORD_ONLY]
    theirs = [p for p in signature.parameters.values() if p.name not in {p.name for p in own}]
    positional = [p.name for p in theirs[1:] if p.kind is p.POSITIONAL_OR_KEYWORD]
    parameters = [p for p in theirs if p.kind is not p.VAR_KEYWORD]
    parameters += own + [p for p in theirs if p.kind is p.VAR_KEYWORD]
    # A `__signature__` of its own would also be taken for what the code has, by who captures it as one graph.
    forward.__wrapped__ = described
    described.__signature__ = signature.replace(
        parameters=parameters, return_annotation=inspect.signature(generic.forward).return_annotation
    )
    outputs = dict(source._can_record_outputs or {})
    if generic is MoHGEModel:
        theirs = outputs.get("router_logits", [])
        theirs = theirs if isinstance(theirs, list) else [theirs]
        outputs["router_logits"] = [*theirs, OutputRecorder(MoHGERouter, index=0)]
    return type(generic)(
        generic.__name__,
        (generic, source),
        {
            "_can_record_outputs": outputs or None,
            "__module__": generic.__module__,
            # transformers keeps what it knows about a class by this name
            "__qualname__": f"{generic.__name__}[{source.__name__}]",
            "__doc__": generic.__doc__,
            "forward": forward,
            "_generic": generic,
            "_source": source,
            "_adds_router_loss": "output_router_logits" in signature.parameters,
        },
    )


@functools.cache
def _class_with_head(head: type, base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(f"{head.__name__.removeprefix('Generic')}[{base.__name__}]", (head, base), {})


def _with_head(head: type, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of a backbone with one of transformers' generic heads, which it may not have itself."""
    classes = MODEL_MAPPING[type(config)].__mro__
    return _class_with_head(head, next(cls for cls in classes if cls.__name__.endswith("PreTrainedModel")))


def _blank(generic: type[MoHGEPreTrainedModel], source: type[PreTrainedModel]) -> MoHGEPreTrainedModel:
    cls = _class_with_backbone(generic, source)
    return cls.__new__(cls)


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    return getattr(module, name, None)


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


@torch.compiler.assume_constant_result
def _names_taken_by(attention: str) -> set[str]:
    """Names of the arguments of an attention implementation, an engine's own among them."""
    return set(inspect.signature(ALL_ATTENTION_FUNCTIONS.get_interface(attention, eager_attention_forward)).parameters)


AUTO_MAP = {
    "AutoModel": "modeling_mohge.MoHGEModel",
    "AutoModelForCausalLM": "modeling_mohge.MoHGEForCausalLM",
    "AutoModelForSequenceClassification": "modeling_mohge.MoHGEForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_mohge.MoHGEForTokenClassification",
}
"""What the config of a checkpoint that carries its code says under `auto_map`."""


def save_code(save_directory):
    """Copy the model's code beside its weights."""
    custom_object_save(object.__new__(MoHGEForCausalLM), save_directory)


def _token_mask(arguments: dict) -> torch.Tensor:
    """[B, S]: 0 where a token is padding. Only a mask by token says so; without one, every token counts."""
    tokens = arguments.get("input_ids")
    tokens = arguments["inputs_embeds"][..., 0] if tokens is None else tokens
    attention_mask = arguments.get("attention_mask")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -tokens.shape[1] :].to(tokens.device)
    return torch.ones(tokens.shape, device=tokens.device)


class MoHGEModel(MoHGEPreTrainedModel):
    """
    The decoder without its output projection.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
    """

    _is_part = False
    """Whether it is inside a model with a head."""

    def forward(self, input_ids: torch.LongTensor | None = None, **kwargs):
        """Run the decoder. Arguments and output are those of the backbone's own model."""
        kwargs["input_ids"] = input_ids
        # In a model with a head, that does what is to be done around a forward, unless a trainer runs this part alone.
        # A compiler cannot ask which it is.
        inside = self._is_part or recording.compiling if is_torchdynamo_compiling() else is_inside()
        if inside:
            return super().forward(**kwargs)
        self._warn_of_left_out_losses(kwargs)
        return self._forward_backbone(kwargs, record=False)[0]


class MoHGEModelWithHead(MoHGEPreTrainedModel):
    """Base of the models with a head. In training mode the loss includes the router losses; in evaluation mode it is
    the head's loss alone."""

    def __init__(self, config: MoHGEConfig):
        super().__init__(config)
        self.training_progress: torch.Tensor
        self.register_buffer("training_progress", torch.tensor(-1.0), persistent=False)

    def set_training_progress(self, fraction: float):
        """
        Say which fraction of training is done, 0 to 1: on every rank, before the first optimizer step and after each.
        Without it, schedules of router losses stand at their end values. `RouterScheduleCallback` calls this.
        """
        self.training_progress.fill_(fraction)
        self._progress_is_known = True
        for router in self.routers:
            if router.corrects_logits:
                if torch.distributed.is_available() and torch.distributed.is_initialized():
                    torch.distributed.all_reduce(router.logit_pending)
                router.fold_logit_mean()

    def _router_losses(
        self, routing: list, arguments: dict, sequence_weights: torch.Tensor | None
    ) -> tuple[list[RouterOutput], RouterLosses]:
        """What the routers decided, and their losses."""
        routers, decisions = map(list, zip(*routing, strict=True))
        if any(decision.logits is None for decision in decisions):
            raise ValueError(
                f"the router of {self._source.__name__} returns no logits, which router losses and "
                "`output_router_logits` need: set the coefficients of the losses to 0"
            )
        self._warn_of_idle_losses(routers[0], decisions[0])
        mask = _token_mask(arguments)
        return decisions, router_losses(routers, decisions, mask, sequence_weights, self.training_progress)

    def _warn_of_idle_losses(self, router: ExpertTables, decision: RouterOutput):
        if not self._is_trained_here():
            return
        weight = getattr(router, "weight", None)
        if weight is not None and weight.requires_grad and not decision.logits.requires_grad:
            logger.warning_once(
                "The router losses get no gradient under reentrant checkpointing: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        if self.config.router_group_aux_loss_coef and self.config.group_aux_loss_start and not self._progress_is_known:
            logger.warning_once(
                "`group_aux_loss_start` needs to know how far training is: pass RouterScheduleCallback() to Trainer, "
                "or use MoHGETrainer. Until then the group-wise loss is active from the first step."
            )


class MoHGEForCausalLM(MoHGEModelWithHead, GenerationMixin):
    """
    The decoder with its language-model head. In training mode its loss includes the router losses; in evaluation mode
    it is the language-model loss alone, so that its exponential is the perplexity.

    Args:
        config ([`MoHGEConfig`]): Config of the model.
    """

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
        if getattr(self.config, "kv_lora_rank", None) is not None:
            raise ValueError(
                "generate_batch does not work with multi-head latent attention: transformers' paged cache cannot hold "
                "its latents. Use generate."
            )
        return super().generate_batch(*args, **kwargs)

    @staticmethod
    def _backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        output_router_logits: bool | None = None,
        sequence_weights: torch.Tensor | None = None,
        **kwargs,
    ) -> MoHGECausalLMOutputWithPast:
        r"""
        Run the backbone's own forward, whose arguments it takes, and add the router losses to its loss.

        Args:
            output_router_logits (`bool`, *optional*):
                Whether to return router and group logits, router losses and counts; by default as in the config.
            sequence_weights (`torch.Tensor` of shape `[B]`, *optional*):
                Share of each sequence in the whole batch, for router losses without `labels`. With `labels` and
                `num_items_in_batch`, which `Trainer` passes, it is each sequence's share of the targets.

        Raises:
            TypeError: if an argument is one that no part of the model takes.

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
        kwargs["input_ids"] = input_ids
        labels = kwargs.get("labels")
        if output_router_logits is None:
            configs = self.config, self.config.backbone_config
            output_router_logits = any(getattr(config, "output_router_logits", False) for config in configs)
        trained = self.training and (labels is not None or sequence_weights is not None)
        collect = output_router_logits or (trained and has_router_losses(self.config))
        if not collect:
            self._warn_of_left_out_losses(kwargs)
        if self._adds_router_loss:
            kwargs["output_router_logits"] = False  # with which a mixture adds a router loss of its own

        if kwargs.get("num_items_in_batch") is not None:
            kwargs["num_items_in_batch"] = at_least_one(kwargs["num_items_in_batch"])

        outputs, routing = self._forward_backbone(kwargs, record=collect)
        taken = {name: value for name, value in outputs.items() if name in _OUTPUT_FIELDS}
        result = MoHGECausalLMOutputWithPast(**taken)
        if result.loss is not None and labels is not None:
            targets = targets_per_sequence(**kwargs)
            result.loss = result.loss.masked_fill(targets.sum().to(result.loss.device) == 0, 0)
            result.lm_loss = result.loss.detach().clone()  # Trainer scales `loss` in place
            if sequence_weights is None and kwargs.get("num_items_in_batch") is not None:
                sequence_weights = targets / kwargs["num_items_in_batch"]
        if collect and routing:
            decisions, losses = self._router_losses(routing, kwargs, sequence_weights)
            result.tokens_per_expert = losses.tokens_per_expert
            if has_router_losses(self.config):
                result.aux_loss, result.router_losses = losses.aux_loss, losses.values
                if self.training and result.loss is not None:
                    result.loss = result.loss + losses.aux_loss.to(result.loss.device)
            if output_router_logits:
                result.router_logits = tuple(decision.logits for decision in decisions)
                result.group_logits = tuple(
                    router.group_logits(decision.logits) if decision.group_logits is None else decision.group_logits
                    for router, decision in routing
                )
        return result


class _MoHGEClassifier(MoHGEModelWithHead):
    """A model with one of transformers' generic heads in place of the language model's."""

    @can_return_tuple
    def forward(self, input_ids: torch.LongTensor | None = None, **kwargs):
        """Run transformers' generic model, whose arguments it takes, and add the router losses to its loss."""
        kwargs["input_ids"] = input_ids
        collect = self.training and kwargs.get("labels") is not None and has_router_losses(self.config)
        if not collect:
            self._warn_of_left_out_losses(kwargs)
        outputs, routing = self._forward_backbone(kwargs, record=collect)
        if routing:
            aux_loss = self._router_losses(routing, kwargs, sequence_weights=None)[1].aux_loss
            outputs.loss = outputs.loss + aux_loss.to(outputs.loss.device)
        return outputs


class MoHGEForSequenceClassification(_MoHGEClassifier):
    """
    The decoder with a head that scores a sequence by its last token, also for reward models. In training mode its
    loss includes the router losses.

    Args:
        config ([`MoHGEConfig`]): Config of the model, with `num_labels` and `pad_token_id`.
    """

    @staticmethod
    def _backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        return _with_head(GenericForSequenceClassification, config)


class MoHGEForTokenClassification(_MoHGEClassifier):
    """
    The decoder with a head that scores each token. In training mode its loss includes the router losses.

    Args:
        config ([`MoHGEConfig`]): Config of the model, with `num_labels`.
    """

    @staticmethod
    def _backbone_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
        return _with_head(GenericForTokenClassification, config)


# Trainer shifts labels under label smoothing only for class names in this table, which `register` does not fill.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("mohge", MoHGEForCausalLM.__name__)

__all__ = [
    "MoHGECausalLMOutputWithPast",
    "MoHGEForCausalLM",
    "MoHGEForSequenceClassification",
    "MoHGEForTokenClassification",
    "MoHGEModel",
    "MoHGEModelWithHead",
    "MoHGEPreTrainedModel",
    "record_routing",
]
