"""What kinds of picture are read, by Pillow, and how each becomes upright RGB.

Pillow is asked for the formats below alone: it would run another program for some. What comes of a mode is decided
once, here: greyscale of more than 8 bits is scaled, transparency is laid on white, and the EXIF orientation is undone.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
from collections.abc import Iterator
from functools import cache

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from clipkit.data.faults import DataError

MAX_PIXELS = 100_000_000
# Pillow opens EPS by running Ghostscript, and knows formats that nobody keeps photographs in.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "HEIF")
# Pixels converted at once, where a conversion needs several times the picture's memory.
_STRIP = 1 << 20
# Adobe's XMP specification, part 3: the name of its segment in a JPEG.
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)([1-8])[\"'<]")


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Pillow's image of a file's bytes, not decoded yet.

    Raises:
        DataError: empty_image, corrupt_image, unsupported_image, or image_too_large by what its header claims.
    """
    if not data:
        raise DataError("empty_image")
    try:
        image = _open(data)
    except UnidentifiedImageError:
        name, needed = _named_format(data)
        if name and name not in _formats():
            raise DataError("unsupported_image", f"it is {name}: {needed}") from None
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


def decode_pillow(data: bytes, *, upright: bool = True) -> np.ndarray:
    """Any format Pillow reads as (H, W, 3) uint8, turned `upright` by its EXIF orientation."""
    try:
        image = _open(data)
        if upright:
            # In place: the format and the tags that say what its numbers mean stay with it.
            ImageOps.exif_transpose(image, in_place=True)
        pixels = rgb(image)
        return pixels if pixels.flags.writeable else pixels.copy()
    except DataError:
        raise
    except Exception as error:
        raise DataError("corrupt_image", f"{type(error).__name__}: {error}") from None


def rgb(image: Image.Image) -> np.ndarray:
    """Pillow's image of any mode as (H, W, 3) uint8: deep greyscale scaled to 8 bits, transparency on white.

    Raises:
        DataError: corrupt_image, for numbers whose black and white nobody can tell.
    """
    grey = image.mode.startswith("I") or image.mode == "F"
    if not grey and image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    # Pillow's own convert clips what is above 255 to white.
    white = _white(image) if grey else 255.0
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        rows = slice(top, top + strip.height)
        if grey:
            values = np.asarray(strip).astype(np.float64) * (255.0 / white)
            pixels[rows] = np.clip(np.rint(values), 0, 255).astype(np.uint8)[:, :, None]
        else:
            strip = strip.convert("RGBA")
            paper = Image.new("RGBA", strip.size, (255, 255, 255, 255))
            pixels[rows] = np.asarray(Image.alpha_composite(paper, strip).convert("RGB"))
    return pixels


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _white(image: Image.Image) -> float:
    """The number that is white in a picture of one deep channel: by its bits, or else by the numbers in it.

    Pillow gives 16 bits and fewer as I;16 (a PNG's or PGM's as I in some versions), which a TIFF may fill only in
    part. 32 bits and floating point have no white of their own: 0 to 1 is the convention for fractions, and whole
    numbers within 8 or 16 bits are taken for such.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(258, (16,))
        return 2.0 ** (bits[0] if isinstance(bits, tuple) else bits) - 1
    if image.mode == "I" and image.format not in ("TIFF", None):
        return 65535.0
    low, high, whole = 0.0, 0.0, True
    for _, strip in _strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise DataError("corrupt_image", "a pixel is not a finite number")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        whole = whole and bool((values == np.rint(values)).all())
    if low >= 0 and high <= 1:
        return 1.0
    if low >= 0 and whole and high <= 65535:
        return 255.0 if high <= 255 else 65535.0
    raise DataError(
        "corrupt_image",
        f"its pixels are numbers from {low:g} to {high:g}, of which none says that it is white: save it with 0 to 1, "
        "or with 8 or 16 bits",
    )


def jpeg_orientation(data: bytes) -> int:
    """The orientation tag of a JPEG's Exif segment, or of its XMP one; 1 when there is none or it is broken."""
    position, by_xmp = 2, 1
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != 0xDA:
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        segment = data[position + 4 : position + 2 + length] if marker == 0xE1 else b""
        if segment.startswith(b"Exif\0\0") and (found := _tiff_orientation(segment[6:])) is not None:
            return found
        if segment.startswith(_XMP) and (match := _XMP_ORIENTATION.search(segment)):
            by_xmp = int(match[1])
        if length < 2:
            break
        position += 2 + length
    return by_xmp


def _tiff_orientation(tiff: bytes) -> int | None:
    """The tag's value, 1 for one that means nothing, None where it is absent or cannot be found."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
    try:
        start = struct.unpack_from(order + "I", tiff, 4)[0] if order else len(tiff)
        for i in range(struct.unpack_from((order or "<") + "H", tiff, start)[0]):
            tag, kind, _ = struct.unpack_from(order + "HHI", tiff, start + 2 + 12 * i)
            if tag == 0x0112:
                number = {3: "H", 4: "I"}.get(kind)
                value = struct.unpack_from(order + number, tiff, start + 10 + 12 * i)[0] if number else 1
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return None


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    try:
        import pillow_heif  # pyright: ignore[reportMissingImports]

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    built = {"AVIF": features.check("avif"), "JPEG2000": features.check("jpg_2000")}
    return tuple(name for name in _FORMATS if name in Image.OPEN and built.get(name, True))


def _named_format(data: bytes) -> tuple[str, str]:
    """Which of the formats that not every Pillow reads a file is in, and what it takes; two empty strings for none."""
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL", "convert it, for instance to JPEG"
    if data[4:8] == b"ftyp":
        # ISO 14496-12: the main brand, a version, then the brands it is compatible with.
        brands = {
            data[at : at + 4] for at in range(8, min(len(data), int.from_bytes(data[:4], "big"), 256), 4)
        }
        if brands & {b"avif", b"avis"}:
            return "AVIF", "pip install -U 'Pillow>=11.3'"
        if brands & {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}:
            return "HEIF", "HEIC is read where pillow-heif is: pip install pillow-heif"
    return "", ""


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # max_pixels decides, not Pillow's warning.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data), formats=_formats())
