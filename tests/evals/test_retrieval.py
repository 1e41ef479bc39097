"""Retrieval ranks against counts made by hand and by plain loops, and chance where there is nothing to tell."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
import torch

from clipkit.evals import retrieval_metrics


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def test_a_perfect_model_with_five_captions_an_image_has_recall_one_both_ways():
    images = unit(60, 24, 0)
    index = torch.arange(60).repeat_interleave(5)
    metrics = retrieval_metrics(images, images[index], index)
    assert {value for name, value in metrics.items()} == {1.0}
    assert set(metrics) == {
        f"{way}_{what}"
        for way in ("image_to_text", "text_to_image")
        for what in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
    }


def test_constant_features_have_chance_to_the_digit():
    n, each = 30, 5
    index = torch.arange(n).repeat_interleave(each)
    metrics = retrieval_metrics(torch.ones(n, 4) / 2, torch.ones(n * each, 4) / 2, index, block=(8, 32))
    for k in (1, 5, 10):
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(k / n, abs=1e-12)
        none_of_five = math.comb(n * each - each, k) / math.comb(n * each, k)
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(1 - none_of_five, abs=1e-12)
    assert metrics["text_to_image_mean_rank"] == pytest.approx((n + 1) / 2)
    # The first of 5 marked places among 150 in random order.
    assert metrics["image_to_text_median_rank"] == pytest.approx((n * each + 1) / (each + 1))


def test_random_features_have_chance():
    n, each = 400, 5
    index = torch.arange(n).repeat_interleave(each)
    metrics = retrieval_metrics(unit(n, 32, 1), unit(n * each, 32, 2), index)
    for k in (1, 5, 10):
        chance = k / n
        # Four standard deviations of 2,000 independent hits.
        assert abs(metrics[f"text_to_image_R@{k}"] - chance) < 4 * math.sqrt(chance / (n * each))
        chance = 1 - math.comb(n * each - each, k) / math.comb(n * each, k)
        assert abs(metrics[f"image_to_text_R@{k}"] - chance) < 4 * math.sqrt(chance / n)
    assert abs(metrics["text_to_image_mean_rank"] / ((n + 1) / 2) - 1) < 0.05


def brute_force(
    scores: list[list[float]], positives: list[list[int]], ks: tuple[int, ...]
) -> dict[str, float]:
    """Every order that equal scores can stand in, by the places the best positives may take among the tied."""
    hits: dict[int, list[float]] = {k: [] for k in ks}
    ranks = []
    for row, own in zip(scores, positives, strict=True):
        best = max(row[j] for j in own)
        above = sum(row[j] > best for j in range(len(row)) if j not in own)
        tied = sum(row[j] == best for j in range(len(row)) if j not in own)
        level = sum(row[j] == best for j in own)
        first = [places[0] + 1 + above for places in itertools.combinations(range(tied + level), level)]
        for k in ks:
            hits[k].append(sum(rank <= k for rank in first) / len(first))
        ranks.append(sum(first) / len(first))
    metrics = {f"R@{k}": statistics.fmean(values) for k, values in hits.items()}
    return {**metrics, "median_rank": statistics.median(ranks), "mean_rank": statistics.fmean(ranks)}


@pytest.mark.parametrize("kind", ["ties", "no ties"])
def test_equals_a_brute_force_count_in_float64(kind):
    draw = random.Random(7)
    for _ in range(100):
        n, dim = draw.randint(1, 7), draw.randint(1, 4)
        number = (lambda: float(draw.randint(-1, 1))) if kind == "ties" else (lambda: draw.gauss(0, 1))
        owners = list(range(n)) + [draw.randrange(n) for _ in range(draw.randint(0, 8))]
        draw.shuffle(owners)
        images = [[number() for _ in range(dim)] for _ in range(n)]
        texts = [[number() for _ in range(dim)] for _ in owners]
        scores = [[math.fsum(a * b for a, b in zip(x, y, strict=True)) for y in texts] for x in images]
        expected = brute_force(
            scores, [[j for j, o in enumerate(owners) if o == i] for i in range(n)], (1, 2, 5)
        )
        expected = {f"image_to_text_{name}": value for name, value in expected.items()}
        columns = brute_force(
            [list(column) for column in zip(*scores, strict=True)], [[o] for o in owners], (1, 2, 5)
        )
        expected |= {f"text_to_image_{name}": value for name, value in columns.items()}
        block = (draw.randint(1, 4), draw.randint(1, 6))
        found = retrieval_metrics(
            torch.tensor(images, dtype=torch.float64),
            torch.tensor(texts, dtype=torch.float64),
            owners,
            k=(1, 2, 5),
            block=block,
        )
        assert found == pytest.approx(expected, abs=1e-12)


def test_duplicates_are_ties_whatever_the_blocks():
    """Equal vectors of 300 numbers: their float64 scores differ by rounding from block to block."""
    images = unit(1, 300, 3).repeat(50, 1)
    index = torch.arange(50)
    for block in ((50, 50), (7, 3), (1, 50)):
        metrics = retrieval_metrics(images, images.clone(), index, block=block)
        assert metrics["image_to_text_R@1"] == pytest.approx(1 / 50, abs=1e-12)


def test_images_without_captions_are_rivals_only_when_asked_for():
    images, index = unit(20, 8, 4), torch.arange(10)
    with pytest.raises(ValueError, match=r"10 of 20 images have no caption \(first: image 10\)"):
        retrieval_metrics(images, images[:10], index)
    # Caption 0 is image 15's copy: one distractor stands before image 0.
    texts = images[:10].clone()
    texts[0] = images[15]
    metrics = retrieval_metrics(images, texts, index, distractors=True)
    assert metrics["text_to_image_R@1"] == pytest.approx(0.9)
    assert metrics["text_to_image_mean_rank"] > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, t, x: (i[:, :3], t, x), r"\(N, D\) and text_features \(M, D\)"),
        (lambda i, t, x: (i, t, x[:-1]), r"must be \(M,\) = \(6,\)"),
        (lambda i, t, x: (i, t, x + 1), "caption 4 names image 3"),
        (
            lambda i, t, x: (i, t.index_fill(0, torch.tensor([2]), float("nan")), x),
            "text_features has non-finite .* row 2",
        ),
        (
            lambda i, t, x: (i.index_fill(0, torch.tensor([1]), float("inf")), t, x),
            "image_features has non-finite .* row 1",
        ),
        (lambda i, t, x: (i[:0], t[:0], x[:0]), "N, M > 0"),
    ],
)
def test_refuses_what_it_cannot_rank(change, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(*change(unit(3, 4, 5), unit(6, 4, 6), torch.tensor([0, 0, 1, 1, 2, 2])))
