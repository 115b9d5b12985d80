"""Ranks of groups, and adapters on attention and experts."""

import pytest
import torch
from model_cases import LATENT_ATTENTION, MIXTURE, make_config, make_ids, make_model
from peft import PeftModel, get_peft_model

from mohge import MoHGEConfig
from mohge.training.tuning.lora import group_ranks, lora_config


pytestmark = pytest.mark.filterwarnings("ignore:.*pattern keys did not match")

CASES = {
    "three_groups": {},
    "wider_second_layer": {"per_layer_config": {1: {"moe_intermediate_sizes": [16, 40, 64]}}},
    "more_groups_in_second_layer": {
        "per_layer_config": {1: {"moe_intermediate_sizes": [8, 16, 24, 64], "num_experts_per_group": [2, 4, 4, 2]}}
    },
    "dense_first_layer": {"mlp_only_layers": [0]},
    "one_expert_in_a_group": {"num_experts_per_group": [1, 2, 4]},
    "mixture": MIXTURE,
    "removed_experts": {"moe_intermediate_sizes": [0, 24, 40]},
    "removed_experts_of_one_layer": {"per_layer_config": {1: {"moe_intermediate_sizes": [0, 0, 0]}}},
}


def expert_parameters(config: MoHGEConfig, ranks: list[list[int]]) -> int:
    """Adapter parameters of all experts: rank times inputs and outputs, of two projections."""
    return sum(
        count * rank * ((config.hidden_size + 2 * width) + (width + config.hidden_size))
        for layer, of_layer in zip(config.sparse_layers, ranks, strict=True)
        for width, count, rank in zip(layer.moe_intermediate_sizes, layer.expert_counts, of_layer, strict=True)
    )


def uniform(config: MoHGEConfig, rank: int) -> list[list[int]]:
    return [[rank if width else 0 for width in layer.moe_intermediate_sizes] for layer in config.sparse_layers]


def adapted(targets: str, rank: int = 4, **config) -> PeftModel:
    model = make_model(**config)
    return get_peft_model(model, lora_config(model.config, rank, targets))


def fill(model: PeftModel):
    """Give the adapters an effect, as training does."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


@pytest.mark.parametrize("rank", [1, 2, 7, 32])
@pytest.mark.parametrize("case", CASES)
def test_ranks_are_the_largest_proportional_ones_within_the_budget(case, rank):
    config = make_config(**CASES[case])
    ranks = group_ranks(config, rank)
    budget = expert_parameters(config, uniform(config, rank))
    assert expert_parameters(config, ranks) <= budget
    best = 0
    for step in range(1, 20000):  # of c, in thousandths; from 0 where every rank is 1
        c = step / 1000 + 1e-9
        proportional = [
            [max(1, int(c * w + 0.5)) if w else 0 for w in layer.moe_intermediate_sizes]
            for layer in config.sparse_layers
        ]
        parameters = expert_parameters(config, proportional)
        if parameters > budget:
            break
        best = max(best, parameters)
    assert expert_parameters(config, ranks) >= best > 0


def test_ranks_follow_the_width():
    assert group_ranks(MoHGEConfig(), 16) == [[7, 9, 11, 14, 16, 18, 21, 23]] * 15


def test_groups_of_one_width_keep_the_rank():
    config = make_config(moe_intermediate_sizes=[24, 24, 24])
    assert group_ranks(config, 5) == uniform(config, 5)


@pytest.mark.parametrize("case", CASES)
def test_adapters_have_the_ranks_and_one_scale(case):
    model = adapted("experts", 6, **CASES[case])
    config = model.config
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == expert_parameters(config, group_ranks(config, 6))
    scales = [scale for m in model.modules() if hasattr(m, "lora_A") for scale in m.scaling.values()]
    assert len(scales) == 2 * sum(len(layer.kept_groups) for layer in config.sparse_layers)
    assert scales == pytest.approx([2.0] * len(scales))


@pytest.mark.parametrize(
    ("targets", "config", "expected"),
    [
        ("attention", {}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("attention", LATENT_ATTENTION, {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("experts", {}, {"experts"}),
        ("all", MIXTURE, {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}),
        (
            "all",
            {"mlp_only_layers": [0], "shared_expert_gate": True},
            {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "gate_proj", "up_proj", "down_proj"},
        ),
    ],
)
def test_targets_are_what_they_say_and_never_the_router(targets, config, expected):
    model = adapted(targets, **config)
    names = [name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad]
    assert {name.replace(".base_layer", "").rsplit(".", 1)[1] for name in names} == expected
    layers = {name.split("layers.")[1].split(".")[0] for name in names}
    assert layers == {"0", "1"}


@pytest.mark.parametrize("case", CASES)
def test_merging_changes_nothing(case):
    model = adapted("all", **CASES[case]).double().eval()
    ids = make_ids()
    with torch.no_grad():
        before = model(ids).logits
        fill(model)
        wanted = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    assert (wanted - before).norm() > 0.01 * before.norm()
    torch.testing.assert_close(merged, wanted, rtol=1e-9, atol=1e-9)


def test_every_adapter_gets_a_gradient():
    model = adapted("all").train()
    fill(model)
    ids = make_ids(batch_size=8)
    model(ids, labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.abs().sum() > 0]
    assert not without
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`lora_rank` is 0"),
        ({"alpha": 0}, "`lora_alpha` is 0"),
        ({"targets": "router"}, "use one of attention, experts, all"),
        ({"targets": "experts", "lora_dropout": 0.1}, "`lora_dropout` works on no stack"),
        ({"targets": "all", "use_dora": True}, "`use_dora` works on no stack"),
    ],
)
def test_what_cannot_be_adapted_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lora_config(make_config(), **options)


def test_dropout_is_for_attention():
    assert lora_config(make_config(), targets="attention", lora_dropout=0.1).lora_dropout == 0.1


def test_experts_are_refused_where_there_are_none():
    for fields in ({"mlp_only_layers": [0, 1]}, {"moe_intermediate_sizes": [0, 0, 0]}):
        with pytest.raises(ValueError, match='use lora_targets="attention"'):
            lora_config(make_config(**fields), targets="experts")
