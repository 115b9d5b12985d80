"""`swiglu_experts` on inputs of any layout and type, and what surrounds a call."""

import copy
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CASES,
    NARROW,
    SMALL,
    Case,
    Inputs,
    assert_close,
    assert_equal,
    dtype_name,
    each_case,
    each_implementation,
    make_inputs,
    make_layer,
    run,
    run_reference,
)


# Layout and type of the inputs


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def every_second_column(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, 77)], -1).flatten(1)[:, ::2]


def every_second_row(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, 77)], 1).flatten(0, 1)[::2]


def part_of_wider_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(x, 77), x, torch.full_like(x, 77)], 1)[:, x.shape[1] : 2 * x.shape[1]]


def one_row_for_all(x: torch.Tensor) -> torch.Tensor:
    return x[:1].expand(len(x), -1)


def unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_full((1,), 77), x.flatten()])[1:].view(x.shape)


LAYOUTS = [transposed, every_second_column, every_second_row, part_of_wider_rows, one_row_for_all, unaligned]


@each_case({"masked_slots": replace(SMALL, masked=0.2)})
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_inputs(layout, case, device):
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    inputs = Inputs(**{name: layout(tensor) for name, tensor in inputs.tensors().items()})
    assert layout is unaligned or not any(tensor.is_contiguous() for tensor in inputs.tensors().values())
    assert_close(run(layer, inputs), run_reference(case, layer, inputs))


@each_case({"masked_slots": Case(masked=0.2, interpreted=False)})
@pytest.mark.parametrize("argument", ["hidden_states", "top_k_index", "top_k_weights", "grad_output"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_one_of_the_inputs(layout, argument, case, device):
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    inputs = replace(inputs, **{argument: layout(getattr(inputs, argument))})
    assert_close(run(layer, inputs), run_reference(case, layer, inputs))


@each_implementation
@pytest.mark.parametrize("layout", [transposed, every_second_column, unaligned])
def test_layout_of_the_inputs_in_bfloat16(layout, device):
    case, dtype = replace(SMALL, masked=0.2), torch.bfloat16
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype)
    inputs = Inputs(**{name: layout(tensor) for name, tensor in inputs.tensors().items()})
    assert_close(run(layer, inputs), run_reference(case, layer, inputs), dtype)


@each_implementation
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_expanded_gradient(device, reduction):
    case = replace(SMALL, masked=0.2)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    x, weights = inputs.hidden_states.requires_grad_(), inputs.top_k_weights.requires_grad_()
    getattr(layer(x, inputs.top_k_index, weights), reduction)().backward()
    scale = 1.0 if reduction == "sum" else 1 / x.numel()
    expected = run_reference(case, layer, replace(inputs, grad_output=torch.full_like(x, scale)))
    del expected["output"]
    tensors = {"hidden_states": x, "top_k_weights": weights, **layer.parameters()}
    assert_close({f"d {name}": tensor.grad for name, tensor in tensors.items()}, expected)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_experts_that_are_views_of_one_buffer(device, dtype):
    """Contiguous, but at any offset."""
    case = Case(counts=(2, 3), widths=(7, 19), hidden_size=33)
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype)
    expected = run_reference(case, layer, inputs)
    buffer = torch.cat([torch.full((1,), 77.0), *(p.detach().flatten().cpu() for p in layer.parameters().values())])
    start, views = 1, []
    for tensor in layer.parameters().values():
        views.append(buffer.to(device, dtype)[start : start + tensor.numel()].view(tensor.shape).requires_grad_())
        start += tensor.numel()
    assert_close(run(replace(layer, gate_up=views[:2], down=views[2:]), inputs), expected, dtype)


@each_implementation
@pytest.mark.parametrize("name", ["negative_ids", "shuffled_ids"])
def test_int32_index(device, name):
    case = replace(CASES[name], widths=NARROW.widths, hidden_size=NARROW.hidden_size)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run(layer, inputs)
    assert_equal(run(layer, replace(inputs, top_k_index=inputs.top_k_index.int())), expected)


@each_implementation
def test_inputs_are_not_changed(device):
    case = CASES["masked_slots_with_weight"]
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    before = copy.deepcopy((inputs.tensors(), {name: p.detach() for name, p in layer.parameters().items()}))
    run(layer, inputs)
    for tensors, copies in zip((inputs.tensors(), layer.parameters()), before, strict=True):
        assert_equal(tensors, copies)


@each_implementation
def test_tuples_of_experts(device):
    case = SMALL
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run(layer, inputs)
    assert_equal(run(replace(layer, gate_up=tuple(layer.gate_up), down=tuple(layer.down)), inputs), expected)


# What surrounds a call


@each_implementation
def test_autocast_changes_nothing(device):
    case = Case(tokens=1)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    expected = run(layer, inputs)
    with torch.autocast(device, torch.bfloat16):
        assert_equal(run(layer, inputs), expected)
        with torch.no_grad():
            output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    assert output.dtype == torch.float32
    assert_close({"output": output}, {"output": expected["output"].double()})


@each_implementation
@pytest.mark.parametrize("tokens", [1, 3])
def test_inference_of_tokens_whose_slots_are_all_skipped(tokens, device):
    """As on a rank that is chosen by none of a batch, under expert parallelism by all-reduce."""
    layer, inputs = make_layer(Case(), device), make_inputs(replace(Case(), tokens=tokens), device)
    inputs.top_k_index.fill_(Case().num_experts)
    with torch.no_grad():
        output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    assert output.shape == inputs.hidden_states.shape
    assert not output.any()


@each_implementation
def test_no_slots(device):
    layer, inputs = make_layer(Case(), device), make_inputs(Case(), device)
    inputs.top_k_index, inputs.top_k_weights = inputs.top_k_index[:, :0], inputs.top_k_weights[:, :0]
    for value in run(layer, inputs).values():
        assert not value.any()


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("tokens", [1, 7])
def test_default_device_does_not_matter(tokens, device):
    case = Case(tokens=tokens)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    with torch.no_grad(), torch.device("meta"):
        output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    assert_close({"output": output}, {"output": run_reference(case, layer, inputs)["output"]})


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_forward_mode_differentiation_is_refused_and_not_wrong(device):
    layer, inputs = make_layer(Case(), device), make_inputs(Case(), device)
    layer.gate_up, layer.down = ([x.detach() for x in stacks] for stacks in (layer.gate_up, layer.down))

    def function(x):
        return layer(x, inputs.top_k_index, inputs.top_k_weights)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(function, (inputs.hidden_states,), (torch.ones_like(inputs.hidden_states),))


def test_settings_of_float32_products_can_be_read(monkeypatch):
    """`allow_tf32` may not be read once the newer setting is in use, as it is with `TrainingArguments(tf32=True)`."""
    triton_experts = pytest.importorskip("mohge_kernels.triton_experts", reason="needs triton")
    layer, inputs = make_layer(Case()), make_inputs(Case())
    hidden_states = inputs.hidden_states.to("meta")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        precisions = {}
        for setting in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = setting
            made = triton_experts._Layer(
                hidden_states, [x.to("meta") for x in layer.gate_up], [x.to("meta") for x in layer.down], 4, 3
            )
            precisions[setting] = made.precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert precisions == {"ieee": "ieee", "tf32": "tf32"}
