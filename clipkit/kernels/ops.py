"""torch.library operators around the implementations, with shapes for the compiler and gradients for
autograd.

`custom_op` rather than a traced function: the loops below choose their launches at run time, and
`torch.compile(fullgraph=True)` passes over an operator it does not look into. The gradient operators have no
gradient of their own: differentiating twice is refused (use `impl="dense"`).
`impl` here is "chunked", "triton" or "triton_high" (precision "high").
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipkit.kernels import chunked
from clipkit.kernels.chunked import Pairs
from clipkit.kernels.reference import compute_dtype


def _fused():
    from clipkit.kernels import fused

    return fused


def _empty(like: Tensor) -> Tensor:
    return like.new_empty((0,))


def _asked(gradient: Tensor | None, of: Tensor | None, x: Tensor, needed: bool) -> Tensor:
    """The gradient in the dtype of what it is of; empty, as x, where it was not asked for."""
    if not needed or gradient is None or of is None:
        return _empty(x)
    return gradient.to(of.dtype)


@torch.library.custom_op("clipkit::pair_lse", mutates_args=())
def pair_lse_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    col_log_weight: Tensor | None,
    row_offset: int,
    exclude_positives: bool,
    impl: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row_lse, col_lse, row_sum, col_sum); the sums are what chunked's backward pass takes, else empty."""
    pairs = Pairs(row_offset, row_ids, col_ids, exclude_positives)
    with torch.autocast(x.device.type, enabled=False):
        if impl == "chunked":
            return chunked.lse_forward(x, y, scale, col_log_weight, pairs, chunk)
        high = impl == "triton_high"
        return *_fused().lse_forward(x, y, scale, col_log_weight, pairs, high=high), _empty(x), _empty(x)


@pair_lse_op.register_fake
def _(x, y, scale, row_ids, col_ids, col_log_weight, row_offset, exclude_positives, impl, chunk):
    dtype = compute_dtype(x)
    sums = [x.new_empty((2, len(side)), dtype=dtype) if impl == "chunked" else _empty(x) for side in (x, y)]
    return x.new_empty((x.shape[0],), dtype=dtype), x.new_empty((y.shape[0],), dtype=dtype), *sums


@torch.library.custom_op("clipkit::pair_lse_backward", mutates_args=())
def pair_lse_backward_op(
    grad_row: Tensor,
    grad_col: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    col_log_weight: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    row_sum: Tensor,
    col_sum: Tensor,
    row_offset: int,
    exclude_positives: bool,
    impl: str,
    chunk: int,
    need_x: bool,
    need_y: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dscale, dcol_log_weight), each in its input's dtype; one that is not needed is empty."""
    pairs = Pairs(row_offset, row_ids, col_ids, exclude_positives)
    with torch.autocast(x.device.type, enabled=False):
        given = (grad_row, grad_col, x, y, scale, col_log_weight)
        if impl == "chunked":
            d_x, d_y, d_scale, d_weight = chunked.lse_backward(
                *given, row_sum, col_sum, pairs, chunk, need_x=need_x, need_y=need_y, need_weight=need_weight
            )
        else:
            high = impl == "triton_high"
            d_x, d_y, d_scale, d_weight = _fused().lse_backward(
                *given, row_lse, col_lse, pairs, high=high,
                need_x=need_x, need_y=need_y, need_weight=need_weight,
            )  # fmt: skip
    return (
        _asked(d_x, x, x, need_x),
        _asked(d_y, y, x, need_y),
        d_scale.to(scale.dtype),
        _asked(d_weight, col_log_weight, x, need_weight),
    )


@pair_lse_backward_op.register_fake
def _(
    grad_row,
    grad_col,
    x,
    y,
    scale,
    row_ids,
    col_ids,
    col_log_weight,
    row_lse,
    col_lse,
    row_sum,
    col_sum,
    row_offset,
    exclude_positives,
    impl,
    chunk,
    need_x,
    need_y,
    need_weight,
):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else _empty(x),
        torch.empty_like(y, memory_format=torch.contiguous_format) if need_y else _empty(y),
        scale.new_empty(()),
        torch.empty_like(col_log_weight, memory_format=torch.contiguous_format) if need_weight else _empty(x),
    )


def _lse_setup(ctx, inputs, output):
    x, y, scale, row_ids, col_ids, col_log_weight, *ctx.settings = inputs
    ctx.save_for_backward(x, y, scale, row_ids, col_ids, col_log_weight, *output)


