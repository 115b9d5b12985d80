"""The public function: checks the input, and hands it to the operators."""

import os
from importlib.util import find_spec

import torch

from . import cpu, ops
from .cpu import PackedExperts
from .dispatch import transforms_active


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def swiglu_experts(
    hidden_states: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    key_of_expert: torch.Tensor | None = None,
    keys_per_group: int | None = None,
    packed: PackedExperts | None = None,
) -> torch.Tensor:
    """
    Experts of different width (MoHGE, https://huggingface.co/papers/2604.23108, section 3; HMoE,
    https://huggingface.co/papers/2408.10681), each a SwiGLU: the sum over the slots k of a token of
    `top_k_weights[t, k] * down @ (silu(gate @ x) * (up @ x))`, added up in float32.

    Deterministic; on CUDA without waiting for the device. Differentiable once in `hidden_states`, `top_k_weights` and
    the weights of the experts, in reverse mode; gradients of `gate_up` are computed if any of them requires one, and
    so those of `down`. With `MOHGE_KERNELS_DEBUG=1` in the environment ids and keys are checked too, which waits for
    the device.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`):
            In bfloat16, float16 or float32.
        gate_up (`list[torch.Tensor]`, each of shape `(experts_of_group, 2 * width, hidden_size)`):
            Rows of gate, then of up, one stack for each group, as they are in the model: nothing is copied.
        down (`list[torch.Tensor]`, each of shape `(experts_of_group, hidden_size, width)`):
            The same for down.
        top_k_index (`torch.Tensor` of shape `(tokens, slots)`):
            Ids of experts; slots with an id outside [0, experts) are skipped, whatever their weight.
        top_k_weights (`torch.Tensor` of shape `(tokens, slots)`):
            In float32 or the dtype of `hidden_states`.
        key_of_expert (`torch.Tensor` of shape `(experts,)`, *optional*):
            `group * keys_per_group + place in the group` of each id; `groups * keys_per_group` for an expert without
            weights, whose slots are skipped. By default ids number the experts group by group.
        keys_per_group (`int`, *optional*, defaults to the size of the largest group):
            At least the size of the largest group.
        packed ([`PackedExperts`], *optional*):
            Copies of `gate_up` and `down`, which are used instead where no gradient is recorded and nothing compiled.

    Returns:
        `torch.Tensor` of shape `(tokens, hidden_size)`, in the dtype of `hidden_states`.

    Raises:
        ValueError: if dtypes, devices, shapes or strides do not fit; nothing has run then.
        NotImplementedError: inside `torch.func` and forward-mode differentiation.
    """
    check_weights(gate_up, down)
    counts = [stack.shape[0] for stack in gate_up]
    if keys_per_group is None:
        keys_per_group = max(counts)
    if key_of_expert is None:
        key_of_expert = _keys_by_group(counts, keys_per_group, top_k_index.device)
    _check_call(hidden_states, gate_up, top_k_index, top_k_weights, key_of_expert, keys_per_group)
    save = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (hidden_states, top_k_weights, *gate_up, *down)
    )
    plain = type(hidden_states) is torch.Tensor and not torch.compiler.is_compiling()
    if plain and transforms_active():
        raise NotImplementedError("swiglu_experts knows neither torch.func nor forward-mode differentiation")
    if not save and plain and ops.implementation(hidden_states) is cpu:
        cpu.release_spare_memory(gate_up + down)
        if packed is not None:
            gate_up, down = packed.gate_up, packed.down
        return cpu.infer(hidden_states, gate_up, down, top_k_index, key_of_expert, top_k_weights, keys_per_group)
    return ops.swiglu_experts(
        hidden_states, gate_up, down, top_k_index, key_of_expert, top_k_weights, keys_per_group, save
    )[0]


