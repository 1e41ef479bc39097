"""Where shards are: names expanded, streams fetched.

A local tar is read in place. Anything else (http:, https:, s3:, gs:, hf:, pipe:) goes through webdataset's
opener: the shard is read once from front to back into a file under the cache folder, and from there on it is
a local tar like any other, so order and resume are the same for every kind of source. A `pipe:` command is
run by the shell: it is taken from the configuration alone, never from data.
"""

from __future__ import annotations

import glob
import os
import re
import stat
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import braceexpand

from clipkit.data.faults import DataError
from clipkit.data.order import number

_SCHEME = re.compile(r"^(pipe|[a-z][a-z0-9+.-]+):", re.IGNORECASE)
_CHUNK = 1 << 16


def is_stream(name: str) -> bool:
    """True for a name that is fetched rather than opened in place."""
    return bool(_SCHEME.match(name)) and not name.startswith("file:")


def expand_shards(shards: str | Path | Iterable[str | Path], *, what: str = "shards") -> list[str]:
    """The shard list that names stand for: braces, globs, folders (their *.tar), paths and URLs, in the order
    given.

    Args:
        shards: one name or several. `{000..331}` and `{a,b}` expand as in a shell; `*`, `?` and `[...]` match
            local files, sorted.
        what: the setting's name, for messages.

    Raises:
        ValueError: a name that matches nothing, a file that is not there or not a regular file, or a repeated
            shard.
    """
    names = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not names:
        raise ValueError(f"{what} is empty: give a path, glob, brace pattern or URL of .tar shards")
    found: list[str] = []
    for name in names:
        found += _expand(str(name), what)
    repeated = {name for name in found if found.count(name) > 1} if len(set(found)) < len(found) else ()
    if repeated:
        raise ValueError(
            f"{what} names {sorted(repeated)[0]} more than once; every shard may stand once in a source"
        )
    return found


def _expand(name: str, what: str) -> list[str]:
    out = []
    for one in braceexpand.braceexpand(name) if "{" in name else [name]:
        if is_stream(one):
            out.append(one)
            continue
        path = os.path.expanduser(one.removeprefix("file://").removeprefix("file:"))
        if os.path.isdir(path):
            path = os.path.join(path, "*.tar")
        if glob.has_magic(path) and not os.path.exists(path):
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise ValueError(f"{what}: no file matches {path!r}. {_nearby(path)}")
            out += matches
            continue
        _check_file(path, what)
        out.append(path)
    return out


def _check_file(path: str, what: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        raise ValueError(f"{what}: there is no shard {path!r}. {_nearby(path)}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{what}: {path!r} is not a regular file (a FIFO or device would block); to read from a "
            "command write 'pipe:cat ...'"
        )


def _nearby(path: str) -> str:
    """What is there instead."""
    folder = Path(path).absolute().parent
    while not folder.is_dir() or glob.has_magic(folder.name):
        folder = folder.parent
    tars = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".tar")[:3]
    holds = f"holds {', '.join(tars)}{', ...' if len(tars) == 3 else ''}" if tars else "holds no .tar file"
    return f"The nearest folder that exists, {folder}, {holds}."


class Spool:
    """Streams' shards as local files.

    Args:
        folder: where fetched shards are kept.
        limit_gb: the fetched shards together stay below this many gigabytes (10^9 bytes); the least recently
            used go first. A shard that is open stays readable.
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

    def path(self, url: str) -> str:
        """The local copy of a shard, fetched when it is not there. DataError after the last try."""
        path = self.folder / f"{number(url):016x}.tar"
        if not path.exists():
            self._fetch_once(url, path)
        try:
            os.utime(path)
        except OSError:
            pass
        return str(path)

    def _fetch_once(self, url: str, path: Path) -> None:
        """Fetch under a lock, so that the workers of a machine fetch a shard once."""
        import fcntl

        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                self._retry(url, path)
                self._evict(keep=path)

    def _retry(self, url: str, path: Path) -> None:
        end = time.monotonic() + self.deadline_s
        error, tries = "", 0
        for attempt in range(self.retries + 1):
            left = end - time.monotonic()
            if left <= 0:
                break
            tries += 1
            error = self._try(url, path, left)
            if not error:
                return
            if attempt < self.retries:
                time.sleep(max(0.0, min(self.backoff_s * 2.0**attempt, 30.0, end - time.monotonic())))
        raise DataError(
            "unreadable_shard",
            f"not fetched after {tries} tries in at most {self.deadline_s:g} s; the last "
            f"said: {error or 'deadline passed'}",
            shard=url,
        )

    def _try(self, url: str, path: Path, seconds: float) -> str:
        """One try; returns what went wrong, or an empty string."""
        part = path.with_suffix(".part")
        out = open(part, "wb")
        copy = _Copy(url, out)
        copy.start()
        end, seen, moved = time.monotonic() + seconds, 0, time.monotonic()
        while copy.is_alive():
            copy.join(0.02)
            now = time.monotonic()
            if copy.bytes != seen:
                seen, moved = copy.bytes, now
            if now - moved > self.stall_s or now > end:
                copy.stop()
                why = f"no byte for {self.stall_s:g} s" if now <= end else "deadline passed"
                return f"{why} after {seen} bytes"
        out.close()
        if copy.error:
            return copy.error
        os.replace(part, path)
        return ""

    def _evict(self, keep: Path) -> None:
        files = []
        for file in self.folder.glob("*.tar"):
            try:
                status = file.stat()
            except OSError:
                continue
            files.append((status.st_mtime, status.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.limit:
                break
            if file != keep:
                file.unlink(missing_ok=True)
                total -= size


class _Copy(threading.Thread):
    """Copies one stream to an open file; `stop` ends it when it hangs."""

    def __init__(self, url: str, out):
        super().__init__(daemon=True)
        self.url, self.out, self.bytes, self.error = url, out, 0, ""
        self._stream = None

    def run(self) -> None:
        from webdataset.gopen import gopen

        try:
            self._stream = gopen(self.url)
            while chunk := self._stream.read(_CHUNK):
                self.out.write(chunk)
                self.bytes += len(chunk)
            # Raises when the command's status says that it failed.
            self._stream.close()
            if not self.bytes:
                self.error = "the stream is empty"
        except (OSError, ValueError, EOFError) as error:
            self.error = self.error or f"{type(error).__name__}: {error}"

    def stop(self) -> None:
        process = getattr(self._stream, "proc", None)
        if process is not None:
            process.kill()
