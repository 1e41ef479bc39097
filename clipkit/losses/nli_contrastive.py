"""Supervised SimCSE: entailed sentences are positives, contradictions are hard negatives."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels import pair_lse
from clipkit.losses.checks import (
    check_impl,
    check_matrix,
    check_not_empty,
    check_number,
    check_precision,
    check_unit_norm,
    constant,
    kernel_settings,
    logaddexp,
    meet,
    paired_logits,
    reads_values,
    softplus,
)
from clipkit.losses.registry import register_loss

_TRIPLETS = (
    "NLI triplets beside the image-text pairs: set data.sentences.triplets to a file of sent0, sent1, "
    "hard_neg"
)


@register_loss("nli_contrastive")
class NLIContrastive(nn.Module):
    """Cross entropy of finding each premise's entailed sentence among all entailed and all contradicted ones.

        L = -1/M sum_i log e^{<h_i, h+_i> / t} / Z_i
        Z_i = sum_j (e^{<h_i, h+_j> / t} + alpha^{1[i = j]} e^{<h_i, h-_j> / t})

    Gao et al. 2021, "SimCSE", equation 5 with t = 0.05; alpha weighs a premise's own contradiction, as in the
    paper's ablation of hard negatives (in its appendix), and alpha = 1 is equation 5. The paper's code has
    log alpha in its place: its `hard_negative_weight` is added to the logit, and its 0 is alpha = 1. M are the
    triplets of the whole group. With K contradictions a premise, all K M are candidates of every premise and
    alpha weighs its own K.

    Args:
        temperature: t > 0.
        hard_negative_weight: alpha >= 0; 0 drops each premise's own contradiction, not the other rows'.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    Siblings: `simcse` (unsupervised), `nli_softmax` (labelled pairs in place of triplets).
    """

    __call__: Callable[..., Tensor]
    inputs = ("premise_features", "entailment_features", "contradiction_features")
    supplied_by = dict.fromkeys(inputs, _TRIPLETS)

    def __init__(
        self,
        *,
        temperature: float = 0.05,
        hard_negative_weight: float = 1.0,
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.precision = check_precision(precision)
        self.temperature = check_number("temperature", temperature, 0.0, open_low=True)
        self.hard_negative_weight = check_number("hard_negative_weight", hard_negative_weight, 0.0)
        self.group = group
        self.impl = check_impl(impl)

    def check(
        self, premise_features: Tensor, entailment_features: Tensor, contradiction_features: Tensor
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        like = ("premise_features", premise_features)
        check_matrix("premise_features", premise_features)
        check_matrix("entailment_features", entailment_features, like=like)
        contradictions = contradiction_features
        if isinstance(contradictions, Tensor) and contradictions.ndim == 3 and contradictions.shape[1] > 0:
            # Each of the K as the only one.
            for number in range(contradictions.shape[1]):
                check_matrix("contradiction_features", contradictions[:, number], like=like)
            contradictions = contradictions.flatten(0, 1)
        else:
            check_matrix("contradiction_features", contradictions, like=like)
        if reads_values(self, premise_features.device):
            check_unit_norm(
                premise_features=premise_features,
                entailment_features=entailment_features,
                contradiction_features=contradictions,
            )

    def forward(
        self,
        premise_features: Tensor,
        entailment_features: Tensor,
        contradiction_features: Tensor,
        *,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's triplets, ().

        Args:
            premise_features: (M, D), unit norm.
            entailment_features: (M, D), unit norm; row i follows from premise i.
            contradiction_features: (M, D) or (M, K, D), unit norm; row i contradicts premise i.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (M, D), features off unit norm, ranks with different M.
        """
        ranks = meet(
            self,
            ranks,
            premise_features=premise_features,
            entailment_features=entailment_features,
            contradiction_features=contradiction_features,
        )
        check_not_empty(premise_features)
        kernel = kernel_settings(self, premise_features)
        premise_features = ranks.wide(premise_features)
        entailment_features = ranks.wide(entailment_features)
        contradiction_features = ranks.wide(contradiction_features)
        entailed, contradicted = ranks.gather(entailment_features), ranks.gather(contradiction_features)
        offset = ranks.own(len(premise_features)).start
        scale = constant(1 / self.temperature, premise_features)
        negatives, _ = pair_lse(premise_features, entailed, scale, row_offset=offset, **kernel)
        # (M, D) is K = 1.
        for own, everyone in zip(_each(contradiction_features), _each(contradicted)):
            others, _ = pair_lse(premise_features, everyone, scale, row_offset=offset, **kernel)
            negatives = logaddexp(negatives, others)
            if self.hard_negative_weight > 0:
                weight = math.log(self.hard_negative_weight)
                negatives = logaddexp(negatives, paired_logits(premise_features, own, scale) + weight)
        loss = softplus(negatives - paired_logits(premise_features, entailment_features, scale))
        return all_reduce_sum(loss.sum() / len(entailed), ranks.group)


def _each(features: Tensor) -> tuple[Tensor, ...]:
    """The K (M, D) matrices of (M, K, D); (M, D) alone."""
    return features.unbind(1) if features.ndim == 3 else (features,)
