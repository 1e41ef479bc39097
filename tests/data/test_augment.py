"""Augmentation on the device: against torchvision, reproducible by number, never in place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from clipkit.data.augment import POLICIES, Augment, _jitter, create_augment


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (16, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_a_flip_is_a_flip_with_its_probability(images):
    many = images.repeat(40, 1, 1, 1)
    out = Augment(flip=0.3, seed=1)(many, draw=0)
    flipped = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(out, many)])
    assert all(torch.equal(a, b.flip(-1) if f else b) for a, b, f in zip(out, many, flipped))
    # 640 draws at 0.3: standard deviation 0.018.
    assert abs(flipped.float().mean() - 0.3) < 0.08


@pytest.mark.parametrize(
    "strength, draws, reference",
    [
        ((0.4, 0, 0, 0), [0.75, 0, 0, 0], lambda x: F.adjust_brightness(x, 1.2)),
        ((0, 0.6, 0, 0), [0.5, 0.25, 0.5, 0.5], lambda x: F.adjust_contrast(x, 0.7)),
        ((0, 0, 0.5, 0), [0.5, 0.5, 1.0, 0.5], lambda x: F.adjust_saturation(x, 1.5)),
        ((0, 0, 0, 0.2), [0.5, 0.5, 0.5, 0.75], lambda x: F.adjust_hue(x, 0.1)),
    ],
)
def test_each_colour_change_equals_torchvisions(images, strength, draws, reference):
    ours = _jitter(images, np.tile(draws, (16, 1)), strength)
    assert (ours.int() - reference(images).int()).abs().max() <= 2


def test_pictures_of_a_batch_get_different_changes(images):
    same = images[:1].repeat(16, 1, 1, 1)
    out = Augment(colour_jitter=[0.4, 0.4, 0.4, 0.1])(same, draw=3)
    assert len({row.numpy().tobytes() for row in out}) == 16


def test_the_policies_are_torchvisions_table():
    names = {"colour": "Color", "shear_x": "ShearX", "autocontrast": "AutoContrast"}
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)._policies
    for ours, other in zip(POLICIES, theirs, strict=True):
        for (name, probability, level), (their_name, their_probability, their_level) in zip(ours, other):
            assert names.get(name, name.capitalize()) == their_name and probability == their_probability
            assert their_level is None or level == their_level


def test_auto_augment_is_reproducible_and_changes_most_pictures(images):
    augment = Augment(auto_augment=True, flip=0.5, colour_jitter=[0.1, 0.1, 0.1, 0.05], seed=5)
    before = images.clone()
    out = augment(images, draw=7)
    assert torch.equal(images, before), "the batch was changed in place"
    assert out.shape == images.shape and out.dtype == torch.uint8
    assert torch.equal(out, augment(images, draw=7))
    assert not torch.equal(out, augment(images, draw=8)) and not torch.equal(
        out, augment(images, draw=7, view=1)
    )
    assert sum(not torch.equal(a, b) for a, b in zip(out, images)) > 12


@pytest.mark.parametrize(
    "only", [{"auto_augment": True}, {"flip": 1.0}, {"colour_jitter": [0.4] * 3 + [0.1]}]
)
def test_no_change_is_made_in_place(images, only):
    before = images.clone()
    out = Augment(seed=5, **only)(images, draw=7)
    assert torch.equal(images, before) and not torch.equal(out, before)


def test_nothing_asked_is_nothing_done(images):
    augment = create_augment({"crop_scale": [0.5, 1.0], "flip": 0.0, "colour_jitter": None}, seed=0)
    assert not augment.active and augment(images, draw=0) is images


def test_mistakes_say_what_is_right(images):
    with pytest.raises(ValueError, match="Did you mean 'flip'"):
        create_augment({"flp": 0.5}, seed=0)
    with pytest.raises(ValueError, match="probability"):
        Augment(flip=2)
    with pytest.raises(ValueError, match="hue at most 0.5"):
        Augment(colour_jitter=[0.1, 0.1, 0.1, 0.9])
    with pytest.raises(ValueError, match="Augment before normalising"):
        Augment(flip=0.5)(images.float(), draw=0)
