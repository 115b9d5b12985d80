"""Layers and traffic at the edges, their dense float64 reference, and the comparison with it."""

import os
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mohge_kernels import swiglu_experts


# Bounds of |error|_2 / |reference|_2 and of max |error| / max |reference|, tensor by tensor.
TOLERANCES = {torch.float32: (5e-6, 2e-5), torch.float16: (2e-3, 5e-3), torch.bfloat16: (1.5e-2, 3e-2)}

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
IMPLEMENTATIONS = ["cpu", "interpreter", pytest.param("cuda", marks=ON_GPU)]
each_implementation = pytest.mark.parametrize("device", IMPLEMENTATIONS, indirect=True)
on_gpu = pytest.mark.parametrize("device", IMPLEMENTATIONS[2:], indirect=True)


@dataclass(frozen=True)
class Case:
    """Sizes of a layer, and one call of it."""

    counts: tuple[int, ...] = (1, 2, 3)
    widths: tuple[int, ...] = (8, 12, 20)
    hidden_size: int = 20
    tokens: int = 17
    top_k: int = 3
    ids: str = "by_group"
    """Order of the ids: `"by_group"`, `"interleaved"` (one expert of each group in turn) or `"shuffled"`."""
    spare_keys: int = 0
    """`keys_per_group` beyond the largest group."""
    allowed: tuple[int, ...] | None = None
    """Ids that tokens may choose; all by default."""
    repeated: bool = False
    """Each second token names its first expert in its second slot too."""
    masked: float = 0.0
    """Share of the slots to skip."""
    removed: int = 0
    """Experts without weights: their ids follow those of the others, and their key is that behind the last."""
    masked_ids: tuple[int, ...] = ()
    """Ids of the slots to skip, in turn; `num_experts` by default."""
    masked_weight: float = 0.0
    negative_weights: bool = False
    zero_weights: float = 0.0
    """Share of the slots whose expert counts with weight 0."""
    gate_scale: float = 1.5
    """Standard deviation of the gates' pre-activations."""
    interpreted: bool = True
    """Whether the interpreter is fast enough for it."""

    @property
    def num_experts(self) -> int:
        return sum(self.counts) + self.removed

    def places(self) -> list[tuple[int, int]]:
        """(group, index in group) of each id."""
        by_group = [(group, i) for group, count in enumerate(self.counts) for i in range(count)]
        by_group += [(len(self.counts), 0)] * self.removed
        if self.ids == "interleaved":
            return sorted(by_group, key=lambda place: place[::-1])
        if self.ids == "shuffled":
            order = torch.randperm(self.num_experts, generator=torch.Generator().manual_seed(3))
            return [by_group[i] for i in order]
        return by_group

    def keys(self) -> tuple[list[int], int]:
        """`key_of_expert` and `keys_per_group`."""
        keys_per_group = max(self.counts) + self.spare_keys
        return [group * keys_per_group + i for group, i in self.places()], keys_per_group


