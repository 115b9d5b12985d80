"""What `swiglu_experts` differentiates, in whatever order forward and backward come."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from kernel_cases import (
    CASES,
    SMALL,
    Case,
    Inputs,
    Recorder,
    assert_close,
    assert_equal,
    dtype_name,
    each_case,
    each_implementation,
    forward_and_backward,
    make_inputs,
    make_layer,
    reference,
    run,
    run_reference,
)
from torch.utils.checkpoint import checkpoint


def gradients_of(layer, inputs, trained: tuple[str, ...]) -> dict:
    """`.grad` of every tensor after a backward in which only `trained` require gradients."""
    tensors = {"hidden_states": inputs.hidden_states, "top_k_weights": inputs.top_k_weights, **layer.parameters()}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in trained)
    output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    output.backward(inputs.grad_output)
    return {"output": output.detach()} | {f"d {name}": tensor.grad for name, tensor in tensors.items()}


EXPERTS = tuple(f"{matrix}[{group}]" for matrix in ("gate_up", "down") for group in range(3))
TRAINED = {
    "hidden_states": ("hidden_states",),
    "weights": ("top_k_weights",),
    "gate_up": EXPERTS[:3],
    "down": EXPERTS[3:],
    "down_of_one_group": ("down[1]",),
    "gate_up_of_an_idle_group": ("gate_up[1]",),
    "one_group": ("gate_up[2]", "down[2]"),
    "experts": EXPERTS,
    "inputs": ("hidden_states", "top_k_weights"),
    "all_but_hidden_states": ("top_k_weights", *EXPERTS),
    "all_but_weights": ("hidden_states", *EXPERTS),
}


@each_implementation
@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
def test_frozen_parts(trained, device):
    case = replace(SMALL, allowed=(0, 2, 3) if trained == ("gate_up[1]",) else None, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run_reference(case, layer, inputs)
    with Recorder() as operators:
        actual = gradients_of(layer, inputs, trained)
    for name in expected:
        if name != "output" and name[2:] not in trained:
            assert actual.pop(name) is None, name
    assert_close(actual, {name: expected[name] for name in actual})
    if device == "cpu":  # on a GPU the backward runs in a thread that is not recorded
        (call,) = operators.named("swiglu_experts_backward")
        asked = [any(name.startswith(part) for name in trained) for part in ("hidden", "top_k", "gate_up", "down")]
        assert list(call["needs"]) == asked


@each_case({name: CASES[name] for name in ("masked_slots", "many_rows_of_all_widths", "large_odd_sizes")})
def test_inference_equals_the_forward_of_training(case, device):
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = {"output": run(layer, inputs)["output"].cpu()}
    arguments = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
    with Recorder() as operators:
        with torch.no_grad():
            assert_close({"output": layer(*arguments)}, expected)
        with torch.inference_mode():
            assert_close({"output": layer(*arguments)}, expected)
        for parameter in layer.parameters().values():
            parameter.requires_grad_(False)
        output = layer(*arguments)
        assert_close({"output": output}, expected)
        assert not output.requires_grad
    assert not any(call["save"] for call in operators.named("swiglu_experts")), "keeps what only a backward needs"


FEW_TOKENS = ("odd_widths", "one_token_and_slot", "large_even_sizes", "one_token_on_experts_without_weights")


@each_case({name: CASES[name] for name in FEW_TOKENS})
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_inference_of_few_tokens(case, device, dtype):
    """Decoding may take a path of its own."""
    layer = make_layer(case, device, dtype)
    parameters = {name: parameter.detach().cpu().double() for name, parameter in layer.parameters().items()}
    for tokens in (1, 5, 17) if case.interpreted else (1, 2, 8, 16, 33):
        inputs = make_inputs(replace(case, tokens=tokens, masked=0.2), device, dtype)
        arguments = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
        with torch.no_grad():
            x, index, weights = (argument.cpu() for argument in arguments)
            expected = reference(case, parameters, x.double(), index, weights.double())
            assert_close({"output": layer(*arguments)}, {"output": expected}, dtype)


@each_implementation
def test_experts_computed_from_other_tensors(device):
    """Gradients pass on through experts that are no leaves."""
    case = SMALL
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run_reference(case, layer, inputs)
    halves = {name: (p.detach() * 2).requires_grad_() for name, p in layer.parameters().items()}
    derived = {name: half * 0.5 for name, half in halves.items()}
    computed = replace(
        layer,
        gate_up=[p for name, p in derived.items() if name.startswith("gate_up")],
        down=[p for name, p in derived.items() if name.startswith("down")],
    )
    actual = forward_and_backward(computed, halves, inputs)
    assert_close(actual, {name: x * (0.5 if name[2:] in halves else 1) for name, x in expected.items()})


@each_implementation
def test_gradients_accumulate(device):
    case = SMALL
    layer = make_layer(case, device)
    batches = [
        make_inputs(replace(case, allowed=allowed), device, seed=seed) for seed, allowed in enumerate([None, (0, 2)])
    ]
    expected = [run_reference(case, layer, inputs) for inputs in batches]
    for inputs in batches:
        layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights).backward(inputs.grad_output)
    actual = {f"d {name}": parameter.grad for name, parameter in layer.parameters().items()}
    assert_close(actual, {name: expected[0][name] + expected[1][name] for name in actual})


@each_implementation
def test_same_experts_twice_in_a_row(device):
    case = SMALL
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    parameters = {name: p.detach().cpu().double().requires_grad_() for name, p in layer.parameters().items()}

    def twice(function, x, index, weights):
        return function(function(x, index, weights), index.flip(0), weights.flip(0))

    tensors = {name: x.cpu() if name == "top_k_index" else x.cpu().double() for name, x in inputs.tensors().items()}
    expected = forward_and_backward(
        partial(twice, partial(reference, case, parameters)), parameters, Inputs(**tensors)
    )
    assert_close(forward_and_backward(partial(twice, layer), layer.parameters(), inputs), expected)


@each_implementation
def test_second_forward_before_the_first_backward(device):
    cases = [replace(SMALL, masked=0.2), Case(counts=(2, 1), widths=(8, 20), ids="interleaved", top_k=2)]
    layers = [make_layer(case, device, seed=seed) for seed, case in enumerate(cases)]
    batches = [make_inputs(case, device, seed=seed) for seed, case in enumerate(cases, start=10)]
    outputs, tensors = [], []
    for layer, inputs in zip(layers, batches, strict=True):
        x, weights = inputs.hidden_states.requires_grad_(), inputs.top_k_weights.requires_grad_()
        outputs.append(layer(x, inputs.top_k_index, weights))
        tensors.append({"hidden_states": x, "top_k_weights": weights, **layer.parameters()})
    for case, layer, inputs, output, named in zip(cases, layers, batches, outputs, tensors, strict=True):
        gradients = torch.autograd.grad(output, list(named.values()), inputs.grad_output)
        actual = {"output": output.detach()} | {f"d {name}": g for name, g in zip(named, gradients, strict=True)}
        assert_close(actual, run_reference(case, layer, inputs))


@each_implementation
def test_checkpointing_changes_nothing(device):
    case = replace(SMALL, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    checkpointed = partial(checkpoint, layer, use_reentrant=False)
    assert_equal(forward_and_backward(checkpointed, layer.parameters(), inputs), run(layer, inputs))


@each_implementation
def test_backward_of_a_retained_graph_repeats(device):
    case = replace(SMALL, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    x, weights = inputs.hidden_states.requires_grad_(), inputs.top_k_weights.requires_grad_()
    output = layer(x, inputs.top_k_index, weights)
    wanted = [x, weights, *layer.parameters().values()]
    first, second = (torch.autograd.grad(output, wanted, inputs.grad_output, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    doubled = torch.autograd.grad(output, wanted, 2 * inputs.grad_output)
    for a, b in zip(first, doubled, strict=True):
        torch.testing.assert_close(2 * a, b)
