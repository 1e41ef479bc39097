"""Broken items of an evaluation set: left out on every rank alike, counted, said, and an error when they are many."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipkit.evals import create_tasks, evaluate
from tests.processes import launch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import eval_cases
from eval_cases import TinyModel, tokenize
from test_tasks import image_bytes, write_tar

BROKEN = {"cut": "corrupt_image", "json": "broken_json", "blank": "empty_caption", "none": "missing_image"}
LABELS = ([], 1e999, "x", {"a": 1}, True, "9" * 5000)


def samples(labels=(), broken=BROKEN, count=130) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    places = {5 + 20 * i: name for i, name in enumerate(broken)}
    for i in range(count):
        label = labels[i // 7] if i % 7 == 3 and i // 7 < len(labels) else i % 3
        members[f"{i:03d}.png"] = image_bytes(i)
        members[f"{i:03d}.json"] = json.dumps(
            {
                "captions": [f"{word} picture {i}" for word in ("one", "two", "three", "four", "five")],
                "cls": label,
            }
        ).encode()
        name = places.get(i)
        if name == "cut":
            members[f"{i:03d}.png"] = members[f"{i:03d}.png"][:60]
        elif name == "json":
            members[f"{i:03d}.json"] = b'{"captions": ["a'
        elif name == "blank":
            members[f"{i:03d}.json"] = b'{"caption": "  "}'
        elif name == "none":
            del members[f"{i:03d}.png"]
    return members


def without(members: dict[str, bytes], keys: set[str]) -> dict[str, bytes]:
    return {name: data for name, data in members.items() if name.partition(".")[0] not in keys}


def run(tasks, model=None):
    return evaluate(model or TinyModel(), tokenize, tasks, batch_size=8)


def zero_shot(shards: str) -> dict:
    return {"kind": "zero_shot", "shards": shards, "classes": ["a", "b", "c"], "templates": ["{}"]}


def test_metrics_are_those_of_the_set_without_the_broken_items(tmp_path, capfd):
    members = samples()
    broken = write_tar(tmp_path / "broken.tar", members)
    rest = write_tar(tmp_path / "rest.tar", without(members, {"005", "025", "045", "065"}))
    tasks = {
        "r": {"kind": "retrieval"},
        "g": {"kind": "geometry"},
        "z": zero_shot(""),
    }
    found = run({name: {**task, "shards": broken} for name, task in tasks.items()})
    said = capfd.readouterr().err
    expected = run({name: {**task, "shards": rest} for name, task in tasks.items()})
    assert capfd.readouterr().err == "" and not any("skipped" in metrics for metrics in expected.values())
    for name, metrics in expected.items():
        assert found[name] == {**metrics, "skipped": 4}
    assert said.count("\n") == 1 and "4 of 130 items of shards" in said
    assert "broken.tar" in said and all(f"1 by {cause}" in said for cause in BROKEN.values())


def test_a_class_id_that_is_no_number_concerns_labelled_tasks_alone(tmp_path, capfd):
    path = write_tar(tmp_path / "0.tar", samples(LABELS, broken=()))
    rest = {f"{7 * i + 3:03d}" for i in range(len(LABELS))}
    expected = run({"z": zero_shot(write_tar(tmp_path / "1.tar", without(samples(broken=()), rest)))})
    model = TinyModel()
    found = run({"r": {"kind": "retrieval", "shards": path}, "z": zero_shot(path)}, model)
    assert found["z"] == {**expected["z"], "skipped": len(LABELS)} and "skipped" not in found["r"]
    assert model.encoded == 130, "one pass for both"
    assert f"{len(LABELS)} by broken_label" in capfd.readouterr().err


@pytest.mark.parametrize(
    "label, cause",
    [
        (2.0, None),
        ("2", None),
        (" 2\n", None),
        ("2.5", "broken"),
        (2.5, "broken"),
        (10**30, "broken"),
        (False, "broken"),
    ],
)
def test_what_is_a_class_id(label, cause):
    from clipkit.evals.items import class_id

    assert class_id(label) == 2 if cause is None else class_id(label).cause == "broken_label"


def test_all_ranks_agree_and_only_the_first_says_so(tmp_path, capfd):
    path = write_tar(tmp_path / "0.tar", samples(LABELS))
    tasks = {"r": {"kind": "retrieval", "shards": path}, "z": zero_shot(path)}
    expected = run(tasks)
    assert expected["r"]["skipped"] == 4 and expected["z"]["skipped"] == 10
    lines = capfd.readouterr().err.splitlines()
    for world in (2, 4):
        for found in launch(eval_cases.skipped_metrics, world, tasks):
            for name, metrics in expected.items():
                assert found[name] == pytest.approx(metrics, abs=1e-6)
    assert len(lines) == 2 and "corrupt_image" in lines[0] and "6 by broken_label" in lines[1]


@pytest.mark.parametrize("name", BROKEN)
def test_too_many_by_one_cause_are_an_error_that_names_shard_and_key(tmp_path, name):
    path = write_tar(tmp_path / "0.tar", samples(broken=[name] * 6, count=110))
    with pytest.raises(
        RuntimeError, match=rf"6 of 110 samples are bad by {BROKEN[name]} .* key '\d+' of shard .*0\.tar"
    ):
        run({"r": {"kind": "retrieval", "shards": path}})


def test_a_set_of_which_nothing_is_left_says_why(tmp_path):
    path = write_tar(tmp_path / "0.tar", {f"{i}.{end}": b"x" for i in range(3) for end in ("png", "txt")})
    with pytest.raises(RuntimeError, match="3 of 3 samples are bad by corrupt_image"):
        run({"r": {"kind": "retrieval", "shards": path}})


def test_folders_leave_out_what_is_no_image_and_open_nothing_that_blocks(tmp_path):
    for i in range(120):
        folder = tmp_path / "set" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.png").write_bytes(image_bytes(i))
    spec = {"kind": "zero_shot", "folder": str(tmp_path / "set"), "templates": ["{}"]}
    expected = run({"z": spec})["z"]
    os.mkfifo(tmp_path / "set" / "a" / "x.png")
    (tmp_path / "set" / "b" / "y.png").symlink_to("/dev/zero")
    (tmp_path / "set" / "b" / "z.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set" / "b" / "zz.png").write_bytes(b"\x89PNG")
    Image.new("L", (20_000, 10_000)).save(tmp_path / "set" / "a" / "huge.png")
    assert run({"z": spec})["z"] == {**expected, "skipped": 5}


def test_pairs_of_a_picture_that_cannot_be_read_are_left_out(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(40):
        (tmp_path / "images" / f"{i}.png").write_bytes(image_bytes(i) if i != 7 else b"x")
    rows = [
        {"filename": f"{i % 40}.png", "caption": f"a{i}", "negative_caption": f"b{i}", "task": "add"}
        for i in range(80)
    ]
    pairs = tmp_path / "pairs.jsonl"
    spec = {"kind": "compositional", "folder": str(tmp_path / "images"), "pairs": str(pairs)}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows if row["filename"] != "7.png"))
    expected = run({"c": spec})["c"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run({"c": spec})["c"] == {**expected, "skipped": 1}
    pairs.write_text(json.dumps({**rows[0], "filename": "../pairs.jsonl"}))
    with pytest.raises(ValueError, match="which is no image in"):
        create_tasks({"c": spec})


def test_a_retrieval_set_leaves_out_the_image_without_caption(tmp_path):
    def members(missing: bool) -> dict[str, bytes]:
        out = {}
        for i in range(40):
            if i == 9 and not missing:
                continue
            out[f"s{i}.png"] = image_bytes(6 * i)
            if i != 9:
                out[f"s{i}.txt"] = "".join(f"{word} {i}\n" for word in ("a", "b", "c", "d", "e")).encode()
        return out

    found = []
    for name, missing in (("whole", False), ("gap", True)):
        write_tar(tmp_path / name / "test" / "0.tar", members(missing))
        found.append(run({"r": {"kind": "retrieval", "clip_benchmark": str(tmp_path / name)}})["r"])
    assert found[1] == {**found[0], "skipped": 1}


def test_both_sets_of_a_probe_are_counted(tmp_path):
    def tar(name: str, keys: list[int], broken: int) -> str:
        members = {f"x/{'ab'[i % 2]}/{i:03d}.png": image_bytes(200 * (i % 2) + i % 40) for i in keys}
        members |= {f"x/a/bad{i}.png": b"x" for i in range(broken)}
        return write_tar(tmp_path / name, members)

    spec = {
        "kind": "linear_probe",
        "train": {"tar": tar("train.tar", list(range(60)), 2)},
        "test": {"tar": tar("test.tar", list(range(40)), 1)},
    }
    assert run({"p": spec})["p"]["skipped"] == 3
    assert torch.is_grad_enabled()
