"""InfoLOOB over image-text pairs: InfoNCE with the positive left out of its own denominator."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum, logsumexp_over_ranks
from clipkit.kernels import pair_lse
from clipkit.losses.checks import (
    check_impl,
    check_negatives,
    check_not_empty,
    check_pairs,
    check_scalar,
    kernel_precision,
    meet,
    paired_logits,
    scalar,
)
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
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.

    Siblings: `infonce`; `cloob`, which retrieves from a Hopfield memory first.
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features", "logit_scale")

    def __init__(self, *, group: Group | str = "auto", impl: str = "auto"):
        super().__init__()
        self.group = group
        self.impl = check_impl(impl)

    def check(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features)
        check_scalar("logit_scale", logit_scale)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); it may be negative.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B,
                or a single pair in the group, which has no negative.
        """
        ranks = meet(
            self,
            ranks,
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
        )
        check_not_empty(image_features)
        precision = kernel_precision(image_features)
        image_features, text_features = ranks.wide(image_features), ranks.wide(text_features)
        logit_scale, own = scalar(logit_scale, image_features), ranks.own(len(image_features))
        texts = ranks.gather(text_features)
        check_negatives("infoloob", len(texts))
        row_lse, col_lse = pair_lse(
            image_features, texts, logit_scale, row_offset=own.start, impl=self.impl, precision=precision
        )
        col_lse = logsumexp_over_ranks(col_lse, ranks.group)
        loss = (row_lse + col_lse) / 2 - paired_logits(image_features, text_features, logit_scale)
        return all_reduce_sum(loss.sum() / len(texts), ranks.group)
