import math

import pytest
import torch

from clipkit.losses import Sigmoid


@pytest.fixture
def bias():
    return torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_equals_the_papers_double_sum(unit, dots, scale, bias, rows, impl):
    x, y = unit(rows, 5, 1), unit(rows, 5, 2)
    s, total = dots(x, y), 0.0
    for i in range(rows):
        for j in range(rows):
            z = 1 if i == j else -1
            total -= math.log(1 / (1 + math.exp(-z * (7.0 * s[i][j] - 3.0))))
    assert Sigmoid(impl=impl)(x, y, scale, bias).item() == pytest.approx(total / rows, rel=1e-12)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("same_ids", ["positive", "mask"])
def test_rows_that_share_an_id_are_positives_or_left_out(unit, dots, scale, bias, same_ids, impl):
    x, y, ids = unit(6, 5, 1), unit(6, 5, 2), [5, 1, 5, 5, 0, 1]
    s, total = dots(x, y), 0.0
    for i in range(6):
        for j in range(6):
            if i != j and ids[i] == ids[j] and same_ids == "mask":
                continue
            z = 1 if ids[i] == ids[j] else -1
            total += math.log1p(math.exp(-z * (7.0 * s[i][j] - 3.0)))
    loss = Sigmoid(same_ids=same_ids, impl=impl)
    found = loss(x, y, scale, bias, pair_ids=torch.tensor(ids))
    assert found.item() == pytest.approx(total / 6, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda *inputs: loss(*inputs, pair_ids=torch.tensor([0, 1, 0, 2])),
        (unit(4, 3, 1), unit(4, 3, 2), scale, bias),
    )


def test_equals_open_clips_loss_with_the_same_positional_arguments(unit, scale, bias):
    theirs = pytest.importorskip("open_clip.loss").SigLipLoss()(unit(6, 8, 1), unit(6, 8, 2), scale, bias)
    assert Sigmoid()(unit(6, 8, 1), unit(6, 8, 2), scale, bias).item() == pytest.approx(
        theirs.item(), rel=1e-12
    )


def test_does_not_see_the_order_of_pairs(unit, scale, bias):
    x, y, order = unit(5, 4, 1), unit(5, 4, 2), torch.tensor([3, 0, 4, 1, 2])
    assert Sigmoid()(x[order], y[order], scale, bias).item() == pytest.approx(
        Sigmoid()(x, y, scale, bias).item(), rel=1e-12
    )


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_gradcheck(unit, scale, bias, impl):
    assert torch.autograd.gradcheck(Sigmoid(impl=impl), (unit(4, 3, 1), unit(4, 3, 2), scale, bias))


def test_says_where_the_bias_comes_from(unit, scale):
    with pytest.raises(ValueError, match="init_logit_bias"):
        Sigmoid()(unit(4, 3, 1), unit(4, 3, 2), scale, None)


def test_refuses_different_shapes_and_raw_features(unit, scale, bias):
    with pytest.raises(ValueError, match="same shape"):
        Sigmoid()(unit(4, 3), unit(5, 3), scale, bias)
    with pytest.raises(ValueError, match="image_features must have unit norm"):
        Sigmoid()(unit(4, 3) * 2, unit(4, 3), scale, bias)
