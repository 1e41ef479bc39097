"""Rows whose texts are near, found and masked or shared, against loops and matrices in float64."""

import math

import pytest
import torch

from clipkit.losses import InfoNCE, Sigmoid, create_loss, distill, duplicates

N, D, AT = 7, 5, 0.6


@pytest.fixture
def pairs(unit, scale, monkeypatch):
    """Texts 0, 3 and 5 are near: 0 and 5 both to 3, not to each other. Blocks hold two rows."""
    monkeypatch.setattr(duplicates, "_BLOCK", 2 * N)
    x, y = unit(N, D, 1), unit(N, D, 2).detach()
    along, across = torch.eye(D, dtype=torch.float64)[:2]
    for row, angle in ((0, -50), (3, 0), (5, 50)):
        turn = math.radians(angle)
        y[row] = math.cos(turn) * along + math.sin(turn) * across
    return x, y.requires_grad_(), scale


def near(dots, y):
    return [[value >= AT or i == j for j, value in enumerate(row)] for i, row in enumerate(dots(y, y))]


def test_the_judgement_is_of_pairs_and_not_of_chains(dots, pairs):
    same = near(dots, pairs[1])
    assert same[0][3] and same[3][5] and not same[0][5]


@pytest.mark.parametrize("impl", ["auto", "dense", "chunked"])
def test_masked_ones_leave_both_sums(dots, pairs, impl):
    x, y, scale = pairs
    same, s = near(dots, y), [[scale.item() * v for v in row] for row in dots(x, y)]
    expected = 0.0
    for i in range(N):
        others = [j for j in range(N) if j == i or not same[i][j]]
        row = math.log(sum(math.exp(s[i][j]) for j in others))
        column = math.log(sum(math.exp(s[j][i]) for j in others))
        expected += ((row + column) / 2 - s[i][i]) / N
    loss = InfoNCE(false_negatives="mask", false_negative_threshold=AT, impl=impl)
    assert loss(x, y, scale).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("impl", ["auto", "dense", "chunked"])
def test_shared_ones_have_their_part_of_the_target(dots, pairs, impl):
    x, y, scale = pairs
    same, s = near(dots, y), [[scale.item() * v for v in row] for row in dots(x, y)]
    expected = 0.0
    for i in range(N):
        positive = [j for j in range(N) if same[i][j]]
        row = math.log(sum(math.exp(v) for v in s[i])) - sum(s[i][j] for j in positive) / len(positive)
        column = math.log(sum(math.exp(s[j][i]) for j in range(N)))
        column -= sum(s[j][i] for j in positive) / len(positive)
        expected += (row + column) / 2 / N
    loss = InfoNCE(false_negatives="share", false_negative_threshold=AT, impl=impl)
    assert loss(x, y, scale).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["mask", "share"])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_sigmoid_does_the_same(dots, pairs, mode, impl):
    x, y, scale = pairs
    same, bias, expected = near(dots, y), -1.5, 0.0
    for i, row in enumerate(dots(x, y)):
        for j, value in enumerate(row):
            z = scale.item() * value + bias
            if i == j or (same[i][j] and mode == "share"):
                expected += math.log1p(math.exp(-z)) / N
            elif not same[i][j]:
                expected += math.log1p(math.exp(z)) / N
    loss = Sigmoid(false_negatives=mode, false_negative_threshold=AT, impl=impl)
    assert loss(x, y, scale, bias).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mode", ["mask", "share"])
def test_what_ids_say_and_another_encoder_finds_is_found_too(unit, pairs, mode):
    x, y, scale = pairs
    content, ids = unit(N, 3, 9).detach(), torch.tensor([0, 1, 2, 3, 1, 5, 6])
    same = (content @ content.T >= AT) | (ids[:, None] == ids[None, :]) | torch.eye(N, dtype=torch.bool)
    assert N < same.sum() < N * N
    # Ids that say all of it are the oracle, where sameness has no chains.
    logits = scale * x @ y.T
    if mode == "mask":
        kept = ~same | torch.eye(N, dtype=torch.bool)
        target = torch.eye(N, dtype=torch.float64)
    else:
        kept, target = torch.ones_like(same), same.double() / same.sum(1, keepdim=True)
    expected = sum(
        -(target * m.masked_fill(~kept, -torch.inf).log_softmax(1).masked_fill(~kept, 0.0)).sum(1).mean() / 2
        for m in (logits, logits.T)
    )
    loss = InfoNCE(false_negatives=mode, false_negative_threshold=AT)
    assert torch.allclose(loss(x, y, scale, pair_ids=ids, content_features=content), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["infonce", "sigmoid"])
@pytest.mark.parametrize("mode", ["mask", "share"])
def test_no_threshold_reached_is_no_option_set(pairs, name, mode):
    x, y, scale = pairs
    features = {"image_features": x, "text_features": y, "logit_scale": scale, "logit_bias": -1.0}
    found = create_loss({name: {"false_negatives": mode, "false_negative_threshold": 1.0, "impl": "chunked"}})
    assert torch.allclose(found(features)["loss"], create_loss(name)(features)["loss"], rtol=1e-13)


def test_every_other_row_may_be_a_false_negative(unit, scale):
    """Nothing is left to tell apart: zero, and no NaN in its gradient."""
    x = unit(4, D, 1)
    y = unit(1, D, 2).detach().expand(4, D).clone().requires_grad_()
    for impl in ("dense", "chunked"):
        loss = InfoNCE(false_negatives="mask", impl=impl)(x, y, scale)
        gradients = torch.autograd.grad(loss, (x, y, scale))
        assert loss.item() == 0.0 and all(not grad.any() for grad in gradients)


@pytest.mark.parametrize("loss", [InfoNCE, Sigmoid])
@pytest.mark.parametrize("mode", ["mask", "share"])
def test_gradcheck(pairs, loss, mode):
    loss = loss(false_negatives=mode, false_negative_threshold=AT, impl="chunked")
    more = [torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)] if isinstance(loss, Sigmoid) else []
    assert torch.autograd.gradcheck(loss, (*pairs, *more))


def test_a_second_derivative_is_refused_or_right(pairs):
    loss = InfoNCE(false_negatives="mask", false_negative_threshold=AT, impl="dense")
    assert torch.autograd.gradgradcheck(loss, pairs)
    for mode in ("mask", "share"):
        value = InfoNCE(false_negatives=mode, false_negative_threshold=AT, impl="chunked")(*pairs)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(value, pairs[0], create_graph=True)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'drop'.*mask"):
        InfoNCE(false_negatives="drop")
    with pytest.raises(ValueError, match="no Triton kernel"):
        Sigmoid(false_negatives="mask", impl="triton")
    with pytest.raises(ValueError, match="false_negative_threshold"):
        InfoNCE(false_negative_threshold=0.0)


def test_distill_is_open_clips(unit, scale, monkeypatch):
    """The second term of its DistillClipLoss, with a teacher of another width."""
    theirs = pytest.importorskip("open_clip.loss").DistillClipLoss()
    monkeypatch.setattr(distill, "_BLOCK", 2 * N)
    x, y, u, v = unit(N, D, 1), unit(N, D, 2), unit(N, 9, 3).detach(), unit(N, 9, 4).detach()
    given = (x, y, scale, u, v, torch.tensor(3.0, dtype=torch.float64))
    expected = theirs(*given, output_dict=True)["distill_loss"]
    found = create_loss("distill").terms["distill"](*given)
    assert torch.allclose(found, expected, rtol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(found, (x, y, scale)), torch.autograd.grad(expected, (x, y, scale))
    ):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-14)
    terms = create_loss(["infonce", "distill"])
    named = dict(zip(terms.terms["distill"].inputs, given))
    assert sum(terms(**named, output_dict=True).values()).item() == pytest.approx(
        sum(theirs(**named, output_dict=True).values()).item(), rel=1e-12
    )
