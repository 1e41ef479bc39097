"""A corpus of broken shards, with how often each fault is in it.

    python tests/data/make_faults.py FOLDER        # writes FOLDER/*.tar and prints the counts

The counts are written down beside what is written to the shards, one by one; nothing here imports clipkit.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

from PIL import Image

# Samples of the corpus that are good and counted.
PASSED_OVER = 5


class Touch:
    """Unpickling this makes a file: the sign that something unpickled it."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def picture(
    seed: int, form: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (40, 30), **options
) -> bytes:
    rng = random.Random(seed)
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (4, 4, 20, 20))
    if mode == "I;16":
        image = Image.frombytes(
            "I;16", size, struct.pack(f"<{size[0] * size[1]}H", *range(0, size[0] * size[1] * 50, 50))
        )
    elif mode != "RGB":
        image = image.convert(mode)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def huge_jpeg() -> bytes:
    """A JPEG whose frame header claims 65,000 x 65,000 pixels."""
    data = bytearray(picture(1))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    return bytes(data)


def huge_png() -> bytes:
    """A PNG whose header claims 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 1000)
    chunks = [header, b"IDAT" + body, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


class Shard:
    """A tar being written by hand."""

    def __init__(self, path: Path):
        self.path, self.tar = path, tarfile.open(path, "w", format=tarfile.GNU_FORMAT)

    def add(self, name: str, data: bytes) -> Shard:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))
        return self

    def special(self, name: str, kind: bytes, target: str = "") -> Shard:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        self.tar.addfile(info)
        return self

    def sample(
        self,
        key: str,
        image: bytes | None = None,
        text: bytes | None = b"a caption",
        meta: bytes | None = b"{}",
        extension: str = "jpg",
    ) -> Shard:
        if image is None:
            image = picture(zlib.crc32(key.encode()))
        self.add(f"{key}.{extension}", image)
        if text is not None:
            self.add(f"{key}.txt", text)
        if meta is not None:
            self.add(f"{key}.json", meta)
        return self

    def close(self) -> None:
        self.tar.close()


def make(folder: Path, marker: Path) -> tuple[list[str], Counter[str], int]:
    """Write the corpus.

    Args:
        folder: receives the shards.
        marker: the file that would appear if a pickle in the corpus were loaded.

    Returns:
        Shard paths, {cause: how often}, and how many samples are good.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faults: Counter[str] = Counter()
    good = 0

    shard = Shard(folder / "00-good.tar")
    for i in range(40):
        shard.sample(f"good{i:03d}")
    shard.close()
    good += 40

    # Cut in the middle of an image, and in the middle of a caption.
    for name, cut_at in (("01-cut-image.tar", "cut4.jpg"), ("02-cut-text.tar", "cut4.txt")):
        shard = Shard(folder / name)
        for i in range(6):
            shard.sample(f"{name[:2]}cut{i}", text=b"words " * 400)
        shard.close()
        with tarfile.open(folder / name) as tar:
            end = tar.getmember(name[:2] + cut_at).offset_data + 100
        os.truncate(folder / name, end)
        good += 4
        faults["truncated_shard"] += 1

    (folder / "03-zero.tar").write_bytes(b"")
    Shard(folder / "04-nothing.tar").close()
    faults["empty_shard"] += 2
    (folder / "05-noise.tar").write_bytes(random.Random(5).randbytes(20_000))
    faults["unreadable_shard"] += 1

    good_images = {
        "cmyk": (picture(1, mode="CMYK"), "jpg"),
        "grey": (picture(2, mode="L"), "jpg"),
        "palette": (picture(3, "PNG", "P"), "png"),
        "sixteen": (picture(4, "PNG", "I;16"), "png"),
        "alpha": (picture(5, "PNG", "RGBA"), "png"),
        "greyalpha": (picture(6, "PNG", "LA"), "png"),
        "bits": (picture(7, "PNG", "1"), "png"),
        "webp": (picture(8, "WEBP"), "webp"),
        "gif": (picture(9, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))] * 3), "gif"),
        "animated": (
            picture(10, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))] * 3),
            "webp",
        ),
        "progressive": (picture(11, progressive=True), "jpg"),
        "capital": (picture(12), "JPG"),
        "misnamed": (picture(13, "PNG"), "jpg"),
    }
    shard = Shard(folder / "06-images.tar")
    for key, (data, extension) in good_images.items():
        shard.sample(key, data, extension=extension)
        good += 1
    whole = picture(20, size=(200, 200))
    for key, data, cause in (
        ("halfjpeg", whole[: len(whole) // 2], "corrupt_image"),
        ("noisejpeg", b"\xff\xd8" + b"noise" * 50, "corrupt_image"),
        ("text", b"<html>404</html>", "corrupt_image"),
        ("halfpng", picture(21, "PNG")[:150], "corrupt_image"),
        ("empty", b"", "empty_image"),
        ("hugejpeg", huge_jpeg(), "image_too_large"),
        ("hugepng", huge_png(), "image_too_large"),
    ):
        shard.sample(key, data)
        faults[cause] += 1
    shard.close()

    shard = Shard(folder / "07-captions.tar")
    shard.sample("json-only", text=None, meta=json.dumps({"caption": "from the json"}).encode())
    shard.sample("text-only", meta=None)
    shard.sample("unicode", text="caf\u00e9 \U0001f600".encode())
    good += 2
    for key, text, meta, cause in (
        ("nothing", None, None, "missing_caption"),
        ("blank", b"", None, "empty_caption"),
        ("spaces", b" \n\t ", b"{}", "empty_caption"),
        ("emptylist", None, b'{"captions": []}', "empty_caption"),
        ("latin1", b"caf\xe9", b"{}", "caption_not_utf8"),
        ("invisible", b"\x00\x07\xe2\x80\x8b\xef\xbb\xbf", b"{}", "empty_caption"),
        ("cutjson", None, b'{"caption": "a', "broken_json"),
        ("blankjson", b" ", b'{"caption": "a', "broken_json"),
    ):
        shard.sample(key, text=text, meta=meta)
        faults[cause] += 1
    # These have a caption beside: they are counted, and used.
    for key, meta in (
        ("cutbeside", b'{"caption": "a'),
        ("list", b"[1, 2]"),
        ("deep", b"[" * 100_000),
        ("emptyjson", b""),
        ("binaryjson", b"\xff\xfe\x00"),
    ):
        shard.sample(key, text=b"x", meta=meta)
        faults["broken_json"] += 1
    good += 1 + PASSED_OVER
    shard.close()

    shard = Shard(folder / "08-members.tar")
    shard.special("folder", tarfile.DIRTYPE).sample("folder/inside")
    shard.special("link.jpg", tarfile.SYMTYPE, "/etc/passwd").special(
        "hard.jpg", tarfile.LNKTYPE, "folder/inside.jpg"
    )
    shard.special("fifo.jpg", tarfile.FIFOTYPE).special("device.jpg", tarfile.CHRTYPE)
    faults["not_a_file"] += 5
    shard.sample("a" * 150)
    good += 2
    for name in ("/tmp/absolute.jpg", "../../outside.jpg", "in/../../side.txt"):
        shard.add(name, b"x")
        faults["unsafe_path"] += 1
    shard.add("loaded.pkl", pickle.dumps(Touch(str(marker))))
    faults["missing_image"] += 1
    shard.sample("beside").add("beside.pyd", pickle.dumps(Touch(str(marker))))
    shard.sample("twice").sample("twice")
    faults["duplicate_key"] += 1
    good += 2
    shard.add("lonely.txt", b"no picture")
    faults["missing_image"] += 1
    shard.close()

    shard = Shard(folder / "09-out-of-order.tar")
    keys = [f"apart{i}" for i in range(5)]
    for extension, data in (("jpg", picture(30)), ("txt", b"a caption"), ("json", b"{}")):
        for key in keys:
            shard.add(f"{key}.{extension}", data)
    shard.close()
    good += 5

    # The header of one image is overwritten: that image is lost, what follows is not.
    shard = Shard(folder / "10-header.tar")
    for i in range(6):
        shard.sample(f"header{i}")
    shard.close()
    with tarfile.open(folder / "10-header.tar") as tar:
        at = tar.getmember("header2.jpg").offset
    with open(folder / "10-header.tar", "r+b") as file:
        file.seek(at)
        file.write(b"\xaa" * 512)
    faults["corrupt_header"] += 1
    faults["missing_image"] += 1
    good += 5
    return sorted(str(path) for path in folder.glob("*.tar")), faults, good


if __name__ == "__main__":
    made = make(Path(sys.argv[1]), Path(sys.argv[1]) / "unpickled")
    print(
        json.dumps(
            {"shards": len(made[0]), "good": made[2], "faults": dict(sorted(made[1].items()))}, indent=1
        )
    )
