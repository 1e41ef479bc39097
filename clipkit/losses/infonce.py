"""InfoNCE over image-text pairs: CLIP's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum, logsumexp_over_ranks
from clipkit.kernels import pair_lse
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import (
    check_choice,
    check_ids,
    check_impl,
    check_not_empty,
    check_number,
    check_pairs,
    check_scalar,
    integers,
    kernel_precision,
    meet,
    paired_logits,
    scalar,
    softplus,
)
from clipkit.losses.duplicates import shared_sums
from clipkit.losses.registry import register_loss


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

    With `label_smoothing` e, the target of a row is (1 - e) on its positives and e spread evenly over all N
    columns (Szegedy et al. 2016, section 7). With `pair_ids`, rows that share an id carry the same content:

    - `same_ids="positive"`: the target is even over all of them (Khosla et al. 2020, eq. 2; Yang et al. 2022,
      UniCL);
    - `same_ids="mask"`: they are left out of the row's sum, and out of its smoothing, as false negatives.

    Args:
        label_smoothing: e in [0, 1).
        same_ids: "positive" or "mask"; used only where forward receives `pair_ids`.
        group: "auto" (the default group when there are several ranks), a ProcessGroup, or None for these rows
            alone.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.

    Siblings: `sigmoid` (no normalisation over the batch), `infoloob` (the positive left out of its
    denominator), `cyclic` (added to this one in CyCLIP). With one pair the loss is zero.
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features", "logit_scale")
    optional_inputs = ("pair_ids",)

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        same_ids: str = "positive",
        group: Group | str = "auto",
        impl: str = "auto",
    ):
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 0.999)
        self.same_ids = check_choice("same_ids", same_ids, ("positive", "mask"))
        self.group = group
        self.impl = check_impl(impl)

    def check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        pair_ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        if pair_ids is not None:
            check_ids("pair_ids", pair_ids, len(image_features))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        *,
        pair_ids: Tensor | Sequence[int] | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); the order of arguments is open_clip's ClipLoss's.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier (the inverse of the temperature), not its log.
            pair_ids: (B,) integers, the same id for rows with the same content, or None.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B.
        """
        ranks = meet(
            self,
            ranks,
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
            pair_ids=pair_ids,
        )
        check_not_empty(image_features)
        precision = kernel_precision(image_features)
        image_features, text_features = ranks.wide(image_features), ranks.wide(text_features)
        logit_scale, own = scalar(logit_scale, image_features), ranks.own(len(image_features))
        texts = ranks.gather(text_features)
        ids = all_ids = None
        if pair_ids is not None:
            ids = integers(pair_ids, image_features)
            all_ids = ranks.gather(ids)
        masked = ids is not None and self.same_ids == "mask"
        row_lse, col_lse = pair_lse(
            image_features,
            texts,
            logit_scale,
            row_offset=own.start,
            row_ids=ids if masked else None,
            col_ids=all_ids if masked else None,
            impl=self.impl,
            precision=precision,
        )
        col_lse = logsumexp_over_ranks(col_lse, ranks.group)
        positive = paired_logits(image_features, text_features, logit_scale)
        loss = (softplus(row_lse - positive) + softplus(col_lse - positive)) / 2
        if self.label_smoothing > 0 or (ids is not None and not masked):
            target = self._mean_target(texts, all_ids, own)
            loss = loss + positive - paired_logits(image_features, target, logit_scale)
        return all_reduce_sum(loss.sum() / len(texts), ranks.group)

    def _mean_target(self, texts: Tensor, all_ids: Tensor | None, own: slice) -> Tensor:
        """(B, D): the mean text under each own row's target; logits are linear, so no N x N matrix is needed.

        Summed over rows it is the target of both directions: "shares an id" is symmetric. Where masking makes
        the number of columns differ by row, the mean of the two directions' smoothing is taken.
        """
        texts = texts.to(compute_dtype(texts))
        total = len(texts)
        if all_ids is None:
            return (1 - self.label_smoothing) * texts[own] + self.label_smoothing * texts.mean(0)
        shared, counts = shared_sums(texts, all_ids)
        if self.same_ids == "positive":
            return (1 - self.label_smoothing) * (shared / counts)[own] + self.label_smoothing * texts.mean(0)
        weight = 1 / (total - counts + 1)
        smooth = weight * (texts.sum(0) + 2 * (texts - shared)) + (weight * texts).sum(0)
        return (1 - self.label_smoothing) * texts[own] + self.label_smoothing / 2 * smooth[own]
