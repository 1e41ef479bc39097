import copy
import math

import pytest
import torch

from clipkit.losses import FastCLIP, InfoLOOB

EPS, RHO = 1e-3, 2.0
# The state is float32 in any module, and log u is remembered to one part in 1e7.
REMEMBERED = 1e-6


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
        assert found == pytest.approx(objective(u1, u2, 7.0), rel=REMEMBERED)
    for sample, (u1, u2) in remembered.items():
        assert loss.log_u1[sample].exp().item() == pytest.approx(u1, rel=REMEMBERED)
        assert loss.log_u2[sample].exp().item() == pytest.approx(u2, rel=REMEMBERED)
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
    u = [log_u[index].double().exp() for log_u in (loss.log_u1, loss.log_u2)]
    t = 1 / scale
    estimator = sum((t.detach() * value / (EPS + average)).mean() / 2 for value, average in zip(g, u))
    estimator = estimator + t * (sum((EPS + average).log().mean() / 2 for average in u) + RHO)
    for a, b in zip(found, torch.autograd.grad(estimator, (x, y, scale))):
        assert (a - b).norm() < REMEMBERED * b.norm()


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
        assert loss.log_u1[0].exp().item() == pytest.approx(u1, rel=REMEMBERED)


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
    "settings",
    [
        {"gamma": 0.0},
        {"gamma": 1.5},
        {"rho": -1.0},
        {"eps": 0.0},
        {"num_samples": 0},
        {"num_texts": 0},
        {"temperature_gradient": "paper"},
    ],
)
def test_refuses_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        FastCLIP(**settings)


def temperature_slopes(dots, x, y, scale, rho):
    """dL/dt at gamma = 1 by the docstring's two formulas, from KL and log g of every row, by loops."""
    s, n = dots(x, y), len(x)
    divergences, logs = [], []
    for gaps in (
        *([scale * (s[i][j] - s[i][i]) for j in range(n) if j != i] for i in range(n)),
        *([scale * (s[j][i] - s[i][i]) for j in range(n) if j != i] for i in range(n)),
    ):
        total = math.fsum(math.exp(gap) for gap in gaps)
        chances = [math.exp(gap) / total for gap in gaps]
        divergences.append(math.fsum(p * math.log(p * len(gaps)) for p in chances))
        logs.append(math.log(total / len(gaps)))
    kl, log_g = sum(divergences) / len(divergences), sum(logs) / len(logs)
    return {"objective": rho - kl, "released_code": rho - 2 * kl - log_g}


@pytest.mark.parametrize("kind", ["objective", "released_code"])
@pytest.mark.parametrize("value", [2.0, 7.0, 40.0])
def test_the_temperatures_gradient_is_the_one_named(unit, dots, kind, value):
    x, y = unit(6, 4, 1), unit(6, 4, 2)
    scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    loss = FastCLIP(gamma=1.0, rho=1.3, eps=1e-300, temperature_gradient=kind).double()
    loss(x, y, scale, torch.arange(6)).backward()
    # dL/dt = -scale^2 dL/dscale
    slope = temperature_slopes(dots, x, y, value, 1.3)[kind]
    assert -(value**2) * scale.grad.item() == pytest.approx(slope, rel=1e-9)


def test_the_two_temperature_gradients_differ_in_sign_somewhere_and_leave_features_alone(unit):
    found = {}
    for kind in ("objective", "released_code"):
        x, y = unit(6, 4, 1), unit(6, 4, 2)
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        loss = FastCLIP(gamma=1.0, rho=0.6, temperature_gradient=kind).double()
        found[kind] = torch.autograd.grad(loss(x, y, scale, torch.arange(6)), (x, y, scale))
    (x, y, scale), (other_x, other_y, other) = found.values()
    assert torch.equal(x, other_x) and torch.equal(y, other_y)
    assert scale * other < 0


def test_released_code_is_g_built_from_both_sides_with_the_scale_in_each(unit, scale):
    """Own anchors against detached candidates, then detached anchors against own candidates, halved."""
    x, y = unit(5, 4, 1), unit(5, 4, 2)
    t, total = 1 / scale, 0
    for a, b in ((x, y), (y, x)):
        for anchor, candidate in ((a, b.detach()), (a.detach(), b)):
            # The positive is an anchor's own: it takes part where the anchors do.
            positive = (a * b).sum(1) if anchor is a else (a * b).sum(1).detach()
            gaps = scale * (anchor @ candidate.T - positive[:, None])
            g = (gaps.exp().sum(1) - gaps.exp().diagonal()) / 4
            total = total + (t.detach() * g / g.detach()).mean() / 2
            total = total + t * g.detach().log().mean() / 4
    total = total + RHO * t
    found = FastCLIP(gamma=1.0, rho=RHO, eps=1e-300, temperature_gradient="released_code").double()
    found = torch.autograd.grad(found(x, y, scale, torch.arange(5)), scale)[0]
    assert found.item() == pytest.approx(torch.autograd.grad(total, scale)[0].item(), rel=1e-12)


