"""The same sums and gradients block by block: memory O((N + M) D + chunk^2), any device, plain torch.

One pass gives the sums of the rows and of the columns. The usual running maximum would need an exponential
for each of the two; here every exponential is taken against one fixed shift near the top of the range,

    e_ij = 2^(l_ij - shift),    shift = max(0, largest possible l + log2 max(N, M) - top),

so that the sums of rows and of columns are plain sums of the same numbers, and nothing is shifted at all
while the scale is below about 60 (top = 100 in float32). A row or column that comes out too small to be exact
(all its logits about 130 nats under the largest possible one) is computed again with its own maximum. Logits
are in bits, l = log2(e) * logit, since exp2 is several times faster than exp on a CPU.

The backward pass recomputes each block, turns it into coefficients G in place and multiplies: dX += G Y and
dY += G^T X. The gradient of the scale is <X, dX> / scale (Euler's theorem), without a sum over the block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.kernels.reference import compute_dtype, excluded_pairs

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
DEFAULT_CHUNK = 1024
NEG_INF = float("-inf")


@dataclass(frozen=True)
class Pairs:
    """Which of the (N, M) pairs stay out of the sums, as the public functions describe it."""

    row_offset: int = 0
    row_ids: Tensor | None = None
    col_ids: Tensor | None = None
    exclude_positives: bool = True

    def fill_excluded(self, block: Tensor, rows: slice, cols: slice, value: float) -> None:
        """Set the excluded pairs of `block`, which holds these rows and columns, to `value`."""
        first = rows.start + self.row_offset
        if self.exclude_positives and first < cols.stop and rows.stop + self.row_offset > cols.start:
            block.diagonal(first - cols.start).fill_(value)
        if self.row_ids is not None and self.col_ids is not None:
            block.masked_fill_(self.row_ids[rows, None] == self.col_ids[None, cols], value)

    def transposed(self) -> Pairs:
        return Pairs(-self.row_offset, self.col_ids, self.row_ids, self.exclude_positives)


def _slices(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _bits(dtype: torch.dtype) -> tuple[int, int]:
    """(top, floor): sums lie under 2^top; one of n terms under n 2^floor may have lost some to underflow."""
    return (900, -960) if dtype == torch.float64 else (100, -100)


def _largest(values: Tensor) -> Tensor:
    """Largest finite value, 0 where there is none: one NaN row must not turn every row into NaN."""
    finite = torch.where(torch.isfinite(values), values, torch.zeros_like(values))
    return finite.amax() if values.numel() else values.new_zeros(())


def _row_norm_bound(x: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
    norms = [torch.linalg.vector_norm(x[rows].to(dtype), dim=1) for rows in _slices(x.shape[0], chunk)]
    return _largest(torch.cat(norms)) if norms else x.new_zeros((), dtype=dtype)


def fixed_shift(norms: Tensor, scale: Tensor, col_bits: Tensor | None, n: int, m: int) -> Tensor:
    """The fixed shift, in bits: no exponential passes 2^top / max(N, M), and no larger than that takes.

    norms: () the product of the largest row norms of both sides.
    """
    bound = scale.abs() * LOG2E * norms
    if col_bits is not None and col_bits.numel():
        present = torch.where(col_bits == NEG_INF, torch.finfo(scale.dtype).min, col_bits)
        bound = bound + present.nan_to_num().amax()
    room = _bits(scale.dtype)[0] - math.log2(max(n, m, 1))
    return torch.where(bound > 0, (bound - room).clamp(min=0), bound)


def _shift(x: Tensor, y: Tensor, scale: Tensor, col_bits: Tensor | None, chunk: int) -> Tensor:
    norms = _row_norm_bound(x, scale.dtype, chunk) * _row_norm_bound(y, scale.dtype, chunk)
    return fixed_shift(norms, scale, col_bits, x.shape[0], y.shape[0])


class _Blocks:
    """Walks the blocks of logits in bits, reusing one buffer; `col_bits` (M,) is added to every row."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor, col_bits: Tensor, chunk: int):
        self.x, self.y, self.col_bits = x, y, col_bits
        self.dtype = compute_dtype(x)
        self.bits_scale = scale.to(self.dtype) * LOG2E
        self.rows, self.cols = _slices(x.shape[0], chunk), _slices(y.shape[0], chunk)
        self.chunk = chunk

    def buffer(self) -> Tensor:
        return torch.empty(
            min(self.chunk, self.x.shape[0]) * min(self.chunk, self.y.shape[0]),
            dtype=self.dtype,
            device=self.x.device,
        )

    def __iter__(self):
        """(row slice, column slice, x rows, y rows, logits block without exclusions)"""
        buffer = self.buffer()
        for rows in self.rows:
            x_rows = self.x[rows].to(self.dtype)
            scaled = x_rows * self.bits_scale
            for cols in self.cols:
                y_rows = self.y[cols].to(self.dtype)
                block = buffer[: scaled.shape[0] * y_rows.shape[0]].view(scaled.shape[0], y_rows.shape[0])
                torch.mm(scaled, y_rows.T, out=block)
                block.add_(self.col_bits[cols])
                yield rows, cols, x_rows, y_rows, block


