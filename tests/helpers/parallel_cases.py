"""Models, batches and layouts of ranks on which one process and several are compared."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from model_cases import ATTENTIONS, LOSSES, MIXTURE, ROUTERS, VARIANTS, make_ids, make_model
from peft import LoraConfig, get_peft_model
from transformers.distributed.configuration_utils import DistributedConfig

from mohge import MoHGEForCausalLM


MODELS = {
    **VARIANTS,
    "olmoe": {
        "backbone_config": {
            **{"model_type": "olmoe", "num_experts": 16, "num_experts_per_tok": 3, "num_key_value_heads": 2},
            **{"bos_token_id": None, "eos_token_id": None},
        },
        "router_type": "source",
        "num_experts_per_tok": None,
        "shared_expert_intermediate_size": None,
    },
    "removed_experts_of_a_mixture": {
        **VARIANTS["removed_experts_of_a_mixture"],
        "backbone_config": {**MIXTURE["backbone_config"], "num_experts": 16, "bos_token_id": None},
        "router_type": "source",
    },
    "every_expert": {"num_experts_per_tok": 16, "num_groups_per_tok": 3},
    "small_groups": {"num_experts_per_group": [2, 4, 2]},
    "two_groups": {"moe_intermediate_sizes": [8, 24], "num_experts_per_group": 4},
    "six_groups": {"moe_intermediate_sizes": [8, 8, 16, 24, 32, 40], "num_experts_per_group": 4},
    "top_p": {"router_type": "top_p", "num_experts_per_tok": 6},
    "first_set_only": {"num_experts_per_tok": 2},
    "last_set_only": {"num_experts_per_tok": 2},
}

ROW_LENGTHS = {
    "padded": (9, 7, 6, 6, 4, 5, 3, 2),
    "ragged": (9, 7, 6, 6, 4, 5, 3, 2),  # the same, but each part of the batch ends with its own longest row
    "even": (9,) * 8,
    "short": (3,),
}


def save_model(name: str, folder: Path):
    """Save a model of four sets of experts, of two for `small_groups`."""
    fields = {"num_experts_per_group": [4, 8, 4], "initializer_range": 0.2, **LOSSES, **MODELS[name]}
    if fields.get("router_type", "two_level") == "two_level":
        fields["router_group_aux_loss_coef"] = 0.07
    model = make_model(**fields)
    with torch.no_grad():
        if model.config.keeps_router:
            for module in model.sparse_feed_forwards:
                module.experts.expert_ids.copy_(torch.randperm(model.config.num_experts))
        for router in model.routers:
            if router.corrects_logits:
                router.logit_ema_E.normal_()
        if name.endswith("_set_only"):
            # One input is always large, and in the first layer it speaks for the experts of a single set.
            model.model.embed_tokens.weight[:, 0] = 4
            by_set = model.routers[0].weight.unflatten(0, (model.config.num_expert_sets, -1))
            by_set[..., 0] = -10
            by_set[0 if name == "first_set_only" else -1, :, 0] = 10
    model.save_pretrained(folder / name)


def save_adapter(folder: Path):
    """Save a LoRA adapter for the attention of the model `two_level`."""
    model = MoHGEForCausalLM.from_pretrained(folder / "two_level")
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder / "adapter")


@dataclass(frozen=True)
class Scenario:
    """
    A run of a model, on one process or on several ranks.

    Args:
        layout (`dict`): Arguments of `DistributedConfig`.
        model (`str`): Name in `MODELS`.
        rows (`str`): Name in `ROW_LENGTHS`.
        run (`str`): Name of a function in `parallel_runs`.
        dtype (`torch.dtype`): Type of the weights.
        autocast (`bool`): Whether to compute in bfloat16 all the same.
        checkpointing (`bool`): Whether to checkpoint gradients.
    """

    layout: dict[str, int | str]
    model: str = "two_level"
    rows: str = "padded"
    run: str = "train_step"
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    checkpointing: bool = False

    @property
    def exact(self) -> bool:
        """Whether the ranks are to agree with one process in float32."""
        return self.dtype == torch.float32 and not self.autocast

    @property
    def tp_size(self) -> int:
        return self.layout.get("tp_size", 1)

    @property
    def parts(self) -> int:
        """Parts of the batch, one for each data-parallel rank."""
        return DistributedConfig(**self.layout).dp_size if dist.is_initialized() else 1

    def load(self, folder: Path) -> MoHGEForCausalLM:
        sharding = {"distributed_config": DistributedConfig(**self.layout)} if dist.is_initialized() else {}
        return MoHGEForCausalLM.from_pretrained(folder / self.model, dtype=self.dtype, **sharding)

    def saved(self, folder: Path) -> Path:
        """Where the ranks save the model."""
        return folder / "_".join(["saved", self.model, *(f"{name}_{size}" for name, size in self.layout.items())])

    def batch(self) -> dict[str, torch.Tensor]:
        lengths = torch.tensor(ROW_LENGTHS[self.rows])
        mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        ids = make_ids(*mask.shape)
        return {"input_ids": ids * mask, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}

    def own_rows(self) -> dict[str, torch.Tensor]:
        """This rank's part of the batch."""
        index = dist.get_rank() // self.tp_size % self.parts if dist.is_initialized() else 0
        rows = {name: tensor.chunk(self.parts)[index] for name, tensor in self.batch().items()}
        if self.rows == "ragged":
            longest = int(rows["attention_mask"].sum(1).max())
            rows = {name: tensor[:, :longest] for name, tensor in rows.items()}
        return rows


