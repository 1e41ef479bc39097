"""Fuzz every reader of files that others may have made, beside the shards of fuzz_shards.py.

    python tests/data/fuzz_readers.py SECONDS [SEED [CASES]]

Each case writes a good file (an index, a tokenizer, a table, a class list, CLIP_benchmark's tars, CIFAR's pickles,
sentences, pairs, embeddings), damages it by bytes or by the values in it, and reads it. What may come out is what was
asked for, or a ValueError, DataError or OSError that names one of the files. A case that takes a minute is a hang; a
failing one is left in the folder fuzz-failure. The last line is the number of cases.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import pickle
import random
import runpy
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from clipkit.data.bpe import BytePairs
from clipkit.data.faults import DataError
from clipkit.data.index_cache import load_index, read_summary, store_index
from clipkit.data.packing import _members as sample_members
from clipkit.data.packing import _rows as table_rows
from clipkit.data.packing import _same_settings
from clipkit.data.sentences import create_sentences
from clipkit.data.tarindex import ShardIndex, TarFiles, index_tar
from clipkit.data.tokenizers import load_tokenizer
from clipkit.evals.classification import read_classes, read_templates
from clipkit.evals.compositional import read_pairs
from clipkit.evals.sentences import find_sets
from clipkit.evals.sources import Cifar, ClassTar, ClipBenchmark, Shards
from clipkit.evals.transfer import read_binary, read_mrpc, read_sst2, read_trec
from clipkit.predict import load_embeddings, save_embeddings

_shards = runpy.run_path(str(Path(__file__).with_name("fuzz_shards.py")))
damage, header_damage, pictures, hang = (
    _shards[name] for name in ("damage", "header_damage", "pictures", "hang")
)
_BIG = "@ an integer of 5,000 digits @"
_JUNK = [
    None, True, False, -1, 0, 3, 1.5, 10**30, 1e999, -1e999, math.nan, "", " ", "x", "\ud800", "\0", "9" * 5000, [], {},
    [[]], {"": []}, _BIG, "../../etc/passwd", "/dev/zero", "pipe:touch ran", ["a", 3], {"a": None}, "a b c", "\x85\u2028",
]  # fmt: skip
_FIELDS = [
    b"",
    b"\t",
    b"nan",
    b"1e999",
    b"-1",
    b"\xff\xfe",
    b"9" * 5000,
    b"\0",
    b"\r",
    b'"',
    b"\xe2\x80\xa8",
    b"x y",
]


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value in which something is something else, is missing, or is nested deep."""
    what = rng.randrange(8)
    if what == 0 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(_JUNK)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(list(keys))
    out = dict(value) if isinstance(value, dict) else list(value)
    if what == 1:
        del out[key]
    elif what == 2 and isinstance(out, dict):
        out[rng.choice(["x", "", "path", "__class__"])] = rng.choice(_JUNK)
    else:
        out[key] = mutated(out[key], rng)
    return out


def json_bytes(value: Any, rng: random.Random) -> bytes:
    """A JSON file of the value, of a mutation of it, or damaged."""
    if rng.random() < 0.7:
        value = mutated(value, rng)
    text = json.dumps(value).replace(json.dumps(_BIG), "9" * 5000)
    if rng.random() < 0.03:
        text = "[" * 50_000 + text
    return damage(text.encode(), rng) if rng.random() < 0.2 else text.encode()


def text_bytes(lines: list[str], rng: random.Random) -> bytes:
    """A text file of the lines, with a field or line that is another, or damaged."""
    raw = [line.encode() for line in lines]
    for _ in range(rng.randrange(3)):
        at = rng.randrange(len(raw))
        fields = raw[at].split(b"\t")
        fields[rng.randrange(len(fields))] = rng.choice(_FIELDS)
        raw[at] = rng.choice((b"\t".join(fields), b"", raw[at] + b"\t" + rng.choice(_FIELDS)))
    out = b"\n".join(raw)
    return damage(out, rng) if rng.random() < 0.3 else out


