"""What the operator `swiglu_experts` sorts and keeps, and which kernels run on it."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    CASES,
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
    on_gpu,
    run,
    run_reference,
)


# Sorting


SORTED = {name: CASES[name] for name in ("unequal_widths_and_counts", "one_token", "all_experts_for_every_token")}
SORTED |= {name: case for name, case in CASES.items() if case.masked or case.repeated or case.ids != "by_group"}
SORTED |= {
    "many_tokens": Case(tokens=3000, interpreted=False),
    "many_tokens_and_masked_slots": Case(tokens=110, masked=0.3, spare_keys=2),
    "many_keys": Case(counts=(10, 30, 15), tokens=20, top_k=8, ids="shuffled"),
    "no_tokens": Case(tokens=0),
}
# Every expert is a single tile: sorting knows nothing of sizes.
SORTED = {name: replace(case, hidden_size=4, widths=(2, 3, 4, 5)[: len(case.counts)]) for name, case in SORTED.items()}


def call_operator(layer, inputs, case: Case, save: bool) -> tuple[torch.Tensor, ...]:
    key_of_expert, keys_per_group = case.keys()
    key_of_expert = torch.tensor(key_of_expert, device=inputs.hidden_states.device)
    gate_up, down = ([x.detach() for x in matrices] for matrices in (layer.gate_up, layer.down))
    index, weights = inputs.top_k_index, inputs.top_k_weights
    return torch.ops.mohge_kernels.swiglu_experts(
        inputs.hidden_states, gate_up, down, index, key_of_expert, weights, keys_per_group, save
    )


@each_implementation
@pytest.mark.parametrize("name", ["all_slots_masked", "shuffled_ids"])
def test_operator_keeps_pre_activations_only_when_told(name, device):
    case = CASES[name]
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    output, pre, _, position, counts = call_operator(layer, inputs, case, save=True)
    same_output, no_pre, _, same_position, same_counts = call_operator(layer, inputs, case, save=False)
    assert pre.dim() == no_pre.dim() == 1
    assert no_pre.numel() == 0
    assert torch.equal(position, same_position)
    assert torch.equal(counts, same_counts)
    expected = {"output": run_reference(case, layer, inputs)["output"]}
    for value in (output, same_output):
        assert_close({"output": value}, expected)


@each_case(SORTED)
def test_pairs_are_sorted_by_key_and_stable(case, device):
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    _, _, order, position, counts = call_operator(layer, inputs, case, save=True)
    key_of_expert, keys_per_group = case.keys()
    pairs = inputs.top_k_index.numel()
    assert order.shape == (pairs,)
    assert position.shape == inputs.top_k_index.shape
    assert counts.shape == (len(case.counts) * keys_per_group,)
    assert order.dtype == position.dtype == counts.dtype == torch.int32

    key_of_id = {id: key for id, key in enumerate(key_of_expert) if key < len(counts)}
    key_of_pair = [key_of_id.get(id) for id in inputs.top_k_index.flatten().tolist()]
    expected = sorted((pair for pair, key in enumerate(key_of_pair) if key is not None), key=key_of_pair.__getitem__)
    order, position, counts = order.tolist(), position.flatten().tolist(), counts.tolist()
    assert counts == [key_of_pair.count(key) for key in range(len(counts))]
    assert order[: len(expected)] == expected
    assert all(0 <= pair < pairs for pair in order)
    assert [pair for pair in range(pairs) if position[pair] == -1] == [
        i for i, k in enumerate(key_of_pair) if k is None
    ]
    assert [position[pair] for pair in expected] == list(range(len(expected)))


# What runs


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_interpreter_runs_the_triton_kernels(device, launches):
    case = SMALL
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    forward = len(launches)
    assert forward > 0
    output.backward(inputs.grad_output)
    assert len(launches) > forward


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_cpu_runs_no_triton_kernels(device, launches):
    run(make_layer(Case()), make_inputs(Case()))
    assert not launches


@pytest.mark.usefixtures("triton_interpreter")
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_interpreter_is_chosen_at_each_call(device, launches, monkeypatch):
    layer, inputs = make_layer(SMALL), make_inputs(SMALL)
    ran = []
    for value in (None, "1", None, "0"):
        if value is None:
            monkeypatch.delenv("MOHGE_KERNELS_INTERPRET", raising=False)
        else:
            monkeypatch.setenv("MOHGE_KERNELS_INTERPRET", value)
        launches.clear()
        run(layer, inputs)
        ran.append(bool(launches))
    assert ran == [False, True, False, False]


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
@pytest.mark.parametrize(("tokens", "number"), [(8, 8), (40, 11)], ids=["few_pairs_all_saved", "many_pairs"])
def test_number_of_launches_forward_and_backward(tokens, number, device, launches):
    case = Case(tokens=tokens)
    run(make_layer(case), make_inputs(case))
    assert len(launches) == number, launches


@on_gpu
def test_no_synchronization_with_the_host(device):
    case = Case(masked=0.2, tokens=200)
    layer, inputs = make_layer(case, device, torch.bfloat16), make_inputs(case, device, torch.bfloat16)
    expected = run(layer, inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = run(layer, inputs)
        with torch.no_grad():
            output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(actual, expected)
    assert torch.equal(output, expected["output"])


@on_gpu
def test_captured_graph_follows_its_inputs(device):
    case = Case(tokens=40)
    layer, inputs = make_layer(case, device), make_inputs(case, device)
    arguments = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            output = layer(*arguments)
    for seed, other in enumerate((case, replace(case, allowed=(0, 1, 2)), replace(case, masked=1.0))):
        new = make_inputs(other, device, seed=seed)
        for tensor, value in zip(arguments, (new.hidden_states, new.top_k_index, new.top_k_weights), strict=True):
            tensor.copy_(value)
        graph.replay()
        assert_close({"output": output}, {"output": run_reference(other, layer, new)["output"]})


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_captured_forward_and_backward_follow_their_inputs(device, dtype):
    case = Case(tokens=40)
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype)
    run(layer, inputs)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        captured = run(layer, inputs)
    for seed, other in enumerate((case, replace(case, allowed=(0, 1, 2)), replace(case, masked=1.0))):
        new = make_inputs(other, device, dtype, seed=seed)
        for name, tensor in inputs.tensors().items():
            tensor.copy_(new.tensors()[name])
        graph.replay()
        assert_equal(captured, run(layer, new))


# Buffers of more than 2^31 elements


@pytest.mark.parametrize("device", ["interpreter"], indirect=True)
def test_rows_beyond_2_to_31_elements(device):
    """The kernel for what did not fit the saved pre-activations computes nothing of the expert before, which so may
    have 2^27 rows; of the buffers nothing is touched but what it computes."""
    from mohge_kernels import triton_experts

    rows, before, hidden = 3, 2**27, 16
    gate_up = [torch.randn(1, 2 * width, hidden) for width in (16, 20)]
    down = [torch.randn(1, hidden, width) for width in (16, 20)]
    x = torch.randn(2, hidden)
    layer = triton_experts._Layer(x, gate_up, down, 1, 1)
    first = 2 * before * 16
    try:
        order = torch.empty(before + rows, dtype=torch.int32)
        pre = torch.empty(first + rows * 40, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("the system gives no address space of 9 GB")
    order[before:] = torch.tensor([1, 0, 1])
    counts = torch.tensor([before, rows], dtype=torch.int32)
    layer.up(x, order, counts, None, pre, first, recompute=True)
    expected = x[[1, 0, 1]] @ gate_up[1][0].T
    torch.testing.assert_close(pre[first:].view(rows, 40).float(), expected, rtol=2e-2, atol=2e-2)


@on_gpu
def test_all_buffers_beyond_2_to_31_elements(device):
    """Against the same tokens in pieces."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    case = Case(counts=(1, 1), widths=(1024, 4096), hidden_size=128, tokens=2**18, top_k=2)
    layer, inputs = make_layer(case, device, torch.bfloat16), make_inputs(case, device, torch.bfloat16)
    assert case.tokens * case.top_k * max(case.widths) >= 2**31
    parts = [
        dict(zip(inputs.tensors(), part, strict=True))
        for part in zip(*(x.chunk(16) for x in inputs.tensors().values()), strict=True)
    ]
    pieces = [run(layer, Inputs(**part)) for part in parts]
    expected = {}
    for name in pieces[0]:
        values = [piece[name] for piece in pieces]
        expected[name] = sum(x.double() for x in values) if "[" in name else torch.cat(values).double()
    for name, value in run(layer, inputs).items():
        assert (value - expected[name]).norm() <= 1e-2 * expected[name].norm(), name