REMOVED = ["removed_experts", "removed_experts_of_one_layer"]
MIXTURES = [
    *(*ROUTERS, *REMOVED, "removed_experts_of_a_mixture", "dense_first_layer", "wider_second_layer", "small_groups"),
    *("gated_shared_expert", "no_shared_expert", "tied", "latent", "mixed_windows", "olmoe"),
]


# OLMo clips a view in place, which tensor parallelism cannot differentiate.
TENSOR_PARALLEL = [name for name in ATTENTIONS if name != "clipped"]


def _two_ranks() -> dict[str, Scenario]:
    fsdp, tp = {"fsdp_size": 2}, {"tp_size": 2}
    ep_fsdp, ep_tp = fsdp | {"ep_size": 2}, tp | {"ep_size": 2}
    scenarios = {f"fsdp, {model}": Scenario(fsdp, model) for model in ("two_level", "latent", "tied", REMOVED[-1])}
    scenarios |= {f"tp, {model}": Scenario(tp, model) for model in ("two_level", "tied", *REMOVED, *TENSOR_PARALLEL)}
    scenarios |= {
        f"ep = fsdp, {model}": Scenario(ep_fsdp, model) for model in (*MIXTURES, "one_group", "every_expert")
    }
    scenarios |= {f"ep = tp, {model}": Scenario(ep_tp, model) for model in MIXTURES}
    for name, layout in {"ep = fsdp": ep_fsdp, "ep = tp": ep_tp}.items():
        scenarios |= {
            f"{name}, mohge": Scenario(layout | {"ep_implementation": "mohge"}),
            f"{name}, all_to_all": Scenario(layout | {"ep_implementation": "all_to_all"}),
            f"{name}, rank 0 idle": Scenario(layout, "last_set_only", "even"),
            f"{name}, rank 1 idle": Scenario(layout, "first_set_only", "even"),
            f"{name}, checkpointing": Scenario(layout, checkpointing=True),
            f"{name}, bfloat16": Scenario(layout, "every_expert", dtype=torch.bfloat16),
            f"{name}, autocast": Scenario(layout, "every_expert", autocast=True),
            f"{name}, generate": Scenario(layout, run="generate"),
            f"{name}, save": Scenario(layout, run="save"),
            f"{name}, tied, save": Scenario(layout, "tied", run="save"),
            f"{name}, LoRA": Scenario(layout, run="adapted"),
            f"{name}, exchanges of 2 groups": Scenario(layout, "two_groups", "even", "exchanges"),
            f"{name}, exchanges of 6 groups": Scenario(layout, "six_groups", "even", "exchanges"),
            f"{name}, exchanges with empty slots": Scenario(layout, "top_p", "even", "exchanges"),
            f"{name}, exchanges with removed experts": Scenario(layout, "removed_experts", "even", "exchanges"),
            f"{name}, removed experts, save": Scenario(layout, "removed_experts_of_one_layer", run="save"),
            f"{name}, exchanges in bfloat16": Scenario(layout, run="exchanges", dtype=torch.bfloat16),
            f"{name}, exchanges under autocast": Scenario(layout, run="exchanges", autocast=True),
        }
    return scenarios | {
        "ep = fsdp, rows of unequal length": Scenario(ep_fsdp, rows="ragged"),
        "ep = tp, one row": Scenario(ep_tp, rows="short"),
        "ep = tp, all_reduce": Scenario(ep_tp | {"ep_implementation": "all_reduce"}),
        "ep = tp, removed experts, generate": Scenario(ep_tp, "removed_experts", run="generate"),
        "ep = fsdp, removed experts, all_to_all": Scenario(
            ep_fsdp | {"ep_implementation": "all_to_all"}, "removed_experts"
        ),
        "pp": Scenario({"pp_size": 2}, run="evaluate"),
        "pp, generate": Scenario({"pp_size": 2}, run="generate"),
        "pp, tied": Scenario({"pp_size": 2}, "tied", run="evaluate"),
        "pp, dense_first_layer": Scenario({"pp_size": 2}, "dense_first_layer", run="evaluate"),
    }


