"""Fast paths for experts of different width, behind transformers' experts interface.

`MoHGEExperts.forward` is the specification: `hidden_states` [T, H], `top_k_index` [T, K] and `top_k_weights` [T, K]
in, [T, H] out. Ids at or above `num_experts` mark slots to skip. Under expert parallelism ids are local; the experts
of a rank are numbered like a prefix of all experts, so the tables by id hold there too.

Shapes: S = T K pairs of a token and an expert, G groups, N_g experts of width W_g in group g.
"""

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, grouped_mm_experts_forward
from transformers.utils import logging
from transformers.utils.import_utils import is_torchdynamo_compiling


try:
    import mohge_kernels
except ImportError:  # this file also travels with checkpoints
    mohge_kernels = None

logger = logging.get_logger(__name__)

_OWN_IMPLEMENTATIONS = ("mohge", "mohge_prepacked")


class HeterogeneousExpertsInterface(ExpertsInterface):
    """
    What `experts_implementation` means for groups of different width: `"mohge"` (the default), `"mohge_prepacked"` and
    `"grouped_mm"` are the functions below, and any other in transformers' `ALL_EXPERTS_FUNCTIONS`, each written for
    experts of one width, runs once for each group.
    """

    def get_interface(self, experts_implementation: str, default: Callable) -> Callable:
        return partial(_forward_if_kept, function=self._function(experts_implementation, default))

    @staticmethod
    def _function(experts_implementation: str, default: Callable) -> Callable:
        if experts_implementation in _OWN_IMPLEMENTATIONS:
            return mohge_forward
        function = ALL_EXPERTS_FUNCTIONS.get_interface(experts_implementation, default)
        if function is default:
            return default
        if function is grouped_mm_experts_forward:
            return grouped_mm_forward
        return partial(per_group_forward, function=function)


def _forward_if_kept(
    experts: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    function: Callable,
) -> torch.Tensor:
    if experts.kept_groups:
        return function(experts, hidden_states, top_k_index, top_k_weights)
    # What an expert of width 0 computes: nothing, but with gradients of zero, for which data parallelism waits.
    nothing = hidden_states[:, :0] @ hidden_states.new_zeros(0, hidden_states.shape[1])
    return (nothing * top_k_weights.sum(1, keepdim=True)).to(hidden_states.dtype)


def _refuse_other_models(experts: nn.Module, *args):
    raise ValueError(
        f'`experts_implementation="{experts.config._experts_implementation}"` is for MoHGE models, and '
        f'{type(experts).__name__} belongs to another: choose "grouped_mm"'
    )


for name in _OWN_IMPLEMENTATIONS:  # transformers accepts no name that is not registered
    ALL_EXPERTS_FUNCTIONS.register(name, _refuse_other_models)


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


