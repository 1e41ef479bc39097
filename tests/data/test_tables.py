"""Tables that others wrote: every row comes out as it was written, or the message names what cannot be told."""

from __future__ import annotations

import csv
import io
import json
import random
import re

import pytest

from clipkit.data import iter_eval, pack
from clipkit.data.tables import read_table

HEADER = ["file", "caption"]
PLAIN = [[f"{i}.jpg", f"picture number {i}"] for i in range(46)]
# Captions as people write them, none with a tab or an end of line.
ODD = [
    '"Stop!" she said',
    'a 5" nail',
    "it's",
    'he said "go"',
    '"',
    '""',
    '"quoted whole"',
    'ends with "',
    "caf\u00e9 \u4e2d \U0001f600",
    "a;b|c",
    " spaces ",
    "\u2028 and \x85 are no ends of lines",
]


def written(rows, separator, end="\n", quoting=csv.QUOTE_MINIMAL):
    """As RFC 4180 has it, by Python's own writer."""
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator=end, quoting=quoting).writerows([HEADER, *rows])
    return out.getvalue()


def unquoted(rows, separator, end="\n"):
    return "".join(separator.join(row) + end for row in [HEADER, *rows])


def read(path, **settings):
    return [
        [row[name] for name in HEADER] if isinstance(row, dict) else row
        for _, row in read_table(path, HEADER, **settings)
    ]


def put(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt"])
def test_quoted_tables_give_the_rows_that_were_written(tmp_path, name, end):
    separator = "," if name.endswith("csv") else "\t"
    rows = [
        *PLAIN,
        *(["x.jpg", text] for text in [*ODD, "two\nlines", "a, b\nc, d", "tab\there", "a,b", 'a "b",\n"c"']),
    ]
    random.Random(0).shuffle(rows)
    # The writer quotes no other end of line than its own.
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)[end == "\r" :]:
        path = put(tmp_path / name, written(rows, separator, end, quoting))
        assert read(path) == rows
        assert read(path, quotes="csv") == rows


@pytest.mark.parametrize("odd", ['"Stop!" she said', '"open', '"a" and "b"', '"', '"x" '])
@pytest.mark.parametrize("place", [0, 1, 20, 45])
@pytest.mark.parametrize("first", [True, False])
def test_a_quote_that_opens_nothing_loses_no_row(tmp_path, odd, place, first):
    """The file as it was found: 46 rows, one of which became all the rest."""
    rows = [list(row) for row in PLAIN]
    rows[place][1] = odd
    rows = [row[::-1] if first else row for row in rows]
    header = HEADER[::-1] if first else HEADER
    path = tmp_path / "t.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]))
    found = [[row[name] for name in header] for _, row in read_table(path, HEADER)]
    assert found == rows


def test_letters_that_are_quotes_are_read_as_they_stand(tmp_path):
    rows = [["x.jpg", text] for text in ODD]
    path = put(tmp_path / "t.tsv", unquoted(rows, "\t"))
    assert read(path) == rows and read(path, quotes="none") == rows


def test_what_could_be_read_in_two_ways_is_an_error_that_names_the_lines(tmp_path):
    rows = [*PLAIN[:3], ["3.jpg", '"opens'], PLAIN[4], ["5.jpg", 'closes"'], *PLAIN[6:9]]
    path = put(
        tmp_path / "t.tsv",
        unquoted([row[::-1] for row in rows], "\t").replace("file\tcaption", "caption\tfile"),
    )
    with pytest.raises(
        ValueError, match=r"t.tsv, lines 5 to 7: a quote opens on one line.*quotes \"csv\".*\"none\""
    ):
        read(path)
    assert [row[::-1] for row in read(path, quotes="none")] == [row[::-1] for row in rows]
    assert len(read(path, quotes="csv")) == 7


