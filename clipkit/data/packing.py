"""Writing shards from a table or a folder, in parallel, resumable.

Row number r of the source becomes key `r` with nine digits, in shard r div `samples_per_shard`: what a key
came from is never a question, and a shard that is finished (its `_stats.json` is written last) is not done
again while its rows, and the times and sizes of their files, are what they were. Image bytes are stored as they are,
unless `resize` asks for smaller ones; every image is decoded once, and rows that a training run would skip are left
out, counted by the same causes and named. The rows of the table, the samples and what is left out are added up: a row
that is neither is an error.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from PIL import Image

from clipkit.data.captions import clean_caption
from clipkit.data.decode import MAX_PIXELS, decode, read_image
from clipkit.data.faults import DataError
from clipkit.data.tables import SUFFIXES, read_table
from clipkit.data.tarindex import IMAGES
from clipkit.foreign import BrokenFile, read_bytes, read_json

# Bytes of a captions file beside a picture.
_CAPTION_BYTES = 1 << 20
# Rows left out that a report names for each cause, and letters of what it says of one.
_NAMED, _SHOWN = 20, 200
# What a sample's json holds by itself.
_OWN = ("key", "status", "caption", "captions", "width", "height", "source")

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
    keep: Sequence[str] = (),
    separator: str | None = None,
    encoding: str | None = None,
    quotes: str = "auto",
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
        keep: further columns, which each sample's json gets, such as an id for data.pair_ids.
        separator, encoding, quotes: of a table, where it does not say itself; see `clipkit.data.tables.read_table`.

    Returns:
        {"rows", "samples", "shards", "skipped": {cause: n}} over all shards, finished earlier or now, and where rows
        were skipped "examples": {cause: up to 20 of "row 7 (line 9): picture: why"}.

    Raises:
        ValueError: no such source or column, a table that is broken (names file and line), or a folder with shards
            made from other arguments, or from more rows than there are now.
        RuntimeError: rows that are neither samples nor skipped.
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
    if taken := [name for name in keep if name in _OWN]:
        raise ValueError(
            f"keep: {taken[0]!r} is a field that a sample's json has by itself: rename the column"
        )
    root = Path(root) if root else (source if source.is_dir() else source.parent)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "source": str(source.resolve()),
        "image": image,
        "caption": columns,
        "root": str(root.resolve()),
        "samples_per_shard": samples_per_shard,
        "resize": resize,
        **({"keep": list(keep)} if keep else {}),
        **{k: v for k, v in {"separator": separator, "encoding": encoding}.items() if v},
        **({"quotes": quotes} if quotes != "auto" else {}),
    }
    _same_settings(folder / "pack.json", settings)
    total: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    examples: dict[str, list[tuple[int, str]]] = {}
    rows_read = 0
    table = {"separator": separator, "encoding": encoding, "quotes": quotes}
    with ProcessPoolExecutor(workers) as pool:
        running: set[Future] = set()
        for number, rows in _chunks(_rows(source, image, columns, keep, **table), samples_per_shard):
            rows_read += len(rows)
            running.add(
                pool.submit(_write_shard, folder, number, rows, root, resize, max_pixels, samples_per_shard)
            )
            while len(running) > 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                _add(done, total, skipped, examples)
        _add(running, total, skipped, examples)
    if not total["rows"]:
        raise ValueError(f"{source} has no rows")
    more = [
        tar for tar in sorted(folder.glob("*.tar")) if tar.stem.isdigit() and int(tar.stem) >= total["shards"]
    ]
    if more:
        raise ValueError(
            f"{folder} holds {len(more)} more shards, from {more[0].name} on, than the {total['rows']} rows that {source} "
            "has now make: remove these, or give an empty folder"
        )
    if not rows_read == total["rows"] == total["samples"] + sum(skipped.values()):
        raise RuntimeError(
            f"{source} has {rows_read} rows, of which {total['rows']} were written, as {total['samples']} samples and "
            f"{sum(skipped.values())} skipped ones: do not use {folder}, and report this"
        )
    named = {cause: [what for _, what in sorted(found)[:_NAMED]] for cause, found in sorted(examples.items())}
    return {
        "rows": total["rows"],
        "samples": total["samples"],
        "shards": total["shards"],
        "skipped": dict(sorted(skipped.items())),
        **({"examples": named} if named else {}),
    }


def _add(
    done: set[Future],
    total: Counter[str],
    skipped: Counter[str],
    examples: dict[str, list[tuple[int, str]]],
) -> None:
    for future in done:
        stats = future.result()
        for row, cause, what in stats["left_out"]:
            if len(examples.setdefault(cause, [])) < _NAMED:
                examples[cause].append((row, f"row {row}{what}"))
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


class _Source(NamedTuple):
    """One row: its line in the table or 0, a path or bytes, captions (None: beside the picture), more for its json; or
    what is wrong with it.
    """

    line: int
    image: Any = None
    captions: list[str] | None = None
    kept: dict[str, Any] = {}
    broken: str = ""


def _chunks(rows: Iterator[_Source], size: int) -> Iterator[tuple[int, list[_Source]]]:
    number, chunk = 0, []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield number, chunk
            number, chunk = number + 1, []
    if chunk:
        yield number, chunk


def _rows(
    source: Path, image: str, captions: Sequence[str], keep: Sequence[str] = (), **table: Any
) -> Iterator[_Source]:
    """Every row, in the source's order."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower().lstrip(".") in IMAGES and path.is_file():
                yield _Source(0, str(path.relative_to(source)))
        return
    if source.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{source} is not {', '.join(SUFFIXES)} or a folder")
    try:
        for line, row in read_table(source, [image, *captions, *keep], **table):
            yield (
                _Source(line, broken=row)
                if isinstance(row, str)
                else _source(line, row, image, captions, keep)
            )
    except BrokenFile as error:
        if "has no column" in str(error):
            raise ValueError(f"{error}. Choose with --image and --caption") from None
        raise


