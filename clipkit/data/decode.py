"""Image bytes to uint8 pixels: guarded, converted, upright, cropped and resized.

The header is read first, so that a file claiming a billion pixels costs a microsecond. JPEG goes to
libjpeg-turbo through simplejpeg; for training a large one decodes straight to a half, quarter, ... of the size
where that leaves twice what the crop needs. Everything else, and what simplejpeg does not take (CMYK), goes to
Pillow. Resizing is torch's antialiased filter on uint8, within 2 of 255 of Pillow's.

The work is bounded by the picture's own pixels and by the wanted size, whatever shape it has.

Greyscale, palette, CMYK and 16-bit images are converted to RGB, transparency is laid on white, of an
animation the first frame is used, and the EXIF orientation is undone, in every format: see formats.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch

from clipkit.data.faults import DataError
from clipkit.data.formats import MAX_PIXELS, decode_pillow, jpeg_orientation, open_image
from clipkit.foreign import IMAGE_BYTES, BrokenFile, read_bytes
from clipkit.registry import unknown

# How a whole picture becomes a square, by open_clip's names; the first of each is the default.
RESIZING = {"resize_mode": ("shortest", "longest", "squash"), "interpolation": ("bicubic", "bilinear")}
# Random numbers that a crop may need: area and shape of ten tries, left and top, and one that is the caller's.
DRAWS = 23
# A longer picture is cut to its middle before it is resized for a square of the middle.
_LONGEST = 16


def decode_train(
    data: bytes,
    size: int,
    *,
    draws: Sequence[float],
    scale: tuple[float, float] | None = (0.9, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """A random resized crop: (3, size, size) uint8.

    Args:
        data: the file's bytes.
        size: pixels a side.
        draws: DRAWS numbers in [0, 1), the only randomness; see `crop_box`.
        scale: smallest and largest area of the crop, as fractions of the picture. None: no crop, but `decode_eval`.
        ratio: smallest and largest width/height of the crop.
        interpolation: bicubic or bilinear, antialiased.
        resize_mode: of `decode_eval`, where `scale` is None.
        max_pixels: a header that claims more is refused unread.

    Raises:
        DataError: empty_image, corrupt_image, unsupported_image or image_too_large.
    """
    if scale is None:
        return decode_eval(
            data, size, resize_mode=resize_mode, interpolation=interpolation, max_pixels=max_pixels
        )
    height, width, jpeg, turn = _header(data, max_pixels)
    if not jpeg:
        # What Pillow turns upright has its shape once it is decoded.
        return crop(decode_pillow(data), size, draws, scale, ratio, interpolation=interpolation)
    shape = (width, height) if turn > 4 else (height, width)
    box = crop_box(*shape, draws, scale, ratio)
    # Only halvings: libjpeg's other scales are slower than the whole picture. With less than twice the pixels that
    # the crop needs, the picture would lose more than a fortieth of its gradients' energy.
    factor = next((f for f in (8, 4, 2) if min(box[2:]) >= 2 * f * size), 1)
    # Colours that are not smoothed show where a crop is magnified.
    pixels = _pixels(data, jpeg, turn, factor, fast=min(box[2:]) >= size)
    return crop_resized(pixels, shape, box, size, interpolation=interpolation)


def decode_eval(
    data: bytes,
    size: int,
    *,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """The picture without random crop, antialiased: (3, size, size) uint8. Raises as `decode_train`.

    Args:
        resize_mode: shortest: the shorter side to `size`, then the centre; longest: the longer side to `size`, black
            beside it; squash: both sides, whatever the shape.
        interpolation: bicubic or bilinear.

    With `shortest`, of a picture more than 16 times as long as wide only the middle is resized.
    """
    pixels = decode(data, max_pixels=max_pixels)
    top, left, height, width = seen(pixels.shape[0], pixels.shape[1], resize_mode)
    pixels = pixels[top : top + height, left : left + width]
    h, w = resized_shape(height, width, size, resize_mode)
    return centre(resize(torch.from_numpy(pixels), h, w, mode=interpolation), size)


def check_resizing(resize_mode: str, interpolation: str) -> None:
    """ValueError for a name that is none of RESIZING's."""
    for key, value in (("resize_mode", resize_mode), ("interpolation", interpolation)):
        if value not in RESIZING[key]:
            raise unknown(key, value, RESIZING[key])


