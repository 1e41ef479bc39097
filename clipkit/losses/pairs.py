"""What losses of pairs share: the meeting of ranks, what it checks, and log-sum-exps in both directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clipkit.distributed import Ranks, logsumexp_over_ranks
from clipkit.kernels import pair_lse
from clipkit.losses.checks import (
    check_ids,
    check_matrix,
    check_not_empty,
    check_unit_norm,
    kernel_settings,
    meet,
    scalar,
    value_checks,
)
from clipkit.losses.negatives import check_hard_negatives
from clipkit.losses.reduction import check_weight

OPTIONS = (
    "pair_ids",
    "content_features",
    "hard_negative_features",
    "hard_negative_image_features",
    "sample_weight",
)


def meet_pairs(
    loss: nn.Module,
    ranks: Ranks | None,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    **others: Any,
) -> tuple[Ranks, Tensor, Tensor, Tensor, dict[str, Any]]:
    """What a pair loss computes with, once all ranks have checked what they were given (`meet`).

    Args:
        others: forward's other inputs by name; None for one that was not given.

    Returns:
        ranks, own images x and texts y (B, D), in fp32 at least, the scale (), and the kernels' settings.

    Raises:
        ValueError: as `meet`, or an empty batch.
    """
    features: dict[str, Any] = {"image_features": image_features, "text_features": text_features}
    ranks = meet(loss, ranks, **features, logit_scale=logit_scale, **others)
    check_not_empty(image_features)
    x, y = ranks.wide(image_features), ranks.wide(text_features)
    return ranks, x, y, scalar(logit_scale, x), kernel_settings(loss, image_features)


def lse_both_ways(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    ranks: Ranks,
    *,
    impl: str,
    precision: str,
    exclude_positives: bool = True,
) -> tuple[Tensor, Tensor]:
    """(B,) each: `clipkit.kernels.pair_lse` of own rows x with everyone's y, and of own y with everyone's x."""
    row_lse, col_lse = pair_lse(
        x,
        ranks.gather(y),
        scale,
        row_offset=ranks.own(len(x)).start,
        exclude_positives=exclude_positives,
        impl=impl,
        precision=precision,
    )
    return row_lse, logsumexp_over_ranks(col_lse, ranks.group)


def check_options(
    loss: nn.Module,
    anchors: Tensor,
    pair_ids: Any = None,
    content_features: Any = None,
    hard_negative_features: Any = None,
    hard_negative_image_features: Any = None,
    sample_weight: Any = None,
) -> None:
    """ValueError unless each that is not None fits the loss's rows.

    Args:
        loss: its `hard_negatives` says which shapes those may have.
        anchors: (B, D), the rows.
    """
    rows, values = len(anchors), value_checks(anchors.device)
    if pair_ids is not None:
        check_ids("pair_ids", pair_ids, rows)
    if content_features is not None:
        check_matrix("content_features", content_features)
        if len(content_features) != rows:
            raise ValueError(f"content_features must have {rows} rows, but have {len(content_features)}")
        if values:
            check_unit_norm(content_features=content_features)
    more = {
        "hard_negative_features": hard_negative_features,
        "hard_negative_image_features": hard_negative_image_features,
    }
    for name, features in more.items():
        check_hard_negatives(name, features, anchors, str(loss.hard_negatives), values=values)
    check_weight(sample_weight, rows, values=values)
