"""Rows that carry the same content (`pair_ids`), in O(N D) and without an N x N mask."""

from __future__ import annotations

import torch
from torch import Tensor


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
