"""Every implementation of the experts against a dense float64 loop written from the definition."""

import copy
import gc
import logging
import math
import weakref
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.activations import ACT2FN

from mohge import MoHGEConfig, MoHGEForCausalLM, experts_mohge
from mohge.backbones_mohge import is_silu
from mohge.blocks_mohge import MoHGEExperts


IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm", "mohge", "mohge_prepacked"]
COMPILED = pytest.mark.parametrize("implementation", ["grouped_mm", "mohge", "mohge_prepacked"])
RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """Shape of the experts, and of one call."""

    counts: tuple[int, ...] = (2, 4, 6)
    widths: tuple[int, ...] = (8, 24, 40)
    hidden_size: int = 16
    tokens: int = 23
    top_k: int = 3
    allowed: tuple[int, ...] | None = None
    """Expert ids that tokens may choose; all by default."""
    masked: float = 0.0
    """Share of the slots to skip."""

    @property
    def num_experts(self) -> int:
        return sum(self.counts)

    def experts_by_id(self) -> list[tuple[int, int]]:
        """(group, index in group) of each expert: P = gcd(counts) sets, set by set and group by group."""
        sets = math.gcd(*self.counts)
        return [
            (group, index)
            for p in range(sets)
            for group, count in enumerate(self.counts)
            for index in range(p * count // sets, (p + 1) * count // sets)
        ]


CASES = {
    "unequal_widths_and_counts": Case(),
    "equal_counts": Case(counts=(4, 4, 4)),
    "coprime_counts": Case(counts=(1, 2, 3)),
    "odd_sizes": Case(widths=(5, 13, 37), hidden_size=20),
    "odd_hidden_size": Case(hidden_size=19),
    "wider_than_128": Case(counts=(1, 2, 2), widths=(64, 136, 300), hidden_size=132, top_k=2),
    "many_rows_per_expert": Case(counts=(1, 2), widths=(8, 16), tokens=301, top_k=2),
    "one_group": Case(counts=(5,), widths=(24,), top_k=2),
    "one_expert_in_all": Case(counts=(1,), widths=(8,), top_k=1),
    "one_token": Case(tokens=1),
    "all_experts_for_every_token": Case(top_k=12),
    "all_tokens_on_one_expert": Case(top_k=1, allowed=(4,)),
    "empty_experts": Case(tokens=2, top_k=2),
    "empty_middle_group": Case(allowed=(0, 6, 3, 4, 5, 9, 10, 11)),
    "empty_first_and_last_group": Case(allowed=(1, 2, 7, 8)),
    "masked_slots": Case(masked=0.4),
    "masked_slots_and_empty_group": Case(masked=0.4, allowed=(0, 6, 1, 2, 7, 8)),
    "one_token_all_slots_masked": Case(tokens=1, masked=1.0),
    "all_slots_masked": Case(masked=1.0),
    "removed_group": Case(widths=(0, 24, 40)),
    "removed_group_of_few_and_odd_sizes": Case(counts=(1, 6, 2), widths=(0, 13, 37), masked=0.2),
    "two_removed_groups": Case(widths=(0, 0, 40)),
    "no_token_on_removed_experts": Case(widths=(0, 24, 40), allowed=(1, 2, 3, 4, 5, 7, 8)),
    "all_tokens_on_removed_experts": Case(widths=(0, 24, 40), allowed=(0, 6), top_k=2),
    "one_token_with_removed_experts": Case(widths=(0, 24, 40), tokens=1, top_k=12),
    "all_groups_removed": Case(widths=(0, 0, 0), masked=0.2),
}
COMMON = ["unequal_widths_and_counts", "odd_sizes", "masked_slots", "empty_middle_group", "removed_group"]


def make_experts(case: Case, dtype: torch.dtype, implementation: str = "eager") -> MoHGEExperts:
    config = MoHGEConfig(
        vocab_size=8,
        hidden_size=case.hidden_size,
        num_attention_heads=1,
        head_dim=8,
        moe_intermediate_sizes=case.widths,
        num_experts_per_group=case.counts,
        num_experts_per_tok=case.top_k,
        router_type="top_k",
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = MoHGEExperts(config, config, ACT2FN[config.hidden_act])
    experts.init_weights(0.3)
    return experts.to(dtype).eval()


def make_inputs(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`hidden_states`, `top_k_index`, `top_k_weights` and the gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    random = partial(torch.rand, generator=generator, dtype=torch.float64)
    allowed = torch.tensor(range(case.num_experts) if case.allowed is None else case.allowed)
    index = allowed[random(case.tokens, len(allowed)).argsort(-1)[:, : case.top_k]]
    weights = random(case.tokens, case.top_k) + 0.1
    masked = random(case.tokens, case.top_k) < case.masked
    index, weights = index.masked_fill(masked, case.num_experts), weights.masked_fill(masked, 0)
    hidden_states = random(case.tokens, case.hidden_size) * 2 - 1
    grad_output = random(case.tokens, case.hidden_size) * 2 - 1
    return hidden_states.to(dtype), index, weights.to(dtype), grad_output.to(dtype)


def reference(
    case: Case,
    parameters: dict[str, torch.Tensor],
    hidden_states: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Every expert on every token, times its combine weight, which is 0 where the token did not choose it."""
    output = torch.zeros_like(hidden_states)
    for expert, (group, slot) in enumerate(case.experts_by_id()):
        width = case.widths[group]
        if width == 0:  # no weights, no output, and gradients of zero
            output = output + 0 * (hidden_states + weights.sum(-1, keepdim=True))
            continue
        gate_up, down = parameters[f"gate_up_proj_{group}"][slot], parameters[f"down_proj_{group}"][slot]
        gate, up = hidden_states @ gate_up[:width].T, hidden_states @ gate_up[width:].T
        combine_weight = (weights * (index == expert)).sum(-1, keepdim=True)
        output = output + combine_weight * ((gate * gate.sigmoid() * up) @ down.T)
    return output


def forward_and_backward(function, parameters: dict, hidden_states, index, weights, grad_output) -> dict:
    """Output and all gradients, by name."""
    hidden_states = hidden_states.detach().requires_grad_()
    weights = weights.detach().requires_grad_()
    output = function(hidden_states, index, weights)
    # Called without `allow_unused`: a weight that no gradient reaches is an error.
    gradients = torch.autograd.grad(output, [hidden_states, weights, *parameters.values()], grad_output)
    names = ["d hidden_states", "d top_k_weights", *(f"d {name}" for name in parameters)]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def run_reference(case: Case, experts: MoHGEExperts, inputs: tuple) -> dict:
    hidden_states, index, weights, grad_output = inputs
    parameters = {name: p.detach().double().requires_grad_() for name, p in experts.named_parameters()}
    function = partial(reference, case, parameters)
    return forward_and_backward(
        function, parameters, hidden_states.double(), index, weights.double(), grad_output.double()
    )


def run(experts: MoHGEExperts, inputs: tuple) -> dict:
    return forward_and_backward(experts, dict(experts.named_parameters()), *inputs)


def assert_close(actual: dict, expected: dict, relative_error: float):
    """Errors are bounded by the largest reference value of the tensor, for weights of the expert: what is zero in the
    reference must be exactly zero, and zeros fail wherever the reference is not zero."""
    assert actual.keys() == expected.keys()
    for name, reference_value in expected.items():
        value = actual[name]
        assert value.shape == reference_value.shape, name
        assert value.isfinite().all(), name
        dims = tuple(range(1, value.dim())) if "_proj_" in name else tuple(range(value.dim()))
        error = (value.double() - reference_value.double()).abs().amax(dims)
        bound = relative_error * reference_value.double().abs().amax(dims)
        assert (error <= bound).all(), f"{name}: error {error}, bound {bound}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_output_and_every_gradient_match_the_reference(name, implementation, dtype):
    case = CASES[name]
    experts = make_experts(case, dtype, implementation)
    inputs = make_inputs(case, dtype)
    expected = run_reference(case, experts, inputs)
    actual = run(experts, inputs)
    assert actual["output"].dtype == dtype
    assert_close(actual, expected, RELATIVE_ERROR[dtype])


def test_reference_is_not_trivial():
    """What the comparisons above would show: gradients of used experts are not zero, those of the others are."""
    case = CASES["masked_slots_and_empty_group"]
    inputs = make_inputs(case, torch.float64)
    expected = run_reference(case, make_experts(case, torch.float64), inputs)
    masked = inputs[1] == case.num_experts
    assert masked.any()
    assert (expected["d top_k_weights"][masked] == 0).all()
    assert (expected["d top_k_weights"][~masked].abs() > 1e-4).all()
    for group, used in enumerate([True, True, False]):
        for projection in ("gate_up_proj", "down_proj"):
            magnitude = expected[f"d {projection}_{group}"].abs().amax((1, 2))
            assert ((magnitude > 1e-2) if used else (magnitude == 0)).all()


def test_first_half_of_gate_up_is_the_gate():
    case = Case(counts=(1,), widths=(1,), hidden_size=1, tokens=1, top_k=1)
    for implementation in IMPLEMENTATIONS:
        experts = make_experts(case, torch.float64, implementation)
        with torch.no_grad():
            experts.gate_up_proj_0.copy_(torch.tensor([[[2.0], [3.0]]]))
            experts.down_proj_0.copy_(torch.tensor([[[5.0]]]))
        one = torch.ones(1, 1, dtype=torch.float64)
        output = experts(one, torch.zeros(1, 1, dtype=torch.long), 0.5 * one)
        assert output.item() == pytest.approx(5 * (2 / (1 + math.exp(-2)) * 3) * 0.5, rel=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["transposed", "every_second_column", "expanded"])
def test_non_contiguous_inputs(layout, implementation):
    case = Case()
    experts = make_experts(case, torch.float32, implementation)
    hidden_states, index, weights, grad_output = make_inputs(case, torch.float32)
    if layout == "transposed":
        hidden_states, weights = (x.t().contiguous().t() for x in (hidden_states, weights))
        index, grad_output = index.t().contiguous().t(), grad_output.t().contiguous().t()
    elif layout == "every_second_column":
        hidden_states, weights = (torch.stack([x, x], -1).flatten(1)[:, ::2] for x in (hidden_states, weights))
    else:
        hidden_states = hidden_states[:1].expand(case.tokens, -1)
    assert not hidden_states.is_contiguous()
    inputs = hidden_states, index, weights, grad_output
    assert_close(run(experts, inputs), run_reference(case, experts, inputs), RELATIVE_ERROR[torch.float32])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens(implementation):
    experts = make_experts(Case(), torch.float32, implementation)
    result = run(experts, make_inputs(Case(tokens=0), torch.float32))
    assert result["output"].shape == (0, 16)
    assert all((gradient == 0).all() for gradient in result.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tokens_without_gradients(implementation):
    experts = make_experts(Case(), torch.float32, implementation)
    with torch.no_grad():
        output = experts(torch.zeros(0, 16), torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3))
    assert output.shape == (0, 16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ids_above_num_experts_are_skipped_too(implementation):
    case = CASES["masked_slots"]
    experts = make_experts(case, torch.float32, implementation)
    hidden_states, index, weights, grad_output = make_inputs(case, torch.float32)
    expected = run_reference(case, experts, (hidden_states, index, weights, grad_output))
    index = torch.where(index == case.num_experts, index + 5, index)
    actual = run(experts, (hidden_states, index, weights, grad_output))
    assert_close(actual, expected, RELATIVE_ERROR[torch.float32])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_are_not_changed(implementation):
    inputs = make_inputs(CASES["masked_slots"], torch.float32)
    before = copy.deepcopy(inputs)
    run(make_experts(CASES["masked_slots"], torch.float32, implementation), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frozen_weights_pass_the_gradient_on(implementation):
    case = Case()
    experts = make_experts(case, torch.float64, implementation).requires_grad_(False)
    hidden_states, index, weights, grad_output = inputs = make_inputs(case, torch.float64)
    expected = run_reference(case, experts, inputs)
    hidden_states.requires_grad_()
    experts(hidden_states, index, weights).backward(grad_output)
    assert_close(
        {"d hidden_states": hidden_states.grad},
        {"d hidden_states": expected["d hidden_states"]},
        RELATIVE_ERROR[torch.float64],
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["unequal_widths_and_counts", "odd_sizes", "wider_than_128", "masked_slots"])
def test_bfloat16_is_close_to_the_reference(name, implementation):
    case = CASES[name]
    experts = make_experts(case, torch.bfloat16, implementation)
    inputs = make_inputs(case, torch.bfloat16)
    actual = run(experts, inputs)
    assert all(value.dtype == torch.bfloat16 for value in actual.values())
    assert_close(actual, run_reference(case, experts, inputs), RELATIVE_ERROR[torch.bfloat16])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["unequal_widths_and_counts", "odd_sizes", "empty_middle_group", "masked_slots"])
def test_autocast_is_close_to_the_reference(name, implementation):
    case = CASES[name]
    experts = make_experts(case, torch.float32, implementation)
    inputs = make_inputs(case, torch.float32)
    expected = run_reference(case, experts, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(experts, inputs)
    assert all(value.dtype == torch.float32 for value in actual.values())
    assert_close(actual, expected, RELATIVE_ERROR[torch.bfloat16])
    difference = (actual["output"] - expected["output"]).abs().max()
    assert difference > 1e-5 * expected["output"].abs().max(), "autocast had no effect"


class CountRows(TorchDispatchMode):
    """Rows that went into `grouped_mm`."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["masked_slots", "two_removed_groups"])
def test_grouped_mm_computes_nothing_for_slots_to_skip(name):
    case = CASES[name]
    hidden_states, index, weights, _ = make_inputs(case, torch.float32)
    used = sum(int((index == expert).sum()) for expert, (g, _) in enumerate(case.experts_by_id()) if case.widths[g])
    with CountRows() as grouped_mm, torch.no_grad():
        make_experts(case, torch.float32, "grouped_mm")(hidden_states, index, weights)
    assert 0 < sum(grouped_mm.rows) == 2 * used < 2 * index.numel()  # gate_up and down


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_only_grouped_mm_uses_grouped_mm(implementation):
    hidden_states, index, weights, _ = make_inputs(Case(), torch.float32)
    with CountRows() as grouped_mm, torch.no_grad():
        make_experts(Case(), torch.float32, implementation)(hidden_states, index, weights)
    assert not grouped_mm.rows


def test_unknown_implementation_is_refused():
    experts = make_experts(Case(), torch.float32, "no_such_implementation")
    with pytest.raises(KeyError, match="no_such_implementation"):
        experts(*make_inputs(Case(), torch.float32)[:3])


def test_registered_function_of_one_width_runs_for_each_group():
    """What a third party registers with transformers for experts of one width works here, group by group."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    seen = []

    def recorded(experts, hidden_states, top_k_index, top_k_weights):
        seen.append((experts.num_experts, experts.down_proj.shape[-1], hidden_states.shape[0]))
        return batched_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)

    case = Case()
    inputs = make_inputs(case, torch.float64)
    ALL_EXPERTS_FUNCTIONS.register("recorded", recorded)
    try:
        experts = make_experts(case, torch.float64, "recorded")
        actual = run(experts, inputs)
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["recorded"]
    chosen = [
        sum(int((inputs[1] == e).sum()) for e, (g, _) in enumerate(case.experts_by_id()) if g == i) for i in range(3)
    ]
    assert seen == [(2, 8, chosen[0]), (4, 24, chosen[1]), (6, 40, chosen[2])]
    assert_close(actual, run_reference(case, experts, inputs), RELATIVE_ERROR[torch.float64])


# torch.compile


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", [*COMMON, "all_tokens_on_removed_experts", "all_groups_removed"])
@COMPILED
def test_compiled_equals_eager_mode(implementation, name):
    case = CASES[name]
    experts = make_experts(case, torch.float32, implementation)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    inputs = make_inputs(case, torch.float32)
    actual = forward_and_backward(compiled, dict(experts.named_parameters()), *inputs)
    assert_close(actual, run(experts, inputs), 1e-6)
    assert_close(actual, run_reference(case, experts, inputs), RELATIVE_ERROR[torch.float32])


@pytest.mark.usefixtures("fresh_compiler")
@COMPILED
def test_compiled_for_any_number_of_tokens(implementation):
    experts = make_experts(Case(), torch.float32, implementation)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 2):
        case = Case(tokens=tokens)
        inputs = make_inputs(case, torch.float32)
        actual = forward_and_backward(compiled, dict(experts.named_parameters()), *inputs)
        assert_close(actual, run_reference(case, experts, inputs), RELATIVE_ERROR[torch.float32])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("inside", [False, True], ids=["autocast_around_call", "autocast_inside_function"])
@COMPILED
def test_compiled_under_autocast(implementation, inside):
    case = Case()
    experts = make_experts(case, torch.float32, implementation)
    inputs = make_inputs(case, torch.float32)

    def function(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return experts(*arguments)

    compiled = torch.compile(function if inside else experts, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        actual = forward_and_backward(compiled, dict(experts.named_parameters()), *inputs)
    assert all(value.dtype == torch.float32 for value in actual.values())
    assert_close(actual, run_reference(case, experts, inputs), RELATIVE_ERROR[torch.bfloat16])


@pytest.mark.usefixtures("fresh_compiler")
@COMPILED
def test_compiled_with_frozen_weights(implementation):
    case = Case()
    experts = make_experts(case, torch.float32, implementation).requires_grad_(False)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    hidden_states, index, weights, grad_output = inputs = make_inputs(case, torch.float32)
    expected = run_reference(case, experts, inputs)
    hidden_states.requires_grad_()
    compiled(hidden_states, index, weights).backward(grad_output)
    assert_close(
        {"d hidden_states": hidden_states.grad},
        {"d hidden_states": expected["d hidden_states"]},
        RELATIVE_ERROR[torch.float32],
    )


@pytest.mark.parametrize("tokens", [1, 5, 6, 40], ids=["one", "few", "one_more_than_few", "many"])
@pytest.mark.parametrize("name", [*COMMON, "all_groups_removed"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inference_without_gradients(implementation, name, tokens):
    """Without gradients idle groups are left out, and the kernels handle one token without sorting."""
    case = replace(CASES[name], tokens=tokens)
    experts = make_experts(case, torch.float32, implementation)
    *inputs, _ = make_inputs(case, torch.float32)
    parameters = {name: parameter.double() for name, parameter in experts.named_parameters()}
    with torch.no_grad():
        expected = reference(case, parameters, inputs[0].double(), inputs[1], inputs[2].double())
        assert_close({"output": experts(*inputs)}, {"output": expected}, RELATIVE_ERROR[torch.float32])


# The kernels


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def warnings_of_experts(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(experts_mohge.logger, "warning_once", messages.append)
    return messages


@pytest.mark.parametrize("emulates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_run_where_there_are_some(dtype, emulates, warnings_of_experts, monkeypatch):
    monkeypatch.setattr(experts_mohge.mohge_kernels, "EMULATES_BFLOAT16", emulates)
    experts, inputs = make_experts(Case(), dtype, "mohge"), make_inputs(Case(), dtype)
    with Operators() as called:
        experts(*inputs[:3])
    assert "mohge_kernels::swiglu_experts" in called.names
    said = ["no instructions for bfloat16" in message for message in warnings_of_experts]
    assert said == [True] * (emulates and dtype == torch.bfloat16)


def without_kernels(experts, monkeypatch):
    monkeypatch.setattr(experts_mohge, "mohge_kernels", None)


def with_another_activation(experts, monkeypatch):
    experts.act_fn, experts.act_is_silu = torch.nn.GELU(), False


def with_strided_weights(experts, monkeypatch):
    stack = experts.gate_up_proj_1
    stack.data = stack.data.transpose(1, 2).contiguous().transpose(1, 2)


def with_another_dtype(experts, monkeypatch):
    experts.double()


@pytest.mark.parametrize("implementation", ["mohge", "mohge_prepacked"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_kernels, "not installed"),
        (with_another_activation, "GELU"),
        (with_strided_weights, "contiguous"),
        (with_another_dtype, "float64"),
    ],
)
def test_falls_back_with_one_warning(change, reason, implementation, monkeypatch, warnings_of_experts):
    experts, inputs = make_experts(Case(), torch.float32, implementation), make_inputs(Case(), torch.float32)
    change(experts, monkeypatch)
    hidden_states, index, weights, _ = inputs
    hidden_states, weights = (x.to(experts.gate_up_proj_0.dtype) for x in (hidden_states, weights))
    with Operators() as called, torch.no_grad():
        output = experts(hidden_states, index, weights)
    assert "mohge_kernels::swiglu_experts" not in called.names
    assert len(warnings_of_experts) == 1
    assert reason in warnings_of_experts[0]
    assert "grouped_mm" in warnings_of_experts[0]
    experts.config._experts_implementation = "eager"
    with torch.no_grad():
        assert_close({"output": output}, {"output": experts(hidden_states, index, weights)}, 1e-5)


def test_packed_copies_follow_the_weights_and_the_module():
    experts, inputs = make_experts(Case(), torch.float32, "mohge_prepacked"), make_inputs(Case(), torch.float32)
    packed = weakref.WeakSet()
    for scale in (1, 2, 3):
        with torch.no_grad():
            experts.down_proj_2[3].mul_(scale)
            experts.gate_up_proj_0.mul_(scale)
            output = experts(*inputs[:3])
        packed.add(experts_mohge._PACKED[experts][1])
        expected = run_reference(Case(), experts, inputs)
        assert_close({"output": output}, {"output": expected["output"]}, RELATIVE_ERROR[torch.float32])
    gc.collect()
    assert len(packed) == 1  # the copies of former weights are gone
    with torch.no_grad():
        experts(*inputs[:3])
    assert experts_mohge._PACKED[experts][1] in packed  # nothing changed, so they are used again
    copy.deepcopy(experts)
    del experts
    gc.collect()
    assert not packed


def replace_parameters(experts):
    for name, parameter in list(experts.named_parameters()):
        delattr(experts, name)
        shape, dtype = parameter.shape, parameter.dtype
        del parameter  # so that the new one may get its address
        setattr(experts, name, torch.nn.Parameter(torch.randn(shape).to(dtype).mul_(0.3)))


def test_packed_copies_do_not_survive_their_parameters():
    experts, inputs = make_experts(Case(), torch.float32, "mohge_prepacked"), make_inputs(Case(), torch.float32)
    for _ in range(10):
        with torch.no_grad():
            output = experts(*inputs[:3])
        expected = run_reference(Case(), experts, inputs)
        assert_close({"output": output}, {"output": expected["output"]}, RELATIVE_ERROR[torch.float32])
        replace_parameters(experts)


def no_parameters(experts):
    for name, parameter in list(experts.named_parameters()):
        delattr(experts, name)
        setattr(experts, name, parameter.detach())


@pytest.mark.parametrize(
    "change", [torch.nn.Module.train, torch.nn.Module.half, no_parameters], ids=["training", "float16", "temporary"]
)
def test_nothing_is_packed_where_it_would_not_serve(change, warnings_of_experts):
    experts, inputs = make_experts(Case(), torch.float32, "mohge_prepacked"), make_inputs(Case(), torch.float32)
    expected = run_reference(Case(), experts, inputs)
    with torch.no_grad():
        experts(*inputs[:3])
        assert experts in experts_mohge._PACKED
        change(experts)
        dtype = experts.gate_up_proj_0.dtype
        output = experts(inputs[0].to(dtype), inputs[1], inputs[2].to(dtype))
    assert experts not in experts_mohge._PACKED
    assert len(warnings_of_experts) == (change is torch.nn.Module.half)
    assert_close({"output": output.float()}, {"output": expected["output"]}, 5e-3)


def test_warns_once_however_often_it_runs(caplog):
    config = MoHGEConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=1, moe_intermediate_sizes=[8, 16],
        num_experts_per_group=2, num_experts_per_tok=2, hidden_act="gelu",
    )  # fmt: skip
    model = MoHGEForCausalLM(config).eval()
    transformers_logger = logging.getLogger("transformers")
    experts_mohge.logger.addHandler(caplog.handler)
    type(transformers_logger).warning_once.cache_clear()
    try:
        for _ in range(2):
            model(torch.tensor([[1, 2, 3]]))
    finally:
        experts_mohge.logger.removeHandler(caplog.handler)
    assert len({id(record) for record in caplog.records if "GELU" in record.message}) == 1  # it may come two ways


@pytest.mark.parametrize("implementation", ["mohge", "mohge_prepacked"])
def test_function_transforms_fall_back(implementation, warnings_of_experts):
    experts, inputs = make_experts(Case(), torch.float32, implementation), make_inputs(Case(), torch.float32)
    hidden_states, index, weights, grad_output = inputs

    def function(x):
        return (experts(x, index, weights) * grad_output).sum()

    gradient = torch.func.grad(function)(hidden_states)
    expected = run_reference(Case(), experts, inputs)["d hidden_states"]
    assert_close({"d": gradient}, {"d": expected}, RELATIVE_ERROR[torch.float32])
    assert "torch.func" in warnings_of_experts[0]


def test_swish_is_silu():
    assert is_silu(ACT2FN["swish"])
    assert is_silu(ACT2FN["silu"])
    assert not is_silu(ACT2FN["gelu"])


def test_exported_graph_has_the_operator():
    experts, inputs = make_experts(Case(), torch.float32, "mohge"), make_inputs(Case(), torch.float32)
    program = torch.export.export(experts, inputs[:3], strict=False)
    assert "mohge_kernels.swiglu_experts" in program.graph_module.code
    assert_close({"output": program.module()(*inputs[:3])}, {"output": experts(*inputs[:3])}, 1e-6)


def test_packed_copies_are_for_inference():
    experts, inputs = make_experts(Case(), torch.float32, "mohge_prepacked"), make_inputs(Case(), torch.float32)
    run(experts, inputs)
    assert experts not in experts_mohge._PACKED


@pytest.mark.parametrize("name", ["mohge", "mohge_prepacked"])
def test_other_models_are_refused(name):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    config = OlmoeConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    model = OlmoeForCausalLM._from_config(config, experts_implementation=name)
    with pytest.raises(ValueError, match=r"is for MoHGE models.*choose"):
        model(torch.tensor([[1, 2]]))
