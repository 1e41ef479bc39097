"""Sentence-BERT's classifier over labelled sentence pairs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import (
    check_ids,
    check_matrix,
    check_not_empty,
    check_number,
    check_width,
    constant,
    integers,
    meet,
    reads_values,
)
from clipkit.losses.registry import register_loss

_PAIRS = (
    "labelled NLI pairs beside the image-text pairs: set data.sentences.pairs to a file of premise, "
    "hypothesis, label"
)


@register_loss("nli_softmax")
class NLISoftmax(nn.Module):
    """Cross entropy of a linear classifier that tells entailment, neutral and contradiction apart.

        L = 1/P sum_i CE(W [u_i, v_i, |u_i - v_i|], label_i)

    Reimers and Gurevych 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", section 3
    ("Classification Objective Function"; no bias there, a `bias` here by choice). The classifier W is this
    loss's own parameter: optimise `loss.parameters()` too, and start it equal on all ranks. P are the pairs
    of the whole group; ranks may bring different numbers.

    Args:
        embed_dim: D, the features' width.
        num_labels: classes; SNLI and MultiNLI have 3, in the order entailment, neutral, contradiction.
        bias: whether the classifier has a bias.
        group: "auto", a ProcessGroup or None.

    Siblings: `nli_contrastive`, which needs triplets and has no parameters.
    """

    __call__: Callable[..., Tensor]
    inputs = ("pair_premise_features", "pair_hypothesis_features", "nli_labels")
    supplied_by = dict.fromkeys(inputs, _PAIRS)
    uneven_rows = True

    def __init__(
        self, *, embed_dim: int, num_labels: int = 3, bias: bool = False, group: Group | str = "auto"
    ):
        super().__init__()
        self.embed_dim = int(check_number("embed_dim", embed_dim, 1))
        self.num_labels = int(check_number("num_labels", num_labels, 2))
        self.group = group
        self.classifier = nn.Linear(3 * self.embed_dim, self.num_labels, bias=bool(bias))

    def check(
        self, pair_premise_features: Tensor, pair_hypothesis_features: Tensor, nli_labels: Tensor
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        u, v = pair_premise_features, pair_hypothesis_features
        check_matrix("pair_premise_features", u)
        check_matrix("pair_hypothesis_features", v, like=("pair_premise_features", u))
        check_ids("nli_labels", nli_labels, len(u))
        check_width("nli_softmax", self.embed_dim, u)
        if len(u) and reads_values(self, u.device):
            labels = integers(nli_labels, u)
            if not 0 <= int(labels.min()) <= int(labels.max()) < self.num_labels:
                raise ValueError(
                    f"nli_labels must lie in 0..{self.num_labels - 1}, but go from {labels.min()} to "
                    f"{labels.max()}: drop pairs without a gold label (-1) from the data"
                )

    def forward(
        self,
        pair_premise_features: Tensor,
        pair_hypothesis_features: Tensor,
        nli_labels: Tensor,
        *,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, ().

        Args:
            pair_premise_features: (P, D), u.
            pair_hypothesis_features: (P, D), v.
            nli_labels: (P,) integers in [0, num_labels).
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ, a width other than embed_dim, labels out of range.
        """
        ranks = meet(
            self,
            ranks,
            pair_premise_features=pair_premise_features,
            pair_hypothesis_features=pair_hypothesis_features,
            nli_labels=nli_labels,
        )
        if ranks.group is None:
            check_not_empty(pair_premise_features)
        u, v = pair_premise_features, pair_hypothesis_features
        dtype = torch.promote_types(compute_dtype(u), self.classifier.weight.dtype)
        with torch.autocast(u.device.type, enabled=False):
            u, v = u.to(dtype), v.to(dtype)
            bias = None if self.classifier.bias is None else self.classifier.bias.to(dtype)
            logits = nn.functional.linear(
                torch.cat([u, v, (u - v).abs()], dim=1), self.classifier.weight.to(dtype), bias
            )
            loss = nn.functional.cross_entropy(logits, integers(nli_labels, u), reduction="sum")
        loss, pairs = all_reduce_sum(torch.stack([loss, constant(float(len(u)), u).to(dtype)]), ranks.group)
        return loss / pairs