def mohge_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    The kernels of `mohge_kernels`; `grouped_mm_forward` where there are none, with one warning that says why, and
    without one where somebody has quantised the experts.

    `"mohge_prepacked"` is for inference on CPU: with copies of the weights in oneDNN's own layout, which take the
    memory of the experts once more. They are made in evaluation mode without gradients, and made anew when a weight
    changes; changes through `.data` are not seen.
    """
    gate_up, down = map(list, zip(*experts.groups(), strict=True))
    dtype = compute_dtype(hidden_states, gate_up[0])
    reason = _reason_against_kernels(experts, gate_up + down, dtype)
    if reason is not None:
        quantized = getattr(experts.config, "quantization_config", None) is not None
        if not quantized and not is_torchdynamo_compiling():
            logger.warning_once(
                f'`experts_implementation="{experts.config._experts_implementation}"`: {reason}. "grouped_mm" runs '
                "instead; ask for it to silence this."
            )
        return grouped_mm_forward(experts, hidden_states, top_k_index, top_k_weights)
    emulated = mohge_kernels.EMULATES_BFLOAT16 and dtype == torch.bfloat16 and hidden_states.device.type == "cpu"
    if emulated and not is_torchdynamo_compiling():
        logger.warning_once(
            "this processor has no instructions for bfloat16: with `dtype=torch.float32` training and long prompts "
            "are faster here, though not decoding, and weights take twice the memory"
        )
    packed = None
    if experts.config._experts_implementation == "mohge_prepacked" and dtype == gate_up[0].dtype:
        packed = _packed_experts(experts, gate_up, down)
    if top_k_weights.dtype != dtype:
        top_k_weights = top_k_weights.float()
    output = mohge_kernels.swiglu_experts(
        hidden_states.to(dtype),
        [stack.to(dtype) for stack in gate_up],
        [stack.to(dtype) for stack in down],
        top_k_index,
        top_k_weights,
        key_of_expert=experts.key_of_expert[: experts.num_experts],
        keys_per_group=experts.keys_per_group,
        packed=packed,
    )
    return output.to(hidden_states.dtype)


def _reason_against_kernels(experts: nn.Module, stacks: list[torch.Tensor], dtype: torch.dtype) -> str | None:
    if mohge_kernels is None:
        return "the package mohge, with its kernels, is not installed"
    if experts.has_bias or experts.gate_function is not None:
        return "there are no kernels for experts with biases or with a gate of their own"
    if not experts.act_is_silu:
        return f"there are no kernels for the activation {type(experts.act_fn).__name__}, only for SiLU"
    if any(is_traceable_wrapper_subclass(stack) or not stack.is_contiguous() for stack in stacks):
        return "the experts' weights are no plain contiguous tensors"
    if not is_torchdynamo_compiling() and mohge_kernels.transforms_active():
        return "the kernels know neither torch.func nor forward-mode differentiation"
    return mohge_kernels.reason_against(stacks[0].device, dtype)


_PACKED: "WeakKeyDictionary[nn.Module, tuple[list, mohge_kernels.PackedExperts, list]]" = WeakKeyDictionary()


def _packed_experts(experts: nn.Module, gate_up: list[torch.Tensor], down: list[torch.Tensor]):
    """The packed copies of the weights, made anew where these have changed; None where nothing can use them."""
    if is_torchdynamo_compiling():
        return None
    reason = mohge_kernels.PackedExperts.reason_against(gate_up[0])
    if reason is not None:
        logger.warning_once(f'`experts_implementation="mohge_prepacked"`: {reason}. The weights are used as they are.')
    # Of weights made for one call (by an adapter, say), or that keep no count of changes, a copy would serve once.
    lasting = all(isinstance(stack, nn.Parameter) and not stack.is_inference() for stack in gate_up + down)
    if reason is not None or not lasting or experts.training or torch.is_grad_enabled():
        _PACKED.pop(experts, None)
        return None
    # While there is a weak reference to a storage, no other takes its address.
    storages = [StorageWeakRef(stack.untyped_storage()) for stack in gate_up + down]
    version = [(storage.cdata, stack._version) for storage, stack in zip(storages, gate_up + down, strict=True)]
    entry = _PACKED.get(experts)
    if entry is None or entry[0] != version:
        _PACKED.pop(experts, None)  # the old copies go before the new ones come
        entry = _PACKED[experts] = version, mohge_kernels.PackedExperts(gate_up, down), storages
    return entry[1]


def grouped_mm_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """One sort of all pairs, then `torch.nn.functional.grouped_mm` over the experts of each group."""
    if is_torchdynamo_compiling():  # the sizes of the groups must reach the host
        return per_group_forward(
            experts, hidden_states, top_k_index, top_k_weights, function=grouped_mm_experts_forward
        )
    groups, biases = experts.groups(), experts.biases()
    dtype = compute_dtype(hidden_states, groups[0][0])  # grouped_mm does not follow autocast by itself
    pairs = _SortedPairs(
        experts.sort_keys(top_k_index), [gate_up.shape[0] for gate_up, _ in groups], experts.keys_per_group
    )
    rows = []
    keys = pairs.keys_S.split(pairs.sizes)[:-1]
    for group, (rows_in, offsets) in enumerate(zip(pairs.gather(hidden_states.to(dtype)), pairs.offsets, strict=True)):
        if rows_in.shape[0] == 0 and not torch.is_grad_enabled():  # with gradients, every group needs one
            rows.append(rows_in)
            continue
        gate_up, down = (_cast(stack, dtype) for stack in groups[group])
        if experts.has_bias:
            slots = keys[group] - group * experts.keys_per_group
            gate_up_bias, down_bias = (stack.to(dtype)[slots] for stack in biases[group])
            gated = experts._apply_gate(_grouped_linear(rows_in, gate_up, offsets) + gate_up_bias)
            rows.append(_grouped_linear(gated, down, offsets) + down_bias)
        else:
            gated = experts._apply_gate(_grouped_linear(rows_in, gate_up, offsets))
            rows.append(_grouped_linear(gated, down, offsets))
    return pairs.combine(rows, top_k_weights).to(hidden_states.dtype)


def compute_dtype(hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """The dtype that the experts compute in: that of their weights, or of autocast."""
    device = hidden_states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _grouped_linear(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """[S, in] rows sorted by expert times [N, out, in]: [S, out]."""
    if _is_quantized(weight):
        return _QuantizedGroupedLinear.apply(rows, weight, offsets)
    aligned = all(size * weight.element_size() % 16 == 0 for size in weight.shape[1:])
    if aligned and weight.dtype != torch.float64:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight.transpose(1, 2), offsets)


def _is_quantized(weight: torch.Tensor) -> bool:
    """Whether this is a tensor of torchao that stands for weights in fewer bits."""
    return is_traceable_wrapper_subclass(weight) and type(weight).__module__.startswith("torchao.")


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight if _is_quantized(weight) else weight.to(dtype)


class _QuantizedGroupedLinear(torch.autograd.Function):
    """`_grouped_linear` with frozen quantised weights. Forward and backward each dequantise the group for themselves:
    autograd would keep the dequantised weights of all layers."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(offsets)
        ctx.weight = weight
        return _grouped_linear(rows, weight.dequantize().to(rows.dtype), offsets)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (offsets,) = ctx.saved_tensors
        weight = ctx.weight.dequantize().to(grad.dtype)
        return _grouped_linear(grad, weight.transpose(1, 2), offsets), None, None


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
    views = [_GroupOfExperts(experts, *group) for group in zip(experts.groups(), experts.biases(), strict=True)]
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


class _GroupOfExperts:
    """What a function for experts of one width reads of its module."""

    has_gate = True
    has_post_expert_norm = False
    is_concatenated = True
    is_transposed = False
    _is_expert_parallel = True

    def __init__(self, experts: nn.Module, stacks: tuple, biases: tuple):
        self.gate_up_proj, self.down_proj = stacks
        self.gate_up_proj_bias, self.down_proj_bias = biases
        self.has_bias = experts.has_bias
        self.num_experts = self.gate_up_proj.shape[0]
        self.act_fn = experts.act_fn
        self.config = experts.config
        self.training = experts.training
        self._apply_gate = experts._apply_gate


__all__ = [
    "HeterogeneousExpertsInterface",
    "compute_dtype",
    "grouped_mm_forward",
    "mohge_forward",
    "per_group_forward",
]
