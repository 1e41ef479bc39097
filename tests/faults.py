"""A disk that fails, or a process that dies, at any one of the calls by which files are written."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from clipkit import checkpoint

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
# What every file of a checkpoint, a record and a manifest passes through.
CALLS = {
    os: ("replace", "fsync", "mkdir", "chmod", "open", "unlink", "rmdir", "write", "ftruncate"),
    Path: ("write_text", "mkdir"),
    torch: ("save",),
    checkpoint: ("save_file",),
}


@contextmanager
def at_call(number: int | None, fault: Callable[[], None]) -> Iterator[list[str]]:
    """Make `fault` happen at the `number`-th call inside, None: at none; yields the names of the calls so far.

    A file that is written by a library is half written before the fault.
    """
    made: list[str] = []

    def failing(name: str, call: Callable):
        def instead(*given, **settings):
            made.append(name)
            if len(made) == number:
                if name in ("save", "save_file"):
                    call(*given, **settings)
                    target = Path(given[1])
                    os.truncate(target, target.stat().st_size // 2)
                fault()
            return call(*given, **settings)

        return instead

    patches = [
        mock.patch.object(owner, name, failing(name, getattr(owner, name)))
        for owner, names in CALLS.items()
        for name in names
    ]
    for patch in patches:
        patch.start()
    try:
        yield made
    finally:
        for patch in patches:
            patch.stop()


def raising(number: int) -> Callable[[], None]:
    """The disk answers with this error."""

    def fault() -> None:
        raise OSError(number, os.strerror(number))

    return fault


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Do `action` in a child that is killed at that call; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            with at_call(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def count_calls(action: Callable[[], object]) -> list[str]:
    """The names of the calls that an action makes."""
    with at_call(None, lambda: None) as made:
        action()
        return list(made)
