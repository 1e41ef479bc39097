"""Launches the Triton kernels: the same four functions as chunked.py, for CUDA (and Triton's interpreter).

    forward   norms -> operands -> tiles of sums, block by block -> log-sum-exp -> exact strips for lost rows
    backward  operands -> per block: coefficients into one reused workspace, then dX += G Y and dY += G^T X by
              cuBLAS with float32 accumulators -> finished gradients

8 N^2 D operations in all. Workspace: outer^2 * 2 bytes, independent of N; nothing is read back to the host,
so the calls can be captured in a CUDA graph. precision "high" splits every operand in two float16 numbers, at
3 times the operations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from clipkit.kernels import chunked, configs, triton_tiles
from clipkit.kernels.chunked import LOG2E, Pairs, gradient_size, largest_finite, shift_room

ROWS = 32
# Coefficients are at most 2 in probability units: 2^14 keeps them, and their tails, within float16.
COEF_POWER = 2.0**14
EXACT_PROGRAMS = 128
# The share of a sum that may be flushed to 0, as a power of two: of the log-sum-exp, and of the coefficients
# that float16 rounds (to 2^-12 each) or, with "high", two float16 numbers.
_SUM_SHARE, _COEF_SHARE, _HIGH_COEF_SHARE = -22, -14, -20


def flush_floor(terms: int, share: int) -> float:
    """Bits of a sum (less the shift) of `terms` exponentials from which on flushing takes at most 2^share of it.

    The chip's exp2 gives 0 under 2^-126, so a sum of 2^b lacks at most terms 2^-126, a share of
    2^(log2 terms - 126 - b): the floor is log2 terms - 126 - share. Coefficients are 2^bits times a factor of at
    most COEF_POWER 2^-b = 2^(14 - b) for the row and as much for the column: float32 holds their sum down to
    b = -112. At scale 100 and 2^15 to 2^17 pairs (shifts of 60 and 62) a floor of -97 and -95 is a
    log-mean-exp of cosines of -0.36 and -0.35.
    """
    return max(-112.0, math.log2(terms) - 126 - share)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


class _Weights(NamedTuple):
    """What coef_kernel reads per row, or per column: (N,) float32 each, and the least bits of a few rows each. The
    sigmoid reads `factor` of rows alone."""

    bits: Tensor
    weight: Tensor
    factor: Tensor
    lowest: Tensor


class _Side:
    """One matrix of features: its norm bound and its float16 operand, padded to whole steps of D."""

    def __init__(self, features: Tensor, padded: int, *, high: bool, second: bool):
        self.features, self.padded, self.high, self.second = features, padded, high, second
        self.n, self.dim = features.shape
        device = features.device
        self.block_k = min(128, max(16, 1 << (self.dim - 1).bit_length()))
        self.grid = (_cdiv(self.n, ROWS),)
        largest = torch.empty(self.grid, dtype=torch.float32, device=device)
        triton_tiles.norm_kernel[self.grid](
            features, largest, self.n, *features.stride(), D=self.dim, ROWS=ROWS, BLOCK_K=self.block_k
        )
        self.largest = largest
        self.operand = torch.empty(self.n, padded * (3 if high else 1), dtype=torch.float16, device=device)

    def cast(self, power: Tensor) -> None:
        """Fill the operand with the features times `power`."""
        self.power = power
        triton_tiles.cast_kernel[self.grid](
            self.features,
            self.operand,
            power,
            self.n,
            *self.features.stride(),
            D=self.dim,
            PADDED=self.padded,
            ROWS=ROWS,
            BLOCK_K=self.block_k,
            HIGH=self.high,
            SECOND=self.second,
        )

    def high_part(self, rows: slice) -> Tensor:
        first = 2 * self.padded if self.high else 0
        return self.operand[rows, first : first + self.padded]

    def low_part(self, rows: slice) -> Tensor:
        first = self.padded if self.second else 0
        return self.operand[rows, first : first + self.padded]

    def finish(self, acc: Tensor, factor: Tensor, scale: Tensor, write: bool) -> tuple[Tensor | None, Tensor]:
        """(acc * factor * scale in the features' dtype, <features, acc * factor>)."""
        out = torch.empty(self.features.shape, dtype=self.features.dtype, device=acc.device) if write else acc
        part = torch.empty(self.grid, dtype=torch.float32, device=acc.device)
        triton_tiles.finish_kernel[self.grid](
            acc,
            self.features,
            out,
            part,
            torch.stack([factor, scale]),
            self.n,
            *self.features.stride(),
            D=self.dim,
            PADDED=self.padded,
            ROWS=ROWS,
            BLOCK_K=self.block_k,
            WRITE=write,
        )
        return (out if write else None), part.sum(dtype=torch.float64)


class _Problem:
    """Both sides, the scalars the kernels read, and the launches over blocks."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        col_log_weight: Tensor | None,
        pairs: Pairs,
        kind: str,
        high: bool,
        bias: Tensor | None = None,
    ):
        self.config = configs.find(kind, _capability(x.device), _cdiv(x.shape[1], 64) * 64)
        padded = _cdiv(x.shape[1], max(64, self.config.block_k)) * max(64, self.config.block_k)
        self.high, self.pairs, self.softplus, self.device = high, pairs, bias is not None, x.device
        self.x = _Side(x, padded, high=high, second=False)
        self.y = _Side(y, padded, high=high, second=True)
        self.n, self.m, self.scale = x.shape[0], y.shape[0], scale.float()
        self.col_bits = None if col_log_weight is None else (col_log_weight.float() * LOG2E).contiguous()
        self.ids = None
        if pairs.row_ids is not None:
            self.ids = _small_ids(pairs.row_ids, pairs.col_ids)
        added = self.scale
        if bias is not None:
            added = bias.float()
        elif self.col_bits is not None:
            added = largest_finite(self.col_bits)
        # One number each 16 bytes, as the kernels' pointers are compiled for.
        self.scalars = torch.empty(16, dtype=torch.float32, device=self.device)
        triton_tiles.scalars_kernel[(1,)](
            self.x.largest,
            self.y.largest,
            self.scale,
            added,
            self.scalars,
            len(self.x.largest),
            len(self.y.largest),
            shift_room(self.n, self.m),
            SOFTPLUS=self.softplus,
            HAS_WEIGHT=self.col_bits is not None,
            BLOCK=1024,
        )
        self.x.cast(self.scalars[4])
        self.y.cast(self.scalars[8])
        self.shift = self.scalars[12]

    def source(self, tensor: Tensor, rows: int, cols: int) -> Tensor | TensorDescriptor:
        """What a kernel takes to read or write (rows, cols) tiles of `tensor`."""
        return TensorDescriptor.from_tensor(tensor, [rows, cols]) if self.config.descriptors else tensor

    def sources(self, block_n: int, *, swapped: bool = False) -> list[Tensor | TensorDescriptor]:
        c = self.config
        first, second = (self.y, self.x) if swapped else (self.x, self.y)
        return [
            self.source(first.operand, c.block_m, c.block_k),
            self.source(second.operand, block_n, c.block_k),
        ]

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """col_add, row_ids, col_ids; any tensor where the flags below say it is not read."""
        row_ids, col_ids = self.ids or (self.scalars, self.scalars)
        return (self.scalars if self.col_bits is None else self.col_bits), row_ids, col_ids

    def constants(self) -> dict:
        c = self.config
        return {
            "D": self.x.operand.shape[1],
            "BLOCK_M": c.block_m,
            "BLOCK_N": c.block_n,
            "BLOCK_K": c.block_k,
            "HAS_WEIGHT": self.col_bits is not None,
            "HAS_IDS": self.ids is not None,
            "EXCLUDE": self.pairs.exclude_positives,
            "DESCRIPTORS": c.descriptors,
            "num_warps": c.num_warps,
            "num_stages": c.num_stages,
        }

    def blocks(self):
        """(row slice, column slice, tiles down, tiles across) of the outer blocks."""
        c = self.config
        for r in range(0, self.n, c.outer):
            rows = slice(r, min(r + c.outer, self.n))
            for k in range(0, self.m, c.outer):
                cols = slice(k, min(k + c.outer, self.m))
                yield rows, cols, _cdiv(rows.stop - r, c.block_m), _cdiv(cols.stop - k, c.block_n)

    def largest_block(self) -> tuple[int, int]:
        """Tiles down and across of the largest outer block."""
        c = self.config
        return _cdiv(min(c.outer, self.n), c.block_m), _cdiv(min(c.outer, self.m), c.block_n)

    def sums(self) -> tuple[Tensor, Tensor]:
        """Row and column sums of the tiles' values; block sums are added in a fixed order."""
        c = self.config
        down, across = self.largest_block()
        row_part = torch.empty(across * down * c.block_m, dtype=torch.float32, device=self.device)
        col_part = torch.empty(
            0 if self.softplus else down * across * c.block_n, dtype=torch.float32, device=self.device
        )
        row_sum = torch.zeros(self.n, dtype=torch.float32, device=self.device)
        col_sum = torch.zeros(0 if self.softplus else self.m, dtype=torch.float32, device=self.device)
        x, y = self.sources(c.block_n)
        for rows, cols, tiles_m, tiles_n in self.blocks():
            triton_tiles.sums_kernel[(tiles_m * tiles_n,)](
                x,
                y,
                self.scalars,
                *self.pointers(),
                row_part,
                col_part,
                rows.start,
                cols.start,
                self.n,
                self.m,
                self.pairs.row_offset,
                tiles_m,
                tiles_n,
                GROUP=c.group,
                SOFTPLUS=self.softplus,
                **self.constants(),
            )
            _add_partial(row_sum, row_part, rows, tiles_n, tiles_m * c.block_m)
            if not self.softplus:
                _add_partial(col_sum, col_part, cols, tiles_m, tiles_n * c.block_n)
        return row_sum, col_sum

    def lse(self, sums: Tensor, *, columns: bool) -> Tensor:
        """Log-sum-exp in nats; those whose sum was lost to the fixed shift are computed anew."""
        lse = torch.empty_like(sums)
        constants, c, pairs = self.constants(), self.config, self.pairs
        col_add, row_ids, col_ids = self.pointers()
        n, m, weighted = self.n, self.m, constants.pop("HAS_WEIGHT")
        # Half the columns at a time: this kernel holds more per element, and it is the rare case.
        constants["BLOCK_N"] = max(16, c.block_n // 2)
        if columns:
            # The transposed problem: what was a weight of columns is now one of rows.
            n, m, pairs, row_ids, col_ids = self.m, self.n, pairs.transposed(), col_ids, row_ids
        triton_tiles.strip_kernel[(_cdiv(n, c.block_m),)](
            *self.sources(constants["BLOCK_N"], swapped=columns),
            self.scalars,
            col_add,
            col_add,
            row_ids,
            col_ids,
            sums,
            lse,
            2.0 ** flush_floor(m, _SUM_SHARE),
            n,
            m,
            pairs.row_offset,
            HAS_ROW_WEIGHT=weighted and columns,
            HAS_WEIGHT=weighted and not columns,
            **constants,
        )
        return lse

    def gradients(
        self, by_row: _Weights, by_col: _Weights, *, need_x: bool, need_y: bool, col_sums: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(G Y, G^T X, column sums of G, or their sum for the sigmoid), in the operands' and coefficients' powers of two."""
        c = self.config
        down, across = self.largest_block()
        work = [
            torch.empty(down * c.block_m, across * c.block_n, dtype=torch.float16, device=self.device)
            for _ in range(2 if self.high else 1)
        ]
        targets = [self.source(g, c.block_m, c.block_n) for g in work]
        cells = down * across * (1 if self.softplus else c.block_n) if col_sums else 0
        col_part = torch.empty(cells, dtype=torch.float32, device=self.device)
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float32, device=self.device)
        x_acc = zeros(self.n, self.x.padded) if need_x else None
        y_acc = zeros(self.m, self.y.padded) if need_y else None
        # Of the sigmoid loss the sum of all columns, which is what a bias needs.
        total = () if self.softplus else (self.m,)
        col_total = torch.zeros(total, dtype=torch.float64, device=self.device) if col_sums else None
        x, y = self.sources(c.block_n)
        narrow = min(32, c.block_n)
        exact = self.constants() | {"BLOCK_N": narrow, "num_stages": 2}
        del exact["DESCRIPTORS"]
        floor = flush_floor(max(self.n, self.m), _HIGH_COEF_SHARE if self.high else _COEF_SHARE)
        lost = None
        if not self.softplus:
            lost = (torch.cat([by_row.lowest, by_col.lowest]) < floor).any().int()
        for rows, cols, tiles_m, tiles_n in self.blocks():
            place = (rows.start, cols.start, self.n, self.m, self.pairs.row_offset, tiles_m)
            triton_tiles.coef_kernel[(tiles_m * tiles_n,)](
                x,
                y,
                targets[0],
                targets[-1],
                self.scalars,
                *self.pointers(),
                by_row.factor,
                by_col.factor,
                col_part,
                *place,
                tiles_n,
                work[0].stride(0),
                GROUP=c.group,
                SOFTPLUS=self.softplus,
                COL_SUMS=col_sums,
                HIGH=self.high,
                **self.constants(),
            )
            if not self.softplus:
                triton_tiles.exact_coef_kernel[(EXACT_PROGRAMS,)](
                    self.x.operand,
                    self.y.operand,
                    work[0],
                    work[-1],
                    lost,
                    floor,
                    self.scalars,
                    *self.pointers(),
                    by_row.bits,
                    by_col.bits,
                    by_row.weight,
                    by_col.weight,
                    col_part,
                    *place,
                    tiles_n * (c.block_n // narrow),
                    work[0].stride(0),
                    COL_SUMS=col_sums,
                    HIGH=self.high,
                    **exact,
                )
            block = [g[: rows.stop - rows.start, : cols.stop - cols.start] for g in work]
            if need_x:
                self._multiply(x_acc[rows], block, self.y, cols)
            if need_y:
                self._multiply(y_acc[cols], [g.T for g in block], self.x, rows)
            if col_total is not None and self.softplus:
                col_total += col_part[: tiles_m * tiles_n].sum(dtype=torch.float64)
            elif col_total is not None:
                _add_partial(col_total, col_part, cols, tiles_m, tiles_n * c.block_n)
        return x_acc, y_acc, col_total

    def _multiply(self, acc: Tensor, block: list[Tensor], side: _Side, which: slice) -> None:
        _accumulate(acc, block[0], side.high_part(which))
        if self.high:
            _accumulate(acc, block[0], side.low_part(which))
            _accumulate(acc, block[1], side.high_part(which))


def _small_ids(row_ids: Tensor, col_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The ids' ranks, int32: equal where the ids are, and half the registers of a tile. No wait for the
    device, as torch.unique would need."""
    ids = torch.cat([row_ids, col_ids]).to(torch.int64)
    ordered, order = ids.sort()
    ranks = torch.zeros(ids.shape, dtype=torch.int32, device=ids.device)
    ranks[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    small = torch.empty_like(ranks).scatter_(0, order, ranks)
    # The copy starts on an aligned address, which the kernels are compiled for.
    return small[: row_ids.shape[0]], small[row_ids.shape[0] :].clone()


def _accumulate(acc: Tensor, a: Tensor, b: Tensor) -> None:
    """acc += a @ b, float16 operands and a float32 result."""
    if acc.is_cuda:
        torch.addmm(acc, a, b, out_dtype=torch.float32, out=acc)
    else:
        acc.addmm_(a.float(), b.float())


def _add_partial(total: Tensor, part: Tensor, which: slice, tiles: int, width: int) -> None:
    total[which] += part[: tiles * width].view(tiles, width)[:, : which.stop - which.start].sum(0)


def lse_forward(
    x: Tensor, y: Tensor, scale: Tensor, col_log_weight: Tensor | None, pairs: Pairs, *, high: bool
) -> tuple[Tensor, Tensor]:
    """(row_lse (N,), col_lse (M,)) in nats, as `chunked.lse_forward`."""
    if 0 in (x.shape[0], y.shape[0], x.shape[1]):
        return _no_tiles(x, y, scale, col_log_weight, pairs)[:2]
    problem = _Problem(x, y, scale, col_log_weight, pairs, "lse_sums", high)
    row_sum, col_sum = problem.sums()
    return problem.lse(row_sum, columns=False), problem.lse(col_sum, columns=True)


def _no_tiles(x: Tensor, y: Tensor, scale: Tensor, col_log_weight: Tensor | None, pairs: Pairs):
    """An empty side, or features of no dimension: nothing for a tile to do."""
    return chunked.lse_forward(x, y, scale, col_log_weight, pairs, chunked.DEFAULT_CHUNK)


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
    *,
    high: bool,
    need_x: bool,
    need_y: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(dx, dy, dscale, dcol_log_weight), as `chunked.lse_backward`; dx and dy in the features' dtype."""
    if 0 in (x.shape[0], y.shape[0], x.shape[1]):
        _, _, row_sum, col_sum = _no_tiles(x, y, scale, col_log_weight, pairs)
        return chunked.lse_backward(
            grad_row,
            grad_col,
            x,
            y,
            scale,
            col_log_weight,
            row_sum,
            col_sum,
            pairs,
            chunked.DEFAULT_CHUNK,
            need_x=need_x,
            need_y=need_y,
            need_weight=need_weight,
        )
    problem = _Problem(x, y, scale, col_log_weight, pairs, "lse_coef", high)
    size = gradient_size(grad_row, grad_col).float()
    by_row = _weights(row_lse, grad_row, problem.shift, size)
    by_col = _weights(col_lse, grad_col, problem.shift, size)
    return _gradients(problem, by_row, by_col, size, need_x, need_y, need_weight)


def _weights(lse: Tensor, grad: Tensor, shift: Tensor, size: Tensor) -> _Weights:
    """The vectors of one side; an empty sum has weight 0."""
    n = lse.shape[0]
    empty = lambda count: torch.empty(count, dtype=torch.float32, device=lse.device)
    found = _Weights(empty(n), empty(n), empty(n), empty(_cdiv(n, 256)))
    triton_tiles.weights_kernel[(_cdiv(n, 256),)](
        lse, grad.contiguous(), size, shift, *found, n, POWER=COEF_POWER, BLOCK=256
    )
    return found


def _gradients(
    problem: _Problem,
    by_row: _Weights,
    by_col: _Weights,
    size: Tensor,
    need_x: bool,
    need_y: bool,
    need_sums: bool,
):
    need_x_side = need_x or not need_y
    x_acc, y_acc, col_total = problem.gradients(
        by_row, by_col, need_x=need_x_side, need_y=need_y, col_sums=need_sums
    )
    factor = size / COEF_POWER
    d_x = d_y = d_scale = None
    if need_x_side:
        d_x, d_scale = problem.x.finish(x_acc, factor / problem.y.power, problem.scale, need_x)
    if need_y:
        d_y, of_y = problem.y.finish(y_acc, factor / problem.x.power, problem.scale, True)
        d_scale = of_y if d_scale is None else d_scale
    return d_x, d_y, d_scale, None if col_total is None else col_total * factor


def softplus_forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, *, high: bool
) -> Tensor:
    """Row sums of softplus (N,), as `chunked.softplus_forward`."""
    if 0 in (x.shape[0], y.shape[0], x.shape[1]):
        return chunked.softplus_forward(x, y, scale, bias, pairs, chunked.DEFAULT_CHUNK)
    return _Problem(x, y, scale, None, pairs, "softplus_sums", high, bias).sums()[0]


def softplus_backward(
    grad_row: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    *,
    high: bool,
    need_x: bool,
    need_y: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(dx, dy, dscale, dbias), as `chunked.softplus_backward`."""
    if 0 in (x.shape[0], y.shape[0], x.shape[1]):
        return chunked.softplus_backward(
            grad_row,
            x,
            y,
            scale,
            bias,
            pairs,
            chunked.DEFAULT_CHUNK,
            need_x=need_x,
            need_y=need_y,
            need_bias=need_bias,
        )
    problem = _Problem(x, y, scale, None, pairs, "softplus_coef", high, bias)
    size = gradient_size(grad_row).float()
    weight = (grad_row.float() / size * COEF_POWER).contiguous()
    by_row = _Weights(weight, weight, weight, weight)
    return _gradients(problem, by_row, by_row, size, need_x, need_y, need_bias)
