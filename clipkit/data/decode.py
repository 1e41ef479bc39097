"""Image bytes to uint8 pixels: guarded, converted, cropped and resized.

The header is read first, so that a file claiming a billion pixels costs a microsecond. JPEG goes to
libjpeg-turbo through simplejpeg; for training it decodes straight to a half, quarter, ... of the size when
the crop leaves enough pixels. Everything else, and what simplejpeg does not take (CMYK), goes to Pillow.
Resizing is torch's antialiased filter on uint8, within 2 of 255 of Pillow's.

The work is bounded by the picture's own pixels and by the wanted size, whatever shape it has. Pillow is asked for
the formats below alone: it would run another program for some.

Greyscale, palette, CMYK and 16-bit images are converted to RGB, transparency is laid on white, of an
animation the first frame is used, and the EXIF orientation is applied.
"""

from __future__ import annotations

import io
import math
import struct
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from clipkit.data.faults import DataError
from clipkit.foreign import IMAGE_BYTES, BrokenFile, read_bytes

MAX_PIXELS = 100_000_000
# Pillow opens EPS by running Ghostscript, and knows formats that nobody keeps photographs in.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
# A longer picture is cut to its middle before it is resized for a square of the middle.
_LONGEST = 16
# Pixels converted at once, where a conversion needs several times the picture's memory.
_STRIP = 1 << 20


def decode_train(
    data: bytes,
    size: int,
    *,
    draws: Sequence[float],
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (0.75, 4 / 3),
    max_pixels: int = MAX_PIXELS,
) -> torch.Tensor:
    """A random resized crop: (3, size, size) uint8.

    Args:
        data: the file's bytes.
        size: pixels a side.
        draws: at least 4 numbers in [0, 1), the only randomness (area, shape, left, top).
        scale: smallest and largest area of the crop, as fractions of the picture.
        ratio: smallest and largest width/height of the crop.
        max_pixels: a header that claims more is refused unread.

    Raises:
        DataError: empty_image, corrupt_image or image_too_large.
    """
    height, width, jpeg, turn = _header(data, max_pixels)
    if turn > 4:
        height, width = width, height
    top, left, h, w = crop_box(height, width, draws, scale, ratio)
    # Decode no larger than the crop needs. Only halvings: libjpeg's other scales are slower than the whole
    # picture.
    factor = next((f for f in (8, 4, 2) if min(h, w) >= f * size), 1)
    pixels = _pixels(data, jpeg, turn, factor, fast=True)
    fy, fx = pixels.shape[0] / height, pixels.shape[1] / width
    y0, x0 = round(top * fy), round(left * fx)
    y1, x1 = max(y0 + 1, round((top + h) * fy)), max(x0 + 1, round((left + w) * fx))
    return resize(torch.from_numpy(pixels[y0:y1, x0:x1]), size, size, mode="bilinear")