def _lse_backward(ctx, grad_row, grad_col, *of_sums):
    x, y, scale, row_ids, col_ids, col_log_weight, *sums = ctx.saved_tensors
    need_x, need_y, need_scale, _, _, need_weight = ctx.needs_input_grad[:6]
    d_x, d_y, d_scale, d_weight = pair_lse_backward_op(
        grad_row.contiguous(),
        grad_col.contiguous(),
        x,
        y,
        scale,
        row_ids,
        col_ids,
        col_log_weight,
        *sums,
        *ctx.settings,
        need_x,
        need_y,
        need_weight,
    )
    return (
        d_x if need_x else None,
        d_y if need_y else None,
        d_scale if need_scale else None,
        None,
        None,
        d_weight if need_weight else None,
        None,
        None,
        None,
        None,
    )


pair_lse_op.register_autograd(_lse_backward, setup_context=_lse_setup)


@torch.library.custom_op("clipkit::pair_softplus", mutates_args=())
def pair_softplus_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    exclude_positives: bool,
    impl: str,
    chunk: int,
) -> Tensor:
    pairs = Pairs(row_offset, row_ids, col_ids, exclude_positives)
    with torch.autocast(x.device.type, enabled=False):
        if impl == "chunked":
            return chunked.softplus_forward(x, y, scale, bias, pairs, chunk)
        return _fused().softplus_forward(x, y, scale, bias, pairs, high=impl == "triton_high")


@pair_softplus_op.register_fake
def _(x, y, scale, bias, row_ids, col_ids, row_offset, exclude_positives, impl, chunk):
    return x.new_empty((x.shape[0],), dtype=compute_dtype(x))


@torch.library.custom_op("clipkit::pair_softplus_backward", mutates_args=())
def pair_softplus_backward_op(
    grad_row: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    row_offset: int,
    exclude_positives: bool,
    impl: str,
    chunk: int,
    need_x: bool,
    need_y: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dy, dscale, dbias), each in its input's dtype; one that is not needed is empty."""
    pairs = Pairs(row_offset, row_ids, col_ids, exclude_positives)
    with torch.autocast(x.device.type, enabled=False):
        given = (grad_row, x, y, scale, bias, pairs)
        if impl == "chunked":
            d_x, d_y, d_scale, d_bias = chunked.softplus_backward(
                *given, chunk, need_x=need_x, need_y=need_y, need_bias=need_bias
            )
        else:
            d_x, d_y, d_scale, d_bias = _fused().softplus_backward(
                *given, high=impl == "triton_high", need_x=need_x, need_y=need_y, need_bias=need_bias
            )
    return (
        _asked(d_x, x, x, need_x),
        _asked(d_y, y, x, need_y),
        d_scale.to(scale.dtype),
        _asked(d_bias, bias, x, need_bias),
    )


@pair_softplus_backward_op.register_fake
def _(
    grad_row,
    x,
    y,
    scale,
    bias,
    row_ids,
    col_ids,
    row_offset,
    exclude_positives,
    impl,
    chunk,
    need_x,
    need_y,
    need_bias,
):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else _empty(x),
        torch.empty_like(y, memory_format=torch.contiguous_format) if need_y else _empty(y),
        scale.new_empty(()),
        bias.new_empty(()) if need_bias else _empty(x),
    )


def _softplus_setup(ctx, inputs, output):
    x, y, scale, bias, row_ids, col_ids, *ctx.settings = inputs
    ctx.save_for_backward(x, y, scale, bias, row_ids, col_ids)


def _softplus_backward(ctx, grad_row):
    x, y, scale, bias, row_ids, col_ids = ctx.saved_tensors
    need_x, need_y, need_scale, need_bias = ctx.needs_input_grad[:4]
    d_x, d_y, d_scale, d_bias = pair_softplus_backward_op(
        grad_row.contiguous(), x, y, scale, bias, row_ids, col_ids, *ctx.settings, need_x, need_y, need_bias
    )
    return (
        d_x if need_x else None,
        d_y if need_y else None,
        d_scale if need_scale else None,
        d_bias if need_bias else None,
        None,
        None,
        None,
        None,
        None,
        None,
    )


pair_softplus_op.register_autograd(_softplus_backward, setup_context=_softplus_setup)


def _refuse_second_gradient(ctx, *grads):
    raise RuntimeError(
        "clipkit.kernels computes first gradients only, and a gradient of a gradient was asked for "
        '(create_graph=True). Use impl="dense", which is twice differentiable.'
    )


for _op in (pair_lse_backward_op, pair_softplus_backward_op):
    _op.register_autograd(_refuse_second_gradient)
