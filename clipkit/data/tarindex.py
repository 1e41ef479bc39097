"""Where every sample of a tar lies: an index made once by reading headers, then samples by position.

The parser reads 512-byte headers and skips the contents. It never extracts, follows or opens a member: a
link, a device, an absolute path or a pickle is a name and a number of bytes, nothing more. A broken header
does not lose the rest of the shard: reading resumes at the next block whose checksum is right.

The index of a local tar is kept as one small .npz under `cache_dir`, named by the tar's path, size and
modification time.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from clipkit.data.faults import CAUSES
from clipkit.data.order import number
from clipkit.foreign import BrokenFile, parse_json, read_bytes

IMAGES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jfif"),
    *("avif", "heic", "heif", "jp2", "jxl"),
)
_BLOCK = 512
_VERSION = 5
# How compressed files begin, and what undoes it.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_COLUMNS = ("image", "text", "json")
# Bytes of a long name or extended header, and of an index; digits of a number in an extended header.
_NAME_BYTES, _INDEX_BYTES, _DIGITS = 1 << 20, 1 << 31, 18


@dataclass
class ShardIndex:
    """The samples of one shard in file order.

    Attributes:
        keys: KEY of each sample.
        spans: (n, 3, 2) int64: offset and size in bytes of the image, caption and json; offset -1 when
            absent.
        faults: (cause, key or member name) of everything left out.
        size: bytes of the tar that was indexed.
    """

    keys: list[str]
    spans: np.ndarray
    faults: list[tuple[str, str]] = field(default_factory=list)
    size: int = 0


def index_tar(path: str | Path) -> ShardIndex:
    """Read the headers of a tar file; faults are collected, not raised.

    Raises:
        OSError: the file cannot be opened.
    """
    faults: list[tuple[str, str]] = []
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    duplicates: set[str] = set()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return ShardIndex([], np.empty((0, 3, 2), np.int64), [("empty_shard", "")])
        for name, offset, length in _members(file, size, faults):
            key, _, extension = _split(name)
            extension = extension.lower()
            part = "image" if extension in IMAGES else {"txt": "text", "json": "json"}.get(extension)
            if part is None:
                samples.setdefault(key, {})
                continue
            found = samples.setdefault(key, {})
            if part in found:
                if key not in duplicates:
                    duplicates.add(key)
                    faults.append(("duplicate_key", key))
                continue
            found[part] = (offset, length)
    return _complete(samples, faults, size)


def tar_members(path: str | Path) -> list[tuple[str, int, int]]:
    """(name, offset and size of its contents) of every regular file in a tar, in order; for reading what is no shard.

    Links, devices, sparse files and names that lead out are left out.

    Raises:
        BrokenFile: no tar, one cut short, or a header in it that is broken.
        OSError: the file cannot be opened.
    """
    faults: list[tuple[str, str]] = []
    with open(path, "rb") as file:
        members = list(_members(file, os.fstat(file.fileno()).st_size, faults))
    for cause, where in faults:
        if cause in ("unreadable_shard", "truncated_shard", "corrupt_header"):
            raise BrokenFile(f"{path}: {CAUSES[cause]}{f' ({where[:200]})' if where else ''}")
    return members


def _complete(
    samples: dict[str, dict[str, tuple[int, int]]], faults: list[tuple[str, str]], size: int
) -> ShardIndex:
    """Keep the samples that have an image and a caption; name the others."""
    keys, spans = [], []
    # The sample that a truncation cut through is part of that fault, not another one.
    cut = next((_split(name)[0] for cause, name in faults if cause == "truncated_shard"), None)
    for key, parts in samples.items():
        if key == cut and ("image" not in parts or not parts.keys() & {"text", "json"}):
            continue
        if "image" not in parts:
            faults.append(("missing_image", key))
        elif parts["image"][1] == 0:
            faults.append(("empty_image", key))
        elif "text" not in parts and "json" not in parts:
            faults.append(("missing_caption", key))
        else:
            keys.append(key)
            spans.append([parts.get(name, (-1, 0)) for name in _COLUMNS])
    if not samples and not any(cause in ("truncated_shard", "unreadable_shard") for cause, _ in faults):
        faults.append(("empty_shard", ""))
    return ShardIndex(keys, np.asarray(spans, dtype=np.int64).reshape(len(keys), 3, 2), faults, size)


def _split(name: str) -> tuple[str, str, str]:
    """A member's key, a dot, and its extension: all up to, and all after, the first dot of the last path
    part.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, dot, extension


