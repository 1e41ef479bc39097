"""Distillation of relations: samples that are alike to the teacher are alike to the student, without any N x N matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipkit.distributed import Group, Ranks, all_reduce_sum, sum_over_ranks
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.registry import register_loss
from clipkit.losses.teacher import SAME, TeacherLoss


@register_loss("distill_relations")
class RelationalDistillation(TeacherLoss):
    """Similarity-preserving distillation: rows of the student's similarity matrix against the teacher's.

        L = 1/(S N) sum_side sum_i | g_i / |g_i| - h_i / |h_i| |^2,   g_ij = <x_i, x_j>,  h_ij = <u_i, u_j>

    with student x, teacher u and S sides, each among its own. Tung and Mori et al. 2019, "Similarity-Preserving
    Knowledge Distillation", divides by N^2 in place of N, and sums over layers: its value is L / N, and a weight there
    holds for one batch size alone. Widths may differ, and a rotation of either changes nothing.

    With A = X^T X (D x D), B = U^T U (E x E) and C = X^T U (D x E), |g_i|^2 = x_i^T A x_i, |h_i|^2 = u_i^T B u_i and
    <g_i, h_i> = x_i^T C u_i: exact, O(N D E) time, and across ranks one all-reduce of these matrices in place of
    gathered features. N are the pairs of the whole group.

    Args:
        sides: image, text or both: whose similarities are compared.
        group: "auto", a ProcessGroup or None.

    Zero when the similarities of every row are proportional. Siblings: `distill`, which compares the softmax of
    image-text similarities; `distill_features`.
    """

    __call__: Callable[..., Tensor]
    name = "distill_relations"
    # Rows are compared as the teacher has them, copies too.
    without_negatives = True
    any_widths = True

    def __init__(self, *, sides: Sequence[str] = ("image", "text"), group: Group | str = "auto"):
        super().__init__(sides, against=SAME, group=group)

    def forward(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        dist_image_features: Tensor | None = None,
        dist_text_features: Tensor | None = None,
        *,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, ().

        Args:
            image_features: (B, D), unit norm: the student's; needed where `sides` has image.
            text_features: (B, D), unit norm; needed where `sides` has text.
            dist_image_features: (B, E), unit norm: the teacher's. It gets no gradient.
            dist_text_features: (B, E), unit norm.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: a side's features are missing, differ in rows or are off unit norm; ranks with different B.
        """
        ranks, given = self.begin(
            ranks,
            image_features=image_features,
            text_features=text_features,
            dist_image_features=dist_image_features,
            dist_text_features=dist_text_features,
        )
        first = given[self.inputs[0]]
        with torch.autocast(first.device.type, enabled=False):
            total = sum(
                (self._side(given[student], given[teacher], ranks) for student, teacher in self._pairs),
                start=torch.zeros((), dtype=compute_dtype(first), device=first.device),
            )
            return all_reduce_sum(total / (len(self._pairs) * len(first) * ranks.size), ranks.group)

    @staticmethod
    def _side(x: Tensor, u: Tensor, ranks: Ranks) -> Tensor:
        """Own rows' sum over one side, ()."""
        dtype = compute_dtype(x)
        x, u = ranks.wide(x).to(dtype), ranks.wide(u).to(dtype).detach()
        both = torch.cat([x, u], 1)
        # A, C and B in one product and one sum over ranks; every rank uses it for rows of its own.
        grams = sum_over_ranks(both.T @ both, ranks.group)
        d = x.shape[1]
        own = ((x @ grams[:d, :d]) * x).sum(1).sqrt()
        theirs = ((u @ grams[d:, d:]) * u).sum(1).sqrt()
        shared = ((x @ grams[:d, d:]) * u).sum(1)
        # |a - b|^2 of unit vectors.
        return (2 - 2 * shared / (own * theirs)).sum()