def _source(
    line: int, row: dict[Any, Any], image: str, captions: Sequence[str], keep: Sequence[str]
) -> _Source:
    texts: list[str] = []
    for name in captions:
        value = row.get(name)
        listed = value if isinstance(value, (list, tuple)) else [value]
        texts += [one for one in listed if isinstance(one, str)]
    value = row.get(image)
    value = value.get("bytes") or value.get("path") if isinstance(value, dict) else value
    return _Source(line, value, texts, {name: row.get(name) for name in keep})


class _Stats(TypedDict):
    """What is written beside a shard when it is finished."""

    rows: int
    of: str
    samples: int
    skipped: dict[str, int]
    left_out: list[tuple[int, str, str]]
    bytes: int


def _write_shard(
    folder: Path,
    number: int,
    rows: list[_Source],
    root: Path,
    resize: int | None,
    max_pixels: int,
    samples_per_shard: int,
) -> _Stats:
    """Write one shard whole, then its statistics; a finished one is left as it is."""
    tar_path, stats_path = folder / f"{number:06d}.tar", folder / f"{number:06d}_stats.json"
    of = _digest(rows, root)
    try:
        stats: _Stats = read_json(stats_path, _Stats)
        if stats["of"] == of and tar_path.stat().st_size == stats["bytes"]:
            return stats
    except (OSError, BrokenFile):
        # Not finished, or damaged: it is made again.
        pass
    left_out: list[tuple[int, str, str]] = []
    samples, part = 0, folder / f"{number:06d}.part"
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, row in enumerate(rows, number * samples_per_shard):
            try:
                members = _members(f"{i:09d}", row, root, resize, max_pixels)
            except DataError as error:
                left_out.append((i, error.cause, _named(row, error)))
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
        "of": of,
        "samples": samples,
        "skipped": dict(Counter(cause for _, cause, _ in left_out)),
        "left_out": left_out,
        "bytes": tar_path.stat().st_size,
    }
    stats_part = stats_path.with_suffix(".part")
    stats_part.write_text(json.dumps(stats))
    os.replace(stats_part, stats_path)
    return stats


def _digest(rows: list[_Source], root: Path) -> str:
    """Of what a shard is made from: its rows, and size and time of the files that they name."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        image, files = row.image, []
        if isinstance(image, (bytes, bytearray)):
            digest.update(image)
            image = len(image)
        elif isinstance(image, str) and image:
            files = (
                [root / image]
                if row.captions is not None
                else [root / image, (root / image).with_suffix(".txt")]
            )
        said = (row.line, image, row.captions, row.kept, row.broken, [*map(_size_and_time, files)])
        digest.update(repr(said).encode("utf-8", "backslashreplace") + b"\0")
    return digest.hexdigest()


def _size_and_time(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _named(row: _Source, error: DataError) -> str:
    """What a report says of a row that is left out, in letters that any file can hold."""
    line = f" (line {row.line})" if row.line else ""
    picture = f": {row.image}"[:_SHOWN] if isinstance(row.image, str) and row.image else ""
    why = f": {error.detail}"[:_SHOWN] if error.detail else ""
    return f"{line}{picture}{why}".encode("utf-8", "backslashreplace").decode()


def _members(
    key: str, row: _Source, root: Path, resize: int | None, max_pixels: int
) -> list[tuple[str, bytes]]:
    """The three files of one sample. DataError says why there is none."""
    if row.broken:
        raise DataError("broken_row", row.broken)
    value, captions = row.image, row.captions
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
    texts = [text for text in map(clean_caption, captions or []) if text]
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
        **row.kept,
    }
    return [
        (f"{key}.{_EXTENSIONS.get(data[:2], 'jpg')}", data),
        (f"{key}.txt", texts[0].encode()),
        (
            f"{key}.json",
            json.dumps(meta, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace"),
        ),
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
