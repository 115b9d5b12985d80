"""What allocations cost, against real models, counters of PyTorch and counting one by one."""

import itertools

import pytest
import torch
from model_cases import ATTENTIONS, LATENT_ATTENTION, make_config
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel

from mohge import MoHGEConfig, MoHGEForCausalLM
from mohge.training.loop.traffic import RouterTraffic
from mohge.training.placement.allocations import ALLOCATIONS
from mohge.training.placement.costs import Workload, allocation_costs, dense_flops, dense_parameters, layer_loads
from mohge_kernels import cpu


FOUR_SETS = {"moe_intermediate_sizes": [8, 24, 40], "num_experts_per_group": [4, 8, 12]}
VARIANTS = {
    "unequal groups": {},
    "latent attention, tied": {**LATENT_ATTENTION, "tie_word_embeddings": True},
    "layers differ": {"per_layer_config": {1: {"num_experts_per_group": 4}}},
    "a dense layer": {"mlp_only_layers": [0], "shared_expert_gate": True},
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_parameters_of_the_devices_add_up_to_the_model(devices, overrides):
    config = make_config(**FOUR_SETS | overrides)
    total = MoHGEForCausalLM(config).num_parameters()
    for name in ALLOCATIONS:
        costs = allocation_costs(name, config, Workload(devices, tokens=1))
        copies = sum(
            layer.expert_parameters(layer.expert_widths[expert])
            for layer, allocation in zip(config.sparse_layers, costs.layers, strict=True)
            for expert in range(layer.num_experts)
            for _ in range(sum(expert in held for held in allocation.devices) - 1)
        )
        assert (copies > 0) == (name == "packed" and devices > 1)
        assert sum(costs.parameters) == total + copies
        assert sum(costs.expert_parameters) == config.routed_parameters + copies


def test_fsdp_gives_the_last_devices_the_shorter_chunks():
    """As `torch.chunk` splits the first dimension: with 6 devices of 8 rows the last two get none."""
    config = make_config()
    model = MoHGEForCausalLM(config)
    expected = [0] * 6
    for name, parameter in model.named_parameters():
        if ".experts." not in name:
            for device, chunk in enumerate(parameter.chunk(6)):
                expected[device] += chunk.numel()
    assert dense_parameters(model, 6) == expected
    assert expected[0] > expected[-1]


@pytest.fixture(scope="module")
def release():
    """The shape of MoHGE-3B."""
    return MoHGEConfig(**LATENT_ATTENTION, hidden_size=1024, num_hidden_layers=2, vocab_size=512)


def test_all_size_is_exactly_even_for_the_release_and_contiguous_is_not(release):
    workload = Workload(devices=8, dtype=torch.bfloat16)
    even = allocation_costs("all-size", release, workload)
    assert len(set(even.parameters)) == len(set(even.total_memory)) == 1
    assert even.flops_imbalance == pytest.approx(1, abs=1e-12)
    assert even.expert_flops == pytest.approx([2 * 2 * 6 * 3 * 1024 * 832] * 8)  # six experts of mean width
    naive = allocation_costs("contiguous", release, workload)
    assert naive.flops_imbalance == pytest.approx(1280 / 832)
    assert max(naive.expert_parameters) * 8 == pytest.approx(sum(naive.expert_parameters) * 1280 / 832)
    assert sum(naive.expert_flops) == pytest.approx(sum(even.expert_flops))


def test_weights_gradients_and_optimizer_take_four_times_the_parameters():
    config = make_config(**FOUR_SETS)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        costs = allocation_costs("packed", config, Workload(devices=2, tokens=10, dtype=dtype))
        states = [sum(costs.memory[part][r] for part in ("weights", "gradients", "optimizer")) for r in range(2)]
        assert states == [4 * size * count for count in costs.parameters]
        assert costs.memory["logits"] == [10 * 64 * (size + 3 * 4)] * 2


def recorded(config: MoHGEConfig, seed: int = 0) -> RouterTraffic:
    generator = torch.Generator().manual_seed(seed)
    traffic = RouterTraffic(config)
    for _ in range(3):
        chosen = [torch.rand(50, layer.num_experts, generator=generator) ** 4 for layer in config.sparse_layers]
        traffic.add([torch.bincount(c.topk(3).indices.flatten(), minlength=c.shape[1]) for c in chosen], tokens=50)
    return traffic


@pytest.mark.parametrize("narrowest", [16, 0])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_operations_and_bytes_are_those_of_each_choice_sent_in_turn(name, devices, narrowest):
    """Every device has every recorded choice once: its own copy computes it, or all copies equal parts. Choices of
    removed experts are not sent."""
    config = make_config(**FOUR_SETS, per_layer_config={1: {"moe_intermediate_sizes": [narrowest, 16, 64]}})
    traffic = recorded(config)
    costs = allocation_costs(name, config, Workload(devices, dtype=torch.bfloat16), layer_loads(config, traffic))
    flops, exchanged, slowest = [0.0] * devices, [0.0] * devices, 0.0
    for layer, layer_config in enumerate(config.sparse_layers):
        counts = [sum(record[layer][expert] for record in traffic.counts) for expert in range(24)]
        assert sum(counts) == 3 * 150
        here = [0.0] * devices
        for source, expert in itertools.product(range(devices), range(24)):
            holders = [device for device, held in enumerate(costs.layers[layer].devices) if expert in held]
            receivers = [source] if source in holders else holders
            for receiver in receivers:
                choices = counts[expert] / len(receivers)
                here[receiver] += choices * 2 * 3 * 32 * layer_config.expert_widths[expert]
                if receiver != source and layer_config.expert_widths[expert]:
                    exchanged[receiver] += choices * 2 * 2 * (32 * 2)  # there and back, twice, 32 numbers of 2 bytes
        slowest += max(here)
        flops = [a + b for a, b in zip(flops, here, strict=True)]
    assert costs.expert_flops == pytest.approx([value / 150 for value in flops])
    assert costs.exchanged_bytes == pytest.approx([value / 150 for value in exchanged])
    assert costs.flops_imbalance == pytest.approx(slowest * devices / sum(flops))
    assert (costs.flops_imbalance < 1.01) == (name == "packed")


def test_one_device_exchanges_nothing():
    costs = allocation_costs("all-size", make_config(), Workload(devices=1))
    assert costs.exchanged_bytes == [0]
    assert costs.expert_flops[0] > 0


@pytest.mark.parametrize("router", ["two_level", "top_k", "top_p", "grouped_top_k"])
def test_even_traffic_shares_the_choices_of_a_token(router):
    config = make_config(**FOUR_SETS, router_type=router, num_experts_per_tok=6)
    for load in layer_loads(config):
        groups = [sum(load[e] for e in range(24) if config.expert_groups[e] == g) for g in range(3)]
        expected = [2, 2, 2] if router == "grouped_top_k" else [1, 2, 3]
        assert [float(value) for value in groups] == pytest.approx(expected)


def test_traffic_without_tokens_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        layer_loads(make_config(), RouterTraffic(make_config()))


@pytest.mark.parametrize(
    "overrides",
    [{}, LATENT_ATTENTION, {"mlp_only_layers": [0]}, {"num_key_value_heads": 2, "shared_expert_gate": True}],
    ids=["multi-head", "latent attention", "a dense layer", "grouped queries, gated"],
)
def test_operations_are_those_that_pytorch_counts(overrides):
    """Eager attention computes the scores of all pairs of tokens, twice the causal ones and half the diagonal."""
    config = make_config(**FOUR_SETS | overrides, router_aux_loss_coef=0.01)
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    torch.manual_seed(0)
    model = MoHGEForCausalLM(config)
    ids = torch.arange(40).view(2, 20)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        outputs = model(ids, output_router_logits=True)
    traffic = RouterTraffic(config)
    traffic.add(outputs.tokens_per_expert, ids.numel())
    flops = dense_flops(config, sequence_length=20)
    flops["attention_scores"] *= 20 / 10.5
    routed = allocation_costs("all-size", config, Workload(1), layer_loads(config, traffic)).expert_flops[0]
    counted = counter.get_total_flops() / ids.numel()
    assert counted == pytest.approx(sum(flops.values()) + routed, rel=0.02)  # counters of the losses, rotary matrices
    assert counted >= sum(flops.values()) + routed


def test_a_window_shortens_the_context():
    config = make_config(num_hidden_layers=1)
    windowed = make_config(num_hidden_layers=1, **ATTENTIONS["sliding_window"])
    seen, seen_in_window = sum(range(1, 11)), sum(min(t, 4) for t in range(1, 11))
    scores, fewer = (dense_flops(c, 10)["attention_scores"] for c in (config, windowed))
    assert scores == pytest.approx(2 * 2 * 32 * seen / 10)
    assert fewer == pytest.approx(2 * 2 * 4 * 16 * seen_in_window / 10)  # its heads are twice as wide
    assert dense_flops(windowed, 3)["attention_scores"] == 2 * dense_flops(config, 3)["attention_scores"]


# What a forward pass keeps, against what autograd saves.

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "moe_intermediate_sizes": [32, 64, 96],
    "num_experts_per_group": 4,
    "num_experts_per_tok": 3,
    "shared_expert_intermediate_size": 0,
}
LARGER = {
    **SMALL,
    "hidden_size": 128,
    "num_key_value_heads": 2,
    "num_experts_per_group": [2, 4, 6],
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 160,
}
KEPT = {
    "no shared expert": SMALL,
    "shared expert, grouped queries": LARGER,
    "gated, normed and clipped": {
        **LARGER,
        "shared_expert_gate": True,
        "backbone_config": {"model_type": "olmoe", "clip_qkv": 1.0, "pad_token_id": None, "eos_token_id": None},
        "router_type": "two_level",
    },
    "its own router": {
        **{name: SMALL[name] for name in SMALL if name != "num_experts_per_tok"},
        "backbone_config": {"model_type": "olmoe", "num_experts": 12, "pad_token_id": None, "eos_token_id": None},
    },
    "norm per head, top_k": {
        **SMALL,
        "backbone_config": {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 16},
        "router_type": "top_k",
    },
    "latent attention": {  # as wide in its values, without which no kernel on CPU spares the scores
        **SMALL,
        **LATENT_ATTENTION,
        "backbone_config": {**LATENT_ATTENTION["backbone_config"], "v_head_dim": 16},
    },
    "a dense layer": {**LARGER, "mlp_only_layers": [0], "intermediate_size": 256},
}


