"""Bad input ends, before anything runs, in one line that names the argument and says what to do."""

import re
from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, Layer, Recorder, assert_equal, each_implementation, make_inputs, make_layer, run


CASE = Case(tokens=5)
OUT_OF_RANGE = [-1, 10, 2**31 - 1, -(2**31), 2**32 + 1]
REMEDY = re.compile(
    r"\b(pass|give|use|call|convert|cast|move|copy|make|set|stack|keep|choose|needs?|must|should|expected|contiguous\(\))\b"
    r"|\.(to|contiguous|long|float)\(",
    re.IGNORECASE,
)


def changed(tensors: list, group: int, function) -> list:
    return [function(x.detach()) if i == group else x.detach() for i, x in enumerate(tensors)]


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def first_rows(number: int):
    return lambda x: x[:, :number].contiguous()


# name -> names of the arguments one of which the error must hold, and the change that makes a valid call wrong
BAD_INPUTS = {
    "hidden_states_float64": ("hidden_states", lambda a: {"hidden_states": a["hidden_states"].double()}),
    "hidden_states_integer": ("hidden_states", lambda a: {"hidden_states": a["hidden_states"].long()}),
    "everything_float64": (
        "hidden_states|gate_up|down",
        lambda a: {
            "hidden_states": a["hidden_states"].double(),
            "gate_up": [x.double() for x in a["gate_up"]],
            "down": [x.double() for x in a["down"]],
            "top_k_weights": a["top_k_weights"].double(),
        },
    ),
    "hidden_states_of_another_dtype": (
        "hidden_states|gate_up",
        lambda a: {"hidden_states": a["hidden_states"].bfloat16()},
    ),
    "gate_up_of_another_dtype": ("gate_up", lambda a: {"gate_up": changed(a["gate_up"], 1, torch.Tensor.bfloat16)}),
    "down_of_another_dtype": ("down", lambda a: {"down": changed(a["down"], 2, torch.Tensor.half)}),
    "weights_integer": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"].long()}),
    "weights_float64": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"].double()}),
    "weights_narrower_than_the_model": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"].half()}),
    "index_float": ("top_k_index", lambda a: {"top_k_index": a["top_k_index"].float()}),
    "index_bool": ("top_k_index", lambda a: {"top_k_index": a["top_k_index"] > 2}),
    "gate_up_on_another_device": ("gate_up", lambda a: {"gate_up": changed(a["gate_up"], 1, lambda x: x.to("meta"))}),
    "down_on_another_device": ("down", lambda a: {"down": changed(a["down"], 2, lambda x: x.to("meta"))}),
    "index_on_another_device": ("top_k_index", lambda a: {"top_k_index": a["top_k_index"].to("meta")}),
    "weights_on_another_device": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"].to("meta")}),
    "hidden_states_on_another_device": (
        "hidden_states|gate_up",
        lambda a: {"hidden_states": a["hidden_states"].to("meta")},
    ),
    "key_of_expert_on_another_device": (
        "key_of_expert",
        lambda a: {"key_of_expert": torch.tensor(CASE.keys()[0], device="meta"), "keys_per_group": CASE.keys()[1]},
    ),
    "down_narrower_than_gate_up": ("gate_up|down", lambda a: {"gate_up": changed(a["gate_up"], 2, first_rows(38))}),
    "odd_number_of_rows_in_gate_up": ("gate_up", lambda a: {"gate_up": changed(a["gate_up"], 2, first_rows(39))}),
    "gate_up_of_another_hidden_size": (
        "gate_up",
        lambda a: {"gate_up": changed(a["gate_up"], 0, lambda x: x[..., :19].contiguous())},
    ),
    "down_of_another_hidden_size": ("down", lambda a: {"down": changed(a["down"], 1, first_rows(19))}),
    "hidden_states_of_another_size": (
        "hidden_states|gate_up",
        lambda a: {"hidden_states": a["hidden_states"][:, :19].contiguous()},
    ),
    "one_group_fewer_in_down": ("gate_up|down", lambda a: {"down": a["down"][:2]}),
    "one_group_fewer_in_gate_up": ("gate_up|down", lambda a: {"gate_up": a["gate_up"][1:]}),
    "one_expert_fewer_in_down": (
        "gate_up|down",
        lambda a: {"down": changed(a["down"], 1, lambda x: x[:1].contiguous())},
    ),
    "no_groups": ("gate_up|down", lambda a: {"gate_up": [], "down": []}),
    "gate_up_with_two_dimensions": ("gate_up", lambda a: {"gate_up": changed(a["gate_up"], 0, lambda x: x[0])}),
    "down_with_two_dimensions": ("down", lambda a: {"down": changed(a["down"], 0, lambda x: x[0])}),
    "hidden_states_with_three_dimensions": ("hidden_states", lambda a: {"hidden_states": a["hidden_states"][None]}),
    "index_with_one_dimension": ("top_k_index", lambda a: {"top_k_index": a["top_k_index"][:, 0]}),
    "index_of_fewer_tokens": (
        "top_k_index|top_k_weights",
        lambda a: {"top_k_index": a["top_k_index"][1:], "top_k_weights": a["top_k_weights"][1:]},
    ),
    "weights_of_fewer_tokens": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"][1:]}),
    "weights_of_fewer_slots": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"][:, 1:]}),
    "weights_transposed": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"].t()}),
    "weights_of_one_slot_to_broadcast": ("top_k_weights", lambda a: {"top_k_weights": a["top_k_weights"][:, :1]}),
    "gate_up_not_contiguous": ("gate_up", lambda a: {"gate_up": changed(a["gate_up"], 1, strided)}),
    "down_not_contiguous": ("down", lambda a: {"down": changed(a["down"], 0, strided)}),
    "down_slice_of_a_wider_tensor": (
        "down",
        lambda a: {"down": changed(a["down"], 2, lambda x: torch.cat([x, x], 2)[..., :20])},
    ),
}


