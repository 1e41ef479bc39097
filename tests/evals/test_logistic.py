"""Logistic regression, probes and SentEval's protocol against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipkit.evals import linear_probe_metrics
from clipkit.evals.logistic import fit_logistic, predict_logistic
from clipkit.evals.transfer import SMALL_GRID, dev_accuracy, fold_masks, kfold_predict, nested_accuracy

sklearn = pytest.importorskip("sklearn")
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold


def blobs(n: int, dim: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    return (centres[labels] + 2 * torch.randn(n, dim, generator=generator)).double(), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_every_problem_of_a_batch_equals_its_own_fit(classes):
    x, y = blobs(150, 6, classes, 0)
    weight = torch.ones(4, 150)
    weight[1, ::3], weight[3, :60] = 0, 0
    C = [0.01, 1.0, 30.0, 1.0]
    weights, bias = fit_logistic(x, y, C=C, weight=weight, tolerance=1e-8)
    for p in range(4):
        rows = weight[p] > 0
        peer = LogisticRegression(C=C[p], tol=1e-10, max_iter=5000).fit(x[rows].numpy(), y[rows].numpy())
        difference = weights[p] if classes > 2 else weights[p][:, 1:]
        assert np.abs(difference.T.numpy() - peer.coef_).max() < 1e-4
        assert (predict_logistic(x, weights, bias)[p].numpy() == peer.predict(x.numpy())).mean() > 0.99


def test_probe_equals_scikit_learn_at_the_chosen_strength():
    x, y = blobs(300, 8, 3, 2)
    test_x, test_y = blobs(200, 8, 3, 3)
    found = linear_probe_metrics(x, y, test_x, test_y)
    peer = LogisticRegression(C=found["C"], tol=1e-8, max_iter=5000).fit(x.numpy(), y.numpy())
    predicted = torch.from_numpy(peer.predict(test_x.numpy()))
    assert found["top1"] == pytest.approx(float((predicted == test_y).double().mean()), abs=0.005)
    per_class = [float((predicted[test_y == c] == c).double().mean()) for c in range(3)]
    assert found["mean_per_class"] == pytest.approx(sum(per_class) / 3, abs=0.01)


def test_probe_refuses_features_that_are_not_finite_and_too_few_images():
    x, y = blobs(30, 4, 3, 4)
    with pytest.raises(ValueError, match="train features has non-finite"):
        linear_probe_metrics(x * float("inf"), y, x, y)
    with pytest.raises(ValueError, match="five or more"):
        linear_probe_metrics(x[:3], torch.tensor([0, 1, 2]), x, y)


def fit(x, y, C):
    return LogisticRegression(C=C, tol=1e-8, max_iter=5000).fit(x, y)


def splits(y, folds):
    return StratifiedKFold(folds, shuffle=True, random_state=1111).split(np.zeros(len(y)), y)


def best_strength(x, y, grid, folds):
    means = [np.mean([fit(x[a], y[a], C).score(x[b], y[b]) for a, b in splits(y, folds)]) for C in grid]
    return grid[int(np.argmax(means))]


def test_folds_are_those_of_senteval():
    y = blobs(60, 2, 3, 8)[1]
    expected = [sorted(test.tolist()) for _, test in splits(y.numpy(), 5)]
    assert [torch.nonzero(mask).squeeze(1).tolist() for mask in fold_masks(y, 5)] == expected


def test_senteval_protocol_equals_scikit_learn_loops():
    x, y = blobs(160, 5, 2, 5)
    X, Y = x.numpy(), y.numpy()
    expected = []
    for train, test in splits(Y, 4):
        C = best_strength(X[train], Y[train], SMALL_GRID, 4)
        expected.append(100 * fit(X[train], Y[train], C).score(X[test], Y[test]))
    assert nested_accuracy(x, y, folds=4) == pytest.approx(np.mean(expected), abs=0.7)
    test_x, test_y = blobs(400, 5, 2, 6)
    C = best_strength(X, Y, [2.0**t for t in range(-1, 6)], 4)
    agree = kfold_predict(x, y, test_x, folds=4).numpy() == fit(X, Y, C).predict(test_x.numpy())
    assert agree.mean() > 0.99
    dev = blobs(100, 5, 2, 7)
    scores = [fit(X, Y, C).score(dev[0].numpy(), dev[1].numpy()) for C in SMALL_GRID]
    peer = fit(X, Y, SMALL_GRID[int(np.argmax(scores))]).score(test_x.numpy(), test_y.numpy())
    assert dev_accuracy((x, y), dev, (test_x, test_y)) == pytest.approx(100 * peer, abs=0.5)
