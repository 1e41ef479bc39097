"""Generated shapes: the same bytes from the same seed, a gallery of distinct scenes that training never
saw.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from clipkit.data import SHAPE_CLASSES, SHAPE_TEMPLATES, iter_eval, resolve_data, write_shapes
from clipkit.data.synthetic import _canonical


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "s", train=1200, val=120, seed=3)


def digest(paths):
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


def captions_of(paths):
    out = []
    for path in paths:
        with tarfile.open(path) as tar:
            out += [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    return out


def scene(caption):
    """A two-shape caption as a set of facts that does not depend on which shape is named first."""
    for relation, opposite in (("left of", "right of"), ("above", "below")):
        for name, turned in ((relation, False), (opposite, True)):
            if f" {name} " in caption:
                a, b = caption.split(f" {name} ")
                return (relation, b, a) if turned else (relation, a, b)
    return caption


def test_the_same_seed_gives_the_same_bytes(shapes, tmp_path):
    again = write_shapes(tmp_path / "again", train=1200, val=120, seed=3)
    other = write_shapes(tmp_path / "other", train=1200, val=120, seed=4)
    for name in ("train", "val", "zeroshot"):
        assert digest(shapes[name]) == digest(again[name]) != digest(other[name])


def test_the_gallery_is_distinct_and_held_out(shapes):
    gallery, training = captions_of(shapes["val"]), captions_of(shapes["train"])
    assert len(gallery) == 120 and len(training) == 1200
    scenes = {scene(caption) for caption in gallery}
    assert len(scenes) == 120 and not scenes & {scene(caption) for caption in training}
    short = sum(scene(caption) == caption for caption in training) / len(training)
    assert 0.55 < short < 0.65
    images = (
        next(iter_eval(shapes["val"], image_size=32, batch_size=120))["image"]
        .reshape(120, -1)
        .numpy()
        .astype(float)
    )
    distances = np.abs(images[:, None] - images[None]).mean(-1) + np.eye(120) * 255
    assert distances.min() > 2, "two pictures of the gallery look the same at 32 pixels"


@pytest.mark.parametrize("relation, opposite", [("left of", "right of"), ("above", "below")])
def test_a_scene_is_the_same_named_from_either_shape(relation, opposite):
    a, b = {"cls": 3, "size": "small"}, {"cls": 9, "size": "large"}
    one = {"shapes": [a, b], "relation": relation}
    assert _canonical(one) == _canonical({"shapes": [b, a], "relation": opposite})
    assert _canonical(one) != _canonical({"shapes": [a, b], "relation": opposite})


def test_the_configured_context_holds_every_caption(shapes):
    data = yaml.safe_load((Path(__file__).parents[2] / "conf" / "data" / "shapes.yaml").read_text())
    captions = captions_of(shapes["train"]) + captions_of(shapes["val"])
    captions += [template.format(name) for template in SHAPE_TEMPLATES for name in SHAPE_CLASSES]
    longest = max(len(caption.split()) for caption in captions)
    assert data["tokenizer"]["context_length"] == longest + 2, (
        "every word, the start and the end, and no padding for all"
    )


def test_the_zero_shot_set_has_every_class_equally_often(shapes):
    batches = list(iter_eval(shapes["zeroshot"], image_size=32, batch_size=50))
    classes = Counter(meta["cls"] for batch in batches for meta in batch["meta"])
    assert (
        len(SHAPE_CLASSES) == len(set(SHAPE_CLASSES)) == 64
        and set(classes) == set(range(64))
        and set(classes.values()) == {2}
    )
    for batch in batches:
        for captions, meta in zip(batch["captions"], batch["meta"]):
            assert SHAPE_CLASSES[meta["cls"]] in captions[0]
    assert all(template.count("{}") == 1 for template in SHAPE_TEMPLATES)


def test_shards_are_laid_out_as_img2datasets(shapes):
    with tarfile.open(shapes["train"][0]) as tar:
        names = tar.getnames()
        meta = json.loads(tar.extractfile(names[2]).read())
        image = tar.extractfile(names[0]).read()
    assert names[:3] == ["000000000.jpg", "000000000.txt", "000000000.json"] and len(names) == 3000
    assert (
        meta["sha256"] == hashlib.sha256(image).hexdigest()
        and meta["key"] == "000000000"
        and meta["captions"]
    )


def test_an_interrupted_write_is_done_again_and_a_finished_one_is_left(shapes, tmp_path):
    folder = tmp_path / "s"
    first = write_shapes(folder, train=70, val=10, seed=0)
    stamp = os.stat(first["train"][0]).st_mtime_ns
    assert (
        write_shapes(folder, train=70, val=10, seed=0) == first
        and os.stat(first["train"][0]).st_mtime_ns == stamp
    )
    (folder / "finished.json").unlink()
    Path(first["train"][0]).write_bytes(b"half")
    whole = digest(first["val"])
    again = write_shapes(folder, train=70, val=10, seed=0)
    assert digest(again["val"]) == whole and Path(again["train"][0]).stat().st_size > 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"], "no temporary folder is left"


def test_other_arguments_for_a_folder_in_use_are_refused(tmp_path):
    write_shapes(tmp_path / "s", train=10, val=5, seed=0)
    with pytest.raises(ValueError, match="give another folder"):
        write_shapes(tmp_path / "s", train=11, val=5, seed=0)
    with pytest.raises(ValueError, match="train >= 1"):
        write_shapes(tmp_path / "t", train=0, val=5, seed=0)


def test_settings_resolve_to_generated_shards(tmp_path):
    spec = {"kind": "shapes", "shapes": {"folder": str(tmp_path), "train": 20, "val": 5, "seed": 1}}
    full = resolve_data(spec)
    assert len(full["train"]) == 1 and Path(full["train"][0]).exists()
    assert full["zeroshot"]["classes"] == SHAPE_CLASSES
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        resolve_data({"kind": "shapes", "shapes": {"trian": 3}})


@pytest.mark.parametrize(
    "raw",
    ["", "[" * 99_999, "[1]", '{"shards": 3}', '{"shards": {"train": [3]}}', '{"shards": {"train": ["/etc/passwd"]}}',
     '{"shards": {"../..": ["x"]}}'],
)  # fmt: skip
def test_a_broken_record_of_shapes_is_none(tmp_path, raw):
    expected = write_shapes(tmp_path / "set", train=4, val=4, seed=0)
    (tmp_path / "set" / "finished.json").write_text(raw)
    assert write_shapes(tmp_path / "set", train=4, val=4, seed=0) == expected
    assert "shards" in json.loads((tmp_path / "set" / "finished.json").read_text())


def test_planted_copies_say_the_same_and_their_scene_says_so(shapes, tmp_path):
    planted = write_shapes(tmp_path / "s", train=1200, val=120, seed=3, copies=6)
    assert digest(planted["val"]) == digest(shapes["val"]), "what is scored stays"
    captions, told = captions_of(planted["train"]), []
    for path in planted["train"]:
        with tarfile.open(path) as tar:
            told += [json.load(tar.extractfile(one))["scene"] for one in tar if one.name.endswith(".json")]
    assert len(captions) == len(told) == 1200
    # By the captions alone: two pairs are of one scene exactly where their facts are the same.
    facts = [scene(caption) for caption in captions]
    by_fact, by_scene = {}, {}
    for fact, name in zip(facts, told):
        by_fact.setdefault(fact, set()).add(name)
        by_scene.setdefault(name, set()).add(fact)
    assert all(len(names) == 1 for names in by_fact.values()) and all(
        len(one) == 1 for one in by_scene.values()
    )
    turned = [name for name in by_scene if len({c for c, n in zip(captions, told) if n == name}) == 2]
    assert len(turned) > 50, "scenes of two shapes are told from both"
    images = [hashlib.sha256(image).digest() for image in images_of(planted["train"])]
    assert len(set(images)) > 1190, "each copy is a picture of its own"


def images_of(paths):
    for path in paths:
        with tarfile.open(path) as tar:
            yield from (tar.extractfile(one).read() for one in tar if one.name.endswith(".jpg"))
