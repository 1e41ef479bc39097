"""Where every sample of a tar lies: an index made once by reading headers, then samples by position.

The parser reads 512-byte headers and skips the contents. It never extracts, follows or opens a member: a
link, a device, an absolute path or a pickle is a name and a number of bytes, nothing more. A broken header
does not lose the rest of the shard: reading resumes at the next block whose checksum is right.

The index of a local tar is kept as one small .npz under `cache_dir`, named by the tar's path, size and
modification time.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clipkit.data.order import number

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jfif")
_BLOCK = 512
_VERSION = 2
_COLUMNS = ("image", "text", "json")


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


def _members(file, size: int, faults: list[tuple[str, str]]):
    """Yield (name, offset, length) of every regular member; offsets are of the contents."""
    position, long_name, long_size, started = 0, None, None, False
    while position + _BLOCK <= size:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            break
        if not header.strip(b"\0"):
            # Two zero blocks end a tar, but concatenated tars go on: skip zeros to the end.
            position += _BLOCK
            continue
        length = _valid(header)
        if length is None:
            if not started:
                faults.append(("unreadable_shard", ""))
                return
            faults.append(("corrupt_header", f"byte {position}"))
            position = _resync(file, position + _BLOCK, size)
            long_name = long_size = None
            continue
        started = True
        kind = header[156:157]
        name = _name(header) if long_name is None else long_name
        if kind in b"LxX" and kind != b"":
            if length > 1 << 20 or position + _BLOCK + length > size:
                faults.append(("truncated_shard", name))
                return
            payload = file.read(length)
            if kind == b"L":
                long_name = _decode(payload.rstrip(b"\0"))
            else:
                path, extended = _pax(payload)
                long_name, long_size = path or long_name, extended
            position += _BLOCK + _padded(length)
            continue
        if long_size is not None:
            length = long_size
        offset, long_name, long_size = position + _BLOCK, None, None
        if kind == b"g" or kind == b"K":
            position = offset + _padded(length)
            continue
        if kind not in (b"0", b"\0", b"7"):
            faults.append(("not_a_file", name))
            # Links and devices carry no contents, whatever their size field says.
            position = offset + (_padded(length) if kind not in b"123456" else 0)
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
        faults.append(("unreadable_shard", ""))


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


def _pax(payload: bytes) -> tuple[str | None, int | None]:
    """The path and size records of an extended header."""
    path = size = None
    while payload:
        head, _, _ = payload.partition(b" ")
        if not head.isdigit() or not 0 < int(head) <= len(payload):
            break
        record, payload = payload[len(head) + 1 : int(head) - 1], payload[int(head) :]
        name, _, value = record.partition(b"=")
        if name == b"path":
            path = _decode(value)
        elif name == b"size" and value.isdigit():
            size = int(value)
    return path, size


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def cached_index(path: str, cache_dir: Path) -> ShardIndex:
    """`index_tar` of a local file, kept under `cache_dir` until the file changes."""
    status = os.stat(path)
    file = index_file(cache_dir, os.path.realpath(path), status.st_size, status.st_mtime_ns)
    index = load_index(file)
    if index is None:
        index = index_tar(path)
        store_index(file, index)
    return index


def index_file(cache_dir: Path, *identity: str | int) -> Path:
    """Where the index of a tar with this identity is kept."""
    return cache_dir / f"{number(_VERSION, *identity):016x}.npz"


def load_index(file: Path) -> ShardIndex | None:
    """A stored index, or None when there is none or it is broken."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            keys, spans = _unjoin(stored["keys"].tobytes()), stored["spans"]
            faults = [(str(cause), str(key)) for cause, key in stored["faults"]]
            return ShardIndex(keys, spans, faults, int(stored["size"])) if len(keys) == len(spans) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _unjoin(raw: bytes) -> list[str]:
    return _decode(raw).split("\0") if raw else []


def store_index(file: Path, index: ShardIndex) -> None:
    """Write in one step; a cache that cannot be written is no error."""
    keys = np.frombuffer("\0".join(index.keys).encode("utf-8", "surrogateescape"), dtype=np.uint8)
    faults = [(cause, key.encode("utf-8", "backslashreplace").decode()) for cause, key in index.faults]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            np.savez(
                part,
                keys=keys,
                spans=index.spans,
                size=index.size,
                faults=np.asarray(faults, dtype=np.str_).reshape(-1, 2),
            )
        os.replace(part.name, file)
    except OSError:
        return
