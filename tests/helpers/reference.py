"""Float64 reference of the routers and the router losses: one token, one group, one expert at a time.

It knows nothing of the package: it follows the definitions in the papers, works on Python lists of 0-d float64 tensors
(so that autograd goes through it) and decides by logarithms of scores, which neither overflow nor underflow.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Layout:
    """Experts in groups: `counts[g]` experts of width `widths[g]`, numbered set by set."""

    counts: tuple[int, ...]
    widths: tuple[int, ...]

    @cached_property
    def experts(self):
        """(group, index in group) of each expert, by id."""
        sets = math.gcd(*self.counts)
        order = []
        for p in range(sets):
            for group, count in enumerate(self.counts):
                per_set = count // sets
                order += [(group, p * per_set + i) for i in range(per_set)]
        return order

    @property
    def num_groups(self):
        return len(self.counts)

    @property
    def num_experts(self):
        return sum(self.counts)

    def group_of(self, expert):
        return self.experts[expert][0]

    def members(self, group):
        """Expert ids of a group, ascending."""
        return [e for e in range(self.num_experts) if self.group_of(e) == group]


@dataclass(frozen=True)
class Routing:
    """What a router does, in the words of the config."""

    router_type: str
    experts_per_tok: int
    groups_per_tok: int
    group_score_function: str = "sigmoid"
    normalization: str = "sum"
    top_p: float = 0.6
    ema_strength: float = 0.0

    @property
    def has_group_router(self):
        return self.router_type == "two_level" and self.group_score_function != "expert_logsumexp"


@dataclass
class Token:
    """Everything a router says about one token."""

    logits: list[torch.Tensor]  # by expert id
    group_logits: list[torch.Tensor]
    weights: dict[int, torch.Tensor]  # chosen expert -> combine weight
    groups: set[int] | None  # kept groups


# Routers


def logsumexp(values):
    return torch.logsumexp(torch.stack(list(values)), 0)


def log_softmax(values):
    total = logsumexp(values)
    return [value - total for value in values]


def best(scores, number):
    """Keys of the `number` largest values of the dict `scores`."""
    return sorted(scores, key=lambda key: -scores[key].item())[:number]


def combine(log_scores, normalization):
    """Combine weights of the chosen experts from the logarithms of their scores (dict expert -> value)."""
    if normalization == "none":
        return {e: log_score.exp() for e, log_score in log_scores.items()}
    if normalization == "sum":
        total = logsumexp(log_scores.values())
        return {e: (log_score - total).exp() for e, log_score in log_scores.items()}
    if normalization == "softmax":
        total = sum(log_score.exp().exp() for log_score in log_scores.values())
        return {e: log_score.exp().exp() / total for e, log_score in log_scores.items()}
    raise ValueError(normalization)


def linear(matrix, x):
    return [sum(w * v for w, v in zip(row, x, strict=True)) for row in matrix]


def group_logsumexp(logits, layout):
    return [logsumexp(logits[e] for e in layout.members(g)) for g in range(layout.num_groups)]


def log_group_scores(group_logits, routing):
    if routing.group_score_function == "sigmoid":
        return [torch.nn.functional.logsigmoid(logit) for logit in group_logits]
    return log_softmax(group_logits)


def log_joint(logits, group_logits, kept, layout, routing):
    """log q of every expert in the kept groups of a two-level router."""
    log_scores = log_group_scores(group_logits, routing)
    total = logsumexp(log_scores[g] for g in kept)
    log_q = {}
    for g in kept:
        members = layout.members(g)
        for e, log_p in zip(members, log_softmax([logits[e] for e in members]), strict=True):
            log_q[e] = log_scores[g] - total + log_p
    return log_q


def two_level(logits, group_logits, layout, routing):
    kept = best(dict(enumerate(group_logits)), routing.groups_per_tok)  # every score function ascends
    log_q = log_joint(logits, group_logits, kept, layout, routing)
    return {e: log_q[e] for e in best(log_q, routing.experts_per_tok)}, set(kept)


def top_k(logits, layout, routing):
    log_p = dict(enumerate(log_softmax(logits)))
    return {e: log_p[e] for e in best(log_p, routing.experts_per_tok)}


def top_p(logits, layout, routing):
    log_p = dict(enumerate(log_softmax(logits)))
    chosen, reached = {}, 0.0
    for e in best(log_p, routing.experts_per_tok):
        chosen[e] = log_p[e]
        reached += log_p[e].exp().item()
        if reached >= routing.top_p:
            break
    return chosen


def grouped_top_k(logits, layout, routing, ema):
    corrected = logits
    if routing.ema_strength:
        corrected = [logit - routing.ema_strength * mean for logit, mean in zip(logits, ema, strict=True)]
    log_p = log_softmax(corrected)
    chosen = {}
    for g in range(layout.num_groups):
        in_group = {e: log_p[e] for e in layout.members(g)}
        for e in best(in_group, routing.experts_per_tok // layout.num_groups):
            chosen[e] = log_p[e]
    return chosen


def choose(logits, group_logits, layout, routing, ema=None):
    """The choice for one token from its logits."""
    kept = None
    if routing.router_type == "two_level":
        log_scores, kept = two_level(logits, group_logits, layout, routing)
    elif routing.router_type == "top_k":
        log_scores = top_k(logits, layout, routing)
    elif routing.router_type == "top_p":
        log_scores = top_p(logits, layout, routing)
    else:
        log_scores = grouped_top_k(logits, layout, routing, ema)
    return Token(logits, group_logits, combine(log_scores, routing.normalization), kept)


def route(x, weight, group_weight, layout, routing, ema=None):
    """A list of `Token`, one for each row of `x` [T, H]; `group_weight` None where there is no group router."""
    tokens = []
    for row in x:
        logits = linear(weight, row)
        group_logits = linear(group_weight, row) if routing.has_group_router else group_logsumexp(logits, layout)
        tokens.append(choose(logits, group_logits, layout, routing, ema))
    return tokens


# Losses of one set of tokens


def log_probabilities(token, layout, routing):
    """log p of each expert: p(g) p(e|g) of a two-level router, else the softmax over all experts."""
    if routing.router_type != "two_level":
        return log_softmax(token.logits)
    log_group = log_softmax(token.group_logits)
    log_p = [None] * layout.num_experts
    for g in range(layout.num_groups):
        members = layout.members(g)
        for e, log_inside in zip(members, log_softmax([token.logits[e] for e in members]), strict=True):
            log_p[e] = log_group[g] + log_inside
    return log_p


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def count_tokens(tokens, layout):
    """Number of tokens that chose each expert."""
    return [sum(e in token.weights for token in tokens) for e in range(layout.num_experts)]


def mean_probabilities(tokens, layout, routing):
    per_token = [[log_p.exp() for log_p in log_probabilities(token, layout, routing)] for token in tokens]
    return [mean(p[e] for p in per_token) for e in range(layout.num_experts)]


def load_balancing(tokens, layout, routing):
    fraction = [count / len(tokens) for count in count_tokens(tokens, layout)]
    p = mean_probabilities(tokens, layout, routing)
    return layout.num_experts * sum(fraction[e] * p[e] for e in range(layout.num_experts))


def parameter_penalty(tokens, layout, routing):
    width = [layout.widths[layout.group_of(e)] for e in range(layout.num_experts)]
    fraction = [count / len(tokens) for count in count_tokens(tokens, layout)]
    p = mean_probabilities(tokens, layout, routing)
    m = [fraction[e] * width[e] / mean(width) for e in range(layout.num_experts)]
    return layout.num_experts * sum(m[e] * p[e] for e in range(layout.num_experts))


def z(tokens, layout, routing):
    return mean(logsumexp(token.logits) ** 2 for token in tokens)


def shannon(log_p):
    return -sum(value.exp() * value for value in log_p)


def entropy(tokens, layout, routing):
    return mean(shannon(log_probabilities(token, layout, routing)) for token in tokens)


def log_group_mass(token, layout, routing):
    log_p = log_probabilities(token, layout, routing)
    return [logsumexp(log_p[e] for e in layout.members(g)) for g in range(layout.num_groups)]


def intra_group_quadratic(tokens, layout, routing):
    return -mean(sum(value.exp() ** 2 for value in log_probabilities(token, layout, routing)) for token in tokens)


def inter_group_quadratic(tokens, layout, routing):
    return mean(sum(value.exp() ** 2 for value in log_group_mass(token, layout, routing)) for token in tokens)


def intra_group_entropy(tokens, layout, routing):
    return mean(shannon(log_probabilities(token, layout, routing)) for token in tokens)


def inter_group_entropy(tokens, layout, routing):
    return -mean(shannon(log_group_mass(token, layout, routing)) for token in tokens)


def group(tokens, layout, routing, interval):
    total = 0
    for g in range(layout.num_groups):
        r = (layout.widths[g] - min(layout.widths) + interval) / interval
        f = sum(g in token.groups for token in tokens) / (len(tokens) * routing.groups_per_tok)
        p = mean(log_softmax(token.group_logits)[g].exp() for token in tokens)
        total = total + r * f * p
    return layout.num_groups * total


def expert_traffic(tokens, layout, routing):
    """f and P of the expert loss, by expert id."""
    nothing = torch.zeros((), dtype=torch.float64)
    f = [count / (len(tokens) * routing.experts_per_tok) for count in count_tokens(tokens, layout)]
    p = [mean(token.weights.get(e, nothing) for token in tokens) for e in range(layout.num_experts)]
    return f, p


def expert_global(tokens, layout, routing):
    f, p = expert_traffic(tokens, layout, routing)
    kept = routing.groups_per_tok if routing.router_type == "two_level" else layout.num_groups
    return layout.num_experts * kept / layout.num_groups * sum(f[e] * p[e] for e in range(layout.num_experts))


def expert_per_group(tokens, layout, routing):
    f, p = expert_traffic(tokens, layout, routing)
    values = []
    for g in range(layout.num_groups):
        members = layout.members(g)
        f_group, p_group = sum(f[e] for e in members), sum(p[e] for e in members)
        if f_group > 0:
            values.append(layout.counts[g] * sum((f[e] / f_group) * (p[e] / p_group) for e in members))
    return mean(values)


# Losses of a batch


def batch_value(loss, layers, mask, sequence_weights=None):
    """The loss averaged over layers, each a list of `Token` for the B * S positions of `mask` [B, S].

    Without `sequence_weights` all non-padding tokens form one set; with them each row does, and the rows' values are
    averaged with these weights. A row without tokens adds nothing.
    """
    rows, length = len(mask), len(mask[0])
    values = []
    for tokens in layers:
        by_row = [[tokens[b * length + s] for s in range(length) if mask[b][s]] for b in range(rows)]
        if sequence_weights is None:
            values.append(loss([token for row in by_row for token in row]))
        else:
            weighted = [w * loss(row) for w, row in zip(sequence_weights, by_row, strict=True) if row]
            values.append(sum(weighted) / sum(sequence_weights))
    return mean(values)
