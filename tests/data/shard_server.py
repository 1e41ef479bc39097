"""A local HTTP server of files, as object stores are (ranges, ETags), and as they fail: for tests and benchmarks/shards.py."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path


class Server:
    """Serves a folder's files.

    Args:
        drops: the first so many answers of each file break off half-way.
        hang: these files are never answered.
        status: these are answered by this status.
        seconds: each whole file takes so long.
        etags: answers have an ETag, and are 304 where that is asked for.
        ranges: ranges of a file are given.

    Attributes:
        asked: how often each file was asked for, with any answer.
        served: how often each came whole.
        not_modified: how often the answer was 304.
    """

    def __init__(
        self,
        folder: Path,
        *,
        drops: int = 0,
        hang: tuple[str, ...] = (),
        status: Mapping[str, int] | None = None,
        seconds: float = 0.0,
        etags: bool = True,
        ranges: bool = True,
    ):
        self.asked: dict[str, int] = {}
        self.served: dict[str, int] = {}
        self.not_modified: dict[str, int] = {}
        self.release, self.status = threading.Event(), dict(status or {})
        server, lock = self, threading.Lock()

        def count(of: dict[str, int], name: str) -> int:
            with lock:
                of[name] = of.get(name, 0) + 1
                return of[name]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/").partition("?")[0]
                time_asked = count(server.asked, name)
                if name in hang:
                    server.release.wait(30)
                    return
                if name in server.status or not (folder / name).is_file():
                    self.send_error(server.status.get(name, 404))
                    return
                found = (folder / name).stat()
                data = (folder / name).read_bytes()
                etag = f'"{found.st_ino}-{found.st_mtime_ns}"'
                if etags and self.headers.get("If-None-Match") == etag:
                    count(server.not_modified, name)
                    self.send_response(304)
                    self.end_headers()
                    return
                wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
                whole = wanted is None or not ranges
                self.send_response(200 if whole else 206)
                if etags:
                    self.send_header("ETag", etag)
                if not whole:
                    first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                    data = data[first : last + 1]
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if time_asked <= drops:
                    data = data[: len(data) // 2]
                try:
                    if whole and seconds:
                        self.wfile.write(data[:1])
                        server.release.wait(seconds)
                        data = data[1:]
                    self.wfile.write(data)
                except OSError:
                    return
                if whole and time_asked > drops:
                    count(server.served, name)

            def log_message(self, *arguments):
                pass

        class Http(http.server.ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self._http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release.set()
        self._http.shutdown()
        self._http.server_close()


def main(folder: str, seconds: str) -> None:
    """Serve until killed; the first line printed is the URL, and each line of input prints what was served."""
    import json
    import sys

    with Server(Path(folder), seconds=float(seconds)) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            print(json.dumps(server.served), flush=True)
        while True:
            time.sleep(60)


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