def kept_by_autograd(model: MoHGEForCausalLM, ids: torch.Tensor) -> tuple[int, RouterTraffic]:
    """Bytes of the storages that a forward pass with its loss saves for backward, parameters and buffers left out. The
    experts' kernel on CPU reserves for the worst case: what it writes is counted."""
    config = model.config
    ignored = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    saved, storages = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            saved.append(tensor)  # so that no other takes its address
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(ids, labels=ids, output_router_logits=True)
    assert outputs.loss.requires_grad
    kept = sum(storages.values())
    for layer, counts in zip(config.sparse_layers, outputs.tokens_per_expert, strict=True):
        widest = [torch.empty(0, 2 * max(layer.moe_intermediate_sizes))]
        reserved = 4 * cpu.saved_elements(ids.numel() * layer.num_experts_per_tok, widest)
        if reserved in storages.values():  # under gradient checkpointing it is not kept
            kept += 4 * int(counts @ (2.0 * torch.tensor(layer.expert_widths))) - reserved
    traffic = RouterTraffic(config)
    traffic.add(outputs.tokens_per_expert, ids.numel())
    return kept, traffic


def build(overrides: dict) -> tuple[MoHGEForCausalLM, torch.Tensor]:
    torch.manual_seed(0)
    model = MoHGEForCausalLM(MoHGEConfig(**overrides, group_aux_loss_start=0.0)).train()
    return model, torch.randint(0, 96, (2, 64))


