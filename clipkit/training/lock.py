"""One process at a time trains in a run folder.

The lock is a POSIX record lock on RUN/.lock: the kernel, or the file server, drops it when its holder ends, however
that is, and data workers do not inherit it. The file says who holds it, for the message to whoever comes second. Some
network file systems lock within one machine alone, or not at all; so the holder also touches the file every
`BEAT_S` seconds, and a holder on another machine counts as gone once its touches stop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import msgspec
import psutil

from clipkit.foreign import BrokenFile, parse_json

BEAT_S = 20.0
# A process's second lock of a file would be granted, and closing it would drop the first.
_held: set[Path] = set()


class Holder(TypedDict):
    """Who trains in a folder; `job` is the scheduler's number of the job, the same after a requeue."""

    host: str
    pid: int
    started: float
    job: str | None


class RunFolderInUse(RuntimeError):
    """Another process trains in the run folder."""


@contextmanager
def locked(run_dir: Path, *, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold the lock of a run folder inside; the folder is made when it is not there.

    Raises:
        RunFolderInUse: another process holds it; the message names its host and process id.
        OSError: the folder cannot be made or written.
    """
    path = run_dir.resolve() / ".lock"
    if path in _held:
        raise RunFolderInUse(_refusal(run_dir, _me()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise OSError(
            f"the run folder {run_dir} cannot be written ({error}); give output_dir= a folder you can write"
        ) from error
    _held.add(path)
    beat = threading.Event()
    touching = threading.Thread(target=_touch, args=(descriptor, beat), daemon=True, name="clipkit-lock")
    try:
        _take(descriptor, run_dir, say)
        touching.start()
        yield
    finally:
        _held.discard(path)
        beat.set()
        if touching.ident is not None:
            touching.join()
        if _read(descriptor) == _me():
            _write(descriptor, b"")
        # This drops the lock, too.
        os.close(descriptor)


def _take(descriptor: int, run_dir: Path, say: Callable[[str], None]) -> None:
    """Lock the open file and write this process in; RunFolderInUse when another holds it."""
    mine, enforced = _me(), True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise RunFolderInUse(_refusal(run_dir, _read(descriptor))) from None
        # A file system without locks: what the file says is all there is.
        enforced = False
    holder = _read(descriptor)
    if holder is None or (holder["job"] and holder["job"] == mine["job"]):
        pass
    elif holder["host"] == mine["host"]:
        if not enforced and _alive(holder):
            raise RunFolderInUse(_refusal(run_dir, holder))
    elif _beats(descriptor, run_dir, holder, say):
        raise RunFolderInUse(_refusal(run_dir, holder))
    _write(descriptor, msgspec.json.encode(mine))


def _me() -> Holder:
    process = psutil.Process()
    return {
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _refusal(run_dir: Path, holder: Holder | None) -> str:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return (
        f"{who} is training in {run_dir}: two would overwrite each other's checkpoints and records. Wait for it or stop "
        "it (SIGTERM: it saves first), or give name=ANOTHER to train beside it"
    )


def _read(descriptor: int) -> Holder | None:
    """What the file says; None for nothing, or for nothing that can be read."""
    try:
        return parse_json(os.pread(descriptor, 4096, 0), Holder, name="lock")
    except (BrokenFile, OSError):
        return None


def _write(descriptor: int, content: bytes) -> None:
    """On a full disk the lock holds all the same; who holds it is then not on record."""
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)
    except OSError:
        pass


def _touch(descriptor: int, stopped: threading.Event) -> None:
    while not stopped.wait(BEAT_S):
        try:
            os.utime(descriptor)
        except OSError:
            return


def _alive(holder: Holder) -> bool:
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1
    except psutil.Error:
        return False


def _beats(descriptor: int, run_dir: Path, holder: Holder, say: Callable[[str], None]) -> bool:
    """Whether a holder on another machine still touches the file, waiting for a touch if the last is recent.

    By the file server's clock alone: two machines' clocks may differ.
    """
    seen = os.fstat(descriptor).st_mtime
    os.utime(descriptor)
    now = os.fstat(descriptor).st_mtime
    if now - seen > 3 * BEAT_S:
        return False
    say(
        f"{run_dir} was last held by process {holder['pid']} on {holder['host']}: waiting {3 * BEAT_S:.0f} s to see "
        "whether it still runs"
    )
    until = time.monotonic() + 3 * BEAT_S
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT_S / 10))
        if os.fstat(descriptor).st_mtime != now or _read(descriptor) != holder:
            return True
    return False
