"""Rows that carry the same content, by their ids or by how near their texts are, without an N x N matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipkit.distributed import Ranks
from clipkit.kernels import pair_lse, pair_softplus
from clipkit.losses.checks import check_choice, check_number, integers

# Entries of one block of similarities.
_BLOCK = 1 << 22


def shared_sums(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """For every row, the sum over the rows that share its id, itself included, and their number.

    Args:
        values: (N, D).
        ids: (N,) integers.

    Returns:
        (N, D) sums, differentiable, and (N, 1) counts in the dtype of values.
    """
    classes = _class_numbers(ids)
    ones = torch.ones_like(values[:, :1])
    sums = torch.zeros_like(values).index_add(0, classes, values)
    counts = torch.zeros_like(ones).index_add(0, classes, ones)
    return sums[classes], counts[classes]


def _class_numbers(ids: Tensor) -> Tensor:
    """(N,) numbers 0, 1, ... of the distinct ids; `torch.unique` would make the host wait for their count."""
    ordered, order = ids.sort()
    first = torch.zeros_like(ordered[:1])
    numbers = torch.cat([first, (ordered[1:] != ordered[:-1]).to(ordered.dtype)]).cumsum(0)
    return torch.empty_like(numbers).scatter(0, order, numbers).long()


class SameIds:
    """Rows of one content share an id.

    Args:
        ids: (B,) int64, of own rows.
    """

    def __init__(self, ids: Tensor, ranks: Ranks):
        self.ids, self.all_ids = ids, ranks.gather(ids)

    def sums(self, everyone: Tensor, own: slice) -> tuple[Tensor, Tensor]:
        """(B, D) and (B, 1): over the rows of one content with each own row, itself included, the sum of
        everyone's (N, D) rows, and their number."""
        shared, counts = shared_sums(everyone, self.all_ids)
        return shared[own], counts[own]

    def lse(
        self, x: Tensor, y: Tensor, scale: Tensor, own: slice, impl: str, precision: str
    ) -> tuple[Tensor, Tensor]:
        """`clipkit.kernels.pair_lse` without the pairs of one content."""
        ids: dict[str, Any] = {"row_ids": self.ids, "col_ids": self.all_ids}
        return pair_lse(x, y, scale, row_offset=own.start, impl=impl, precision=precision, **ids)

    def softplus(
        self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, own: slice, impl: str, precision: str
    ) -> Tensor:
        """`clipkit.kernels.pair_softplus` without the pairs of one content."""
        ids: dict[str, Any] = {"row_ids": self.ids, "col_ids": self.all_ids}
        return pair_softplus(x, y, scale, bias, row_offset=own.start, impl=impl, precision=precision, **ids)


