"""Fast paths for experts of different width, behind transformers' experts interface.

`MoHGEExperts.forward` is the specification: `hidden_states` [T, H], `top_k_index` [T, K] and `top_k_weights` [T, K]
in, [T, H] out. Ids at or above `num_experts` mark slots to skip. Under expert parallelism ids are local; the experts
of a rank are numbered like a prefix of all experts, so the tables by id hold there too.

Shapes: S = T K pairs of a token and an expert, G groups, N_g experts of width W_g in group g.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, grouped_mm_experts_forward
from transformers.utils.import_utils import is_torch_distributed_available, is_torchdynamo_compiling


class HeterogeneousExpertsInterface(ExpertsInterface):
    """
    What `experts_implementation` means for groups of different width: `"grouped_mm"` is `grouped_mm_forward` below,
    and any other function in transformers' `ALL_EXPERTS_FUNCTIONS`, each written for experts of one width, runs once
    for each group.
    """

    def get_interface(self, experts_implementation: str, default: Callable) -> Callable:
        function = ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default)
        if function is default:
            return default
        if function is grouped_mm_experts_forward:
            return grouped_mm_forward
        return partial(per_group_forward, function=function)


_FEW_PAIRS = 16
"""Up to this many pairs, `_pair_by_pair` was the faster one (measured on two cores, hidden sizes 512 and 1024)."""


class _SortedPairs:
    """The pairs of a token and an expert, sorted by group and by expert inside it; pairs to skip come last."""

    def __init__(self, keys_TK: torch.Tensor, counts: list[int], keys_per_group: int):
        self.keys_S, self.order_S = torch.sort(keys_TK.flatten(), stable=True)
        per_key = torch.zeros(len(counts) * keys_per_group + 1, dtype=torch.int64, device=keys_TK.device)
        per_key.scatter_add_(0, self.keys_S, torch.ones_like(self.keys_S))
        per_group = per_key[:-1].view(len(counts), -1)
        self.offsets = [group[:n].cumsum(0, dtype=torch.int32) for group, n in zip(per_group, counts, strict=True)]
        self.sizes = torch.cat([per_group.sum(1), per_key[-1:]]).tolist()  # the one wait for the device
        self.shape_TK = keys_TK.shape

    def gather(self, hidden_states_TH: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The input rows of each group."""
        return hidden_states_TH.index_select(0, self.order_S // self.shape_TK[1]).split(self.sizes)[:-1]

    def combine(self, rows: list[torch.Tensor], weights_TK: torch.Tensor) -> torch.Tensor:
        """[T, H]: the weighted sum of each token's output rows."""
        skipped = rows[0].new_zeros(self.sizes[-1], rows[0].shape[1])
        position_S = torch.empty_like(self.order_S)
        position_S[self.order_S] = torch.arange(self.order_S.numel(), device=self.order_S.device)
        rows_TKH = torch.cat([*rows, skipped]).index_select(0, position_S).view(*self.shape_TK, rows[0].shape[1])
        return (weights_TK.to(rows_TKH.dtype).unsqueeze(1) @ rows_TKH).squeeze(1)


def grouped_mm_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """One sort of all pairs, then `torch.nn.functional.grouped_mm` over the experts of each group."""
    keys_TK = experts.sort_keys(top_k_index)
    gate_up, down = map(list, zip(*experts.groups(), strict=True))
    if not is_torchdynamo_compiling():
        output = _grouped(hidden_states, keys_TK, top_k_weights, gate_up, down, experts.keys_per_group, experts.act_fn)
    # The group sizes must reach the host, which a graph without breaks cannot express: hide it in an operator.
    elif experts.hidden_act == "silu":
        output = torch.ops.mohge.grouped_swiglu(
            hidden_states, keys_TK, top_k_weights, gate_up, down, experts.keys_per_group
        )
    else:
        output = per_group_forward(
            experts, hidden_states, top_k_index, top_k_weights, function=grouped_mm_experts_forward
        )
    return output.to(hidden_states.dtype)


def _grouped(
    hidden_states: torch.Tensor,
    keys_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    keys_per_group: int,
    act_fn: Callable,
) -> torch.Tensor:
    dtype = gate_up[0].dtype
    if torch.is_autocast_enabled(hidden_states.device.type):  # grouped_mm does not follow autocast by itself
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
    if 0 < keys_TK.numel() <= _FEW_PAIRS and keys_TK.device.type == "cpu" and not torch.is_grad_enabled():
        return _pair_by_pair(hidden_states.to(dtype), keys_TK, weights_TK, gate_up, down, keys_per_group, act_fn)
    pairs = _SortedPairs(keys_TK, [w.shape[0] for w in gate_up], keys_per_group)
    rows = []
    for rows_in, offsets, gate_up_g, down_g in zip(
        pairs.gather(hidden_states.to(dtype)), pairs.offsets, gate_up, down, strict=True
    ):
        if rows_in.shape[0] == 0 and not torch.is_grad_enabled():  # with gradients, every group needs one
            rows.append(rows_in)
            continue
        gate, up = _grouped_linear(rows_in, gate_up_g.to(dtype), offsets).chunk(2, dim=-1)
        rows.append(_grouped_linear(act_fn(gate) * up, down_g.to(dtype), offsets))
    return pairs.combine(rows, weights_TK)


def _pair_by_pair(
    hidden_states: torch.Tensor,
    keys_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    keys_per_group: int,
    act_fn: Callable,
) -> torch.Tensor:
    """`_grouped` for the few pairs of a decoding step on CPU, where sorting would take longer than the products."""
    rows = []
    for pair, key in enumerate(keys_TK.flatten().tolist()):
        group, slot = divmod(key, keys_per_group)
        row = hidden_states[pair // keys_TK.shape[1]]
        if group == len(gate_up):
            rows.append(torch.zeros_like(row))
            continue
        gate, up = F.linear(row, gate_up[group][slot].to(row.dtype)).chunk(2)
        rows.append(F.linear(act_fn(gate) * up, down[group][slot].to(row.dtype)))
    rows_TKH = torch.stack(rows).view(*keys_TK.shape, hidden_states.shape[1])
    return (weights_TK.to(rows_TKH.dtype).unsqueeze(1) @ rows_TKH).squeeze(1)


def _grouped_linear(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[S, in] rows sorted by expert times [N, out, in]: [S, out]."""
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and weight.dtype != torch.float64:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight.transpose(1, 2), offsets)


def _grouped_swiglu(
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    keys_per_group: int,
) -> torch.Tensor:
    return _grouped(hidden_states, keys, weights, gate_up, down, keys_per_group, F.silu)


def _grouped_swiglu_backward(
    grad_output: torch.Tensor,
    hidden_states: torch.Tensor,
    keys: torch.Tensor,
    weights: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    keys_per_group: int,
) -> list[torch.Tensor]:
    """Gradients of hidden states, weights and every matrix. Computes the activations again; autograd does not record
    inside an operator, so the formulas stand here."""
    dtype = gate_up[0].dtype
    linear_backward = torch.ops.transformers.grouped_mm_fallback_backward
    pairs = _SortedPairs(keys, [w.shape[0] for w in gate_up], keys_per_group)
    weights_S = weights.flatten().index_select(0, pairs.order_S).to(dtype).unsqueeze(1)
    d_rows, d_weights, d_gate_up, d_down = [], [], [], []
    for rows_in, d_out, weight, offsets, gate_up_g, down_g in zip(
        pairs.gather(hidden_states.to(dtype)),
        pairs.gather(grad_output.to(dtype)),
        weights_S.split(pairs.sizes)[:-1],
        pairs.offsets,
        gate_up,
        down,
        strict=True,
    ):
        gate, up = _grouped_linear(rows_in, gate_up_g, offsets).chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        silu = gate * sigmoid
        activation = silu * up
        d_weights.append((d_out * _grouped_linear(activation, down_g, offsets)).sum(1))
        d_activation, d_down_g = linear_backward(activation, down_g.transpose(1, 2), offsets, d_out * weight)
        d_gate = d_activation * up * (sigmoid + silu * (1 - sigmoid))
        d_projection = torch.cat([d_gate, d_activation * silu], dim=1)
        d_rows_g, d_gate_up_g = linear_backward(rows_in, gate_up_g.transpose(1, 2), offsets, d_projection)
        d_rows.append(d_rows_g)
        d_gate_up.append(d_gate_up_g.transpose(1, 2).contiguous())
        d_down.append(d_down_g.transpose(1, 2).contiguous())
    chosen_S = pairs.order_S[: pairs.order_S.numel() - pairs.sizes[-1]]
    d_hidden = torch.zeros_like(hidden_states, dtype=dtype)
    d_hidden.index_add_(0, chosen_S // keys.shape[1], torch.cat(d_rows))
    d_weights_TK = torch.zeros_like(weights).flatten()
    d_weights_TK[chosen_S] = torch.cat(d_weights).to(weights.dtype)
    return [d_hidden.to(hidden_states.dtype), d_weights_TK.view(weights.shape), *d_gate_up, *d_down]


def _register_operators():
    """`mohge::grouped_swiglu` and its backward, for torch.compile."""
    forward = torch.library.custom_op("mohge::grouped_swiglu", _grouped_swiglu, mutates_args=())
    backward = torch.library.custom_op("mohge::grouped_swiglu_backward", _grouped_swiglu_backward, mutates_args=())

    @forward.register_fake
    def _(hidden_states, keys, weights, gate_up, down, keys_per_group):
        return torch.empty_like(hidden_states, dtype=gate_up[0].dtype)

    @backward.register_fake
    def _(grad_output, hidden_states, keys, weights, gate_up, down, keys_per_group):
        return [torch.empty_like(tensor) for tensor in (hidden_states, weights, *gate_up, *down)]

    def setup_context(ctx, inputs, output):
        hidden_states, keys, weights, gate_up, down, ctx.keys_per_group = inputs
        ctx.save_for_backward(hidden_states, keys, weights, *gate_up, *down)

    def run_backward(ctx, grad_output):
        hidden_states, keys, weights, *matrices = ctx.saved_tensors
        groups = len(matrices) // 2
        d_hidden, d_weights, *d_matrices = torch.ops.mohge.grouped_swiglu_backward(
            grad_output, hidden_states, keys, weights, matrices[:groups], matrices[groups:], ctx.keys_per_group
        )
        return d_hidden, None, d_weights, d_matrices[:groups], d_matrices[groups:], None

    forward.register_autograd(run_backward, setup_context=setup_context)


if not hasattr(torch.ops.mohge, "grouped_swiglu"):  # a checkpoint's own copy of this file may have been first
    _register_operators()


def per_group_forward(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    function: Callable,
) -> torch.Tensor:
    """
    Run `function`, which transformers has for experts of one width, on the pairs of each group.

    In a compiled or captured graph, where the sizes of the groups cannot be known, every group sees all pairs instead;
    those of other groups are masked the way expert parallelism masks those of other ranks: local id `N_g`, weight 0.
    """
    keys_TK = experts.sort_keys(top_k_index)
    views = [_view_of_group(experts, gate_up, down) for gate_up, down in experts.groups()]
    if is_torchdynamo_compiling() or (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
        output = torch.zeros_like(hidden_states)
        for group, view in enumerate(views):
            masked = keys_TK // experts.keys_per_group != group
            slots_TK = (keys_TK % experts.keys_per_group).masked_fill(masked, view.num_experts)
            output = output + function(view, hidden_states, slots_TK, top_k_weights.masked_fill(masked, 0))
        return output
    pairs = _SortedPairs(keys_TK, [view.num_experts for view in views], experts.keys_per_group)
    rows = []
    for view, rows_in, keys in zip(
        views, pairs.gather(hidden_states), pairs.keys_S.split(pairs.sizes)[:-1], strict=True
    ):
        if rows_in.shape[0] == 0 and not torch.is_grad_enabled():
            rows.append(rows_in)
            continue
        slots = (keys % experts.keys_per_group).unsqueeze(1)
        rows.append(function(view, rows_in, slots, rows_in.new_ones(slots.shape)))
    return pairs.combine(rows, top_k_weights).to(hidden_states.dtype)


def _view_of_group(experts: nn.Module, gate_up: torch.Tensor, down: torch.Tensor) -> SimpleNamespace:
    """What a function for experts of one width reads of its module."""
    return SimpleNamespace(
        gate_up_proj=gate_up,
        down_proj=down,
        num_experts=gate_up.shape[0],
        act_fn=experts.act_fn,
        has_gate=True,
        has_bias=False,
        has_post_expert_norm=False,
        is_concatenated=True,
        is_transposed=False,
        config=experts.config,
        training=experts.training,
        _apply_gate=experts._apply_gate,
        _is_expert_parallel=True,
    )


if is_torch_distributed_available():
    from torch.distributed.tensor import Shard
    from transformers.distributed.expert_parallel import MoEParamShard
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

    class HeterogeneousExpertsShard(MoEParamShard):
        """Expert-parallel style of one group's stack of weights: each rank holds the same share of every group, and
        so, in the set-by-set numbering, a contiguous range of ids (MoHGE's all-size group-decoupling allocation)."""

        def __init__(self):
            super().__init__(Shard(0))

        def shard_param(self, module, param, mesh):
            count, ranks = module._parameters[param].shape[0], mesh.size()
            if count % ranks:
                raise ValueError(
                    f"`num_experts_per_group`: {param} has {count} experts, which {ranks} ranks cannot share "
                    "equally: choose an `ep_size` that divides the number of experts of every group"
                )
            super().shard_param(module, param, mesh)
            module.num_experts = len(module.expert_groups) // ranks
            module._is_expert_parallel = True

    ALL_PARALLEL_STYLES.register("heterogeneous_experts", HeterogeneousExpertsShard())

__all__ = ["HeterogeneousExpertsInterface", "grouped_mm_forward", "per_group_forward"]