def resizing_of(tower: Any) -> dict[str, Any]:
    """The resize_mode and interpolation that an image tower of any class names, or the defaults."""
    return {key: getattr(tower, key, choices[0]) for key, choices in RESIZING.items()}


def seen(height: int, width: int, resize_mode: str) -> tuple[int, int, int, int]:
    """Top, left, height and width of what a resize mode shows of a picture, before it is resized."""
    return middle(height, width) if resize_mode == "shortest" else (0, 0, height, width)


def resized_shape(height: int, width: int, size: int, resize_mode: str) -> tuple[int, int]:
    """Height and width after resizing for a square of `size`, as open_clip's evaluation transforms round them."""
    if resize_mode == "squash":
        return size, size
    if resize_mode == "longest":
        longest = max(height, width)
        return max(1, round(height / (longest / size))), max(1, round(width / (longest / size)))
    shortest = min(height, width)
    return max(size, int(size * height / shortest)), max(size, int(size * width / shortest))


def centre(image: torch.Tensor, size: int) -> torch.Tensor:
    """The middle (..., size, size) of an image (..., H, W), with black where it is smaller."""
    height, width = image.shape[-2:]
    if height < size or width < size:
        down, right = max(0, size - height), max(0, size - width)
        margins = (right // 2, right - right // 2, down // 2, down - down // 2)
        return centre(torch.nn.functional.pad(image, margins), size)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[..., top : top + size, left : left + size]


def middle(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of what a centre crop can see of a picture: all of it, unless it is very long."""
    longest = _LONGEST * min(height, width)
    # An even number of pixels less, so that the centre stays where it is.
    h = height - max(0, (height - longest + 1) // 2) * 2
    w = width - max(0, (width - longest + 1) // 2) * 2
    return (height - h) // 2, (width - w) // 2, h, w


def decode_small(
    data: bytes, area: int, *, interpolation: str = "bicubic", max_pixels: int = MAX_PIXELS
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The whole picture in its own shape with at most `area` pixels, for the in-memory cache.

    Returns:
        (h, w, 3) uint8, and the picture's own height and width; the same where it is no larger.
    """
    pixels = decode(data, max_pixels=max_pixels)
    height, width = pixels.shape[:2]
    if height * width <= area:
        return torch.from_numpy(pixels), (height, width)
    reduction = math.sqrt(area / (height * width))
    h = min(area, max(1, int(height * reduction)))
    w = min(area // h, max(1, int(width * reduction)))
    small = resize(torch.from_numpy(pixels), h, w, mode=interpolation)
    return small.permute(1, 2, 0), (height, width)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The upright picture, (H, W, 3) uint8 RGB. Raises as `decode_train`."""
    _, _, jpeg, turn = _header(data, max_pixels)
    return _pixels(data, jpeg, turn)


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of the upright picture, by the header alone. Raises as `decode_train`."""
    height, width, jpeg, turn = _header(data, sys.maxsize)
    if not jpeg:
        image = open_image(data, max_pixels=sys.maxsize)
        try:
            # Pillow gives a TIFF's sides upright.
            turn = 1 if image.format == "TIFF" else image.getexif().get(0x0112, 1)
        except Exception as error:  # a fuzzed header can make Pillow raise nearly anything
            raise DataError("corrupt_image", f"{type(error).__name__}: {error}") from None
    return (width, height) if turn in (5, 6, 7, 8) else (height, width)


def read_image(path: str | Path) -> bytes:
    """An image file's bytes.

    Raises:
        DataError: missing_image (not there, or not readable), not_a_file (a folder, FIFO or device, never opened
            for reading) or image_too_large (256 MiB).
    """
    try:
        return read_bytes(path, limit=IMAGE_BYTES)
    except BrokenFile as error:
        raise DataError("image_too_large" if Path(path).is_file() else "not_a_file", str(error)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError("missing_image", str(error)) from None


def crop_box(
    height: int,
    width: int,
    draws: Sequence[float],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop (Szegedy et al. 2015, section 6), distributed as torchvision's
    RandomResizedCrop.

    Area (uniform) and shape (log-uniform) are drawn anew, at most ten times, until the crop fits into the picture;
    else it is the largest in the middle whose shape is allowed.

    Args:
        draws: DRAWS numbers in [0, 1): area and shape of the first try, left, top, one that is not used here, then
            area and shape of nine more tries.
    """
    if len(draws) < DRAWS:
        raise ValueError(f"a crop takes {DRAWS} random numbers; got {len(draws)}")
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for at in (0, *range(5, DRAWS, 2)):
        area = height * width * (scale[0] + draws[at] * (scale[1] - scale[0]))
        shape = math.exp(low + draws[at + 1] * (high - low))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[3] * (height - h + 1)), int(draws[2] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def crop(
    pixels: np.ndarray,
    size: int,
    draws: Sequence[float],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    *,
    shape: tuple[int, int] | None = None,
    interpolation: str = "bicubic",
) -> torch.Tensor:
    """A random resized crop of pixels that are there: (H, W, 3) uint8 -> (3, size, size) uint8.

    Args:
        shape: height and width of the picture that the pixels are a smaller copy of; None: their own.
    """
    shape = shape or (pixels.shape[0], pixels.shape[1])
    return crop_resized(
        pixels, shape, crop_box(*shape, draws, scale, ratio), size, interpolation=interpolation
    )


def crop_resized(
    pixels: np.ndarray,
    shape: tuple[int, int],
    box: tuple[int, int, int, int],
    size: int,
    *,
    interpolation: str,
) -> torch.Tensor:
    """The box (top, left, height, width) of a picture of this height and width, of which `pixels` (H, W, 3) may be a
    smaller copy: (3, size, size) uint8.
    """
    (top, left, h, w), fy, fx = box, pixels.shape[0] / shape[0], pixels.shape[1] / shape[1]
    y0, x0 = round(top * fy), round(left * fx)
    y1, x1 = max(y0 + 1, round((top + h) * fy)), max(x0 + 1, round((left + w) * fx))
    return resize(torch.from_numpy(pixels[y0:y1, x0:x1]), size, size, mode=interpolation)


def resize(pixels: torch.Tensor, height: int, width: int, *, mode: str) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, height, width) uint8, antialiased; the memory stays in the order of the
    pixels.
    """
    # [None] before permute: with these strides torch sees channels_last, which is twice as fast.
    image = pixels.contiguous()[None].permute(0, 3, 1, 2)
    if image.shape[2:] == (height, width):
        return image[0]
    return torch.nn.functional.interpolate(
        image, size=(height, width), mode=mode, align_corners=False, antialias=True
    )[0]


def _header(data: bytes, max_pixels: int) -> tuple[int, int, bool, int]:
    """Stored height and width, whether simplejpeg takes it, and the EXIF orientation (1 to 8)."""
    if not data:
        raise DataError("empty_image")
    jpeg, turn = False, 1
    if data[:2] == b"\xff\xd8":
        try:
            rows, columns, colour, _ = simplejpeg.decode_jpeg_header(data)
            height, width = int(rows), int(columns)
            jpeg = colour not in ("CMYK", "YCCK")
            turn = jpeg_orientation(data) if jpeg else 1
        except ValueError:  # an uncommon kind of JPEG, or none: Pillow has the last word
            width, height = open_image(data, max_pixels=sys.maxsize).size
    else:
        width, height = open_image(data, max_pixels=sys.maxsize).size
    if height * width > max_pixels:
        raise DataError("image_too_large", f"{width} x {height} is more than max_pixels = {max_pixels}")
    return height, width, jpeg, turn


def _pixels(data: bytes, jpeg: bool, turn: int, factor: int = 1, *, fast: bool = False) -> np.ndarray:
    """The upright picture as (H, W, 3) uint8; a JPEG is decoded at 1/factor, `fast` without smoothing its colours.

    That saves a fifteenth of the time at 53 dB. libjpeg's fast cosine transform would save a fiftieth at 43 dB.
    """
    if not jpeg:
        return decode_pillow(data)
    try:
        if factor > 1:
            rows, columns, _, _ = simplejpeg.decode_jpeg_header(data)
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                fastupsample=fast,
                min_height=-(-int(rows) // factor),
                min_width=-(-int(columns) // factor),
                min_factor=factor,
            )
        else:
            pixels = simplejpeg.decode_jpeg(data, "RGB", fastupsample=fast)
    except ValueError:
        # libjpeg's warnings are errors there. Pillow passes over harmless ones (stray bytes) and refuses a
        # cut file.
        pixels = decode_pillow(data, upright=False)
    return _upright(pixels, turn)


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Undo an EXIF orientation (Exif 2.3, tag 0x0112)."""
    if turn == 1:
        return pixels
    if turn > 4:
        pixels = pixels.transpose(1, 0, 2)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