def make_arguments() -> tuple[Layer, dict]:
    layer, inputs = make_layer(CASE), make_inputs(CASE)
    arguments = inputs.tensors()
    del arguments["grad_output"]
    return layer, {**arguments, "gate_up": layer.gate_up, "down": layer.down}


@pytest.mark.parametrize("device", ["cpu", "interpreter"], indirect=True)
@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name, device, launches):
    named, change = BAD_INPUTS[name]
    _, arguments = make_arguments()
    arguments.update(change(arguments))
    layer = Layer(
        arguments.pop("gate_up"),
        arguments.pop("down"),
        arguments.pop("key_of_expert", None),
        arguments.pop("keys_per_group", None),
    )
    with Recorder() as operators, pytest.raises(ValueError, match=rf"\b({named})\b") as error:
        layer(**arguments)
    assert "\n" not in str(error.value).strip()
    assert REMEDY.search(str(error.value)), f"no remedy in: {error.value}"
    assert not operators.calls
    assert not launches


@pytest.mark.parametrize("device", ["cpu", "interpreter"], indirect=True)
def test_the_call_that_the_bad_inputs_change_is_valid(device):
    layer, arguments = make_arguments()
    del arguments["gate_up"], arguments["down"]
    with Recorder() as operators:
        assert layer(**arguments).shape == arguments["hidden_states"].shape
    assert operators.calls


@each_implementation
@pytest.mark.parametrize("id", OUT_OF_RANGE)
@pytest.mark.parametrize("given_keys", [False, True], ids=["default_keys", "given_keys"])
def test_ids_out_of_range_are_refused_in_debug_mode(id, given_keys, device, monkeypatch):
    case = replace(CASE, ids="interleaved" if given_keys else "by_group")
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    inputs.top_k_index[3, 1] = id
    monkeypatch.setenv("MOHGE_KERNELS_DEBUG", "1")
    with Recorder() as operators, pytest.raises(ValueError, match=r"\btop_k_index\b") as error:
        layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    assert "\n" not in str(error.value).strip()
    assert not operators.calls


@each_implementation
@pytest.mark.parametrize("debug", [None, "0"])
def test_ids_out_of_range_are_skipped_otherwise(debug, device, monkeypatch):
    if debug is not None:
        monkeypatch.setenv("MOHGE_KERNELS_DEBUG", debug)
    layer, inputs = make_layer(CASE, device), make_inputs(CASE, device)
    skipped = inputs.top_k_index.clone()
    inputs.top_k_index[:, 1], skipped[:, 1] = torch.tensor(OUT_OF_RANGE, device=device), CASE.num_experts
    assert_equal(run(layer, inputs), run(layer, replace(inputs, top_k_index=skipped)))


@each_implementation
def test_valid_ids_pass_in_debug_mode(device, monkeypatch):
    """The id that equals the number of experts is valid too: expert parallelism masks slots so. And so is the key
    behind the last, of experts without weights."""
    case = replace(CASE, masked=0.3, removed=2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    assert (inputs.top_k_index == case.num_experts).any()
    expected = run(layer, inputs)
    monkeypatch.setenv("MOHGE_KERNELS_DEBUG", "1")
    assert_equal(run(layer, inputs), expected)
    empty = make_inputs(replace(CASE, tokens=0), device)
    assert layer(empty.hidden_states, empty.top_k_index, empty.top_k_weights).shape == (0, 20)


@pytest.mark.parametrize("device", ["cpu", "interpreter"], indirect=True)
@pytest.mark.parametrize("key", [-1, 1, 10, 99])
def test_keys_of_no_expert_are_refused_in_debug_mode(key, device, monkeypatch):
    case = replace(CASE, ids="interleaved")  # groups of 1, 2 and 3, three keys each: 1 is a place that group 0 lacks
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    layer.key_of_expert[5] = key
    monkeypatch.setenv("MOHGE_KERNELS_DEBUG", "1")
    with Recorder() as operators, pytest.raises(ValueError, match=r"\bkey_of_expert\b") as error:
        layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    assert REMEDY.search(str(error.value))
    assert not operators.calls