def decode_eval(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Shorter side to `size` (bicubic, antialiased), centre crop: (3, size, size) uint8. Raises as
    `decode_train`.

    Of a picture more than 16 times as long as wide, only the middle is resized.
    """
    pixels = decode(data, max_pixels=max_pixels)
    top, left, height, width = middle(*pixels.shape[:2])
    pixels = pixels[top : top + height, left : left + width]
    if height <= width:
        h, w = size, max(size, int(size * width / height))
    else:
        h, w = max(size, int(size * height / width)), size
    image = resize(torch.from_numpy(pixels), h, w, mode="bicubic")
    top, left = round((h - size) / 2), round((w - size) / 2)
    return image[:, top : top + size, left : left + size]


def middle(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of what a centre crop can see of a picture: all of it, unless it is very long."""
    longest = _LONGEST * min(height, width)
    # An even number of pixels less, so that the centre stays where it is.
    h = height - max(0, (height - longest + 1) // 2) * 2
    w = width - max(0, (width - longest + 1) // 2) * 2
    return (height - h) // 2, (width - w) // 2, h, w


def decode_squashed(data: bytes, size: int, *, max_pixels: int = MAX_PIXELS) -> tuple[torch.Tensor, float]:
    """The whole picture as (3, size, size) uint8 whatever its shape, and its width/height; for the in-memory
    cache.
    """
    pixels = decode(data, max_pixels=max_pixels)
    return resize(torch.from_numpy(pixels), size, size, mode="bicubic"), pixels.shape[1] / pixels.shape[0]


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The upright picture, (H, W, 3) uint8 RGB. Raises as `decode_train`."""
    _, _, jpeg, turn = _header(data, max_pixels)
    return _pixels(data, jpeg, turn)


def read_size(data: bytes) -> tuple[int, int]:
    """Stored height and width by the header alone. Raises as `decode_train`."""
    return _header(data, sys.maxsize)[:2]


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


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Pillow's image of a file's bytes, not decoded yet.

    Raises:
        DataError: empty_image, corrupt_image, or image_too_large by what its header claims.
    """
    if not data:
        raise DataError("empty_image")
    try:
        image = _open(data)
    except UnidentifiedImageError:
        raise DataError("corrupt_image", "it is in none of the formats that are read") from None
    except Image.DecompressionBombError as error:
        raise DataError("image_too_large", str(error)) from None
    except Exception as error:  # a fuzzed header can make Pillow raise nearly anything
        raise DataError("corrupt_image", f"{type(error).__name__}: {error}") from None
    if image.width * image.height > max_pixels:
        raise DataError(
            "image_too_large", f"{image.width} x {image.height} is more than max_pixels = {max_pixels}"
        )
    return image


def crop_box(
    height: float,
    width: float,
    draws: Sequence[float],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[float, float, float, float]:
    """Top, left, height, width of a random crop (Szegedy et al. 2015, section 6), clipped to the picture."""
    area = height * width * (scale[0] + draws[0] * (scale[1] - scale[0]))
    aspect = math.exp(math.log(ratio[0]) + draws[1] * (math.log(ratio[1]) - math.log(ratio[0])))
    # A crop that does not fit is narrowed to the side it exceeds, keeping its area where the other side
    # allows.
    w = min(width, math.sqrt(area * aspect))
    h = min(height, area / w)
    w = min(width, area / h)
    return draws[3] * (height - h), draws[2] * (width - w), h, w


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
            turn = _jpeg_orientation(data) if jpeg else 1
        except ValueError:  # an uncommon kind of JPEG, or none: Pillow has the last word
            width, height = _pillow_size(data)
    else:
        width, height = _pillow_size(data)
    if height * width > max_pixels:
        raise DataError("image_too_large", f"{width} x {height} is more than max_pixels = {max_pixels}")
    return height, width, jpeg, turn


def _pixels(data: bytes, jpeg: bool, turn: int, factor: int = 1, *, fast: bool = False) -> np.ndarray:
    """The upright picture as (H, W, 3) uint8; a JPEG is decoded at 1/factor, `fast` with libjpeg's quicker
    transforms.
    """
    if not jpeg:
        return _pillow(data)
    try:
        if factor > 1:
            rows, columns, _, _ = simplejpeg.decode_jpeg_header(data)
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                fastdct=fast,
                fastupsample=fast,
                min_height=-(-int(rows) // factor),
                min_width=-(-int(columns) // factor),
                min_factor=factor,
            )
        else:
            pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=fast, fastupsample=fast)
    except ValueError:
        # libjpeg's warnings are errors there. Pillow passes over harmless ones (stray bytes) and refuses a
        # cut file.
        return _pillow(data)
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


def _jpeg_orientation(data: bytes) -> int:
    """The orientation tag of a JPEG's Exif segment; 1 when there is none or it is broken."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return _tiff_orientation(data[position + 10 : position + 2 + length])
        if length < 2:
            break
        position += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    try:
        start = struct.unpack_from(order + "I", tiff, 4)[0] if order else len(tiff)
        for i in range(struct.unpack_from((order or "<") + "H", tiff, start)[0]):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # max_pixels decides, not Pillow's warning.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=_formats())


def _pillow_size(data: bytes) -> tuple[int, int]:
    return open_image(data, max_pixels=sys.maxsize).size


def _pillow(data: bytes) -> np.ndarray:
    """Any format Pillow reads, as (H, W, 3) uint8."""
    try:
        pixels = _rgb(ImageOps.exif_transpose(_open(data)))
        return pixels if pixels.flags.writeable else pixels.copy()
    except DataError:
        raise
    except Exception as error:
        raise DataError("corrupt_image", f"{type(error).__name__}: {error}") from None


def _rgb(image: Image.Image) -> np.ndarray:
    grey = image.mode.startswith("I") or image.mode == "F"
    if not grey and image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    # 16-bit greyscale is scaled to 8; Pillow's own convert clips it to white.
    scale = 257.0 if grey and (image.mode != "F" or _extrema(image)[1] > 255) else 1.0
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows)))
        if grey:
            values = np.asarray(strip).astype(np.float64) / scale
            pixels[top : top + rows] = np.clip(np.rint(values), 0, 255).astype(np.uint8)[:, :, None]
        else:
            strip = strip.convert("RGBA")
            white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
            pixels[top : top + rows] = np.asarray(Image.alpha_composite(white, strip).convert("RGB"))
    return pixels


def _extrema(image: Image.Image) -> Any:
    """Smallest and largest value of a picture with one channel."""
    return image.getextrema()
