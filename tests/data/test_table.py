"""Training from a table of picture files: the order, faults and resume of shards."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from clipkit.data import create_stream, train_captions
from clipkit.data.faults import DataError
from clipkit.data.table import BLOCK, TableSet


@pytest.fixture
def rows(tmp_path, jpeg) -> list[dict[str, str]]:
    """40 rows; captions with quotes, commas, line ends and letters of many alphabets."""
    (tmp_path / "pictures").mkdir()
    texts = ['"Look" she said', 'a 6" nail, bent', "two\nlines", "caf\u00e9 \u4f60\u597d", "plain"]
    out = []
    for i in range(40):
        (tmp_path / "pictures" / f"{i:02d}.jpg").write_bytes(jpeg(i))
        out.append({"image": f"pictures/{i:02d}.jpg", "caption": f"{texts[i % 5]} {i}", "group": str(i // 4)})
    return out


def write(path: Path, rows, **options) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with open(path, "w", newline="", encoding=options.get("encoding", "utf-8")) as file:
            writer = csv.DictWriter(file, rows[0], delimiter=options.get("separator", ","))
            writer.writeheader()
            writer.writerows(rows)
    return path


def stream_of(path, tokenizer, *, batch_size=8, rank=0, world_size=1, num_workers=0, epochs=2, **spec):
    return create_stream(
        {"kind": "table", "train": str(path), **spec},
        tokenizer=tokenizer,
        image_size=8,
        batch_size=batch_size,
        seed=0,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        epochs=epochs,
    )


def pairs_of(stream) -> list[tuple[str, str]]:
    return [
        (key, bytes(row).rstrip(b"\0").decode(errors="ignore"))
        for batch in stream
        for key, row in zip(batch["key"], batch["text"].tolist())
    ]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
def test_every_row_comes_once_an_epoch_with_its_own_caption(tmp_path, rows, name, byte_tokenizer):
    table = write(tmp_path / name, rows)
    found = pairs_of(stream_of(table, byte_tokenizer))
    expected = Counter((row["image"], row["caption"].encode()[:24].decode(errors="ignore")) for row in rows)
    assert Counter(found[:40]) == expected == Counter(found[40:]) and found[:40] != found[40:]
    assert pairs_of(stream_of(table, byte_tokenizer, num_workers=1)) == found
    assert list(train_captions({"kind": "table", "train": str(table)})) == [row["caption"] for row in rows]


def test_the_order_is_one_for_any_ranks_and_goes_on_where_it_stopped(
    tmp_path, rows, byte_tokenizer, monkeypatch
):
    monkeypatch.setattr("clipkit.data.table.BLOCK", 6)
    table = write(tmp_path / "a.csv", rows)
    for spec in ({"window": 2}, {"window": 2, "canonical_nodes": 2}, {"window": 2, "resample": True}):
        whole = pairs_of(stream_of(table, byte_tokenizer, **spec))
        ranks = [
            stream_of(table, byte_tokenizer, batch_size=4, rank=rank, world_size=2, **spec)
            for rank in range(2)
        ]
        steps = zip(*([batch["key"] for batch in stream] for stream in ranks), strict=True)
        assert [key for step in steps for keys in step for key in keys] == [key for key, _ in whole]
        first = stream_of(table, byte_tokenizer, **spec)
        batches = iter(first)
        begun = [key for _ in range(3) for key in next(batches)["key"]]
        later = stream_of(table, byte_tokenizer, **spec)
        later.load_state_dict(first.state_dict())
        assert begun + [key for key, _ in pairs_of(later)] == [key for key, _ in whole]
    rows[7]["caption"] = "another"
    with pytest.raises(ValueError, match="has other samples than when the run began"):
        stream_of(write(table, rows), byte_tokenizer, **spec).load_state_dict(first.state_dict())


def test_what_is_wrong_with_a_row_is_counted(tmp_path, rows, byte_tokenizer):
    (tmp_path / "pictures" / "03.jpg").unlink()
    (tmp_path / "pictures" / "04.jpg").write_bytes(b"no picture")
    os.remove(tmp_path / "pictures" / "05.jpg")
    os.mkfifo(tmp_path / "pictures" / "05.jpg")
    rows[6]["caption"], rows[7]["image"], rows[8]["image"] = " ", "", "https://host/8.jpg"
    table = write(tmp_path / "a.csv", rows)
    with open(table, "a") as file:
        file.write("pictures/00.jpg,too,many,fields\r\n")
    stream = stream_of(table, byte_tokenizer, batch_size=1, epochs=1, max_bad_fraction=1.0)
    found = pairs_of(stream)
    assert len(found) == 40 and len(set(found)) == 34
    expected = {"broken_row": 1, "corrupt_image": 1, "empty_caption": 1, "missing_image": 4}
    assert stream.report()["skipped"] == expected


def test_paths_are_of_the_table_s_folder_or_of_root(tmp_path, rows, byte_tokenizer):
    (tmp_path / "tables").mkdir()
    table = write(tmp_path / "tables" / "a.tsv", rows[4:5] * 9, separator="\t")
    with pytest.raises(ValueError, match=r"none of 9 pictures .*'image'.*data\.table\.image.*data\.root"):
        stream_of(table, byte_tokenizer, batch_size=1)
    assert len(pairs_of(stream_of(table, byte_tokenizer, batch_size=9, root=str(tmp_path)))) == 18


@pytest.mark.parametrize(
    "options, spec, message",
    [
        ({"encoding": "cp1252"}, {}, "not UTF-8 text .*encoding"),
        ({"separator": ";"}, {}, "separated by ';'.* separator"),
        (
            {},
            {"table": {"image": "filepath"}},
            "has no column 'filepath'; its columns are image, caption, group",
        ),
        ({}, {"table": {"capton": "x"}}, "'caption'"),
    ],
)
def test_a_table_of_another_kind_says_so_and_is_read_when_told(
    tmp_path, rows, byte_tokenizer, options, spec, message
):
    for row in rows:
        row["caption"] = row["caption"].replace("\u4f60\u597d", "").replace("\n", " ")
    table = write(tmp_path / "a.csv", rows, **options)
    with pytest.raises(ValueError, match=message):
        stream_of(table, byte_tokenizer, **spec)
    if options:
        assert len(pairs_of(stream_of(table, byte_tokenizer, table=options, epochs=1))) == 40


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path, rows, byte_tokenizer):
    table = write(tmp_path / "a.csv", rows, encoding="utf-8-sig")
    assert len(pairs_of(stream_of(table, byte_tokenizer, epochs=1))) == 40


def test_several_captions_and_other_columns_are_of_the_row(tmp_path, rows, byte_tokenizer):
    for i, row in enumerate(rows):
        row |= {"caption": [f"one {i}", f"two {i}"], "more": f"three {i}"}
    table = write(tmp_path / "a.jsonl", rows)
    data = TableSet([str(table)], cache_dir=tmp_path / "cache", caption=["caption", "more"], keep=["group"])
    assert data.captions(9) == ["one 9", "two 9", "three 9"] and data.meta(9)["group"] == "2"
    assert data.where(9) == (str(table), "pictures/09.jpg") and data.counts.tolist() == [40]
    drawn = pairs_of(stream_of(table, byte_tokenizer, captions="all", epochs=2))
    assert Counter(text for _, text in drawn) == {f"{n} {i}": 1 for n in ("one", "two") for i in range(40)}


def test_a_table_is_read_once_and_its_rows_are_shared(tmp_path, rows, monkeypatch):
    table = write(tmp_path / "a.csv", rows * (BLOCK // 20))
    make = lambda: TableSet([str(table)], cache_dir=tmp_path / "cache")
    assert make().counts.tolist() == [BLOCK, BLOCK]
    with monkeypatch.context() as never:
        never.setattr("clipkit.data.table.read_table", lambda *a, **k: pytest.fail("it was read again"))
        again = make()
        assert again.captions(BLOCK + 3) == [rows[3]["caption"]]
    (stored,) = (tmp_path / "cache" / "tables").glob("*.rows")
    raw = stored.read_bytes()
    for damaged in (raw[:-1], raw[:20], b"", b"\xff" * 40, raw[:24] + b"\xff" * 8 + raw[32:]):
        stored.unlink()
        stored.write_bytes(damaged)
        assert make().captions(7) == [rows[7]["caption"]]
    (tmp_path / "file").write_text("")
    assert len(TableSet([str(table)], cache_dir=tmp_path / "file")) == 2 * BLOCK


def test_pictures_are_read_as_files_and_nothing_else(tmp_path, rows):
    rows[0]["image"], rows[1]["image"] = "pipe:touch ran", "/dev/zero"
    data = TableSet([str(write(tmp_path / "a.csv", rows))], cache_dir=tmp_path / "cache")
    for sample in (0, 1):
        with pytest.raises(DataError, match="missing_image"):
            data.image(sample)
    assert isinstance(torch.frombuffer(bytearray(data.image(2)), dtype=torch.uint8), torch.Tensor)


def test_each_of_several_tables_names_pictures_of_its_own_folder(tmp_path, jpeg):
    for seed, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_bytes(jpeg(seed))
        (tmp_path / name / "t.jsonl").write_text(
            json.dumps({"image": "0.jpg", "caption": f"of {name}"}) + "\n"
        )
    data = TableSet([str(tmp_path / name / "t.jsonl") for name in ("a", "b")], cache_dir=tmp_path / "cache")
    assert [(data.captions(i), data.image(i)) for i in range(2)] == [(["of a"], jpeg(0)), (["of b"], jpeg(1))]


def test_rows_that_are_kept_are_those_of_the_columns_and_of_the_way_of_reading(tmp_path, jpeg):
    """One table, read in several ways beside each other: the cache gives none the rows of another."""
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    (tmp_path / "t.tsv").write_bytes('image\tcaption\tother\n0.jpg\t"caf\u00e9"\tname\n'.encode())
    ways = {
        '"caf\u00e9"': {"quotes": "none"},
        "caf\u00e9": {"quotes": "csv"},
        "caf\u00c3\u00a9": {"quotes": "csv", "encoding": "cp1252"},
        "name": {"caption": "other", "quotes": "csv"},
    }
    for _ in range(2):
        for text, way in ways.items():
            data = TableSet([str(tmp_path / "t.tsv")], cache_dir=tmp_path / "cache", **way)
            assert data.captions(0) == [text]
