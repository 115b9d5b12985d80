"""The custom operators, for torch.compile, autograd and export: their schemas, fakes and derivative.

Shapes: T tokens, K slots, S = T K pairs of a token and an expert, H hidden size, G groups, B keys per group. The key
of an expert is its group times B plus its place in the group.
"""

from types import ModuleType

import torch

from .dispatch import qualified, runs_on_triton


def implementation(tensor: torch.Tensor) -> ModuleType:
    """The module whose `forward` and `backward` run on the device of `tensor`."""
    if runs_on_triton(tensor):
        from . import triton_experts

        return triton_experts
    from . import cpu

    return cpu


@torch.library.custom_op(qualified("swiglu_experts"), mutates_args=())
def swiglu_experts(
    hidden_states: torch.Tensor,
    gate_up: list[torch.Tensor],
    down: list[torch.Tensor],
    index: torch.Tensor,
    key_of_expert: torch.Tensor,
    weights: torch.Tensor,
    keys_per_group: int,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Output [T, H]; pre-activations of gate and up by key, flat, empty unless `save`; order [S]: the pairs sorted by
    key; position [T, K] of each pair in it, -1 for slots to skip; counts [G B]: pairs of each key.
    """
    return implementation(hidden_states).forward(
        hidden_states, gate_up, down, index, key_of_expert, weights, keys_per_group, save
    )


@swiglu_experts.register_fake
def _(hidden_states, gate_up, down, index, key_of_expert, weights, keys_per_group, save):
    saved = implementation(hidden_states).saved_elements(index.numel(), gate_up) if save else 0
    return (
        hidden_states.new_empty(hidden_states.shape),
        hidden_states.new_empty(saved),
        index.new_empty(index.numel(), dtype=torch.int32),
        index.new_empty(index.shape, dtype=torch.int32),
        index.new_empty(len(gate_up) * keys_per_group, dtype=torch.int32),
    )


@torch.library.custom_op(qualified("swiglu_experts_backward"), mutates_args=())
def swiglu_experts_backward(
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
    """Gradients of hidden states, weights, every `gate_up` and every `down`, as far as the four of `needs` say so."""
    return implementation(hidden_states).backward(
        grad_output, hidden_states, gate_up, down, weights, pre, order, position, counts, keys_per_group, needs
    )


@swiglu_experts_backward.register_fake
def _(grad_output, hidden_states, gate_up, down, weights, pre, order, position, counts, keys_per_group, needs):
    return [
        tensor.new_empty(tensor.shape)
        for tensors, needed in zip(([hidden_states], [weights], gate_up, down), needs, strict=True)
        if needed
        for tensor in tensors
    ]


def _setup_context(ctx, inputs, output):
    hidden_states, gate_up, down, _, _, weights, ctx.keys_per_group, _ = inputs
    _, pre, order, position, counts = output
    ctx.mark_non_differentiable(pre, order, position, counts)
    ctx.set_materialize_grads(False)  # otherwise backward begins by filling a gradient of `pre` with zeros
    ctx.save_for_backward(hidden_states, weights, pre, order, position, counts, *gate_up, *down)


def _backward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 8
    hidden_states, weights, pre, order, position, counts, *matrices = ctx.saved_tensors
    groups = len(matrices) // 2
    gate_up, down = matrices[:groups], matrices[groups:]
    needs_hidden, needs_gate_up, needs_down, _, _, needs_weights, *_ = ctx.needs_input_grad
    needs = [needs_hidden, needs_weights, _any(needs_gate_up), _any(needs_down)]
    gradients = iter(
        swiglu_experts_backward(
            grad_output, hidden_states, gate_up, down, weights, pre, order, position, counts, ctx.keys_per_group, needs
        )
    )
    d_hidden, d_weights = (next(gradients) if needed else None for needed in needs[:2])
    d_gate_up, d_down = ([next(gradients) if needed else None for _ in gate_up] for needed in needs[2:])
    return d_hidden, d_gate_up, d_down, None, None, d_weights, None, None


def _any(needed: bool | list[bool]) -> bool:
    return needed if isinstance(needed, bool) else any(needed)


swiglu_experts.register_autograd(_backward, setup_context=_setup_context)
