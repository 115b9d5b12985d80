"""Sorting the pairs of a token and an expert by expert: a counting sort, stable, without atomics and without a wait.

Shapes: S = T K pairs, P pairs per block, G groups of B keys, C = G B + 1 columns: one per key and one for the pairs to
skip, which come last. In the comparisons of all with all the sum runs over the first axis, which one thread holds.
"""

import torch
import triton
import triton.language as tl

from . import tuning


@triton.jit
def _keys_of(index, key_of_expert, pair, pairs, experts, SKIP: tl.constexpr):
    """The key of each pair: SKIP where the slot is to be skipped, SKIP + 1 beyond the last pair."""
    expert = tl.load(index + pair, mask=pair < pairs, other=-1)
    chosen = (expert >= 0) & (expert < experts)
    key = tl.load(key_of_expert + tl.where(chosen, expert, 0), mask=chosen, other=SKIP).to(tl.int32)
    return tl.where(pair < pairs, key, SKIP + 1)


@triton.jit(do_not_specialize=["pairs"])
def _sort_kernel(
    index, key_of_expert, order, position, counts, pairs, experts,
    SKIP: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Everything in one program, for the few pairs of a decoding step."""
    pair = tl.arange(0, P)
    key = _keys_of(index, key_of_expert, pair, pairs, experts, SKIP)
    own = key * P + pair  # all different, so the place of a pair is how many are smaller
    place = tl.zeros([P], tl.int32)
    for start in range(0, P, CHUNK):
        if CHUNK == P:
            other = own
        else:
            other = start + tl.arange(0, CHUNK)
            other = _keys_of(index, key_of_expert, other, pairs, experts, SKIP) * P + other
        place += tl.sum((other[:, None] < own[None, :]).to(tl.int32), axis=0)
    tl.store(order + place, pair, mask=pair < pairs)
    tl.store(position + pair, tl.where(key < SKIP, place, -1), mask=pair < pairs)
    for start in range(0, SKIP, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        count = tl.sum((key[:, None] == column[None, :]).to(tl.int32), axis=0)
        tl.store(counts + column, count, mask=column < SKIP)


@triton.jit(do_not_specialize=["pairs"])
def _rank_kernel(
    index, key_of_expert, ranks, table, pairs, experts, SKIP: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr
):
    """One block of pairs: how many of each key it has (a column of the table [C, blocks]), and how many of its own key
    come before each pair."""
    block = tl.program_id(0)
    local = tl.arange(0, P)
    pair = block * P + local
    key = _keys_of(index, key_of_expert, pair, pairs, experts, SKIP)
    # With the place in the block as lower digits one comparison tells both same key and earlier.
    own = key * P + local
    same_and_earlier = (own[:, None] < own[None, :]) & (own[:, None] >= (key * P)[None, :])
    rank = tl.sum(same_and_earlier.to(tl.int32), axis=0)
    tl.store(ranks + pair, key * P + rank, mask=pair < pairs)
    for start in range(0, SKIP + 1, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        count = tl.sum((key[:, None] == column[None, :]).to(tl.int32), axis=0)
        tl.store(table + column * tl.num_programs(0) + block, count, mask=column <= SKIP)


@triton.jit(do_not_specialize=["blocks"])
def _prefix_kernel(table, counts, blocks, SKIP: tl.constexpr, CHUNK: tl.constexpr):
    """One key: each entry of its row of the table becomes the sum of those before it."""
    key = tl.program_id(0)
    total = 0
    for start in range(0, blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        entry = table + key * blocks + block
        count = tl.load(entry, mask=block < blocks, other=0)
        tl.store(entry, total + tl.cumsum(count, axis=0) - count, mask=block < blocks)
        total += tl.sum(count, axis=0)
    if key < SKIP:
        tl.store(counts + key, total)


@triton.jit(do_not_specialize=["pairs"])
def _place_kernel(
    ranks, table, order, position, counts, pairs, SKIP: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr
):
    """One block of pairs: the place of each is how many pairs have smaller keys, are in earlier blocks, and come
    earlier in this one."""
    block = tl.program_id(0)
    pair = block * P + tl.arange(0, P)
    rank = tl.load(ranks + pair, mask=pair < pairs, other=0)
    key = rank // P
    place = rank % P + tl.load(table + key * tl.num_programs(0) + block, mask=pair < pairs, other=0)
    for start in range(0, SKIP, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        count = tl.load(counts + column, mask=column < SKIP, other=0)
        place += tl.sum(tl.where(column[:, None] < key[None, :], count[:, None], 0), axis=0)
    tl.store(order + place, pair, mask=pair < pairs)
    tl.store(position + pair, tl.where(key < SKIP, place, -1), mask=pair < pairs)


def sort_pairs(
    index_TK: torch.Tensor, key_of_expert: torch.Tensor, keys: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Args:
        index_TK: ids of experts; an id outside [0, E) marks a slot to skip.
        key_of_expert: [E], the key of each id, below `keys`, or `keys` for an expert whose slots are to be skipped.

    Returns:
        order [S], the pair at each sorted position (those to skip last); position [T, K], the sorted position of each
        pair, -1 for those to skip; counts [keys], pairs of each key. All int32.
    """
    pairs, device = index_TK.numel(), index_TK.device
    if not pairs:
        return (
            torch.empty(0, dtype=torch.int32, device=device),
            torch.empty(index_TK.shape, dtype=torch.int32, device=device),
            torch.zeros(keys, dtype=torch.int32, device=device),
        )
    index_TK = index_TK.contiguous()
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    position = torch.empty(index_TK.shape, dtype=torch.int32, device=device)
    counts = torch.empty(keys, dtype=torch.int32, device=device)
    experts = key_of_expert.shape[0]
    columns = min(triton.next_power_of_2(keys + 1), 64)
    most, size = tuning.sort_sizes(device)
    if pairs <= most:
        size = max(triton.next_power_of_2(pairs), 16)
        _sort_kernel[(1,)](
            index_TK, key_of_expert, order, position, counts, pairs, experts,
            SKIP=keys, P=size, CHUNK=size if size <= 256 else 64, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
        return order, position, counts
    blocks = triton.cdiv(pairs, size)
    ranks = torch.empty(pairs, dtype=torch.int32, device=device)
    table = torch.empty(keys + 1, blocks, dtype=torch.int32, device=device)
    block = {"SKIP": keys, "P": size, "COLUMNS": columns, "num_warps": 4}
    _rank_kernel[(blocks,)](index_TK, key_of_expert, ranks, table, pairs, experts, **block)
    _prefix_kernel[(keys + 1,)](table, counts, blocks, SKIP=keys, CHUNK=tuning.PREFIX_CHUNK, num_warps=4)
    _place_kernel[(blocks,)](ranks, table, order, position, counts, pairs, **block)
    return order, position, counts
