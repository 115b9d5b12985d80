"""Saving, loading and initialisation, tied embeddings, layers of different shape, bfloat16."""

import json
from pathlib import Path

import pytest
import torch
from model_cases import (
    LOSSES,
    MIXTURE,
    ROUTER_TYPES,
    VARIANTS,
    VOCABULARY,
    assert_close,
    gradients,
    lm_loss,
    make_ids,
    make_model,
    train,
)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from mohge import MoHGEForCausalLM, MoHGEModel


KINDS = {**VARIANTS, "mixture": MIXTURE}


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those that are not saved included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_identical(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def saved_names(path: Path) -> set[str]:
    return {name for file in path.glob("*.safetensors") for name in load_file(file)}


@pytest.fixture
def uninitialised_memory_is_nan():
    """`torch.empty` gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("name", KINDS)
def test_save_and_load_is_bit_identical(name, tmp_path):
    model = make_model(**KINDS[name]).train()
    train(model, steps=2)  # running means that are not 0
    model.eval()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MoHGEForCausalLM.from_pretrained(tmp_path)
    assert_identical(all_tensors(loaded), all_tensors(model))
    with torch.no_grad():
        # Memory that a file is mapped to is aligned in another way, and matrix products may then round differently.
        assert_close(loaded(make_ids()).logits, model(make_ids()).logits, 1e-6)
    if model.config.router_logit_ema_strength:
        assert all(router.logit_ema_E.abs().max() > 1e-3 for router in loaded.routers)


def test_names_in_a_checkpoint(tmp_path):
    """One tensor for each group and projection; nothing is split or merged on the way."""
    model = make_model()
    model.save_pretrained(tmp_path)
    names = saved_names(tmp_path)
    assert names == set(model.state_dict())
    experts = {name.removeprefix("model.layers.0.mlp.experts.") for name in names if ".layers.0.mlp.experts." in name}
    assert experts == {f"{projection}_{g}" for projection in ("gate_up_proj", "down_proj") for g in range(3)}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "mohge"
    assert config["architectures"] == ["MoHGEForCausalLM"]


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
@pytest.mark.parametrize("name", ["grouped_top_k", "latent", "mixture"])
def test_construction_on_meta_leaves_nothing_uninitialised(name, tmp_path):
    """`from_pretrained` builds on the meta device and fills only what the file has: here not even all parameters."""
    expected = make_model(**KINDS[name])
    expected.save_pretrained(tmp_path / "causal")
    MoHGEModel.from_pretrained(tmp_path / "causal").save_pretrained(tmp_path / "base")
    model = MoHGEForCausalLM.from_pretrained(tmp_path / "base")
    assert_identical(dict(model.named_buffers()), dict(expected.named_buffers()))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.lm_head.weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_experts_with_biases_and_a_gate_of_their_own_are_initialised():
    backbone = MIXTURE["backbone_config"] | {"model_type": "gpt_oss", "num_local_experts": 12}
    model = make_model(**MIXTURE | {"backbone_config": backbone})
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_parameters_are_initialised_with_the_configured_deviation():
    model = make_model(initializer_range=0.05, hidden_size=64, shared_expert_gate=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.25), name
            assert parameter.mean().abs() < 0.02, name


def test_base_model_and_causal_model_load_each_other(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "causal")
    base = AutoModel.from_pretrained(tmp_path / "causal")
    assert isinstance(base, MoHGEModel)
    assert_identical(all_tensors(base), all_tensors(model.model))
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert isinstance(again, MoHGEForCausalLM)
    assert_identical(all_tensors(again.model), all_tensors(model.model))


def test_tied_embeddings_are_one_tensor(tmp_path):
    model, untied = make_model(tie_word_embeddings=True), make_model()
    model.save_pretrained(tmp_path)
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & saved_names(tmp_path)) == 1
    loaded = MoHGEForCausalLM.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert m.lm_head.weight is m.model.embed_tokens.weight
        assert m.num_parameters() == untied.num_parameters() - 32 * VOCABULARY
    assert untied.lm_head.weight.data_ptr() != untied.model.embed_tokens.weight.data_ptr()


def test_layers_of_different_width(tmp_path):
    overrides = {1: {"moe_intermediate_sizes": [16, 40, 64]}, "2": {"num_experts_per_group": [3, 3, 3]}}
    model = make_model(num_hidden_layers=3, per_layer_config=overrides, **LOSSES)
    layers = [([2, 4, 6], [8, 24, 40]), ([2, 4, 6], [16, 40, 64]), ([3, 3, 3], [8, 24, 40])]
    for layer, (counts, widths) in zip(model.model.layers, layers, strict=True):
        shapes = [(gate_up.shape, down.shape) for gate_up, down in layer.mlp.experts.groups()]
        assert shapes == [((n, 2 * w, 32), (n, 32, w)) for n, w in zip(counts, widths, strict=True)]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_identical(all_tensors(loaded), all_tensors(model))
    ids = make_ids()
    with torch.no_grad():
        expected = model(ids, output_router_logits=True)
        assert [x.shape[-1] for x in expected.router_logits] == [12, 12, 9]
        for implementation in ("grouped_mm", "eager", "batched_mm"):
            loaded.set_experts_implementation(implementation)
            for layer in loaded.model.layers:
                assert layer.mlp.experts.config._experts_implementation == implementation
            assert_close(loaded(ids).logits, expected.logits)
    loaded.train()
    output = loaded(ids, labels=ids)
    assert_close(output.loss, lm_loss(output.logits, ids) + output.aux_loss, 1e-6)
    output.loss.backward()
    gradients(loaded)


@pytest.mark.parametrize("router_type", ["two_level", "top_k"])
def test_layers_with_different_numbers_of_groups(router_type):
    overrides = {1: {"moe_intermediate_sizes": [16, 40], "num_experts_per_group": [3, 4]}}
    model = make_model(router_type=router_type, per_layer_config=overrides, **LOSSES).train()
    output = model(make_ids(), labels=make_ids(), output_router_logits=True)
    assert [x.shape for x in output.group_logits] == [(22, 3), (22, 2)]
    output.loss.backward()
    gradients(model)


@pytest.mark.parametrize("name", [*ROUTER_TYPES, "sliding_window", "latent", "gated_shared_expert", "mixture"])
def test_bfloat16_model(name):
    """The same weights in both models, so that only the arithmetic differs."""
    model = make_model(**KINDS[name], **LOSSES).to(torch.bfloat16)
    ids = make_ids()
    reference = MoHGEForCausalLM(model.config).eval()
    reference.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with torch.no_grad():
        output, expected = (m(ids, output_router_logits=True) for m in (model, reference))
    assert output.logits.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for x in (*output.router_logits, *output.group_logits))
    # The first layer's router sees nearly the same input in both; later ones may choose other experts.
    assert_close(output.router_logits[0], expected.router_logits[0], 5e-2)
    correlation = torch.corrcoef(torch.stack([output.logits.float().flatten(), expected.logits.flatten()]))[0, 1]
    assert correlation > 0.95
    model.train()
    loss = model(ids, labels=ids).loss
    assert_close(loss.detach(), reference.train()(ids, labels=ids).loss.detach(), 0.1)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    assert model.eval().generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 14)
