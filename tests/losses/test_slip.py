import math

import pytest
import torch

from clipkit.losses import SLIP


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_equals_simclrs_equation_1_over_all_views(unit, dots, impl, rows):
    first, second, t = unit(rows, 4, 1), unit(rows, 4, 2), 0.3
    views = torch.cat([first, second])
    s, total = dots(views, views), 0.0
    for i in range(2 * rows):
        partner = (i + rows) % (2 * rows)
        denominator = sum(math.exp(s[i][k] / t) for k in range(2 * rows) if k != i)
        total -= math.log(math.exp(s[i][partner] / t) / denominator)
    assert SLIP(temperature=t, impl=impl)(first, second).item() == pytest.approx(
        total / (2 * rows), rel=1e-12, abs=1e-14
    )


def test_does_not_see_which_view_came_first(unit):
    first, second = unit(5, 4, 1), unit(5, 4, 2)
    assert SLIP()(first, second).item() == pytest.approx(SLIP()(second, first).item(), rel=1e-12)


def test_the_head_is_a_parameter_that_learns(unit):
    loss = SLIP(head=True, embed_dim=4, hidden_dim=6, output_dim=3).double()
    loss(unit(5, 4, 1), unit(5, 4, 2)).backward()
    assert len(list(loss.parameters())) == 6 and all(p.grad.isfinite().all() for p in loss.parameters())
    assert not list(SLIP().parameters())


def test_gradcheck(unit):
    assert torch.autograd.gradcheck(SLIP(temperature=0.5), (unit(3, 3, 1), unit(3, 3, 2)))


def test_refuses_identical_views_and_a_head_of_another_width(unit):
    x = unit(4, 3)
    with pytest.raises(ValueError, match="identical.*data.augmentation"):
        SLIP()(x, x.detach().clone())
    with pytest.raises(ValueError, match="embed_dim"):
        SLIP(head=True)
    with pytest.raises(ValueError, match="embed_dim=5.*3 wide"):
        SLIP(head=True, embed_dim=5, hidden_dim=4)(unit(4, 3, 1).float(), unit(4, 3, 2).float())
