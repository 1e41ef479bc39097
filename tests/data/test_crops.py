"""Random crops: as torchvision's RandomResizedCrop in distribution, a function of the draws alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from clipkit.data.decode import DRAWS, crop_box
from clipkit.data.order import number, uniforms

# Height and width: squares, usual photographs, panoramas, small ones where sides are few, and a line.
SHAPES = (
    (224, 224),
    (480, 640),
    (640, 480),
    (375, 500),
    (1080, 1920),
    (300, 900),
    (900, 300),
    (17, 23),
    (3, 4),
    (1, 40),
)
SCALES = ((0.08, 1.0), (0.9, 1.0))
RATIO = (3 / 4, 4 / 3)


def ours(shape, scale, count, ratio=RATIO):
    draws = uniforms(number(0, "crops", *shape), np.arange(count, dtype=np.uint64), DRAWS).tolist()
    return np.array([crop_box(*shape, row, scale, ratio) for row in draws], dtype=float)


def torchvisions(shape, scale, count, ratio=RATIO):
    torch.manual_seed(0)
    # Only its shape is looked at.
    picture = torch.empty(1, 1, 1, dtype=torch.uint8).expand(3, *shape)
    return np.array([RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(count)], dtype=float)


def distance(a, b):
    """The largest difference of two samples' distribution functions (Kolmogorov and Smirnov)."""
    values = np.union1d(a, b)
    cumulative = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    return np.abs(cumulative[0] - cumulative[1]).max()


def differing(count):
    """Each of area, shape and place, over every picture and scale, whose distance is too large for chance."""
    tests = [
        (shape, scale, what, measure)
        for shape in SHAPES
        for scale in SCALES
        for what, measure in (
            ("area", lambda top, left, h, w: h * w),
            ("shape", lambda top, left, h, w: w / h),
            ("top", lambda top, left, h, w: top),
            ("left", lambda top, left, h, w: left),
            ("bottom", lambda top, left, h, w: top + h),
            ("right", lambda top, left, h, w: left + w),
        )
    ]
    # Of equal distributions all tests together fail with probability 0.01 (Bonferroni; the asymptotic tail of the
    # statistic is 2 exp(-n D^2) for two samples of n, and smaller for whole numbers).
    limit = math.sqrt(math.log(2 * len(tests) / 0.01) / count)
    crops = {
        (shape, scale): (ours(shape, scale, count).T, torchvisions(shape, scale, count).T)
        for shape in SHAPES
        for scale in SCALES
    }
    found = {}
    for shape, scale, what, measure in tests:
        a, b = crops[shape, scale]
        found[shape, scale, what] = distance(measure(*a), measure(*b))
    return {key: round(d, 4) for key, d in found.items() if d > limit}


@pytest.mark.parametrize("count", [1000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_crops_are_distributed_as_torchvisions(count):
    assert not differing(count)


def test_another_crop_is_told_apart(monkeypatch):
    """Where a crop that does not fit is narrowed instead of drawn anew, as it was once here."""

    def narrowed(height, width, draws, scale, ratio):
        area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
        shape = math.exp(math.log(ratio[0]) + draws[1] * (math.log(ratio[1]) - math.log(ratio[0])))
        w = min(width, math.sqrt(area * shape))
        h = min(height, area / w)
        w = min(width, area / h)
        return draws[3] * (height - h), draws[2] * (width - w), h, w

    monkeypatch.setitem(globals(), "crop_box", narrowed)
    assert {shape for shape, _, _ in differing(300)} >= {(300, 900), (900, 300), (1080, 1920), (1, 40)}


@pytest.mark.parametrize("ratio", [(0.75, 4 / 3), (0.5, 0.6), (1.0, 1.0), (1.5, 3.0)])
def test_crops_lie_inside_and_have_an_allowed_shape(ratio):
    for shape in ((300, 900), (900, 300), (500, 375)):
        for top, left, h, w in ours(shape, (0.08, 1.0), 200, ratio):
            assert 0 <= top <= shape[0] - h and 0 <= left <= shape[1] - w and h >= 1 and w >= 1
            # Sides are whole numbers.
            assert (w - 0.5) / (h + 0.5) <= ratio[1] and (w + 0.5) / (h - 0.5) >= ratio[0]


def test_a_picture_that_no_crop_fits_gives_its_middle():
    # By hand: 40 x 1 allows height 1 and width round(4/3) = 1, and 1 x 40 width 1 and height round(1 / 0.75) = 1.
    assert crop_box(1, 40, [0.5] * DRAWS, (0.9, 1.0), RATIO) == (0, 19, 1, 1)
    assert crop_box(40, 1, [0.5] * DRAWS, (0.9, 1.0), RATIO) == (19, 0, 1, 1)
    # 90 x 30 allows width 40.
    assert crop_box(30, 90, [0.5] * DRAWS, (1.0, 1.0), RATIO) == (0, 25, 30, 40)
    assert crop_box(30, 32, [0.0] * DRAWS, (1.0, 1.0), RATIO) == (0, 0, 30, 32)


def test_too_few_random_numbers_are_an_error():
    with pytest.raises(ValueError, match=f"a crop takes {DRAWS} random numbers; got 4"):
        crop_box(10, 10, [0.5] * 4, (0.9, 1.0), RATIO)
