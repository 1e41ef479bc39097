"""Streams' shards as local files.

A stream (http:, https:, s3:, gs:, hf:, pipe:; see remote.py) is read once from front to back into a file under the cache
folder, and from there on it is a local tar like any other, so order and resume are the same for every kind of source.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clipkit.data.faults import DataError
from clipkit.data.order import number
from clipkit.data.remote import Version, open_stream
from clipkit.foreign import BrokenFile, read_json

_CHUNK = 1 << 18
# The disk's free space is asked for after so many bytes.
_LOOK_EVERY = 1 << 22


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """While this process holds a lock file's lock, across the processes of a machine. BlockingIOError where another one does
    and it is not waited for.
    """
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class Spool:
    """Streams' shards as local files.

    Args:
        folder: where fetched shards are kept.
        limit_gb: the fetched shards together stay below this many gigabytes (10^9 bytes); the least recently
            used go first. A shard that is open stays readable. A single larger one is not fetched, nor one that
            would leave less than 1 GB (or a twentieth) of the disk free.
        stall_s: seconds without a byte after which a try is given up.
        deadline_s: seconds for one shard, all tries together.
        retries: further tries after the first.
        backoff_s: seconds before the second try; doubled before each further one, at most 30.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit_gb: float = 50.0,
        stall_s: float = 60.0,
        deadline_s: float = 600.0,
        retries: int = 5,
        backoff_s: float = 1.0,
    ):
        self.folder, self.limit, self.backoff_s = folder, int(limit_gb * 1e9), backoff_s
        self.stall_s, self.deadline_s, self.retries = stall_s, deadline_s, retries

        # A copy that was fetched or found unchanged since then belongs to this run.
        self.since = time.time()

    def place(self, url: str) -> Path:
        """Where a shard's copy is, or would be."""
        return self.folder / f"{number(url):016x}.tar"

    def has(self, url: str) -> bool:
        """Whether a shard is here and was fetched, or found unchanged, since this run began."""
        place = self.place(url)
        try:
            return place.with_suffix(".json").stat().st_mtime >= self.since and place.exists()
        except OSError:
            return False

    def path(self, url: str) -> str:
        """The local copy of a shard, fetched when it is not there, or when the server has another one than at the time of
        the copy (by ETag, else by time and size). DataError after the last try.
        """
        if not self.has(url):
            with self._locked(url):
                if not self.has(url):
                    self._retry(url)
        self.keep([url])
        return str(self.place(url))

    def open(self, url: str) -> int:
        """A file descriptor of the local copy. Raises as `path`, and OSError."""
        for _ in range(20):
            # Another process may just have removed it to make room.
            with contextlib.suppress(FileNotFoundError):
                return os.open(self.path(url), os.O_RDONLY)
        return os.open(self.path(url), os.O_RDONLY)

    def fetch_ahead(self, url: str) -> bool:
        """Fetch a shard that is not needed yet, by one try; False where that failed. One that another process is fetching
        is left to it.
        """
        with contextlib.suppress(BlockingIOError), self._locked(url, wait=False):
            if not self.has(url):
                try:
                    return not self._try(url, self.deadline_s)
                except _NoRoom:
                    return False
        return True

    def keep(self, urls: Iterable[str]) -> None:
        """Mark shards as used now: the others go first."""
        for url in urls:
            with contextlib.suppress(OSError):
                os.utime(self.place(url))

    def taken(self, urls: Iterable[str]) -> int:
        """Bytes that the copies of shards take."""
        total = 0
        for url in urls:
            with contextlib.suppress(OSError):
                total += self.place(url).stat().st_size
        return total

    def _locked(self, url: str, *, wait: bool = True) -> contextlib.AbstractContextManager[None]:
        """So that the processes of a machine fetch a shard once."""
        return locked(self.place(url).with_suffix(".lock"), wait=wait)

    def _version(self, place: Path) -> Version | None:
        """Of the copy that is there."""
        try:
            found = read_json(place.with_suffix(".json"), limit=1 << 16)
            return (
                Version(str(found["etag"]), str(found["modified"]), int(found["size"]))
                if place.exists()
                else None
            )
        except (OSError, BrokenFile, LookupError, ValueError, TypeError):
            return None

    def _confirm(self, place: Path, version: Version) -> None:
        record = place.with_suffix(".json")
        record.write_text(json.dumps(vars(version)))
        os.utime(record, (now := time.time(), now))

    def _retry(self, url: str) -> None:
        place, end = self.place(url), time.monotonic() + self.deadline_s
        error, tries = "", 0
        for attempt in range(self.retries + 1):
            left = end - time.monotonic()
            if left <= 0:
                break
            tries += 1
            try:
                error = self._try(url, left)
            except _NoRoom as no_room:
                # Another try fails too, unless older shards can make room for it.
                needed = no_room.seen + 2 * _margin(self.folder)
                if no_room.seen > self.limit or not self._evict(keep=place, bytes_free=needed):
                    raise DataError("unreadable_shard", str(no_room), shard=url) from None
                error = str(no_room)
                continue
            if not error:
                return
            if (version := self._version(place)) is not None:
                # A server that does not answer takes nothing from the copy that is here.
                self._confirm(place, version)
                return
            if attempt < self.retries:
                time.sleep(max(0.0, min(self.backoff_s * 2.0**attempt, 30.0, end - time.monotonic())))
        raise DataError(
            "unreadable_shard",
            f"not fetched after {tries} tries in at most {self.deadline_s:g} s; the last "
            f"said: {error or 'deadline passed'}",
            shard=url,
        )

    def _try(self, url: str, seconds: float) -> str:
        """One try; returns what went wrong, or an empty string. Leaves the whole shard or what was there before."""
        path = self.place(url)
        part = path.with_suffix(".part")
        copy = _Copy(url, part, self.limit, unless=self._version(path), timeout_s=self.stall_s)
        end, seen, moved = time.monotonic() + seconds, 0, time.monotonic()
        try:
            copy.start()
            while copy.is_alive():
                copy.join(0.02)
                now = time.monotonic()
                if copy.bytes != seen:
                    seen, moved = copy.bytes, now
                if now - moved > self.stall_s or now > end:
                    why = f"no byte for {self.stall_s:g} s" if now <= end else "deadline passed"
                    return f"{why} after {seen} bytes"
            if copy.no_room:
                raise _NoRoom(copy.no_room, copy.bytes)
            if copy.error:
                return copy.error
            if not copy.unchanged:
                # In this order: a copy never stands beside another one's version.
                path.with_suffix(".json").unlink(missing_ok=True)
                os.replace(part, path)
            self._confirm(path, copy.version)
            self._evict(keep=path)
            return ""
        finally:
            copy.stop()
            part.unlink(missing_ok=True)

    def _evict(self, keep: Path, bytes_free: int = 0) -> bool:
        """Remove the least recently used shards above the limit, and until so many bytes are free; whether one
        went.
        """
        files, removed = [], False
        for file in self.folder.glob("*.tar"):
            try:
                status = file.stat()
            except OSError:
                continue
            files.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.limit and (not bytes_free or shutil.disk_usage(self.folder).free >= bytes_free):
                break
            if file != keep:
                file.unlink(missing_ok=True)
                file.with_suffix(".json").unlink(missing_ok=True)
                total, removed = total - size, True
        return removed