def _members(file: IO[bytes], size: int, faults: list[tuple[str, str]]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, length) of every regular member; offsets are of the contents."""
    position, started, extended = 0, False, _Extended()
    while position + _BLOCK <= size:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            break
        if not header.strip(b"\0"):
            # Two zero blocks end a tar, but concatenated tars go on: skip zeros to the end.
            position = _past_zeros(file, position + _BLOCK, size)
            continue
        length = _valid(header)
        if length is None:
            if not started:
                faults.append(("unreadable_shard", _compressed(file)))
                return
            faults.append(("corrupt_header", f"byte {position}"))
            position, extended = _resync(file, position + _BLOCK, size), _Extended()
            continue
        started = True
        kind = header[156:157]
        name = _name(header) if extended.path is None else extended.path
        if kind in (b"L", b"x", b"X"):
            if position + _BLOCK + length > size:
                faults.append(("truncated_shard", name))
                return
            if length > _NAME_BYTES:
                faults.append(("corrupt_header", f"byte {position}"))
            elif kind == b"L":
                extended.path = _decode(file.read(length).split(b"\0", 1)[0])
            else:
                extended = _pax(file.read(length), extended.path)
            position += _BLOCK + _padded(length)
            continue
        if extended.size is not None:
            length = extended.size
        offset, sparse, extended = position + _BLOCK, extended.sparse, _Extended()
        if kind == b"g" or kind == b"K":
            position = offset + _padded(length)
            continue
        if sparse or kind not in (b"0", b"\0", b"7"):
            faults.append(("not_a_file", name))
            # Links and devices carry no contents, whatever their size field says.
            position = offset + (_padded(length) if kind not in (b"1", b"2", b"3", b"4", b"5", b"6") else 0)
            continue
        if offset + length > size:
            faults.append(("truncated_shard", name))
            return
        position = offset + _padded(length)
        if name.startswith("/") or ".." in name.split("/"):
            faults.append(("unsafe_path", name))
        else:
            yield name.removeprefix("./"), offset, length
    if position < size and size - position < _BLOCK and started:
        faults.append(("truncated_shard", ""))
    elif not started and size % _BLOCK:
        faults.append(("unreadable_shard", _compressed(file)))


def _compressed(file: IO[bytes]) -> str:
    """What is said of a file that is compressed; nothing of another."""
    file.seek(0)
    start = file.read(8)
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"it is compressed by {name}: samples are read by their place in an uncompressed tar, so unpack it once "
                f"({command} FILE); pictures are compressed already"
            )
    return ""


def _past_zeros(file: IO[bytes], position: int, size: int) -> int:
    """The next block that is not all zeros, or the end; holes of a sparse file are not read."""
    descriptor = file.fileno()
    while position + _BLOCK <= size:
        # The buffered file keeps account of where its descriptor stands.
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            data = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            # Nothing but a hole is left; or a file system that does not tell.
            if error.errno == errno.ENXIO:
                return size
            data = position
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)
        position = max(position, data // _BLOCK * _BLOCK)
        chunk = os.pread(descriptor, 1 << 20, position)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        position += zeros // _BLOCK * _BLOCK
        if zeros < len(chunk):
            return position
        if not zeros:
            return size
    return position


def _valid(header: bytes) -> int | None:
    """The member's length when the header's checksum is right, else None."""
    try:
        claimed = int(header[148:156].strip(b" \0") or b"x", 8)
        if sum(header) - sum(header[148:156]) + 8 * 32 != claimed:
            return None
        field_ = header[124:136]
        if field_[0] & 0x80:
            length = int.from_bytes(bytes([field_[0] & 0x7F]) + field_[1:], "big")
        else:
            length = int(field_.strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    return length if 0 <= length < 1 << 62 else None


def _resync(file, position: int, size: int) -> int:
    """The next block with a right checksum, or the end."""
    while position + _BLOCK <= size:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) == _BLOCK and header.strip(b"\0") and _valid(header) is not None:
            return position
        position += _BLOCK
    return size


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _decode(prefix + b"/" + name if prefix else name)


@dataclass
class _Extended:
    """What the headers before a member's own say of it."""

    path: str | None = None
    size: int | None = None
    sparse: bool = False