LAYOUTS_OF_4 = {
    "ep = fsdp": {"fsdp_size": 4, "ep_size": 4},
    "ep < fsdp": {"fsdp_size": 4, "ep_size": 2},
    "ep = tp": {"tp_size": 4, "ep_size": 4},
    "fsdp x tp = ep": {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    "fsdp x tp > ep": {"fsdp_size": 2, "tp_size": 2, "ep_size": 2},
    "replicas x fsdp": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
    "replicas x tp": {"dp_replicate_size": 2, "tp_size": 2, "ep_size": 2},
}


def _four_ranks() -> dict[str, Scenario]:
    scenarios = {f"{name}, two_level": Scenario(layout) for name, layout in LAYOUTS_OF_4.items()}
    for model in ("mixed_windows", "olmoe"):  # other backbones: Qwen3's attention, and a mixture's own router
        scenarios[f"fsdp x tp = ep, {model}"] = Scenario(LAYOUTS_OF_4["fsdp x tp = ep"], model)
    for name in ("ep = fsdp", "ep < fsdp", "ep = tp", "fsdp x tp = ep"):
        scenarios[f"{name}, one set only"] = Scenario(LAYOUTS_OF_4[name], "last_set_only", "even")
    ep_tp, copies, mixed = (LAYOUTS_OF_4[name] for name in ("ep = tp", "ep < fsdp", "fsdp x tp > ep"))
    return scenarios | {
        "ep = tp, fewer tokens than ranks": Scenario(ep_tp, rows="short"),
        "ep = tp, save": Scenario(ep_tp, run="save"),
        "ep < fsdp, checkpointing": Scenario(copies, checkpointing=True),
        "ep < fsdp, rows of unequal length": Scenario(copies, rows="ragged"),
        "ep < fsdp, all_to_all": Scenario(copies | {"ep_implementation": "all_to_all"}),
        "ep < fsdp, save": Scenario(copies, run="save"),
        "ep < fsdp, LoRA": Scenario(copies, run="adapted"),
        "fsdp x tp > ep, top_p": Scenario(mixed, "top_p"),
        "fsdp x tp > ep, grouped_top_k": Scenario(mixed, "grouped_top_k"),
        "fsdp x tp > ep, save": Scenario(mixed, run="save"),
    }


SCENARIOS = {2: _two_ranks(), 4: _four_ranks()}
