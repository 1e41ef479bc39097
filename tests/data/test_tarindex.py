"""The index of a tar: what its headers can say, and what a damaged or crafted cache file can."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipkit.data.index_cache import (
    Summary,
    identity,
    index_file,
    load_index,
    read_summary,
    renew_index,
    store_index,
)
from clipkit.data.tarindex import ShardIndex, TarFiles, index_stream, index_tar, probe
from clipkit.foreign import BrokenFile


def cached_index(path: Path, folder: Path) -> ShardIndex:
    """As a run finds it, and makes it where there is none."""
    file = index_file(folder, *identity(str(path), path.stat()))
    return load_index(file) or renew_index(file, lambda: index_tar(path))


def header(name: str, kind: bytes, content: bytes, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % 512)


def record(name: bytes, value: bytes) -> bytes:
    """One record of an extended header; its length counts its own digits."""
    length = len(name) + len(value) + 3
    while len(str(length)) + len(name) + len(value) + 3 != length:
        length = len(str(length)) + len(name) + len(value) + 3
    return b"%d %s=%s\n" % (length, name, value)


@pytest.fixture
def good(sample) -> bytes:
    return b"".join(header(name, b"0", data) for name, data in sample("good"))


def test_an_index_is_that_of_pythons_own_tarfile(tmp_path, write_tar, sample):
    path = write_tar(tmp_path / "a.tar", [m for i in range(5) for m in sample(f"k{i}", i)])
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar]
    assert [(m.name, m.offset, m.size) for m in TarFiles(path).members] == expected


def test_an_index_holds_the_checksum_of_each_member_s_header(tmp_path, write_tar, sample):
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"k{i}", i)])
    index, raw = index_tar(path), path.read_bytes()
    with tarfile.open(path) as tar:
        expected = {m.name: zlib.crc32(raw[m.offset_data - 512 : m.offset_data]) for m in tar}
    for row, key in enumerate(index.keys):
        assert index.heads[row].tolist() == [expected[f"{key}.{kind}"] for kind in ("jpg", "txt", "json")]


def test_a_stream_has_the_index_of_its_file(tmp_path, good, sample):
    path = tmp_path / "a.tar"
    more = b"".join(header(name, b"0", data) for name, data in sample("more"))
    path.write_bytes(good + bytes(512 * 300) + more + bytes(10240))
    expected = index_tar(path)
    found = index_stream(io.BytesIO(path.read_bytes()), path.stat().st_size)
    assert list(found.keys) == ["good", "more"] == list(expected.keys) and found.probe == expected.probe
    assert np.array_equal(found.spans, expected.spans) and np.array_equal(found.heads, expected.heads)


def test_a_probe_tells_tars_of_one_size_apart(tmp_path):
    raw = np.random.default_rng(0).bytes(100_000)
    at = lambda data: probe(lambda length, offset: data[offset : offset + length], len(data))
    assert at(raw) == at(bytes(raw)) != at(raw[512:] + raw[:512])
    assert (
        at(bytes(512)) != at(bytes(1024)) and at(b"x" + bytes(511)) != at(bytes(512)) and at(b"") != at(b"x")
    )


EXTENDED = {
    "a size of 5,000 digits": record(b"size", b"9" * 5000),
    "a length of 5,000 digits": b"9" * 5000 + b" path=x\n",
    "a length of nothing": b" path=x\n",
    "a length of 0": b"0 path=x\n" * 9,
    "a negative size": record(b"size", b"-5"),
    "no record at all": b"\xff" * 700,
    "a name of NULs": record(b"path", b"\0\0x.jpg"),
}


@pytest.mark.parametrize("what", EXTENDED)
def test_extended_headers_cost_what_they_touch(tmp_path, good, what):
    path = tmp_path / "a.tar"
    path.write_bytes(header("x", b"x", EXTENDED[what]) + header("bad.txt", b"0", b"words") + good)
    index = index_tar(path)
    assert "good" in index.keys and len(index.faults) <= 1


def test_sizes_beyond_the_tar_and_long_names_are_faults(tmp_path, good):
    path = tmp_path / "a.tar"
    path.write_bytes(
        good + header("x", b"x", record(b"size", b"9" * 17)) + header("b.jpg", b"0", b"x") + good
    )
    assert index_tar(path).keys == ["good"] and index_tar(path).faults == [("truncated_shard", "b.jpg")]
    path.write_bytes(header("x", b"L", b"n" * ((1 << 20) + 1)) + good)
    assert index_tar(path).keys == ["good"] and index_tar(path).faults == [("corrupt_header", "byte 0")]


def test_sparse_files_are_no_contents(tmp_path, good):
    path = tmp_path / "a.tar"
    for kind, before in ((b"S", b""), (b"0", header("x", b"x", record(b"GNU.sparse.major", b"1")))):
        path.write_bytes(before + header("s.jpg", kind, b"map") + good)
        assert index_tar(path).keys == ["good"] and index_tar(path).faults == [("not_a_file", "s.jpg")]


def test_many_faults_and_one_long_name_take_little_room(tmp_path, good):
    path = tmp_path / "a.tar"
    links = header("l" * 90, b"2", b"") * 2000
    path.write_bytes(header("x", b"L", b"n" * (1 << 19)) + links + good)
    index = cached_index(path, tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    # An array of strings would have taken 8 GB.
    assert len(index.faults) == 2000 and stored.stat().st_size < 2_000_000
    assert load_index(stored).faults == index.faults


def test_what_is_no_whole_tar_has_no_members(tmp_path, good):
    path = tmp_path / "a.tar"
    for raw in (b"noise" * 1000, good[:-700], good[:512] + b"\xaa" * 512 * 40 + good, b"x" * 100):
        path.write_bytes(raw)
        with pytest.raises(BrokenFile, match=str(path)):
            TarFiles(path)


INDEX = ShardIndex(
    ["a", "b"],
    np.array([[[512, 9], [1536, 3], [-1, 0]], [[2560, 1], [-1, 0], [3584, 2]]]),
    [("empty_image", "c")],
    4096,
    7,
    np.arange(6, dtype=np.uint32).reshape(2, 3),
)


def spans(row: int, part: int, offset: int, size: int) -> np.ndarray:
    out = INDEX.spans.copy()
    out[row, part] = offset, size
    return out


CRAFTED = {
    "one sample too few": {"spans": INDEX.spans[:1]},
    "more keys": {"keys": ["a", "b", "c"]},
    "negative size": {"spans": spans(0, 0, 512, -1)},
    "negative offset": {"spans": spans(0, 0, -7, 9)},
    "no room for a header": {"spans": spans(0, 0, 511, 9)},
    "no image": {"spans": spans(0, 0, -1, 0)},
    "an empty image": {"spans": spans(0, 0, 512, 0)},
    "no caption": {"spans": spans(0, 1, -1, 0)},
    "beyond the tar": {"spans": spans(1, 2, 4090, 9)},
    "beyond 64 bits": {"spans": spans(1, 2, 4000, np.iinfo(np.int64).max)},
    "overlapping": {"spans": spans(1, 0, 1537, 1)},
    "another size": {"size": 4097},
    "unknown cause": {"faults": [("no_such_cause", "")]},
    "faults of another shape": {"faults": [("empty_image", 3)]},
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_index_is_none(tmp_path, what, monkeypatch):
    file = tmp_path / "a.index"
    store_index(file, INDEX)
    for found in (load_index(file), load_index(file, size=4096)):
        assert list(found.keys) == ["a", "b"] and np.array_equal(found.spans, INDEX.spans)
        assert np.array_equal(found.heads, INDEX.heads) and (found.size, found.probe) == (4096, 7)
        assert found.faults == [("empty_image", "c")]
    assert read_summary(file) == Summary(size=4096, probe=7, count=2, faults=1)
    if what == "faults of another shape":
        raw = file.read_bytes()
        file.write_bytes(raw.replace(b'["empty_image", "c"]', b'["empty_image", 333]'))
    else:
        store_index(file, replace(INDEX, **CRAFTED[what]))
    assert load_index(file, size=4096) is None


def test_every_damaged_byte_of_an_index_s_head_and_ends_is_found_or_changes_nothing_that_is_read(tmp_path):
    """What cannot be found here (a key's letters, a checksum) is found in the tar, whose headers are compared."""
    file = tmp_path / "a.index"
    store_index(file, INDEX)
    raw = file.read_bytes()
    for at in [*range(64), *range(64 + 2 * 48, 64 + 2 * 56)]:
        for bit in (1, 128):
            file.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])
            found = load_index(file, size=4096)
            assert (
                found is None
                or (24 <= at < 32 and found.probe != 7)
                or list(found.keys) in (["ab", ""], ["", "ab"])
            )
    for length in range(len(raw)):
        file.write_bytes(raw[:length])
        assert load_index(file) is None and read_summary(file) is None