def estimated(config: MoHGEConfig, traffic: RouterTraffic, devices: int = 1, **kwargs) -> float:
    """The estimate of activations, and the log-probabilities that the loss keeps."""
    workload = Workload(devices, tokens=sum(traffic.tokens), **kwargs)
    costs = allocation_costs("all-size", config, workload, layer_loads(config, traffic))
    return sum(costs.memory["activations"]) / devices + sum(traffic.tokens) * 4 * config.vocab_size


@pytest.mark.parametrize("overrides", KEPT.values(), ids=KEPT)
def test_activations_are_what_autograd_keeps(overrides):
    model, ids = build(overrides)
    kept, traffic = kept_by_autograd(model, ids)
    # Where queries and keys are made in parts (latent attention), CPU copies the heads once more.
    assert estimated(model.config, traffic) == pytest.approx(kept, rel=0.05)


def test_gradient_checkpointing_keeps_the_inputs_of_the_layers_and_computes_one_again():
    model, ids = build(LARGER)
    kept_without, traffic = kept_by_autograd(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    kept, _ = kept_by_autograd(model, ids)
    inputs = 2 * ids.numel() * 128 * 4
    one_layer = (kept_without - (kept - inputs)) / 2
    assert one_layer > 4 * inputs
    expected = kept + one_layer
    assert estimated(model.config, traffic, gradient_checkpointing=True) == pytest.approx(expected, rel=0.06)


def test_dispatch_keeps_the_rows_that_come_and_that_come_back(tmp_path):
    """A group of one rank sends every row through transformers' all-to-all; over two devices the mean is the same."""
    model, ids = build(LARGER)
    at_home, _ = kept_by_autograd(model, ids)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            EpDispatchExpertsParallel().install_forward(
                layer.mlp.experts, mesh, tp_mesh=mesh, ep_implementation="all_to_all"
            )
        kept, traffic = kept_by_autograd(model, ids)
    finally:
        torch.distributed.destroy_process_group()
    assert kept > 1.3 * at_home
    assert estimated(model.config, traffic, devices=2) == pytest.approx(kept, rel=0.04)
