"""The same sums and gradients block by block: memory O((N + M) D + chunk^2), any device, plain torch.

One pass gives the sums of the rows and of the columns. The usual running maximum would need an exponential
for each of the two; here every exponential is taken against one fixed shift near the top of the range,

    e_ij = 2^(l_ij - shift),    shift = max(0, largest possible l + log2 max(N, M) - top),

so that the sums of rows and of columns are plain sums of the same numbers, and nothing is shifted at all
while the scale is below about 60 (top = 100 in float32). A row or column that comes out too small to be exact
(all its logits about 130 nats under the largest possible one) is summed again against its own maximum. Logits
are in bits, l = log2(e) * logit, since exp2 is several times faster than exp on a CPU.

The backward pass recomputes each block, turns it into coefficients G in place and multiplies: dX += G Y and
dY += G^T X. The gradient of the scale is <X, dX> / scale (Euler's theorem), without a sum over the block.

Everything is in the features' own precision: MPS has no float64, and a logit of 1e4 leaves a float32
logarithm three digits after the point. So a sum is handed to the backward pass not as its logarithm but as
(exponent, factor), sum = factor * 2^exponent. The exponent is an integer near the largest logits, which makes
l - exponent exact where it matters; probabilities are as exact at scale 1e4 as at 10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.kernels.reference import compute_dtype

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# LN2 in two parts; the first has nine bits, so that its product with an exponent is exact.
_LN2_HIGH = 355 / 512
_LN2_LOW = -2.12194440054690583e-4
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
    """The fixed shift, in whole bits: no exponential passes 2^top / max(N, M), and no larger than that takes.

    norms: () the product of the largest row norms of both sides.
    """
    bound = scale.abs() * LOG2E * norms
    if col_bits is not None and col_bits.numel():
        bound = bound + largest_finite(col_bits)
    room = shift_room(n, m, scale.dtype)
    return torch.where(bound > 0, (bound - room).clamp(min=0).ceil(), bound.ceil())


def largest_finite(col_bits: Tensor) -> Tensor:
    """() the largest weight of a column that is there."""
    return torch.where(col_bits == NEG_INF, torch.finfo(col_bits.dtype).min, col_bits).nan_to_num().amax()


def shift_room(n: int, m: int, dtype: torch.dtype = torch.float32) -> float:
    """Bits that one exponential may take, so that a sum of all stays under the top."""
    return _bits(dtype)[0] - math.log2(max(n, m, 1))


def _shift(x: Tensor, y: Tensor, scale: Tensor, col_bits: Tensor | None, chunk: int) -> Tensor:
    norms = _row_norm_bound(x, scale.dtype, chunk) * _row_norm_bound(y, scale.dtype, chunk)
    return fixed_shift(norms, scale, col_bits, x.shape[0], y.shape[0])


class _Blocks:
    """Walks the blocks of logits in bits, reusing one buffer: l + col_bits (M,) of every row - shift ()."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        chunk: int,
        *,
        col_bits: Tensor | None = None,
        shift: Tensor | None = None,
    ):
        self.x, self.y, self.col_bits, self.shift = x, y, col_bits, shift
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
                if self.col_bits is not None:
                    block.add_(self.col_bits[cols])
                if self.shift is not None:
                    block.sub_(self.shift)
                yield rows, cols, x_rows, y_rows, block


def _too_small(sums: Tensor, terms: int) -> Tensor:
    return sums < terms * 2.0 ** _bits(sums.dtype)[1]


class _RunningSums:
    """Sums of 2^l against the largest l so far, for the rows or the columns of the blocks that come by."""

    def __init__(self, like: Tensor):
        self.top, self.sum = torch.full_like(like, NEG_INF), torch.zeros_like(like)

    def add(self, block: Tensor, where: slice, dim: int, buffer: Tensor) -> None:
        top = torch.maximum(self.top[where], block.amax(dim))
        # An empty sum has top = -inf; subtracting it would make NaN of the honest 0.
        level = torch.where(top == NEG_INF, torch.zeros_like(top), top)
        part = torch.sub(block, level.unsqueeze(dim), out=buffer).exp2_().sum(dim)
        self.sum[where] = self.sum[where] * torch.exp2(self.top[where] - level) + part
        self.top[where] = top

    def split(self) -> tuple[Tensor, Tensor]:
        """(exponent, factor), an integer exponent and sum = factor * 2^exponent."""
        exponent = torch.where(self.top == NEG_INF, torch.zeros_like(self.top), self.top.ceil())
        return exponent, self.sum * torch.exp2(self.top - exponent)


def _mend(blocks: _Blocks, pairs: Pairs, row_sum: Tensor, col_sum: Tensor) -> None:
    """Replace the (exponent, factor) of the rows and columns that the fixed shift lost, in one more pass."""
    lost = _too_small(row_sum[1], len(blocks.y)), _too_small(col_sum[1], len(blocks.x))
    if not bool(lost[0].any() | lost[1].any()):
        return
    by_row, by_col = _RunningSums(row_sum[1]), _RunningSums(col_sum[1])
    second = blocks.buffer()
    for rows, cols, _, _, block in blocks:
        pairs.fill_excluded(block, rows, cols, NEG_INF)
        buffer = second[: block.numel()].view_as(block)
        by_row.add(block, rows, 1, buffer)
        by_col.add(block, cols, 0, buffer)
    for sums, running, which in ((row_sum, by_row, lost[0]), (col_sum, by_col, lost[1])):
        exponent, factor = running.split()
        # An empty sum keeps the shift that all others have.
        which = which & (factor != 0)
        sums[0] = torch.where(which, exponent, sums[0])
        sums[1] = torch.where(which, factor, sums[1])


