"""SLIP's image term: two augmented views of each image find each other (SimCLR's NT-Xent)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels import pair_lse
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import (
    check_impl,
    check_matrix,
    check_not_empty,
    check_number,
    check_precision,
    check_unit_norm,
    check_width,
    constant,
    head_width,
    kernel_settings,
    logaddexp,
    meet,
    paired_logits,
    reads_values,
    softplus,
)
from clipkit.losses.pairs import lse_both_ways
from clipkit.losses.registry import register_loss

_VIEWS = (
    "two augmented views of each image: let data.augmentation crop, flip or jitter, and give the model the "
    "batch's image_view1 and image_view2"
)


@register_loss("slip")
class SLIP(nn.Module):
    """NT-Xent: each of the 2N views finds its partner among the other 2N - 1.

        L = -1/(2N) sum_i log e^{<z_i, z_p(i)> / t} / sum_{k != i} e^{<z_i, z_k> / t}

    where p(i) is the other view of i's image. Chen et al. 2020, "A Simple Framework for Contrastive Learning
    of Visual Representations", equation 1, with t = 0.1; Mu et al. 2022, "SLIP: Self-supervision meets
    Language-Image Pre-training", adds it to InfoNCE at weight 1. N are the images of the whole
    group.

    With `head`, both views pass a three-layer perceptron first (as SLIP does, without its batch
    normalisation, which would make a row's gradient depend on how the batch is split). It is a parameter of
    this loss: optimise `loss.parameters()` too, and start it equal on all ranks.

    Args:
        temperature: t > 0.
        head: whether to put the training-only head on the features. The paper has it and the YAML file turns it
            on; here it is off, because its weights are no use before they reach your optimizer.
        embed_dim: D; needed by the head alone.
        hidden_dim: width of the head's two hidden layers.
        output_dim: width of the head's output.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    Siblings: `simcse` (two dropout views of captions, one direction, other view's rows alone).
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features_view1", "image_features_view2")
    supplied_by = dict.fromkeys(inputs, _VIEWS)

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        head: bool = False,
        embed_dim: int | None = None,
        hidden_dim: int = 4096,
        output_dim: int = 256,
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.precision = check_precision(precision)
        self.temperature = check_number("temperature", temperature, 0.0, open_low=True)
        self.group = group
        self.impl = check_impl(impl)
        self.head = None
        if head:
            width, hidden = head_width("slip", embed_dim), int(hidden_dim)
            self.head = nn.Sequential(
                nn.Linear(width, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, int(output_dim)),
            )

    def check(self, image_features_view1: Tensor, image_features_view2: Tensor) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        first, second = image_features_view1, image_features_view2
        check_matrix("image_features_view1", first)
        check_matrix("image_features_view2", second, like=("image_features_view1", first))
        if self.head is not None:
            # The first layer's, (hidden_dim, embed_dim).
            check_width("slip's head", next(self.head.parameters()).shape[1], first)
        if reads_values(self, first.device):
            check_unit_norm(image_features_view1=first, image_features_view2=second)
            if len(first) and torch.equal(first, second):
                raise ValueError(
                    f"slip's two image views are identical, so there is nothing to teach. It needs {_VIEWS}"
                )

    def forward(
        self, image_features_view1: Tensor, image_features_view2: Tensor, *, ranks: Ranks | None = None
    ) -> Tensor:
        """The loss of the group's views, ().

        Args:
            image_features_view1: (B, D), unit norm.
            image_features_view2: (B, D), unit norm: the same images under another augmentation.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, identical views, ranks
                with different B, a head of another width.
        """
        ranks = meet(
            self,
            ranks,
            image_features_view1=image_features_view1,
            image_features_view2=image_features_view2,
        )
        check_not_empty(image_features_view1)
        first, second = self._project(image_features_view1), self._project(image_features_view2)
        kernel = kernel_settings(self, first)
        first, second = ranks.wide(first), ranks.wide(second)
        offset = ranks.own(len(first)).start
        scale = constant(1 / self.temperature, first)
        # Excluding column offset + i leaves out the partner in the block between views and the row itself
        # within one.
        to_second, to_first = lse_both_ways(first, second, scale, ranks, **kernel)
        within_first, _ = pair_lse(first, ranks.gather(first), scale, row_offset=offset, **kernel)
        within_second, _ = pair_lse(second, ranks.gather(second), scale, row_offset=offset, **kernel)
        positive = paired_logits(first, second, scale)
        loss = softplus(logaddexp(to_second, within_first) - positive)
        loss = loss + softplus(logaddexp(to_first, within_second) - positive)
        return all_reduce_sum(loss.sum() / (2 * ranks.size * len(first)), ranks.group)

    def _project(self, features: Tensor) -> Tensor:
        """(B, D) features through the training-only head, unit norm again; themselves without one."""
        if self.head is None:
            return features
        projected = self.head(features.to(next(self.head.parameters()).dtype))
        return nn.functional.normalize(projected.to(compute_dtype(projected)), dim=-1)
