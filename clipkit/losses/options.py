"""What the pair losses check of their inputs beside the two features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clipkit.losses.checks import check_ids, check_matrix, check_unit_norm, value_checks
from clipkit.losses.negatives import check_hard_negatives
from clipkit.losses.reduction import check_weight


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
