"""Masked language modelling for the text tower."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import check_ids, integers, meet, reads_values
from clipkit.losses.registry import register_loss

_TOKENS = "a masked pass through the text tower and its vocabulary head: set mlm_probability (BERT: 0.15)"


@register_loss("mlm")
class MaskedLanguageModel(nn.Module):
    """Mean cross entropy of the masked tokens' predictions, over every masked token of the group.

        L = -1/T sum_k log softmax(logits_k)[label_k]

    Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    section 3.1. Ranks mask different numbers of tokens: the mean is over the group's T tokens, not a mean of
    the ranks' means. The head that makes the logits belongs to the model.

    Args:
        ignore_index: label of tokens that do not count.
        group: "auto", a ProcessGroup or None.
    """

    __call__: Callable[..., Tensor]
    inputs = ("mlm_logits", "mlm_labels")
    supplied_by = dict.fromkeys(inputs, _TOKENS)
    uneven_rows = True

    def __init__(self, *, ignore_index: int = -100, group: Group | str = "auto"):
        super().__init__()
        self.ignore_index = int(ignore_index)
        self.group = group

    def check(self, mlm_logits: Tensor, mlm_labels: Tensor) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        if not isinstance(mlm_logits, Tensor) or mlm_logits.ndim != 2 or not mlm_logits.is_floating_point():
            told = (
                f"{mlm_logits.dtype} of shape {tuple(mlm_logits.shape)}"
                if isinstance(mlm_logits, Tensor)
                else type(mlm_logits).__name__
            )
            raise ValueError(f"mlm_logits must be floating (T, V), but is {told}")
        check_ids("mlm_labels", mlm_labels, len(mlm_logits))
        if reads_values(self, mlm_logits.device):
            labels = integers(mlm_labels, mlm_logits)
            classes = mlm_logits.shape[1]
            outside = ((labels < 0) | (labels >= classes)) & (labels != self.ignore_index)
            if bool(outside.any()):
                raise ValueError(
                    f"mlm_labels must lie in 0..{classes - 1} or be {self.ignore_index}, but one is "
                    f"{int(labels[outside][0])}"
                )

    def forward(self, mlm_logits: Tensor, mlm_labels: Tensor, *, ranks: Ranks | None = None) -> Tensor:
        """The loss of the group's masked tokens, ().

        Args:
            mlm_logits: (T, V); a rank without masked tokens gives (0, V).
            mlm_labels: (T,) integers in [0, V), or ignore_index.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that do not fit, or no masked token in the whole group.
        """
        ranks = meet(self, ranks, mlm_logits=mlm_logits, mlm_labels=mlm_labels)
        dtype, labels = compute_dtype(mlm_logits), integers(mlm_labels, mlm_logits)
        loss = nn.functional.cross_entropy(
            mlm_logits.to(dtype), labels, ignore_index=self.ignore_index, reduction="sum"
        )
        counted = (labels != self.ignore_index).sum().to(dtype)
        loss, counted = all_reduce_sum(torch.stack([loss, counted]), ranks.group)
        if reads_values(self, mlm_logits.device) and counted == 0:
            raise ValueError(
                "mlm got no masked token in the whole group, so it has nothing to teach: raise the masking "
                "probability or the batch size, and check that labels are not all ignore_index"
            )
        return loss / counted