class _NoRoom(Exception):
    """A shard that does not fit; `seen`: the bytes of it that came."""

    def __init__(self, why: str, seen: int):
        super().__init__(why)
        self.seen = seen


def _margin(folder: Path) -> int:
    """Bytes of the folder's disk that stay free."""
    return min(10**9, shutil.disk_usage(folder).total // 20)


class _Copy(threading.Thread):
    """Copies one stream to a new file; `stop` ends it, also when it hangs.

    Attributes:
        version: of what was read.
        unchanged: the server has that one still which was given as `unless`; nothing was copied.
    """

    def __init__(self, url: str, part: Path, limit: int, *, unless: Version | None, timeout_s: float):
        super().__init__(daemon=True)
        self._unless, self._timeout_s, self.version, self.unchanged = unless, timeout_s, Version(), False
        self.url, self.part, self.limit, self.bytes, self.error, self.no_room = url, part, limit, 0, "", ""
        self._stream: Any = None
        self._ended = False

    def run(self) -> None:
        try:
            self._stream, self.version = open_stream(self.url, unless=self._unless, timeout_s=self._timeout_s)
            if self._stream is None or self._ended:
                self.unchanged = not self._ended
                return
            with open(self.part, "wb") as out:
                looked = -_LOOK_EVERY
                while (chunk := self._stream.read(_CHUNK)) and not self._ended:
                    self.bytes += len(chunk)
                    if self.bytes > self.limit:
                        self.no_room = (
                            f"it has more than the {self.limit / 1e9:g} GB that fetched shards may take; give more "
                            "by data.spool_gb if the stream ends, or make smaller shards"
                        )
                        return
                    if self.bytes - looked >= _LOOK_EVERY:
                        looked = self.bytes
                        free, margin = shutil.disk_usage(self.part.parent).free, _margin(self.part.parent)
                        if free < margin:
                            self.no_room = self._full(
                                f"{free / 1e9:.2g} GB free, less than {margin / 1e9:.2g}"
                            )
                            return
                    out.write(chunk)
            # Raises when the command's status says that it failed.
            self._stream.close()
            if not self.bytes:
                self.error = "the stream is empty"
            elif self.version.size not in (-1, self.bytes):
                self.error = f"{self.bytes} of {self.version.size} bytes came"
        except Exception as error:  # of any library that reads URLs
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                self.no_room = self._full(str(error.strerror))
            self.error = self.error or f"{type(error).__name__}: {error}"
        finally:
            # A command that goes on writing ends by it.
            process = getattr(self._stream, "proc", None)
            if process is not None and process.stdout is not None:
                process.stdout.close()

    def _full(self, why: str) -> str:
        return (
            f"the disk of {self.part.parent} is full ({why}) after {self.bytes} bytes of it; free some, lower "
            "data.spool_gb, or set data.cache_dir (CLIPKIT_CACHE) to a larger disk"
        )

    def stop(self) -> None:
        self._ended = True
        process = getattr(self._stream, "proc", None)
        if process is not None and process.poll() is None:
            process.kill()
