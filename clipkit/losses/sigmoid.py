"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks
from clipkit.kernels import pair_softplus
from clipkit.losses.checks import (
    check_choice,
    check_impl,
    check_pairs,
    check_precision,
    check_scalar,
    paired_logits,
    scalar,
    softplus,
)
from clipkit.losses.duplicates import check_same_content, same_content
from clipkit.losses.negatives import HARD_NEGATIVES, HardNegatives
from clipkit.losses.pairs import OPTIONS, check_options, meet_pairs
from clipkit.losses.reduction import reduced
from clipkit.losses.registry import register_loss
from clipkit.losses.ring import check_overlap, check_ring_ids, ring_softplus, runs_ring


@register_loss("sigmoid")
class Sigmoid(nn.Module):
    """Every pair of the batch is its own yes-or-no question; nothing is normalised over the batch.

        L = -1/N sum_ij log sigma(z_ij (scale <x_i, y_j> + bias)),   z_ij = 1 if i = j else -1

    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2 and algorithm 1. It needs a
    learned bias: the paper starts at scale 10 (log 10 in its parameter) and bias -10, so that the N^2 - N
    negatives do not swamp the first steps. N are the pairs of the whole group: own images meet all texts.

    With `pair_ids`, rows that share an id carry the same content: with `same_ids="positive"` z is 1 between
    them, with "mask" they are left out as false negatives. With `false_negatives` so do rows whose texts are
    near, as in `infonce`. Hard negatives are more pairs with z = -1, in the sum over the batch's N.

    Args:
        same_ids: "positive" or "mask"; used only where forward receives `pair_ids`.
        false_negatives: None, "mask" or "share".
        false_negative_threshold: cosine in (0, 1].
        hard_negatives: "group": every row meets those of all rows of the group; "own": its own K alone.
        overlap: "none": the texts are gathered; "ring": they go from rank to rank under the tiles, and no rank
            holds all of them (`clipkit.losses.ring`). Not with `false_negatives`, nor with ids as positives.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_softplus`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_softplus`.

    Siblings: `infonce` (softmax over the batch).
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features", "logit_scale", "logit_bias")
    optional_inputs = OPTIONS
    supplied_by = {
        "logit_bias": (
            "the model's init_logit_bias (init_logit_bias: -10 and init_logit_scale: 10 in the paper)"
        )
    }

    def __init__(
        self,
        *,
        same_ids: str = "positive",
        false_negatives: str | None = None,
        false_negative_threshold: float = 0.95,
        hard_negatives: str = "group",
        overlap: str = "none",
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.precision = check_precision(precision)
        self.group = group
        self.impl = check_impl(impl)
        self.same_ids, self.false_negatives, self.false_negative_threshold = check_same_content(
            same_ids, false_negatives, false_negative_threshold, impl
        )
        self.hard_negatives = check_choice("hard_negatives", hard_negatives, HARD_NEGATIVES)
        self.overlap = check_overlap(overlap, false_negatives)

    def check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        **options: Any,
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features, logit_scale=logit_scale)
        if logit_bias is None:
            raise ValueError(
                f"sigmoid needs logit_bias, a learned tensor of shape (): {self.supplied_by['logit_bias']}"
            )
        check_scalar("logit_bias", logit_bias)
        check_options(self, image_features, **options)
        check_ring_ids(self, options.get("pair_ids"))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        *,
        pair_ids: Tensor | Sequence[int] | None = None,
        content_features: Tensor | None = None,
        hard_negative_features: Tensor | None = None,
        hard_negative_image_features: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); the order of arguments is open_clip's SigLipLoss's.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier.
            logit_bias: (), added to every logit.
            pair_ids: (B,) integers, the same id for rows with the same content, or None.
            content_features: (B, E), unit norm: what `false_negatives` compares in place of the text features.
            hard_negative_features: (B, K, D) or (M, D), unit norm: texts that images meet beyond the batch's.
            hard_negative_image_features: the same for texts.
            sample_weight: (B,) weights >= 0 of the rows (images with all texts) in the mean.
            reduction: "mean", or "none" for own rows' losses, (B,), times their weights.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B,
                no bias.
        """
        ranks, x, y, scale, kernel = meet_pairs(
            self,
            ranks,
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            pair_ids=pair_ids,
            content_features=content_features,
            hard_negative_features=hard_negative_features,
            hard_negative_image_features=hard_negative_image_features,
            sample_weight=sample_weight,
        )
        bias, ring, own = scalar(logit_bias, x), runs_ring(self, ranks), ranks.own(len(x))
        masked, shared = same_content(self, pair_ids, content_features, y, ranks)
        if ring:
            loss = ring_softplus(x, y, scale, bias, ranks, masked, **kernel)
        elif masked is not None:
            loss = masked.softplus(x, ranks.gather(y), scale, bias, own, **kernel)
        else:
            loss = pair_softplus(x, ranks.gather(y), scale, bias, row_offset=own.start, **kernel)
        positive = paired_logits(x, y, scale)
        loss = loss + softplus(-(positive + bias))
        if shared is not None:
            # softplus(-z) = softplus(z) - z: what makes a positive of a negative is linear in the features.
            sums, counts = shared.sums(ranks.gather(y).to(positive.dtype), own)
            loss = loss - (paired_logits(x, sums, scale) - positive) - (counts[:, 0] - 1) * bias
        for anchors, hard in ((x, hard_negative_features), (y, hard_negative_image_features)):
            if hard is not None:
                more = HardNegatives(hard, ranks, self.hard_negatives, **kernel)
                loss = loss + more.softplus(anchors, scale, bias)
        return reduced(loss, ranks, sample_weight, reduction)
