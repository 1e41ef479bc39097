"""Small files and lines written whole: whoever reads one sees the old text or the new, never half of either."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

# A link is not followed, and a FIFO without a reader is an error instead of a wait.
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, in one write: a killed process loses at most the line it was writing.

    Raises:
        OSError: the disk is full or the file cannot be written; no part of the line is left in it.
    """
    raw = (line + "\n").encode()
    descriptor = os.open(path, _APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, raw) < len(raw):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, its folder made first.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        # A folder from somebody else may hold a link or FIFO of that name: the file must be a new one.
        temporary.touch(exist_ok=False)
        temporary.write_bytes(content)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of a text, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")
