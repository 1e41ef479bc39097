"""Columns beyond the batch and weights of rows, against loops over the formula in float64."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from clipkit.losses import InfoLOOB, InfoNCE, NLIContrastive, Sigmoid, create_loss

N, D, K = 5, 4, 3


@pytest.fixture
def pairs(unit, scale):
    """(x, y, scale, texts (N, K, D), images (2, D))."""
    return (
        unit(N, D, 1),
        unit(N, D, 2),
        scale,
        unit(N * K, D, 3).detach().view(N, K, D),
        unit(2, D, 4).detach(),
    )


def log_sum(values):
    return math.log(sum(math.exp(value) for value in values))


def columns(dots, pairs, which):
    """Logits: [i][j], of image i and hard text h, of text i and hard image h, by plain loops."""
    x, y, scale, texts, images = (v.detach() for v in pairs)
    s = [[float(scale) * value for value in row] for row in dots(x, y)]
    hard = [[float(scale) * value for value in row] for row in dots(x, texts.flatten(0, 1))]
    if which == "own":
        hard = [row[i * K : (i + 1) * K] for i, row in enumerate(hard)]
    return s, hard, [[float(scale) * value for value in row] for row in dots(y, images)]


def given(pairs, which):
    _, _, _, texts, images = pairs
    return {
        "hard_negative_features": texts,
        "hard_negative_image_features": images[None].expand(N, 2, D) if which == "own" else images,
    }


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("which", ["group", "own"])
def test_infonce_adds_them_to_the_sums_of_the_rows_that_meet_them(dots, pairs, which, impl):
    s, hard, images = columns(dots, pairs, which)
    rows = [
        (log_sum([*s[i], *hard[i]]) + log_sum([*(s[j][i] for j in range(N)), *images[i]])) / 2 - s[i][i]
        for i in range(N)
    ]
    loss = InfoNCE(hard_negatives=which, impl=impl)
    found = loss(*pairs[:3], **given(pairs, which))
    assert found.item() == pytest.approx(sum(rows) / N, rel=1e-12)
    each = loss(*pairs[:3], **given(pairs, which), reduction="none")
    assert each.tolist() == pytest.approx(rows, rel=1e-12)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])
    found = loss(*pairs[:3], **given(pairs, which), sample_weight=weight)
    expected = sum(w * row for w, row in zip(weight.tolist(), rows)) / 4.5
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_texts_alone_are_negclips_loss(pairs):
    """Its code: `logits_per_image` over the texts and all negative texts, `logits_per_text` over the images."""
    x, y, scale, texts, _ = pairs
    labels = torch.arange(N)
    per_image = scale * x @ torch.cat([y, texts.flatten(0, 1)]).T
    expected = (F.cross_entropy(per_image, labels) + F.cross_entropy(scale * y @ x.T, labels)) / 2
    found = InfoNCE()(x, y, scale, hard_negative_features=texts)
    assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("which", ["group", "own"])
def test_smoothing_spreads_over_them_too(pairs, which):
    x, y, scale, texts, images = pairs
    labels, e = torch.arange(N), 0.2
    if which == "group":
        per_image, per_text = torch.cat([y, texts.flatten(0, 1)]), torch.cat([x, images])
        expected = F.cross_entropy(scale * x @ per_image.T, labels, label_smoothing=e)
        expected = (expected + F.cross_entropy(scale * y @ per_text.T, labels, label_smoothing=e)) / 2
    else:
        own = torch.cat([scale * x @ y.T, scale * (texts @ x[:, :, None])[..., 0]], 1)
        back = torch.cat([scale * y @ x.T, scale * y @ images.T], 1)
        expected = F.cross_entropy(own, labels, label_smoothing=e)
        expected = (expected + F.cross_entropy(back, labels, label_smoothing=e)) / 2
    found = InfoNCE(label_smoothing=e, hard_negatives=which)(x, y, scale, **given(pairs, which))
    assert torch.allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("mode", ["positive", "mask"])
def test_rows_losses_with_ids_and_smoothing_are_those_of_a_matrix_of_targets(pairs, mode):
    x, y, scale = pairs[:3]
    ids, e = torch.tensor([4, 1, 4, 2, 1]), 0.1
    same = ids[:, None] == ids[None, :]
    eye = torch.eye(N, dtype=torch.bool)
    expected = 0
    for logits in (scale * x @ y.T, scale * y @ x.T):
        kept = torch.ones_like(same) if mode == "positive" else ~same | eye
        positive = (same if mode == "positive" else eye).double()
        target = (1 - e) * positive / positive.sum(1, keepdim=True)
        target = target + e * kept / kept.sum(1, keepdim=True)
        log_softmax = logits.masked_fill(~kept, -torch.inf).log_softmax(1).masked_fill(~kept, 0.0)
        expected = expected - (target * log_softmax).sum(1) / 2
    loss = InfoNCE(label_smoothing=e, same_ids=mode)
    found = loss(x, y, scale, pair_ids=ids, reduction="none")
    assert torch.allclose(found, expected, rtol=1e-12)
    assert torch.allclose(loss(x, y, scale, pair_ids=ids), expected.mean(), rtol=1e-12)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("which", ["group", "own"])
def test_sigmoid_adds_them_as_pairs_that_do_not_match(dots, pairs, which, impl):
    s, hard, images = columns(dots, pairs, which)
    bias, plus = -2.0, lambda z: math.log1p(math.exp(z))
    rows = [
        sum(plus(-(v + bias)) if i == j else plus(v + bias) for j, v in enumerate(s[i]))
        + sum(plus(v + bias) for v in [*hard[i], *images[i]])
        for i in range(N)
    ]
    loss = Sigmoid(hard_negatives=which, impl=impl)
    found = loss(*pairs[:3], bias, **given(pairs, which), reduction="none")
    assert found.tolist() == pytest.approx(rows, rel=1e-12)
    assert loss(*pairs[:3], bias, **given(pairs, which)).item() == pytest.approx(sum(rows) / N, rel=1e-12)


def test_infoloob_leaves_the_positive_out_and_takes_them_in(dots, pairs):
    s, hard, images = columns(dots, pairs, "group")
    rows = [
        (
            log_sum([*(s[i][j] for j in range(N) if j != i), *hard[i]])
            + log_sum([*(s[j][i] for j in range(N) if j != i), *images[i]])
        )
        / 2
        - s[i][i]
        for i in range(N)
    ]
    found = InfoLOOB()(*pairs[:3], **given(pairs, "group"), reduction="none")
    assert found.tolist() == pytest.approx(rows, rel=1e-12)


def test_a_premise_may_have_several_contradictions(unit, dots):
    premise, entailed, contradicted = unit(N, D, 1), unit(N, D, 2), unit(N * K, D, 3)
    t, alpha = 0.3, 2.5
    plus, minus = dots(premise, entailed), dots(premise, contradicted)
    expected = 0.0
    for i in range(N):
        total = sum(math.exp(v / t) for v in plus[i])
        total += sum((alpha if h // K == i else 1) * math.exp(v / t) for h, v in enumerate(minus[i]))
        expected += (math.log(total) - plus[i][i] / t) / N
    loss = NLIContrastive(temperature=t, hard_negative_weight=alpha)
    found = loss(premise, entailed, contradicted.view(N, K, D))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    one = loss(premise, entailed, contradicted[:N].view(N, 1, D))
    assert one.item() == pytest.approx(loss(premise, entailed, contradicted[:N]).item(), rel=1e-14)


def test_simcses_codes_hard_negative_weight_is_the_log_of_ours(unit):
    """Its code adds the weight to the logits of own hard negatives before the cross entropy."""
    premise, entailed, contradicted = unit(N, D, 1), unit(N, D, 2), unit(N, D, 3)
    t, weight = 0.05, 0.7
    own = torch.eye(N, dtype=torch.float64) * weight
    logits = torch.cat([premise @ entailed.T / t, premise @ contradicted.T / t + own], 1)
    expected = F.cross_entropy(logits, torch.arange(N))
    loss = NLIContrastive(temperature=t, hard_negative_weight=math.exp(weight))
    assert torch.allclose(loss(premise, entailed, contradicted), expected, rtol=1e-12)


@pytest.mark.parametrize("loss", [InfoNCE(), InfoNCE(hard_negatives="own"), InfoLOOB(hard_negatives="own")])
def test_gradcheck(pairs, loss):
    which = loss.hard_negatives
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], dtype=torch.float64)

    def value(x, y, scale, texts):
        more = {**given(pairs, which), "hard_negative_features": texts, "sample_weight": weight}
        return loss(x, y, scale, **more)

    x, y, scale, texts, _ = pairs
    # Steps off the sphere stay within its tolerance.
    assert torch.autograd.gradcheck(value, (x, y, scale, texts.clone().requires_grad_()))


@pytest.mark.parametrize(
    "name, bad, told",
    [
        ("hard_negative_features", torch.zeros(N - 1, K, D), "K for each of the 5 rows"),
        ("hard_negative_features", torch.zeros(3, D + 1), "wide"),
        ("hard_negative_features", torch.zeros(3, D), "unit norm"),
        ("hard_negative_features", [1], r"\(B, D\)"),
        ("hard_negative_image_features", torch.zeros(D), r"\(B, D\)"),
        ("sample_weight", torch.ones(N, 1), r"\(5,\)"),
        ("sample_weight", -torch.ones(N), "at least 0"),
        ("sample_weight", torch.tensor([1.0, math.nan, 1, 1, 1]), "finite"),
        ("content_features", torch.zeros(3, D), "5 rows"),
    ],
)
def test_what_does_not_fit_is_refused(pairs, name, bad, told):
    with pytest.raises(ValueError, match=f"{name}.*{told}"):
        InfoNCE()(*pairs[:3], **{name: bad})


def test_own_negatives_need_a_row_each_and_a_reduction_a_name(pairs):
    with pytest.raises(ValueError, match=r'"own" needs hard_negative_features of shape \(B, K, D\)'):
        InfoNCE(hard_negatives="own")(*pairs[:3], hard_negative_features=pairs[3].flatten(0, 1))
    with pytest.raises(ValueError, match="reduction"):
        InfoNCE()(*pairs[:3], reduction="sum")


def test_a_sum_hands_them_to_the_terms_that_read_them(pairs):
    x, y, scale, texts, _ = pairs
    features = {
        "image_features": x,
        "text_features": y,
        "logit_scale": scale,
        "hard_negative_features": texts,
    }
    terms = create_loss(["infonce", "cyclic"])(features)
    assert torch.equal(terms["infonce"], InfoNCE()(x, y, scale, hard_negative_features=texts))


# Triton reads the variable as it is imported, so a process of its own.
TRITON = """
import torch
from clipkit.losses import Distill, InfoLOOB, InfoNCE, Sigmoid
from torch.nn.functional import normalize

