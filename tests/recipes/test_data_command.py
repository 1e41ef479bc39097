"""clipkit-data and prepare_cc3m."""

from __future__ import annotations

import csv
import io
import json
import stat
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data import check, create_stream, iter_eval, pack, stats
from clipkit.recipes.data import main
from tests.data.shard_server import Server
from tests.processes import ROOT, fork


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(*arguments, program="data.py", status=0, **environment):
    return fork(ROOT / "recipes" / program, *arguments, env=environment).finished(status)


def picture(seed, size=(40, 30), form="JPEG"):
    """Different shapes for different seeds, so that difference hashes differ."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(cells).resize(size, Image.Resampling.NEAREST).save(
        out, form, **({"quality": 95} if form == "JPEG" else {})
    )
    return out.getvalue()


@pytest.fixture
def table(tmp_path):
    """25 rows: 22 good, a missing file, an empty caption, a broken picture."""
    (tmp_path / "pictures").mkdir()
    rows = []
    for i in range(25):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(b"broken" if i == 7 else picture(i))
        rows.append(
            {
                "file": f"pictures/{i}.jpg",
                "text": " " if i == 3 else f"caption, number {i}",
                "more": f"second {i}",
            }
        )
    (tmp_path / "pictures" / "5.jpg").unlink()
    with open(tmp_path / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["file", "text", "more"])
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path / "table.csv"


def read(folder):
    return {
        key: (captions, image)
        for batch in iter_eval(f"{folder}/*.tar", image_size=16, batch_size=8)
        for key, captions, image in zip(batch["key"], batch["captions"], batch["image"])
    }


def test_pack_writes_what_the_table_says_and_counts_the_rest(table, tmp_path):
    run(
        "pack",
        table,
        tmp_path / "shards",
        "--image",
        "file",
        "--caption",
        "text",
        "--samples-per-shard",
        10,
        "--workers",
        2,
        "--json",
        tmp_path / "report.json",
    )
    report = json.loads((tmp_path / "report.json").read_text())
    examples = report.pop("examples")
    assert {cause: rows[0].partition(" (")[0] for cause, rows in examples.items()} == {
        "corrupt_image": "row 7",
        "empty_caption": "row 3",
        "missing_image": "row 5",
    }
    assert report == {
        "rows": 25,
        "samples": 22,
        "shards": 3,
        "skipped": {"corrupt_image": 1, "empty_caption": 1, "missing_image": 1},
    }
    found = read(tmp_path / "shards")
    assert sorted(found) == [f"{i:09d}" for i in range(25) if i not in (3, 5, 7)]
    assert all(captions == [f"caption, number {int(key)}"] for key, (captions, _) in found.items())
    with tarfile.open(tmp_path / "shards/000001.tar") as tar:
        assert tar.extractfile("000000012.jpg").read() == picture(12), "bytes are kept as they are"


def test_packing_again_does_only_what_is_missing(table, tmp_path):
    options = {"image": "file", "caption": ["text", "more"], "samples_per_shard": 10}
    first = pack(table, tmp_path / "shards", **options)
    before = {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in (tmp_path / "shards").glob("*.tar")
    }
    (tmp_path / "shards/000001.tar").unlink()
    (tmp_path / "shards/000002_stats.json").unlink()
    assert pack(table, tmp_path / "shards", **options) == first
    for path in (tmp_path / "shards").glob("*.tar"):
        assert path.read_bytes() == before[path.name][1]
    assert (tmp_path / "shards/000000.tar").stat().st_mtime_ns == before["000000.tar"][0]
    assert read(tmp_path / "shards")["000000004"][0] == ["caption, number 4", "second 4"]
    with pytest.raises(ValueError, match="other settings .caption."):
        pack(table, tmp_path / "shards", **{**options, "caption": "text"})


def test_pack_takes_tsv_jsonl_and_folders(table, tmp_path):
    rows = list(csv.DictReader(open(table)))
    (tmp_path / "t.tsv").write_text("file\ttext\n" + "".join(f"{r['file']}\t{r['text']}\n" for r in rows))
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"file": r["file"], "text": [r["text"], r["more"]]}) + "\n" for r in rows)
    )
    for i, row in enumerate(rows):
        (tmp_path / "pictures" / f"{i}.txt").write_text(row["text"])
    expected = read_packed(table, tmp_path / "csv", image="file", caption="text")
    assert read_packed(tmp_path / "t.tsv", tmp_path / "tsv", image="file", caption="text") == expected
    of_jsonl = read_packed(tmp_path / "t.jsonl", tmp_path / "jsonl", image="file", caption="text")
    assert of_jsonl["000000004"] == ["caption, number 4", "second 4"] and "000000003" in of_jsonl
    of_folder = read_packed(tmp_path / "pictures", tmp_path / "folder")
    assert sorted(of_folder.values()) == sorted(expected.values())


def read_packed(source, folder, **options):
    pack(source, folder, **options)
    return {key: captions for key, (captions, _) in read(folder).items()}


def test_pack_takes_bytes_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    table = pyarrow.table(
        {"image": [{"bytes": picture(1)}, {"bytes": picture(2, form="PNG")}], "caption": ["a", "b"]}
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    assert read_packed(tmp_path / "t.parquet", tmp_path / "shards") == {
        "000000000": ["a"],
        "000000001": ["b"],
    }


def test_resize_reduces_the_shorter_side(tmp_path):
    (tmp_path / "p").mkdir()
    for name, size in (("wide", (400, 100)), ("small", (20, 16))):
        (tmp_path / "p" / f"{name}.jpg").write_bytes(picture(1, size))
        (tmp_path / "p" / f"{name}.txt").write_text(name)
    pack(tmp_path / "p", tmp_path / "shards", resize=50)
    with tarfile.open(tmp_path / "shards/000000.tar") as tar:
        sizes = {
            json.loads(tar.extractfile(m).read())["caption"]: Image.open(
                io.BytesIO(tar.extractfile(m.name[:-4] + "jpg").read())
            ).size
            for m in tar
            if m.name.endswith(".json")
        }
    assert sizes == {"wide": (200, 50), "small": (20, 16)}


def test_pack_says_what_is_wrong(table, tmp_path, capsys):
    for arguments, message in (
        (("pack", tmp_path / "none.csv", tmp_path / "s"), "there is no"),
        (("pack", table, tmp_path / "s"), "no column 'image'; its columns are file, text, more"),
        (("check", tmp_path / "*.tar"), "no file matches"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        assert message in capsys.readouterr().err


def write(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, image, caption in samples:
            for extension, data in (("jpg", image), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_check_counts_faults_duplicates_and_overlap(tmp_path):
    again = io.BytesIO()
    Image.open(io.BytesIO(picture(0))).save(again, "JPEG", quality=85)
    write(
        tmp_path / "a.tar",
        [(f"k{i}", picture(i), f"caption {i}") for i in range(10)]
        + [("bad", b"x", "y"), ("blank", picture(50), " ")],
    )
    write(
        tmp_path / "b.tar",
        [
            ("k0", picture(60), "other"),
            ("copy", picture(1), "caption 1"),
            ("similar", again.getvalue(), "z z z"),
        ],
    )
    write(tmp_path / "val.tar", [("v", picture(2), "Caption 9"), ("w", picture(70), "new")])
    report = check(
        [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], overlap_with=str(tmp_path / "val.tar"), workers=2
    )
    assert report["faults"] == {"corrupt_image": 1, "empty_caption": 1}
    assert (report["samples"], report["good"]) == (15, 13)
    assert (report["duplicate_keys"], report["duplicate_images"], report["similar_images"]) == (1, 1, 1)
    assert report["overlap"] == {"images": 1, "similar_images": 1, "captions": 1}
    assert report["captions"]["captions"] == 13 and report["captions"]["distinct"] == 12
    assert report["captions"]["words"] == {"min": 1, "median": 2.0, "max": 3}
    assert report["examples"]["corrupt_image"][0].startswith(f"{tmp_path / 'a.tar'} bad")


def test_check_ends_with_a_status(tmp_path, capsys):
    write(tmp_path / "good.tar", [(f"k{i}", picture(i), "c") for i in range(5)])
    write(tmp_path / "bad.tar", [("k", picture(0), "c"), ("l", b"x", "c")])
    (tmp_path / "zero.tar").write_bytes(b"")
    assert main(["check", str(tmp_path / "good.tar")]) == 0
    assert main(["check", str(tmp_path / "bad.tar")]) == 1
    assert main(["check", str(tmp_path / "zero.tar")]) == 1
    assert "empty_shard" in capsys.readouterr().out


def test_stats_equal_a_count_by_hand(tmp_path, capsys):
    write(
        tmp_path / "a.tar", [("k", picture(0, (40, 30)), "one two three"), ("l", picture(1, (60, 30)), "one")]
    )
    write(tmp_path / "b.tar", [("m", picture(2, (50, 20)), "two")])
    report = stats(str(tmp_path / "*.tar"))
    size = (tmp_path / "a.tar").stat().st_size + (tmp_path / "b.tar").stat().st_size
    assert report == {
        "shards": 2,
        "samples": 3,
        "bytes": size,
        "samples_per_shard": {"min": 1, "median": 1.5, "max": 2},
        "width": {"min": 40, "median": 50.0, "max": 60},
        "height": {"min": 20, "median": 30.0, "max": 30},
        "captions": {
            "captions": 3,
            "distinct": 3,
            "per_sample": {"min": 1, "median": 1.0, "max": 1},
            "words": {"min": 1, "median": 1.0, "max": 3},
            "vocabulary": 3,
        },
    }
    assert main(["stats", str(tmp_path / "*.tar")]) == 0
    assert "samples_per_shard  min 1, median 1.5, max 2" in capsys.readouterr().out


def test_stats_of_real_photographs(test_data):
    report = stats(str(test_data("flickr8k-mini/val") / "*.tar"))
    assert (
        report["samples"] == 1000 and report["captions"]["captions"] == 5000 and report["width"]["max"] == 192
    )


@pytest.fixture
def img2dataset(tmp_path):
    """A program that takes the real one's options, reads local files and leaves what the real one (1.47) leaves: a shard,
    its statistics, a table of what became of each URL. One with "busy" in it answers when asked the second time.
    """
    pytest.importorskip("pyarrow")
    program = tmp_path / "bin" / "img2dataset"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\n"
        + """
