import math

import pytest
import torch

from clipkit.losses import SimCSE


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_equals_equation_4(unit, dots, impl, temperature):
    h, h2 = unit(5, 4, 1), unit(5, 4, 2)
    s = dots(h, h2)
    expected = -sum(
        math.log(math.exp(s[i][i] / temperature) / sum(math.exp(s[i][j] / temperature) for j in range(5)))
        for i in range(5)
    )
    assert SimCSE(temperature=temperature, impl=impl)(h, h2).item() == pytest.approx(expected / 5, rel=1e-12)


def test_looks_in_one_direction_only(unit):
    h, h2 = unit(5, 4, 1), unit(5, 4, 2)
    assert SimCSE()(h, h2).item() != pytest.approx(SimCSE()(h2, h).item(), rel=1e-3)


def test_the_head_is_a_linear_layer_with_tanh_on_both_views(unit):
    h, h2 = unit(5, 4, 1).detach(), unit(5, 4, 2).detach()
    loss = SimCSE(head=True, embed_dim=4).double()
    with torch.no_grad():
        loss.head.bias.fill_(0.3)
    weight, bias = loss.head.weight.tolist(), loss.head.bias.tolist()

    def project(row):
        hidden = [math.tanh(sum(w * 2.0 * x for w, x in zip(ws, row)) + b) for ws, b in zip(weight, bias)]
        norm = math.sqrt(sum(value**2 for value in hidden))
        return [value / norm for value in hidden]

    a, b = (torch.tensor([project(row) for row in view.tolist()], dtype=torch.float64) for view in (h, h2))
    assert loss(h, h2).item() == pytest.approx(SimCSE()(a, b).item(), rel=1e-10)


def test_the_head_is_a_parameter_that_learns(unit):
    loss = SimCSE(head=True, embed_dim=4).double()
    loss(unit(5, 4, 1), unit(5, 4, 2)).backward()
    assert loss.head.weight.grad.norm() > 0
    assert not list(SimCSE().parameters())


def test_identical_views_are_an_error_that_names_dropout(unit):
    h = unit(5, 4, 1)
    with pytest.raises(ValueError, match="identical.*text_tower.dropout"):
        SimCSE()(h, h.detach().clone())


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_gradcheck(unit, impl):
    assert torch.autograd.gradcheck(SimCSE(temperature=0.3, impl=impl), (unit(4, 3, 1), unit(4, 3, 2)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), "cold"])
def test_refuses_a_temperature_that_is_no_positive_number(temperature):
    with pytest.raises(ValueError, match="temperature"):
        SimCSE(temperature=temperature)


def test_a_head_needs_the_features_width(unit):
    with pytest.raises(ValueError, match="embed_dim"):
        SimCSE(head=True)
    with pytest.raises(ValueError, match="embed_dim=6.*4 wide"):
        SimCSE(head=True, embed_dim=6)(unit(5, 4, 1).float(), unit(5, 4, 2).float())
