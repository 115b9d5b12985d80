"""`swiglu_experts` of every implementation: output and every gradient against a dense float64 reference."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CASES,
    NARROW,
    SMALL,
    TOLERANCES,
    Case,
    assert_close,
    assert_equal,
    check,
    dtype_name,
    each_case,
    each_implementation,
    make_inputs,
    make_layer,
    run,
    run_reference,
)

from mohge_kernels import swiglu_experts


# The reference and the comparison


def test_reference_is_the_formula():
    case = Case(counts=(1, 2), widths=(2, 3), hidden_size=2, tokens=4, top_k=2, masked=0.2, ids="interleaved")
    layer, inputs = make_layer(case), make_inputs(case)
    expected = torch.zeros(case.tokens, case.hidden_size)
    for t, x in enumerate(inputs.hidden_states.tolist()):
        for expert, weight in zip(inputs.top_k_index[t].tolist(), inputs.top_k_weights[t].tolist(), strict=True):
            if expert == case.num_experts:
                continue
            group, i = case.places()[expert]
            gate_up, down = layer.gate_up[group][i].tolist(), layer.down[group][i].tolist()
            width = case.widths[group]
            for w in range(width):
                gate, up = (
                    sum(a * b for a, b in zip(row, x, strict=True)) for row in (gate_up[w], gate_up[width + w])
                )
                for h in range(case.hidden_size):
                    expected[t, h] += weight * down[h][w] * gate / (1 + math.exp(-gate)) * up
    assert_close({"output": run_reference(case, layer, inputs)["output"]}, {"output": expected.double()})


def test_reference_is_not_trivial():
    """What the comparisons show: gradients of used experts are not zero, those of the others are."""
    case = CASES["masked_slots_and_empty_group"]
    layer, inputs = make_layer(case), make_inputs(case)
    expected = run_reference(case, layer, inputs)
    masked = inputs.top_k_index == case.num_experts
    assert masked.any()
    assert (expected["d top_k_weights"][masked] == 0).all()
    assert (expected["d top_k_weights"][~masked].abs() > 1e-4).all()
    for matrix in ("gate_up", "down"):
        for group, used in enumerate([True, False, True]):
            magnitude = expected[f"d {matrix}[{group}]"].abs().amax((1, 2))
            assert ((magnitude > 1e-2) if used else (magnitude == 0)).all()


def zero_everything(result):
    return {name: torch.zeros_like(value) for name, value in result.items()}


def zero_the_output(result):
    return {**result, "output": torch.zeros_like(result["output"])}


def zero_half_of_the_output(result):
    half = result["output"].clone()
    half[: len(half) // 2] = 0
    return {**result, "output": half}


def one_nan(result):
    value = result["d down[1]"].clone()
    value[0, 0, 0] = math.nan
    return {**result, "d down[1]": value}


def zero_one_expert(result):
    value = result["d gate_up[2]"].clone()
    value[2] = 0
    return {**result, "d gate_up[2]": value}


def swap_gate_and_up(result):
    return {**result, "d gate_up[2]": result["d gate_up[2]"].roll(20, 1)}


def one_percent_off(result):
    return {**result, "d hidden_states": result["d hidden_states"] * 1.01}


def one_wrong_value(result):
    value = result["d top_k_weights"].clone()
    value.view(-1)[value.abs().argmax()] *= 1.1
    return {**result, "d top_k_weights": value}


def noise_in_an_empty_expert(result):
    value = result["d down[1]"].clone()
    value[1, 2, 3] = 1e-30
    return {**result, "d down[1]": value}


def missing_gradient(result):
    return {name: value for name, value in result.items() if name != "d down[2]"}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=dtype_name)
@pytest.mark.parametrize(
    "damage",
    [
        zero_everything,
        zero_the_output,
        zero_half_of_the_output,
        one_nan,
        zero_one_expert,
        swap_gate_and_up,
        one_wrong_value,
        noise_in_an_empty_expert,
        missing_gradient,
        one_percent_off,
    ],
)
def test_comparison_notices(damage, dtype):
    if damage is one_percent_off and dtype == torch.bfloat16:
        pytest.skip("within the rounding of bfloat16")
    case = Case(allowed=(0, 1, 3, 4, 5))
    expected = run_reference(case, make_layer(case), make_inputs(case))
    assert_close(expected, expected, dtype)
    with pytest.raises(AssertionError):
        assert_close(damage(expected), expected, dtype)


# Edges


@each_case(CASES)
def test_output_and_every_gradient_match_the_reference(case, device):
    check(case, device)


HALF_PRECISION = {
    name: CASES[name]
    for name in (
        "unequal_widths_and_counts",
        "odd_everything",
        "wider_than_128",
        "widths_below_at_and_beyond_128",
        "masked_slots_with_weight",
    )
} | {
    name: replace(CASES[name], interpreted=False)
    for name in ("many_rows_per_expert", "empty_middle_group", "interleaved_ids", "large_even_sizes")
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
@each_case(HALF_PRECISION)
def test_half_precision_is_close_to_the_reference(case, device, dtype):
    check(case, device, dtype)


@each_case({name: CASES[name] for name in ("unequal_widths_and_counts", "large_odd_sizes")})
def test_float32_weights_with_bfloat16_experts(case, device):
    check(case, device, torch.bfloat16, weights_dtype=torch.float32)


@each_implementation
def test_first_half_of_gate_up_is_the_gate(device):
    one = torch.ones(1, 1, device=device)
    gate_up, down = torch.tensor([[[2.0], [3.0]]], device=device), torch.tensor([[[5.0]]], device=device)
    output = swiglu_experts(one, [gate_up], [down], torch.zeros_like(one, dtype=torch.long), 0.5 * one)
    assert output.item() == pytest.approx(5 * (2 / (1 + math.exp(-2)) * 3) * 0.5, rel=1e-6)


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCES, ids=dtype_name)
def test_no_tokens(device, dtype):
    layer = make_layer(Case(), device, dtype)
    result = run(layer, make_inputs(Case(tokens=0), device, dtype))
    assert result["output"].shape == (0, 20)
    assert result["output"].dtype == dtype
    assert result["d top_k_weights"].shape == (0, 3)
    assert all((gradient == 0).all() for gradient in result.values())
    with torch.no_grad():
        inputs = make_inputs(Case(tokens=0), device, dtype)
        assert layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights).shape == (0, 20)


@each_implementation
def test_ids_number_the_experts_group_by_group_by_default(device):
    case = replace(NARROW, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    keys, keys_per_group = case.keys()
    assert keys == [0, 3, 4, 6, 7, 8]
    given = replace(layer, key_of_expert=torch.tensor(keys, device=device), keys_per_group=keys_per_group)
    assert_equal(run(given, inputs), run(layer, inputs))


@each_implementation
def test_order_of_the_ids_is_only_a_name(device):
    """The same experts under other ids and keys, in the same slots, give the same result."""
    shuffled, by_group = Case(ids="shuffled", spare_keys=3), Case()
    inputs = make_inputs(shuffled, device)
    renumbered = [by_group.places().index(place) for place in shuffled.places()]
    renamed = replace(inputs, top_k_index=torch.tensor(renumbered, device=device)[inputs.top_k_index])
    expected = run_reference(by_group, make_layer(by_group, device), renamed)
    assert_close(run(make_layer(shuffled, device), inputs), expected)


@each_implementation
def test_token_whose_slots_are_all_skipped_may_hold_anything(device):
    case = replace(SMALL, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    skipped = [0, 3, case.tokens - 1]
    inputs.top_k_index[skipped] = case.num_experts
    inputs.hidden_states[skipped] = math.nan
    inputs.grad_output[skipped] = math.inf
    assert_close(run(layer, inputs), run_reference(case, layer, inputs))


@each_implementation
def test_token_that_is_not_finite_changes_no_other_token(device):
    case = NARROW
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run_reference(case, layer, inputs)
    inputs.hidden_states[[0, 4]] = math.nan
    actual = run(layer, inputs)
    others = [t for t in range(case.tokens) if t not in (0, 4)]
    names = ("output", "d hidden_states", "d top_k_weights")
    assert_close({name: actual[name][others] for name in names}, {name: expected[name][others] for name in names})
    assert actual["output"][[0, 4]].isnan().all()


@each_implementation
def test_scaling_the_weights_scales_all_but_their_own_gradient(device):
    case = replace(SMALL, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run(layer, inputs)
    scaled = run(layer, replace(inputs, top_k_weights=inputs.top_k_weights * -3))
    expected = {name: x.cpu() * (1 if name == "d top_k_weights" else -3) for name, x in expected.items()}
    assert_close(scaled, expected)


@each_implementation
def test_output_is_the_sum_over_the_slots(device):
    case = SMALL
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    x, index, weights = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
    parts = [layer(x, index[:, [k]], weights[:, [k]]).detach() for k in range(case.top_k)]
    assert_close({"output": layer(x, index, weights).detach()}, {"output": sum(parts).cpu()})