def tar_bytes(members: dict[str, bytes], rng: random.Random) -> bytes:
    out = io.BytesIO()
    with tarfile.open(
        fileobj=out, mode="w", format=rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if rng.random() < 0.05:
                info.pax_headers = {
                    rng.choice(("size", "path", "GNU.sparse.major", "mtime")): rng.choice(
                        ("9" * 5000, "-1", "", "\0")
                    )
                }
            tar.addfile(info, io.BytesIO(data))
    data = out.getvalue()
    for _ in range(rng.choice((0, 0, 1, 3))):
        data = header_damage(data, rng)
    return damage(data, rng) if rng.random() < 0.3 else data


def index(folder: Path, rng: random.Random) -> None:
    file = folder / "a.index"
    spans = np.array([[[512, 9], [1536, 3], [-1, 0]], [[2560, 1], [-1, 0], [3584, 2]]])
    given = {"keys": ["a", "b"], "spans": spans, "faults": [("empty_image", "c")], "size": 4096, "probe": 7}
    given["heads"] = np.zeros((2, 3), np.uint32)
    if rng.random() < 0.5:
        name = rng.choice(("spans", "heads", "size", "keys"))
        given[name] = {
            "spans": spans
            + rng.choice((0, 1, -600, 1 << 40)) * (np.arange(12).reshape(2, 3, 2) == rng.randrange(12)),
            "heads": given["heads"][: rng.randrange(2)],
            "size": rng.choice((-1, 0, 1 << 62)),
            "keys": rng.choice(([], ["a"], ["", ""], ["a", "b", "c"], ["a\0", "\udcff"])),
        }[name]
    store_index(file, ShardIndex(**given))
    if rng.random() < 0.7:
        # Not where it lies: what is mapped still would change under its reader.
        raw = damage(file.read_bytes(), rng)
        file.unlink()
        file.write_bytes(raw)
    read_summary(file)
    found = load_index(file, size=rng.choice((None, 4096)))
    if found is not None:
        assert found.spans.shape == (len(found.keys), 3, 2) and int(found.spans.max(initial=0)) <= found.size
        assert found.heads.shape == (len(found.keys), 3) and len(list(found.keys)) == len(found.keys)


def tar(folder: Path, rng: random.Random) -> None:
    path = folder / "0.tar"
    path.write_bytes(
        tar_bytes({f"k{i}.{end}": b"data" * 200 for i in range(3) for end in ("jpg", "txt")}, rng)
    )
    index_tar(path)
    files = TarFiles(path)
    for member in files.members:
        files.read(member)


def tokenizer(folder: Path, rng: random.Random) -> None:
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    hf = json.loads(backend.to_str())
    state = rng.choice(
        [
            {"tokenizer": "clip_bpe", "context_length": 9, "merges": ["a b", "ab c", ""]},
            {"tokenizer": "words", "context_length": 9, "vocabulary": ["a", "b", "\u00e9"]},
            {
                "tokenizer": "hf",
                "context_length": 9,
                "special": {"pad": 0, "sot": 0, "eot": 1},
                "backend": "",
            },
        ]
    )
    if "backend" in state:
        state["backend"] = (
            json_bytes(hf, rng).decode("utf-8", "replace") if rng.random() < 0.6 else json.dumps(hf)
        )
    path = folder / "tokenizer.json"
    path.write_bytes(json_bytes(state, rng))
    made = load_tokenizer(path)
    assert made(["a word", ""]).shape == (2, made.context_length)


def merges(folder: Path, rng: random.Random) -> None:
    path = folder / "merges.gz"
    raw = gzip.compress(text_bytes(["#version", "a b", "ab c", "c</w> d"], rng))
    path.write_bytes(damage(raw, rng) if rng.random() < 0.5 else raw)
    BytePairs(path).ids("abc abcd", 20)


def packed_table(folder: Path, rng: random.Random) -> None:
    (folder / "0.jpg").write_bytes(rng.choice(IMAGES))
    rows = [{"image": "0.jpg", "caption": "a"}, {"image": "1.jpg", "caption": ["a", "b"]}]
    suffix = rng.choice(("jsonl", "csv", "tsv", "parquet"))
    path = folder / f"table.{suffix}"
    if suffix == "jsonl":
        path.write_bytes(b"\n".join(json_bytes(row, rng) for row in rows))
    elif suffix == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"image": ["0.jpg", None], "caption": ["a", "b"]}), path)
        path.write_bytes(damage(path.read_bytes(), rng))
    else:
        mark = "," if suffix == "csv" else "\t"
        lines = [mark.join(row) for row in (["image", "caption"], ["0.jpg", "a"], ["1.jpg", '"b\n c"'])]
        path.write_bytes(text_bytes(lines, rng))
    (folder / "pack.json").write_bytes(json_bytes({"source": "x"}, rng))
    for row in table_rows(path, "image", ["caption"]):
        try:
            sample_members("key", row, folder, 16, 1_000_000)
        except DataError:
            continue
    _same_settings(folder / "pack.json", {"source": "x"})


def classes(folder: Path, rng: random.Random) -> None:
    path = folder / f"classes.{rng.choice(('txt', 'json', 'tsv', 'csv'))}"
    if path.suffix == ".json":
        path.write_bytes(json_bytes(["cat", "dog"], rng))
    else:
        path.write_bytes(
            text_bytes(["name\tfolder", "cat\tn01", "dog\tn02"], rng).replace(
                b"\t", b"," if path.suffix == ".csv" else b"\t"
            )
        )
    names, _ = read_classes(str(path))
    assert all(isinstance(name, str) for name in names)
    (folder / "templates.txt").write_bytes(text_bytes(["a {}.", "the {c}"], rng))
    assert all(isinstance(make("cat"), str) for make in read_templates(str(folder / "templates.txt")))


def clip_benchmark(folder: Path, rng: random.Random) -> None:
    (folder / "test").mkdir()
    members = {}
    for i in range(3):
        members[f"s{i}.png"] = rng.choice(IMAGES)
        members[f"s{i}.cls"] = rng.choice((b"0", b"1\n", b"1", rng.choice(_FIELDS)))
        if rng.random() < 0.5:
            members[f"s{i}.txt"] = text_bytes(["one", "two"], rng)
    (folder / "test" / "0.tar").write_bytes(tar_bytes(members, rng))
    (folder / "test" / "nshards.txt").write_bytes(text_bytes(["1"], rng) if rng.random() < 0.3 else b"1\n")
    (folder / "classnames.txt").write_bytes(text_bytes(["cat", "dog"], rng))
    drain(ClipBenchmark(folder, captioned=rng.random() < 0.3))


def class_tar(folder: Path, rng: random.Random) -> None:
    path = folder / "0.tar"
    path.write_bytes(
        tar_bytes({f"x/{name}/{i}.png": rng.choice(IMAGES) for name in "ab" for i in range(2)}, rng)
    )
    drain(ClassTar(path))


def labelled_shard(folder: Path, rng: random.Random) -> None:
    members = {}
    for i in range(3):
        members[f"k{i}.png"] = rng.choice(IMAGES)
        members[f"k{i}.json"] = json_bytes({"caption": "a", "cls": rng.choice(_JUNK)}, rng)
    path = folder / "0.tar"
    path.write_bytes(tar_bytes(members, rng) if rng.random() < 0.3 else tar_bytes(members, random.Random(4)))
    drain(Shards(str(path), labelled=True))


def drain(source: Any) -> None:
    for _, batch in source.batches(16, 2):
        assert len(batch["image"]) == len(batch["captions"]) == len(batch["keys"]) == len(batch["meta"])
        labels = map(source.label, batch["keys"], batch["meta"])
        assert all(label is None or isinstance(label, (int, DataError)) for label in labels)


def cifar(folder: Path, rng: random.Random) -> None:
    root = folder / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.zeros((2, 3072), rng.choice((np.uint8, np.uint8, np.int8, np.float64, object)))
    meta: Any = {b"label_names": [b"cat", b"dog"]}
    batch: Any = {
        b"data": pixels,
        b"labels": rng.choice(([0, 1], [1, 1], [0], [2, 0], [0, -1], [None, 1], "ab")),
    }
    if rng.random() < 0.2:
        batch = rng.choice(
            ([], {b"data": pixels[0], b"labels": [0]}, {}, {b"data": os.system}, {(1,): 2}, {1, 2})
        )
    for name, value in (("batches.meta", meta), ("test_batch", batch)):
        raw = pickle.dumps(value, protocol=rng.choice((0, 1, 2, 2, 3, 4, 5)))
        if rng.random() < 0.5:
            # In what is not pixels, mostly.
            cut = min(len(raw), 200)
            raw = damage(raw[:cut], rng) + raw[cut:]
        (root / name).write_bytes(raw)
    drain(Cifar(folder))


def sts(folder: Path, rng: random.Random) -> None:
    year = folder / "STS" / "STS12-en-test"
    bench = folder / "STS" / "STSBenchmark"
    year.mkdir(parents=True)
    bench.mkdir()
    (year / "STS.input.x.txt").write_bytes(text_bytes(["a\tb", "c\td", ""], rng))
    (year / "STS.gs.x.txt").write_bytes(text_bytes(["1.5", "", "3"], rng))
    (bench / "sts-test.csv").write_bytes(text_bytes(["g\tf\ty\t1\t2.5\ta\tb", "g\tf\ty\t2\t1.0\ta\tc"], rng))
    if rng.random() < 0.1:
        (year / "STS.gs.x.txt").unlink()
    for read in find_sets(folder).values():
        for rows in read().values():
            assert all(len(row) == 3 and math.isfinite(row[2]) for row in rows)


