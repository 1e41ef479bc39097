"""What a server gives, and whether it still is what it was: no half of a file, no mixture of two, no copy of an old one."""

from __future__ import annotations

import fsspec
import pytest

from clipkit.data import remote
from clipkit.data.counts import declared_counts
from clipkit.data.remote import Ranges, Version, open_ranges, open_stream, read_small
from tests.data.shard_server import Server


@pytest.mark.parametrize(
    "then, now, same",
    [
        (Version("a", "t", 1), Version("a", "u", 2), True),
        (Version('W/"a"'), Version('"a"'), True),
        (Version("a", "t", 1), Version("b", "t", 1), False),
        (Version("", "t", 1), Version("a", "t", 1), False),
        (Version("a", "t", 1), Version("", "t", 1), False),
        (Version("", "t", 1), Version("", "t", 1), True),
        (Version("", "t", 1), Version("", "t", 2), False),
        (Version("", "t", 1), Version("", "u", 1), False),
        # A server that says neither: another tar may have as many bytes.
        (Version("", "", 1), Version("", "", 1), False),
        (Version(), Version(), False),
    ],
)
def test_a_copy_is_that_of_now_where_the_server_says_so(then, now, same):
    assert then.is_of(now) == same


def test_a_small_file_comes_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BACKOFF_S", 0.0)
    (tmp_path / "sizes.json").write_bytes(b'{"0.tar": 1000}')
    for name in ("closed", "busy"):
        (tmp_path / name).write_bytes(b"x")
    with Server(tmp_path, drops=3, status={"closed": 403, "busy": 503}) as server:
        assert read_small(f"{server.url}/sizes.json", limit=100) == b'{"0.tar": 1000}'
        assert server.asked["sizes.json"] == 4
        assert read_small(f"{server.url}/sizes.json", limit=14) is None
        assert read_small(f"{server.url}/nothing", limit=100) is None
        assert read_small(f"{server.url}/closed", limit=100) is None
        # It may be there: shards are not counted as if nothing were said of them.
        with pytest.raises(OSError, match="neither given nor said to be missing"):
            read_small(f"{server.url}/busy", limit=100)
    with Server(tmp_path, drops=9) as server, pytest.raises(OSError, match="7 of 15 bytes came"):
        read_small(f"{server.url}/sizes.json", limit=100)


def test_ranges_are_of_one_version_and_whole(tmp_path):
    path, old = tmp_path / "0.tar", bytes(range(256)) * 20
    path.write_bytes(old)
    with Server(tmp_path) as server:
        file, size = open_ranges(f"{server.url}/0.tar")
        file.seek(5000)
        assert size == len(old) and file.read(300) == old[5000:] and file.read(1) == b""
        raw = Ranges(f"{server.url}/0.tar")
        path.unlink()
        path.write_bytes(old[::-1])
        with pytest.raises(OSError, match="another version than before"):
            raw.read(10)
    with Server(tmp_path, drops=2) as server:
        # The first answer is that of one byte, half of which is none.
        with pytest.raises(OSError, match="0 of 10 bytes came|5 of 10 bytes came"):
            Ranges(f"{server.url}/0.tar").read(10)
    with Server(tmp_path, ranges=False) as server, pytest.raises(OSError, match="gives no ranges"):
        Ranges(f"{server.url}/0.tar")


@pytest.mark.parametrize("etags", [True, False])
def test_a_stream_is_left_out_only_where_it_is_the_copys(tmp_path, etags):
    (tmp_path / "0.tar").write_bytes(b"old")
    with Server(tmp_path, etags=etags) as server:
        stream, version = open_stream(f"{server.url}/0.tar")
        assert stream.read() == b"old"
        assert (open_stream(f"{server.url}/0.tar", unless=version)[0] is None) == etags
        (tmp_path / "0.tar").unlink()
        (tmp_path / "0.tar").write_bytes(b"new")
        stream, _ = open_stream(f"{server.url}/0.tar", unless=version)
        assert stream.read() == b"new"


def test_an_object_stores_file_is_asked_about_likewise():
    """By fsspec's store in memory, which tells when a file was made."""
    store = fsspec.filesystem("memory")
    store.pipe_file("/shards-of-a-test/0.tar", b"old")
    try:
        url = "memory://shards-of-a-test/0.tar"
        stream, version = open_stream(url)
        assert stream.read() == b"old"
        assert open_stream(url, unless=version)[0] is None
        store.pipe_file("/shards-of-a-test/0.tar", b"new")
        stream, _ = open_stream(url, unless=version)
        assert stream.read() == b"new"
    finally:
        store.rm("/shards-of-a-test", recursive=True)


def test_what_is_said_of_shards_counts_and_zero_says_nothing(tmp_path):
    """A shard of which 0 is said is looked at, and not left out."""
    (tmp_path / "sizes.json").write_text('{"0.tar": 7, "1.tar": 0, "2.tar": 0}')
    (tmp_path / "1_stats.json").write_text('{"successes": 5}')
    (tmp_path / "2_stats.json").write_text('{"successes": 0}')
    names = [f"{number}.tar" for number in range(4)]
    assert declared_counts([f"{tmp_path}/{name}" for name in names], [False] * 4).tolist() == [7, 5, -1, -1]
    (tmp_path / "sizes.json").write_text('{"0.tar": 7, "1.tar": 8, "2.tar": 9}')
    with Server(tmp_path) as server:
        urls = [f"{server.url}/{name}?signed=a/b" for name in names[:3]]
        assert declared_counts(urls, [True] * 3).tolist() == [7, 8, 9]