def _too_small(sums: Tensor, terms: int) -> Tensor:
    return sums < terms * 2.0 ** _bits(sums.dtype)[1]


def _exact_rows(
    index: Tensor, x: Tensor, y: Tensor, scale: Tensor, col_bits: Tensor | None, pairs: Pairs, chunk: int
):
    """Row log-sum-exp in bits of the rows `index` alone, with a running maximum."""
    dtype = compute_dtype(x)
    result = torch.full((index.numel(),), NEG_INF, dtype=dtype, device=x.device)
    for part in _slices(index.numel(), chunk):
        rows = index[part]
        scaled = x[rows].to(dtype) * (scale.to(dtype) * LOG2E)
        for cols in _slices(y.shape[0], chunk):
            block = scaled @ y[cols].to(dtype).T
            if col_bits is not None:
                block = block + col_bits[cols]
            mask = excluded_pairs(
                rows,
                torch.arange(cols.start, cols.stop, device=x.device),
                row_offset=pairs.row_offset,
                row_ids=None if pairs.row_ids is None else pairs.row_ids[rows],
                col_ids=None if pairs.col_ids is None else pairs.col_ids[cols],
                exclude_positives=pairs.exclude_positives,
            )
            if mask is not None:
                block.masked_fill_(mask, NEG_INF)
            result[part] = torch.logaddexp2(result[part], torch.logsumexp(block * LN2, 1) * LOG2E)
    return result


def lse_forward(
    x: Tensor, y: Tensor, scale: Tensor, col_log_weight: Tensor | None, pairs: Pairs, chunk: int
) -> tuple[Tensor, Tensor]:
    """(row_lse (N,), col_lse (M,)) in nats."""
    dtype, n, m = compute_dtype(x), x.shape[0], y.shape[0]
    scale = scale.to(dtype)
    col_bits = None if col_log_weight is None else col_log_weight.to(dtype) * LOG2E
    shift = _shift(x, y, scale, col_bits, chunk)
    shifted = -shift if col_bits is None else col_bits - shift
    row_sum = torch.zeros(n, dtype=dtype, device=x.device)
    col_sum = torch.zeros(m, dtype=dtype, device=x.device)
    for rows, cols, _, _, block in _Blocks(x, y, scale, shifted.expand(m), chunk):
        block.exp2_()
        pairs.fill_excluded(block, rows, cols, 0.0)
        row_sum[rows] += block.sum(1)
        col_sum[cols] += block.sum(0)
    row_lse = (shift.double() + row_sum.double().log2()).to(dtype)
    col_lse = (shift.double() + col_sum.double().log2()).to(dtype)
    lost_rows, lost_cols = _too_small(row_sum, m).nonzero()[:, 0], _too_small(col_sum, n).nonzero()[:, 0]
    if lost_rows.numel():
        row_lse[lost_rows] = _exact_rows(lost_rows, x, y, scale, col_bits, pairs, chunk)
    if lost_cols.numel():
        exact = _exact_rows(lost_cols, y, x, scale, None, pairs.transposed(), chunk)
        col_lse[lost_cols] = exact if col_bits is None else exact + col_bits[lost_cols]
    return row_lse.mul_(LN2), col_lse.mul_(LN2)


