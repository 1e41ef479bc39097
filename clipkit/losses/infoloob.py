"""InfoLOOB over image-text pairs: InfoNCE with the positive left out of its own denominator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks
from clipkit.losses.checks import (
    check_choice,
    check_impl,
    check_negatives,
    check_pairs,
    check_precision,
    paired_logits,
)
from clipkit.losses.negatives import HARD_NEGATIVES, HardNegatives, joined
from clipkit.losses.pairs import check_options, lse_both_ways, meet_pairs
from clipkit.losses.reduction import reduced
from clipkit.losses.registry import register_loss


@register_loss("infoloob")
class InfoLOOB(nn.Module):
    """Symmetric "leave one out bound" of image-text pairs.

        L = 1/(2N) sum_i [ -log e^{s_ii} / sum_{j != i} e^{s_ij}  -  log e^{s_ii} / sum_{j != i} e^{s_ji} ],
        s_ij = scale <x_i, y_j>

    Poole et al. 2019, "On Variational Bounds of Mutual Information" (the bound); Fuerst et al. 2022, "CLOOB:
    Modern Hopfield Networks with InfoLOOB Outperform CLIP" (as a loss). Without
    the positive below, the gradient does not fade as the positive wins. The loss has no lower bound in the
    scale: keep logit_scale fixed or clamped, as CLOOB does (30 on CC3M). Yeh et al. 2022 call the same form
    decoupled contrastive learning.

    Args:
        hard_negatives: "group": every row meets those of all rows of the group; "own": its own K alone.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    Siblings: `infonce`; `cloob`, which retrieves from a Hopfield memory first.
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features", "logit_scale")
    optional_inputs = ("hard_negative_features", "hard_negative_image_features", "sample_weight")

    def __init__(
        self,
        *,
        hard_negatives: str = "group",
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.precision = check_precision(precision)
        self.hard_negatives = check_choice("hard_negatives", hard_negatives, HARD_NEGATIVES)
        self.group = group
        self.impl = check_impl(impl)

    def check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        **options: Any,
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features, logit_scale=logit_scale)
        check_options(self, image_features, **options)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        hard_negative_features: Tensor | None = None,
        hard_negative_image_features: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); it may be negative.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier.
            hard_negative_features: (B, K, D) or (M, D), unit norm: texts that images meet beyond the batch's.
            hard_negative_image_features: the same for texts.
            sample_weight: (B,) weights >= 0 of the rows in the mean.
            reduction: "mean", or "none" for own rows' losses, (B,), times their weights.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B,
                or a single pair in the group, which has no negative.
        """
        ranks, x, y, scale, kernel = meet_pairs(
            self,
            ranks,
            image_features,
            text_features,
            logit_scale,
            hard_negative_features=hard_negative_features,
            hard_negative_image_features=hard_negative_image_features,
            sample_weight=sample_weight,
        )
        check_negatives("infoloob", ranks.size * len(x))
        row_lse, col_lse = lse_both_ways(x, y, scale, ranks, **kernel)
        more_texts, more_images = (
            None if hard is None else HardNegatives(hard, ranks, self.hard_negatives, **kernel)
            for hard in (hard_negative_features, hard_negative_image_features)
        )
        row_lse, col_lse = joined(row_lse, more_texts, x, scale), joined(col_lse, more_images, y, scale)
        loss = (row_lse + col_lse) / 2 - paired_logits(x, y, scale)
        return reduced(loss, ranks, sample_weight, reduction)