def dtype_name(value) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# The default layer with fewer tiles, for what depends on ids and weights and not on sizes.
NARROW = Case(widths=(4, 5, 20), hidden_size=12)
# Ids of the default layer of three groups: 0, then 1 and 2, then 3 to 5.
CASES = {
    "unequal_widths_and_counts": Case(),
    "widths_below_at_and_beyond_16": Case(counts=(1, 1, 1), widths=(5, 16, 72), top_k=2),
    "widths_one_off_the_tile": Case(counts=(1, 1, 2, 1), widths=(15, 17, 31, 33)),
    "widest_group_first": Case(counts=(2, 1, 2), widths=(40, 8, 24)),
    "equal_widths": Case(counts=(3, 3), widths=(32, 32), interpreted=False),
    "odd_widths": Case(widths=(1, 13, 37)),
    "odd_hidden_size": Case(hidden_size=19, widths=(8, 16, 24)),
    "odd_everything": Case(counts=(2, 1, 1), widths=(7, 33, 21), hidden_size=37, tokens=23),
    "hidden_size_1": Case(hidden_size=1, tokens=7),
    "one_wider_than_128": Case(counts=(1, 1), widths=(8, 136), tokens=5, top_k=2),
    "wider_than_128": Case(
        counts=(1, 2, 2), widths=(64, 136, 300), hidden_size=132, tokens=9, top_k=2, interpreted=False
    ),
    "widths_below_at_and_beyond_128": Case(
        counts=(1, 2, 2, 3), widths=(257, 127, 128, 129), hidden_size=96, tokens=60, interpreted=False
    ),
    "large_odd_sizes": Case(
        counts=(2, 3, 4), widths=(100, 333, 517), hidden_size=391, tokens=83, masked=0.1, interpreted=False
    ),
    "large_even_sizes": Case(
        counts=(4, 4, 4, 4), widths=(96, 160, 224, 288), hidden_size=256, tokens=320, top_k=4, interpreted=False
    ),
    "many_rows_per_expert": Case(
        counts=(1, 2), widths=(8, 24), hidden_size=16, tokens=301, top_k=2, interpreted=False
    ),
    "three_tiles_of_rows_per_expert": Case(counts=(1, 2), widths=(8, 24), hidden_size=16, tokens=55, top_k=2),
    "many_rows_of_all_widths": Case(widths=(60, 136, 200), hidden_size=72, tokens=900, interpreted=False),
    "one_expert_has_most_rows": Case(
        allowed=(*[4] * 20, 0, 1, 3), tokens=400, top_k=1, widths=(40, 72, 136), interpreted=False
    ),
    "one_row_beyond_a_tile": Case(
        counts=(1, 1), widths=(16, 40), allowed=(1,), tokens=129, top_k=1, interpreted=False
    ),
    "one_row_beyond_a_small_tile": Case(counts=(1, 1), widths=(16, 40), allowed=(1,), tokens=33, top_k=1),
    "one_group": Case(counts=(5,), widths=(24,), top_k=2),
    "one_expert_in_all": Case(counts=(1,), widths=(40,), top_k=1),
    "groups_of_one": Case(counts=(1, 1, 1, 1), widths=(8, 8, 16, 20), top_k=2),
    "unequal_counts": Case(counts=(1, 6, 2), widths=(20, 8, 12)),
    "one_token": Case(tokens=1),
    "one_token_and_slot": Case(tokens=1, top_k=1),
    "all_experts_for_every_token": Case(top_k=6),
    "all_tokens_on_one_expert": Case(top_k=1, allowed=(2,)),
    "all_tokens_on_the_narrowest_group": Case(counts=(2, 1, 3), top_k=2, allowed=(0, 1)),
    "all_tokens_on_the_widest_group": Case(allowed=(3, 4, 5)),
    "all_tokens_on_the_last_expert": Case(top_k=1, allowed=(5,), tokens=40),
    "empty_experts": Case(tokens=2, top_k=2),
    "empty_experts_in_every_group": Case(counts=(2, 2, 3), allowed=(1, 2, 4, 6)),
    "empty_first_group": replace(NARROW, allowed=(1, 2, 3, 5)),
    "empty_middle_group": Case(allowed=(0, 3, 4, 5)),
    "empty_last_group": replace(NARROW, allowed=(0, 1, 2)),
    "masked_slots": Case(masked=0.4),
    "masked_slots_with_weight": replace(NARROW, masked=0.4, masked_weight=0.7, negative_weights=True),
    "masked_slots_with_infinite_weight": replace(NARROW, masked=0.4, masked_weight=float("inf")),
    "negative_ids": replace(NARROW, masked=0.4, masked_ids=(-1,), masked_weight=0.7),
    "ids_of_all_kinds_out_of_range": replace(NARROW, masked=0.4, masked_ids=(-1, 6, 7, -6, 2**31 - 1, -(2**31))),
    "ids_in_range_modulo_2_to_32": replace(
        NARROW, masked=0.4, masked_ids=(2**32 + 1, 3 - 2**32, 2**62), masked_weight=0.7
    ),
    "masked_slots_and_empty_group": replace(NARROW, masked=0.4, allowed=(0, 3, 4, 5)),
    "all_slots_masked": replace(NARROW, masked=1.0, masked_weight=0.7),
    "one_token_all_slots_masked": replace(NARROW, tokens=1, masked=1.0),
    "experts_without_weights": replace(NARROW, removed=3, ids="shuffled", masked=0.2),
    "experts_without_weights_and_spare_keys": replace(NARROW, removed=1, spare_keys=2),
    "all_tokens_on_experts_without_weights": replace(NARROW, removed=3, ids="shuffled", allowed=(3, 7, 8)),
    "one_token_on_experts_without_weights": replace(NARROW, removed=2, tokens=1, top_k=8, ids="shuffled"),
    "zero_weights": replace(NARROW, zero_weights=0.4),
    "negative_weights": replace(NARROW, negative_weights=True),
    "expert_twice_for_a_token": replace(NARROW, repeated=True),
    "expert_twice_for_a_token_in_all_slots": replace(NARROW, repeated=True, top_k=2, masked=0.2),
    "spare_keys": replace(NARROW, spare_keys=3),
    "spare_keys_and_masked_slots": Case(spare_keys=4, masked=0.4, counts=(1, 3), widths=(24, 8), top_k=2),
    "interleaved_ids": replace(NARROW, ids="interleaved"),
    "interleaved_ids_and_empty_experts": replace(NARROW, ids="interleaved", allowed=(0, 2, 3, 5), masked=0.2),
    "shuffled_ids": Case(ids="shuffled", spare_keys=2, widths=(20, 5, 12)),
    "saturated_gates": replace(NARROW, gate_scale=60.0),
}
# The smallest layer of three groups, for what does not depend on sizes.
SMALL = Case(counts=(1, 1, 2), widths=(4, 5, 20), hidden_size=12, tokens=7, top_k=2)


