import copy
import math

import pytest
import torch

from clipkit.losses import FastCLIP, InfoLOOB

EPS, RHO = 1e-3, 2.0


def inner(dots, x, y, scale):
    """g1 and g2 of every row, by loops."""
    s, n = dots(x, y), len(x)
    g1 = [sum(math.exp(scale * (s[i][j] - s[i][i])) for j in range(n) if j != i) / (n - 1) for i in range(n)]
    g2 = [sum(math.exp(scale * (s[j][i] - s[i][i])) for j in range(n) if j != i) / (n - 1) for i in range(n)]
    return g1, g2


def objective(u1, u2, scale):
    logs = sum(math.log(EPS + a) + math.log(EPS + b) for a, b in zip(u1, u2))
    return logs / (2 * len(u1) * scale) + RHO / scale


def test_value_and_state_follow_the_papers_moving_average(unit, dots, scale):
    loss = FastCLIP(gamma=0.3, rho=RHO, eps=EPS).double()
    remembered = {}
    for step, index in enumerate([[4, 0, 2], [2, 9, 4], [0, 4, 9]]):
        x, y = unit(3, 4, 2 * step), unit(3, 4, 2 * step + 1)
        g1, g2 = inner(dots, x, y, 7.0)
        for row, sample in enumerate(index):
            old = remembered.get(sample)
            new = (g1[row], g2[row])
            remembered[sample] = new if old is None else tuple(0.7 * a + 0.3 * b for a, b in zip(old, new))
        u1, u2 = zip(*(remembered[sample] for sample in index))
        found = loss(x, y, scale, torch.tensor(index)).item()
        assert found == pytest.approx(objective(u1, u2, 7.0), rel=1e-12)
    for sample, (u1, u2) in remembered.items():
        assert loss.log_u1[sample].exp().item() == pytest.approx(u1, rel=1e-12)
        assert loss.log_u2[sample].exp().item() == pytest.approx(u2, rel=1e-12)
    assert loss.log_u1.isfinite().sum() == len(remembered)


def test_gradient_is_the_papers_estimator(unit, scale):
    """At fixed u: 1/N sum t/2 dg / (eps + u) for features and scale, plus dt times L / t."""
    x, y, index = unit(4, 3, 1), unit(4, 3, 2), torch.tensor([3, 1, 0, 2])
    loss = FastCLIP(gamma=0.3, rho=RHO, eps=EPS, num_samples=4).double()
    loss(unit(4, 3, 3), unit(4, 3, 4), scale, index)
    found_value = loss(x, y, scale, index)
    found = torch.autograd.grad(found_value, (x, y, scale))

    s = x @ y.T
    gap = (scale * (s - s.diagonal()[:, None])).exp(), (scale * (s.T - s.diagonal()[:, None])).exp()
    g = [(value.sum(1) - value.diagonal()) / 3 for value in gap]
    u = [log_u[index].exp() for log_u in (loss.log_u1, loss.log_u2)]
    t = 1 / scale
    estimator = sum((t.detach() * value / (EPS + average)).mean() / 2 for value, average in zip(g, u))
    estimator = estimator + t * (sum((EPS + average).log().mean() / 2 for average in u) + RHO)
    for a, b in zip(found, torch.autograd.grad(estimator, (x, y, scale))):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_with_gamma_1_it_is_infoloob_by_temperature(unit, scale):
    x, y = unit(5, 4, 1), unit(5, 4, 2)
    expected = (InfoLOOB()(x, y, scale) - math.log(4) + RHO) / scale
    found = FastCLIP(gamma=1.0, rho=RHO, eps=1e-300).double()(x, y, scale, torch.arange(5))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(torch.autograd.grad(found, (x, y, scale)), torch.autograd.grad(expected, (x, y, scale))):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_gamma_falls_along_a_cosine(unit, dots, scale):
    loss = FastCLIP(gamma=0.2, gamma_decay_steps=4, eps=EPS, rho=RHO).double()
    u1 = None
    for step in range(6):
        x, y = unit(2, 4, 2 * step), unit(2, 4, 2 * step + 1)
        g1, _ = inner(dots, x, y, 7.0)
        gamma = 0.2 + 0.8 * (1 + math.cos(math.pi * min(step, 4) / 4)) / 2
        u1 = g1[0] if u1 is None else (1 - gamma) * u1 + gamma * g1[0]
        loss(x, y, scale, torch.tensor([0, 1]))
        assert loss.log_u1[0].exp().item() == pytest.approx(u1, rel=1e-12)


def test_evaluation_leaves_the_state_alone(unit, scale):
    loss = FastCLIP().double()
    loss(unit(3, 4, 1), unit(3, 4, 2), scale, torch.arange(3))
    before = copy.deepcopy(loss.state_dict())
    loss.eval()(unit(3, 4, 3), unit(3, 4, 4), scale, torch.arange(3))
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


@pytest.mark.parametrize("num_samples", [None, 10])
def test_the_state_survives_a_checkpoint_bit_for_bit(unit, scale, tmp_path, num_samples):
    index = torch.tensor([7, 1, 4])
    loss = FastCLIP(num_samples=num_samples, gamma_decay_steps=5).double()
    loss(unit(3, 4, 1), unit(3, 4, 2), scale, index)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    again = FastCLIP(num_samples=num_samples, gamma_decay_steps=5).double()
    again.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    x, y = unit(3, 4, 3), unit(3, 4, 4)
    assert torch.equal(loss(x, y, scale, index), again(x, y, scale, index))
    assert torch.equal(loss.log_u1, again.log_u1)


def test_a_scale_of_100_stays_finite_in_fp32():
    """g spans e^200 there, beyond fp32; its logarithm does not."""
    x = torch.eye(2).requires_grad_()
    y = -torch.eye(2)
    value = FastCLIP()(x, y, torch.tensor(100.0), torch.arange(2))
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()


def test_refuses_indices_out_of_range(unit, scale):
    with pytest.raises(ValueError, match="num_samples=3"):
        FastCLIP(num_samples=3).double()(unit(2, 3, 1), unit(2, 3, 2), scale, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="-1 to 0"):
        FastCLIP().double()(unit(2, 3, 1), unit(2, 3, 2), scale, torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="at least 2 pairs"):
        FastCLIP().double()(unit(1, 3, 1), unit(1, 3, 2), scale, torch.tensor([0]))


@pytest.mark.parametrize(
    "settings", [{"gamma": 0.0}, {"gamma": 1.5}, {"rho": -1.0}, {"eps": 0.0}, {"num_samples": 0}]
)
def test_refuses_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FastCLIP(**settings)
