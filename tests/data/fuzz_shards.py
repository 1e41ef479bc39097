"""Fuzz the reading of tars, json, captions and images: no crash, no hang, nothing but DataError.

    python tests/data/fuzz_shards.py SECONDS [SEED [CASES]]

Every case is a small shard with random damage: bytes overwritten, runs copied or removed, the end cut, header
fields set to extreme numbers, json and images replaced by mutations of good ones. A case that takes a
minute is a hang. The last line is the number of cases; a failing case is written to fuzz-failure.tar and
named.
"""

from __future__ import annotations

import io
import json
import math
import random
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from PIL import Image

from clipkit.data.decode import decode_eval, decode_train
from clipkit.data.faults import CAUSES, DataError
from clipkit.data.shardset import ShardSet
from clipkit.data.tokenizers import ClipBPE

_NUMBERS = [
    b"00000000000",
    b"77777777777",
    b"-0000000001",
    b"\x80" + b"\xff" * 10,
    b"\xff" * 11,
    b"           ",
    b"00000000001",
    b"\x80" + b"\0" * 10,
]
_TEXTS = [
    '{"captions": ["a", "b"]}',
    '{"captions": 3, "caption": null}',
    '{"caption": {"a": []}}',
    "[" * 2000,
    '"\\ud800"',
    '{"caption": "half \\ud800 pair"}',
    "1e999",
    '{"captions": ["\\u0000", "", " "]}',
    '{"a": NaN, "caption": "x"}',
]


def pictures() -> list[bytes]:
    out = []
    for form, mode, options in (
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGB", {}),
        ("GIF", "P", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
    ):
        image = Image.linear_gradient("L").resize((24, 18)).convert("I" if mode == "I;16" else mode)
        exif = Image.Exif()
        exif[0x0112] = len(out) % 8 + 1
        file = io.BytesIO()
        if form in ("JPEG", "PNG", "WEBP"):
            options = {**options, "exif": exif}
        (image.convert("I;16") if mode == "I;16" else image).save(file, form, **options)
        out.append(file.getvalue())
    return out


def damage(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if not data:
            break
        at = rng.randrange(len(data))
        what = rng.randrange(6)
        if what == 0:
            data[at] = rng.randrange(256)
        elif what == 1:
            data[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(1, 64))
        elif what == 2:
            del data[at : at + rng.randrange(1, 600)]
        elif what == 3:
            data[at:at] = data[at : at + rng.randrange(1, 600)]
        elif what == 4:
            del data[at:]
        else:
            data[at] ^= 1 << rng.randrange(8)
    return bytes(data)


def header_damage(data: bytes, rng: random.Random) -> bytes:
    """Extreme numbers and types in a header, with a right checksum, so that the parser believes them."""
    data = bytearray(data)
    block = rng.randrange(max(1, len(data) // 512)) * 512
    header = data[block : block + 512]
    if len(header) < 512:
        return bytes(data)
    if rng.random() < 0.6:
        header[124:135] = rng.choice(_NUMBERS)
    if rng.random() < 0.6:
        header[156:157] = rng.choice(
            (b"0", b"1", b"2", b"5", b"6", b"L", b"K", b"x", b"g", b"S", b"\xff", b"\0")
        )
    if rng.random() < 0.3:
        header[0:100] = rng.randbytes(100)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[block : block + 512] = header
    return bytes(data)


def shard(rng: random.Random, images: list[bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(
        fileobj=file, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as tar:
        for i in range(rng.randrange(1, 4)):
            key = "n" * rng.choice((3, 90, 140)) + str(i)
            image = rng.choice(images)
            meta = (
                rng.choice(_TEXTS).encode()
                if rng.random() < 0.3
                else json.dumps({"captions": ["a"]}).encode()
            )
            for extension, data in (("jpg", image), ("txt", b"words"), ("json", meta)):
                info = tarfile.TarInfo(f"{key}.{extension}")
                data = damage(data, rng) if rng.random() < 0.4 else data
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    data = file.getvalue()
    if rng.random() < 0.3:
        data = header_damage(data, rng)
    return damage(data, rng) if rng.random() < 0.3 else data


def read(path: Path, cache: Path, tokenizer: ClipBPE, seen: Counter[str]) -> None:
    """All of a shard, as training and evaluation read it."""
    try:
        data = ShardSet([str(path)], cache_dir=cache, on_bad_shard="skip")
    except DataError as error:
        seen[error.cause] += 1
        return
    for _, cause, _ in data.faults:
        seen[cause] += 1
    for sample in data:
        try:
            image = data.image(sample)
            assert decode_train(image, 16, draws=[0.3, 0.6, 0.1, 0.9] * 6, max_pixels=1_000_000).shape == (
                3,
                16,
                16,
            )
            assert decode_eval(image, 16, max_pixels=1_000_000).shape == (3, 16, 16)
            captions = data.captions(sample)
            assert all(text.strip() for text in captions)
            assert tokenizer(captions).shape == (len(captions), 77)
            seen["good"] += 1
        except DataError as error:
            seen[error.cause] += 1
    data.close()


def hang(number, frame):
    raise TimeoutError("a case took a minute")


def main(seconds: float, seed: int = 0, most: float = math.inf) -> int:
    warnings.simplefilter("ignore")
    rng, images, tokenizer, seen = random.Random(seed), pictures(), ClipBPE(), Counter()
    signal.signal(signal.SIGALRM, hang)
    end, cases = time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "case.tar", Path(folder) / "cache"
        while cases < most and time.monotonic() < end:
            data = shard(rng, images)
            path.write_bytes(data)
            signal.alarm(60)
            try:
                read(path, cache, tokenizer, seen)
            except BaseException:
                Path("fuzz-failure.tar").write_bytes(data)
                print(f"case {cases} of seed {seed} failed; it is in fuzz-failure.tar", file=sys.stderr)
                raise
            finally:
                signal.alarm(0)
            for file in cache.glob("index/*"):
                file.unlink()
            cases += 1
    unknown = set(seen) - set(CAUSES) - {"good"}
    assert not unknown, f"causes that are not in CAUSES: {unknown}"
    print(json.dumps(dict(seen.most_common())))
    print(f"{cases} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *map(int, sys.argv[2:])))
