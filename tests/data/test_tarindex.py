"""The index of a tar: what its headers can say, and what a damaged or crafted cache file can."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile

import numpy as np
import pytest

from clipkit.data.tarindex import ShardIndex, cached_index, index_tar, load_index, store_index, tar_members
from clipkit.foreign import BrokenFile


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
    assert tar_members(path) == expected


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
    index = cached_index(str(path), tmp_path / "cache")
    (stored,) = (tmp_path / "cache").iterdir()
    # An array of strings would have taken 8 GB.
    assert len(index.faults) == 2000 and stored.stat().st_size < 2_000_000
    assert load_index(stored).faults == index.faults


def test_what_is_no_whole_tar_has_no_members(tmp_path, good):
    path = tmp_path / "a.tar"
    for raw in (b"noise" * 1000, good[:-700], good[:512] + b"\xaa" * 512 * 40 + good, b"x" * 100):
        path.write_bytes(raw)
        with pytest.raises(BrokenFile, match=str(path)):
            tar_members(path)


INDEX = ShardIndex(
    ["a", "b"], np.array([[[512, 9], [1024, 3], [-1, 0]], [[2048, 1], [-1, 0], [3000, 2]]]), [], 4096
)


def spans(row: int, part: int, offset: int, size: int) -> np.ndarray:
    out = INDEX.spans.copy()
    out[row, part] = offset, size
    return out


def text(value: str) -> np.ndarray:
    return np.frombuffer(value.encode(), np.uint8)


CRAFTED = {
    "floats": {"spans": INDEX.spans.astype(float)},
    "32 bits": {"spans": INDEX.spans.astype(np.int32)},
    "flat": {"spans": INDEX.spans.reshape(-1)},
    "one sample too few": {"spans": INDEX.spans[:1]},
    "more keys": {"keys": text("a\0b\0c")},
    "negative size": {"spans": spans(0, 0, 512, -1)},
    "negative offset": {"spans": spans(0, 0, -7, 9)},
    "no image": {"spans": spans(0, 0, -1, 0)},
    "an empty image": {"spans": spans(0, 0, 512, 0)},
    "no caption": {"spans": spans(0, 1, -1, 0)},
    "beyond the tar": {"spans": spans(1, 2, 4090, 9)},
    "beyond 64 bits": {"spans": spans(1, 2, 4000, np.iinfo(np.int64).max)},
    "overlapping": {"spans": spans(1, 0, 1025, 1)},
    "another size": {"size": np.int64(4097)},
    "a size that is a list": {"size": np.array([4096])},
    "a size that is text": {"size": np.array("4096")},
    "unknown cause": {"faults": text('[["no_such_cause", ""]]')},
    "faults of another shape": {"faults": text('[["empty_image", 3]]')},
    "faults that are no json": {"faults": text("[[[[")},
    "faults as strings": {"faults": np.array([["empty_image", "a"]])},
    "objects": {"keys": np.array([print], dtype=object)},
    "nothing": {"keys": None},
}


@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_index_is_none(tmp_path, what):
    good = {"keys": text("a\0b"), "spans": INDEX.spans, "size": np.int64(4096), "faults": text("[]")}
    file = tmp_path / "index.npz"
    np.savez(file, **good)
    assert load_index(file, size=4096).keys == ["a", "b"] and load_index(file).size == 4096
    changed = {name: value for name, value in {**good, **CRAFTED[what]}.items() if value is not None}
    np.savez(file, **changed)
    assert load_index(file, size=4096) is None


def test_an_index_that_claims_much_memory_is_none(tmp_path):
    file = tmp_path / "index.npz"
    np.savez_compressed(file, keys=np.zeros(50_000_000, np.uint8))
    assert load_index(file) is None
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        claim, {"descr": "<i8", "fortran_order": False, "shape": (1 << 50, 3, 2)}
    )
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("keys", "spans", "size", "faults"):
            archive.writestr(f"{name}.npy", claim.getvalue())
    assert load_index(file) is None
    for raw in (b"", b"PK\x03\x04", b"noise" * 99, file.read_bytes()[:200]):
        file.write_bytes(raw)
        assert load_index(file) is None
    file.unlink()
    os.mkfifo(file)
    assert load_index(file) is None


def test_a_damaged_index_is_made_again(tmp_path, write_tar, sample):
    path = write_tar(tmp_path / "a.tar", [m for i in range(3) for m in sample(f"k{i}", i)])
    before = cached_index(str(path), tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-30])
    again = cached_index(str(path), tmp_path / "cache")
    assert again.keys == before.keys and np.array_equal(again.spans, before.spans)
    assert load_index(file).keys == before.keys


def test_an_index_is_written_whole_readable_by_others_or_not_at_all(tmp_path, monkeypatch):
    old = os.umask(0o022)
    try:
        store_index(tmp_path / "a.npz", INDEX)
    finally:
        os.umask(old)
    assert (tmp_path / "a.npz").stat().st_mode & 0o777 == 0o644
    monkeypatch.setattr(
        os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    store_index(tmp_path / "b.npz", INDEX)
    monkeypatch.setattr(
        np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    store_index(tmp_path / "b.npz", INDEX)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    (tmp_path / "file").write_text("")
    store_index(tmp_path / "file" / "c.npz", INDEX)
