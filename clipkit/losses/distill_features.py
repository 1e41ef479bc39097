"""Distillation of features: the student's to point where the teacher's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipkit.distributed import Group, Ranks
from clipkit.losses.checks import paired_logits
from clipkit.losses.reduction import reduced
from clipkit.losses.registry import register_loss
from clipkit.losses.teacher import SAME, TeacherLoss, mapped


@register_loss("distill_features")
class FeatureDistillation(TeacherLoss):
    """One minus the cosine of the student's and the teacher's feature, a mean over pairs and sides.

        L = 1/(S N) sum_side sum_i (1 - <W x_i, u_i> / |W x_i|)

    with student x, teacher u and S sides; W is the identity where widths agree and a learned map where `teacher_dim` is
    given. Between unit vectors |x - u|^2 = 2 (1 - <x, u>), so Yang et al. 2024, "CLIP-KD: An Empirical Study of CLIP
    Model Distillation", feature distillation, which sums over both sides the mean squared error of an entry, is
    4 L / E for E columns: its weight w there is the weight 4 w / E here.

    Args:
        sides: image, text or both: whose features are compared.
        embed_dim: D of the student; needed with teacher_dim alone.
        teacher_dim: E of the teacher, where it differs: W is then a parameter of this loss; optimise
            `loss.parameters()` too, and start it equal on all ranks.
        group: "auto", a ProcessGroup or None.

    Zero when both point the same way. Siblings: `distill_relations` (asks for the same similarities, in any rotation),
    `distill_contrastive`, `distill`.
    """

    __call__: Callable[..., Tensor]
    name = "distill_features"
    optional_inputs = ("sample_weight",)
    # A pair is compared with its own teacher alone.
    without_negatives = True

    def __init__(
        self,
        *,
        sides: Sequence[str] = ("image", "text"),
        embed_dim: int | None = None,
        teacher_dim: int | None = None,
        group: Group | str = "auto",
    ):
        super().__init__(sides, against=SAME, group=group, embed_dim=embed_dim, teacher_dim=teacher_dim)

    def forward(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, ().

        Args:
            image_features: (B, D), unit norm: the student's; needed where `sides` has image.
            text_features: (B, D), unit norm; row i belongs to image i; needed where `sides` has text.
            dist_image_features: (B, E), unit norm: the teacher's. It gets no gradient.
            dist_text_features: (B, E), unit norm.
            sample_weight: (B,) weights >= 0 of the rows in the mean.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: a side's features are missing, differ in rows, are off unit norm or of a width that no map was
                built for; ranks with different B.
        """
        ranks, given = self.begin(
            ranks,
            image_features=image_features,
            text_features=text_features,
            dist_image_features=dist_image_features,
            dist_text_features=dist_text_features,
            sample_weight=sample_weight,
        )
        losses = []
        for student, teacher in self._pairs:
            x = mapped(self.heads, student.partition("_")[0], given[student])
            x, u = ranks.wide(x), ranks.wide(given[teacher]).detach()
            losses.append(1 - paired_logits(x, u, 1.0))
        return reduced(torch.stack(losses).mean(0), ranks, sample_weight, "mean")
