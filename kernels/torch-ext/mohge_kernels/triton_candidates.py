"""Other ways to do some of the steps, for the sweep of kernels/benchmarks/campaign.py to compare: none is measured,
and none runs unless `tuning_table.json` names it in a `Config`. What does not win is to be deleted, with its lines in
`triton_experts.py`. Shapes as in `triton_forward.py`.

descriptors  `down` and `d_rows`: the groups one after another in a loop that the compiler unrolls, so that widths are
             constants, and both operands are loaded through tensor descriptors, which the kernel makes
split        `down`, of few rows: each tile's sum over the width in SPLITS parts, so that wide experts leave no long
             tiles for the end; a token's parts are added where its rows are
table        `up`: a kernel of its own writes the list of tiles, so that none has to be found; if it wins, the sort's
             prefix kernel is to write it, without a launch more
"""

import torch
import triton
import triton.language as tl

from . import tuning
from .triton_forward import (
    find_tile,
    multiply_add,
    of_group,
    pack,
    pick,
    pointer_of_group,
    ragged_layout,
    tiles_before,
    up_tile,
)


SPLITS = 4


@triton.jit
def rows_by_group_kernel(
    ragged, weights, counts, output,
    WIDTHS: tl.constexpr, EXPERTS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, H: tl.constexpr,
    ALIGN: tl.constexpr, FACTOR: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """What `rows_kernel` computes. Every row of every matrix begins at a multiple of 16 bytes."""
    N_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    key, width, count, row_start, element_start = ragged_layout(counts, WIDTHS, B, KEYS, ALIGN)
    tiles = tl.cdiv(count, BLOCK_M) * N_TILES
    tile_start = tiles_before(key, width, tiles, False, KEYS)
    row_and_count = pack(row_start, count)
    r = tl.arange(0, BLOCK_M)
    for group in tl.static_range(len(WIDTHS)):
        inside = key // B == group
        begin = tl.sum(tl.where(key // B < group, tiles, 0), axis=0)
        end = begin + tl.sum(tl.where(inside, tiles, 0), axis=0)
        rows = tl.sum(tl.where(inside, count, 0), axis=0)
        first_row = tl.sum(tl.where(key // B < group, count, 0), axis=0)
        first = ALIGN * tl.sum(tl.where(key == group * B, element_start, 0), axis=0)
        k_size = FACTOR * WIDTHS[group]
        x = tl.make_tensor_descriptor(ragged + FACTOR * first, [rows, k_size], [k_size, 1], [BLOCK_M, BLOCK_K])
        # Three dimensions: what lies beyond the matrix of an expert is zero, not the next expert's.
        if TRANSPOSED:
            y = tl.make_tensor_descriptor(
                weights[group], [EXPERTS[group], H, k_size], [H * k_size, k_size, 1], [1, BLOCK_N, BLOCK_K]
            )
        else:
            y = tl.make_tensor_descriptor(
                weights[group], [EXPERTS[group], k_size, H], [k_size * H, H, 1], [1, BLOCK_K, BLOCK_N]
            )
        # Where the walk over the tiles of all groups stands.
        next_tile = begin + (tl.program_id(0) - begin % tl.num_programs(0) + tl.num_programs(0)) % tl.num_programs(0)
        for tile in tl.range(next_tile, end, tl.num_programs(0), flatten=FLATTEN):
            e, local, row0, m_size, _ = find_tile(
                tile, tile_start, tile_start + tiles, pack(tile_start, key), row_and_count, element_start
            )
            m0, n0 = local // N_TILES * BLOCK_M, local % N_TILES * BLOCK_N
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k0 in range(0, k_size, BLOCK_K):
                a = x.load([row0 - first_row + m0, k0])
                if TRANSPOSED:
                    b = y.load([e % B, n0, k0]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    b = y.load([e % B, k0, n0]).reshape(BLOCK_K, BLOCK_N)
                acc = multiply_add(a, b, acc, PRECISION)
            n = n0 + tl.arange(0, BLOCK_N)
            target = output + (row0 + m0).to(tl.int64) * H + (r * H)[:, None] + n[None, :]
            mask = (r < m_size - m0)[:, None] & (n < H)[None, :]
            tl.store(target, acc.to(output.dtype.element_ty), mask=mask)


@triton.jit
def split_down_kernel(
    ragged, weights, counts, output,
    WIDTHS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, H: tl.constexpr, ALIGN: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """output [S, SPLITS, H] in float32: the sums over each part of the width."""
    N_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    key, width, count, row_start, element_start = ragged_layout(counts, WIDTHS, B, KEYS, ALIGN)
    tiles = tl.cdiv(count, BLOCK_M) * N_TILES * SPLITS
    tile_start = tiles_before(key, width, tiles, False, KEYS)
    tile_and_key = pack(tile_start, key)
    row_and_count = pack(row_start, count)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0), flatten=FLATTEN):
        e, local, row0, m_size, element = find_tile(
            tile, tile_start, tile_start + tiles, tile_and_key, row_and_count, element_start
        )
        group = e // B
        w = of_group(group, WIDTHS)
        part, local = local % SPLITS, local // SPLITS
        m0, n0 = local // N_TILES * BLOCK_M, local % N_TILES * BLOCK_N
        length = tl.cdiv(tl.cdiv(w, SPLITS), BLOCK_K) * BLOCK_K
        end = tl.minimum((part + 1) * length, w)
        r = tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x = ragged + element * ALIGN + m0.to(tl.int64) * w + (tl.minimum(r, m_size - m0 - 1) * w)[:, None] + k[None, :]
        y = pointer_of_group(group, weights, len(WIDTHS)) + (e % B).to(tl.int64) * H * w
        y = y + (tl.minimum(n, H - 1) * w)[None, :] + k[:, None]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(part * length, end, BLOCK_K):
            a = tl.load(x + k0, mask=(k < end - k0)[None, :], other=0)
            b = tl.load(y + k0, mask=(k < end - k0)[:, None], other=0)
            acc = multiply_add(a, b, acc, PRECISION)
        target = output + ((row0 + m0).to(tl.int64) * SPLITS + part) * H + (r * (SPLITS * H))[:, None] + n[None, :]
        tl.store(target, acc, mask=(r < m_size - m0)[:, None] & (n < H)[None, :])


@triton.jit
def combine_split_kernel(
    parts, weights, position, output,
    SLOTS: tl.constexpr, H: tl.constexpr, SPLITS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """output[t] = weighted sum over the token's slots of the sums of their parts."""
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros([BLOCK_H], tl.float32)
    for slot in range(SLOTS):
        row = tl.load(position + token * SLOTS + slot)
        columns = tl.where(row >= 0, H, 0)
        value = tl.zeros([BLOCK_H], tl.float32)
        for part in tl.static_range(SPLITS):
            value += tl.load(parts + (row.to(tl.int64) * SPLITS + part) * H + h, mask=h < columns, other=0)
        acc += value * tl.load(weights + token * SLOTS + slot, mask=row >= 0, other=0).to(tl.float32)
    tl.store(output + token.to(tl.int64) * H + h, acc.to(output.dtype.element_ty), mask=h < H)


@triton.jit
def tile_table_kernel(
    counts, table, total,
    WIDTHS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One key: of each of its tiles the key, the number among those of the key, the key's first row and rows, and its
    first element, in units of ALIGN."""
    key, width, count, row_start, element_start = ragged_layout(counts, WIDTHS, B, KEYS, ALIGN)
    tiles = tl.cdiv(count, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    tile_start = tiles_before(key, width, tiles, False, KEYS)
    mine = key == tl.program_id(0)
    number, rows = pick(mine, tiles), pick(mine, pack(row_start, count))
    first, element = pick(mine, tile_start), pick(mine, element_start)
    for start in range(0, number, CHUNK):
        local = start + tl.arange(0, CHUNK)
        entry, mask = table + (first + local) * 4, local < number
        tl.store(entry, tl.program_id(0), mask=mask)
        tl.store(entry + 1, local, mask=mask)
        tl.store(entry + 2, rows, mask=mask)
        tl.store(entry + 3, element, mask=mask)
    if tl.program_id(0) == 0:
        tl.store(total, tl.sum(tiles, axis=0))


@triton.jit(do_not_specialize=["capacity"])
def up_by_table_kernel(
    hidden, stride, gate_up, order, table, total, activation, pre, capacity, depth,
    WIDTHS: tl.constexpr, B: tl.constexpr, SLOTS: tl.constexpr, H: tl.constexpr, ALIGN: tl.constexpr,
    SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """What `up_kernel` computes forward."""
    for tile in tl.range(tl.program_id(0), tl.load(total), tl.num_programs(0), flatten=FLATTEN):
        entry = table + tile * 4
        e, local, rows = tl.load(entry).to(tl.int32), tl.load(entry + 1).to(tl.int32), tl.load(entry + 2)
        up_tile(
            e, local, (rows >> 32).to(tl.int32), rows.to(tl.int32), tl.load(entry + 3) * ALIGN,
            hidden, stride, gate_up, order, activation, pre, capacity, depth,
            WIDTHS, B, SLOTS, H, True, SAVE, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip


def up_by_table(layer, chosen: tuning.Config, options: dict, hidden_states, order, counts, activation, pre, capacity):
    """In the place of `up_kernel`."""
    layout = dict(layer.layout)
    most = triton.cdiv(layer.pairs, chosen.block_m) + layer.keys_per_group * len(layer.widths)
    table = layer.empty(most * triton.cdiv(max(layer.widths), chosen.block_n), 4, dtype=torch.int64)
    total = layer.empty(1, dtype=torch.int32)
    tile_table_kernel[(layer.keys_per_group * len(layer.widths),)](
        counts, table, total, WIDTHS=layer.widths, B=layer.keys_per_group, KEYS=layout.pop("KEYS"),
        ALIGN=layout["ALIGN"], BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, CHUNK=64,
    )  # fmt: skip
    up_by_table_kernel[(tuning.programs(chosen, layer.device),)](
        hidden_states, hidden_states.stride(0), layer.gate_up, order, table, total, activation, pre, capacity,
        layer.hidden_size, SLOTS=layer.slots, SAVE=capacity > 0, **layout, **options,
    )  # fmt: skip


def rows_by_group(layer, kernel: str, chosen: tuning.Config, options: dict, ragged, weights, counts, output):
    """In the place of `rows_kernel`."""
    if layer.device.type == "cuda":  # where kernels put the descriptors they make
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=layer.device))
    rows_by_group_kernel[(tuning.programs(chosen, layer.device),)](
        ragged, weights, counts, output, EXPERTS=layer.experts, FACTOR=1 if kernel == "down" else 2,
        TRANSPOSED=kernel == "down", **layer.layout, **options,
    )  # fmt: skip


def split_down(layer, chosen: tuning.Config, options: dict, activation, weights, position, counts, output):
    """In the place of the `down` product and `combine`."""
    parts = layer.empty(layer.pairs, SPLITS, layer.hidden_size, dtype=torch.float32)
    split_down_kernel[(tuning.programs(chosen, layer.device),)](
        activation, layer.down, counts, parts, SPLITS=SPLITS, **layer.layout, **options
    )
    block = min(triton.next_power_of_2(layer.hidden_size), 256)
    combine_split_kernel[(position.shape[0], triton.cdiv(layer.hidden_size, block))](
        parts, weights, position, output, SLOTS=layer.slots, H=layer.hidden_size, SPLITS=SPLITS, BLOCK_H=block,
        num_warps=2,
    )  # fmt: skip
