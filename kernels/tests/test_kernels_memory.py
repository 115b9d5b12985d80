"""What is kept for backward, and where gradients lie."""

import copy
import gc
import io

import pytest
import torch
from kernel_cases import Case, Layer, make_inputs, make_layer
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from mohge_kernels import cpu


# Stacks of several megabytes, so that their gradients lie in huge pages.
CASE = Case(counts=(4, 2), widths=(256, 520), hidden_size=512, tokens=24, top_k=2)


def gradients(layer: Layer, **changes) -> dict[str, torch.Tensor]:
    case = Case(**{**vars(CASE), **changes})
    inputs = make_inputs(case, seed=changes.get("tokens", 1))
    output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    return dict(zip(layer.parameters(), torch.autograd.grad(output.sum(), layer.parameters().values()), strict=True))


def addresses(tensors: dict[str, torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors.values()]


def test_memory_of_a_freed_gradient_is_used_again_and_holds_nothing_of_it():
    layer = make_layer(CASE)
    first = gradients(layer)
    used = addresses(first)
    assert all(gradient.ne(0).any(-1).any(-1).all() for gradient in first.values())  # every expert had tokens
    expected = {name: gradient.clone() for name, gradient in gradients(make_layer(CASE), allowed=(1, 5)).items()}
    del first
    again = gradients(layer, allowed=(1, 5))
    assert addresses(again) == used
    for name, gradient in again.items():
        assert torch.equal(gradient, expected[name])
        assert (gradient == 0).all(-1).all(-1).any()  # of experts that had tokens only the first time


def test_gradients_in_use_are_never_overwritten():
    layer = make_layer(CASE)
    kept = gradients(layer)
    views = {name: gradient[1] for name, gradient in gradients(layer, tokens=25).items()}
    before = {name: gradient.clone() for name, gradient in kept.items()}
    before_views = {name: view.clone() for name, view in views.items()}
    for tokens in (26, 27):
        other = gradients(layer, tokens=tokens)
        assert not set(addresses(other)) & {
            *addresses(kept),
            *(v.untyped_storage().data_ptr() for v in views.values()),
        }
    for name in kept:
        assert torch.equal(kept[name], before[name])
        assert torch.equal(views[name], before_views[name])


def test_accumulated_gradients_are_sums():
    layer = make_layer(CASE)
    expected = {}
    for tokens in (24, 25, 26):
        for name, gradient in gradients(layer, tokens=tokens).items():
            expected[name] = expected.get(name, 0) + gradient
        inputs = make_inputs(Case(**{**vars(CASE), "tokens": tokens}), seed=tokens)
        layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights).sum().backward()
    for name, parameter in layer.parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5)


def test_memory_goes_when_the_weights_go():
    gc.collect()
    before = len(cpu._SPARE_MEMORY)
    layer = make_layer(CASE)
    gradients(layer)
    assert len(cpu._SPARE_MEMORY) == before + 4
    assert all(len(spare) == 1 for weight, spare in cpu._SPARE_MEMORY.items() if weight is layer.gate_up[0])
    del layer
    gc.collect()
    assert len(cpu._SPARE_MEMORY) == before


def test_inference_gives_the_memory_back():
    layer = make_layer(CASE)
    gradients(layer)
    assert layer.gate_up[0] in cpu._SPARE_MEMORY
    inputs = make_inputs(CASE)
    with torch.no_grad():
        layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    assert not any(weight in cpu._SPARE_MEMORY for weight in layer.parameters().values())


def test_gradients_are_tensors_like_others():
    layer = make_layer(CASE)
    gradient = gradients(layer)["gate_up[0]"]
    file = io.BytesIO()
    torch.save(gradient, file)
    file.seek(0)
    copies = [torch.load(file), copy.deepcopy(gradient), torch.from_numpy(gradient.numpy()).clone()]
    expected = gradient.clone()
    gradient.share_memory_()
    for other in (*copies, gradient):
        assert torch.equal(other, expected)
    gradient.mul_(2).add_(1)
    assert torch.equal(gradient, expected * 2 + 1)


def kept_bytes(function, parameters) -> int:
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    assert output.requires_grad
    return sum(storages.values())


def test_kept_activations_are_at_most_036_of_those_of_grouped_mm(monkeypatch):
    """In the proportions of MoHGE's layer (hidden size 1024, widths 384 to 1280, six slots), an eighth of each; for so
    many tokens that what is kept per token counts."""
    pytest.importorskip("triton", reason="needs triton")
    from mohge_kernels import triton_experts

    hidden_size, widths, tokens, slots = 128, [48, 64, 80, 96, 112, 128, 144, 160], 2048, 6
    mean_width = sum(widths) // len(widths)
    config = OlmoeConfig(
        hidden_size=hidden_size, intermediate_size=mean_width, num_experts=64, num_experts_per_tok=slots
    )
    config._experts_implementation = "grouped_mm"
    experts = OlmoeExperts(config).bfloat16()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    inputs = make_inputs(Case(counts=(64,), widths=(8,), hidden_size=hidden_size, tokens=tokens, top_k=slots))
    hidden_states = inputs.hidden_states.bfloat16().requires_grad_()
    weights = inputs.top_k_weights.bfloat16().requires_grad_()
    theirs = kept_bytes(lambda: experts(hidden_states, inputs.top_k_index, weights), experts.parameters())

    gate_up = [torch.empty(8, 2 * width, hidden_size, dtype=torch.bfloat16) for width in widths]
    pairs = tokens * slots
    index_bytes = 4 * (2 * pairs + 64)  # order, position and counts
    weights_bytes = weights.nbytes
    pre_activations = 2 * triton_experts.saved_elements(pairs, gate_up)
    assert pre_activations >= 2 * pairs * 2 * mean_width  # room for evenly spread traffic
    ours = hidden_states.nbytes + weights_bytes + index_bytes + pre_activations
    assert ours / theirs <= 0.36, ours / theirs
