"""Uniformity of features on the sphere, as a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels import pair_lse
from clipkit.losses.checks import (
    check_impl,
    check_matrix,
    check_negatives,
    check_not_empty,
    check_number,
    check_precision,
    check_unit_norm,
    constant,
    kernel_settings,
    meet,
    reads_values,
)
from clipkit.losses.registry import register_loss


@register_loss("uniformity")
class Uniformity(nn.Module):
    """Log of the mean Gaussian potential between distinct rows, averaged over the named features.

        L(x) = log 1/(N (N - 1)) sum_{i != j} e^{-t ||x_i - x_j||^2}

    Wang and Isola 2020, "Understanding Contrastive Representation Learning through Alignment and Uniformity
    on the Hypersphere", section 4.1, t = 2. For unit rows the potential is e^{2t (<x_i, x_j> - 1)}. N are
    the rows of the whole group. It falls as rows spread; 0 is total collapse, about -2 t the floor in high
    dimension.

    Args:
        of: names of the features to spread, each on its own.
        t: > 0.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    Siblings: `infonce`, whose denominator contains it; `cyclic`.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        *,
        of: Sequence[str] = ("image_features", "text_features"),
        t: float = 2.0,
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.precision = check_precision(precision)
        of = (of,) if isinstance(of, str) else tuple(of)
        if not of or len(set(of)) != len(of):
            raise ValueError(f"of is {list(of)}: name one or more different features, such as text_features")
        self.inputs = of
        self.t = check_number("t", t, 0.0, open_low=True)
        self.group = group
        self.impl = check_impl(impl)

    def check(self, **features: Tensor) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        if set(features) != set(self.inputs):
            raise ValueError(
                f"uniformity of {', '.join(self.inputs)} got {', '.join(features) or 'nothing'}: give "
                "exactly those"
            )
        for name, value in features.items():
            check_matrix(name, value)
        if reads_values(self, features[self.inputs[0]].device):
            check_unit_norm(**features)

    def forward(self, *, ranks: Ranks | None = None, **features: Tensor) -> Tensor:
        """The mean over `of` of L, ().

        Args:
            features: one (B, D) tensor of unit norm for each name in `of`, as a keyword.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: a name that is missing or not in `of`, a shape other than (B, D), rows off unit norm,
                ranks with different B, or a single row in the group.
        """
        ranks = meet(self, ranks, **features)
        for value in features.values():
            check_not_empty(value)
        return torch.stack([self._potential(features[name], ranks) for name in self.inputs]).mean()

    def _potential(self, x: Tensor, ranks: Ranks) -> Tensor:
        kernel = kernel_settings(self, x)
        x = ranks.wide(x)
        columns = ranks.gather(x)
        total = len(columns)
        check_negatives("uniformity", total)
        offset = ranks.own(len(x)).start
        row_lse, _ = pair_lse(x, columns, constant(2 * self.t, x), row_offset=offset, **kernel)
        # No potential exceeds 1, so the plain sum over rows and ranks cannot overflow.
        mean = all_reduce_sum((row_lse - 2 * self.t).exp().sum(), ranks.group) / (total * (total - 1))
        return mean.log()
