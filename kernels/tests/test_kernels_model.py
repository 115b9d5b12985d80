"""A whole model on the kernels, routing included, against its eager experts and the plain router."""

import copy

import pytest
import torch
from kernel_cases import assert_close, each_implementation

from mohge import MoHGEConfig, MoHGEForCausalLM, experts_mohge
from mohge.routing_mohge import MoHGERouter
from mohge_kernels import PackedExperts, cpu


CONFIGS = {
    "two_level": {},
    "sigmoid": {"group_score_function": "sigmoid", "topk_weight_normalization": "none"},
    "expert_logsumexp": {"group_score_function": "expert_logsumexp"},
    "unequal_groups": {"num_experts_per_group": [2, 4, 6]},
    "top_p": {"router_type": "top_p", "router_aux_loss_coef": 0.01},
}


def make_model(name: str, layers: int = 1) -> MoHGEForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "moe_intermediate_sizes": [8, 24, 40],
        "num_experts_per_group": 2,
        "num_experts_per_tok": 3,
        "initializer_range": 0.2,
        **CONFIGS[name],
    }
    return MoHGEForCausalLM(MoHGEConfig(**settings))


def logits_and_gradients(model: MoHGEForCausalLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model.train()(ids, labels=ids)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": output.loss.detach(), "logits": output.logits.detach(), **gradients}


@each_implementation
@pytest.mark.parametrize("name", CONFIGS)
def test_model_on_kernels_equals_eager_model(name, device, monkeypatch):
    model = make_model(name).to(device)
    ids = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)
    actual = logits_and_gradients(model, ids)
    plain = copy.deepcopy(model)
    plain.set_experts_implementation("eager")
    monkeypatch.setattr(MoHGERouter, "_has_kernel", staticmethod(lambda logits: False))
    expected = {key: value.double() for key, value in logits_and_gradients(plain, ids).items()}
    assert_close(actual, expected)


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_model_launches_the_kernels(device, launches):
    model = make_model("two_level")
    ids = torch.arange(3)[None]
    logits_and_gradients(model, ids)
    assert {"up_kernel", "rows_kernel", "combine_kernel", "route_kernel", "route_backward_kernel"} <= set(launches)


@pytest.mark.parametrize("mkl_leads", [False, True], ids=["onednn", "mkl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepacked_weights_generate_the_same_tokens(dtype, mkl_leads, monkeypatch):
    """Whichever library multiplies the weights that are not packed."""
    monkeypatch.setattr(cpu, "MKL_LEADS", mkl_leads)
    model = make_model("two_level", layers=2).to(dtype).eval()
    if PackedExperts.reason_against(next(model.parameters())) is not None:
        pytest.skip("this machine packs no such weights")
    ids = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(1))
    tokens = {}
    for implementation in ("mohge", "mohge_prepacked"):
        model.set_experts_implementation(implementation)
        tokens[implementation] = model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    assert {model.model.layers[0].mlp.experts, model.model.layers[1].mlp.experts} <= set(experts_mohge._PACKED)
    assert torch.equal(tokens["mohge"], tokens["mohge_prepacked"])
    assert len(tokens["mohge"].unique()) > 8
