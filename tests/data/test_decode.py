"""Pixels: against Pillow on real and converted pictures, guarded against huge headers."""

from __future__ import annotations

import io
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data.decode import (
    DRAWS,
    crop,
    crop_box,
    decode,
    decode_eval,
    decode_small,
    decode_train,
    middle,
    read_image,
    resize,
)
from clipkit.data.faults import DataError
from clipkit.evals.items import load_image
from tests.processes import fork


def smooth(width=90, height=60):
    """A picture without sharp edges, so that filters can be compared."""
    x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 2, height))
    channels = [127 + 120 * np.sin(x + k) * np.cos(y - k) for k in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def save(image, form="JPEG", **options):
    out = io.BytesIO()
    image.save(out, form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}), **options)
    return out.getvalue()


def far(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_pixels_equal_pillows(form):
    data = save(smooth(), form)
    assert far(decode(data), Image.open(io.BytesIO(data)).convert("RGB")) <= 1


def test_greyscale_palette_cmyk_and_one_bit_become_rgb():
    for mode, form in (
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "GIF"),
    ):
        data = save(smooth().convert(mode), form)
        assert far(decode(data), Image.open(io.BytesIO(data)).convert("RGB")) <= 1, (mode, form)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.arange(0, 65536, 65536 // 64, dtype=np.uint16).reshape(8, 8)
    pixels = decode(save(Image.fromarray(values), "PNG"))
    assert far(pixels[..., 0], np.rint(values / 257.0)) == 0 and (pixels[..., 0] == pixels[..., 2]).all()


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 128))
    pixels = decode(save(image, "PNG"))
    assert pixels[0, 0].tolist() == [200, 0, 0] and pixels[3, 3].tolist() == [255, 255, 255]
    # 128/255 of (200, 0, 0) over white.
    assert far(pixels[0, 1], [227, 127, 127]) <= 1


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    for form in ("GIF", "WEBP"):
        data = save(
            frames[0],
            form,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if form == "WEBP" else {}),
        )
        assert far(decode(data), frames[0]) <= 2


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (224, 224), (100, 451)])
def test_evaluation_equals_torchvisions_resize_and_centre_crop(size):
    from torchvision.transforms import v2

    data = save(smooth(*size), "PNG")
    pillow = v2.Compose([v2.Resize(128, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(128)])(
        Image.open(io.BytesIO(data)).convert("RGB")
    )
    ours = decode_eval(data, 128)
    assert ours.shape == (3, 128, 128) and ours.dtype == torch.uint8
    assert far(ours.permute(1, 2, 0), pillow) <= 2


def numbers(area, shape, left, top):
    """Random numbers of which the first try's are these."""
    return [area, shape, left, top] + [0.5] * (DRAWS - 4)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (3000, 500), (100, 100), (449, 448)])
def test_a_training_crop_is_the_crop_of_the_whole_picture(size):
    data = save(smooth(*size))
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    for draws in ([0.0, 0.5, 0.0, 0.0], [0.9, 0.1, 0.7, 0.3], [0.5, 0.99, 0.99, 0.99]):
        draws = numbers(*draws)
        top, left, h, w = crop_box(size[1], size[0], draws, (0.4, 1.0), (0.75, 4 / 3))
        expected = whole.crop((left, top, left + w, top + h)).resize((224, 224), Image.Resampling.BICUBIC)
        ours = decode_train(data, 224, draws=draws, scale=(0.4, 1.0))
        # A halved JPEG is used where it has twice what is needed; the picture is smooth.
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(float) - np.asarray(expected)).mean() < 1.0


