"""Task settings and data sets from a stranger: what they may open, and what their files may do, which is to be wrong."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from clipkit.data import create_tokenizer
from clipkit.evals import create_tasks
from clipkit.evals.sentences import find_sets
from clipkit.evals.sources import Cifar, ClassTar, ClipBenchmark
from clipkit.evals.transfer import read_binary, read_mrpc, read_sst2, read_trec
from clipkit.foreign import BrokenFile, named_by

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_tasks import image_bytes, write_tar


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder with a good set of every kind, outside the present folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    root = tmp_path / "elsewhere"
    write_tar(root / "shards" / "0.tar", {"a.png": image_bytes(1), "a.txt": b"a", "a.json": b'{"cls": 0}'})
    write_tar(root / "bench" / "test" / "0.tar", {"a.png": image_bytes(1), "a.cls": b"0", "a.txt": b"a"})
    (root / "bench" / "classnames.txt").write_text("cat\n")
    write_tar(root / "class.tar", {"x/cat/a.png": image_bytes(1)})
    (root / "folder" / "cat").mkdir(parents=True)
    (root / "folder" / "cat" / "a.png").write_bytes(image_bytes(1))
    (root / "cifar-10-batches-py").mkdir()
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat"]}))
    batch = {b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    (root / "classes.txt").write_text("cat\n")
    (root / "templates.txt").write_text("a {}\n")
    pair = {"filename": "cat/a.png", "caption": "a", "negative_caption": "b", "task": "add"}
    (root / "pairs.jsonl").write_text(json.dumps(pair))
    (root / "STS" / "STS12-en-test").mkdir(parents=True)
    (root / "STS" / "STS12-en-test" / "STS.input.x.txt").write_text("a\tb\nc\td")
    (root / "STS" / "STS12-en-test" / "STS.gs.x.txt").write_text("1\n2")
    (root / "CR").mkdir()
    for name in ("custrev.pos", "custrev.neg"):
        (root / "CR" / name).write_text("text\n")
    return root


def specs(root: Path | str) -> dict[str, dict]:
    zero_shot = {"kind": "zero_shot", "classes": ["cat"], "templates": ["{}"]}
    inside = {"kind": "zero_shot", "folder": "own", "templates": ["{}"]}
    return {
        "shards": {"kind": "retrieval", "shards": f"{root}/shards/*.tar"},
        "a list of shards": {"kind": "geometry", "shards": [f"{root}/shards/0.tar"]},
        "clip_benchmark": {"kind": "retrieval", "clip_benchmark": f"{root}/bench"},
        "a split": {**zero_shot, "clip_benchmark": f"{root}/bench", "split": "../bench/test"},
        "folder": {**zero_shot, "folder": f"{root}/folder"},
        "tar": {**zero_shot, "tar": f"{root}/class.tar"},
        "cifar": {**zero_shot, "cifar": str(root)},
        "classes": {**inside, "classes": f"{root}/classes.txt"},
        "templates": {**inside, "classes": ["cat"], "templates": f"{root}/templates.txt"},
        "pairs": {"kind": "compositional", "pairs": f"{root}/pairs.jsonl", "folder": f"{root}/folder"},
        "train": {"kind": "linear_probe", "train": {"tar": f"{root}/class.tar"}, "test": {"folder": "own"}},
        "test": {"kind": "consistency", "train": {"folder": "own"}, "test": {"tar": f"{root}/class.tar"},
                 "templates": ["{}"]},
        "sts": {"kind": "sts", "folder": str(root)},
        "senteval": {"kind": "senteval", "folder": str(root)},
    }  # fmt: skip


@pytest.mark.parametrize("name", specs(""))
def test_a_stranger_s_task_opens_nothing_elsewhere(name, elsewhere):
    os.symlink(elsewhere / "folder", "own")
    create_tasks({"t": specs(elsewhere)[name]})
    with named_by("run"), pytest.raises(ValueError, match="in the settings that run carries"):
        create_tasks({"t": specs(elsewhere)[name]})
    # The same files below the present folder are the user's own.
    os.symlink(elsewhere, "mine")
    with named_by("run"):
        create_tasks({"t": specs("mine")[name]})


@pytest.mark.parametrize(
    "name", [name for name in specs("") if name not in ("classes", "templates", "train", "test")]
)
def test_a_link_in_a_stranger_s_folder_leads_nowhere(name, elsewhere):
    """The files lie in the run folder itself, as links to those that the process could read."""
    run = Path("run")
    for folder, _, files in os.walk(elsewhere):
        for file in files:
            copy = run / Path(folder).relative_to(elsewhere) / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(Path(folder) / file)
    task = specs("run")[name]

    def use() -> None:
        made = create_tasks({"t": task})["t"]
        for read in getattr(made, "sets", {}).values():
            read()
        if task["kind"] == "senteval":
            read_binary(made.root, "CR")

    use()
    with named_by(run), pytest.raises(ValueError, match="in the settings that run carries"):
        use()


@pytest.mark.parametrize(
    "spec",
    [{"name": "clip_bpe", "merges": "/etc/passwd"}, {"name": "hf", "model": "/etc"}, {"path": "/etc/passwd"}],
)
def test_a_stranger_s_tokenizer_opens_nothing_elsewhere(spec):
    with named_by("run"), pytest.raises(BrokenFile, match="in the settings that run carries"):
        create_tokenizer(spec)


class Harm:
    def __reduce__(self):
        return (os.system, ("touch ran",))


# A dictionary's key that takes 2^200 steps to hash: (((None,), (None,)), ...).
ENDLESS = b"\x80\x02}" + b"N\x85" + b"2\x86" * 200 + b"K\x01s."


PICKLES = {
    "a call": pickle.dumps({b"data": Harm()}),
    "a call by protocol 0": b"cos\nsystem\n(S'touch ran'\ntR.",
    "a class": pickle.dumps({b"data": Path("x")}),
    "an extension": b"\x80\x02\x82\x01.",
    "cut short": pickle.dumps({b"label_names": [b"cat"]})[:-5],
    "empty": b"",
    "noise": b"\xff" * 99,
    "a list": pickle.dumps([1]),
    "a set": pickle.dumps({b"label_names": {1}}),
    "a memo of 2 GB": b"\x80\x02}r\xff\xff\xff\x7f.",
    "bytes of an exabyte": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x.",
    "a key without end": ENDLESS,
    "a number of 5,000 digits": b"I" + b"9" * 5000 + b"\n.",
    "names that are numbers": pickle.dumps({b"label_names": [1, 2]}),
    "no names": pickle.dumps({}),
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle_is_read_or_named_and_does_nothing(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    (root / "batches.meta").write_bytes(PICKLES[what])
    start = time.process_time()
    with pytest.raises(BrokenFile, match="batches.meta"):
        Cifar(tmp_path)
    assert time.process_time() - start < 5 and not Path("ran").exists()


BATCHES = {
    "pictures of another size": {b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 0]},
    "pictures of floats": {b"data": np.zeros((2, 3072)), b"labels": [0, 0]},
    "pictures of objects": {b"data": np.zeros((2, 3072), object), b"labels": [0, 0]},
    "one label": {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]},
    "a label beyond": {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]},
    "a label of text": {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, "0"]},
    "no labels": {b"data": np.zeros((2, 3072), np.uint8)},
    "no pictures": {b"data": [1], b"labels": [0]},
}


@pytest.mark.parametrize("what", BATCHES)
def test_cifar_of_other_shapes_is_named(what, elsewhere):
    path = elsewhere / "cifar-10-batches-py" / "test_batch"
    assert Cifar(elsewhere).classes == ["cat"]
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps(BATCHES[what], protocol=protocol))
        with pytest.raises(BrokenFile, match="test_batch"):
            Cifar(elsewhere)


def test_tars_of_tasks_that_are_broken_are_named(elsewhere):
    tar = elsewhere / "class.tar"
    good = tar.read_bytes()
    for raw in (b"noise" * 999, good[:560], b"", good[:512].replace(b"x", b"y")):
        tar.write_bytes(raw)
        with pytest.raises(ValueError, match="class.tar"):
            ClassTar(tar)
    bench = elsewhere / "bench"
    tar = bench / "test" / "0.tar"
    good = tar.read_bytes()
    for members, wrong in (
        ({"a.png": b"x", "a.cls": b"first"}, "sample a is no whole number"),
        ({"a.png": b"x", "a.cls": b"9" * 5000}, "sample a is no whole number"),
        ({"a.png": b"x", "a.txt": b"caf\xe9"}, "a.txt is not UTF-8"),
        ({"a.png": b"x", "a.txt": b"x" * 2_000_000}, "a.txt has 2000000 bytes"),
        ({"a.cls": b"0"}, "missing_image"),
    ):
        write_tar(tar, members)
        with pytest.raises(ValueError, match=wrong) as raised:
            ClipBenchmark(bench)
        assert str(bench) in str(raised.value)
    tar.write_bytes(good[:560])
    with pytest.raises(BrokenFile, match="0.tar"):
        ClipBenchmark(bench)
    tar.write_bytes(good)
    for said in ("one", "", "9" * 5000, "1e3"):
        (bench / "test" / "nshards.txt").write_text(said)
        with pytest.raises(BrokenFile, match="nshards.txt holds no number"):
            ClipBenchmark(bench)


def test_sentence_files_that_are_broken_name_file_and_line(tmp_path):
    year = tmp_path / "STS" / "STS12-en-test"
    year.mkdir(parents=True)
    (year / "STS.input.x.txt").write_text("a\tb\nno tab\n")
    gold = year / "STS.gs.x.txt"
    for text, wrong in (("1\n2\n", r"input\.x\.txt, line 2"), ("1\nx\n", r"line 2"), ("nan\n\n", r"gs\.x\.txt, line 1"),
                        ("1e999\n\n", r"gs\.x\.txt, line 1")):  # fmt: skip
        gold.write_text(text)
        with pytest.raises(BrokenFile, match=wrong):
            find_sets(tmp_path)["STS12"]()
    gold.unlink()
    with pytest.raises(ValueError, match=r"gs\.x\.txt cannot be read: No such file"):
        find_sets(tmp_path)["STS12"]()
    os.mkfifo(gold)
    with pytest.raises(BrokenFile, match="not a regular file"):
        find_sets(tmp_path)["STS12"]()
    path = tmp_path / "file"
    for read, text, wrong in (
        (read_sst2, "a\t1\nb\t2\n", "file, line 2: the label is neither"),
        (read_sst2, "a\t1\nno tab\n", "file, line 2"),
        (read_sst2, "\n", "file has no rows"),
        (read_mrpc, "header\n1\ta\tb\tc\n", "file, line 2: 4 columns"),
        (read_mrpc, "header\nx\ta\tb\tc\td\n", "file, line 2: the label"),
    ):
        path.write_text(text)
        with pytest.raises(BrokenFile, match=wrong):
            read(path)
    (tmp_path / "TREC").mkdir()
    (tmp_path / "TREC" / "train_5500.label").write_text("NUM:x how far\n")
    for text in ("LOC:y where\n", "NUM\n", "no class\n"):
        (tmp_path / "TREC" / "TREC_10.label").write_text(text)
        with pytest.raises(BrokenFile, match="TREC_10.label, line 1"):
            read_trec(tmp_path)