def test_quotes_that_are_neither_are_an_error_that_names_the_line(tmp_path):
    text = written([["0.jpg", "a, b"], ["1.jpg", "c"]], ",") + '2.jpg,"d" e\n'
    with pytest.raises(ValueError, match=r"t.csv: its quotes do not enclose fields \(line 4.*line 2, say"):
        read(put(tmp_path / "t.csv", text))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_a_byte_order_mark_is_read(tmp_path, name, encoding):
    rows = [*PLAIN[:3], ["x.jpg", "caf\u00e9"], ["y.jpg", '"q" x']]
    if name == "t.jsonl":
        text = "".join(json.dumps(dict(zip(HEADER, row)), ensure_ascii=False) + "\n" for row in rows)
    else:
        text = written(rows, "," if name == "t.csv" else "\t")
    assert read(put(tmp_path / name, text, encoding)) == rows


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_another_encoding_is_named_with_its_line_and_read_when_given(tmp_path, name):
    rows = [*PLAIN, ["x.jpg", "caf\u00e9 \u2013 \u20ac 5"]]
    if name == "t.jsonl":
        text = "".join(json.dumps(dict(zip(HEADER, row)), ensure_ascii=False) + "\n" for row in rows)
    else:
        text = unquoted(rows, "," if name == "t.csv" else "\t")
    path = put(tmp_path / name, text, "cp1252")
    line = 47 if name == "t.jsonl" else 48
    with pytest.raises(ValueError, match=rf"{name}, line {line}: not UTF-8 text \(byte 0xe9\).*cp1252"):
        read(path)
    assert read(path, encoding="cp1252") == rows
    with pytest.raises(ValueError, match="which Python does not know"):
        read(path, encoding="cp99999")


def test_utf_16_without_a_mark_is_named(tmp_path):
    path = put(tmp_path / "t.csv", written(PLAIN, ","), "utf-16-le")
    with pytest.raises(ValueError, match="utf-16-le"):
        read(path)
    assert read(path, encoding="utf-16-le") == PLAIN


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_another_separator_is_named_and_read_when_given(tmp_path, name, separator):
    own = "," if name == "t.csv" else "\t"
    path = put(tmp_path / name, written(PLAIN, separator))
    if separator != own:
        with pytest.raises(
            ValueError, match=r"t.\wsv: its header .* is separated by " + re.escape(repr(separator))
        ):
            read(path)
    assert read(path, separator=separator) == PLAIN
    with pytest.raises(ValueError, match="expected one sign"):
        read(path, separator=";;")


def test_a_row_with_other_fields_is_named_and_the_others_come(tmp_path):
    path = put(tmp_path / "t.csv", "file,caption\n0.jpg,a, b\n\n1.jpg\n2.jpg,c\n")
    found = list(read_table(path, HEADER))
    assert found == [
        (2, "3 fields under a header of 2"),
        (4, "1 fields under a header of 2"),
        (5, {"file": "2.jpg", "caption": "c"}),
    ]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_a_missing_column_is_named(tmp_path, name):
    path = tmp_path / name
    if name == "t.parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"file": ["a"], "text": ["b"]}), path)
    elif name == "t.jsonl":
        path.write_text('{"file": "a", "text": "b"}\n')
    else:
        path.write_text(written([], "," if name == "t.csv" else "\t").replace("caption", "text"))
    with pytest.raises(ValueError, match=f"{name}.* has no column 'caption'; its columns are file, text"):
        read(path)


