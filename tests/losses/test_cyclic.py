import pytest
import torch

from clipkit.losses import CyclicGeometry


def by_loops(x, y, dots, in_modal: float, cross_modal: float) -> float:
    """The two sums of squares of the paper, without their 1/N."""
    images, texts, across = dots(x, x), dots(y, y), dots(x, y)
    n, total = len(images), 0.0
    for j in range(n):
        for k in range(n):
            total += (
                in_modal * (images[j][k] - texts[j][k]) ** 2
                + cross_modal * (across[j][k] - across[k][j]) ** 2
            )
    return total


@pytest.mark.parametrize("rows, dim", [(3, 5), (7, 4), (5, 1)])
@pytest.mark.parametrize("weights", [(0.25, 0.25), (1.0, 0.0), (0.0, 2.0)])
def test_equals_the_papers_double_sum(unit, dots, rows, dim, weights):
    x, y = unit(rows, dim, 1), unit(rows, dim, 2)
    in_modal, cross_modal = weights
    expected = by_loops(x, y, dots, in_modal, cross_modal)
    loss = CyclicGeometry(in_modal=in_modal, cross_modal=cross_modal)
    assert loss(x, y).item() == pytest.approx(expected / rows, rel=1e-12, abs=1e-14)
    loss = CyclicGeometry(in_modal=in_modal, cross_modal=cross_modal, normalize="mean")
    assert loss(x, y).item() == pytest.approx(expected / rows**2, rel=1e-12, abs=1e-14)


def test_gradient_equals_the_dense_definitions(unit):
    x, y = unit(30, 12, 1), unit(30, 12, 2)
    dense = ((x @ x.T - y @ y.T) ** 2).sum() * 0.25 / 30 + ((x @ y.T - y @ x.T) ** 2).sum() * 0.25 / 30
    ours = CyclicGeometry()(x, y)
    assert ours.item() == pytest.approx(dense.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, y)), torch.autograd.grad(dense, (x, y))):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_a_quarter_at_128_pairs_is_32_of_the_mean(unit):
    x, y = unit(128, 6, 1), unit(128, 6, 2)
    paper = CyclicGeometry(in_modal=0.25, cross_modal=0.25)(x, y)
    mean = CyclicGeometry(in_modal=32.0, cross_modal=32.0, normalize="mean")(x, y)
    assert paper.item() == pytest.approx(mean.item(), rel=1e-12)


def test_is_zero_when_both_geometries_agree(unit):
    x = unit(6, 4, 1)
    # A symmetric orthogonal matrix (a reflection) keeps both cycles; any other rotation the in-modal one
    # alone.
    v = unit(1, 4, 3).detach()
    reflection = torch.eye(4, dtype=torch.float64) - 2 * v.T @ v
    assert CyclicGeometry()(x, x @ reflection).item() == pytest.approx(0.0, abs=1e-14)
    turn = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    assert CyclicGeometry(cross_modal=0.0)(x, x @ turn).item() == pytest.approx(0.0, abs=1e-14)
    assert CyclicGeometry(in_modal=0.0)(x, x @ turn).item() > 1e-2


def test_is_never_negative_though_rounding_may_be(unit):
    """A reflection keeps this cycle: exactly zero, and below zero in fp32 for half of these seeds."""
    loss = CyclicGeometry(in_modal=0.0)
    for seed in range(20):
        x, v = unit(50, 16, seed, torch.float32), unit(1, 16, 100 + seed, torch.float32)
        value = loss(x, x - 2 * (x @ v.T) * v)
        assert 0.0 <= value.item() < 1e-5
        assert torch.autograd.grad(value, x)[0].isfinite().all()


def test_fp32_gradient_keeps_its_digits_near_convergence(unit):
    """At ||x - y|| of 1e-3 a dense fp32 gradient is off by 2e-4; U and V take the difference first."""
    x = unit(200, 64, 1).detach()
    y = torch.nn.functional.normalize(
        x + 1e-3 / 8 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        dim=-1,
    )
    x32, y32 = x.float().requires_grad_(), y.float().requires_grad_()
    x64, y64 = x32.detach().double().requires_grad_(), y32.detach().double().requires_grad_()
    exact = ((x64 @ x64.T - y64 @ y64.T) ** 2).sum() * 0.25 / 200 + (
        (x64 @ y64.T - y64 @ x64.T) ** 2
    ).sum() * 0.25 / 200
    wanted = torch.autograd.grad(exact, x64)[0]
    found = torch.autograd.grad(CyclicGeometry()(x32, y32), x32)[0]
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_gradcheck(unit):
    assert torch.autograd.gradcheck(
        CyclicGeometry(in_modal=0.3, cross_modal=0.7), (unit(4, 3, 1), unit(4, 3, 2))
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"in_modal": -1.0}, "in_modal"),
        ({"in_modal": 0.0, "cross_modal": 0.0}, "always be zero"),
        ({"normalize": "means"}, "Did you mean 'mean'"),
    ],
)
def test_refuses_settings_that_cannot_teach(settings, message):
    with pytest.raises(ValueError, match=message):
        CyclicGeometry(**settings)


def test_refuses_different_shapes_and_raw_features(unit):
    with pytest.raises(ValueError, match="same shape"):
        CyclicGeometry()(unit(4, 3), unit(4, 2))
    with pytest.raises(ValueError, match="unit norm"):
        CyclicGeometry()(unit(4, 3) * 2, unit(4, 3))
