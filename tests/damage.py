"""What can happen to a file: every kind of damage, as a function of its path."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size + 1))


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _missing(path: Path) -> None:
    path.unlink()


def _other_json(path: Path) -> None:
    path.write_text('["another", {"shape": 1}]')


def _nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _twice(path: Path) -> None:
    path.write_bytes(2 * path.read_bytes())


DAMAGE = {
    function.__name__[1:]: function
    for function in (
        _emptied,
        _cut,
        _one_bit,
        _noise,
        _zeros,
        _missing,
        _other_json,
        _nested,
        _folder,
        _fifo,
        _twice,
    )  # fmt: skip
}


def copy(folder: Path, to: Path) -> Path:
    """A copy of a folder to be damaged."""
    shutil.copytree(folder, to)
    return to


def nest(folder: Path, depth: int) -> None:
    """Folders `d` in folders; made from inside, because the whole path is too long to be named."""
    inner = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=inner)
        deeper = os.open("d", os.O_RDONLY, dir_fd=inner)
        os.close(inner)
        inner = deeper
    os.close(inner)
