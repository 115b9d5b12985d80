"""Triton kernels of the forward pass, and what those of the backward pass share with them.

Shapes: T tokens, K slots per token, S = T K pairs of a token and an expert, sorted by key; H hidden size; G groups,
N_g experts of width W_g in group g; key = group * B + slot. A ragged buffer holds, key after key, a row of width
W_g (or 2 W_g) for each pair.

Every kernel is persistent: its programs walk over a list of tiles that nobody writes down. Each finds its tiles from
the counts of pairs per key, which never leave the device, so that the host neither waits nor sizes a grid by them;
the number of programs changes no bit of the result.

`depth` is H over again, as an argument: a loop of known length the assembler unrolls whole, which takes registers and,
from one H to the next, a different number of them.
"""

import triton
import triton.language as tl


@triton.jit
def of_group(group, values: tl.constexpr):
    """`values[group]`, elementwise, of a tuple of constants."""
    value = group * 0 + values[0]
    for g in tl.static_range(1, len(values)):
        value = tl.where(group == g, values[g], value)
    return value


@triton.jit
def pointer_of_group(group, pointers, GROUPS: tl.constexpr):
    """`pointers[group]`: a chain of selects, since a tuple of arguments cannot be indexed at run time."""
    pointer = pointers[0]
    for g in tl.static_range(1, GROUPS):
        pointer = tl.where(group == g, pointers[g], pointer)
    return pointer


