"""Where every sample of a tar lies: an index made once by reading headers, then samples by position.

The parser reads 512-byte headers and skips the contents. It never extracts, follows or opens a member: a
link, a device, an absolute path or a pickle is a name and a number of bytes, nothing more. A broken header
does not lose the rest of the shard: reading resumes at the next block whose checksum is right.

An index holds what shows that the tar is still the one that was read: a digest over pieces of it (`probe`), and each
member's header as a checksum, which is compared whenever the member is read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from clipkit.data.faults import CAUSES, DataError
from clipkit.foreign import BrokenFile

IMAGES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "jfif"),
    *("avif", "heic", "heif", "jp2", "jxl"),
)
# Bytes of a header, and of what contents are padded to.
BLOCK = 512
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
# Bytes of a long name or extended header; digits of a number in an extended header.
_NAME_BYTES, _DIGITS = 1 << 20, 18
# Pieces of a tar that its probe reads, and bytes of each.
_PIECES, _PIECE = 8, 4096


@dataclass
class ShardIndex:
    """The samples of one shard in file order.

    Attributes:
        keys: KEY of each sample.
        spans: (n, 3, 2) int64: offset and size in bytes of the image, caption and json; offset -1 when
            absent.
        faults: (cause, key or member name) of everything left out.
        size: bytes of the tar that was indexed.
        probe: `probe` of it.
        heads: (n, 3) uint32: CRC-32 of the 512-byte header right before each of `spans`; 0 when absent.
    """

    keys: Sequence[str]
    spans: np.ndarray
    faults: list[tuple[str, str]] = field(default_factory=list)
    size: int = 0
    probe: int = 0
    heads: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.uint32))


def index_tar(path: str | Path) -> ShardIndex:
    """Read the headers of a tar file; faults are collected, not raised.

    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        return index_stream(file, os.fstat(file.fileno()).st_size)


def index_stream(file: IO[bytes], size: int) -> ShardIndex:
    """`index_tar` of an open file of so many bytes that can be read anywhere."""
    faults: list[tuple[str, str]] = []
    samples: dict[str, dict[str, tuple[int, int, int]]] = {}
    duplicates: set[str] = set()
    if size == 0:
        return ShardIndex([], np.empty((0, 3, 2), np.int64), [("empty_shard", "")])
    for name, offset, length, head in _members(file, size, faults):
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
        found[part] = (offset, length, head)

    def read(length: int, offset: int) -> bytes:
        file.seek(offset)
        return file.read(length)

    index = _complete(samples, faults, size)
    index.probe = probe(read, size)
    return index


