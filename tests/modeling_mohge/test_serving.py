"""Checkpoints in serving engines: what they ask of our code, and the engine itself where one is installed."""

import importlib.metadata
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conversion_cases import convert, tensors
from model_cases import LATENT_ATTENTION, MIXTURE, ROUTER_TYPES, assert_close, make_ids, make_model
from torch import nn

from mohge.commands.main import main
from mohge_kernels import cpu


VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
"""A Python with vLLM and the plugin, see `make serve-test`."""


class EngineExperts(nn.Module):
    """What an engine puts in place of ours: of one layer, and without anything that transformers adds to experts."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.ours = [experts]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        (experts,) = self.ours
        assert ((top_k_index >= 0) & (top_k_index < experts.num_experts)).all()
        return experts(hidden_states, top_k_index, top_k_weights)


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
@pytest.mark.parametrize("shared", [0, 16], ids=["alone", "shared"])
def test_experts_of_an_engine(router_type, shared):
    model = make_model(router_type=router_type, shared_expert_intermediate_size=shared)
    with torch.no_grad():
        expected = model(make_ids()).logits
        for block in model.sparse_feed_forwards:
            block.experts = EngineExperts(block.experts)
        assert_close(model(make_ids()).logits, expected)


@pytest.fixture
def plugin(monkeypatch) -> type:
    """The model class that the plugin registers with vLLM, of which there is as much as it needs."""

    class TransformersForCausalLM(nn.Module):
        def recursive_replace(self):
            pass

        def load_weights(self, weights):
            return dict(weights)

    registered = {}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=registered.__setitem__)
    backend = ModuleType("vllm.model_executor.models.transformers")
    backend.TransformersForCausalLM = TransformersForCausalLM
    for module in (vllm, backend):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(cpu, "few_rows", 0)
    (entry,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="mohge")
    entry.load()()
    assert [*registered] == ["MoHGEForCausalLM"]
    assert cpu.few_rows == 8
    module, name = registered["MoHGEForCausalLM"].split(":")
    monkeypatch.delitem(sys.modules, module, raising=False)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("fields", [{}, MIXTURE], ids=["two_level", "mixture"])
def test_plugin_takes_padded_exports_and_others(fields, plugin, tmp_path):
    make_model(**fields).save_pretrained(tmp_path / "model")
    assert convert(tmp_path / "model", tmp_path / "padded", "--mode", "export", "--pad") == 0
    make = {"model": fields, "padded": fields | {"moe_intermediate_sizes": [40] * 3}}
    if fields:
        make["padded"] |= {"moe_intermediate_sizes": [40], "num_experts_per_group": 12}
    for name, given in make.items():
        model = make_model(**given)
        engine = plugin()
        engine.model, engine.config = model.model, model.config
        on_disk = tensors(tmp_path / name)
        loaded = engine.load_weights(reversed(on_disk.items()))
        model.load_state_dict(loaded)  # all of them, and nothing else
        assert_close(model(make_ids()).logits, make_model(**fields)(make_ids()).logits)
    lost = next(key for key in on_disk if key.endswith("experts.3.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks experts of model\.layers\.\d\.mlp\.experts"):
        engine.load_weights((key, value) for key, value in on_disk.items() if key != lost)


SHARED = {
    "two_level": {},
    "odd_widths": {"moe_intermediate_sizes": [5, 7, 9]},
    "mixture": MIXTURE,
    "biases": MIXTURE
    | {
        "backbone_config": MIXTURE["backbone_config"] | {"model_type": "gpt_oss", "num_local_experts": 12},
    },
}


@pytest.mark.parametrize("fields", SHARED.values(), ids=SHARED)
def test_ranks_share_each_expert(fields, plugin):
    """The outputs of what each of two ranks holds of a layer's experts add up to those of the layer."""
    whole = make_model(**fields)
    layers = [block.experts for block in whole.sparse_feed_forwards]
    hidden_states = torch.randn(5, whole.config.hidden_size)
    index, weights = torch.arange(15).view(5, 3) % whole.config.num_experts, torch.rand(5, 3)
    outputs, sizes = [], []
    for rank in range(2):
        engine = plugin()
        model = make_model(**fields)
        engine.model, engine.config, engine.model_config = model.model, model.config, SimpleNamespace(dtype=None)
        engine.device_config = SimpleNamespace(device="cpu")
        engine.tp_group = SimpleNamespace(world_size=2, rank_in_group=rank, all_reduce=lambda output: output * 1)
        engine.recursive_replace()
        for experts, full in zip([block.experts for block in model.sparse_feed_forwards], layers, strict=True):
            for name, stack in experts.named_parameters():
                stack.weight_loader(stack, full.get_parameter(name))
            with torch.no_grad():
                outputs.append(experts(hidden_states, index, weights))
            sizes.append(sum(map(torch.numel, experts.parameters())))
    with torch.no_grad():
        expected = torch.stack([experts(hidden_states, index, weights) for experts in layers])
    assert_close(torch.stack(outputs).unflatten(0, (2, -1)).sum(0), expected)
    assert max(sizes) < 0.65 * sum(map(torch.numel, layers[0].parameters()))
    engine.tp_group.world_size = 8
    with pytest.raises(ValueError, match="do not fit 8 ranks"):
        engine.recursive_replace()


ENGINE = {
    **{router_type: {"router_type": router_type} for router_type in ROUTER_TYPES},
    "gated_shared_expert": {"shared_expert_gate": True, "routed_scaling_factor": 2.5},
    "wider_second_layer": {"per_layer_config": {1: {"moe_intermediate_sizes": [64, 96, 128]}}},
    "removed_experts": {"moe_intermediate_sizes": [0, 64, 96]},
    "latent": {
        "backbone_config": LATENT_ATTENTION["backbone_config"]
        | {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32},
        "router_type": "two_level",
    },
    "gemma2": {
        "backbone_config": {
            "model_type": "gemma2",
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    },
    "mixture": MIXTURE,
}


def test_vllm_generates_the_same(tmp_path, monkeypatch):
    """Greedy tokens and their log-probabilities, of models as they are and padded."""
    if VLLM_PYTHON is None:
        pytest.skip("VLLM_PYTHON names no Python with vLLM: run `make serve-test`")
    sizes = {"hidden_size": 128, "moe_intermediate_sizes": [32, 64, 96], "intermediate_size": 160}
    folders = []
    for name, fields in ENGINE.items():
        model = make_model(**{**sizes, "shared_expert_intermediate_size": 64, "initializer_range": 0.15, **fields})
        model.save_pretrained(tmp_path / name)
        assert convert(tmp_path / name, tmp_path / f"{name}_padded", "--mode", "export", "--pad") == 0
        folders += [str(tmp_path / name), str(tmp_path / f"{name}_padded")]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert main(["serve-check", *folders, "--engine-python", VLLM_PYTHON]) == 0