def reason_against(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there are no kernels for experts of `dtype` on `device`, in half a sentence; None where there are."""
    if dtype not in DTYPES:
        return f"there are no kernels for {dtype}, only for {', '.join(map(str, DTYPES))}"
    if device.type == "cuda":
        return _reason_against_gpu(device)
    if device.type != "cpu":
        return f"there are no kernels for device {device.type}"
    return None


@torch.compiler.assume_constant_result
def _reason_against_gpu(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the kernels have not been tried on ROCm"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need a GPU of compute capability 8.0 or higher"
    return None


def check_weights(gate_up: list[torch.Tensor], down: list[torch.Tensor]):
    """Raise a `ValueError` unless the stacks of weights fit each other."""
    if not gate_up or len(gate_up) != len(down):
        raise ValueError(
            f"`gate_up` has {len(gate_up)} groups and `down` has {len(down)}: give one stack of each for every group"
        )
    first = gate_up[0]
    for name, stacks in (("gate_up", gate_up), ("down", down)):
        for group, stack in enumerate(stacks):
            if stack.dim() != 3:
                raise ValueError(f"`{name}[{group}]` has {stack.dim()} dimensions: it must have 3, stack the experts")
            if stack.dtype not in DTYPES or stack.dtype != first.dtype:
                raise ValueError(
                    f"`{name}[{group}]` is {stack.dtype} and `gate_up[0]` is {first.dtype}: all must have the same "
                    f"dtype, one of {', '.join(map(str, DTYPES))}; convert them with .to()"
                )
            if stack.device != first.device:
                raise ValueError(
                    f"`{name}[{group}]` is on {stack.device} and `gate_up[0]` on {first.device}: move all weights to "
                    "one device"
                )
            if not stack.is_contiguous():
                raise ValueError(f"`{name}[{group}]` is not contiguous: pass {name}[{group}].contiguous()")
    for group, (up, back) in enumerate(zip(gate_up, down, strict=True)):
        count, width = back.shape[0], back.shape[2]
        expected = (count, 2 * width, first.shape[2])
        if up.shape != expected or back.shape[1] != first.shape[2]:
            raise ValueError(
                f"`gate_up[{group}]` has shape {tuple(up.shape)} and `down[{group}]` {tuple(back.shape)}: they must "
                f"be (experts, 2 * width, hidden_size) and (experts, hidden_size, width), with hidden_size "
                f"{first.shape[2]} as in `gate_up[0]`"
            )


def _check_call(hidden_states, gate_up, top_k_index, top_k_weights, key_of_expert, keys_per_group):
    weight = gate_up[0]
    if hidden_states.dim() != 2 or hidden_states.shape[1] != weight.shape[2]:
        raise ValueError(
            f"`hidden_states` has shape {tuple(hidden_states.shape)}: it must be (tokens, {weight.shape[2]}), the "
            "hidden_size of `gate_up[0]`"
        )
    if hidden_states.dtype != weight.dtype:
        raise ValueError(
            f"`hidden_states` is {hidden_states.dtype} and `gate_up[0]` is {weight.dtype}: convert one with .to()"
        )
    if top_k_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`top_k_index` is {top_k_index.dtype}: it must be int64 or int32, use .long()")
    if top_k_index.dim() != 2 or top_k_index.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"`top_k_index` has shape {tuple(top_k_index.shape)}: it must be ({hidden_states.shape[0]}, slots), one "
            "row for each row of `hidden_states`"
        )
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"`top_k_weights` has shape {tuple(top_k_weights.shape)}: it must be {tuple(top_k_index.shape)}, that of "
            "`top_k_index`"
        )
    if top_k_weights.dtype not in (torch.float32, hidden_states.dtype):
        raise ValueError(
            f"`top_k_weights` is {top_k_weights.dtype}: it must be float32 or {hidden_states.dtype}, use .float()"
        )
    if key_of_expert.dim() != 1 or key_of_expert.dtype != torch.int64:
        raise ValueError(
            f"`key_of_expert` is {key_of_expert.dtype} of shape {tuple(key_of_expert.shape)}: it must be int64 of "
            "shape (experts,), use .long()"
        )
    largest = max(stack.shape[0] for stack in gate_up)
    if keys_per_group < largest:
        raise ValueError(f"`keys_per_group` is {keys_per_group}: it must be at least {largest}, the largest group")
    for name, tensor in (
        ("hidden_states", hidden_states),
        ("top_k_index", top_k_index),
        ("top_k_weights", top_k_weights),
        ("key_of_expert", key_of_expert),
    ):
        if tensor.device != weight.device:
            raise ValueError(
                f"`{name}` is on {tensor.device} and `gate_up[0]` on {weight.device}: move them to one device"
            )
    if os.environ.get("MOHGE_KERNELS_DEBUG") == "1" and top_k_index.numel():
        lowest, highest = (int(bound) for bound in top_k_index.aminmax())
        if lowest < 0 or highest > key_of_expert.shape[0]:
            raise ValueError(
                f"`top_k_index` has ids from {lowest} to {highest}: they must be 0 to {key_of_expert.shape[0] - 1}, "
                f"or {key_of_expert.shape[0]} for a slot to skip"
            )
        if not _keys_exist(key_of_expert, gate_up, keys_per_group):
            raise ValueError(
                "`key_of_expert` has keys of experts that do not exist: give group * keys_per_group + place in group, "
                f"or {len(gate_up) * keys_per_group} for an expert without weights"
            )


def _keys_exist(key_of_expert: torch.Tensor, gate_up: list[torch.Tensor], keys_per_group: int) -> bool:
    places = {group * keys_per_group + place for group, stack in enumerate(gate_up) for place in range(len(stack))}
    return (places | {len(gate_up) * keys_per_group}).issuperset(key_of_expert.tolist())


def _keys_by_group(counts: list[int], keys_per_group: int, device: torch.device) -> torch.Tensor:
    """[E] keys of experts that are numbered group by group."""
    if min(counts) == keys_per_group:
        return torch.arange(sum(counts), device=device)
    return torch.cat([torch.arange(count, device=device) + g * keys_per_group for g, count in enumerate(counts)])
