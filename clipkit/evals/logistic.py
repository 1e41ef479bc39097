"""Multinomial logistic regression, many problems at once: folds and regularisation strengths share each pass.

Every problem p minimises scikit-learn's objective over its own rows,

    1/2 ||W_p||^2 + C_p * sum_i weight_p,i * CE(x_i W_p + b_p, y_i)          (bias not penalised)

(two classes share one logit, as there: the first class's column of W_p is zero)
by L-BFGS (Nocedal and Wright, 2006, algorithm 7.5) with a backtracking step a problem, in torch alone and on
any device. On a CPU scikit-learn's warm-started LogisticRegressionCV takes a third of the time
(benchmarks/results, evals).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    *,
    C: Tensor | list[float],
    weight: Tensor | None = None,
    classes: int | None = None,
    max_iter: int = 200,
    tolerance: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Fit P problems on the same rows.

    Args:
        features: (n, D); computed in its own dtype (float64 for full accuracy, float32 for speed).
        labels: (n,) int64 in 0..classes-1.
        C: (P,) inverse regularisation strengths, scikit-learn's.
        weight: (P, n), 1 where a row takes part in a problem and 0 where it does not; None: every row in
            each.
        tolerance: stop when no entry of the gradient of the mean objective is larger.

    Returns:
        W (P, D, classes) and b (P, classes).
    """
    n, dim = features.shape
    classes = int(labels.max()) + 1 if classes is None else classes
    C = torch.as_tensor(C, dtype=features.dtype, device=features.device)
    if weight is None:
        weight = torch.ones(len(C), n, dtype=features.dtype, device=features.device)
    weight = weight.to(features.dtype)
    if weight.shape != (len(C), n):
        raise ValueError(f"weight must be (problems, rows) = ({len(C)}, {n}); got {tuple(weight.shape)}")
    rows = weight.sum(1).clamp(min=1)
    # Dividing by C * rows turns the sum into a mean: one tolerance for every problem.
    penalty = 1 / (C * rows)
    mean_weight = (weight / rows[:, None]).T.contiguous()
    x = torch.cat([features, features.new_ones(n, 1)], dim=1)
    problems = len(C)
    binary = classes == 2
    target = (
        labels[:, None].to(features.dtype)
        if binary
        else F.one_hot(labels, classes).to(features.dtype)[:, :, None]
    )

    # Problems stand last everywhere: softmax over a short middle dimension then runs along contiguous memory.
    def objective(theta: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ theta.reshape(dim + 1, -1)
        if binary:
            loss = ((F.softplus(logits) - target * logits) * mean_weight).sum(0)
            residual = (logits.sigmoid() - target).mul_(mean_weight)
        else:
            log_probability = logits.reshape(n, classes, problems).log_softmax(1)
            own = log_probability.gather(1, labels[:, None, None].expand(n, 1, problems)).squeeze(1)
            loss = -(own * mean_weight).sum(0)
            residual = log_probability.exp_().sub_(target).mul_(mean_weight[:, None]).reshape(n, -1)
        gradient = (x.T @ residual).reshape(theta.shape)
        shrink = theta * penalty
        shrink[-1] = 0
        return loss + 0.5 * (theta * shrink).sum((0, 1)), gradient + shrink

    columns = 1 if binary else classes
    theta = _lbfgs(objective, x.new_zeros(dim + 1, columns, problems), max_iter=max_iter, tolerance=tolerance)
    if binary:
        theta = torch.cat([torch.zeros_like(theta), theta], dim=1)
    return theta[:-1].permute(2, 0, 1), theta[-1].T


def predict_logistic(features: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """(P, n) int64 predicted classes of (n, D) features under P fitted problems."""
    return (torch.einsum("nd,pdk->pnk", features, weights) + bias[:, None]).argmax(2)


def _lbfgs(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    theta: Tensor,
    *,
    max_iter: int,
    tolerance: float,
    memory: int = 10,
) -> Tensor:
    """Minimise P independent smooth problems; `objective(theta (..., P)) -> (value (P,), gradient (..., P))`."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(tuple(range(a.ndim - 1)))

    value, gradient = objective(theta)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    for _ in range(max_iter):
        # A problem that is done stands still: near its minimum, rounding would send the search below halving
        # for ever.
        active = gradient.abs().amax(tuple(range(gradient.ndim - 1))) > tolerance
        if not bool(active.any()):
            break
        direction = gradient
        coefficients = []
        for s, g in zip(reversed(steps), reversed(changes), strict=True):
            curvature = inner(s, g)
            alpha = torch.where(curvature > 0, inner(s, direction) / curvature.clamp(min=1e-300), 0)
            direction = direction - alpha * g
            coefficients.append(alpha)
        if steps:
            size = inner(changes[-1], changes[-1])
            direction = direction * torch.where(
                size > 0, inner(steps[-1], changes[-1]) / size.clamp(min=1e-300), 1
            )
        for s, g, alpha in zip(steps, changes, reversed(coefficients), strict=True):
            curvature = inner(s, g)
            beta = torch.where(curvature > 0, inner(g, direction) / curvature.clamp(min=1e-300), 0)
            direction = direction + (alpha - beta) * s
        slope = inner(gradient, direction)
        # A problem whose memory misleads it goes downhill.
        direction = torch.where(slope > 0, direction, gradient)
        slope = torch.where(slope > 0, slope, inner(gradient, gradient))
        length = active.to(theta.dtype)
        for _ in range(20):
            trial = theta - length * direction
            trial_value, trial_gradient = objective(trial)
            short = active & (trial_value > value - 1e-4 * length * slope)
            if not bool(short.any()):
                break
            length = torch.where(short, length / 2, length)
        else:
            # Rounding hides any further descent of these problems: they stay where they are.
            trial = torch.where(short, theta, trial)
            trial_value = torch.where(short, value, trial_value)
            trial_gradient = torch.where(short, gradient, trial_gradient)
        if bool((trial == theta).all()):
            break
        s, g = trial - theta, trial_gradient - gradient
        theta, value, gradient = trial, trial_value, trial_gradient
        steps, changes = [*steps, s][-memory:], [*changes, g][-memory:]
    return theta
