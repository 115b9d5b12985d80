"""The custom operators as PyTorch sees them: opcheck and torch.compile."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from kernel_cases import (
    CASES,
    ON_GPU,
    SMALL,
    Case,
    assert_close,
    assert_equal,
    each_case,
    each_implementation,
    forward_and_backward,
    make_inputs,
    make_layer,
    run,
    run_reference,
)
from torch._dynamo.testing import CompileCounterWithBackend


CHECKED = {
    "unequal_widths": SMALL,
    "odd_sizes": replace(SMALL, widths=(5, 7, 21), hidden_size=19),
    "masked_slots_and_empty_group": replace(SMALL, masked=0.4, masked_weight=0.7, allowed=(0, 2, 3)),
    "interleaved_ids": replace(SMALL, ids="interleaved", spare_keys=1),
}
# What lies in `pre` and `order` beyond the counted pairs is not specified, so that these outputs cannot be compared
# with those of a second call; the tests of torch.compile below compare what is made of them.
WITHOUT_VALUES = ("test_schema", "test_autograd_registration", "test_faketensor")
EVERY_TEST = (*WITHOUT_VALUES, "test_aot_dispatch_dynamic")
EVERY_PATTERN = [list(needs) for needs in itertools.product([False, True], repeat=4) if any(needs)]


def forward_arguments(case: Case, device: str, dtype: torch.dtype, save: bool, weights_dtype=None) -> tuple:
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype, weights_dtype)
    key_of_expert, keys_per_group = case.keys()
    return (
        inputs.hidden_states,
        [x.detach() for x in layer.gate_up],
        [x.detach() for x in layer.down],
        inputs.top_k_index,
        torch.tensor(key_of_expert, device=device),
        inputs.top_k_weights,
        keys_per_group,
        save,
    )


def backward_arguments(case: Case, device: str, dtype: torch.dtype, needs: list[bool]) -> tuple:
    arguments = forward_arguments(case, device, dtype, save=True)
    hidden_states, gate_up, down, _, _, weights, keys_per_group, _ = arguments
    _, *saved = torch.ops.mohge_kernels.swiglu_experts(*arguments)
    grad_output = make_inputs(case, device, dtype).grad_output
    return grad_output, hidden_states, gate_up, down, weights, *saved, keys_per_group, needs


def short(needs: list[bool]) -> str:
    return "_".join(
        name for name, needed in zip(("hidden", "weights", "gate_up", "down"), needs, strict=True) if needed
    )


@each_implementation
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CHECKED), ("odd_sizes", torch.bfloat16)],
    ids=[*CHECKED, "odd_sizes_bfloat16"],
)
def test_forward_passes_opcheck(name, dtype, device):
    hidden_states, gate_up, down, index, keys, weights, *rest = forward_arguments(CHECKED[name], device, dtype, True)
    hidden_states, weights = hidden_states.requires_grad_(), weights.requires_grad_()
    gate_up, down = ([x.requires_grad_() for x in matrices] for matrices in (gate_up, down))
    arguments = hidden_states, gate_up, down, index, keys, weights, *rest
    torch.library.opcheck(torch.ops.mohge_kernels.swiglu_experts, arguments, test_utils=WITHOUT_VALUES)


@each_implementation
@pytest.mark.parametrize("save", [True, False], ids=["save", "no_save"])
@pytest.mark.parametrize("name", ["unequal_widths", "masked_slots_and_empty_group"])
def test_forward_without_gradients_passes_opcheck(name, save, device):
    case = CHECKED[name]
    arguments = forward_arguments(case, device, torch.float32, save)
    tests = WITHOUT_VALUES if save or case.masked else EVERY_TEST
    torch.library.opcheck(torch.ops.mohge_kernels.swiglu_experts, arguments, test_utils=tests)


@each_implementation
def test_forward_with_strided_inputs_passes_opcheck(device):
    arguments = list(
        forward_arguments(CHECKED["masked_slots_and_empty_group"], device, torch.bfloat16, True, torch.float32)
    )
    for i in (0, 3, 5):
        arguments[i] = arguments[i].t().contiguous().t()
    torch.library.opcheck(torch.ops.mohge_kernels.swiglu_experts, tuple(arguments), test_utils=WITHOUT_VALUES)


@pytest.mark.parametrize(
    ("device", "needs"),
    [
        pytest.param(implementation, needs, marks=marks, id=f"{implementation}-{short(needs)}")
        for implementation, marks in (("cpu", ()), ("interpreter", ()), ("cuda", ON_GPU))
        for needs in EVERY_PATTERN
        if implementation != "interpreter" or sum(needs) == 1
    ],
    indirect=["device"],
)
def test_backward_passes_opcheck(needs, device):
    arguments = backward_arguments(CHECKED["masked_slots_and_empty_group"], device, torch.float32, needs)
    torch.library.opcheck(torch.ops.mohge_kernels.swiglu_experts_backward, arguments)


@each_implementation
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("unequal_widths", torch.float32), ("odd_sizes", torch.bfloat16)],
    ids=["unequal_widths", "odd_sizes_bfloat16"],
)
def test_backward_of_everything_passes_opcheck(name, dtype, device):
    arguments = backward_arguments(CHECKED[name], device, dtype, [True] * 4)
    torch.library.opcheck(torch.ops.mohge_kernels.swiglu_experts_backward, arguments)


@each_implementation
def test_backward_returns_what_is_needed(device):
    case = CHECKED["masked_slots_and_empty_group"]
    *arguments, everything = backward_arguments(case, device, torch.float32, [True] * 4)
    groups = len(case.counts)
    expected = torch.ops.mohge_kernels.swiglu_experts_backward(*arguments, everything)
    assert len(expected) == 2 + 2 * groups
    for needs in EVERY_PATTERN:
        wanted = [needs[0], needs[1], *[needs[2]] * groups, *[needs[3]] * groups]
        actual = torch.ops.mohge_kernels.swiglu_experts_backward(*arguments, needs)
        assert_equal(dict(enumerate(actual)), dict(enumerate(itertools.compress(expected, wanted))))


# torch.compile


COMPILED = ("odd_everything", "empty_middle_group", "masked_slots", "shuffled_ids", "experts_without_weights")
COMPILED = {name: replace(CASES[name], interpreted=name == "shuffled_ids") for name in COMPILED}


@pytest.mark.usefixtures("fresh_compiler")
@each_case(COMPILED)
def test_compiled_equals_eager_mode(case, device):
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual = forward_and_backward(compiled, layer.parameters(), inputs)
    assert_equal(actual, run(layer, inputs))
    assert_close(actual, run_reference(case, layer, inputs))


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
def test_one_graph_for_any_number_of_tokens_and_any_traffic(device):
    case = SMALL
    layer = make_layer(case, device)
    run(layer, make_inputs(case, device))  # what is loaded at the first call is loaded
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    calls = [
        replace(case, tokens=9),
        replace(case, tokens=5, allowed=(0, 3)),
        replace(case, tokens=17, masked=0.4),
        replace(case, tokens=2),
        replace(case, tokens=19, allowed=(2, 3)),
        replace(case, tokens=9, masked=1.0),
    ]

    def function(hidden_states, top_k_index, top_k_weights):
        for tensor in (hidden_states, top_k_index, top_k_weights):
            torch._dynamo.mark_dynamic(tensor, 0)
        return compiled(hidden_states, top_k_index, top_k_weights)

    for seed, call in enumerate(calls):
        inputs = make_inputs(call, device, seed=seed)
        actual = forward_and_backward(function, layer.parameters(), inputs)
        assert_close(actual, run_reference(case, layer, inputs))
    assert backend.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
def test_compiled_for_other_numbers_of_tokens(device):
    """Sizes that the compiler treats apart: none and one."""
    case = SMALL
    layer = make_layer(case, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (7, 1, 11, 0):
        inputs = make_inputs(replace(case, tokens=tokens), device)
        actual = forward_and_backward(compiled, layer.parameters(), inputs)
        assert_equal(actual, run(layer, inputs))


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
def test_compiled_without_gradients(device):
    case = replace(SMALL, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    arguments = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), layer(*arguments))


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
def test_compiled_with_frozen_experts(device):
    case = replace(SMALL, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run_reference(case, layer, inputs)["d hidden_states"]
    for parameter in layer.parameters().values():
        parameter.requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden_states = inputs.hidden_states.requires_grad_()
    compiled(hidden_states, inputs.top_k_index, inputs.top_k_weights).backward(inputs.grad_output)
    assert_close({"d hidden_states": hidden_states.grad}, {"d hidden_states": expected})


def block(layer, hidden_states, top_k_index, top_k_weights):
    """What surrounds the experts in a model, for the compiler to work on."""
    normed = hidden_states * hidden_states.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    weights = top_k_weights / top_k_weights.sum(-1, keepdim=True)
    return hidden_states + layer(normed, top_k_index, weights)


@pytest.mark.usefixtures("fresh_compiler")
@each_implementation
def test_compiled_by_inductor(device):
    case = CASES["empty_middle_group"]
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    function = partial(block, layer)
    expected = forward_and_backward(function, layer.parameters(), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="inductor")
    # A cached graph would still have the sizes that the operators had when it was compiled; the code in C++ may be
    # that of another case or run.
    autograd_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with autograd_cache, torch._inductor.config.patch(fx_graph_cache=False):
        actual = forward_and_backward(compiled, layer.parameters(), inputs)
    assert_close(actual, {name: value.cpu() for name, value in expected.items()})
