"""From the losses of own rows to the loss of the group, weighted or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkit.distributed import Ranks, all_reduce_sum
from clipkit.losses.checks import check_choice

REDUCTIONS = ("mean", "none")


def check_weight(weight: Any, rows: int, *, values: bool) -> None:
    """ValueError unless `weight` is None or (rows,) numbers, where they may be read finite and none below 0."""
    if weight is None:
        return
    if not isinstance(weight, Tensor) or weight.shape != (rows,) or weight.is_complex():
        shape = f"of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"sample_weight must be a tensor of numbers of shape ({rows},), but is {shape}")
    if values and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(f"sample_weight must be finite and at least 0, but has {weight.min():.4g}")


def reduced(loss: Tensor, ranks: Ranks, weight: Tensor | None, reduction: str) -> Tensor:
    """The group's mean of rows' losses, (), or own rows' losses, (B,).

        mean: sum_i w_i l_i / sum_i w_i over the rows of the group;  none: w_i l_i

    The mean over ranks of a rank's own mean of (B,) has the gradient of one process, as DDP takes it. With
    weights that are all 0 the mean is NaN.

    Args:
        loss: (B,), of own rows.
        weight: (B,) or None.
        reduction: "mean" or "none".
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if weight is not None:
        weight = weight.to(loss.device, loss.dtype).detach()
        loss = loss * weight
    if reduction == "none":
        return loss
    if weight is None:
        return all_reduce_sum(loss.sum() / (len(loss) * ranks.size), ranks.group)
    total, weights = all_reduce_sum(torch.stack([loss.sum(), weight.sum()]), ranks.group)
    return total / weights
