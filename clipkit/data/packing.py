"""Writing shards from a table or a folder, in parallel, resumable.

Row number r of the source becomes key `r` with nine digits, in shard r div `samples_per_shard`: what a key
came from is never a question, and a shard that is finished (its `_stats.json` is written last) is not done
again. Image bytes are stored as they are, unless `resize` asks for smaller ones; every image is decoded once,
and rows that a training run would skip are left out and counted by the same causes.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from PIL import Image

from clipkit.data.decode import MAX_PIXELS, decode, read_image
from clipkit.data.faults import DataError
from clipkit.data.tarindex import IMAGES
from clipkit.foreign import BrokenFile, parse_json, read_bytes, read_json

# Bytes of a captions file beside a picture, of one field of a table, and of one of its lines.
_CAPTION_BYTES, _FIELD_BYTES, _LINE_BYTES = 1 << 20, 1 << 24, 1 << 28

_EXTENSIONS = {
    b"\xff\xd8": "jpg",
    b"\x89P": "png",
    b"RI": "webp",
    b"GI": "gif",
    b"BM": "bmp",
    b"II": "tif",
    b"MM": "tif",
}


def pack(
    source: str | Path,
    folder: str | Path,
    *,
    image: str = "image",
    caption: str | list[str] = "caption",
    root: str | Path | None = None,
    samples_per_shard: int = 10_000,
    workers: int = 1,
    resize: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Write `folder`/000000.tar, 000001.tar, ... from a source.

    Args:
        source: .csv, .tsv, .jsonl or .parquet with one picture a row, or a folder of pictures, each with
            NAME.txt beside it.
        folder: where the shards go.
        image: the column with a path (relative to `root`), or in Parquet the image's bytes or {"bytes": ...}.
        caption: the column with a caption or a list of captions, or several columns.
        root: folder that paths are relative to; None: the source's.
        samples_per_shard: rows a shard.
        workers: processes.
        resize: shorter side in pixels to which larger pictures are reduced (JPEG, quality 95); None keeps the
            bytes.
        max_pixels: larger pictures are left out.

    Returns:
        {"rows", "samples", "shards", "skipped": {cause: n}} over all shards, finished earlier or now.

    Raises:
        ValueError: no such source or column, a table that is broken (names file and line), or a folder with shards
            made from other arguments.
    """
    source, folder = Path(source), Path(folder)
    if not source.is_file() and not source.is_dir():
        raise ValueError(
            f"there is no {source} to pack, or it is a FIFO or device; give a .csv, .tsv, .jsonl, .parquet file or "
            "a folder of pictures"
        )
    if samples_per_shard < 1 or workers < 1 or (resize is not None and resize < 1):
        raise ValueError("samples_per_shard, workers and resize must be at least 1")
    columns = [caption] if isinstance(caption, str) else list(caption)
    root = Path(root) if root else (source if source.is_dir() else source.parent)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "source": str(source.resolve()),
        "image": image,
        "caption": columns,
        "root": str(root.resolve()),
        "samples_per_shard": samples_per_shard,
        "resize": resize,
    }
    _same_settings(folder / "pack.json", settings)
    total: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    with ProcessPoolExecutor(workers) as pool:
        running: set[Future] = set()
        for number, rows in _chunks(_rows(source, image, columns), samples_per_shard):
            running.add(
                pool.submit(_write_shard, folder, number, rows, root, resize, max_pixels, samples_per_shard)
            )
            while len(running) > 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                _add(done, total, skipped)
        _add(running, total, skipped)
    if not total["rows"]:
        raise ValueError(f"{source} has no rows")
    return {
        "rows": total["rows"],
        "samples": total["samples"],
        "shards": total["shards"],
        "skipped": dict(sorted(skipped.items())),
    }


def _add(done: set[Future], total: Counter[str], skipped: Counter[str]) -> None:
    for future in done:
        stats = future.result()
        total.update(rows=stats["rows"], samples=stats["samples"], shards=1)
        skipped.update(stats["skipped"])


