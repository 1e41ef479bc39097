"""CyCLIP's geometric consistency: in-modal and cross-modal cycles, without any N x N matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import (
    check_choice,
    check_not_empty,
    check_number,
    check_pairs,
    constant,
    meet,
)
from clipkit.losses.registry import register_loss


@register_loss("cyclic")
class CyclicGeometry(nn.Module):
    """Penalty on images and texts that lie differently: among themselves, and to each other when swapped.

        L = in_modal / N sum_jk (<x_j, x_k> - <y_j, y_k>)^2
            + cross_modal / N sum_jk (<x_j, y_k> - <x_k, y_j>)^2

    Goel et al. 2022, "CyCLIP: Cyclic Contrastive Language-Image Pretraining", section 2.2, where both weights
    are 0.25 and InfoNCE is added. With U = X + Y, V = X - Y, A = U^T U, B = V^T V, C = U^T V (D x D each) the
    first sum is (<A, B> + <C, C^T>) / 2 and the second (<A, B> - <C, C^T>) / 2: exact, O(N D^2) time, O(D^2)
    memory, and across ranks one all-reduce of three D x D matrices in place of gathered features.

    The paper's 1/N makes the penalty grow with the batch, since it sums N^2 terms: at N = 4096 the paper's
    weights, chosen at N = 128, weigh 32 times more against InfoNCE and learning can stop. `normalize="mean"`
    divides by N^2 instead, so that a weight means the same at any batch size; 0.25 at N = 128 there is
    `in_modal=32`.

    Args:
        in_modal: weight of the image-image against text-text term, at least 0.
        cross_modal: weight of the image-text against text-image term, at least 0.
        normalize: "paper" (1/N) or "mean" (1/N^2).
        group: "auto", a ProcessGroup or None. Ranks may bring different numbers of rows.

    Zero when both modalities have the same geometry: X = Y, or Y = X R with a symmetric orthogonal R (any
    orthogonal R for the in-modal term alone). Siblings: `infonce`, which CyCLIP adds it to; `uniformity`.
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features")
    # Several captions a picture are no worse pairs for it than others.
    without_negatives = True
    uneven_rows = True

    def __init__(
        self,
        *,
        in_modal: float = 0.25,
        cross_modal: float = 0.25,
        normalize: str = "paper",
        group: Group | str = "auto",
    ):
        super().__init__()
        self.in_modal = check_number("in_modal", in_modal, 0.0)
        self.cross_modal = check_number("cross_modal", cross_modal, 0.0)
        if self.in_modal == self.cross_modal == 0:
            raise ValueError(
                "in_modal and cross_modal are both 0: the loss would always be zero; leave the loss out "
                "instead"
            )
        self.normalize = check_choice("normalize", normalize, ("paper", "mean"))
        self.group = group

    def check(self, image_features: Tensor, text_features: Tensor) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features)

    def forward(self, image_features: Tensor, text_features: Tensor, *, ranks: Ranks | None = None) -> Tensor:
        """The penalty over the group's pairs, ().

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm.
        """
        ranks = meet(self, ranks, image_features=image_features, text_features=text_features)
        if ranks.group is None:
            check_not_empty(image_features)
        dtype = compute_dtype(image_features)
        with torch.autocast(image_features.device.type, enabled=False):
            x, y = ranks.wide(image_features).to(dtype), ranks.wide(text_features).to(dtype)
            # Near convergence the sums are small differences of large Gram entries; U and V take the
            # difference first.
            u, v = x + y, x - y
            gram, pairs = _Grams.apply(u, v), constant(float(len(x)), x)
            if ranks.group is not None:
                # One sum over ranks for both.
                total = all_reduce_sum(torch.cat([gram.flatten(), pairs[None]]), ranks.group)
                gram, pairs = total[:-1].view_as(gram), total[-1]
            a, b, c = gram
            straight, crossed = (a * b).sum() / 2, (c * c.T).sum() / 2
            loss = self.in_modal * (straight + crossed) + self.cross_modal * (straight - crossed)
            loss = loss / (pairs if self.normalize == "paper" else pairs**2)
        # Rounding may leave a value just below zero where the sum of squares is zero; its gradient stays as
        # it is.
        return loss + (loss.clamp(min=0) - loss).detach()


class _Grams(torch.autograd.Function):
    """U^T U, V^T V and U^T V as one (3, D, D). Backward takes four products where autograd would take six."""

    # What torch.func needs of it.
    generate_vmap_rule = True

    @staticmethod
    def forward(u, v):
        return torch.stack([u.T @ u, v.T @ v, u.T @ v])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        u, v = ctx.saved_tensors
        a, b, c = grad
        with torch.autocast(u.device.type, enabled=False):
            return u @ (a + a.T) + v @ c.T, v @ (b + b.T) + u @ c