draw = torch.Generator().manual_seed(0)
unit = lambda *shape: normalize(torch.randn(*shape, generator=draw), dim=-1).requires_grad_()
x, y, texts, images = unit(5, 8), unit(5, 8), unit(5, 2, 8), unit(3, 8)
scale, bias = torch.tensor(7.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
more = {
    "hard_negative_features": texts,
    "hard_negative_image_features": images,
    "sample_weight": torch.rand(5, generator=draw),
}
ids = {"pair_ids": torch.tensor([0, 1, 0, 2, 3])}
teacher = (unit(5, 3).detach(), unit(5, 3).detach(), 3.0)
for loss, args, given in (
    (InfoNCE, (x, y, scale), {**more, **ids}),
    (Sigmoid, (x, y, scale, bias), {**more, **ids}),
    (InfoLOOB, (x, y, scale), more),
    (Distill, (x, y, scale, *teacher), {}),
):
    settings = {"same_ids": "mask"} if "pair_ids" in given else {}
    values = [loss(impl=impl, **settings)(*args, **given) for impl in ("dense", "triton")]
    of = (x, y, scale, *((texts, images) if given else ()))
    found = [(value, *torch.autograd.grad(value, of)) for value in values]
    for dense, triton in zip(*found):
        error = float(((dense - triton).norm() / dense.norm()).detach())
        assert error < 1e-5, (loss, error)
"""


@pytest.mark.slow
def test_triton_takes_every_option_that_is_not_refused():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRITON], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