def _same_settings(file: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a folder that was begun with other arguments."""
    if file.exists():
        try:
            found = read_json(file)
        except BrokenFile as error:
            raise ValueError(
                f"{error}. It says what {file.parent} was made from: give an empty folder"
            ) from None
        if found != settings:
            changed = sorted(key for key in settings if found.get(key) != settings[key])
            raise ValueError(
                f"{file.parent} holds shards made with other settings ({', '.join(changed)}); give an empty "
                "folder, "
                "or the same settings to go on"
            )
    else:
        file.write_text(json.dumps(settings))


def _chunks(rows: Iterator[tuple[Any, list[str] | None]], size: int) -> Iterator[tuple[int, list]]:
    number, chunk = 0, []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield number, chunk
            number, chunk = number + 1, []
    if chunk:
        yield number, chunk


def _rows(source: Path, image: str, captions: list[str]) -> Iterator[tuple[Any, list[str] | None]]:
    """(path or bytes, captions; None for a folder's images) of every row, in the source's order."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower().lstrip(".") in IMAGES and path.is_file():
                yield str(path.relative_to(source)), None
        return
    for row in _table(source):
        missing = [name for name in [image, *captions] if name not in row]
        if missing:
            raise ValueError(
                f"{source} has no column {missing[0]!r}; its columns are {', '.join(map(str, row))}. Choose "
                "with "
                "--image and --caption"
            )
        texts: list[str] = []
        for name in captions:
            value = row[name]
            listed = value if isinstance(value, (list, tuple)) else [value]
            texts += [one for one in listed if isinstance(one, str)]
        value = row[image]
        yield value.get("bytes") or value.get("path") if isinstance(value, dict) else value, texts


def _table(source: Path) -> Iterator[dict[Any, Any]]:
    suffix = source.suffix.lower()
    if suffix in (".csv", ".tsv"):
        yield from _csv_rows(source, "," if suffix == ".csv" else "\t")
    elif suffix in (".jsonl", ".ndjson"):
        with open(source, "rb") as file:
            line = 0
            while raw := file.readline(_LINE_BYTES):
                line += 1
                if len(raw) == _LINE_BYTES:
                    raise BrokenFile(f"{source}, line {line}: longer than {_LINE_BYTES} bytes")
                if raw.strip():
                    yield parse_json(raw, name=f"{source}, line {line}")
    elif suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from None
        try:
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(256):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, ArithmeticError, LookupError) as error:
            raise BrokenFile(f"{source} is no Parquet file, or a damaged one: {str(error)[:200]}") from None
    else:
        raise ValueError(f"{source} is not .csv, .tsv, .jsonl, .parquet or a folder")


def _csv_rows(source: Path, delimiter: str) -> Iterator[dict[Any, Any]]:
    before = csv.field_size_limit(_FIELD_BYTES)
    try:
        with open(source, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            try:
                yield from reader
            except UnicodeDecodeError:
                raise BrokenFile(f"{source}, near line {reader.line_num + 1}: not UTF-8 text") from None
            except csv.Error as error:
                raise BrokenFile(f"{source}, near line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)


class _Stats(TypedDict):
    """What is written beside a shard when it is finished."""

    rows: int
    samples: int
    skipped: dict[str, int]
    bytes: int


def _write_shard(
    folder: Path,
    number: int,
    rows: list,
    root: Path,
    resize: int | None,
    max_pixels: int,
    samples_per_shard: int,
) -> _Stats:
    """Write one shard whole, then its statistics; a finished one is left as it is."""
    tar_path, stats_path = folder / f"{number:06d}.tar", folder / f"{number:06d}_stats.json"
    try:
        stats: _Stats = read_json(stats_path, _Stats)
        if stats["rows"] == len(rows) and tar_path.stat().st_size == stats["bytes"]:
            return stats
    except (OSError, BrokenFile):
        # Not finished, or damaged: it is made again.
        pass
    skipped: Counter[str] = Counter()
    samples, part = 0, folder / f"{number:06d}.part"
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, (value, captions) in enumerate(rows):
            key = f"{number * samples_per_shard + i:09d}"
            try:
                members = _members(key, value, captions, root, resize, max_pixels)
            except DataError as error:
                skipped[error.cause] += 1
                continue
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            samples += 1
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, tar_path)
    stats = {
        "rows": len(rows),
        "samples": samples,
        "skipped": dict(skipped),
        "bytes": tar_path.stat().st_size,
    }
    stats_part = stats_path.with_suffix(".part")
    stats_part.write_text(json.dumps(stats))
    os.replace(stats_part, stats_path)
    return stats


def _members(
    key: str, value: Any, captions: list[str] | None, root: Path, resize: int | None, max_pixels: int
) -> list[tuple[str, bytes]]:
    """The three files of one sample. DataError says why there is none."""
    source = value if isinstance(value, str) else ""
    if isinstance(value, (bytes, bytearray)):
        data = bytes(value)
    elif source:
        path = root / source
        data = read_image(path)
        if captions is None:
            captions = _beside(path)
    else:
        raise DataError("missing_image", "the row has no image")
    texts = [text.strip() for text in captions or [] if text.strip()]
    if not texts:
        raise DataError("empty_caption" if captions else "missing_caption")
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:  # json can spell half of a surrogate pair
        raise DataError("caption_not_utf8", str(error)) from None
    pixels = decode(data, max_pixels=max_pixels)
    if resize and min(pixels.shape[:2]) > resize:
        data, pixels = _reduce(pixels, resize)
    height, width = pixels.shape[:2]
    meta = {
        "key": key,
        "status": "success",
        "caption": texts[0],
        "captions": texts,
        "width": width,
        "height": height,
        **({"source": source} if source else {}),
    }
    return [
        (f"{key}.{_EXTENSIONS.get(data[:2], 'jpg')}", data),
        (f"{key}.txt", texts[0].encode()),
        (f"{key}.json", json.dumps(meta, ensure_ascii=False).encode("utf-8", "backslashreplace")),
    ]


def _beside(path: Path) -> list[str]:
    """The captions in NAME.txt, one a line."""
    try:
        return read_bytes(path.with_suffix(".txt"), limit=_CAPTION_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError("caption_not_utf8", str(error)) from None
    except BrokenFile as error:
        raise DataError("not_a_file", str(error)) from None
    except OSError:
        return []


def _reduce(pixels: Any, side: int) -> tuple[bytes, Any]:
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    image = Image.fromarray(pixels).resize(
        (max(side, round(width * scale)), max(side, round(height * scale))), Image.Resampling.BICUBIC
    )
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95)
    return out.getvalue(), np.asarray(image)
