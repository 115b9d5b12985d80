"""Triton kernels of the backward pass; shapes and the walk over tiles as in `triton_forward.py`, whose `rows_kernel`
and `combine_kernel` serve here too."""

import triton
import triton.language as tl

from .triton_forward import (
    find_tile,
    halves,
    multiply_add,
    of_group,
    pack,
    pointer_of_group,
    ragged_layout,
    tiles_before,
)


@triton.jit
def _activation_gradient(
    acc, pre, d_pre, weighted, rows, n, w, weight, size,
    D_PRE: tl.constexpr, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the gradient of the activation (without the weight of the pair) to everything that follows from it;
    returns the part of the gradient of the weight. `pre` may be `d_pre`, which then is overwritten in place. In PARTS,
    one after the other, for want of registers."""
    if PARTS > 1:
        left, right = halves(acc, BLOCK_M, BLOCK_N // 2)
        partial = _activation_gradient(
            left, pre, d_pre, weighted, rows, n, w, weight, size,
            D_PRE, WEIGHTED, PARTS // 2, BLOCK_M, BLOCK_N // 2,
        ) + _activation_gradient(
            right, pre, d_pre, weighted, rows, n + BLOCK_N // 2, w, weight, size,
            D_PRE, WEIGHTED, PARTS // 2, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
    else:
        column = n + tl.arange(0, BLOCK_N)
        mask = (rows < size)[:, None] & (column < w)[None, :]
        offset = (rows * (2 * w))[:, None] + column[None, :]
        gate = tl.load(pre + offset, mask=mask, other=0).to(tl.float32)
        up = tl.load(pre + w + offset, mask=mask, other=0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-gate))
        silu = gate * sigmoid
        products = acc * silu * up
        partial = tl.sum(products, axis=1)
        if WEIGHTED:
            value = weight[:, None] * silu * up
            tl.store(weighted + (rows * w)[:, None] + column[None, :], value.to(pre.dtype.element_ty), mask=mask)
        if D_PRE:
            # From the products, which are thus not left for later, with all that they are made of in registers.
            d_gate = weight[:, None] * (acc * up * sigmoid + products * (1 - sigmoid))
            tl.debug_barrier()  # nobody overwrites what another thread has yet to load
            tl.store(d_pre + offset, d_gate.to(pre.dtype.element_ty), mask=mask)
            tl.store(d_pre + w + offset, (weight[:, None] * acc * silu).to(pre.dtype.element_ty), mask=mask)
    return partial


@triton.jit(do_not_specialize=["capacity"])
def d_activation_kernel(
    d_output, stride, down, weights, order, counts, pre, capacity, d_pre, weighted, partials, depth,
    WIDTHS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr, H: tl.constexpr,
    ALIGN: tl.constexpr, EVEN_N: tl.constexpr, PARTIALS: tl.constexpr, D_PRE: tl.constexpr,
    WEIGHTED: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """The gradient of the activations, d_output[token] @ down, which is not stored but becomes, tile by tile:
    d_pre (gradients of gate and up), weighted (activation times weight, for the gradient of down) and partials
    [S, PARTIALS] of the gradient of the weights. Pre-activations that `pre` had no room for are read from d_pre."""
    GROUPS: tl.constexpr = len(WIDTHS)
    key, width, count, row_start, element_start = ragged_layout(counts, WIDTHS, B, KEYS, ALIGN)
    tiles = tl.cdiv(count, BLOCK_M) * tl.cdiv(width, BLOCK_N)
    tile_start = tiles_before(key, width, tiles, False, KEYS)
    tile_end = tile_start + tiles
    tile_and_key = pack(tile_start, key)
    row_and_count = pack(row_start, count)

    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0), flatten=FLATTEN):
        e, local, row0, m_size, element = find_tile(
            tile, tile_start, tile_end, tile_and_key, row_and_count, element_start
        )
        element *= ALIGN
        group = e // B
        w = of_group(group, WIDTHS)
        n_tiles = tl.cdiv(w, BLOCK_N)
        n_tile = local % n_tiles
        m0, n0 = local // n_tiles * BLOCK_M, n_tile * BLOCK_N

        m = m0 + tl.arange(0, BLOCK_M)
        pair = tl.load(order + row0 + tl.minimum(m, m_size - 1))
        if PARTIALS > 0:  # narrow experts have fewer tiles: their last one fills the row with zeros
            missing = tl.where(n_tile == n_tiles - 1, n_tiles, PARTIALS)
            target = partials + (row0 + m).to(tl.int64) * PARTIALS
            for part in tl.static_range(1, PARTIALS):
                rows_to_fill = tl.where(part >= missing, m_size, 0)
                tl.store(target + part, tl.zeros([BLOCK_M], tl.float32), mask=m < rows_to_fill)

        n = n0 + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x = d_output + (pair // SLOTS).to(tl.int64)[:, None] * stride + k[None, :]
        y = pointer_of_group(group, down, GROUPS) + (e % B).to(tl.int64) * H * w + (k * w)[:, None] + n[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k0 in range(0, depth, BLOCK_K):
            if H % BLOCK_K == 0 and EVEN_N:
                acc = multiply_add(tl.load(x), tl.load(y), acc, PRECISION)
            else:
                a = tl.load(x, mask=k[None, :] < H - k0, other=0)
                b = tl.load(y, mask=(k[:, None] < H - k0) & (n < w)[None, :], other=0)
                acc = multiply_add(a, b, acc, PRECISION)
            x += BLOCK_K
            y += BLOCK_K * w

        r = tl.arange(0, BLOCK_M)
        pair = tl.load(order + row0 + tl.minimum(m, m_size - 1))  # again: kept, it would cost registers in the loop
        weight = tl.load(weights + pair).to(tl.float32)
        offset = element + m0.to(tl.int64) * w
        fits = 2 * (element + m_size.to(tl.int64) * w) <= capacity
        partial = _activation_gradient(
            acc, tl.where(fits, pre, d_pre) + 2 * offset, d_pre + 2 * offset, weighted + offset if WEIGHTED else None,
            r, n0, w, weight, m_size - m0, D_PRE, WEIGHTED, PARTS, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if PARTIALS > 0:
            target = partials + (row0 + m).to(tl.int64) * PARTIALS + n_tile
            tl.store(target, partial, mask=m < m_size)


@triton.jit
def d_weights_kernel(
    hidden, hidden_stride, d_output, d_output_stride, d_pre, weighted, order, counts, d_gate_up, d_down,
    WIDTHS: tl.constexpr, EXPERTS: tl.constexpr, B: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr,
    H: tl.constexpr, ALIGN: tl.constexpr, GATE_UP: tl.constexpr, DOWN: tl.constexpr, EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """d_gate_up = d_pre^T x and d_down = d_output^T weighted, as far as wanted: ragged rows, transposed, times the
    rows of each pair's token. Both kinds share the code; d_down is stored transposed. All experts have tiles, those
    without pairs too: zeros. The experts with the most pairs come first."""
    GROUPS: tl.constexpr = len(WIDTHS)
    N_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    key, width, count, row_start, element_start = ragged_layout(counts, WIDTHS, B, KEYS, ALIGN)
    tiles = tl.zeros([KEYS], tl.int32)
    if GATE_UP:
        tiles += tl.cdiv(2 * width, BLOCK_M) * N_TILES
    if DOWN:
        tiles += tl.cdiv(width, BLOCK_M) * N_TILES
    exists = (key < GROUPS * B) & (key % B < of_group(key // B, EXPERTS))
    tiles = tl.where(exists, tiles, 0)
    tile_start = tiles_before(key, count, tiles, True, KEYS)
    tile_end = tile_start + tiles
    tile_and_key = pack(tile_start, key)
    row_and_count = pack(row_start, count)

    for tile in tl.range(tl.program_id(0), tl.sum(tiles, axis=0), tl.num_programs(0), flatten=FLATTEN):
        e, local, row0, k_size, element = find_tile(
            tile, tile_start, tile_end, tile_and_key, row_and_count, element_start
        )
        element *= ALIGN
        group = e // B
        w = of_group(group, WIDTHS)
        # A factor instead of a branch: the loads of both kinds have the same form.
        if GATE_UP and DOWN:
            first = tl.cdiv(2 * w, BLOCK_M) * N_TILES
            is_down = local >= first
            local = tl.where(is_down, local - first, local)
            factor = tl.where(is_down, 1, 2)
            ragged = tl.where(is_down, weighted, d_pre)
            gathered = tl.where(is_down, d_output, hidden)
            stride = tl.where(is_down, d_output_stride, hidden_stride)
        elif DOWN:
            factor, ragged, gathered, stride = 1, weighted, d_output, d_output_stride
        else:
            factor, ragged, gathered, stride = 2, d_pre, hidden, hidden_stride
        m_size = factor * w
        m0, n0 = local // N_TILES * BLOCK_M, local % N_TILES * BLOCK_N

        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        x = ragged + factor * element + m[:, None] + (k * m_size)[None, :]
        y = gathered + n[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # The rows' numbers are read one step ahead: a load that waits for a load would stall the pipeline.
        pair = tl.load(order + row0 + k, mask=k < k_size, other=0)
        for k0 in range(0, k_size, BLOCK_K):
            inside = k < k_size - k0
            token = (pair // SLOTS).to(tl.int64)
            pair = tl.load(order + row0 + k0 + BLOCK_K + k, mask=k < k_size - k0 - BLOCK_K, other=0)
            x_mask, y_mask = inside[None, :], inside[:, None]
            if not EVEN_M:
                x_mask = x_mask & (m < m_size)[:, None]
            if H % BLOCK_N != 0:
                y_mask = y_mask & (n < H)[None, :]
            a = tl.load(x, mask=x_mask, other=0)
            b = tl.load(y + token[:, None] * stride, mask=y_mask, other=0)
            acc = multiply_add(a, b, acc, PRECISION)
            x += BLOCK_K * m_size

        offset = (e % B).to(tl.int64) * H * m_size
        mask = (m < m_size)[:, None] & (n < H)[None, :]
        value = acc.to(hidden.dtype.element_ty)
        if DOWN:  # noqa: SIM102 - known to the compiler, unlike the next
            if not GATE_UP or is_down:
                target = pointer_of_group(group, d_down, GROUPS) + offset + m[:, None] + n[None, :] * w
                tl.store(target, value, mask=mask)
        if GATE_UP:  # noqa: SIM102
            if not DOWN or not is_down:
                target = pointer_of_group(group, d_gate_up, GROUPS) + offset + (m * H)[:, None] + n[None, :]
                tl.store(target, value, mask=mask)