def test_a_column_named_twice_is_refused(tmp_path):
    """None of the readers takes one of the two."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = pyarrow.Table.from_arrays(
        [pyarrow.array([x]) for x in "abc"], names=["file", "caption", "caption"]
    )
    parquet.write_table(rows, tmp_path / "t.parquet")
    put(tmp_path / "t.csv", "file,caption,caption\na,b,c\n")
    put(tmp_path / "t.tsv", "file\tcaption\tcaption\na\tb\tc\n")
    put(tmp_path / "t.jsonl", '{"file": "a", "caption": "b", "caption": "c"}\n')
    for kind in ("csv", "tsv", "jsonl", "parquet"):
        for columns in ((), ("caption",)):
            with pytest.raises(ValueError, match="'caption' twice"):
                list(read_table(tmp_path / f"t.{kind}", columns))
    # Of a column that is not read nothing hangs on it.
    assert [row["file"] for _, row in read_table(tmp_path / "t.parquet", ["file"])] == ["a"]
    assert [row["file"] for _, row in read_table(tmp_path / "t.csv", ["file"])] == ["a"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_row_is_packed_or_counted_and_named(tmp_path, jpeg, kind):
    """By hand: of 60 rows, row 7 has an empty caption, row 9 no picture, row 11 (where rows can be broken) a field more."""
    for i in range(60):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    captions = [f'"starts with a quote {i}' if i % 5 == 0 else f"picture {i}" for i in range(60)]
    captions[7] = " "
    rows = [[f"{i}.jpg" if i != 9 else "none.jpg", caption] for i, caption in enumerate(captions)]
    path, expected = tmp_path / f"t.{kind}", {"empty_caption": 1, "missing_image": 1}
    if kind == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(HEADER, row))) + "\n" for row in rows))
    elif kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table(dict(zip(HEADER, zip(*rows)))), path)
    else:
        text = written(rows, ",") if kind == "csv" else unquoted(rows, "\t")
        if kind == "csv":
            text = text.replace("11.jpg,picture 11", "11.jpg,picture 11,more")
            expected["broken_row"] = 1
        path.write_text(text)
    report = pack(path, tmp_path / "out", image="file", caption="caption", samples_per_shard=17)
    assert report["rows"] == 60 and report["skipped"] == dict(sorted(expected.items()))
    assert report["samples"] == 60 - sum(expected.values()) and report["shards"] == 4
    assert (
        report["examples"]["empty_caption"][0].startswith("row 7")
        and "9" in report["examples"]["missing_image"][0]
    )
    assert "none.jpg" in report["examples"]["missing_image"][0]
    if "broken_row" in expected:
        assert report["examples"]["broken_row"] == ["row 11 (line 13): 3 fields under a header of 2"]
    found = {
        int(key): caption[0]
        for batch in iter_eval(tmp_path / "out", image_size=8, batch_size=60)
        for key, caption in zip(batch["key"], batch["captions"])
    }
    left_out = {7, 9} | ({11} if "broken_row" in expected else set())
    assert found == {i: caption for i, caption in enumerate(captions) if i not in left_out}
    assert pack(path, tmp_path / "out", image="file", caption="caption", samples_per_shard=17) == report


def test_further_columns_reach_the_json(tmp_path, jpeg):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    rows = [{"file": "0.jpg", "caption": "a dog", "scene": 17, "wrong": ["a cat", "no dog"]}]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(path, tmp_path / "out", image="file", keep=["scene", "wrong"])
    (batch,) = iter_eval(tmp_path / "out", image_size=8, batch_size=1)
    assert batch["meta"][0]["scene"] == 17 and batch["meta"][0]["wrong"] == ["a cat", "no dog"]
    with pytest.raises(ValueError, match="keep: 'caption' is a field"):
        pack(path, tmp_path / "other", image="file", keep=["caption"])


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.zst", "t.xlsx"])
def test_what_is_no_table_is_said(tmp_path, name):
    path = put(tmp_path / name, "x")
    with pytest.raises(ValueError, match="decompress" if name[-3:] in (".gz", "zst") else "is not .csv"):
        read(path)


def test_quotes_that_would_join_two_rows_into_one_of_more_fields_are_letters(tmp_path):
    """By hand: as letters every line has two fields; as quotes the two lines are one row of three."""
    path = put(
        tmp_path / "t.tsv",
        'file\tcaption\na.jpg\t"tall\nb.jpg"\tsmall\n"c.jpg"\t"x\ty"\n'.replace("\ty", " y"),
    )
    assert [tuple(row.values()) for _, row in read_table(path)] == [
        ("a.jpg", '"tall'),
        ('b.jpg"', "small"),
        ('"c.jpg"', '"x y"'),
    ]