def senteval(folder: Path, rng: random.Random) -> None:
    for name in ("CR/custrev.pos", "CR/custrev.neg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text_bytes(["good", "bad"], rng))
    sst = folder / "sst"
    sst.write_bytes(text_bytes(["a film\t1", "a bore\t0"], rng))
    (folder / "TREC").mkdir()
    for name in ("train_5500.label", "TREC_10.label"):
        (folder / "TREC" / name).write_bytes(text_bytes(["NUM:dist how far", "LOC:city where"], rng))
    mrpc = folder / "mrpc.txt"
    mrpc.write_bytes(text_bytes(["Quality\tA\tB\tC\tD", "1\t1\t2\ta b\tc", "0\t3\t4\td\te"], rng))
    reader = rng.choice(
        (
            lambda: read_binary(folder, "CR"),
            lambda: read_sst2(sst),
            lambda: read_trec(folder),
            lambda: read_mrpc(mrpc),
        )
    )
    reader()


def pairs(folder: Path, rng: random.Random) -> None:
    row = {"filename": "a.jpg", "caption": "a", "negative_caption": "b", "task": "add"}
    if rng.random() < 0.5:
        path = folder / "pairs.jsonl"
        path.write_bytes(b"\n".join(json_bytes(row, rng) for _ in range(2)))
        found = read_pairs(path)
    else:
        (folder / "add.json").write_bytes(json_bytes({"0": row, "1": row}, rng))
        found = read_pairs(folder)
    assert all(isinstance(value, str) for one in found for value in one.values())


def sentences(folder: Path, rng: random.Random) -> None:
    path = folder / f"triplets.{rng.choice(('jsonl', 'csv'))}"
    if path.suffix == ".csv":
        path.write_bytes(text_bytes(["sent0,sent1,hard_neg", "a,b,c", "d,e,f"], rng))
        spec = {"triplets": str(path)}
    else:
        row = {"premise": "a", "hypothesis": "b", "label": rng.choice((0, "neutral", "-"))}
        path.write_bytes(
            b"\n".join(
                json_bytes(row, rng) if rng.random() < 0.5 else json.dumps(row).encode() for _ in range(3)
            )
        )
        spec = {"pairs": str(path)}
    stream = create_sentences(spec, tokenizer=lambda texts: torch.zeros(len(texts), 2), batch_size=1, seed=0)
    next(iter(stream))
    stream.state_dict()


def embeddings(folder: Path, rng: random.Random) -> None:
    path = folder / f"e.{rng.choice(('npy', 'npy', 'parquet'))}"
    save_embeddings(path, ["x", "y"], torch.ones(2, 4))
    if rng.random() < 0.8:
        raw = path.read_bytes()
        path.write_bytes(damage(raw[:130], rng) + raw[130:] if path.suffix == ".npy" else damage(raw, rng))
    if path.suffix == ".npy" and rng.random() < 0.5:
        path.with_suffix(".keys.json").write_bytes(json_bytes(["x", "y"], rng))
    keys, features = load_embeddings(path)
    assert features.ndim == 2 and len(keys) == len(features)


READERS: list[Callable[[Path, random.Random], None]] = [
    index, tar, tokenizer, merges, packed_table, classes, clip_benchmark, class_tar, labelled_shard, cifar, sts, senteval,
    pairs, sentences, embeddings,
]  # fmt: skip
IMAGES = [image for image in pictures() if len(image) < 3000][:4] + [b"", b"\x89PNG", b"x" * 40]
# What two columns must hold for a global batch, and similar: of the settings, and no file's fault.
_NAMELESS = ("fewer than the global batch", "no_such")


def main(seconds: float, seed: int = 0, most: float = math.inf) -> int:
    warnings.simplefilter("ignore")
    rng, seen = random.Random(seed), Counter()
    signal.signal(signal.SIGALRM, hang)
    os.environ["CLIPKIT_CACHE"] = tempfile.mkdtemp(prefix="clipkit-fuzz-")
    end, cases = time.monotonic() + seconds, 0
    folder = Path(tempfile.mkdtemp(prefix="clipkit-fuzz-"))
    while cases < most and time.monotonic() < end:
        reader = READERS[cases % len(READERS)]
        shutil.rmtree(folder)
        folder.mkdir()
        signal.alarm(60)
        try:
            try:
                reader(folder, random.Random(rng.getrandbits(60)))
                seen[f"{reader.__name__} read"] += 1
            except (ValueError, OSError, DataError) as error:
                said = str(error)
                assert str(folder) in said or any(text in said for text in _NAMELESS), (
                    f"no file is named: {said[:300]}"
                )
                assert len(said) < 2000, "a message of a page"
                seen[f"{reader.__name__} refused"] += 1
        except BaseException:
            shutil.copytree(folder, "fuzz-failure", dirs_exist_ok=True)
            print(f"case {cases} ({reader.__name__}) of seed {seed} failed: fuzz-failure", file=sys.stderr)
            raise
        finally:
            signal.alarm(0)
        cases += 1
    for path in (folder, os.environ["CLIPKIT_CACHE"]):
        shutil.rmtree(path)
    assert not Path("ran").exists(), "something ran"
    print(json.dumps(dict(sorted(seen.items()))))
    print(f"{cases} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *map(int, sys.argv[2:])))