def _pax(payload: bytes, path: str | None) -> _Extended:
    """The path and size records of an extended header, and whether the contents are not the file's bytes."""
    found = _Extended(path)
    position = 0
    while position < len(payload):
        head = payload[position : position + _DIGITS + 1].partition(b" ")[0]
        # int() refuses thousands of digits by an exception of its own.
        if not head.isdigit() or len(head) > _DIGITS or not 0 < int(head) <= len(payload) - position:
            break
        record = payload[position + len(head) + 1 : position + int(head) - 1]
        position += int(head)
        name, _, value = record.partition(b"=")
        if name == b"path":
            found.path = _decode(value.split(b"\0", 1)[0])
        elif name == b"size" and value.isdigit() and len(value) <= _DIGITS:
            found.size = int(value)
        elif name.startswith(b"GNU.sparse."):
            found.sparse = True
    return found


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def cached_index(path: str, cache_dir: Path) -> ShardIndex:
    """`index_tar` of a local file, kept under `cache_dir` until the file changes."""
    status = os.stat(path)
    file = index_file(cache_dir, os.path.realpath(path), status.st_size, status.st_mtime_ns)
    index = load_index(file, size=status.st_size)
    if index is None:
        index = index_tar(path)
        store_index(file, index)
    return index


def index_file(cache_dir: Path, *identity: str | int) -> Path:
    """Where the index of a tar with this identity is kept."""
    return cache_dir / f"{number(_VERSION, *identity):016x}.npz"


def load_index(file: Path, *, size: int | None = None) -> ShardIndex | None:
    """A stored index, or None when there is none or it is broken: not what `store_index` writes for any tar.

    Args:
        size: bytes of the tar that it must be of; None where that is not known yet.
    """
    try:
        raw = read_bytes(file, limit=_INDEX_BYTES)
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            # Compressed arrays, which are not ours, may be of any length.
            if any(entry.file_size > len(raw) for entry in archive.infolist()):
                return None
        with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
            blob, spans, faults, found = (stored[name] for name in ("keys", "spans", "faults", "size"))
        if blob.dtype != np.uint8 or blob.ndim != 1 or faults.dtype != np.uint8 or faults.ndim != 1:
            return None
        if found.dtype != np.int64 or found.shape != () or size not in (None, int(found)):
            return None
        keys = _unjoin(blob.tobytes())
        if not _are_spans(spans, len(keys), int(found)):
            return None
        listed = parse_json(faults.tobytes(), list[tuple[str, str]], name=str(file))
        if not all(cause in CAUSES for cause, _ in listed):
            return None
        return ShardIndex(keys, spans, listed, int(found))
    except Exception:
        # A crafted .npz makes zipfile and NumPy raise nearly anything; whatever it is, the tar is read again.
        return None


def _are_spans(spans: np.ndarray, count: int, size: int) -> bool:
    """Whether these can be the places of `count` samples in a tar: inside, apart, each with an image and a caption."""
    if spans.dtype != np.int64 or spans.shape != (count, 3, 2):
        return False
    offset, length = spans[..., 0], spans[..., 1]
    there = offset >= 0
    inside = (length >= 0) & (offset <= size) & (length <= size - offset)
    if not np.where(there, inside, (offset == -1) & (length == 0)).all():
        return False
    if not (there[:, 0] & (length[:, 0] > 0) & (there[:, 1] | there[:, 2])).all():
        return False
    order = np.argsort(offset[there], kind="stable")
    starts, ends = offset[there][order], (offset + length)[there][order]
    return bool((ends[:-1] <= starts[1:]).all())


def _unjoin(raw: bytes) -> list[str]:
    return _decode(raw).split("\0") if raw else []


def store_index(file: Path, index: ShardIndex) -> None:
    """Write in one step; a cache that cannot be written is no error."""
    keys = np.frombuffer("\0".join(index.keys).encode("utf-8", "surrogateescape"), dtype=np.uint8)
    # As text: an array of strings takes the longest one's room for each.
    faults = json.dumps(
        [(cause, key.encode("utf-8", "backslashreplace").decode()) for cause, key in index.faults]
    )
    part = file.with_name(f"{file.stem}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out:
            np.savez(
                out,
                keys=keys,
                spans=index.spans,
                size=np.int64(index.size),
                faults=np.frombuffer(faults.encode(), dtype=np.uint8),
            )
        os.replace(part, file)
    except OSError:
        return
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