import csv, io, json, os, sys, tarfile
from pathlib import Path
import pyarrow, pyarrow.parquet
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert options["--output_format"] == "webdataset" and options["--url_col"] == "url"
out = Path(options["--output_folder"])
done = {int(path.name.split("_")[0]) for path in out.glob("*.json")}
rows = [] if 0 in done else list(csv.DictReader(open(options["--url_list"], newline=""), delimiter="\\t"))
print("asked for", len(rows), flush=True)
if not rows:
    sys.exit()
fates = []
with tarfile.open(out / "00000.tar", "w") as tar:
    for i, row in enumerate(rows):
        path, error = Path(row["url"].removeprefix("http://")), None
        if "gone" in row["url"]:
            error = "HTTP Error 404: Not Found"
        elif "busy" in row["url"] and not path.with_suffix(".asked").exists():
            path.with_suffix(".asked").touch()
            error = "<urlopen error timed out>"
        fates.append({**row, "key": str(i), "status": "failed_to_download" if error else "success", "error_message": error})
        if error:
            continue
        for ext, data in (("jpg", path.read_bytes()), ("txt", row["caption"].encode())):
            info = tarfile.TarInfo(f"{i:09d}.{ext}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
if os.environ.get("KILLED") == out.name:
    sys.exit(9)
pyarrow.parquet.write_table(pyarrow.Table.from_pylist(fates), out / "00000.parquet")
(out / "00000_stats.json").write_text(json.dumps({"count": len(rows)}))
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.fixture
def cc3m(tmp_path):
    """Five pairs: two that answer, two when asked again, one that is gone."""
    lines = []
    for i, name in enumerate(("a", "b", "busy1", "busy2", "gone")):
        (tmp_path / f"{name}.jpg").write_bytes(picture(i))
        lines.append((f'the "{name}" picture', f"http://{tmp_path}/{name}.jpg"))
    (tmp_path / "cc.tsv").write_text("".join(f"{caption}\t{url}\n" for caption, url in lines))
    return tmp_path / "cc.tsv"


def prepare(cc3m, img2dataset, *options, status=0, **environment):
    return run(
        cc3m,
        cc3m.parent / "out",
        *("--check-workers", 1, "--img2dataset", img2dataset, *options),
        program="prepare_cc3m.py",
        status=status,
        **environment,
    )


def captions_in(folder):
    paths = sorted(folder.glob("*.tar"))
    return sorted(
        c for batch in iter_eval(map(str, paths), image_size=8, batch_size=9) for (c,) in batch["captions"]
    )


def test_prepare_cc3m_asks_again_for_what_did_not_answer_and_goes_on_where_it_stopped(
    tmp_path, cc3m, img2dataset
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "check.json").write_text("{}")  # as earlier versions left it
    stopped = prepare(cc3m, img2dataset, status=1, KILLED="retry-1")
    assert "5 pairs in" in stopped and "asking again for 2 pairs" in stopped
    assert "run this again to go on" in stopped
    result = prepare(cc3m, img2dataset)
    assert "asked for 0" in result and "asking again for 2 pairs" in result
    assert "4 of 5 pairs (80.0 %) are whole" in result
    assert json.loads((tmp_path / "out/check/report.json").read_text())["good"] == 4
    expected = [f'the "{name}" picture' for name in ("a", "b", "busy1", "busy2")]
    assert captions_in(tmp_path / "out") == expected
    again = prepare(cc3m, img2dataset)
    assert "asked for 0" in again and "asking again" not in again and "4 of 5" in again


def test_prepare_cc3m_says_what_is_wrong(tmp_path):
    (tmp_path / "cc.tsv").write_text("caption\thttp://x/1\nno url here\n")
    result = run(tmp_path / "cc.tsv", tmp_path / "out", program="prepare_cc3m.py", status=2)
    assert "line 2: expected a caption, a tab and a URL" in result
    (tmp_path / "cc.tsv").write_text("caption\thttp://x/1\n")
    result = run(tmp_path / "cc.tsv", tmp_path / "out", program="prepare_cc3m.py", status=2)
    assert (
        "environment of its own: run this again with --install" in result
        and "pip install img2dataset" in result
    )
    options = ("--img2dataset", tmp_path / "nowhere")
    result = run(tmp_path / "cc.tsv", tmp_path / "out", *options, program="prepare_cc3m.py", status=2)
    assert "there is no" in result


@pytest.fixture
def counted(tmp_path):
    """Three shards of 4, 5 and 6 samples."""
    for s in range(3):
        with tarfile.open(tmp_path / f"{s}.tar", "w") as tar:
            for i in range(4 + s):
                for name, data in ((f"{s}{i}.jpg", picture(i)), (f"{s}{i}.txt", b"words")):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return tmp_path


def test_index_counts_once_and_goes_on(counted, tmp_path, capfd):
    out = tmp_path / "out.json"
    arguments = ["index", str(counted / "{0..2}.tar"), "--json", str(out), "--workers", "2"]
    assert main(arguments) == 0
    first = json.loads(out.read_text())
    assert (first["shards"], first["indexed"], first["samples"], first["faults"]) == (3, 3, 15, {})
    assert first["bytes"] == sum((counted / f"{s}.tar").stat().st_size for s in range(3))
    (counted / "1.tar").write_bytes((counted / "2.tar").read_bytes())
    assert main([*arguments, "--sizes", str(counted / "sizes.json")]) == 0
    again = json.loads(out.read_text())
    assert (again["indexed"], again["samples"]) == (1, 16)
    assert json.loads((counted / "sizes.json").read_text()) == {"0.tar": 4, "1.tar": 6, "2.tar": 6}
    # And a run reads none of them to begin.
    stream = create_stream(
        {"train": str(counted), "cache_dir": str(tmp_path / "elsewhere")},
        tokenizer=lambda texts: torch.zeros(len(texts), 1, dtype=torch.int64),
        image_size=8, batch_size=4, seed=0,
    )  # fmt: skip
    assert stream.samples_per_epoch == 16 and not list((tmp_path / "elsewhere").rglob("*.index"))
    (counted / "1.tar").write_bytes(b"")
    assert main(arguments) == 1 and "1.tar: " in capfd.readouterr().out


@pytest.mark.parametrize("ranges", [True, False])
def test_index_reads_a_server_s_shards_by_ranges(counted, tmp_path, ranges, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    cache = tmp_path / "cache"
    local = tmp_path / "local.json"
    assert main(["index", str(counted / "{0..2}.tar"), "--json", str(local)]) == 0
    with Server(counted, ranges=ranges) as server:
        arguments = [
            "index",
            f"{server.url}/{{0..2}}.tar",
            "--cache-dir",
            str(cache),
            "--json",
            str(tmp_path / "a"),
        ]
        assert main(arguments) == 0
        assert bool(server.served) != ranges and len(list(cache.rglob("*.tar"))) == (0 if ranges else 3)
        found, expected = json.loads((tmp_path / "a").read_text()), json.loads(local.read_text())
        assert {**found, "seconds": 0} == {**expected, "seconds": 0} and found["indexed"] == 3
        assert main(arguments) == 0
        assert json.loads((tmp_path / "a").read_text())["indexed"] == 0
        # One that the server has anew is found, whatever its size.
        (counted / "1.tar").write_bytes((counted / "0.tar").read_bytes())
        assert main(arguments) == 0
        if ranges:
            assert json.loads((tmp_path / "a").read_text())["samples"] == 14
