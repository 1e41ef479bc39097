"""CLOOB: InfoLOOB between what images and texts retrieve from a modern Hopfield memory of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels import pair_lse
from clipkit.losses.checks import (
    check_impl,
    check_negatives,
    check_not_empty,
    check_number,
    check_pairs,
    check_precision,
    constant,
    kernel_settings,
    meet,
    paired_logits,
)
from clipkit.losses.registry import register_loss


@register_loss("cloob")
class CLOOB(nn.Module):
    """InfoLOOB in the image memory and in the text memory.

        U_x_i = norm(U softmax(beta U^T x_i)),  U_y_i, V_x_i, V_y_i alike;  U: all images, V: all texts
        L = -1/N sum_i log e^{<U_x_i, U_y_i> / t} / sum_{j != i} e^{<U_x_i, U_y_j> / t}
            -1/N sum_i log e^{<V_x_i, V_y_i> / t} / sum_{j != i} e^{<V_x_j, V_y_i> / t}

    Fuerst et al. 2022, "CLOOB: Modern Hopfield Networks with InfoLOOB Outperform CLIP".
    Retrieval replaces each embedding by an average of similar ones, which enriches shared features
    ("covariance structure") and keeps InfoLOOB from saturating. The temperature is fixed, since InfoLOOB has
    no lower bound in the scale. The paper's code multiplies the loss by t: `weight` 1/30 gives its numbers.

    Args:
        inverse_temperature: 1/t > 0; 30 on CC3M in the paper (14.3 on YFCC).
        beta: inverse temperature of the retrieval, > 0; 8 on CC3M in the paper (14.3 on YFCC).
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton" for the InfoLOOB sums: see `clipkit.kernels.pair_lse`.
            The retrieval is torch's scaled dot-product attention.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    Siblings: `infoloob` (beta large: everything retrieves itself where x and y agree), `infonce`.
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features")

    def __init__(
        self,
        *,
        inverse_temperature: float = 30.0,
        beta: float = 8.0,
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.precision = check_precision(precision)
        self.inverse_temperature = check_number(
            "inverse_temperature", inverse_temperature, 0.0, open_low=True
        )
        self.beta = check_number("beta", beta, 0.0, open_low=True)
        self.group = group
        self.impl = check_impl(impl)

    def check(self, image_features: Tensor, text_features: Tensor) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features)

    def forward(self, image_features: Tensor, text_features: Tensor, *, ranks: Ranks | None = None) -> Tensor:
        """The loss of the group's pairs, (); it may be negative.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B,
                or a single pair in the group.
        """
        ranks = meet(self, ranks, image_features=image_features, text_features=text_features)
        check_not_empty(image_features)
        x, y = ranks.wide(image_features), ranks.wide(text_features)
        images, texts = ranks.gather(x), ranks.gather(y)
        check_negatives("cloob", len(texts))
        image_by_image, image_by_text = self._retrieve(x, images), self._retrieve(y, images)
        text_by_image, text_by_text = self._retrieve(x, texts), self._retrieve(y, texts)
        kernel = kernel_settings(self, image_features)
        loss = self._infoloob(image_by_image, image_by_text, ranks, kernel) + self._infoloob(
            text_by_text, text_by_image, ranks, kernel
        )
        return all_reduce_sum(loss / len(texts), ranks.group)

    def _retrieve(self, queries: Tensor, memory: Tensor) -> Tensor:
        """(B, D): the softmax average of `memory` (N, D) that each query recalls, unit norm."""
        with torch.autocast(queries.device.type, enabled=False):
            recalled = nn.functional.scaled_dot_product_attention(
                queries[None], memory[None], memory[None], scale=self.beta
            )[0]
        return nn.functional.normalize(recalled, dim=-1)

    def _infoloob(self, anchors: Tensor, candidates: Tensor, ranks: Ranks, kernel: dict[str, Any]) -> Tensor:
        """Sum over own anchors (B, D) of InfoLOOB among every rank's candidates."""
        scale = constant(self.inverse_temperature, anchors)
        columns = ranks.gather(candidates)
        negatives, _ = pair_lse(anchors, columns, scale, row_offset=ranks.own(len(anchors)).start, **kernel)
        return (negatives - paired_logits(anchors, candidates, scale)).sum()
