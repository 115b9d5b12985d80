"""Two-level routing in one Triton kernel forward and one backward.

Shapes: T tokens of one program, E experts, G groups, K slots, J kept groups; in tiles E and G are rounded up to powers
of two, and experts beyond the last have group -1, which no token keeps.
"""

import torch
import triton
import triton.language as tl


_TAKEN: tl.constexpr = tl.constexpr(-(2**63))
"""Below every key."""


@triton.jit
def _flip(bits):
    """Bits of a float32 <-> an integer of the same order."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _keys(values, column, COLUMNS: tl.constexpr):
    """Keys whose largest is the largest value, NaN before all others, and among equals the first column."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0 equals 0
    bits = tl.where(values == values, bits, 0x7FC00000)  # NaN has many forms
    return (_flip(bits).to(tl.int64) << 32) | (COLUMNS - 1 - column)


@triton.jit
def _column(key, COLUMNS: tl.constexpr):
    return (COLUMNS - 1 - (key & (COLUMNS - 1))).to(tl.int32)


@triton.jit
def _value(key):
    return _flip((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _group_score(logit, SIGMOID: tl.constexpr):
    """Logarithm of the score of a group, before the kept ones are normalised."""
    if SIGMOID:
        return tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))
    else:
        return logit


@triton.jit
def _softmax(values, member):
    """Over the members of each row: logarithms of the numerators, numerators, and the denominator."""
    inside = tl.where(member, values, float("-inf"))
    shifted = inside - tl.max(inside, axis=1)[:, None]
    numerators = tl.exp(shifted)
    return shifted, numerators, tl.sum(numerators, axis=1)


