"""Distillation of a CLIP model's similarities: the student's logits against the teacher's softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import (
    check_impl,
    check_matrix,
    check_pairs,
    check_precision,
    check_scalar,
    check_unit_norm,
    paired_logits,
    scalar,
    value_checks,
)
from clipkit.losses.duplicates import refuse_second_derivative
from clipkit.losses.pairs import lse_both_ways, meet_pairs
from clipkit.losses.reduction import check_weight, reduced
from clipkit.losses.registry import register_loss

# Entries of one block of the teacher's softmax.
_BLOCK = 1 << 22
_TEACHER = "a teacher's forward on the same batch, under no_grad: its features and scale, with dist_ before their names"


@register_loss("distill")
class Distill(nn.Module):
    """Cross entropy of the student's softmax over the batch against the teacher's, in both directions.

        L = -1/(2N) sum_ij [ p_ij log softmax_j(s_ij) + q_ij log softmax_i(s_ij) ],
        s_ij = scale <x_i, y_j>,  p = softmax_j(t_ij),  q = softmax_i(t_ij),  t_ij = dist_scale <u_i, v_j>

    with student x, y and teacher u, v. It is the second term of open_clip's DistillClipLoss, whose first is
    `infonce`; Yang et al. 2024, "CLIP-KD: An Empirical Study of CLIP Model Distillation", compares it with
    others (contrastive relational distillation). Teacher and student may differ in width. Logits are linear
    in the features, so it takes the teacher's mean of the gathered features, a block of rows at a time, and
    the log-sum-exp of `infonce`, and no N x N matrix. N are the pairs of the whole group.

    Args:
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton" for the student's log-sum-exp: see
            `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    It is the teacher's entropy when both agree. Siblings: `infonce`, which it is added to.
    """

    __call__: Callable[..., Tensor]
    inputs = (
        "image_features",
        "text_features",
        "logit_scale",
        "dist_image_features",
        "dist_text_features",
        "dist_logit_scale",
    )
    optional_inputs = ("sample_weight",)
    supplied_by = dict.fromkeys(inputs[3:], _TEACHER)

    def __init__(self, *, group: Group | str = "auto", impl: str = "auto", precision: str = "auto"):
        super().__init__()
        self.precision = check_precision(precision)
        self.group = group
        self.impl = check_impl(impl)

    def check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        sample_weight: Any = None,
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features, logit_scale=logit_scale)
        check_scalar("dist_logit_scale", dist_logit_scale)
        like = ("dist_image_features", dist_image_features)
        check_matrix(*like)
        check_matrix("dist_text_features", dist_text_features, like=like)
        rows, values = len(image_features), value_checks(image_features.device)
        if len(dist_image_features) != rows:
            raise ValueError(
                f"the teacher's features must have the student's {rows} rows, but have {len(dist_image_features)}"
            )
        if values:
            check_unit_norm(dist_image_features=dist_image_features, dist_text_features=dist_text_features)
        check_weight(sample_weight, rows, values=values)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        *,
        sample_weight: Tensor | None = None,
        reduction: str = "mean",
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); names and order are those of open_clip's DistillClipLoss.

        Args:
            image_features: (B, D), unit norm: the student's.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier.
            dist_image_features: (B, E), unit norm: the teacher's. It gets no gradient.
            dist_text_features: (B, E), unit norm.
            dist_logit_scale: (), the teacher's multiplier.
            sample_weight: (B,) weights >= 0 of the rows in the mean.
            reduction: "mean", or "none" for own rows' losses, (B,), times their weights.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B.
        """
        ranks, x, y, scale, kernel = meet_pairs(
            self,
            ranks,
            image_features,
            text_features,
            logit_scale,
            dist_image_features=dist_image_features,
            dist_text_features=dist_text_features,
            dist_logit_scale=dist_logit_scale,
            sample_weight=sample_weight,
        )
        row_lse, col_lse = lse_both_ways(x, y, scale, ranks, exclude_positives=False, **kernel)
        u, v = ranks.wide(dist_image_features), ranks.wide(dist_text_features)
        temperature = scalar(dist_logit_scale, u).detach()
        by_image = _TeachersMean.apply(u.detach(), ranks.gather(v).detach(), temperature, ranks.gather(y))
        by_text = _TeachersMean.apply(v.detach(), ranks.gather(u).detach(), temperature, ranks.gather(x))
        loss = row_lse - paired_logits(x, by_image, scale) + col_lse - paired_logits(y, by_text, scale)
        return reduced(loss / 2, ranks, sample_weight, reduction)


class _TeachersMean(torch.autograd.Function):
    """softmax(scale U V^T) Z, (B, D), for U (B, E), V (N, E) and Z (N, D), with a gradient for Z alone."""

    @staticmethod
    def forward(ctx, u, v, scale, z):
        ctx.save_for_backward(u, v, scale)
        ctx.dtype = z.dtype
        with torch.autocast(z.device.type, enabled=False):
            z = z.to(compute_dtype(z))
            return torch.cat([p @ z for _, p in _softmax(u, v, scale, z.dtype)])

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivative()
        u, v, scale = ctx.saved_tensors
        total = torch.zeros(len(v), grad.shape[1], dtype=grad.dtype, device=grad.device)
        with torch.autocast(grad.device.type, enabled=False):
            for rows, p in _softmax(u, v, scale, grad.dtype):
                total += p.T @ grad[rows]
        return None, None, None, total.to(ctx.dtype)


def _softmax(u: Tensor, v: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, (R, N) softmax) in parts of bounded size, one at a time."""
    step = max(1, _BLOCK // max(1, len(v)))
    wide, columns = compute_dtype(u), v.to(compute_dtype(u)).T
    for start in range(0, len(u), step):
        rows = slice(start, min(start + step, len(u)))
        yield rows, torch.softmax(scale.to(wide) * (u[rows].to(wide) @ columns), 1).to(dtype)