def gradient_size(*grads: Tensor) -> Tensor:
    """() largest magnitude, or 1 if all are 0. Coefficients are formed from gradients divided by it: 1 / N,
    taken early, would push the tails under the bottom of float32 or float16."""
    largest = torch.stack([_largest(grad.abs()) for grad in grads]).amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _weights(grad: Tensor, lse_bits: Tensor, shift: Tensor) -> Tensor:
    """grad / 2^(lse - shift), and 0 for an empty sum."""
    return torch.where(lse_bits == NEG_INF, torch.zeros_like(grad), grad * torch.exp2(shift - lse_bits))


class _Gradients:
    """Accumulates G Y and G^T X in the compute dtype, for the sides that need it."""

    def __init__(self, blocks: _Blocks, need_x: bool, need_y: bool, need_cols: bool):
        zeros = lambda like: torch.zeros(like.shape, dtype=blocks.dtype, device=like.device)
        self.x = zeros(blocks.x) if need_x else None
        self.y = zeros(blocks.y) if need_y else None
        self.cols = zeros(blocks.y[:, 0]) if need_cols else None

    def add(self, rows: slice, cols: slice, x_rows: Tensor, y_rows: Tensor, g: Tensor) -> None:
        if self.x is not None:
            self.x[rows].addmm_(g, y_rows)
        if self.y is not None:
            self.y[cols].addmm_(g.T, x_rows)
        if self.cols is not None:
            self.cols[cols] += g.sum(0)

    def finish(
        self, blocks: _Blocks, scale: Tensor, factor: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(dx, dy, dscale): multiplies by the scale and by `factor`, which `add`'s coefficients left out."""
        features, grad = (blocks.x, self.x) if self.x is not None else (blocks.y, self.y)
        assert grad is not None, "a backward runs for one side at least"
        d_scale = scale.new_zeros((), dtype=torch.float64)
        for part in _slices(features.shape[0], blocks.chunk):
            d_scale += (features[part].to(blocks.dtype) * grad[part]).sum(dtype=torch.float64)
        for total in (self.x, self.y):
            if total is not None:
                total.mul_(scale * factor)
        return self.x, self.y, d_scale * factor


def lse_backward(
    grad_row: Tensor,
    grad_col: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    col_log_weight: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    pairs: Pairs,
    chunk: int,
    *,
    need_x: bool,
    need_y: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of sum(grad_row * row_lse) + sum(grad_col * col_lse): (dx, dy, dscale, dcol_log_weight).

    dx, dy in the compute dtype. At least one of need_x and need_y is computed, for dscale comes from it.
    """
    dtype, m = compute_dtype(x), y.shape[0]
    scale = scale.to(dtype)
    col_bits = None if col_log_weight is None else col_log_weight.to(dtype) * LOG2E
    row_bits, col_sum_bits = row_lse.double() * LOG2E, col_lse.double() * LOG2E
    shift = _shift(x, y, scale, col_bits, chunk)
    factor = gradient_size(grad_row, grad_col).to(dtype)
    grad_row, grad_col = grad_row.to(dtype) / factor, grad_col.to(dtype) / factor
    floor = shift + _bits(dtype)[1] + math.log2(max(x.shape[0], m, 1))
    lost = ((row_bits < floor) & (row_bits != NEG_INF)).any() | (
        (col_sum_bits < floor) & (col_sum_bits != NEG_INF)
    ).any()
    one_shift = not bool(lost)
    if one_shift:
        by_row = _weights(grad_row.double(), row_bits, shift).to(dtype)[:, None]
        by_col = _weights(grad_col.double(), col_sum_bits, shift).to(dtype)[None, :]
        added = -shift if col_bits is None else col_bits - shift
    else:
        added = torch.zeros_like(shift) if col_bits is None else col_bits
    blocks = _Blocks(x, y, scale, added.expand(m), chunk)
    grads = _Gradients(blocks, need_x or not need_y, need_y, need_weight)
    second = blocks.buffer()
    for rows, cols, x_rows, y_rows, block in blocks:
        other = second[: block.numel()].view_as(block)
        if one_shift:
            torch.add(by_row[rows], by_col[:, cols], out=other)
            block.exp2_().mul_(other)
        else:
            _two_exponentials(
                block, other, row_bits[rows], col_sum_bits[cols], grad_row[rows], grad_col[cols]
            )
        pairs.fill_excluded(block, rows, cols, 0.0)
        grads.add(rows, cols, x_rows, y_rows, block)
    d_x, d_y, d_scale = grads.finish(blocks, scale, factor)
    return d_x, d_y, d_scale, None if grads.cols is None else grads.cols * factor


def _two_exponentials(block: Tensor, other: Tensor, row_bits, col_bits, grad_row, grad_col) -> None:
    """block <- grad_row 2^(block - row_bits) + grad_col 2^(block - col_bits), empty sums left out."""
    finite = lambda bits: torch.where(bits == NEG_INF, torch.zeros_like(bits), bits).to(block.dtype)
    torch.sub(block, finite(col_bits)[None, :], out=other)
    # An excluded pair may lie far above the rest of its row: capped, since inf * 0 would outlive the
    # exclusion.
    other.clamp_(max=64.0).exp2_().mul_(grad_col[None, :])
    block.sub_(finite(row_bits)[:, None]).clamp_(max=64.0).exp2_().mul_(grad_row[:, None]).add_(other)


def softplus_forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, chunk: int) -> Tensor:
    """Row sums of softplus, (N,)."""
    dtype, m = compute_dtype(x), y.shape[0]
    row_sum = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
    blocks = _Blocks(x, y, scale, (bias.to(dtype) * LOG2E).expand(m), chunk)
    second = blocks.buffer()
    for rows, cols, _, _, block in blocks:
        # softplus(z) = max(z, 0) + log1p(exp(-|z|)), exact at every z
        other = torch.abs(block, out=second[: block.numel()].view_as(block)).neg_().exp2_().log1p_()
        other.add_(block.clamp_(min=0), alpha=LN2)
        pairs.fill_excluded(other, rows, cols, 0.0)
        row_sum[rows] += other.sum(1)
    return row_sum


def softplus_backward(
    grad_row: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    chunk: int,
    *,
    need_x: bool,
    need_y: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of sum(grad_row * row_sum): (dx, dy, dscale, dbias); see `lse_backward`."""
    dtype, m = compute_dtype(x), y.shape[0]
    scale = scale.to(dtype)
    factor = gradient_size(grad_row).to(dtype)
    by_row = (grad_row.to(dtype) / factor)[:, None]
    blocks = _Blocks(x, y, scale, (bias.to(dtype) * LOG2E).expand(m), chunk)
    grads = _Gradients(blocks, need_x or not need_y, need_y, need_bias)
    for rows, cols, x_rows, y_rows, block in blocks:
        block.mul_(LN2).sigmoid_().mul_(by_row[rows])
        pairs.fill_excluded(block, rows, cols, 0.0)
        grads.add(rows, cols, x_rows, y_rows, block)
    d_x, d_y, d_scale = grads.finish(blocks, scale, factor)
    return d_x, d_y, d_scale, None if grads.cols is None else (grads.cols * factor).sum(dtype=torch.float64)
