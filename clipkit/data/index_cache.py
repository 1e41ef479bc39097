"""The index of a tar as one file under the cache folder.

It is named by the tar's path, size, modification and change time, or by its URL, and is read by memory map: the
processes of a machine share it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from clipkit.data.faults import CAUSES
from clipkit.data.order import number
from clipkit.data.tarindex import BLOCK, ShardIndex, decode_name
from clipkit.foreign import parse_json

_VERSION = 5
_INDEX_BYTES = 1 << 31
# The beginning of a stored index: its kind; the tar's size and probe; samples, bytes of keys and of faults, faults.
_HEAD = struct.Struct("<16sqQqqqq")
_MAGIC = b"clipkit index 04"


@dataclass
class Summary:
    """What a stored index says at its beginning.

    Attributes:
        size, probe: of the tar that was indexed.
        count: samples.
        faults: how many things indexing left out.
    """

    size: int
    probe: int
    count: int
    faults: int


class _Keys(Sequence[str]):
    """Names that lie end to end in one array, so that processes share them."""

    def __init__(self, blob: np.ndarray, ends: np.ndarray):
        self._blob, self._ends = blob, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, place):  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= place < len(self):
            raise IndexError(place)
        start = int(self._ends[place - 1]) if place else 0
        return decode_name(self._blob[start : int(self._ends[place])].tobytes())


def identity(path: str, status: os.stat_result, folder: str | None = None) -> tuple[str | int, ...]:
    """What a local tar's index is named by: that it was written again, even at equal size and modification time, shows in
    the time of its last change, which no program can set.

    Args:
        folder: the real path of the folder of `path`, when it is known.
    """
    folder = os.path.realpath(os.path.dirname(path)) if folder is None else folder
    name = os.path.join(folder, os.path.basename(path))
    return name, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def index_file(cache_dir: Path, *identity: str | int) -> Path:
    """Where the index of a tar with this identity is kept."""
    return cache_dir / f"{number(_VERSION, *identity):016x}.index"


def renew_index(file: Path, make: Callable[[], ShardIndex]) -> ShardIndex:
    """Make an index, store it, and return it as it is stored, so that processes share its memory."""
    index = make()
    store_index(file, index)
    stored = load_index(file, size=index.size)
    return stored if stored is not None and stored.probe == index.probe else index


def read_summary(file: Path) -> Summary | None:
    """The beginning of a stored index, or None when there is none."""
    try:
        with _opened(file) as opened:
            kind, size, found, count, keys, faults, listed = _HEAD.unpack(os.read(opened, _HEAD.size))
            whole = os.fstat(opened).st_size == _length(count, keys, faults)
    except (OSError, ValueError, struct.error):
        return None
    valid = kind == _MAGIC and min(size, count, keys, faults, listed) >= 0 and whole
    return Summary(size, found, count, listed) if valid else None


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[int]:
    """A descriptor of a regular file; OSError for anything else."""
    opened = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(file))
        yield opened
    finally:
        os.close(opened)


def _length(count: int, keys: int, faults: int) -> int:
    """Bytes of a stored index: its head, spans, ends of keys, checksums, keys and faults."""
    return _HEAD.size + count * (48 + 8 + 12) + keys + faults


def load_index(file: Path, *, size: int | None = None) -> ShardIndex | None:
    """A stored index as a memory map, or None when there is none or it is broken: not what `store_index` writes for any
    tar.

    Args:
        size: bytes of the tar that it must be of; None where that is not known yet.
    """
    try:
        with _opened(file) as opened:
            length = os.fstat(opened).st_size
        if not _HEAD.size <= length <= _INDEX_BYTES:
            return None
        # A private mapping, which processes share while none writes; Python's own would keep a file open.
        raw = torch.from_file(str(file), shared=False, size=length, dtype=torch.uint8).numpy().data
        kind, found, probed, count, key_bytes, fault_bytes, listed = _HEAD.unpack(raw[: _HEAD.size])
        if kind != _MAGIC or size not in (None, found) or min(found, count, key_bytes, fault_bytes) < 0:
            return None
        if len(raw) != _length(count, key_bytes, fault_bytes):
            return None
        at = _HEAD.size

        def take(kind: str, many: int) -> np.ndarray:
            nonlocal at
            array = np.frombuffer(raw, kind, many, at)
            at += array.nbytes
            return array

        spans, ends = take("<i8", count * 6).reshape(count, 3, 2), take("<i8", count)
        heads, blob = take("<u4", count * 3).reshape(count, 3), take("<u1", key_bytes)
        if not _are_spans(spans, count, found):
            return None
        starts = np.concatenate([[0], ends])
        if (np.diff(starts) < 0).any() or starts[-1] != key_bytes:
            return None
        faults = parse_json(bytes(raw[at:]), list[tuple[str, str]], name=str(file))
        if len(faults) != listed or not all(cause in CAUSES for cause, _ in faults):
            return None
        return ShardIndex(_Keys(blob, ends), spans, faults, found, probed, heads)
    except (OSError, ValueError, struct.error, OverflowError, RuntimeError):
        # Whatever is wrong with it, the tar is read again.
        return None


def _are_spans(spans: np.ndarray, count: int, size: int) -> bool:
    """Whether these can be the places of `count` samples in a tar: inside, behind a header, apart, each with an image and
    a caption."""
    offset, length = spans[..., 0], spans[..., 1]
    there = offset >= 0
    inside = (offset >= BLOCK) & (length >= 0) & (offset <= size) & (length <= size - offset)
    if not np.where(there, inside, (offset == -1) & (length == 0)).all():
        return False
    if not (there[:, 0] & (length[:, 0] > 0) & (there[:, 1] | there[:, 2])).all():
        return False
    order = np.argsort(offset[there], kind="stable")
    starts, ends = offset[there][order], (offset + length)[there][order]
    return bool((ends[:-1] <= starts[1:]).all())


def store_index(file: Path, index: ShardIndex) -> None:
    """Write in one step; a cache that cannot be written is no error."""
    keys = [key.encode("utf-8", "surrogateescape") for key in index.keys]
    faults = json.dumps(
        [(cause, key.encode("utf-8", "backslashreplace").decode()) for cause, key in index.faults]
    ).encode()
    blob, ends = b"".join(keys), np.cumsum([len(key) for key in keys], dtype="<i8")
    head = _HEAD.pack(_MAGIC, index.size, index.probe, len(keys), len(blob), len(faults), len(index.faults))
    part = file.with_name(f"{file.stem}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out:
            for piece in (
                head,
                np.asarray(index.spans, "<i8").tobytes(),
                ends.tobytes(),
                np.asarray(index.heads, "<u4").tobytes(),
                blob,
                faults,
            ):
                out.write(piece)
        os.replace(part, file)
    except OSError:
        return
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
