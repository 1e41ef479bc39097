import math

import pytest
import torch

from clipkit.losses import InfoNCE


def by_loops(s: list[list[float]], targets: list[list[float]], kept=lambda i, j: True) -> float:
    """Mean over both directions of the cross entropy to `targets` over the columns that are kept."""
    n, total = len(s), 0.0
    for i in range(n):
        for logits, target in (
            ([s[i][j] for j in range(n)], targets[i]),
            ([s[j][i] for j in range(n)], [targets[j][i] for j in range(n)]),
        ):
            denominator = sum(math.exp(logits[j]) for j in range(n) if kept(i, j))
            total -= sum(target[j] * (logits[j] - math.log(denominator)) for j in range(n) if target[j])
    return total / (2 * n)


def logits(dots, x, y, scale) -> list[list[float]]:
    return [[scale.item() * value for value in row] for row in dots(x, y)]


def eye(n: int) -> list[list[float]]:
    return [[float(i == j) for j in range(n)] for i in range(n)]


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("rows", [3, 4, 7])
def test_equals_the_papers_cross_entropy(unit, dots, scale, rows, impl):
    x, y = unit(rows, 5, 1), unit(rows, 5, 2)
    expected = by_loops(logits(dots, x, y, scale), eye(rows))
    assert InfoNCE(impl=impl)(x, y, scale).item() == pytest.approx(expected, rel=1e-12)


def test_equals_open_clips_loss_with_the_same_positional_arguments(unit, scale):
    open_clip_loss = pytest.importorskip("open_clip.loss").ClipLoss()
    x, y = unit(6, 8, 1), unit(6, 8, 2)
    ours, theirs = InfoNCE()(x, y, scale), open_clip_loss(x, y, scale)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    inputs = (x, y, scale)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)):
        assert (a - b).norm() < 1e-12 * b.norm()


def test_label_smoothing_spreads_the_target_over_all_columns(unit, dots, scale):
    x, y = unit(5, 4, 1), unit(5, 4, 2)
    targets = [[0.7 * (i == j) + 0.3 / 5 for j in range(5)] for i in range(5)]
    expected = by_loops(logits(dots, x, y, scale), targets)
    assert InfoNCE(label_smoothing=0.3)(x, y, scale).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_rows_that_share_an_id_share_the_target(unit, dots, scale, smoothing):
    x, y, ids = unit(6, 4, 1), unit(6, 4, 2), [5, 1, 5, 5, 0, 1]
    targets = [
        [(1 - smoothing) * (ids[i] == ids[j]) / ids.count(ids[i]) + smoothing / 6 for j in range(6)]
        for i in range(6)
    ]
    expected = by_loops(logits(dots, x, y, scale), targets)
    found = InfoNCE(label_smoothing=smoothing)(x, y, scale, pair_ids=torch.tensor(ids))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_masked_duplicates_are_no_negatives(unit, dots, scale, impl, smoothing):
    x, y, ids = unit(6, 4, 1), unit(6, 4, 2), [5, 1, 5, 5, 0, 1]
    s = logits(dots, x, y, scale)

    def kept(i, j):
        return i == j or ids[i] != ids[j]

    total = 0.0
    for i in range(6):
        columns = [j for j in range(6) if kept(i, j)]
        for row in ([s[i][j] for j in columns], [s[j][i] for j in columns]):
            log_sum = math.log(sum(math.exp(value) for value in row))
            own = s[i][i]
            total -= (1 - smoothing) * (own - log_sum) + smoothing * sum(
                value - log_sum for value in row
            ) / len(row)
    found = InfoNCE(same_ids="mask", label_smoothing=smoothing, impl=impl)(
        x, y, scale, pair_ids=torch.tensor(ids)
    )
    assert found.item() == pytest.approx(total / 12, rel=1e-12)


@pytest.mark.parametrize("same_ids", ["positive", "mask"])
def test_distinct_ids_change_nothing(unit, scale, same_ids):
    x, y = unit(5, 4, 1), unit(5, 4, 2)
    loss = InfoNCE(same_ids=same_ids)
    plain = loss(x, y, scale).item()
    assert loss(x, y, scale, pair_ids=torch.tensor([9, 3, 4, 0, 7])).item() == pytest.approx(plain, rel=1e-12)


def test_is_symmetric_and_does_not_see_the_order_of_pairs(unit, scale):
    x, y, order = unit(5, 4, 1), unit(5, 4, 2), torch.tensor([3, 0, 4, 1, 2])
    value = InfoNCE()(x, y, scale).item()
    assert InfoNCE()(y, x, scale).item() == pytest.approx(value, rel=1e-12)
    assert InfoNCE()(x[order], y[order], scale).item() == pytest.approx(value, rel=1e-12)


def test_is_log_n_when_all_features_are_equal(scale):
    x = torch.full((6, 4), 0.5, dtype=torch.float64)
    assert InfoNCE()(x, x.clone(), scale).item() == pytest.approx(math.log(6), rel=1e-12)


def test_keeps_its_digits_when_the_loss_is_nearly_zero():
    """Orthogonal pairs at scale 80 have loss 7 e^-80; fp32 log-softmax rounds it to zero."""
    x = torch.eye(8)
    loss = InfoNCE()(x, x.clone(), torch.tensor(80.0))
    assert loss.item() == pytest.approx(7 * math.exp(-80), rel=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing": 0.2}, {"same_ids": "mask", "label_smoothing": 0.1}]
)
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_gradcheck(unit, scale, settings, impl):
    loss, ids = InfoNCE(impl=impl, **settings), torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(
        lambda x, y, s: loss(x, y, s, pair_ids=ids), (unit(4, 3, 1), unit(4, 3, 2), scale)
    )


def test_refuses_images_and_texts_of_different_numbers(unit, scale):
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(5, 3\)"):
        InfoNCE()(unit(5, 3), unit(4, 3), scale)


def test_refuses_features_off_unit_norm_and_says_what_it_got(unit, scale):
    with pytest.raises(ValueError, match=r"text_features must have unit norm.*3.*normalize"):
        InfoNCE()(unit(4, 3), 3 * unit(4, 3), scale)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"same_ids": "masks"}, "'mask'"),
    ],
)
def test_refuses_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InfoNCE(**settings)


def test_refuses_ids_and_scales_of_other_shapes(unit, scale):
    with pytest.raises(ValueError, match=r"pair_ids.*\(4,\)"):
        InfoNCE()(unit(4, 3, 1), unit(4, 3, 2), scale, pair_ids=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="logit_scale"):
        InfoNCE()(unit(4, 3, 1), unit(4, 3, 2), torch.ones(4))
    with pytest.raises(ValueError, match="logit_scale"):
        InfoNCE()(unit(4, 3, 1), unit(4, 3, 2), "7")


@pytest.mark.parametrize("impl", ["auto", "dense"])
def test_a_small_batchs_few_operators_are_twice_differentiable(unit, scale, impl):
    pairs = (unit(4, 3, 1), unit(4, 3, 2), scale)
    assert torch.autograd.gradcheck(InfoNCE(impl=impl), pairs)
    assert torch.autograd.gradgradcheck(InfoNCE(impl=impl), pairs)


def test_a_small_batchs_few_operators_give_what_the_blocks_give(unit, scale):
    for rows, size in ((2, 1.0), (9, 1.0), (9, 15.0)):
        x, y, s = unit(rows, 6, 1), unit(rows, 6, 2), (scale * size).detach().requires_grad_()
        small, blocks = (InfoNCE(impl=impl)(x, y, s) for impl in ("auto", "chunked"))
        assert torch.allclose(small, blocks, rtol=1e-12)
        for found, expected in zip(*(torch.autograd.grad(v, (x, y, s)) for v in (small, blocks))):
            assert torch.allclose(found, expected, rtol=1e-9, atol=1e-13)
    # Some inputs frozen.
    assert torch.allclose(
        torch.autograd.grad(InfoNCE()(x.detach(), y, 7.0), y)[0],
        torch.autograd.grad(InfoNCE(impl="chunked")(x.detach(), y, 7.0), y)[0],
    )
