"""InfoNCE over image-text pairs: CLIP's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, logsumexp_over_ranks, sum_over_ranks
from clipkit.kernels import pair_lse
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import (
    check_choice,
    check_impl,
    check_number,
    check_pairs,
    check_precision,
    paired_logits,
    softplus,
)
from clipkit.losses.duplicates import NearContent, SameIds, check_same_content, same_content
from clipkit.losses.negatives import HARD_NEGATIVES, HardNegatives, joined
from clipkit.losses.pairs import OPTIONS, check_options, meet_pairs
from clipkit.losses.reduction import reduced
from clipkit.losses.registry import register_loss
from clipkit.losses.ring import check_overlap, check_ring_ids, ring_lse, runs_ring
from clipkit.losses.small import runs_small, small_infonce


@register_loss("infonce")
class InfoNCE(nn.Module):
    """Symmetric cross entropy of matching every image to its text and every text to its image.

        L = 1/(2N) sum_i [ -log e^{s_ii} / sum_j e^{s_ij}  -  log e^{s_ii} / sum_j e^{s_ji} ],
        s_ij = scale <x_i, y_j>

    which on one process is, with an N x N matrix that is not needed here,

        logits = logit_scale * image_features @ text_features.T
        labels = torch.arange(len(logits))
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    It is computed as softplus(log sum_{j != i} e^{s_ij} - s_ii), which stays exact when the loss is near zero.
    Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.3
    and figure 3. N are the pairs of the whole group: own rows stay, the texts are gathered, the columns' sums
    meet by an all-reduce.

    With `label_smoothing` e, the target of a row is (1 - e) on its positives and e spread evenly over all its
    columns (Szegedy et al. 2016, section 7). With `pair_ids`, rows that share an id carry the same content:

    - `same_ids="positive"`: the target is even over all of them (Khosla et al. 2020, eq. 2; Yang et al. 2022,
      UniCL);
    - `same_ids="mask"`: they are left out of the row's sum, and out of its smoothing, as false negatives.

    With `false_negatives`, so do rows whose texts are near: <t_i, t_j> >= `false_negative_threshold`, where t is
    `content_features` if there are any (of a frozen sentence encoder, say), else the text features as they
    are; each pair is judged for itself. "mask" and "share" are the two ways above, for ids too.

    Hard negatives are more columns: texts that images meet (Yuksekgonul et al. 2023, NegCLIP), and images that
    texts meet. They are nobody's positive, and no content is compared with theirs.

    Args:
        label_smoothing: e in [0, 1).
        same_ids: "positive" or "mask"; used only where forward receives `pair_ids`.
        false_negatives: None, "mask" or "share".
        false_negative_threshold: cosine in (0, 1].
        hard_negatives: "group": every row meets those of all rows of the group; "own": its own K alone.
        overlap: "none": the texts are gathered; "ring": they go from rank to rank under the tiles, and no rank
            holds all of them (`clipkit.losses.ring`). Not with `false_negatives`, nor with ids as positives.
        group: "auto" (the default group when there are several ranks), a ProcessGroup, or None for these rows
            alone.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    Siblings: `sigmoid` (no normalisation over the batch), `infoloob` (the positive left out of its
    denominator), `cyclic` (added to this one in CyCLIP). With one pair the loss is zero.
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features", "logit_scale")
    optional_inputs = OPTIONS

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
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
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 0.999)
        self.group = group
        self.impl = check_impl(impl)
        self.same_ids, self.false_negatives, self.false_negative_threshold = check_same_content(
            same_ids, false_negatives, false_negative_threshold, impl
        )
        self.hard_negatives = check_choice("hard_negatives", hard_negatives, HARD_NEGATIVES)
        self.overlap = check_overlap(overlap, false_negatives)
        self._is_plain = self.label_smoothing == 0 and false_negatives is None

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
        check_ring_ids(self, options.get("pair_ids"))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        pair_ids: Tensor | Sequence[int] | None = None,
        content_features: Tensor | None = None,
        hard_negative_features: Tensor | None = None,
        hard_negative_image_features: Tensor | None = None,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); the order of arguments is open_clip's ClipLoss's.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier (the inverse of the temperature), not its log.
            pair_ids: (B,) integers, the same id for rows with the same content, or None.
            content_features: (B, E), unit norm: what `false_negatives` compares in place of the text features.
            hard_negative_features: (B, K, D) or (M, D), unit norm: texts that images meet beyond the batch's.
            hard_negative_image_features: the same for texts.
            sample_weight: (B,) weights >= 0 of the rows in the mean.
            reduction: "mean", or "none" for own rows' losses, (B,), times their weights.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B.
        """
        options: dict[str, Any] = {
            "pair_ids": pair_ids,
            "content_features": content_features,
            "hard_negative_features": hard_negative_features,
            "hard_negative_image_features": hard_negative_image_features,
            "sample_weight": sample_weight,
        }
        ranks, x, y, scale, kernel = meet_pairs(
            self, ranks, image_features, text_features, logit_scale, **options
        )
        if ranks.group is None and reduction == "mean" and self._is_plain:
            if all(value is None for value in options.values()) and runs_small(x, y, scale, self.impl):
                return small_infonce(x, y, scale)
        ring, own = runs_ring(self, ranks), ranks.own(len(x))
        masked, shared = same_content(self, pair_ids, content_features, y, ranks)
        if ring:
            row_lse, col_lse = ring_lse(x, y, scale, ranks, masked, **kernel)
        elif masked is not None:
            row_lse, col_lse = masked.lse(x, ranks.gather(y), scale, own, **kernel)
        else:
            row_lse, col_lse = pair_lse(x, ranks.gather(y), scale, row_offset=own.start, **kernel)
        col_lse = logsumexp_over_ranks(col_lse, ranks.group)
        more_texts, more_images = (
            None if hard is None else HardNegatives(hard, ranks, self.hard_negatives, **kernel)
            for hard in (hard_negative_features, hard_negative_image_features)
        )
        row_lse, col_lse = joined(row_lse, more_texts, x, scale), joined(col_lse, more_images, y, scale)
        positive = paired_logits(x, y, scale)
        loss = (softplus(row_lse - positive) + softplus(col_lse - positive)) / 2
        if self.label_smoothing > 0 or shared is not None:
            by_image = self._target(y, ranks, ring, masked, shared, more_texts)
            by_text = self._target(x, ranks, ring, masked, shared, more_images)
            loss = (
                loss + positive - (paired_logits(x, by_image, scale) + paired_logits(y, by_text, scale)) / 2
            )
        return reduced(loss, ranks, sample_weight, reduction)

    def _target(
        self,
        rows: Tensor,
        ranks: Ranks,
        ring: bool,
        masked: SameIds | NearContent | None,
        shared: SameIds | NearContent | None,
        hard: HardNegatives | None,
    ) -> Tensor:
        """(B, D): the mean of everyone's rows, and hard negatives, under the target of each own row; own ones
        are given. Logits are linear, so it stands for an N x N matrix of targets."""
        dtype, columns = compute_dtype(rows), len(rows) * ranks.size
        if ring:
            # Ids are refused here, but where they mask and nothing is smoothed.
            target, total = rows.to(dtype), sum_over_ranks(rows.to(dtype).sum(0), ranks.group)
        else:
            everyone, own = ranks.gather(rows).to(dtype), ranks.own(len(rows))
            target, total = everyone[own], everyone.sum(0)
            if masked is not None:
                sums, counts = masked.sums(everyone, own)
                total, columns = total - sums + everyone[own], columns - counts + 1
            if shared is not None:
                sums, counts = shared.sums(everyone, own)
                target = sums / counts
        if self.label_smoothing == 0:
            return target
        if hard is not None:
            total, columns = total + hard.sums(), columns + hard.number
        return (1 - self.label_smoothing) * target + self.label_smoothing * total / columns
