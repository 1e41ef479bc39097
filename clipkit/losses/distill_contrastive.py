"""Interactive contrastive distillation: the student's images find the teacher's texts, and its texts the teacher's images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from clipkit.distributed import Group, Ranks
from clipkit.kernels import pair_lse
from clipkit.losses.checks import (
    check_impl,
    check_precision,
    check_scalar,
    kernel_settings,
    paired_logits,
    scalar,
    softplus,
)
from clipkit.losses.reduction import reduced
from clipkit.losses.registry import register_loss
from clipkit.losses.teacher import OTHER, TeacherLoss, mapped


@register_loss("distill_contrastive")
class InteractiveContrastive(TeacherLoss):
    """InfoNCE of the student's features as anchors against the teacher's of the other modality.

        L = -1/(S N) sum_i [ log softmax_j(s <x_i, v_j>)_i + log softmax_j(s <y_i, u_j>)_i ]

    with student images x and texts y, teacher images u and texts v, s the student's logit_scale and S sides: of
    sides=image the first term alone, which a teacher of texts is enough for. Yang et al. 2024, "CLIP-KD: An Empirical
    Study of CLIP Model Distillation", interactive contrastive learning. N are the pairs of the whole group; the negatives
    of a row are the teacher's other rows.

    Args:
        sides: image, text or both: whose features are the anchors.
        embed_dim: D of the student; needed with teacher_dim alone.
        teacher_dim: E of the teacher, where it differs: a learned linear map, normalised, is then put on the student's
            features. It is a parameter of this loss: optimise `loss.parameters()` too, and start it equal on all ranks.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    `infonce` when the teacher is the student, apart from the gradient, which the teacher's side has none of. Siblings:
    `distill`, `distill_features`, `distill_relations`.
    """

    __call__: Callable[..., Tensor]
    name = "distill_contrastive"
    optional_inputs = ("sample_weight",)

    def __init__(
        self,
        *,
        sides: Sequence[str] = ("image", "text"),
        embed_dim: int | None = None,
        teacher_dim: int | None = None,
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__(sides, against=OTHER, group=group, embed_dim=embed_dim, teacher_dim=teacher_dim)
        self.inputs = (*self.inputs, "logit_scale")
        self.impl = check_impl(impl)
        self.precision = check_precision(precision)

    def check(self, logit_scale: Any = None, **others: Any) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        super().check(**others)
        check_scalar("logit_scale", logit_scale)

    def forward(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        logit_scale: Tensor | float | None = None,
        *,
        sample_weight: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, ().

        Args:
            image_features: (B, D), unit norm: the student's; needed where `sides` has image.
            text_features: (B, D), unit norm; row i belongs to image i; needed where `sides` has text.
            dist_image_features: (B, E), unit norm: the teacher's, for the student's texts. It gets no gradient.
            dist_text_features: (B, E), unit norm: the teacher's, for the student's images.
            logit_scale: (), the student's multiplier.
            sample_weight: (B,) weights >= 0 of the rows in the mean.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: features are missing, differ in rows, are off unit norm or of a width that no map was built for;
                ranks with different B.
        """
        ranks, given = self.begin(
            ranks,
            image_features=image_features,
            text_features=text_features,
            dist_image_features=dist_image_features,
            dist_text_features=dist_text_features,
            logit_scale=logit_scale,
            sample_weight=sample_weight,
        )
        losses = []
        for student, teacher in self._pairs:
            x = mapped(self.heads, student.partition("_")[0], given[student])
            kernel = kernel_settings(self, x)
            x, v = ranks.wide(x), ranks.wide(given[teacher])
            scale = scalar(given["logit_scale"], x)
            row_lse, _ = pair_lse(
                x, ranks.gather(v).detach(), scale, row_offset=ranks.own(len(x)).start, **kernel
            )
            losses.append(softplus(row_lse - paired_logits(x, v.detach(), scale)))
        return reduced(torch.stack(losses).mean(0), ranks, sample_weight, "mean")
