"""The Triton kernels: similarity tiles that never leave the chip, and the passes over rows around them.

    norm_kernel    largest row norm of a matrix            -> how far to scale it up, and the fixed shift
    scalars_kernel norms, scale and bias -> the few numbers that the other kernels read
    cast_kernel    features -> padded float16 operands (and their rounding errors, for precision "high")
    sums_kernel    a tile of logits -> its partial sums of rows and of columns
    strip_kernel   log-sum-exp of the rows; exact for those whose sum against the fixed shift came out too small
    weights_kernel log-sum-exp and its gradient -> what the coefficients of a row or column share
    coef_kernel    a tile of logits -> the coefficients G = dL/ds, in float16
    exact_coef_kernel  the same for the tiles of those rows and columns
    finish_kernel  accumulated G Y -> the gradient in the features' dtype, and <x, dx> for the scale

Conventions. Operands are float16, times a power of two that puts the largest row norm near 2^14, so neither
underflow nor overflow depends on the features' norm. Logits are in bits (log2 e times nats):

    bits_ij = acc_ij * scalars[0] + scalars[1] + col_add_j

with scalars[0] = scale log2(e) / (both powers of two) and scalars[1] = -shift (softmax) or bias log2(e)
(sigmoid), read from device memory: the host never waits. There are no atomics: every program writes its own
cells, so two runs are equal bit for bit. Only numbers known per model (D, tile sizes, flags) are compile-time
constants. Loops with run-time bounds are `while` loops: triton 3.6's interpreter fails on a run-time `range`
under NumPy 2.4, and those two loops serve the rare case.

`TRITON_INTERPRET=1` runs all of it on a CPU; it is read when this module is imported.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_RUN_TIME = ["row_start", "col_start", "n", "m", "row_offset", "tiles_m", "tiles_n"]


@triton.jit
def _swizzled(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile (row, column) of a program: GROUP rows of tiles are walked column by column, to share the L2
    cache."""
    per_group = GROUP * tiles_n
    first = (pid // per_group) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    inside = pid % per_group
    return first + inside % height, inside // height


@triton.jit
def _tile_product(
    x,
    y,
    row,
    col,
    n,
    m,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) inner products of the rows from `row` and the columns from `col`.

    x, y: (n, D) and (m, D), as tensor descriptors, or as pointers where the hardware has none: a descriptor
    taken apart by the compiler no longer shows that rows are contiguous, and its loads would not be
    asynchronous.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if DESCRIPTORS:
        for k in range(0, D, BLOCK_K):
            acc = tl.dot(x.load([row, k]), y.load([col, k]).T, acc)
    else:
        # Rows beyond the last are read as the last one; their results are dropped by every caller.
        x_rows = tl.minimum(row + tl.arange(0, BLOCK_M), n - 1).to(tl.int64)
        y_rows = tl.minimum(col + tl.arange(0, BLOCK_N), m - 1).to(tl.int64)
        at = tl.arange(0, BLOCK_K)
        x_at = x + x_rows[:, None] * D + at[None, :]
        y_at = y + y_rows[None, :] * D + at[:, None]
        for k in range(0, D, BLOCK_K):
            acc = tl.dot(tl.load(x_at + k), tl.load(y_at + k), acc)
    return acc


@triton.jit
def _store_tile(
    work, values, row, col, stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """A float16 tile into the workspace, whose sides are whole tiles."""
    if DESCRIPTORS:
        work.store([row, col], values)
    else:
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        cols = col + tl.arange(0, BLOCK_N)
        tl.store(work + rows[:, None] * stride + cols[None, :], values)


@triton.jit
def _zero_excluded(
    values,
    row,
    col,
    n,
    m,
    row_offset,
    row_ids,
    col_ids,
    EXCLUDE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`values` with 0 at excluded pairs and outside the matrix; tiles that have none of either skip the
    work."""
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    touched = (row + BLOCK_M > n) | (col + BLOCK_N > m)
    if EXCLUDE:
        touched = touched | ((row + row_offset < col + BLOCK_N) & (row + row_offset + BLOCK_M > col))
    if HAS_IDS:
        row_id = tl.load(row_ids + rows, mask=rows < n, other=0)
        col_id = tl.load(col_ids + cols, mask=cols < m, other=0)
        values = tl.where(row_id[:, None] == col_id[None, :], 0.0, values)
    if touched:
        keep = (rows < n)[:, None] & (cols < m)[None, :]
        if EXCLUDE:
            keep = keep & ((rows + row_offset)[:, None] != cols[None, :])
        values = tl.where(keep, values, 0.0)
    return values


@triton.jit
def _softplus_bits(bits):
    """log2(1 + 2^bits), relatively exact to 4e-7: the larger of bits and 0, and log2(1 + e) of e = 2^-|bits|.

    log2(1 + e) / e is a polynomial, the best of degree 7 on [0, 1] by relative error: eight multiply-adds cost the
    chip what one special function does, and 1 + e, which loses e's digits, is never formed.
    """
    e = tl.exp2(-tl.abs(bits))
    p = 0.06360789388418198 + e * -0.01231947261840105
    p = -0.1553518921136856 + e * p
    p = 0.2560097575187683 + e * p
    p = -0.35339483618736267 + e * p
    p = 0.48006370663642883 + e * p
    p = -0.7213100790977478 + e * p
    p = 1.4426947832107544 + e * p
    return tl.maximum(bits, 0.0, propagate_nan=tl.PropagateNan.ALL) + e * p


@triton.jit
def _reciprocal(x):
    """1 / x to a bit or two, 0 for inf: one instruction, where a division rescales operands that are never huge."""
    if _INTERPRETED:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit(do_not_specialize=_RUN_TIME)
def sums_kernel(
    x,
    y,
    scalars,
    col_add,
    row_ids,
    col_ids,
    row_part,
    col_part,
    row_start,
    col_start,
    n,
    m,
    row_offset,
    tiles_m,
    tiles_n,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """row_part (tiles_n, tiles_m BLOCK_M), col_part (tiles_m, tiles_n BLOCK_N): sums of 2^bits, or of
    softplus."""
    tile_m, tile_n = _swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    row = row_start + tile_m * BLOCK_M
    col = col_start + tile_n * BLOCK_N
    acc = _tile_product(x, y, row, col, n, m, D, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS)
    bits = acc * tl.load(scalars) + tl.load(scalars + 1)
    if HAS_WEIGHT:
        cols = col + tl.arange(0, BLOCK_N)
        bits = bits + tl.load(col_add + cols, mask=cols < m, other=0.0)[None, :]
    if SOFTPLUS:
        values = _softplus_bits(bits)
    else:
        values = tl.exp2(bits)
    values = _zero_excluded(
        values, row, col, n, m, row_offset, row_ids, col_ids, EXCLUDE, HAS_IDS, BLOCK_M, BLOCK_N
    )
    in_block_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_sum = tl.sum(values, 1)
    if SOFTPLUS:
        row_sum *= 0.6931471805599453
    tl.store(row_part + tile_n.to(tl.int64) * (tiles_m * BLOCK_M) + in_block_m, row_sum)
    if not SOFTPLUS:
        in_block_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(col_part + tile_m.to(tl.int64) * (tiles_n * BLOCK_N) + in_block_n, tl.sum(values, 0))


@triton.jit(do_not_specialize=_RUN_TIME)
def strip_kernel(
    x,
    y,
    scalars,
    row_add,
    col_add,
    row_ids,
    col_ids,
    sums,
    lse,
    floor,
    n,
    m,
    row_offset,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ROW_WEIGHT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """lse (n,) in nats, from the sums; by a running maximum where sums < floor, and exp2 has lost some."""
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    found = tl.load(sums + rows, mask=rows < n, other=float("inf"))
    lost = found < floor
    # In float64, once a row: a shift of 100 bits would take seven of the logarithm's.
    shift = tl.load(scalars + 12).to(tl.float64)
    kept = (shift + tl.log2(found.to(tl.float64))) * 0.6931471805599453
    tl.store(lse + rows, kept.to(tl.float32), mask=(rows < n) & (found >= floor))
    # NaN is neither lost nor kept.
    tl.store(lse + rows, found, mask=(rows < n) & (found != found))
    if tl.max(lost.to(tl.int32), 0) > 0:
        multiplier = tl.load(scalars)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        col = 0
        while col < m:
            bits = _tile_product(x, y, row, col, n, m, D, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS) * multiplier
            cols = col + tl.arange(0, BLOCK_N)
            if HAS_WEIGHT:
                bits = bits + tl.load(col_add + cols, mask=cols < m, other=0.0)[None, :]
            keep = (cols < m)[None, :] & (rows < n)[:, None]
            if EXCLUDE:
                keep = keep & ((rows + row_offset)[:, None] != cols[None, :])
            if HAS_IDS:
                row_id = tl.load(row_ids + rows, mask=rows < n, other=0)
                col_id = tl.load(col_ids + cols, mask=cols < m, other=0)
                keep = keep & (row_id[:, None] != col_id[None, :])
            bits = tl.where(keep, bits, float("-inf"))
            new_top = tl.maximum(top, tl.max(bits, 1))
            # While nothing is kept the maximum is -inf, and -inf - -inf would be NaN.
            against = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp2(top - against) + tl.sum(tl.exp2(bits - against[:, None]), 1)
            top = new_top
            col += BLOCK_N
        result = top + tl.log2(total)
        if HAS_ROW_WEIGHT:
            result = result + tl.load(row_add + rows, mask=rows < n, other=0.0)
        tl.store(lse + rows, (result.to(tl.float64) * 0.6931471805599453).to(tl.float32), mask=lost)


@triton.jit(do_not_specialize=["n"])
def weights_kernel(
    lse, grad, size, shift, bits, weight, factor, lowest, n, POWER: tl.constexpr, BLOCK: tl.constexpr
):
    """What the coefficients of one side are made of, (n,) each, and lowest[program], its least bits.

    bits = lse log2(e) - shift; weight = grad / size POWER; factor = weight 2^-bits. An empty sum has weight 0.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < n
    value = tl.load(lse + rows, mask=inside, other=float("-inf"))
    empty = value == float("-inf")
    # In float64, once a row: the difference of two numbers of a hundred bits.
    found = (value.to(tl.float64) * 1.4426950408889634 - tl.load(shift).to(tl.float64)).to(tl.float32)
    found = tl.where(empty, 0.0, found)
    share = tl.load(grad + rows, mask=inside, other=0.0).to(tl.float32) / tl.load(size) * POWER
    share = tl.where(empty, 0.0, share)
    tl.store(bits + rows, found, mask=inside)
    tl.store(weight + rows, share, mask=inside)
    tl.store(factor + rows, share * tl.exp2(-found), mask=inside)
    # A NaN lies below nothing.
    tl.store(lowest + tl.program_id(0), tl.min(tl.where(found == found, found, 0.0), 0))


@triton.jit
def _coefficients(
    acc,
    scalars,
    col_add,
    row_ids,
    col_ids,
    row_bits,
    col_bits,
    row_weight,
    col_weight,
    row,
    col,
    n,
    m,
    row_offset,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    TWO: tl.constexpr,
):
    """G of the tile at (row, col). TWO: an exponential for each side; else the weights hold 2^-bits, and no
    bits are read."""
    rows = row + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    bits = acc * tl.load(scalars) + tl.load(scalars + 1)
    if HAS_WEIGHT:
        bits = bits + tl.load(col_add + cols, mask=cols < m, other=0.0)[None, :]
    by_row = tl.load(row_weight + rows, mask=rows < n, other=0.0)
    if SOFTPLUS:
        values = by_row[:, None] * _reciprocal(1.0 + tl.exp2(-bits))
    else:
        by_col = tl.load(col_weight + cols, mask=cols < m, other=0.0)
        if TWO:
            row_lse = tl.load(row_bits + rows, mask=rows < n, other=0.0)
            col_lse = tl.load(col_bits + cols, mask=cols < m, other=0.0)
            values = by_row[:, None] * tl.exp2(bits - row_lse[:, None])
            values += by_col[None, :] * tl.exp2(bits - col_lse[None, :])
        else:
            values = tl.exp2(bits) * (by_row[:, None] + by_col[None, :])
    return _zero_excluded(
        values, row, col, n, m, row_offset, row_ids, col_ids, EXCLUDE, HAS_IDS, BLOCK_M, BLOCK_N
    )


@triton.jit
def _store_coefficients(
    values,
    g_work,
    low_work,
    col_part,
    row,
    col,
    work_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COL_SUMS: tl.constexpr,
    ONE_SUM: tl.constexpr,
    HIGH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Writes the tile at (row, col) of the block; col_part points to the place of its sum, or to this row of
    tiles."""
    g = values.to(tl.float16)
    _store_tile(g_work, g, row, col, work_stride, BLOCK_M, BLOCK_N, DESCRIPTORS)
    if HIGH:
        low = (values - g.to(tl.float32)).to(tl.float16)
        _store_tile(low_work, low, row, col, work_stride, BLOCK_M, BLOCK_N, DESCRIPTORS)
    if ONE_SUM:
        tl.store(col_part, tl.sum(values))
    elif COL_SUMS:
        tl.store(col_part + col + tl.arange(0, BLOCK_N), tl.sum(values, 0))


@triton.jit(do_not_specialize=_RUN_TIME)
def coef_kernel(
    x,
    y,
    g_work,
    low_work,
    scalars,
    col_add,
    row_ids,
    col_ids,
    row_factor,
    col_factor,
    col_part,
    row_start,
    col_start,
    n,
    m,
    row_offset,
    tiles_m,
    tiles_n,
    work_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    COL_SUMS: tl.constexpr,
    HIGH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """G of one tile, float16, times the power of two that the factors carry.

    softmax: G_ij = 2^bits_ij (row_factor_i + col_factor_j),  row_factor = dL/drow_lse * 2^-(row's sum in
    bits)
    sigmoid: G_ij = row_factor_i sigma(bits_ij ln 2), and COL_SUMS stores one sum a tile, (tiles,), for the bias

    One exponential serves both sums. Where a sum is too small to divide by, the tile is done again by
    exact_coef_kernel: a second path in here would take twice the registers from every tile.
    """
    tile_m, tile_n = _swizzled(tl.program_id(0), tiles_m, tiles_n, GROUP)
    row = row_start + tile_m * BLOCK_M
    col = col_start + tile_n * BLOCK_N
    acc = _tile_product(x, y, row, col, n, m, D, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS)
    values = _coefficients(
        acc,
        scalars,
        col_add,
        row_ids,
        col_ids,
        row_factor,
        col_factor,
        row_factor,
        col_factor,
        row,
        col,
        n,
        m,
        row_offset,
        BLOCK_M,
        BLOCK_N,
        SOFTPLUS,
        HAS_WEIGHT,
        HAS_IDS,
        EXCLUDE,
        False,
    )
    _store_coefficients(
        values,
        g_work,
        low_work,
        col_part + (tl.program_id(0) if SOFTPLUS else tile_m.to(tl.int64) * (tiles_n * BLOCK_N)),
        tile_m * BLOCK_M,
        tile_n * BLOCK_N,
        work_stride,
        BLOCK_M,
        BLOCK_N,
        COL_SUMS,
        COL_SUMS and SOFTPLUS,
        HIGH,
        DESCRIPTORS,
    )


@triton.jit(do_not_specialize=_RUN_TIME)
def exact_coef_kernel(
    x,
    y,
    g_work,
    low_work,
    lost,
    floor,
    scalars,
    col_add,
    row_ids,
    col_ids,
    row_bits,
    col_bits,
    row_weight,
    col_weight,
    col_part,
    row_start,
    col_start,
    n,
    m,
    row_offset,
    tiles_m,
    tiles_n,
    work_stride,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_IDS: tl.constexpr,
    EXCLUDE: tl.constexpr,
    COL_SUMS: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Overwrites the tiles that hold a row or column whose sum, in bits less the shift, is below `floor`.

    G_ij = row_weight_i 2^(bits_ij - row_bits_i) + col_weight_j 2^(bits_ij - col_bits_j). A few programs walk
    all tiles, and leave at once where `lost` is 0. BLOCK_M is coef_kernel's, BLOCK_N narrower: this is the
    rare case.
    """
    if tl.load(lost) > 0:
        tile = tl.program_id(0)
        while tile < tiles_m * tiles_n:
            tile_m = tile // tiles_n
            tile_n = tile % tiles_n
            row = row_start + tile_m * BLOCK_M
            col = col_start + tile_n * BLOCK_N
            rows = row + tl.arange(0, BLOCK_M)
            cols = col + tl.arange(0, BLOCK_N)
            lowest = tl.minimum(
                tl.min(tl.load(row_bits + rows, mask=rows < n, other=0.0), 0),
                tl.min(tl.load(col_bits + cols, mask=cols < m, other=0.0), 0),
            )
            if lowest < floor:
                acc = _tile_product(x, y, row, col, n, m, D, BLOCK_M, BLOCK_N, BLOCK_K, False)
                values = _coefficients(
                    acc,
                    scalars,
                    col_add,
                    row_ids,
                    col_ids,
                    row_bits,
                    col_bits,
                    row_weight,
                    col_weight,
                    row,
                    col,
                    n,
                    m,
                    row_offset,
                    BLOCK_M,
                    BLOCK_N,
                    False,
                    HAS_WEIGHT,
                    HAS_IDS,
                    EXCLUDE,
                    True,
                )
                _store_coefficients(
                    values,
                    g_work,
                    low_work,
                    col_part + tile_m.to(tl.int64) * (tiles_n * BLOCK_N),
                    tile_m * BLOCK_M,
                    tile_n * BLOCK_N,
                    work_stride,
                    BLOCK_M,
                    BLOCK_N,
                    COL_SUMS,
                    False,
                    HIGH,
                    False,
                )
            tile += tl.num_programs(0)


@triton.jit(do_not_specialize=_RUN_TIME)
def norm_kernel(
    x, largest, n, row_stride, col_stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """largest[program] = the largest finite squared norm of this program's ROWS rows, 0 where there is
    none."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = x + rows.to(tl.int64)[:, None] * row_stride
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(0, D, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        inside = (rows < n)[:, None] & (at < D)[None, :]
        values = tl.load(start + at.to(tl.int64)[None, :] * col_stride, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(values * values, 1)
    # NaN and inf compare false: one bad row must not turn every row's sums into NaN.
    total = tl.where(total < float("inf"), total, 0.0)
    tl.store(largest + tl.program_id(0), tl.max(total, 0))


@triton.jit
def _power(norm):
    """The power of two that puts `norm` in [2^13, 2^14)."""
    exponent = (norm.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.where(norm > 0.0, exponent, 0)
    return ((14 - exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _largest(values, count, BLOCK: tl.constexpr):
    """The largest of `count` numbers that are at least 0."""
    found = tl.zeros((BLOCK,), tl.float32)
    at = tl.arange(0, BLOCK)
    start = 0
    while start < count:
        found = tl.maximum(found, tl.load(values + start + at, mask=start + at < count, other=0.0))
        start += BLOCK
    return tl.max(found, 0)


@triton.jit(do_not_specialize=["x_parts", "y_parts", "room"])
def scalars_kernel(
    x_largest,
    y_largest,
    scale,
    added,
    scalars,
    x_parts,
    y_parts,
    room,
    SOFTPLUS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scalars[0, 1] as the tiles read them, [4] and [8] the powers of two of both sides, [12] the shift.

    x_largest, y_largest: norm_kernel's. added: the bias; HAS_WEIGHT: the largest col_add, in bits. room: bits that
    one exponential may take of the range: see clipkit.kernels.chunked.fixed_shift.
    """
    x_norm = tl.sqrt(_largest(x_largest, x_parts, BLOCK))
    y_norm = tl.sqrt(_largest(y_largest, y_parts, BLOCK))
    x_power = _power(x_norm)
    y_power = _power(y_norm)
    bits = tl.load(scale) * 1.4426950408889634
    tl.store(scalars, bits / (x_power * y_power))
    tl.store(scalars + 4, x_power)
    tl.store(scalars + 8, y_power)
    if SOFTPLUS:
        tl.store(scalars + 1, tl.load(added) * 1.4426950408889634)
    else:
        bound = tl.abs(bits) * (x_norm * y_norm)
        if HAS_WEIGHT:
            bound += tl.load(added)
        shift = tl.where(
            bound > 0.0, tl.ceil(tl.where(bound - room > 0.0, bound - room, 0.0)), tl.ceil(bound)
        )
        tl.store(scalars + 1, -shift)
        tl.store(scalars + 12, shift)


@triton.jit(do_not_specialize=_RUN_TIME)
def cast_kernel(
    x,
    out,
    power,
    n,
    row_stride,
    col_stride,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HIGH: tl.constexpr,
    SECOND: tl.constexpr,
):
    """out (n, PADDED) = x * power in float16, zeros beyond D; HIGH: (n, 3 PADDED) = [lo, hi, hi], or SECOND: [hi,
    lo, hi].

    With x = hi + lo and y = hi' + lo', the inner product of [lo, hi, hi] and [hi', lo', hi'] leaves out lo lo'
    alone. Small terms come first: a tensor core cuts its accumulator off at every step of 16, by up to 2^-23 of
    what it holds, which is next to nothing until the last third.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    width: tl.constexpr = 3 * PADDED if HIGH else PADDED
    start = x + rows.to(tl.int64)[:, None] * row_stride
    to = out + rows.to(tl.int64)[:, None] * width
    factor = tl.load(power)
    for k in range(0, PADDED, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        inside = (rows < n)[:, None] & (at < D)[None, :]
        stored = (rows < n)[:, None] & (at < PADDED)[None, :]
        values = tl.load(start + at.to(tl.int64)[None, :] * col_stride, mask=inside, other=0.0)
        values = values.to(tl.float32) * factor
        high = values.to(tl.float16)
        if not HIGH:
            tl.store(to + at[None, :], high, mask=stored)
        else:
            low = (values - high.to(tl.float32)).to(tl.float16)
            tl.store(to + at[None, :], high if SECOND else low, mask=stored)
            tl.store(to + (PADDED + at)[None, :], low if SECOND else high, mask=stored)
            tl.store(to + (2 * PADDED + at)[None, :], high, mask=stored)


@triton.jit(do_not_specialize=_RUN_TIME)
def finish_kernel(
    acc,
    x,
    out,
    part,
    factor,
    n,
    row_stride,
    col_stride,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WRITE: tl.constexpr,
):
    """out (n, D) = acc (n, PADDED) * factor[0] * factor[1]; part[program] = sum of x * acc * factor[0] over
    its rows.

    factor[1] is the scale of the logits: dL/dx = scale G y, while dL/dscale = <x, G y>.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = x + rows.to(tl.int64)[:, None] * row_stride
    power = tl.load(factor)
    scale = tl.load(factor + 1)
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(0, D, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        inside = (rows < n)[:, None] & (at < D)[None, :]
        grad = tl.load(acc + rows.to(tl.int64)[:, None] * PADDED + at[None, :], mask=inside, other=0.0)
        grad = grad * power
        values = tl.load(start + at.to(tl.int64)[None, :] * col_stride, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(grad * values, 1)
        if WRITE:
            result = (grad * scale).to(out.dtype.element_ty)
            tl.store(out + rows.to(tl.int64)[:, None] * D + at[None, :], result, mask=inside)
    tl.store(part + tl.program_id(0), tl.sum(total, 0))