@pytest.mark.parametrize(
    "where, poison",
    [
        ("image_features", math.nan),
        ("text_features", math.nan),
        ("logit_scale", math.nan),
        ("logit_scale", math.inf),
    ],
)
def test_a_batch_that_is_not_finite_leaves_no_trace(unit, scale, where, poison):
    """Before it, between and after it the state is what it is without it."""
    clean, poisoned = (FastCLIP(gamma=0.3, gamma_decay_steps=5).double() for _ in range(2))
    for step in range(3):
        batch = {
            "image_features": unit(4, 3, step).detach(),
            "text_features": unit(4, 3, step + 9).detach(),
            "logit_scale": scale.detach(),
            "sample_index": (torch.arange(4) + step) % 5,
        }
        bad = {name: value.clone() for name, value in batch.items()}
        bad[where].view(-1)[-1] = poison
        assert not poisoned(**bad).isfinite()
        assert torch.equal(clean(**batch), poisoned(**batch))
    for name, value in clean.state_dict().items():
        assert torch.equal(value, poisoned.state_dict()[name]), name


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_entry_starts_afresh(unit, scale, poison):
    fresh, mended = FastCLIP().double(), FastCLIP(num_samples=4).double()
    mended.log_u1.fill_(poison)
    mended.log_u2.fill_(poison)
    batch = unit(4, 3, 1), unit(4, 3, 2), scale, torch.arange(4)
    assert torch.equal(fresh(*batch), mended(*batch))
    assert torch.equal(fresh.log_u1, mended.log_u1) and mended.log_u2.isfinite().all()


@pytest.mark.parametrize(
    "move",
    [
        lambda loss: loss.to(torch.bfloat16),
        lambda loss: loss.to("cpu", torch.float16),
        lambda loss: loss.half(),
        lambda loss: loss.double(),
        lambda loss: torch.nn.ModuleList([loss]).bfloat16()[0],
    ],
)
def test_the_state_is_float32_whatever_type_the_module_is_moved_to(move):
    """Logarithms up to 200 at scale 100: bfloat16 would keep them to .5."""
    x, y = torch.eye(2), -torch.eye(2)
    batch = x, y, torch.tensor(100.0), torch.arange(2)
    loss = FastCLIP(num_samples=3)
    loss(*batch)
    before = copy.deepcopy(loss.state_dict())
    moved = move(loss)
    for name, value in moved.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    again = FastCLIP(num_samples=3)
    again.load_state_dict(before)
    assert torch.equal(moved(*batch), again(*batch))


def test_texts_with_numbers_of_their_own_remember_their_own_denominators(unit, dots, scale):
    """Image 0 comes with text 5, then with text 6: u1 is the image's, u2 the text's."""
    loss = FastCLIP(gamma=0.3, rho=RHO, eps=EPS).double()
    images, texts = {}, {}
    for step, (index, text) in enumerate([([0, 1, 2], [5, 1, 3]), ([2, 0, 1], [3, 6, 7])]):
        x, y = unit(3, 4, 2 * step), unit(3, 4, 2 * step + 1)
        for remembered, numbers, g in zip((images, texts), (index, text), inner(dots, x, y, 7.0)):
            for row, sample in enumerate(numbers):
                old = remembered.get(sample)
                remembered[sample] = g[row] if old is None else 0.7 * old + 0.3 * g[row]
        found = loss(x, y, scale, torch.tensor(index), text_index=torch.tensor(text)).item()
        expected = objective([images[i] for i in index], [texts[i] for i in text], 7.0)
        assert found == pytest.approx(expected, rel=REMEMBERED)
    assert loss.log_u1.isfinite().sum() == 3 and loss.log_u2.isfinite().sum() == 5


def test_sizes_of_both_sides_are_kept_apart(unit, scale):
    loss = FastCLIP(num_samples=2, num_texts=9).double()
    batch = unit(2, 3, 1), unit(2, 3, 2), scale, torch.arange(2)
    assert loss(*batch, text_index=torch.tensor([8, 4])).isfinite()
    assert (len(loss.log_u1), len(loss.log_u2)) == (2, 9)
    with pytest.raises(ValueError, match="text_index goes from 4 to 9, but fastclip has num_texts=9"):
        loss(*batch, text_index=torch.tensor([9, 4]))
    with pytest.raises(ValueError, match="num_texts without num_samples"):
        FastCLIP(num_texts=3)
