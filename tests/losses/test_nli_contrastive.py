import math

import pytest
import torch

from clipkit.losses import NLIContrastive


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("alpha", [1.0, 0.0, 3.0])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_equals_equation_5_and_its_weighted_form(unit, dots, impl, alpha, rows):
    h, positive, negative = unit(rows, 4, 1), unit(rows, 4, 2), unit(rows, 4, 3)
    p, n, t, total = dots(h, positive), dots(h, negative), 0.2, 0.0
    for i in range(rows):
        denominator = 0.0
        for j in range(rows):
            denominator += math.exp(p[i][j] / t) + (alpha if i == j else 1.0) * math.exp(n[i][j] / t)
        total -= math.log(math.exp(p[i][i] / t) / denominator)
    loss = NLIContrastive(temperature=t, hard_negative_weight=alpha, impl=impl)
    assert loss(h, positive, negative).item() == pytest.approx(total / rows, rel=1e-12, abs=1e-14)


def test_gradcheck(unit):
    loss = NLIContrastive(temperature=0.3, hard_negative_weight=2.0)
    assert torch.autograd.gradcheck(loss, (unit(4, 3, 1), unit(4, 3, 2), unit(4, 3, 3)))


def test_gradient_of_a_lone_triplet_is_finite(unit):
    features = [unit(1, 3, seed) for seed in (1, 2, 3)]
    NLIContrastive()(*features).backward()
    assert all(value.grad.isfinite().all() and value.grad.norm() > 0 for value in features)


def test_a_contradiction_as_near_as_the_entailment_costs_log_2(unit):
    h = unit(1, 3, 1)
    assert NLIContrastive()(h, unit(1, 3, 2), unit(1, 3, 2)).item() == pytest.approx(math.log(2), rel=1e-12)


def test_refuses_triplets_of_different_numbers_and_negative_weights(unit):
    with pytest.raises(ValueError, match="contradiction_features and premise_features"):
        NLIContrastive()(unit(4, 3, 1), unit(4, 3, 2), unit(5, 3, 3))
    with pytest.raises(ValueError, match="hard_negative_weight"):
        NLIContrastive(hard_negative_weight=-0.1)
