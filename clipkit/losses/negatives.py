"""Hard negatives: columns beyond the batch, which are no row's partner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipkit.distributed import Ranks
from clipkit.kernels import pair_lse, pair_softplus
from clipkit.losses.checks import check_matrix, check_unit_norm, logaddexp, softplus

HARD_NEGATIVES = ("group", "own")


def check_hard_negatives(name: str, features: Any, anchors: Tensor, which: str, *, values: bool) -> None:
    """ValueError unless `features` is None, (B, K, D) or, where they are the group's, (M, D), of `anchors`' D.

    Args:
        anchors: (B, D), the rows that meet them.
        which: "group" or "own".
        values: whether to check for unit norm.
    """
    if features is None:
        return
    if isinstance(features, Tensor) and features.ndim == 3:
        if len(features) != len(anchors):
            raise ValueError(
                f"{name} must be (B, K, D), K for each of the {len(anchors)} rows, but has shape "
                f"{tuple(features.shape)}"
            )
        features = features.flatten(0, 1)
    elif which == "own":
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f'hard_negatives="own" needs {name} of shape (B, K, D), but got {shape}')
    check_matrix(name, features)
    if features.shape[1] != anchors.shape[1]:
        raise ValueError(f"{name} are {features.shape[1]} wide, but the rows they meet {anchors.shape[1]}")
    if values:
        check_unit_norm(**{name: features})


class HardNegatives:
    """Hard negatives as own rows meet them: the columns of the whole group, or each row's own K.

    Args:
        features: (B, K, D) or (M, D).
        ranks: the ranks of the loss.
        which: "group" or "own".
        impl, precision: of the kernels.
    """

    def __init__(self, features: Tensor, ranks: Ranks, which: str, *, impl: str, precision: str):
        features = ranks.wide(features)
        self.each = features if which == "own" else None
        self.columns = features if which == "own" else ranks.gather(features).flatten(0, -2)
        # Columns that one row meets.
        self.number = features.shape[1] if which == "own" else len(self.columns)
        self.impl, self.precision = impl, precision

    def lse(self, x: Tensor, scale: Tensor) -> Tensor:
        """(B,): log-sum-exp of the scaled similarities of own rows x (B, D); -inf where there are none."""
        if self.each is not None:
            return torch.logsumexp(self._logits(x, scale), 1)
        return pair_lse(
            x, self.columns, scale, exclude_positives=False, impl=self.impl, precision=self.precision
        )[0]

    def softplus(self, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """(B,): the sum of softplus(logit + bias)."""
        if self.each is not None:
            return softplus(self._logits(x, scale) + bias).sum(1)
        return pair_softplus(
            x, self.columns, scale, bias, exclude_positives=False, impl=self.impl, precision=self.precision
        )

    def sums(self) -> Tensor:
        """(D,) or (B, D): the sum of what each row meets."""
        return self.columns.sum(0) if self.each is None else self.each.sum(1)

    def _logits(self, x: Tensor, scale: Tensor) -> Tensor:
        """(B, K), in fp32 whatever the autocast."""
        assert self.each is not None, "rows meet their own"
        with torch.autocast(x.device.type, enabled=False):
            return (self.each.to(scale.dtype) @ x.to(scale.dtype)[:, :, None])[:, :, 0] * scale


def joined(lse: Tensor, hard: HardNegatives | None, x: Tensor, scale: Tensor) -> Tensor:
    """`lse` (B,) of rows x with their hard negatives' terms, if any."""
    return lse if hard is None or hard.number == 0 else logaddexp(lse, hard.lse(x, scale))