class NearContent:
    """Rows of one content are those whose contents are similar, or share an id.

    Not transitive: each pair is judged for itself, so that a chain of similar rows does not become one.
    Similarities are computed a block of rows at a time, here and again in the backward pass; no gradient
    flows through the judgement.

    Args:
        content: (B, E), unit norm, of own rows.
        threshold: cosine from which two rows are of one content.
        ids: (B,) int64, or None.
    """

    def __init__(self, content: Tensor, threshold: float, ids: Tensor | None, ranks: Ranks):
        content = ranks.wide(content)
        self.threshold, self.first = threshold, ranks.own(len(content)).start
        self.own, self.everyone = content.detach(), ranks.gather(content).detach()
        self.ids = None if ids is None else (ids, ranks.gather(ids))

    def block(self, rows: slice) -> Tensor:
        """(R, N) truth of "of one content" for these own rows, each with itself among them."""
        with torch.autocast(self.own.device.type, enabled=False):
            same = self.own[rows] @ self.everyone.T >= self.threshold
        if self.ids is not None:
            same = same | (self.ids[0][rows, None] == self.ids[1][None, :])
        number = torch.arange(len(same), device=same.device)
        return same | (
            (number + (self.first + rows.start))[:, None]
            == torch.arange(len(self.everyone), device=same.device)[None, :]
        )

    def blocks(self) -> list[slice]:
        """Own rows in parts whose blocks are of bounded size."""
        rows, step = len(self.own), max(1, _BLOCK // max(1, len(self.everyone)))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def sums(self, everyone: Tensor, own: slice) -> tuple[Tensor, Tensor]:
        """As `SameIds.sums`."""
        counts = [self.block(rows).sum(1, keepdim=True) for rows in self.blocks()]
        return _NearSums.apply(everyone, self), torch.cat(counts).to(everyone.dtype)

    def lse(
        self, x: Tensor, y: Tensor, scale: Tensor, own: slice, impl: str, precision: str
    ) -> tuple[Tensor, Tensor]:
        """As `SameIds.lse`."""
        if impl == "dense":
            logits = self._dense(x, y, scale)
            return torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)
        return _NearLse.apply(x, y, scale, self)

    def softplus(
        self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, own: slice, impl: str, precision: str
    ) -> Tensor:
        """As `SameIds.softplus`."""
        if impl == "dense":
            return -torch.nn.functional.logsigmoid(-(self._dense(x, y, scale) + bias)).sum(1)
        return _NearSoftplus.apply(x, y, scale, bias, self)

    def _dense(self, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            logits = scale * (x.to(scale.dtype) @ y.to(scale.dtype).T)
            return logits.masked_fill(self.block(slice(0, len(x))), -torch.inf)

    def logits(self, rows: slice, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        """(R, N) of these own rows, -inf for the pairs of one content; fp32."""
        logits = (x[rows].to(scale.dtype) * scale) @ y.to(scale.dtype).T
        return logits.masked_fill_(self.block(rows), -torch.inf)


def same_content(
    loss: Any, ids: Tensor | Sequence[int] | None, content: Tensor | None, texts: Tensor, ranks: Ranks
) -> tuple[SameIds | NearContent | None, SameIds | NearContent | None]:
    """(what a loss leaves out as false negatives, what it takes for further positives); one at most is not None.

    Rows of one content are told by similar `content` (or texts) and ids where the loss has `false_negatives`, else
    by ids.
    """
    own = None if ids is None else integers(ids, texts)
    if loss.false_negatives is not None:
        same = NearContent(texts if content is None else content, loss.false_negative_threshold, own, ranks)
    else:
        same = None if own is None else SameIds(own, ranks)
    return (same, None) if (loss.false_negatives or loss.same_ids) == "mask" else (None, same)


def check_same_content(
    same_ids: str, false_negatives: str | None, false_negative_threshold: float, impl: str
) -> tuple[str, str | None, float]:
    """The first three if rows of one content can be treated so by `impl`; ValueError otherwise."""
    check_choice("same_ids", same_ids, ("positive", "mask"))
    if false_negatives not in (None, "mask", "share"):
        raise ValueError(f'false_negatives is {false_negatives!r}: give "mask", "share" or None')
    if false_negatives is not None and impl == "triton":
        raise ValueError('false_negatives has no Triton kernel: use impl="auto", "chunked" or "dense"')
    threshold = check_number("false_negative_threshold", false_negative_threshold, 0.0, 1.0, open_low=True)
    return same_ids, false_negatives, threshold


def refuse_second_derivative() -> None:
    """RuntimeError in a backward pass whose own gradient is wanted, where what was saved has none."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "this loss has first derivatives only, and a gradient of a gradient was asked for (create_graph=True): "
            'use impl="dense" where it has one, and no false_negatives="share" or distill'
        )


def _finite(lse: Tensor) -> Tensor:
    """0 for an empty sum: its terms are 0 under any shift that is finite."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


class _Gradients:
    """G Y and G^T X, block by block; the gradient of the scale is <X, dX> / scale."""

    def __init__(self, x: Tensor, y: Tensor, scale: Tensor):
        self.x, self.y, self.scale = x.to(scale.dtype), y.to(scale.dtype), scale
        self.d_x, self.d_y = torch.zeros_like(self.x), torch.zeros_like(self.y)
        self.d_scale = torch.zeros_like(scale)

    def add(self, rows: slice, g: Tensor) -> None:
        """g: (R, N) gradient of these rows' logits."""
        d_x = g @ self.y
        self.d_scale += (self.x[rows] * d_x).sum()
        self.d_x[rows] = self.scale * d_x
        self.d_y += self.scale * (g.T @ self.x[rows])


class _NearLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, near):
        with torch.autocast(x.device.type, enabled=False):
            row_lse = torch.empty(len(x), dtype=scale.dtype, device=x.device)
            col_lse = torch.full((len(y),), -torch.inf, dtype=scale.dtype, device=x.device)
            for rows in near.blocks():
                logits = near.logits(rows, x, y, scale)
                row_lse[rows] = torch.logsumexp(logits, 1)
                col_lse = torch.logaddexp(col_lse, torch.logsumexp(logits, 0))
        ctx.near = near
        ctx.save_for_backward(x, y, scale, row_lse, col_lse)
        return row_lse, col_lse

    @staticmethod
    def backward(ctx, grad_row, grad_col):
        refuse_second_derivative()
        x, y, scale, row_lse, col_lse = ctx.saved_tensors
        row_lse, col_lse = _finite(row_lse), _finite(col_lse)
        with torch.autocast(x.device.type, enabled=False):
            grads = _Gradients(x, y, scale)
            for rows in ctx.near.blocks():
                logits = ctx.near.logits(rows, x, y, scale)
                by_row = (logits - row_lse[rows, None]).exp_().mul_(grad_row[rows, None])
                grads.add(rows, by_row.add_((logits - col_lse).exp_().mul_(grad_col)))
        return grads.d_x.to(x.dtype), grads.d_y.to(y.dtype), grads.d_scale, None


class _NearSoftplus(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale, bias, near):
        with torch.autocast(x.device.type, enabled=False):
            sums = [
                -torch.nn.functional.logsigmoid(-(near.logits(rows, x, y, scale) + bias)).sum(1)
                for rows in near.blocks()
            ]
        ctx.near = near
        ctx.save_for_backward(x, y, scale, bias)
        return torch.cat(sums)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        x, y, scale, bias = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grads, d_bias = _Gradients(x, y, scale), torch.zeros_like(bias)
            for rows in ctx.near.blocks():
                g = torch.sigmoid(ctx.near.logits(rows, x, y, scale) + bias).mul_(grad[rows, None])
                d_bias += g.sum()
                grads.add(rows, g)
        return grads.d_x.to(x.dtype), grads.d_y.to(y.dtype), grads.d_scale, d_bias, None


class _NearSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, near):
        ctx.near = near
        with torch.autocast(values.device.type, enabled=False):
            return torch.cat([near.block(rows).to(values.dtype) @ values for rows in near.blocks()])

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        near = ctx.near
        total = torch.zeros(len(near.everyone), grad.shape[1], dtype=grad.dtype, device=grad.device)
        with torch.autocast(grad.device.type, enabled=False):
            for rows in near.blocks():
                total += near.block(rows).to(grad.dtype).T @ grad[rows]
        return total, None