@triton.jit
def ragged_layout(counts, WIDTHS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, ALIGN: tl.constexpr):
    """For every key: the key, its width, pairs, first row, and first element in a ragged buffer of width W_g, in units
    of ALIGN elements. The compiler sees the multiplication that follows, and from it that it may load 16 bytes."""
    key = tl.arange(0, KEYS)
    count = tl.load(counts + key, mask=key < len(WIDTHS) * B, other=0)
    width = of_group(key // B, WIDTHS)
    elements = count.to(tl.int64) * (width // ALIGN)
    return key, width, count, tl.cumsum(count, axis=0) - count, tl.cumsum(elements, axis=0) - elements


@triton.jit
def tiles_before(key, cost, tiles, BY_COST: tl.constexpr, KEYS: tl.constexpr):
    """The first tile of every key. With BY_COST the keys with the most work per tile come first, so that no long tile
    is left for the end; more keys than registers hold comparisons for stay in their order."""
    if not BY_COST or KEYS > 128:
        return tl.cumsum(tiles, axis=0) - tiles
    rank = cost.to(tl.int64) * KEYS + (KEYS - 1 - key)
    earlier = rank[None, :] > rank[:, None]
    return tl.sum(tl.where(earlier, tiles[None, :], 0), axis=1)


@triton.jit
def pack(high, low):
    """Two numbers in one, so that one reduction finds both."""
    return (high.to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def pick(hit, values):
    return tl.sum(tl.where(hit, values, 0), axis=0)


@triton.jit
def find_tile(tile, tile_start, tile_end, tile_and_key, row_and_count, element_start):
    """The key of a tile, the tile's number among those of the key, the key's first row and number of rows, and its
    first element in a ragged buffer, in units of ALIGN."""
    hit = (tile >= tile_start) & (tile < tile_end)
    found, rows = pick(hit, tile_and_key), pick(hit, row_and_count)
    local = tile - (found >> 32).to(tl.int32)
    return found.to(tl.int32), local, (rows >> 32).to(tl.int32), rows.to(tl.int32), pick(hit, element_start)


@triton.jit
def multiply_add(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "interpreter":  # whose products take no bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile of 2 COLUMNS columns; no data moves between threads."""
    return tile.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()


@triton.jit
def up_tile(
    e, local, row0, m_size, element, hidden, stride, gate_up, order, activation, pre, capacity, depth,
    WIDTHS: tl.constexpr, B: tl.constexpr, SLOTS: tl.constexpr, H: tl.constexpr,
    ACTIVATE: tl.constexpr, SAVE: tl.constexpr, RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of `up_kernel`; `element` in elements."""
    group = e // B
    w = of_group(group, WIDTHS)
    n_tiles = tl.cdiv(w, BLOCK_N)
    m0, n0 = local // n_tiles * BLOCK_M, local % n_tiles * BLOCK_N

    # Rows and columns beyond the last one repeat it; they are not stored.
    m = m0 + tl.arange(0, BLOCK_M)
    pair = tl.load(order + row0 + tl.minimum(m, m_size - 1))
    column = tl.arange(0, 2 * BLOCK_N)
    half = column // BLOCK_N
    weight_row = half * w + tl.minimum(n0 + column - half * BLOCK_N, w - 1)
    k = tl.arange(0, BLOCK_K)
    x = hidden + (pair // SLOTS).to(tl.int64)[:, None] * stride + k[None, :]
    base = pointer_of_group(group, gate_up, len(WIDTHS)) + (e % B).to(tl.int64) * (2 * H) * w
    y = base + (weight_row * H)[None, :] + k[:, None]
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        if H % BLOCK_K == 0:
            acc = multiply_add(tl.load(x), tl.load(y), acc, PRECISION)
        else:
            a = tl.load(x, mask=k[None, :] < H - k0, other=0)
            b = tl.load(y, mask=k[:, None] < H - k0, other=0)
            acc = multiply_add(a, b, acc, PRECISION)
        x += BLOCK_K
        y += BLOCK_K

    gate, up = halves(acc, BLOCK_M, BLOCK_N)
    n = n0 + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_M)
    mask = (r < m_size - m0)[:, None] & (n < w)[None, :]
    offset = element + m0.to(tl.int64) * w
    if ACTIVATE:
        value = gate / (1 + tl.exp(-gate)) * up
        tl.store(activation + offset + (r * w)[:, None] + n[None, :], value.to(hidden.dtype.element_ty), mask=mask)
    if SAVE or RECOMPUTE:
        if not RECOMPUTE:  # a mask, not a branch, which would end the pipeline of FLATTEN
            fits = 2 * (element + m_size.to(tl.int64) * w) <= capacity
            mask = (r < tl.where(fits, m_size - m0, 0))[:, None] & (n < w)[None, :]
        target = pre + 2 * offset + (r * (2 * w))[:, None] + n[None, :]
        tl.store(target, gate.to(hidden.dtype.element_ty), mask=mask)
        tl.store(target + w, up.to(hidden.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["capacity"])
def up_kernel(
    hidden, stride, gate_up, order, counts, activation, pre, capacity, depth,
    WIDTHS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr, H: tl.constexpr,
    ALIGN: tl.constexpr, ACTIVATE: tl.constexpr, SAVE: tl.constexpr, RECOMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """activation = silu(x gate^T) * (x up^T), and the two products in `pre` as far as its `capacity` reaches.

    One product of [BLOCK_M, BLOCK_K] with 2 BLOCK_N rows, those of gate before those of up, feeds the tensor cores
    from shared memory better than two. RECOMPUTE (in backward): only the keys that did not fit, to a `pre` that has
    room for all.
    """
    key, width, count, row_start, element_start = ragged_layout(counts, WIDTHS, B, KEYS, ALIGN)
    tiles = tl.cdiv(count, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    if RECOMPUTE:
        tiles = tl.where(2 * (element_start * ALIGN + count.to(tl.int64) * width) > capacity, tiles, 0)
    tile_start = tiles_before(key, width, tiles, False, KEYS)
    tile_end = tile_start + tiles
    tile_and_key = pack(tile_start, key)
    row_and_count = pack(row_start, count)

    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0), flatten=FLATTEN):
        e, local, row0, m_size, element = find_tile(
            tile, tile_start, tile_end, tile_and_key, row_and_count, element_start
        )
        up_tile(
            e, local, row0, m_size, element * ALIGN, hidden, stride, gate_up, order, activation, pre, capacity, depth,
            WIDTHS, B, SLOTS, H, ACTIVATE, SAVE, RECOMPUTE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip


@triton.jit
def rows_kernel(
    ragged, weights, counts, output,
    WIDTHS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, H: tl.constexpr, ALIGN: tl.constexpr,
    FACTOR: tl.constexpr, TRANSPOSED: tl.constexpr, BY_COST: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """output [S, H] = ragged rows [S, FACTOR W_g] times each expert's matrix: down projection [H, W_g] with
    TRANSPOSED, gate_up projection [2 W_g, H] without (the gradient of the rows of hidden states)."""
    GROUPS: tl.constexpr = len(WIDTHS)
    N_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    key, width, count, row_start, element_start = ragged_layout(counts, WIDTHS, B, KEYS, ALIGN)
    tiles = tl.cdiv(count, BLOCK_M) * N_TILES
    tile_start = tiles_before(key, width, tiles, BY_COST, KEYS)
    tile_end = tile_start + tiles
    tile_and_key = pack(tile_start, key)
    row_and_count = pack(row_start, count)

    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0), flatten=FLATTEN):
        e, local, row0, m_size, element = find_tile(
            tile, tile_start, tile_end, tile_and_key, row_and_count, element_start
        )
        element *= ALIGN
        group = e // B
        k_size = FACTOR * of_group(group, WIDTHS)
        m0, n0 = local // N_TILES * BLOCK_M, local % N_TILES * BLOCK_N

        r = tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x = ragged + FACTOR * element + m0.to(tl.int64) * k_size
        x = x + (tl.minimum(r, m_size - m0 - 1) * k_size)[:, None] + k[None, :]
        base = pointer_of_group(group, weights, GROUPS) + (e % B).to(tl.int64) * H * k_size
        if TRANSPOSED:
            y = base + (tl.minimum(n, H - 1) * k_size)[None, :] + k[:, None]
        else:
            y = base + (k * H)[:, None] + n[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(0, k_size, BLOCK_K):
            if EVEN_K and (TRANSPOSED or H % BLOCK_N == 0):
                acc = multiply_add(tl.load(x), tl.load(y), acc, PRECISION)
            else:
                mask = (k < k_size - k0)[:, None]
                if not TRANSPOSED:
                    mask = mask & (n < H)[None, :]
                a = tl.load(x, mask=(k < k_size - k0)[None, :], other=0)
                acc = multiply_add(a, tl.load(y, mask=mask, other=0), acc, PRECISION)
            x += BLOCK_K
            y += BLOCK_K if TRANSPOSED else BLOCK_K * H

        target = output + (row0 + m0).to(tl.int64) * H + (r * H)[:, None] + n[None, :]
        mask = (r < m_size - m0)[:, None] & (n < H)[None, :]
        tl.store(target, acc.to(output.dtype.element_ty), mask=mask)


@triton.jit
def combine_kernel(
    rows, weights, position, output, partials, d_weights,
    SLOTS: tl.constexpr, H: tl.constexpr, PARTIALS: tl.constexpr, WEIGHTED: tl.constexpr, SUM_ROWS: tl.constexpr,
    SLOTS_POW2: tl.constexpr, PARTIALS_POW2: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """output[t] = sum over the token's slots of its rows, WEIGHTED or not, in the order of the slots; the program of a
    token's first columns also sums the partial results of the gradient of its weights, if there are PARTIALS."""
    token = tl.program_id(0)
    if SUM_ROWS:
        h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        acc = tl.zeros([BLOCK_H], tl.float32)
        for slot in tl.range(0, SLOTS, loop_unroll_factor=4):
            row = tl.load(position + token * SLOTS + slot)
            # Of a skipped slot nothing is read: its weight may be anything, even infinite.
            columns = tl.where(row >= 0, H, 0)
            value = tl.load(rows + row.to(tl.int64) * H + h, mask=h < columns, other=0).to(tl.float32)
            if WEIGHTED:
                value *= tl.load(weights + token * SLOTS + slot, mask=row >= 0, other=0).to(tl.float32)
            acc += value
        tl.store(output + token.to(tl.int64) * H + h, acc.to(output.dtype.element_ty), mask=h < H)
    if PARTIALS > 0:  # noqa: SIM102 - known to the compiler, unlike the next
        if tl.program_id(1) == 0:
            slots = tl.arange(0, SLOTS_POW2)
            part = tl.arange(0, PARTIALS_POW2)
            row = tl.load(position + token * SLOTS + slots, mask=slots < SLOTS, other=-1)
            mask = (row >= 0)[:, None] & (part < PARTIALS)[None, :]
            value = tl.load(partials + row.to(tl.int64)[:, None] * PARTIALS + part[None, :], mask=mask, other=0)
            gradient = tl.sum(value, axis=1).to(d_weights.dtype.element_ty)
            tl.store(d_weights + token * SLOTS + slots, gradient, mask=slots < SLOTS)