def test_an_index_that_claims_much_memory_is_none(tmp_path):
    file = tmp_path / "a.index"
    store_index(file, INDEX)
    head = bytearray(file.read_bytes())
    for at in (32, 40, 48, 56):
        file.write_bytes(head[:at] + (1 << 50).to_bytes(8, "little") + head[at + 8 :])
        assert load_index(file) is None and (at == 56 or read_summary(file) is None)
    for raw in (b"", b"PK\x03\x04", b"noise" * 99):
        file.write_bytes(raw)
        assert load_index(file) is None and read_summary(file) is None
    file.unlink()
    os.mkfifo(file)
    assert load_index(file) is None and read_summary(file) is None


def test_a_damaged_index_is_made_again(tmp_path, write_tar, sample):
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"k{i}", i)])
    before = index_tar(path)
    cached_index(path, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    again = cached_index(path, tmp_path / "cache")
    assert list(again.keys) == list(before.keys) and np.array_equal(again.spans, before.spans)
    assert list(load_index(file).keys) == list(before.keys)


def test_an_index_is_written_whole_readable_by_others_or_not_at_all(tmp_path, monkeypatch):
    old = os.umask(0o022)
    try:
        store_index(tmp_path / "a.index", INDEX)
    finally:
        os.umask(old)
    assert (tmp_path / "a.index").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(
        os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    store_index(tmp_path / "b.index", INDEX)
    if Path("/dev/full").exists():
        monkeypatch.setattr(
            "clipkit.data.index_cache.open", lambda *given: open("/dev/full", "wb"), raising=False
        )
        store_index(tmp_path / "b.index", INDEX)
    assert [path.name for path in tmp_path.iterdir()] == ["a.index"]
    (tmp_path / "file").write_text("")
    store_index(tmp_path / "file" / "c.index", INDEX)