@triton.jit
def _rows(start, stride, token, column, tokens, COLUMNS: tl.constexpr):
    mask = (token < tokens)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(start + token[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits, logits_stride, group_logits, group_logits_stride, group_of_expert, log_scores, index, group_index, tokens,
    E: tl.constexpr, G: tl.constexpr, K: tl.constexpr, J: tl.constexpr, SIGMOID: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One block of tokens: takes the best group J times, then the best expert K times."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, group = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_G)
    valid = token < tokens
    logits_TE = _rows(logits, logits_stride, token, expert, tokens, E)
    group_logits_TG = _rows(group_logits, group_logits_stride, token, group, tokens, G)
    group_E = tl.load(group_of_expert + expert, mask=expert < E, other=-1).to(tl.int32)

    keys_TG = tl.where((group < G)[None, :], _keys(group_logits_TG, group[None, :], BLOCK_G), _TAKEN)
    joint_TE = tl.full([BLOCK_T, BLOCK_E], float("-inf"), tl.float32)
    # Group scores are taken relative to the first, which is the largest; their sum is the same for all experts.
    first_T = tl.zeros([BLOCK_T], tl.float32)
    sum_T = tl.zeros([BLOCK_T], tl.float32)
    for j in range(J):
        best_T = tl.max(keys_TG, axis=1)
        keys_TG = tl.where(keys_TG == best_T[:, None], _TAKEN, keys_TG)
        kept_T = _column(best_T, BLOCK_G)
        tl.store(group_index + token * J + j, kept_T, mask=valid)
        score_T = _group_score(_value(best_T), SIGMOID)
        first_T = tl.where(j == 0, score_T, first_T)
        score_T -= first_T
        sum_T += tl.exp(score_T)
        member_TE = group_E[None, :] == kept_T[:, None]
        shifted_TE, _, denominator_T = _softmax(logits_TE, member_TE)
        joint_TE = tl.where(member_TE, shifted_TE + (score_T - tl.log(denominator_T))[:, None], joint_TE)

    log_sum_T = tl.log(sum_T)
    keys_TE = tl.where((expert < E)[None, :], _keys(joint_TE, expert[None, :], BLOCK_E), _TAKEN)
    for k in range(K):
        best_T = tl.max(keys_TE, axis=1)
        keys_TE = tl.where(keys_TE == best_T[:, None], _TAKEN, keys_TE)
        tl.store(index + token * K + k, _column(best_T, BLOCK_E), mask=valid)
        tl.store(log_scores + token * K + k, _value(best_T) - log_sum_T, mask=valid)


@triton.jit(do_not_specialize=["tokens"])
def route_backward_kernel(
    grad, grad_stride, grad_slot_stride, logits, logits_stride, group_logits, group_logits_stride, group_of_expert,
    index, group_index, d_logits, d_group_logits, tokens,
    E: tl.constexpr, G: tl.constexpr, K: tl.constexpr, J: tl.constexpr, SIGMOID: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One block of tokens. Both steps are softmaxes: the gradient of a logarithm, less its probability times the sum
    of these gradients over the softmax."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, group = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_G)
    valid = token < tokens
    logits_TE = _rows(logits, logits_stride, token, expert, tokens, E)
    group_E = tl.load(group_of_expert + expert, mask=expert < E, other=-1).to(tl.int32)

    grad_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for k in range(K):
        expert_T = tl.load(index + token * K + k, mask=valid, other=-1).to(tl.int32)
        grad_T = tl.load(grad + token * grad_stride + k * grad_slot_stride, mask=valid, other=0.0)
        grad_TE = tl.where(expert[None, :] == expert_T[:, None], grad_T[:, None], grad_TE)

    d_logits_TE = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    grad_TG = tl.zeros([BLOCK_T, BLOCK_G], tl.float32)
    kept_TG = tl.zeros([BLOCK_T, BLOCK_G], tl.int1)
    for j in range(J):
        kept_T = tl.load(group_index + token * J + j, mask=valid, other=0).to(tl.int32)
        member_TE = group_E[None, :] == kept_T[:, None]
        _, numerators_TE, denominator_T = _softmax(logits_TE, member_TE)
        sum_T = tl.sum(tl.where(member_TE, grad_TE, 0.0), axis=1)
        d_TE = grad_TE - numerators_TE * tl.div_rn(1.0, denominator_T)[:, None] * sum_T[:, None]
        d_logits_TE = tl.where(member_TE, d_TE, d_logits_TE)
        is_kept_TG = group[None, :] == kept_T[:, None]
        grad_TG = tl.where(is_kept_TG, sum_T[:, None], grad_TG)
        kept_TG = kept_TG | is_kept_TG

    group_logits_TG = _rows(group_logits, group_logits_stride, token, group, tokens, G)
    _, numerators_TG, denominator_T = _softmax(_group_score(group_logits_TG, SIGMOID), kept_TG)
    sum_T = tl.sum(grad_TG, axis=1)
    d_TG = grad_TG - numerators_TG * tl.div_rn(1.0, denominator_T)[:, None] * sum_T[:, None]
    if SIGMOID:  # the derivative of log(sigmoid(x)) is sigmoid(-x)
        small_TG = tl.exp(-tl.abs(group_logits_TG))
        d_TG *= tl.where(group_logits_TG > 0, small_TG, 1.0) / (1.0 + small_TG)
    d_TG = tl.where(kept_TG, d_TG, 0.0)
    mask_TE, mask_TG = valid[:, None] & (expert < E)[None, :], valid[:, None] & (group < G)[None, :]
    tl.store(d_logits + token[:, None] * E + expert[None, :], d_logits_TE, mask=mask_TE)
    tl.store(d_group_logits + token[:, None] * G + group[None, :], d_TG, mask=mask_TG)


def _launch(kernel, arguments: tuple, logits: torch.Tensor, groups: int, top_k: int, num_kept: int, sigmoid: bool):
    tokens, experts = logits.shape
    if not tokens:
        return
    columns = triton.next_power_of_2(experts)
    # A row inside one warp is reduced without a barrier, as long as a thread has registers for its share of it.
    num_warps = 1 if columns <= 512 else 4
    block = 4 if logits.device.type == "cpu" else min(max(512 // columns, 1), 16)
    with torch.cuda.device_of(logits):
        kernel[(triton.cdiv(tokens, block),)](
            *arguments, tokens, E=experts, G=groups, K=top_k, J=num_kept, SIGMOID=sigmoid,
            BLOCK_T=block, BLOCK_E=columns, BLOCK_G=triton.next_power_of_2(groups), num_warps=num_warps,
        )  # fmt: skip


def _rows_of(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tensor with its rows contiguous, and the distance between them."""
    tensor = tensor if tensor.stride(1) == 1 else tensor.contiguous()
    return tensor, tensor.stride(0)


def forward(
    logits: torch.Tensor,
    group_logits: torch.Tensor,
    group_of_expert: torch.Tensor,
    top_k: int,
    num_groups_per_tok: int,
    sigmoid: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log_scores [T, K], index [T, K], group_index [T, J]."""
    tokens, groups = group_logits.shape
    log_scores = logits.new_empty(tokens, top_k)
    index = logits.new_empty(tokens, top_k, dtype=torch.int64)
    group_index = logits.new_empty(tokens, num_groups_per_tok, dtype=torch.int64)
    inputs = *_rows_of(logits), *_rows_of(group_logits), group_of_expert.contiguous()
    arguments = *inputs, log_scores, index, group_index
    _launch(route_kernel, arguments, logits, groups, top_k, num_groups_per_tok, sigmoid)
    return log_scores, index, group_index


def backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    group_logits: torch.Tensor,
    group_of_expert: torch.Tensor,
    index: torch.Tensor,
    group_index: torch.Tensor,
    sigmoid: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of logits and group_logits."""
    d_logits = logits.new_empty(logits.shape)
    d_group_logits = group_logits.new_empty(group_logits.shape)
    inputs = *_rows_of(logits), *_rows_of(group_logits), group_of_expert.contiguous()
    choice = index.contiguous(), group_index.contiguous()
    arguments = grad, *grad.stride(), *inputs, *choice, d_logits, d_group_logits
    sizes = group_logits.shape[1], index.shape[1], group_index.shape[1]
    _launch(route_backward_kernel, arguments, logits, *sizes, sigmoid)
    return d_logits, d_group_logits
