"""Two-level routing: the public function, its operators, and the rule in plain PyTorch for devices without Triton.

Shapes: T tokens, E experts, G groups, K experts per token, J groups kept per token.
"""

import torch
import torch.nn.functional as F

from .dispatch import qualified, runs_on_triton


def two_level_route(
    logits: torch.Tensor,
    group_logits: torch.Tensor,
    group_of_expert: torch.Tensor,
    top_k: int,
    num_groups_per_tok: int,
    sigmoid: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Two-level routing (MoHGE, https://huggingface.co/papers/2604.23108, section 3): the best groups by group logit,
    then the best experts of these groups together. The log-score of an expert is its log-probability inside its group,
    plus that of the group among the groups kept. All in logarithms, so that nothing underflows.

    One kernel forward and one backward on CUDA, deterministic and without waiting for the device. `log_scores` are
    differentiable once in `logits` and `group_logits`.

    Choices come best first, and among equals the lower id. They are distinct, whatever the logits. A logit of -inf
    rules an expert or group out: it comes last, with the score -inf. So does an expert outside the groups kept, chosen
    only where these have fewer than `top_k`; no gradient passes there. NaN comes first. Where there is a NaN or +inf,
    or nothing above -inf, the scores of the group are NaN, or with such group logits all scores of the token.

    Args:
        logits (`torch.Tensor` of shape `(tokens, experts)`):
            In float32.
        group_logits (`torch.Tensor` of shape `(tokens, groups)`):
            In float32.
        group_of_expert (`torch.Tensor` of shape `(experts,)`):
            The group of each expert, int64 or int32; groups may differ in size, but each has an expert.
        top_k (`int`):
            Experts for each token, no more than any `num_groups_per_tok` groups hold.
        num_groups_per_tok (`int`):
            Groups to keep for each token.
        sigmoid (`bool`):
            Whether group scores are sigmoids of the group logits, divided by their sum over the groups kept, instead
            of a softmax over these.

    Returns:
        `log_scores` of shape `(tokens, top_k)` in float32, `index` of the same shape and `group_index` of shape
        `(tokens, num_groups_per_tok)` in int64.

    Raises:
        ValueError: if dtypes, devices, shapes or numbers do not fit; nothing has run then.
    """
    _check(logits, group_logits, group_of_expert, top_k, num_groups_per_tok)
    return _route(logits, group_logits, group_of_expert, top_k, num_groups_per_tok, sigmoid)


def _check(logits, group_logits, group_of_expert, top_k, num_groups_per_tok):
    for name, tensor in (("logits", logits), ("group_logits", group_logits)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"`{name}` is {tensor.dtype}: it must be float32, use .float()")
    if logits.dim() != 2:
        raise ValueError(f"`logits` has shape {tuple(logits.shape)}: it must be (tokens, experts)")
    if group_logits.dim() != 2 or group_logits.shape[0] != logits.shape[0]:
        raise ValueError(
            f"`group_logits` has shape {tuple(group_logits.shape)}: it must be ({logits.shape[0]}, groups), one row "
            "for each row of `logits`"
        )
    experts, groups = logits.shape[1], group_logits.shape[1]
    if group_of_expert.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"`group_of_expert` is {group_of_expert.dtype}: it must be int64 or int32, use .long()")
    if group_of_expert.shape != (experts,):
        raise ValueError(
            f"`group_of_expert` has shape {tuple(group_of_expert.shape)}: it must be ({experts},), one group for each "
            "column of `logits`"
        )
    for name, tensor in (("group_logits", group_logits), ("group_of_expert", group_of_expert)):
        if tensor.device != logits.device:
            raise ValueError(
                f"`{name}` is on {tensor.device} and `logits` on {logits.device}: move them to one device"
            )
    if groups > experts:
        raise ValueError(
            f"`group_logits` has {groups} groups and `logits` {experts} experts: each group must have an expert"
        )
    if not 1 <= num_groups_per_tok <= groups:
        raise ValueError(
            f"`num_groups_per_tok` is {num_groups_per_tok}: it must be 1 to {groups}, the columns of `group_logits`"
        )
    most = experts - (groups - num_groups_per_tok)
    if not 1 <= top_k <= most:
        raise ValueError(
            f"`top_k` is {top_k}: it must be 1 to {most}, the most that {num_groups_per_tok} of {groups} groups with "
            f"{experts} experts can hold"
        )


@torch.library.custom_op(qualified("two_level_route"), mutates_args=())
def _route(
    logits: torch.Tensor,
    group_logits: torch.Tensor,
    group_of_expert: torch.Tensor,
    top_k: int,
    num_groups_per_tok: int,
    sigmoid: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-scores [T, K], expert ids [T, K] and the groups kept [T, J]."""
    if runs_on_triton(logits):
        from . import triton_routing

        return triton_routing.forward(logits, group_logits, group_of_expert, top_k, num_groups_per_tok, sigmoid)
    group_index_TJ = _best(group_logits, num_groups_per_tok)
    inside_TE, group_scores_TG, kept_TE = _log_scores(logits, group_logits, group_of_expert, group_index_TJ, sigmoid)
    joint_TE = inside_TE + group_scores_TG[:, group_of_expert]
    joint_TE = joint_TE.masked_fill(~kept_TE, float("-inf"))
    index_TK = _best(joint_TE, top_k)
    return joint_TE.gather(1, index_TK), index_TK, group_index_TJ


@_route.register_fake
def _(logits, group_logits, group_of_expert, top_k, num_groups_per_tok, sigmoid):
    tokens = logits.shape[0]
    return (
        logits.new_empty(tokens, top_k),
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(tokens, num_groups_per_tok, dtype=torch.int64),
    )


@torch.library.custom_op(qualified("two_level_route_backward"), mutates_args=())
def _route_backward(
    grad: torch.Tensor,
    logits: torch.Tensor,
    group_logits: torch.Tensor,
    group_of_expert: torch.Tensor,
    index: torch.Tensor,
    group_index: torch.Tensor,
    sigmoid: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of logits [T, E] and group logits [T, G]."""
    if runs_on_triton(logits):
        from . import triton_routing

        return triton_routing.backward(grad, logits, group_logits, group_of_expert, index, group_index, sigmoid)
    inside_TE, group_scores_TG, kept_TE = _log_scores(logits, group_logits, group_of_expert, group_index, sigmoid)
    # Of both softmaxes: the gradient of a logarithm, less its probability times the sum of these gradients.
    grad_TE = logits.new_zeros(logits.shape).scatter(1, index, grad).masked_fill(~kept_TE, 0)
    grad_TG = group_logits.new_zeros(group_logits.shape).index_add(1, group_of_expert, grad_TE)
    d_logits_TE = grad_TE - inside_TE.exp() * grad_TG[:, group_of_expert]
    d_group_TG = grad_TG - group_scores_TG.exp() * grad_TG.sum(1, keepdim=True)
    if sigmoid:
        d_group_TG = d_group_TG * group_logits.neg().sigmoid()
    kept_TG = torch.zeros_like(group_logits, dtype=torch.bool).scatter(1, group_index, True)
    return d_logits_TE.masked_fill(~kept_TE, 0).contiguous(), d_group_TG.masked_fill(~kept_TG, 0).contiguous()


@_route_backward.register_fake
def _(grad, logits, group_logits, group_of_expert, index, group_index, sigmoid):
    return logits.new_empty(logits.shape), group_logits.new_empty(group_logits.shape)


def _best(values: torch.Tensor, number: int) -> torch.Tensor:
    """Columns of the largest values of each row; unlike `topk`, among equals the first."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :number].contiguous()


def _log_scores(logits_TE, group_logits_TG, group_of_expert, group_index_TJ, sigmoid):
    """Log-probabilities of the experts inside their groups [T, E] and of the groups kept [T, G], -inf for others;
    which experts are in groups kept [T, E]."""
    groups_TE = group_of_expert.long().expand_as(logits_TE)
    highest_TG = torch.full_like(group_logits_TG, float("-inf")).scatter_reduce(1, groups_TE, logits_TE, "amax")
    shifted_TE = logits_TE - highest_TG.gather(1, groups_TE)
    sums_TG = torch.zeros_like(group_logits_TG).scatter_add(1, groups_TE, shifted_TE.exp())
    inside_TE = shifted_TE - sums_TG.log().gather(1, groups_TE)
    kept_TJ = group_logits_TG.gather(1, group_index_TJ)
    kept_TJ = (F.logsigmoid(kept_TJ) if sigmoid else kept_TJ).log_softmax(1)
    group_scores_TG = torch.full_like(group_logits_TG, float("-inf")).scatter(1, group_index_TJ, kept_TJ)
    kept_TG = torch.zeros_like(group_logits_TG, dtype=torch.bool).scatter(1, group_index_TJ, True)
    return inside_TE, group_scores_TG, kept_TG.gather(1, groups_TE)


def _setup_context(ctx, inputs, output):
    logits, group_logits, group_of_expert, _, _, ctx.sigmoid = inputs
    _, index, group_index = output
    ctx.mark_non_differentiable(index, group_index)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, group_logits, group_of_expert, index, group_index)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    gradients = _route_backward(grad, *ctx.saved_tensors, ctx.sigmoid)
    return *gradients, None, None, None, None


_route.register_autograd(_backward, setup_context=_setup_context)
