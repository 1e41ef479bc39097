"""The definition: the whole matrix at once, in plain differentiable torch.

The oracle for the other implementations (in float64 exact to rounding, and twice differentiable) and the
fastest one while the matrix is small. Memory is O(N M).
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 features, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def excluded_pairs(
    rows: Tensor,
    cols: Tensor,
    *,
    row_offset: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_positives: bool,
) -> Tensor | None:
    """(len(rows), len(cols)) mask of the pairs that stay out of every sum, or None when none can.

    rows, cols: row and column numbers, int64. row_ids, col_ids: ids of these rows and columns alone.
    """
    mask = None
    if exclude_positives:
        mask = (rows + row_offset)[:, None] == cols[None, :]
    if row_ids is not None and col_ids is not None:
        same = row_ids[:, None] == col_ids[None, :]
        mask = same if mask is None else mask | same
    return mask


def _masked_logits(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    *,
    row_offset: int,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    exclude_positives: bool,
) -> Tensor:
    """scale <x_i, y_j> + offset, and -inf where the pair is excluded."""
    dtype = compute_dtype(x)
    logits = scale.to(dtype) * (x.to(dtype) @ y.to(dtype).T)
    rows = torch.arange(x.shape[0], device=x.device)
    cols = torch.arange(y.shape[0], device=x.device)
    mask = excluded_pairs(
        rows,
        cols,
        row_offset=row_offset,
        row_ids=row_ids,
        col_ids=col_ids,
        exclude_positives=exclude_positives,
    )
    if offset is not None:
        offset = offset.to(dtype)
        logits = logits + offset
        # A column of weight 0 is excluded too: its -inf would otherwise turn an empty row's gradient into
        # NaN.
        absent = (offset == float("-inf")).expand_as(logits)
        mask = absent if mask is None else mask | absent
    return logits if mask is None else logits.masked_fill(mask, float("-inf"))


def pair_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    col_log_weight: Tensor | None = None,
    exclude_positives: bool = True,
) -> tuple[Tensor, Tensor]:
    """Row and column log-sum-exp of the logits; see `clipkit.kernels.pair_lse`."""
    with torch.autocast(x.device.type, enabled=False):
        logits = _masked_logits(
            x,
            y,
            scale,
            col_log_weight,
            row_offset=row_offset,
            row_ids=row_ids,
            col_ids=col_ids,
            exclude_positives=exclude_positives,
        )
        return torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)


def pair_softplus(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude_positives: bool = True,
) -> Tensor:
    """Row sums of softplus of the logits; see `clipkit.kernels.pair_softplus`."""
    with torch.autocast(x.device.type, enabled=False):
        logits = _masked_logits(
            x,
            y,
            scale,
            None,
            row_offset=row_offset,
            row_ids=row_ids,
            col_ids=col_ids,
            exclude_positives=exclude_positives,
        )
        # logsigmoid is exact at every argument; softplus switches to the identity at 20.
        return -torch.nn.functional.logsigmoid(-(logits + bias.to(logits.dtype))).sum(1)
