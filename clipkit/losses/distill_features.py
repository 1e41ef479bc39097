"""Distillation of features: the student's to point where the teacher's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks
from clipkit.losses.checks import check_not_empty, meet, paired_logits, value_checks
from clipkit.losses.reduction import check_weight, reduced
from clipkit.losses.registry import register_loss
from clipkit.losses.teacher import SUPPLIED_BY, check_sides, check_teacher, make_heads, mapped


@register_loss("distill_features")
class FeatureDistillation(nn.Module):
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
        super().__init__()
        self.group, self.sides = group, check_sides(self.name, sides)
        self.teacher_dim = None if teacher_dim is None else int(teacher_dim)
        self.heads = make_heads(self.name, self.sides, embed_dim, teacher_dim)
        self._pairs = [(f"{side}_features", f"dist_{side}_features") for side in self.sides]
        self.inputs = tuple(name for pair in self._pairs for name in pair)
        self.supplied_by = {teacher: SUPPLIED_BY for _, teacher in self._pairs}

    def check(self, sample_weight: Any = None, **features: Any) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_teacher(self, features, self._pairs, heads=self.heads)
        rows = features[self.inputs[0]]
        check_weight(sample_weight, len(rows), values=value_checks(rows.device))

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
        every = {
            "image_features": image_features,
            "text_features": text_features,
            "dist_image_features": dist_image_features,
            "dist_text_features": dist_text_features,
        }
        given: dict[str, Any] = {name: every[name] for name in self.inputs}
        more = {} if sample_weight is None else {"sample_weight": sample_weight}
        ranks = meet(self, ranks, **given, **more)
        check_not_empty(given[self.inputs[0]])
        losses = []
        for student, teacher in self._pairs:
            x = mapped(self.heads, student.partition("_")[0], given[student])
            x, u = ranks.wide(x), ranks.wide(given[teacher]).detach()
            losses.append(1 - paired_logits(x, u, 1.0))
        return reduced(torch.stack(losses).mean(0), ranks, sample_weight, "mean")
