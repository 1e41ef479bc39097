"""Geometry against the papers' formulas in plain loops."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from clipkit.evals import consistency_scores, geometry_metrics
from clipkit.evals.geometry import majority


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(
        torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1
    )


def squared(a, b) -> float:
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def test_equals_the_formulas():
    x, y = unit(6, 5, 0).tolist(), unit(13, 5, 1).tolist()
    owner = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    expected = {
        "align_l2": math.fsum(squared(x[o], t) for o, t in zip(owner, y, strict=True)) / 13,
        "uniform_i": math.log(
            math.fsum(math.exp(-2 * squared(x[i], x[j])) for i in range(6) for j in range(6) if i != j) / 30
        ),
        "uniform_t": math.log(
            math.fsum(math.exp(-2 * squared(y[i], y[j])) for i in range(13) for j in range(13) if i != j)
            / 156
        ),
        "uniform_it": math.log(
            math.fsum(
                math.exp(-2 * squared(x[i], y[j])) for i in range(6) for j in range(13) if owner[j] != i
            )
            / (6 * 13 - 13)
        ),
        "modality_gap": math.sqrt(
            math.fsum(
                (math.fsum(r[d] for r in x) / 6 - math.fsum(r[d] for r in y) / 13) ** 2 for d in range(5)
            )
        ),
    }
    for block in (2048, 4, 1):
        found = geometry_metrics(
            torch.tensor(x).double(), torch.tensor(y).double(), torch.tensor(owner), block=block
        )
        assert found == pytest.approx(expected, abs=1e-6)
        exact = geometry_metrics(unit(6, 5, 0), unit(13, 5, 1), torch.tensor(owner), block=block)
        assert exact == pytest.approx(expected, abs=1e-12)


def test_one_point_is_perfectly_aligned_and_least_uniform():
    x = unit(1, 8, 2).repeat(4, 1)
    assert geometry_metrics(x, x, torch.arange(4)) == pytest.approx(
        {"align_l2": 0, "uniform_i": 0, "uniform_t": 0, "uniform_it": 0, "modality_gap": 0}, abs=1e-12
    )


def test_needs_two_images_and_finite_features():
    with pytest.raises(ValueError, match="at least two images"):
        geometry_metrics(unit(1, 4, 0), unit(2, 4, 1), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="non-finite"):
        geometry_metrics(unit(2, 4, 0) / 0, unit(2, 4, 1), torch.tensor([0, 1]))


def test_consistency_equals_a_vote_counted_by_hand():
    images, weights, train = unit(40, 6, 3), unit(4, 6, 4), unit(60, 6, 5)
    labels = torch.randint(0, 4, (60,), generator=torch.Generator().manual_seed(6))
    agree = dict.fromkeys((1, 3, 5, 10), 0)
    for x in images.tolist():
        dot = lambda row: math.fsum(a * b for a, b in zip(x, row, strict=True))
        zero_shot = max(range(4), key=lambda c: dot(weights[c].tolist()))
        nearest = sorted(range(60), key=lambda j: -dot(train[j].tolist()))
        for k in agree:
            votes = Counter(int(labels[j]) for j in nearest[:k])
            # Counter keeps the order of first sight, and max takes the first of equals: the nearest image's
            # class.
            agree[k] += max(votes, key=votes.get) == zero_shot
    expected = {f"consistency@{k}": count / 40 for k, count in agree.items()}
    assert consistency_scores(images, weights, train, labels) == pytest.approx(expected)
    assert 0 < expected["consistency@1"] < 1


def test_a_tied_vote_goes_to_the_nearer_class():
    assert majority(torch.tensor([[2, 1, 1, 2], [3, 0, 0, 1], [5, 4, 3, 2]])).tolist() == [2, 0, 5]


def test_consistency_needs_as_many_training_images_as_neighbours():
    with pytest.raises(ValueError, match="k = 10 needs as many training images; got 9"):
        consistency_scores(unit(2, 4, 0), unit(2, 4, 1), unit(9, 4, 2), torch.zeros(9, dtype=torch.long))
