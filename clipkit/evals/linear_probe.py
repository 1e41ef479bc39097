"""Linear probe: multinomial logistic regression on frozen features (Radford et al., 2021, appendix A.3).

The strength of the L2 penalty is swept on a logarithmic grid, chosen on a fifth of the training images held
out by class, and the probe is refitted on all of them. Features are the model's unit-norm embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipkit.evals.encoder import check_features
from clipkit.evals.interval import Scored, mean_of, mean_of_groups
from clipkit.evals.logistic import fit_logistic, predict_logistic

GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-4, 11))


def linear_probe_metrics(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int | None = None,
    C: tuple[float, ...] = GRID,
    seed: int = 0,
    scored: dict[str, Scored] | None = None,
) -> dict[str, float]:
    """top1 and mean_per_class on the test set as fractions of 1, and the chosen `C` (scikit-learn's).

    Args:
        train_features, test_features: (T, D) and (N, D).
        train_labels, test_labels: (T,) and (N,) int64 in 0..classes-1.
        C: the strengths tried; the smallest of equally good ones is taken.
        seed: of the held-out fifth.
        scored: is filled with each metric's test images, for `clipkit.evals.interval`, and its chance level.
    """
    check_features(train_features, "train features")
    check_features(test_features, "test features")
    classes = 1 + int(max(train_labels.max(), test_labels.max())) if classes is None else classes
    held_out = _fifth_by_class(train_labels, seed)
    if not bool(held_out.any()):
        raise ValueError(
            "the linear probe needs a class with five or more training images to choose its penalty on"
        )
    x, y = train_features.double(), train_labels
    fitted = fit_logistic(x[~held_out], y[~held_out], C=list(C), classes=classes)
    accuracy = (predict_logistic(x[held_out], *fitted) == y[held_out]).double().mean(1)
    best = C[int(torch.nonzero(accuracy == accuracy.max())[0])]
    hit = (
        predict_logistic(test_features.double(), *fit_logistic(x, y, C=[best], classes=classes))[0]
        == test_labels
    ).double()
    count = torch.bincount(test_labels, minlength=classes)
    per_class = (
        torch.zeros(classes, dtype=torch.float64).scatter_add_(0, test_labels, hit)[count > 0]
        / count[count > 0]
    )
    if scored is not None:
        scored["top1"] = mean_of(hit, chance=1 / classes)
        scored["mean_per_class"] = mean_of_groups(hit, test_labels, chance=1 / classes)
    return {"top1": float(hit.mean()), "mean_per_class": float(per_class.mean()), "C": best}


def _fifth_by_class(labels: Tensor, seed: int) -> Tensor:
    """(T,) true for a seeded fifth of every class."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels == label).squeeze(1)
        held_out[rows[torch.randperm(len(rows), generator=generator)[: len(rows) // 5]]] = True
    return held_out