def probe(read: Callable[[int, int], bytes], size: int) -> int:
    """A 64-bit digest of a file's size and of eight pieces of it, 4 KiB each: another tar of the same name and size has
    another one, unless all eight are equal.

    Args:
        read: (length, offset) -> bytes.
        size: bytes of the file.
    """
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=8)
    for piece in range(_PIECES):
        digest.update(read(_PIECE, size * piece // _PIECES // BLOCK * BLOCK))
    return int.from_bytes(digest.digest(), "little")


def probe_file(file: int) -> int:
    """`probe` of an open file descriptor."""
    return probe(lambda length, offset: os.pread(file, length, offset), os.fstat(file).st_size)


@dataclass(frozen=True)
class Member:
    """Where a file of a tar lies.

    Attributes:
        name: its path in the tar.
        offset, size: of its contents.
        head: CRC-32 of the 512-byte header right before them.
    """

    name: str
    offset: int
    size: int
    head: int


class TarFiles:
    """A tar that is no shard: its regular files, read by their places.

    Links, devices, sparse files and names that lead out are left out.

    Attributes:
        path: of the tar.
        members: in order.

    Raises:
        BrokenFile: no tar, one cut short, or a header in it that is broken.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        faults: list[tuple[str, str]] = []
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            self.members = [Member(*found) for found in _members(file, status.st_size, faults)]
            self._written, self._probe = _written(status), probe_file(file.fileno())
        for cause, where in faults:
            if cause in ("unreadable_shard", "truncated_shard", "corrupt_header"):
                raise BrokenFile(f"{path}: {CAUSES[cause]}{f' ({where[:200]})' if where else ''}")

    def read(self, member: Member) -> bytes:
        """A member's contents. DataError changed_shard where the tar is another one than was listed."""
        with open(self.path, "rb") as file:
            if (written := _written(os.fstat(file.fileno()))) != self._written:
                if probe_file(file.fileno()) != self._probe:
                    raise self._changed()
                self._written = written
            data = os.pread(file.fileno(), BLOCK + member.size, member.offset - BLOCK)
        if len(data) < BLOCK + member.size or zlib.crc32(data[:BLOCK]) != member.head:
            raise self._changed()
        return data[BLOCK:]

    def _changed(self) -> DataError:
        return DataError(
            "changed_shard", "it was written anew since its members were listed", shard=str(self.path)
        )


def _written(status: os.stat_result) -> tuple[int, int, int]:
    """What tells that a file was written again."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _complete(
    samples: dict[str, dict[str, tuple[int, int, int]]], faults: list[tuple[str, str]], size: int
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
            spans.append([parts.get(name, (-1, 0, 0)) for name in _COLUMNS])
    if not samples and not any(cause in ("truncated_shard", "unreadable_shard") for cause, _ in faults):
        faults.append(("empty_shard", ""))
    table = np.asarray(spans, dtype=np.int64).reshape(len(keys), 3, 3)
    heads = table[..., 2].astype(np.uint32)
    return ShardIndex(keys, np.ascontiguousarray(table[..., :2]), faults, size, heads=heads)


def _split(name: str) -> tuple[str, str, str]:
    """A member's key, a dot, and its extension: all up to, and all after, the first dot of the last path
    part.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, dot, extension


def _members(
    file: IO[bytes], size: int, faults: list[tuple[str, str]]
) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, offset, length, CRC-32 of its header) of every regular member; offsets are of the contents."""
    position, started, extended = 0, False, _Extended()
    while position + BLOCK <= size:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            break
        if not header.strip(b"\0"):
            # Two zero blocks end a tar, but concatenated tars go on: skip zeros to the end.
            position = _past_zeros(file, position + BLOCK, size)
            continue
        length = _valid(header)
        if length is None:
            if not started:
                faults.append(("unreadable_shard", _compressed(file)))
                return
            faults.append(("corrupt_header", f"byte {position}"))
            position, extended = _resync(file, position + BLOCK, size), _Extended()
            continue
        started = True
        kind = header[156:157]
        name = _name(header) if extended.path is None else extended.path
        if kind in (b"L", b"x", b"X"):
            if position + BLOCK + length > size:
                faults.append(("truncated_shard", name))
                return
            if length > _NAME_BYTES:
                faults.append(("corrupt_header", f"byte {position}"))
            elif kind == b"L":
                extended.path = decode_name(file.read(length).split(b"\0", 1)[0])
            else:
                extended = _pax(file.read(length), extended.path)
            position += BLOCK + _padded(length)
            continue
        if extended.size is not None:
            length = extended.size
        offset, sparse, extended = position + BLOCK, extended.sparse, _Extended()
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
            yield name.removeprefix("./"), offset, length, zlib.crc32(header)
    if position < size and size - position < BLOCK and started:
        faults.append(("truncated_shard", ""))
    elif not started and size % BLOCK:
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
    while (position := _past_hole(file, position, size)) + BLOCK <= size:
        file.seek(position)
        chunk = file.read(1 << 20)
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        position += zeros // BLOCK * BLOCK
        if zeros < len(chunk):
            return position
        if not zeros:
            return size
    return position


def _past_hole(file: IO[bytes], position: int, size: int) -> int:
    """The block in which the next byte is stored, as far as the file system tells, or the end."""
    try:
        descriptor = file.fileno()
        # The buffered file keeps account of where its descriptor stands.
        before = os.lseek(descriptor, 0, os.SEEK_CUR)
        try:
            return max(position, os.lseek(descriptor, position, os.SEEK_DATA) // BLOCK * BLOCK)
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)
    except OSError as error:
        # Nothing but a hole is left; or what does not tell, such as no file of this machine.
        return size if error.errno == errno.ENXIO else position


def _valid(header: bytes) -> int | None:
    """The member's length when the header's checksum is right, else None."""
    try:
        claimed = int(header[148:156].strip(b" \0") or b"x", 8)
        # Adler-32's lower half, begun at 0, is the sum of the bytes modulo 65,521, ten times faster than sum().
        if (zlib.adler32(header, 0) - sum(header[148:156]) + 8 * 32 - claimed & 0xFFFF) and sum(header) - sum(
            header[148:156]
        ) + 8 * 32 != claimed:
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
    while position + BLOCK <= size:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) == BLOCK and header.strip(b"\0") and _valid(header) is not None:
            return position
        position += BLOCK
    return size


def decode_name(raw: bytes) -> str:
    """A name as Python gives file names: bytes that are no UTF-8 come back by "surrogateescape"."""
    return raw.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return decode_name(prefix + b"/" + name if prefix else name)


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
            found.path = decode_name(value.split(b"\0", 1)[0])
        elif name == b"size" and value.isdigit() and len(value) <= _DIGITS:
            found.size = int(value)
        elif name.startswith(b"GNU.sparse."):
            found.sparse = True
    return found


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK
