import math

import pytest
import torch

from clipkit.losses import Uniformity


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("t", [2.0, 0.5])
def test_is_the_log_mean_gaussian_potential_of_distinct_rows(unit, impl, t):
    x, n = unit(5, 4, 1), 5
    rows, total = x.tolist(), 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += math.exp(-t * sum((a - b) ** 2 for a, b in zip(rows[i], rows[j])))
    loss = Uniformity(of=["text_features"], t=t, impl=impl)
    assert loss(text_features=x).item() == pytest.approx(math.log(total / (n * (n - 1))), rel=1e-12)


def test_equals_the_papers_pdist(unit):
    x = unit(7, 4, 1)
    expected = torch.pdist(x, p=2).pow(2).mul(-2).exp().mean().log()
    assert Uniformity(of="image_features")(image_features=x).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_averages_the_named_features(unit):
    x, y = unit(5, 4, 1), unit(5, 4, 2)
    one = Uniformity(of=["image_features"])(image_features=x) + Uniformity(of=["text_features"])(
        text_features=y
    )
    assert Uniformity()(image_features=x, text_features=y).item() == pytest.approx(one.item() / 2, rel=1e-12)


def test_is_zero_when_all_rows_are_one(unit):
    x = unit(1, 4, 1).detach().expand(6, 4)
    assert Uniformity(of="text_features")(text_features=x).item() == pytest.approx(0.0, abs=1e-12)


def test_gradcheck(unit):
    loss = Uniformity(of="text_features")
    assert torch.autograd.gradcheck(lambda x: loss(text_features=x), (unit(4, 3, 1),))


def test_refuses_other_names_and_a_row_alone(unit):
    with pytest.raises(ValueError, match="of image_features, text_features got text_features"):
        Uniformity()(text_features=unit(4, 3))
    with pytest.raises(ValueError, match="at least 2"):
        Uniformity(of="text_features")(text_features=unit(1, 3))
    with pytest.raises(ValueError, match="one or more"):
        Uniformity(of=[])
