"""Augmentation of uint8 batches on the device: flip, colour jitter, AutoAugment.

The random resized crop happens while decoding; what is here needs no file and runs where the model does.
Every random number is a function of (seed, draw, view): the same step after a resume gets the same pictures,
and two views of one batch differ. Colour arithmetic is fp32 inside, uint8 outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from clipkit.data.order import number, uniforms
from clipkit.registry import check_keys

_GREY = (0.299, 0.587, 0.114)

# (operation, probability, level 0..9 of its range) twice: Cubuk et al. 2019, "AutoAugment", table 9
# (ImageNet).
POLICIES = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("colour", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)


class Augment:
    """Random changes of a batch of pictures.

    Args:
        flip: probability of a left-right flip.
        colour_jitter: strengths (brightness, contrast, saturation, hue): factors are drawn from 1 - s to 1 +
            s, and the hue turns by up to `hue` of a full turn (0 to 0.5). None for none.
        auto_augment: apply one of AutoAugment's 25 ImageNet policies to each picture.
        seed: of every random number.
    """

    def __init__(
        self,
        *,
        flip: float = 0.0,
        colour_jitter: Sequence[float] | None = None,
        auto_augment: bool = False,
        seed: int = 0,
    ):
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is {flip!r}; expected a probability from 0 to 1")
        if colour_jitter is not None and (
            len(colour_jitter) != 4 or min(colour_jitter) < 0 or colour_jitter[3] > 0.5
        ):
            raise ValueError(
                f"colour_jitter is {list(colour_jitter)}; expected [brightness, contrast, saturation, hue], "
                "not "
                "negative, hue at most 0.5"
            )
        self.flip, self.auto_augment, self.seed = flip, auto_augment, seed
        self.colour_jitter = (
            tuple(colour_jitter) if colour_jitter is not None and any(colour_jitter) else None
        )
        self.active = bool(flip or self.colour_jitter or auto_augment)

    def __call__(self, image: torch.Tensor, *, draw: int, view: int = 0) -> torch.Tensor:
        """Augmented copies.

        Args:
            image: (B, 3, H, W) uint8, any device; not changed.
            draw: a number that names this batch in the run, such as step * world_size + rank.
            view: which of several augmentations of the batch.

        Returns:
            (B, 3, H, W) uint8.

        Raises:
            ValueError: another shape or dtype.
        """
        if image.ndim != 4 or image.shape[1] != 3 or image.dtype != torch.uint8:
            raise ValueError(
                f"Augment takes (B, 3, H, W) uint8; got {tuple(image.shape)} {image.dtype}. Augment before "
                "normalising"
            )
        if not self.active or not len(image):
            return image
        draws = uniforms(number(self.seed, "augment", draw, view), np.arange(len(image), dtype=np.uint64), 10)
        if self.flip:
            rows = torch.from_numpy(draws[:, 0] < self.flip).to(image.device)
            image = torch.where(rows[:, None, None, None], image.flip(-1), image)
        if self.auto_augment:
            image = _auto_augment(image, draws[:, 1:6])
        if self.colour_jitter:
            image = _jitter(image, draws[:, 6:10], self.colour_jitter)
        return image


def create_augment(spec: Mapping[str, Any] | None, *, seed: int) -> Augment:
    """The device part of `data.augmentation` (the crop, which decoding does, is passed over). ValueError for
    unknown keys.
    """
    spec = dict(spec or {})
    check_keys(
        spec, ["crop_scale", "crop_ratio", "flip", "colour_jitter", "auto_augment"], "data.augmentation"
    )
    return Augment(
        flip=spec.get("flip") or 0.0,
        colour_jitter=spec.get("colour_jitter"),
        auto_augment=bool(spec.get("auto_augment")),
        seed=seed,
    )


def _jitter(image: torch.Tensor, draws: np.ndarray, strengths: tuple[float, ...]) -> torch.Tensor:
    """Brightness, contrast, saturation, hue, in this order, each picture with its own factors."""
    turns = torch.from_numpy(2 * draws - 1).to(image.device, torch.float32)
    bright, contrast, saturation = (
        (1 + turns[:, i] * strengths[i]).clamp_min(0)[:, None, None, None] for i in range(3)
    )
    x = (image.float() * bright).clamp(0, 255)
    x = (x * contrast + _grey(x).mean((1, 2, 3), keepdim=True) * (1 - contrast)).clamp(0, 255)
    x = (x * saturation + _grey(x) * (1 - saturation)).clamp(0, 255)
    if strengths[3]:
        x = _turn_hue(x, turns[:, 3] * strengths[3])
    return x.round().clamp(0, 255).to(torch.uint8)


def _grey(x: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor(_GREY, device=x.device).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def _turn_hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the hue of HSV by `turns` (B,) full turns; x is (B, 3, H, W) in 0..255."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    safe = chroma.clamp_min(1e-6)
    r, g, b = x.unbind(1)
    hue = (
        torch.where(high == r, (g - b) / safe, torch.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
        / 6
    )
    hue = torch.where(chroma > 0, hue, torch.zeros_like(hue)) + turns[:, None, None]
    # Each channel of a fully known (hue, chroma, high) is high - chroma * clamp(min(k, 4 - k), 0, 1), k = (n
    # + 6 hue) mod 6.
    channels = []
    for n in (5, 3, 1):
        k = (n + 6 * hue) % 6
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def _auto_augment(image: torch.Tensor, draws: np.ndarray) -> torch.Tensor:
    """One policy a picture; pictures that share an operation and its level are changed together."""
    image = image.clone()
    chosen = np.minimum((draws[:, 0] * len(POLICIES)).astype(int), len(POLICIES) - 1)
    for turn in range(2):
        groups: dict[tuple[str, float, int], list[int]] = {}
        for row, policy in enumerate(chosen):
            operation, probability, level = POLICIES[policy][turn]
            if draws[row, 1 + turn] < probability:
                sign = 1 if draws[row, 3 + turn] < 0.5 else -1
                groups.setdefault((operation, level, sign), []).append(row)
        for (operation, level, sign), rows in groups.items():
            at = torch.tensor(rows, device=image.device)
            image[at] = _apply(image[at], operation, level / 9, sign)
    return image


def _apply(image: torch.Tensor, operation: str, level: float, sign: int) -> torch.Tensor:
    """One operation at a level from 0 to 1 of its range in the paper's table 6."""
    from torchvision.transforms.v2 import functional as F

    if operation == "posterize":
        return F.posterize(image, 8 - round(4 * level))
    if operation == "solarize":
        return F.solarize(image, 255.0 * (1 - level))
    if operation == "rotate":
        return F.rotate(image, sign * 30.0 * level)
    if operation == "shear_x":
        return F.affine(
            image,
            angle=0.0,
            translate=[0, 0],
            scale=1.0,
            shear=[sign * _degrees(0.3 * level), 0.0],
            center=[0, 0],
        )
    if operation == "colour":
        return F.adjust_saturation(image, 1 + sign * 0.9 * level)
    if operation == "contrast":
        return F.adjust_contrast(image, 1 + sign * 0.9 * level)
    if operation == "sharpness":
        return F.adjust_sharpness(image, 1 + sign * 0.9 * level)
    return {"autocontrast": F.autocontrast, "equalize": F.equalize, "invert": F.invert}[operation](image)


def _degrees(slope: float) -> float:
    return float(np.degrees(np.arctan(slope)))
