"""Forward and backward of the experts by Triton kernels: buffers and launches.

Shapes as in `triton_forward.py`: T tokens, K slots, S = T K pairs, H hidden size, G groups of keys_per_group keys,
N_g experts of width W_g in group g.
"""

import math

import torch
import triton

from . import triton_candidates, tuning
from .triton_backward import d_activation_kernel, d_weights_kernel
from .triton_forward import combine_kernel, rows_kernel, up_kernel
from .triton_sort import sort_pairs


_SAVED_PERCENT = 102
"""Room for saved pre-activations, relative to what pairs spread evenly over the experts need. An upper bound would be
half as large again in a layer with widths from 384 to 1280."""

_SPARE_ROWS = 16
"""Room for as many more rows of the widest expert: with few pairs the spread is never even."""


class _Layer:
    """The shapes of one call, and its launches."""

    def __init__(self, hidden_states, gate_up, down, keys_per_group, slots, grad_output=None):
        self.widths = tuple(weight.shape[2] for weight in down)
        self.experts = tuple(weight.shape[0] for weight in down)
        self.gate_up, self.down = tuple(gate_up), tuple(down)
        self.hidden_size = hidden_states.shape[1]
        self.slots = slots
        self.pairs = hidden_states.shape[0] * slots
        self.device, self.dtype = hidden_states.device, hidden_states.dtype
        self.keys_per_group = keys_per_group
        # Of an address and of the distance between rows of tokens the compiler knows whether it is a multiple of 16.
        per_token = [hidden_states, *([] if grad_output is None else [grad_output])]
        self.aligned = (
            math.gcd(self.hidden_size, *self.widths) * self.dtype.itemsize % 16 == 0
            and all(tensor.stride(0) % 16 == 0 for tensor in per_token)
            and all(tensor.data_ptr() % 16 == 0 for tensor in (*per_token, *gate_up, *down))
        )
        if self.device.type == "cpu":
            self.precision = "interpreter"
        else:
            # The older `allow_tf32` may not be read once somebody has set this one.
            self.precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
        self.layout = {
            "WIDTHS": self.widths,
            "B": keys_per_group,
            "KEYS": triton.next_power_of_2(len(self.widths) * keys_per_group),
            "H": self.hidden_size,
            "ALIGN": math.gcd(16, *self.widths),
        }

    def tiles(self, kernel: str) -> tuple[tuning.Config, dict]:
        """What `kernel` is to be launched with."""
        experts = sum(self.experts)
        mean_width = sum(n * w for n, w in zip(self.experts, self.widths, strict=True)) / experts
        chosen = tuning.config(
            kernel,
            self.dtype,
            self.pairs,
            experts,
            self.hidden_size,
            mean_width,
            self.aligned,
            self.device,
        )
        return chosen, {
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "BLOCK_K": chosen.block_k,
            "PRECISION": self.precision,
            "FLATTEN": chosen.flatten,
            "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
        }

    def even(self, factor: int, block: int) -> bool:
        return all(factor * width % block == 0 for width in self.widths)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def up(self, hidden_states, order, counts, activation, pre, capacity, recompute=False):
        chosen, options = self.tiles("up")
        if chosen.variant and not recompute:
            triton_candidates.up_by_table(
                self, chosen, options, hidden_states, order, counts, activation, pre, capacity
            )
            return
        up_kernel[(tuning.programs(chosen, self.device),)](
            hidden_states, hidden_states.stride(0), self.gate_up, order, counts, activation, pre, capacity,
            self.hidden_size, SLOTS=self.slots, ACTIVATE=not recompute, SAVE=capacity > 0, RECOMPUTE=recompute,
            **self.layout, **options,
        )  # fmt: skip

    def rows(self, kernel, ragged, weights, counts, output):
        chosen, options = self.tiles(kernel)
        if chosen.variant:
            triton_candidates.rows_by_group(self, kernel, chosen, options, ragged, weights, counts, output)
            return
        factor = 1 if kernel == "down" else 2
        rows_kernel[(tuning.programs(chosen, self.device),)](
            ragged, weights, counts, output,
            FACTOR=factor, TRANSPOSED=kernel == "down", BY_COST=chosen.block_m > 16,
            EVEN_K=self.even(factor, chosen.block_k), **self.layout, **options,
        )  # fmt: skip

    def down_and_combine(self, activation, weights, position, counts, output):
        chosen, options = self.tiles("down")
        if chosen.variant == "split":
            triton_candidates.split_down(self, chosen, options, activation, weights, position, counts, output)
            return
        rows = self.empty(self.pairs, self.hidden_size)
        self.rows("down", activation, self.down, counts, rows)
        self.combine(rows, weights, position, output)

    def combine(self, rows, weights, position, output, partials=None, d_weights=None):
        parts = 0 if partials is None else partials.shape[1]
        block = min(triton.next_power_of_2(self.hidden_size), 1024 if position.shape[0] >= 256 else 256)
        columns = triton.cdiv(self.hidden_size, block) if output is not None else 1
        combine_kernel[(position.shape[0], columns)](
            rows, weights, position, output, partials, d_weights,
            SLOTS=self.slots, H=self.hidden_size, PARTIALS=parts, WEIGHTED=weights is not None,
            SUM_ROWS=output is not None, SLOTS_POW2=triton.next_power_of_2(self.slots),
            PARTIALS_POW2=triton.next_power_of_2(max(parts, 1)), BLOCK_H=block, num_warps=4 if block > 512 else 2,
        )  # fmt: skip

    def d_activation(self, d_output, weights, order, counts, pre, d_pre, weighted, partials, need_d_pre):
        chosen, options = self.tiles("d_activation")
        parts = 0 if partials is None else partials.shape[1]
        d_activation_kernel[(tuning.programs(chosen, self.device),)](
            d_output, d_output.stride(0), self.down, weights, order, counts, pre, pre.numel(), d_pre, weighted,
            partials, self.hidden_size, SLOTS=self.slots, EVEN_N=self.even(1, chosen.block_n), PARTIALS=parts,
            D_PRE=need_d_pre, WEIGHTED=weighted is not None,
            PARTS=tuning.epilogue_parts(chosen, self.aligned, self.device), **self.layout, **options,
        )  # fmt: skip

    def d_weights(self, hidden_states, d_output, d_pre, weighted, order, counts, d_gate_up, d_down):
        chosen, options = self.tiles("d_weights")
        d_weights_kernel[(tuning.programs(chosen, self.device),)](
            hidden_states, hidden_states.stride(0), d_output, d_output.stride(0), d_pre, weighted, order, counts,
            tuple(d_gate_up) or None, tuple(d_down) or None, EXPERTS=self.experts, SLOTS=self.slots,
            GATE_UP=bool(d_gate_up), DOWN=bool(d_down), EVEN_M=self.even(1, chosen.block_m),
            **self.layout, **options,
        )  # fmt: skip


