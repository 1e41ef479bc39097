"""Packing tables that others wrote: what is no picture or caption is counted, what is no table is named."""

from __future__ import annotations

import json
import os
import tarfile

import pytest

from clipkit.data import iter_eval, pack


@pytest.fixture
def pictures(tmp_path, jpeg):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    return folder


def table(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_that_name_what_is_no_file_are_counted_and_block_nothing(tmp_path, pictures):
    os.mkfifo(pictures / "fifo.jpg")
    with open(pictures / "large.jpg", "wb") as file:
        file.truncate(1 << 30)
    faults = {
        "/dev/zero": "not_a_file",
        "fifo.jpg": "not_a_file",
        str(tmp_path): "not_a_file",
        "large.jpg": "image_too_large",
        "nowhere.jpg": "missing_image",
        "nul\0.jpg": "missing_image",
        "half \ud800.jpg": "missing_image",
        "n" * 5000: "missing_image",
        "": "missing_image",
    }
    rows = [{"image": f"{i}.jpg", "caption": f"picture {i}"} for i in range(4)]
    rows += [{"image": name, "caption": "x"} for name in faults]
    rows += [{"image": value, "caption": "x"} for value in (None, 3, [], {"bytes": None}, {"path": 7})]
    rows += [{"image": "0.jpg", "caption": value} for value in (None, 3, True, [], [1, None], " ", {"a": 1})]
    rows += [{"image": "0.jpg", "caption": "half \ud800 pair"}, {"image": "0.jpg", "caption": ["a", 3, "b"]}]
    report = pack(table(tmp_path / "t.jsonl", rows), tmp_path / "out", root=pictures)
    expected = {"missing_image": 5, "empty_caption": 1, "missing_caption": 6, "caption_not_utf8": 1}
    for cause in faults.values():
        expected[cause] = expected.get(cause, 0) + 1
    assert report["skipped"] == dict(sorted(expected.items())) and report["samples"] == 5
    captions = [
        c for batch in iter_eval(tmp_path / "out", image_size=8, batch_size=9) for c in batch["captions"]
    ]
    assert captions[-1] == ["a", "b"]


def test_captions_beside_pictures_are_regular_files(tmp_path, pictures):
    (pictures / "0.txt").write_text("good")
    os.mkfifo(pictures / "1.txt")
    (pictures / "2.txt").symlink_to("/dev/zero")
    (pictures / "3.txt").write_bytes(b"caf\xe9")
    report = pack(pictures, tmp_path / "out")
    assert report["samples"] == 1 and report["skipped"] == {"caption_not_utf8": 1, "not_a_file": 2}


def test_a_file_name_that_is_no_text_is_packed(tmp_path, pictures):
    os.rename(pictures / "0.jpg", os.fsencode(str(pictures)) + b"/\xff.jpg")
    (pictures / "1.txt").write_text("one")
    with open(os.fsencode(str(pictures)) + b"/\xff.txt", "w") as file:
        file.write("a caption")
    report = pack(pictures, tmp_path / "out")
    assert report["samples"] == 2
    assert (
        len(
            [key for batch in iter_eval(tmp_path / "out", image_size=8, batch_size=9) for key in batch["key"]]
        )
        == 2
    )


BROKEN_TABLES = {
    "cut.jsonl": b'{"image": "0.jpg", "caption": "a"}\n{"image": "0.j',
    "deep.jsonl": b"[" * 100_000,
    "long_integer.jsonl": b'{"image": ' + b"9" * 5000 + b"}",
    "list.jsonl": b"[1]\n",
    "binary.jsonl": b"\xff\xfe\n",
    "latin.csv": b"image,caption\n0.jpg,caf\xe9\n",
    "field.csv": b'image,caption\n0.jpg,"' + b"x" * (17 << 20),
    "empty.csv": b"",
    "no_column.csv": b"a,b\n1,2\n",
    "noise.parquet": b"PAR1" + b"\xff" * 99 + b"PAR1",
    "empty.parquet": b"",
    "unknown.xyz": b"x",
}


@pytest.mark.parametrize("name", BROKEN_TABLES)
def test_a_broken_table_is_an_error_that_names_it(name, tmp_path, pictures):
    path = tmp_path / name
    path.write_bytes(BROKEN_TABLES[name])
    with pytest.raises(ValueError, match=name):
        pack(path, tmp_path / "out", root=pictures)


def test_a_table_that_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "t.csv")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for path in (tmp_path / "t.csv", tmp_path / "zero.jsonl", tmp_path / "nowhere.csv"):
        with pytest.raises(ValueError, match=f"there is no {path} to pack"):
            pack(path, tmp_path / "out")