def _log(total: Tensor) -> Tensor:
    """Natural logarithm of (exponent, factor), -inf for an empty sum."""
    exponent, factor = total
    return (factor.log() + exponent * _LN2_LOW) + exponent * _LN2_HIGH


def lse_forward(
    x: Tensor, y: Tensor, scale: Tensor, col_log_weight: Tensor | None, pairs: Pairs, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row_lse (N,), col_lse (M,)) in nats, and the sums as `lse_backward` takes them: (2, N) and (2, M)."""
    dtype, n, m = compute_dtype(x), x.shape[0], y.shape[0]
    scale = scale.to(dtype)
    col_bits = None if col_log_weight is None else col_log_weight.to(dtype) * LOG2E
    shift = _shift(x, y, scale, col_bits, chunk)
    row_sum = torch.zeros(2, n, dtype=dtype, device=x.device)
    col_sum = torch.zeros(2, m, dtype=dtype, device=x.device)
    row_sum[0], col_sum[0] = shift, shift
    for rows, cols, _, _, block in _Blocks(x, y, scale, chunk, col_bits=col_bits, shift=shift):
        block.exp2_()
        pairs.fill_excluded(block, rows, cols, 0.0)
        row_sum[1, rows] += block.sum(1)
        col_sum[1, cols] += block.sum(0)
    _mend(_Blocks(x, y, scale, chunk, col_bits=col_bits), pairs, row_sum, col_sum)
    return _log(row_sum), _log(col_sum), row_sum, col_sum


def gradient_size(*grads: Tensor) -> Tensor:
    """() largest magnitude, or 1 if all are 0. Coefficients are formed from gradients divided by it: 1 / N,
    taken early, would push the tails under the bottom of float32 or float16."""
    largest = torch.stack([_largest(grad.abs()) for grad in grads]).amax()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _weights(grad: Tensor, factor: Tensor) -> Tensor:
    """grad / factor, and 0 for an empty sum."""
    return torch.where(factor == 0, torch.zeros_like(grad), grad / factor)


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
        d_scale = grad.new_zeros(len(features))
        for part in _slices(features.shape[0], blocks.chunk):
            d_scale[part] = (features[part].to(blocks.dtype) * grad[part]).sum(1)
        for total in (self.x, self.y):
            if total is not None:
                total.mul_(scale * factor)
        return self.x, self.y, d_scale.sum() * factor


def lse_backward(
    grad_row: Tensor,
    grad_col: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    col_log_weight: Tensor | None,
    row_sum: Tensor,
    col_sum: Tensor,
    pairs: Pairs,
    chunk: int,
    *,
    need_x: bool,
    need_y: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of sum(grad_row * row_lse) + sum(grad_col * col_lse): (dx, dy, dscale, dcol_log_weight).

    row_sum (2, N), col_sum (2, M): as `lse_forward` returned them.
    dx, dy in the compute dtype. At least one of need_x and need_y is computed, for dscale comes from it.
    """
    dtype = compute_dtype(x)
    scale = scale.to(dtype)
    col_bits = None if col_log_weight is None else col_log_weight.to(dtype) * LOG2E
    shift = _shift(x, y, scale, col_bits, chunk)
    factor = gradient_size(grad_row, grad_col).to(dtype)
    by_row = _weights(grad_row.to(dtype) / factor, row_sum[1])[:, None]
    by_col = _weights(grad_col.to(dtype) / factor, col_sum[1])[None, :]
    one_shift = not bool((row_sum[0] != shift).any() | (col_sum[0] != shift).any())
    blocks = _Blocks(x, y, scale, chunk, col_bits=col_bits, shift=shift if one_shift else None)
    grads = _Gradients(blocks, need_x or not need_y, need_y, need_weight)
    second = blocks.buffer()
    for rows, cols, x_rows, y_rows, block in blocks:
        other = second[: block.numel()].view_as(block)
        if one_shift:
            torch.add(by_row[rows], by_col[:, cols], out=other)
            block.exp2_().mul_(other)
        else:
            torch.sub(block, col_sum[0, cols], out=other)
            other.exp2_().mul_(by_col[:, cols])
            block.sub_(row_sum[0, rows, None]).exp2_().mul_(by_row[rows]).add_(other)
        # An excluded pair may lie far above the rest of its row: whatever came of it, inf or NaN, goes here.
        pairs.fill_excluded(block, rows, cols, 0.0)
        grads.add(rows, cols, x_rows, y_rows, block)
    d_x, d_y, d_scale = grads.finish(blocks, scale, factor)
    return d_x, d_y, d_scale, None if grads.cols is None else grads.cols * factor


def softplus_forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, chunk: int) -> Tensor:
    """Row sums of softplus, (N,)."""
    dtype, m = compute_dtype(x), y.shape[0]
    row_sum = torch.zeros(x.shape[0], dtype=dtype, device=x.device)
    blocks = _Blocks(x, y, scale, chunk, col_bits=(bias.to(dtype) * LOG2E).expand(m))
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
    blocks = _Blocks(x, y, scale, chunk, col_bits=(bias.to(dtype) * LOG2E).expand(m))
    grads = _Gradients(blocks, need_x or not need_y, need_y, need_bias)
    for rows, cols, x_rows, y_rows, block in blocks:
        block.mul_(LN2).sigmoid_().mul_(by_row[rows])
        pairs.fill_excluded(block, rows, cols, 0.0)
        grads.add(rows, cols, x_rows, y_rows, block)
    d_x, d_y, d_scale = grads.finish(blocks, scale, factor)
    return d_x, d_y, d_scale, None if grads.cols is None else (grads.cols * factor).sum()