def each_case(cases: dict[str, Case]):
    """Parameters `device` and `case`: every case on every implementation that is fast enough for it."""
    parameters = [
        pytest.param(
            implementation, case, marks=ON_GPU if implementation == "cuda" else (), id=f"{implementation}-{name}"
        )
        for implementation in ("cpu", "interpreter", "cuda")
        for name, case in cases.items()
        if case.interpreted or implementation != "interpreter"
    ]
    return pytest.mark.parametrize(("device", "case"), parameters, indirect=["device"])


@dataclass
class Layer:
    gate_up: list[torch.Tensor]
    down: list[torch.Tensor]
    key_of_expert: torch.Tensor | None
    keys_per_group: int | None

    def __call__(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        return swiglu_experts(
            hidden_states,
            self.gate_up,
            self.down,
            top_k_index,
            top_k_weights,
            key_of_expert=self.key_of_expert,
            keys_per_group=self.keys_per_group,
        )

    def parameters(self) -> dict[str, torch.Tensor]:
        names = [f"{matrix}[{group}]" for matrix in ("gate_up", "down") for group in range(len(self.gate_up))]
        return dict(zip(names, [*self.gate_up, *self.down], strict=True))


@dataclass
class Inputs:
    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    grad_output: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def make_layer(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Layer:
    """Random experts whose pre-activations and outputs are of order 1, whatever the sizes."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    gate_up, down = [], []
    for count, width in zip(case.counts, case.widths, strict=True):
        gate = normal(count, width, case.hidden_size) * case.gate_scale
        up = normal(count, width, case.hidden_size) * 1.5
        gate_up.append(torch.cat([gate, up], 1) * (3 / case.hidden_size) ** 0.5)
        down.append(normal(count, case.hidden_size, width) / width**0.5)
    gate_up, down = ([x.to(device, dtype).requires_grad_() for x in matrices] for matrices in (gate_up, down))
    if case.ids == "by_group" and not case.spare_keys and not case.removed:
        return Layer(gate_up, down, None, None)
    keys, keys_per_group = case.keys()
    return Layer(gate_up, down, torch.tensor(keys, device=device), keys_per_group)


def make_inputs(
    case: Case,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    seed: int = 1,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    uniform = partial(torch.rand, generator=generator, dtype=torch.float64)
    slots = case.tokens, case.top_k
    allowed = torch.tensor(range(case.num_experts) if case.allowed is None else case.allowed)
    index = allowed[uniform(case.tokens, len(allowed)).argsort(-1)[:, : case.top_k]]
    if case.repeated:
        index[::2, 1] = index[::2, 0]
    weights = uniform(slots) + 0.1
    if case.negative_weights:
        weights = weights * torch.where(uniform(slots) < 0.5, -1, 1)
    weights = weights.masked_fill(uniform(slots) < case.zero_weights, 0)
    masked = uniform(slots) < case.masked
    masked_ids = torch.tensor(case.masked_ids or [case.num_experts])
    masked_ids = masked_ids[torch.arange(index.numel()) % len(masked_ids)].view(slots)
    index, weights = torch.where(masked, masked_ids, index), weights.masked_fill(masked, case.masked_weight)
    hidden_states, grad_output = (uniform(case.tokens, case.hidden_size) * 2 - 1 for _ in range(2))
    return Inputs(
        hidden_states.to(device, dtype),
        index.to(device),
        weights.to(device, weights_dtype or dtype),
        grad_output.to(device, dtype),
    )


def reference(case: Case, parameters: dict[str, torch.Tensor], hidden_states, top_k_index, top_k_weights):
    """Expert by expert on the tokens that name it: down @ (silu(gate @ x) * (up @ x)), times the combine weight."""
    output = torch.zeros_like(hidden_states)
    for expert, (group, i) in enumerate(case.places()):
        if group == len(case.counts):
            continue
        width = case.widths[group]
        gate_up, down = parameters[f"gate_up[{group}]"][i], parameters[f"down[{group}]"][i]
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = hidden_states[token] @ gate_up[:width].T, hidden_states[token] @ gate_up[width:].T
        result = (gate * gate.sigmoid() * up) @ down.T
        output = output.index_add(0, token, top_k_weights[token, slot, None] * result)
    return output


def forward_and_backward(function, parameters: dict[str, torch.Tensor], inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and all gradients, by name."""
    hidden_states = inputs.hidden_states.detach().requires_grad_()
    weights = inputs.top_k_weights.detach().requires_grad_()
    output = function(hidden_states, inputs.top_k_index, weights)
    # Called without `allow_unused`: a tensor that no gradient reaches is an error.
    gradients = torch.autograd.grad(output, [hidden_states, weights, *parameters.values()], inputs.grad_output)
    names = ["d hidden_states", "d top_k_weights", *(f"d {name}" for name in parameters)]
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def run(layer: Layer, inputs: Inputs) -> dict[str, torch.Tensor]:
    return forward_and_backward(layer, layer.parameters(), inputs)


def run_reference(case: Case, layer: Layer, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The same by the reference, in float64 on the CPU."""
    parameters = {name: p.detach().cpu().double().requires_grad_() for name, p in layer.parameters().items()}
    tensors = {name: x.cpu() if name == "top_k_index" else x.cpu().double() for name, x in inputs.tensors().items()}
    return forward_and_backward(partial(reference, case, parameters), parameters, Inputs(**tensors))


def split(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of experts one by one, those of gate and up apart; anything else whole."""
    if name.startswith("d gate_up"):
        return {
            f"{name}[{i}] {half}": matrix
            for i, expert in enumerate(tensor)
            for half, matrix in zip(("gate", "up"), expert.chunk(2), strict=True)
        }
    if name.startswith("d down"):
        return {f"{name}[{i}]": expert for i, expert in enumerate(tensor)}
    return {name: tensor}


def assert_close(actual: dict, expected: dict, dtype: torch.dtype = torch.float32):
    """Errors are bounded by the magnitude of each tensor's reference, expert by expert. What is exactly zero in the
    reference (experts without tokens, skipped slots) must be exactly zero, and zeros fail wherever it is not."""
    assert actual.keys() == expected.keys()
    norm_bound, max_bound = TOLERANCES[dtype]
    if dtype == torch.bfloat16 and os.environ.get("MOHGE_KERNELS_INTERPRET") == "1":
        # Triton's interpreter cuts off bits where hardware rounds to nearest: twice the error, in one direction.
        norm_bound, max_bound = 3 * norm_bound, 3 * max_bound
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        assert actual[name].isfinite().all(), f"{name} is not finite"
        pairs = zip(
            split(name, actual[name].cpu().double()).items(),
            split(name, expected[name].double()).values(),
            strict=True,
        )
        for (part, value), reference_value in pairs:
            assert (value[reference_value == 0] == 0).all(), f"{part} is not zero where the reference is"
            if reference_value.any():
                error = value - reference_value
                norm_error = (error.norm() / reference_value.norm()).item()
                max_error = (error.abs().max() / reference_value.abs().max()).item()
                assert norm_error <= norm_bound, f"{part}: norm of the error {norm_error:.2e}"
                assert max_error <= max_bound, f"{part}: largest error {max_error:.2e}"


def assert_equal(actual: dict, expected: dict):
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def check(case: Case, device: str, dtype: torch.dtype = torch.float32, weights_dtype: torch.dtype | None = None):
    """One forward and backward against the reference."""
    layer, inputs = make_layer(case, device, dtype), make_inputs(case, device, dtype, weights_dtype)
    actual = run(layer, inputs)
    for name, value in actual.items():
        assert value.dtype == (inputs.top_k_weights.dtype if name == "d top_k_weights" else dtype), name
    assert_close(actual, run_reference(case, layer, inputs), dtype)


class Recorder(TorchDispatchMode):
    """Calls of our operators that ran: (name, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "mohge_kernels":
            named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
            self.calls.append((func._schema.name.split("::")[1], named))
        return result

    def named(self, name: str) -> list[dict]:
        return [arguments for called, arguments in self.calls if called == name]