@pytest.mark.parametrize(
    "raw", [b"", b"[1]", b'{"rows": 3}', b"\xff", b'{"rows": "x", "samples": 1}', b"[" * 99_999]
)
def test_broken_statistics_mean_that_the_shard_is_made_again(tmp_path, pictures, raw):
    rows = [{"image": f"{i}.jpg", "caption": "x"} for i in range(4)]
    source = table(tmp_path / "t.jsonl", rows)
    expected = pack(source, tmp_path / "out", root=pictures)
    (tmp_path / "out" / "000000_stats.json").write_bytes(raw)
    assert pack(source, tmp_path / "out", root=pictures) == expected
    assert json.loads((tmp_path / "out" / "000000_stats.json").read_text())["rows"] == 4
    (tmp_path / "out" / "pack.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"pack.json.*give an empty folder|made with other settings"):
        pack(source, tmp_path / "out", root=pictures)


def contents(folder):
    """What the tars of a folder hold, by name."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found[path.name] = {one.name: tar.extractfile(one).read() for one in tar}
    return found


def rewritten(path, data):
    """At equal length, a second later than before."""
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


CHANGES = {
    "nothing": lambda rows, pictures: None,
    "a caption": lambda rows, pictures: rows[1].update(caption="picture X"),
    "the order": lambda rows, pictures: rows.reverse(),
    "which picture": lambda rows, pictures: rows[0].update(image="3.jpg"),
    "a picture": lambda rows, pictures: rewritten(pictures / "2.jpg", (pictures / "1.jpg").read_bytes()),
    "a picture that was not there": lambda rows, pictures: (pictures / "4.jpg").write_bytes(
        (pictures / "0.jpg").read_bytes()
    ),
    "an id": lambda rows, pictures: rows[3].update(id=99),
    "more rows": lambda rows, pictures: rows.append({"image": "0.jpg", "caption": "more", "id": 5}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_packing_again_gives_what_packing_anew_gives(change, tmp_path, pictures):
    rows = [{"image": f"{i}.jpg", "caption": f"picture {i}", "id": i} for i in range(5)]
    settings = {"root": pictures, "samples_per_shard": 2, "keep": ["id"]}
    pack(table(tmp_path / "t.jsonl", rows), tmp_path / "out", **settings)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    CHANGES[change](rows, pictures)
    again = pack(table(tmp_path / "t.jsonl", rows), tmp_path / "out", **settings)
    assert again == pack(tmp_path / "t.jsonl", tmp_path / "anew", **settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "anew")
    if change == "nothing":
        assert before == {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}


def test_captions_beside_pictures_that_changed_are_packed_again(tmp_path, pictures):
    for i in range(4):
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    pack(pictures, tmp_path / "out")
    rewritten(pictures / "1.txt", b"picture X")
    pack(pictures, tmp_path / "out")
    assert contents(tmp_path / "out")["000000.tar"]["000000001.txt"] == b"picture X"


def test_a_table_that_became_shorter_leaves_no_shard_of_its_old_rows(tmp_path, pictures):
    rows = [{"image": f"{i}.jpg", "caption": f"picture {i}"} for i in range(4)]
    settings = {"root": pictures, "samples_per_shard": 2}
    pack(table(tmp_path / "t.jsonl", rows), tmp_path / "out", **settings)
    table(tmp_path / "t.jsonl", rows[:2])
    with pytest.raises(ValueError, match="1 more shards, from 000001.tar on, than the 2 rows"):
        pack(tmp_path / "t.jsonl", tmp_path / "out", **settings)
    (tmp_path / "out" / "000001.tar").unlink()
    assert pack(tmp_path / "t.jsonl", tmp_path / "out", **settings)["samples"] == 2