def saved_elements(pairs: int, gate_up: list[torch.Tensor]) -> int:
    """Elements of the buffer of saved pre-activations."""
    widest = max(weight.shape[1] for weight in gate_up)
    total = sum(weight.shape[0] * weight.shape[1] for weight in gate_up)
    experts = sum(weight.shape[0] for weight in gate_up)
    # In integers and without a branch: under torch.compile the number of pairs may be a symbol.
    even = pairs * total * _SAVED_PERCENT // (100 * experts) + 1
    return torch.sym_min(pairs * widest, even + _SPARE_ROWS * widest)


def _last_dimension_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def forward(
    hidden_states: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    index: torch.Tensor,
    key_of_expert: torch.Tensor,
    weights: torch.Tensor,
    keys_per_group: int,
    save: bool,
) -> tuple[torch.Tensor, ...]:
    """
    Returns:
        output [T, H]; pre, the pre-activations kept for backward (empty without `save`); order [S], position [T, K]
        and counts [G B] as in `triton_sort.sort_pairs`.
    """
    hidden_states = _last_dimension_contiguous(hidden_states)
    layer = _Layer(hidden_states, gate_up, down, keys_per_group, index.shape[1])
    with torch.cuda.device_of(hidden_states):
        order, position, counts = sort_pairs(index, key_of_expert.contiguous(), len(gate_up) * keys_per_group)
        pre = layer.empty(saved_elements(layer.pairs, gate_up) if save else 0)
        output = layer.empty(*hidden_states.shape)
        if layer.pairs:
            activation = layer.empty(layer.pairs * max(layer.widths))
            layer.up(hidden_states, order, counts, activation, pre, pre.numel())
            layer.down_and_combine(activation, weights.contiguous(), position, counts, output)
        else:
            output.zero_()
    return output, pre, order, position, counts


def backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    weights: torch.Tensor,
    pre: torch.Tensor,
    order: torch.Tensor,
    position: torch.Tensor,
    counts: torch.Tensor,
    keys_per_group: int,
    needs: list[bool],
) -> list[torch.Tensor]:
    """
    Args:
        needs: which gradients to compute: of hidden_states, weights, gate_up, down.

    Returns:
        Those gradients: d_hidden_states, d_weights, *d_gate_up, *d_down.
    """
    need_hidden, need_weights, need_gate_up, need_down = needs
    grad_output, hidden_states = map(_last_dimension_contiguous, (grad_output, hidden_states))
    weights = weights.contiguous()
    layer = _Layer(hidden_states, gate_up, down, keys_per_group, position.shape[1], grad_output)
    d_hidden = layer.empty(*hidden_states.shape) if need_hidden else None
    d_weights = torch.empty_like(weights) if need_weights else None
    d_gate_up = [torch.empty_like(weight) for weight in gate_up] if need_gate_up else []
    d_down = [torch.empty_like(weight) for weight in down] if need_down else []
    gradients = [tensor for tensor in (d_hidden, d_weights) if tensor is not None] + d_gate_up + d_down
    if not layer.pairs:
        return [tensor.zero_() for tensor in gradients]
    if not gradients:
        return []

    widest = max(layer.widths)
    d_pre = layer.empty(layer.pairs * 2 * widest)
    weighted = layer.empty(layer.pairs * widest) if need_down else None
    partials = None
    if need_weights:
        parts = triton.cdiv(widest, layer.tiles("d_activation")[0].block_n)
        partials = layer.empty(layer.pairs, parts, dtype=torch.float32)
    with torch.cuda.device_of(hidden_states):
        if pre.numel() < d_pre.numel():  # otherwise there was room for any traffic
            layer.up(hidden_states, order, counts, None, d_pre, pre.numel(), recompute=True)
        layer.d_activation(
            grad_output, weights, order, counts, pre, d_pre, weighted, partials, need_hidden or need_gate_up
        )
        if need_gate_up or need_down:
            layer.d_weights(hidden_states, grad_output, d_pre, weighted, order, counts, d_gate_up, d_down)
        rows = None
        if need_hidden:
            rows = layer.empty(layer.pairs, layer.hidden_size)
            layer.rows("d_rows", d_pre, layer.gate_up, counts, rows)
        if need_hidden or need_weights:
            layer.combine(rows, None, position, d_hidden, partials, d_weights)
    return gradients
