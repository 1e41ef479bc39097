"""Unsupervised SimCSE: a caption's two dropout views find each other."""

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
    meet,
    paired_logits,
    reads_values,
    softplus,
)
from clipkit.losses.registry import register_loss


@register_loss("simcse")
class SimCSE(nn.Module):
    """Cross entropy of finding each caption's second dropout view among all second views.

        L = -1/N sum_i log e^{<h_i, h'_i> / t} / sum_j e^{<h_i, h'_j> / t}

    Gao et al. 2021, "SimCSE: Simple Contrastive Learning of Sentence Embeddings", equation 4, with the
    paper's t = 0.05; one-directional. The views h and h' are the same captions passed twice through a text
    tower with dropout, under independent masks. Without dropout both passes agree and there is nothing to
    learn: an error, not a small loss. N are the captions of the whole group.

    With `head`, both views pass a linear layer and tanh first (section 3 of the paper: a head in training
    that is left out at evaluation). It is a parameter of this loss: optimise `loss.parameters()` too, and
    start it equal on all ranks. Its input is scaled from norm 1 to the norm sqrt(D) that a hidden state has.

    Args:
        temperature: t > 0.
        head: whether to put the training-only head on the features. The paper has it and the YAML file turns it
            on; here it is off, because its weights are no use before they reach your optimizer.
        embed_dim: D; needed by the head alone.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    Siblings: `nli_contrastive` (the supervised SimCSE), `slip` (two views of images).
    """

    __call__: Callable[..., Tensor]
    inputs = ("text_features", "text_features_view2")
    supplied_by = {
        "text_features_view2": "a second pass of the captions through a text tower with dropout: set "
        "text_tower.dropout=0.1 and give the model this loss's `inputs`, which ask it for the second view"
    }

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        head: bool = False,
        embed_dim: int | None = None,
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
            width = head_width("simcse", embed_dim)
            self.head = nn.Linear(width, width)
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def check(self, text_features: Tensor, text_features_view2: Tensor) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_matrix("text_features", text_features)
        check_matrix("text_features_view2", text_features_view2, like=("text_features", text_features))
        if self.head is not None:
            check_width("simcse's head", self.head.in_features, text_features)
        if reads_values(self, text_features.device):
            check_unit_norm(text_features=text_features, text_features_view2=text_features_view2)
            if len(text_features) and torch.equal(text_features, text_features_view2):
                raise ValueError(
                    "simcse's two text views are identical, so the loss has nothing to teach: the text "
                    "tower needs dropout above 0 (text_tower.dropout=0.1), training mode, and a second pass "
                    "rather than a copy"
                )

    def forward(
        self, text_features: Tensor, text_features_view2: Tensor, *, ranks: Ranks | None = None
    ) -> Tensor:
        """The loss of the group's captions, ().

        Args:
            text_features: (B, D), unit norm: the first dropout view.
            text_features_view2: (B, D), unit norm: the same captions under other dropout masks.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, identical views, ranks
                with different B, a head of another width.
        """
        ranks = meet(self, ranks, text_features=text_features, text_features_view2=text_features_view2)
        check_not_empty(text_features)
        first, second = self._project(text_features), self._project(text_features_view2)
        kernel = kernel_settings(self, first)
        first, second = ranks.wide(first), ranks.wide(second)
        others = ranks.gather(second)
        scale = constant(1 / self.temperature, first)
        row_lse, _ = pair_lse(first, others, scale, row_offset=ranks.own(len(first)).start, **kernel)
        loss = softplus(row_lse - paired_logits(first, second, scale))
        return all_reduce_sum(loss.sum() / len(others), ranks.group)

    def _project(self, features: Tensor) -> Tensor:
        """(B, D) features through the training-only head, unit norm again; themselves without one."""
        if self.head is None:
            return features
        width = features.shape[1]
        hidden = torch.tanh(self.head(features.to(self.head.weight.dtype) * width**0.5))
        return nn.functional.normalize(hidden.to(compute_dtype(hidden)), dim=-1)
