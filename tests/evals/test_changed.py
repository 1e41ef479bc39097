"""Evaluation sets that changed since they were listed, or that two tasks see in two ways: no picture gets another's label."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from clipkit.evals import evaluate
from clipkit.evals.sources import ClassTar, ClipBenchmark

sys.path.insert(0, str(Path(__file__).resolve().parent))
from eval_cases import TinyModel, tokenize
from test_tasks import image_bytes, write_tar

SHADES = {"dark": 10, "light": 200}


def picture(shade: int) -> bytes:
    """As many bytes whatever the shade."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(out, "BMP")
    return out.getvalue()


def class_tar(path: Path, shades=SHADES, order=("dark", "light")) -> ClassTar:
    write_tar(path, {f"all/{name}/{i}.bmp": picture(shades[name]) for i in range(2) for name in order})
    return ClassTar(path)


def clip_benchmark(path: Path, shades=SHADES, order=("dark", "light")) -> ClipBenchmark:
    members = {}
    for number, name in enumerate(order):
        members |= {f"{number}.bmp": picture(shades[name]), f"{number}.cls": b"%d" % (name == "light")}
    write_tar(path.parent / "test" / "0.tar", members)
    return ClipBenchmark(path.parent)


def seen(source) -> tuple[list[tuple[int, int]], set[str]]:
    """(label, shade) of what is read, and the causes of what is not."""
    pairs, causes = [], set()
    for _, batch in source.batches(8, 4):
        labels = map(source.label, batch["keys"], batch["meta"])
        pairs += zip(labels, batch["image"][:, 0, 0, 0].tolist(), strict=True)
        causes |= {fault.cause for fault in batch["faults"]}
    return pairs, causes


@pytest.mark.parametrize("make", [class_tar, clip_benchmark])
@pytest.mark.parametrize("how", ["touched", "other order", "other pictures", "cut"])
def test_a_tar_that_changed_gives_no_picture_under_anothers_label(make, how, tmp_path):
    source = make(tmp_path / "a.tar")
    (path,) = tmp_path.rglob("*.tar")
    before = path.stat()
    expected = [(0, 10), (1, 200)] if make is clip_benchmark else [(0, 10), (0, 10), (1, 200), (1, 200)]
    assert seen(source) == (expected, set())
    if how == "other order":
        make(tmp_path / "a.tar", order=("light", "dark"))
    elif how == "other pictures":
        # Every header is what it was.
        make(tmp_path / "a.tar", shades={"dark": 200, "light": 10})
        assert path.stat().st_size == before.st_size
    elif how == "cut":
        os.truncate(path, 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert seen(source) == ((expected, set()) if how == "touched" else ([], {"changed_shard"}))


def test_a_key_that_comes_twice_in_a_tar_is_counted_and_its_first_picture_used(tmp_path):
    (tmp_path / "test").mkdir()
    raw = b""
    for shade, label in ((10, b"0"), (200, b"1")):
        write_tar(tmp_path / "part.tar", {"0.bmp": picture(shade), "0.cls": label})
        raw += (tmp_path / "part.tar").read_bytes()
    for i in range(1, 60):
        write_tar(tmp_path / "part.tar", {f"{i}.bmp": picture(i), f"{i}.cls": b"1"})
        raw += (tmp_path / "part.tar").read_bytes()
    (tmp_path / "test" / "0.tar").write_bytes(raw)
    pairs, causes = seen(source := ClipBenchmark(tmp_path))
    assert pairs[0] == (0, 10) and len(pairs) == 60 and causes == {"duplicate_key"}
    assert [fault.key for fault in source.lost] == ["0.tar/0", "0.tar/0"]


def run(**tasks) -> dict:
    return evaluate(TinyModel(), tokenize, tasks, batch_size=8)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_tasks_that_name_a_sets_classes_in_two_orders_score_as_each_does_alone(kind, tmp_path):
    names = ["ant", "bee", "cat", "dog", "eel"]
    pictures = {
        f"{name}/{i}.png": image_bytes(40 * n + 7 * i) for n, name in enumerate(names) for i in range(3)
    }
    if kind == "tar":
        place = write_tar(tmp_path / "a.tar", {f"all/{name}": raw for name, raw in pictures.items()})
    else:
        place = str(tmp_path / "a")
        for name, raw in pictures.items():
            (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / name).write_bytes(raw)
    orders = {
        "sorted": None,
        "turned": names[::-1],
        "more": ["zebra", *names],
        "moved": [*names[1:], names[0]],
    }
    tasks = {
        name: {"kind": "zero_shot", kind: place, "templates": ["a {}"]}
        | ({"classes": order} if order else {})
        for name, order in orders.items()
    }
    alone = {name: run(**{name: task})[name] for name, task in tasks.items()}
    assert run(**tasks) == alone
    # The order of the classes means nothing to a score.
    assert alone["turned"] == alone["sorted"] == alone["moved"]


def test_pairs_about_other_pictures_of_a_folder_are_scored_on_their_own(tmp_path):
    tasks = {}
    for start in (0, 4):
        rows = []
        for i in range(start, start + 4):
            (tmp_path / f"{i}.png").write_bytes(image_bytes(20 * i))
            rows.append(
                {"filename": f"{i}.png", "caption": f"a{i}", "negative_caption": f"b{i}", "task": "add"}
            )
        pairs = tmp_path / f"{start}.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks[f"from {start}"] = {"kind": "compositional", "folder": str(tmp_path), "pairs": str(pairs)}
    assert run(**tasks) == {name: run(**{name: task})[name] for name, task in tasks.items()}


def test_a_pair_about_a_key_that_several_pictures_have_is_refused(tmp_path):
    for shard in range(2):
        members = {}
        for key in ("0", f"only{shard}"):
            members |= {f"{key}.png": image_bytes(90 * shard), f"{key}.txt": b"a"}
        write_tar(tmp_path / f"{shard}.tar", members)
    for key in ("only0", "0"):
        row = {"key": key, "caption": "a", "negative_caption": "b", "task": "add"}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
        task = {
            "kind": "compositional",
            "shards": f"{tmp_path}/*.tar",
            "pairs": str(tmp_path / "pairs.jsonl"),
        }
        if key == "0":
            with pytest.raises(ValueError, match="image '0', and several images have that key"):
                run(c=task)
        else:
            assert 0 <= run(c=task)["c"]["add"] <= 1