@pytest.mark.parametrize("side", [300, 448, 500, 900, 1800])
def test_a_training_crop_is_never_decoded_below_its_size(side):
    # The detail of this two-pixel noise would be gone if the JPEG were decoded smaller than the crop needs.
    blocks = np.random.default_rng(0).integers(0, 256, (224 // 2, 224 // 2, 3), dtype=np.uint8)
    whole = Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST)
    ours = (
        decode_train(save(whole), 224, draws=[0.5] * DRAWS, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        .permute(1, 2, 0)
        .numpy()
        .astype(float)
    )
    expected = np.asarray(whole.resize((224, 224), Image.Resampling.BICUBIC)).astype(float)
    assert np.corrcoef(ours.ravel(), expected.ravel())[0, 1] > 0.97


def test_a_huge_header_is_refused_before_decoding():
    data = bytearray(save(smooth()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    for read in (
        lambda d: decode_train(d, 32, draws=[0.5] * DRAWS),
        lambda d: decode_eval(d, 32),
        decode,
        lambda d: decode_small(d, 64),
    ):
        with pytest.raises(DataError, match="65000 x 65000"):
            read(bytes(data))
    with pytest.raises(DataError, match="max_pixels = 1000"):
        decode(save(smooth(), "PNG"), max_pixels=1000)


@pytest.mark.parametrize(
    "data, cause",
    [
        (b"", "empty_image"),
        (b"\xff\xd8", "corrupt_image"),
        (b"hello", "corrupt_image"),
        (b"\x89PNG\r\n\x1a\n", "corrupt_image"),
        (b"GIF89a", "corrupt_image"),
    ],
)
def test_what_is_no_picture_is_named(data, cause):
    with pytest.raises(DataError) as raised:
        decode(data)
    assert raised.value.cause == cause


def test_a_cut_jpeg_is_corrupt_and_stray_bytes_are_not():
    data = save(smooth(200, 200))
    with pytest.raises(DataError, match="corrupt_image"):
        decode(data[: len(data) // 2])
    stray = data[:-2] + b"\x00\x00\x12" + data[-2:]
    assert far(decode(stray), decode(data)) <= 1


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (1000, 3), (1, 500)])
def test_a_small_copy_keeps_the_shape_and_its_bound(size):
    width, height = size
    data = save(smooth(*size), "PNG")
    pixels, shape = decode_small(data, 256)
    h, w, _ = pixels.shape
    assert shape == (height, width) and 0 < h * w <= 256
    if min(h, w) > 1:
        # Each side is the reduced one without its fraction.
        assert abs(w - math.sqrt(256 * width / height)) < 1 and abs(h - math.sqrt(256 * height / width)) < 1
    whole, shape = decode_small(data, width * height)
    assert np.array_equal(whole.numpy(), decode(data)) and shape == (height, width)


def test_crops_of_a_small_copy_show_what_crops_of_the_picture_show():
    data = save(smooth(640, 400))
    pixels, shape = decode_small(data, 96 * 96)
    for draws in np.random.default_rng(0).random((20, DRAWS)).tolist():
        ours = crop(pixels.numpy(), 48, draws, (0.3, 1.0), (0.75, 4 / 3), shape=shape)
        assert (
            np.abs((ours.int() - decode_train(data, 48, draws=draws, scale=(0.3, 1.0)).int()).numpy()).mean()
            < 2
        )


@pytest.mark.parametrize("size", [(160, 10), (10, 160), (161, 10), (40, 3)])
def test_a_long_picture_that_is_not_extreme_is_resized_whole(size):
    height, width = size[1], size[0]
    assert middle(height, width) == (0, 0, height, width) or max(size) > 160
    long = middle(3, 50), middle(50, 3), middle(1, 18), middle(18, 1)
    # 48 of 50 and 16 of 18: as many pixels are cut on both sides, so that the centre stays.
    assert long == ((0, 1, 3, 48), (1, 0, 48, 3), (0, 1, 1, 16), (1, 0, 16, 1))


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (50, 50), (320, 20), (20, 320), (33, 7)])
def test_ordinary_pictures_keep_every_bit(size):
    image = smooth(*size)
    data, short = save(image, "PNG"), min(size)
    width, height = (max(32, int(32 * side / short)) for side in size)
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    whole = resize(torch.from_numpy(decode(data)), height, width, mode="bicubic")
    assert torch.equal(decode_eval(data, 32), whole[:, top : top + 32, left : left + 32])
    pillow = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    assert np.array_equal(load_image(data, 32).permute(1, 2, 0).numpy(), np.asarray(pillow))


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (999, 20), (40, 1)])
def test_the_centre_of_an_extreme_picture_is_that_of_the_whole(size):
    from torchvision.transforms import v2

    image = smooth(*size)
    whole = v2.Compose([v2.Resize(32, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)])(image)
    data = save(image, "PNG")
    for ours in (decode_eval(data, 32), load_image(data, 32)):
        assert ours.shape == (3, 32, 32) and far(ours.permute(1, 2, 0), whole) <= 4


def test_nothing_runs_a_program_to_read_a_picture(monkeypatch):
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *a, **k: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) show\nshowpage\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    for read in (decode, lambda data: load_image(data, 8), lambda data: decode_eval(data, 8)):
        with pytest.raises(DataError, match="corrupt_image: it is in none of the formats"):
            read(eps)


def test_only_regular_files_are_read_as_pictures(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(1 << 30)
    for name, cause in (
        ("fifo.png", "not_a_file"),
        ("link.png", "not_a_file"),
        ("folder.png", "not_a_file"),
        ("large.png", "image_too_large"),
        ("nowhere.png", "missing_image"),
        ("nul\0.png", "missing_image"),
    ):
        for read in (read_image, lambda path: load_image(path, 8)):
            with pytest.raises(DataError) as raised:
                read(tmp_path / name)
            assert raised.value.cause == cause and name.split("\0")[0] in str(raised.value) or "\0" in name


def test_memory_is_bounded_by_the_picture_and_the_wanted_size(tmp_path):
    """Pictures of some hundred bytes: one extremely long, and others whose conversion takes many times their size."""
    program = Path(__file__).with_name("peak_memory.py")
    peaks = json.loads(fork(program, cwd=tmp_path).finished().splitlines()[-1])
    # The first two took 640 MB; 36 megapixels are 108 MB in RGB, and 16-bit ones took 1 GB.
    assert peaks["decode_eval 4000x1"] < 40 and peaks["load_image 1x4000"] < 40
    assert peaks["decode_eval 16 bits"] < 450 and peaks["decode_eval alpha"] < 650, peaks
