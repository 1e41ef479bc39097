"""Reading what lies elsewhere: whole, in ranges, and what says that it is still the same.

http: and https: are read by Python's own client. Other URLs go through fsspec where it has an implementation for them
(s3: with s3fs, gs: with gcsfs, hf: with huggingface_hub), else through webdataset's opener, which knows no ranges and no
versions. `pipe:` is a command, run by the shell.
"""

from __future__ import annotations

import base64
import http.client
import io
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import IO, Any

import fsspec

_TIMEOUT_S = 60.0
# For small files: tries, and seconds before the second; doubled before each further one.
_TRIES, _BACKOFF_S = 4, 0.5
# Bytes that one range request brings.
_RANGE = 1 << 22


@dataclass(frozen=True)
class Version:
    """What a server says of a file.

    Attributes:
        etag, modified: as it writes them; empty where it does not.
        size: bytes; -1 where it does not say.
    """

    etag: str = ""
    modified: str = ""
    size: int = -1

    def is_of(self, now: Version) -> bool:
        """Whether a file that had this version then is the one that the server has now, by what both tell: an ETag, or the
        time and size. Size alone tells nothing, for tars are padded.
        """
        if self.etag or now.etag:
            return self.etag.removeprefix("W/") == now.etag.removeprefix("W/")
        return bool(self.modified) and self.modified == now.modified and self.size == now.size


def scheme(url: str) -> str:
    """`http` of http://..."""
    return url.partition(":")[0].lower()


def open_stream(
    url: str, *, unless: Version | None = None, timeout_s: float = _TIMEOUT_S
) -> tuple[Any, Version]:
    """A stream to be read from front to back, and its version.

    Args:
        unless: of a copy at hand: where the server has that one still, None stands for the stream.

    Raises:
        OSError: it cannot be opened.
    """
    if scheme(url) in ("http", "https"):
        headers = {}
        if unless and unless.etag:
            headers["If-None-Match"] = unless.etag
        elif unless and unless.modified:
            headers["If-Modified-Since"] = unless.modified
        try:
            stream = _http(url, headers, timeout_s)
        except urllib.error.HTTPError as error:
            if error.code == 304 and unless:
                return None, unless
            raise
        version = _http_version(stream)
        if unless and unless.is_of(version):
            stream.close()
            return None, version
        return stream, version
    found = _filesystem(url)
    if found is not None:
        system, path = found
        version = _described(system, path)
        if unless and unless.is_of(version):
            return None, version
        return system.open(path, "rb", cache_type="none"), version
    if unless:
        return None, unless
    from webdataset.gopen import gopen

    return gopen(url), Version()


def read_small(url: str, *, limit: int) -> bytes | None:
    """A small file's bytes; None where there is none, or it is larger.

    Raises:
        OSError: after four tries, where the server neither gives it nor says that it is not there.
    """
    for attempt in range(_TRIES):
        try:
            return _read_small(url, limit)
        except FileNotFoundError:
            return None
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404, 410):
                return None
            problem = str(error)
        except Exception as error:  # of any library that reads URLs
            problem = f"{type(error).__name__}: {error}"
        time.sleep(_BACKOFF_S * 2**attempt)
    raise OSError(f"{url} is neither given nor said to be missing ({problem})")


def _read_small(url: str, limit: int) -> bytes | None:
    if scheme(url) in ("http", "https"):
        with _http(url, {}, _TIMEOUT_S) as stream:
            raw, size = stream.read(limit + 1), _http_version(stream).size
        if -1 < size <= limit and len(raw) != size:
            raise OSError(f"{len(raw)} of {size} bytes came")
    elif (found := _filesystem(url)) is not None:
        # Servers refuse ranges that end beyond a file, or any range of an empty one.
        size = _described(*found).size
        if size > limit:
            return None
        raw = found[0].cat_file(found[1])
        if -1 < size != len(raw):
            raise OSError(f"{len(raw)} of {size} bytes came")
    else:
        return None
    return raw if len(raw) <= limit else None


class Ranges(io.RawIOBase):
    """A remote file that can be read anywhere, a range at a time. OSError where its server gives no ranges, or gives
    another version than at first.

    Attributes:
        size: bytes of the file.
        version: what the server said of it first.
    """

    def __init__(self, url: str):
        self.url, self._place = url, 0
        self._found = None if scheme(url) in ("http", "https") else _filesystem(url)
        if self._found is not None:
            self.version = _described(*self._found)
            self.size = self.version.size
        elif scheme(url) in ("http", "https"):
            with _http(url, {"Range": "bytes=0-0"}, _TIMEOUT_S) as answer:
                total = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range") or "")
                if answer.status != 206 or total is None:
                    raise OSError(f"{url}: the server gives no ranges")
                self.size = int(total[1])
                self.version = _http_version(answer)
        else:
            raise OSError(f"{url}: nothing here reads ranges of {scheme(url)}:")
        if self.size < 0:
            raise OSError(f"{url}: the server does not tell its size")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0 if whence == 0 else self._place if whence == 1 else self.size)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._place + len(view), self.size)
        if end <= self._place:
            return 0
        if self._found is not None:
            raw = self._found[0].cat_file(self._found[1], self._place, end)
        else:
            with _http(self.url, {"Range": f"bytes={self._place}-{end - 1}"}, _TIMEOUT_S) as answer:
                raw = answer.read(end - self._place)
                if answer.status != 206 or _http_version(answer).etag != self.version.etag:
                    raise OSError(f"{self.url}: the server has another version than before")
        if len(raw) != end - self._place:
            raise OSError(f"{self.url}: {len(raw)} of {end - self._place} bytes came")
        view[: len(raw)] = raw
        self._place = end
        return len(raw)


def open_ranges(url: str) -> tuple[IO[bytes], int]:
    """A remote file that can be read anywhere, and its size; some MiB a request. OSError where that cannot be."""
    raw = Ranges(url)
    return io.BufferedReader(raw, _RANGE), raw.size


def _http(url: str, headers: dict[str, str], timeout_s: float) -> http.client.HTTPResponse:
    parts = urllib.parse.urlsplit(url)
    if parts.username is not None:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers = {**headers, "Authorization": "Basic " + base64.b64encode(secret.encode()).decode()}
        url = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(
        url, headers={"User-Agent": "clipkit", "Accept-Encoding": "identity", **headers}
    )
    return urllib.request.urlopen(request, timeout=timeout_s)


def _http_version(answer: http.client.HTTPResponse) -> Version:
    size = answer.headers.get("Content-Length") or ""
    return Version(
        answer.headers.get("ETag") or "",
        answer.headers.get("Last-Modified") or "",
        int(size) if size.isdigit() and len(size) < 19 else -1,
    )


def _filesystem(url: str) -> tuple[Any, str] | None:
    """fsspec's file system for a URL and the path in it; None where there is none."""
    if scheme(url) in ("pipe", "http", "https"):
        return None
    try:
        fsspec.get_filesystem_class(scheme(url))
    except (ImportError, ValueError):
        return None
    return fsspec.core.url_to_fs(url)  # pyright: ignore[reportReturnType]


def _described(system: Any, path: str) -> Version:
    system.invalidate_cache()
    info = system.info(path)
    first = lambda *names: next((str(info[name]) for name in names if info.get(name)), "")
    return Version(
        first("ETag", "etag", "md5Hash", "blob_id"),
        first("LastModified", "last_modified", "updated", "mtime", "created"),
        int(info["size"]) if info.get("size") is not None else -1,
    )
