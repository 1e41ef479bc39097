"""Every kind of picture: upright, in RGB, or counted by a name that says why."""

from __future__ import annotations

import io
import struct
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from clipkit.data import formats
from clipkit.data.decode import DRAWS, decode, decode_eval, decode_small, decode_train, read_size
from clipkit.data.faults import DataError
from clipkit.evals.items import load_image
from tests.data.test_decode import far, save

WHOLE = {"scale": (1.0, 1.0), "ratio": (1e-3, 1e3)}
# What each format can hold, of what Pillow can write.
KINDS = [
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("PNG", mode) for mode in ("RGB", "L", "P", "1", "RGBA", "LA", "I;16")),
    *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    *(("TIFF", mode) for mode in ("RGB", "L", "P", "1", "CMYK", "RGBA", "I;16", "F")),
    *(("AVIF", mode) for mode in ("RGB", "RGBA") if features.check("avif")),
]


def picture(form: str, mode: str, **options) -> bytes:
    """A picture whose corners all differ, 36 wide and 20 high."""
    y, x = np.mgrid[0:20, 0:36]
    ramp = (x * 5 + y * 3).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray((ramp.astype(np.uint16) * 257) + 100)
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32) / 255)
    elif mode in ("RGBA", "LA"):
        image = Image.merge(
            "RGBA", [Image.fromarray(one) for one in (ramp, ramp // 2, 255 - ramp, 255 - ramp // 2)]
        )
        image = image.convert(mode)
    else:
        image = Image.merge("RGB", [Image.fromarray(one) for one in (ramp, ramp // 2, 255 - ramp)]).convert(
            mode
        )
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}.get(form, {})
    out = io.BytesIO()
    image.save(out, form, **lossless, **options)
    return out.getvalue()


def expected(data: bytes, mode: str) -> np.ndarray:
    """By Pillow's own means."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if mode == "I;16":
        grey = np.rint(np.asarray(image).astype(float) / 257)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode == "F":
        return np.repeat(np.rint(np.asarray(image) * 255.0)[:, :, None], 3, axis=2)
    if mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("form, mode", KINDS)
def test_every_way_of_reading_turns_a_picture_upright(form, mode):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = picture(form, mode, exif=exif)
        upright = expected(data, mode)
        assert upright.shape == ((36, 20, 3) if orientation > 4 else (20, 36, 3)), (
            "Pillow wrote no orientation"
        )
        pixels = decode(data)
        assert pixels.shape == upright.shape and far(pixels, upright) <= 1, orientation
        # What is made of it is what is made of the upright picture in a file that needs no turning.
        plain = save(Image.fromarray(pixels), "PNG")
        draws = np.random.default_rng(orientation).random(DRAWS).tolist()
        for make in (
            lambda data: decode_train(data, 16, draws=draws, scale=(0.3, 1.0)),
            lambda data: decode_train(data, 16, draws=draws, **WHOLE),
            lambda data: decode_train(data, 16, draws=draws, scale=None),
            lambda data: decode_eval(data, 16),
            lambda data: decode_eval(data, 16, resize_mode="longest"),
            lambda data: load_image(data, 16),
            lambda data: decode_small(data, 10_000)[0],
            lambda data: decode_small(data, 300)[0],
        ):
            # Training crops do without smoothing a JPEG's colours; two decoders round by 1, which bicubic may double.
            assert far(make(data), make(plain)) <= 4, (orientation, make)
        assert read_size(data) == upright.shape[:2]


def test_a_circle_stays_one():
    """The case: 5 to 8 in a format that Pillow reads gave 128 x 26."""
    canvas = np.full((200, 400), 255, np.uint8)
    y, x = np.mgrid[0:200, 0:400]
    canvas[(y - 100) ** 2 + (x - 200) ** 2 < 80**2] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("PNG", "WEBP", "TIFF", "JPEG"):
        out = io.BytesIO()
        Image.fromarray(canvas).convert("CMYK" if form == "JPEG" else "RGB").save(out, form, exif=exif)
        image = decode_train(out.getvalue(), 64, draws=[0.5] * DRAWS, scale=(0.99, 1.0), ratio=(1.0, 1.0))
        dark = np.argwhere(image[0].numpy() < 128)
        height, width = dark.max(0) - dark.min(0) + 1
        assert abs(int(height) - int(width)) <= 1 and height > 40, (form, height, width)


def test_orientation_by_xmp_and_as_a_long_number():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = picture("JPEG", "RGB")
    turned = decode(picture("JPEG", "RGB", exif=exif))
    for text in (b'<d tiff:Orientation="6"/>', b"<tiff:Orientation>6</tiff:Orientation>"):
        packet = b"http://ns.adobe.com/xap/1.0/\0" + text
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet + plain[2:]
        assert np.array_equal(
            np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).shape, (36, 20, 3)
        )
        assert np.array_equal(decode(data), turned)
    for order, mark in (("<", b"II"), (">", b"MM")):
        tiff = mark + struct.pack(order + "HIHHHIII", 42, 8, 1, 0x0112, 4, 1, 6, 0)
        data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + plain[2:]
        assert np.array_equal(decode(data), turned), order


def tiff(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    return out.getvalue()


RAMP = np.arange(256, dtype=np.float64).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [
        (RAMP / 255).astype(np.float32),
        RAMP.astype(np.float32),
        (RAMP * 257).astype(np.float32),
        RAMP.astype(np.int32),
        (RAMP * 257).astype(np.int32),
        (RAMP * 257).astype(np.uint16),
    ],
    ids=["0 to 1", "8 bits as float", "16 bits as float", "8 bits as int32", "16 bits as int32", "16 bits"],
)
def test_deep_greyscale_is_scaled_to_what_it_shows(values):
    for pixels in (decode(tiff(values)), load_image(tiff(values), 16).permute(1, 2, 0).numpy()):
        assert far(pixels, np.repeat(RAMP[:, :, None], 3, axis=2)) == 0


def test_a_tiff_of_twelve_bits_uses_the_whole_range():
    """Two numbers in three bytes; Pillow reads such files and writes none."""
    numbers = np.arange(64) * 65
    numbers[-1] = 4095
    pairs = numbers.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
    tags = [(256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8), (279, 96)]
    data = b"II" + struct.pack("<HI", 42, 8 + 96) + packed.astype(np.uint8).tobytes()
    data += (
        struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in tags)
        + bytes(4)
    )
    assert far(decode(data)[..., 0].ravel(), np.rint(numbers / 4095 * 255)) == 0


@pytest.mark.parametrize(
    "values, why",
    [
        (RAMP.astype(np.float32) / 100, "numbers from 0 to 2.55, of which none says that it is white"),
        (RAMP.astype(np.float32) - 1, "numbers from -1 to 254"),
        ((RAMP * 70_000).astype(np.int32), "numbers from 0 to 1.785e+07"),
        (np.where(RAMP == 3, np.nan, RAMP).astype(np.float32), "a pixel is not a finite number"),
        (np.where(RAMP == 3, np.inf, RAMP).astype(np.float32), "a pixel is not a finite number"),
    ],
)
def test_numbers_without_a_white_are_counted_with_their_range(values, why):
    for read in (decode, lambda data: load_image(data, 8)):
        with pytest.raises(DataError) as raised:
            read(tiff(values))
        assert raised.value.cause == "corrupt_image" and why in raised.value.detail


def boxed(brand: bytes) -> bytes:
    return struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1" + brand + bytes(100)


@pytest.mark.parametrize(
    "data, name, advice",
    [
        (boxed(b"avif"), "AVIF", "Pillow>=11.3"),
        (boxed(b"heic"), "HEIF", "pip install pillow-heif"),
        (b"\xff\x0a" + bytes(50), "JPEG XL", "convert it"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL", "convert it"),
    ],
)
def test_a_format_that_is_not_read_here_has_a_name_of_its_own(data, name, advice, monkeypatch):
    monkeypatch.setattr(formats, "_formats", lambda: ("JPEG", "PNG"))
    for read in (decode, lambda data: decode_eval(data, 8), lambda data: load_image(data, 8)):
        with pytest.raises(DataError) as raised:
            read(data)
        assert raised.value.cause == "unsupported_image"
        assert f"it is {name}: " in raised.value.detail and advice in raised.value.detail


def test_heic_is_read_where_pillow_heif_is(monkeypatch):
    """Its opener, by its documented call; another stands in for the decoder."""
    opened = []

    def register_heif_opener():
        def factory(file, name):
            opened.append(name)
            return Image.linear_gradient("L")

        Image.register_open("HEIF", factory, lambda head: head[4:12] == b"ftypheic")

    monkeypatch.setitem(
        sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener)
    )
    formats._formats.cache_clear()
    try:
        assert decode(boxed(b"heic")).shape == (256, 256, 3) and opened
    finally:
        Image.OPEN.pop("HEIF", None)
        if "HEIF" in Image.ID:
            Image.ID.remove("HEIF")
        formats._formats.cache_clear()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_a_broken_avif_is_corrupt_where_avif_is_read():
    with pytest.raises(DataError) as raised:
        decode(boxed(b"avif"))
    assert raised.value.cause == "corrupt_image"
