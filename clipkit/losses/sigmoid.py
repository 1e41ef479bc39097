"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels import pair_softplus
from clipkit.losses.checks import (
    check_choice,
    check_ids,
    check_impl,
    check_not_empty,
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


@register_loss("sigmoid")
class Sigmoid(nn.Module):
    """Every pair of the batch is its own yes-or-no question; nothing is normalised over the batch.

        L = -1/N sum_ij log sigma(z_ij (scale <x_i, y_j> + bias)),   z_ij = 1 if i = j else -1

    Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", section 3.2 and algorithm 1. It needs a
    learned bias: the paper starts at scale 10 (log 10 in its parameter) and bias -10, so that the N^2 - N
    negatives do not swamp the first steps. N are the pairs of the whole group: own images meet all texts.

    With `pair_ids`, rows that share an id carry the same content: with `same_ids="positive"` z is 1 between
    them, with "mask" they are left out as false negatives.

    Args:
        same_ids: "positive" or "mask"; used only where forward receives `pair_ids`.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_softplus`.

    Siblings: `infonce` (softmax over the batch).
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features", "logit_scale", "logit_bias")
    optional_inputs = ("pair_ids",)
    supplied_by = {
        "logit_bias": (
            "the model's init_logit_bias (init_logit_bias: -10 and init_logit_scale: 10 in the paper)"
        )
    }

    def __init__(self, *, same_ids: str = "positive", group: Group | str = "auto", impl: str = "auto"):
        super().__init__()
        self.same_ids = check_choice("same_ids", same_ids, ("positive", "mask"))
        self.group = group
        self.impl = check_impl(impl)

    def check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        pair_ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features)
        check_scalar("logit_scale", logit_scale)
        if logit_bias is None:
            raise ValueError(
                f"sigmoid needs logit_bias, a learned tensor of shape (): {self.supplied_by['logit_bias']}"
            )
        check_scalar("logit_bias", logit_bias)
        if pair_ids is not None:
            check_ids("pair_ids", pair_ids, len(image_features))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
        *,
        pair_ids: Tensor | Sequence[int] | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); the order of arguments is open_clip's SigLipLoss's.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier.
            logit_bias: (), added to every logit.
            pair_ids: (B,) integers, the same id for rows with the same content, or None.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B,
                no bias.
        """
        ranks = meet(
            self,
            ranks,
            image_features=image_features,
            text_features=text_features,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            pair_ids=pair_ids,
        )
        check_not_empty(image_features)
        precision = kernel_precision(image_features)
        image_features, text_features = ranks.wide(image_features), ranks.wide(text_features)
        logit_scale, bias = scalar(logit_scale, image_features), scalar(logit_bias, image_features)
        own = ranks.own(len(image_features))
        texts = ranks.gather(text_features)
        ids = all_ids = None
        if pair_ids is not None:
            ids = integers(pair_ids, image_features)
            all_ids = ranks.gather(ids)
        masked = ids is not None and self.same_ids == "mask"
        loss = pair_softplus(
            image_features,
            texts,
            logit_scale,
            bias,
            row_offset=own.start,
            row_ids=ids if masked else None,
            col_ids=all_ids if masked else None,
            impl=self.impl,
            precision=precision,
        )
        positive = paired_logits(image_features, text_features, logit_scale)
        loss = loss + softplus(-(positive + bias))
        if all_ids is not None and not masked:
            # softplus(-z) = softplus(z) - z: what makes a positive of a negative is linear in the features.
            wide = texts.to(positive.dtype)
            shared, counts = shared_sums(wide, all_ids)
            loss = loss - paired_logits(image_features, (shared - wide)[own], logit_scale)
            loss = loss - (counts[own, 0] - 1) * bias
        return all_reduce_sum(loss.sum() / len(texts), ranks.group)
