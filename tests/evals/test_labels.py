"""Labels belong to a task and go by names: what tasks share is pictures, never whose class they are."""

from __future__ import annotations

import csv
import io
import itertools
import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data import create_tokenizer
from clipkit.evals import create_tasks, evaluate
from clipkit.evals.classes import match_classes, normalised
from clipkit.evals.classification import read_classes
from clipkit.model import create_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
from eval_cases import TinyModel, tokenize
from test_tasks import image_bytes, write_tar

NAMES = ["cat", "polar bear", "dog", "owl"]
COUNT = 24


def noise(i: int) -> bytes:
    """A picture unlike the others, so that no score ties."""
    pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, dict]:
    """The same 24 pictures in every kind of source, their classes under the sorted names or by two keys."""
    root, order = tmp_path_factory.mktemp("sets"), sorted(NAMES)
    shard, classed, bench, rows = {}, {}, {}, []
    for i in range(COUNT):
        name, data = order[(5 * i + i // 7) % 4], noise(i)
        folder = root / "folder" / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.png").write_bytes(data)
        classed[f"all/{name}/{i:02d}.png"] = data
        bench |= {f"s{i:02d}.png": data, f"s{i:02d}.cls": str(order.index(name)).encode()}
        bench |= {f"s{i:02d}.txt": f"picture {i}\nof a {name}".encode()}
        meta = {"caption": f"picture {i}", "fine": NAMES.index(name), "coarse": i % 3}
        shard |= {f"{i:02d}.png": data, f"{i:02d}.json": json.dumps(meta).encode()}
        rows.append((np.asarray(Image.open(io.BytesIO(data))), order.index(name)))
    (root / "cifar-10-batches-py").mkdir()
    batch = {
        b"data": np.stack([pixels.transpose(2, 0, 1).reshape(-1) for pixels, _ in rows]),
        b"labels": [label for _, label in rows],
    }
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"label_names": [name.replace(" ", "_").encode() for name in order]}
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(meta))
    write_tar(root / "bench" / "test" / "0.tar", bench)
    (root / "bench" / "classnames.txt").write_text("\n".join(order) + "\n")
    return {
        "folder": {"folder": str(root / "folder")},
        "tar": {"tar": write_tar(root / "class.tar", classed)},
        "cifar": {"cifar": str(root)},
        "clip_benchmark": {"clip_benchmark": str(root / "bench")},
        "shards": {"shards": write_tar(root / "0.tar", shard)},
    }


def every_task(sets: dict[str, dict], orders: list[list[str]]) -> dict[str, dict]:
    """A task for each source, label key and order of the classes, and the kinds without labels over the same pictures."""
    tasks = {}
    for (kind, source), order in itertools.product(sets.items(), orders):
        # Shards have numbers alone, which index the list that is given.
        keys = [{"label_key": "fine"}, {"label_key": "coarse"}] if kind == "shards" else [{}]
        for key in keys:
            one = {**source, **key}
            classes = {"classes": order, "templates": ["a {}", "the {}"]}
            name = "-".join([kind, *key.values(), *(word[0] for word in order)])
            tasks[f"zero_shot {name}"] = {"kind": "zero_shot", **one, **classes}
            both = {"train": one, "test": one, "classes": order}
            tasks[f"probe {name}"] = {"kind": "linear_probe", **both}
            tasks[f"consistency {name}"] = {"kind": "consistency", **both, "templates": ["a {}"], "k": (1, 3)}
    for kind in ("clip_benchmark", "shards"):
        tasks[f"retrieval {kind}"] = {"kind": "retrieval", **sets[kind]}
        tasks[f"geometry {kind}"] = {"kind": "geometry", **sets[kind]}
    return tasks


def small_words(texts: list[str]) -> torch.Tensor:
    """A vocabulary of three words: most prompts are the same tokens."""
    ids = {"a": 1, "cat": 2, "picture": 3}
    return torch.tensor([[ids.get(word, 9) for word in (text.split() + [""] * 8)[:8]] for text in texts])


def test_what_is_alone_equals_what_is_together(sets):
    tasks = every_task(sets, [NAMES, NAMES[::-1]])
    # A probe's fit takes most of the time: one source stands for all here.
    tasks = {name: task for name, task in tasks.items() if not name.startswith("probe") or "folder" in name}
    for tokenizer in (tokenize, small_words):
        together = evaluate(TinyModel(), tokenizer, tasks, batch_size=7)
        for name, task in tasks.items():
            assert together[name] == evaluate(TinyModel(), tokenizer, {name: task}, batch_size=7)[name], name
    assert len({*(together[name]["top1"] for name in tasks if name.startswith("zero_shot"))}) > 1


@pytest.mark.slow
def test_what_is_alone_equals_what_is_together_over_models_and_tokenizers(sets):
    """Every order of the classes, models and tokenizers of every kind, tasks drawn in random company and order."""
    said = ["a cat and the dog on a picture"] * 3
    words = create_tokenizer({"name": "words", "context_length": 8, "min_count": 1}, captions=said)
    bpe = create_tokenizer({"name": "clip_bpe", "context_length": 12})
    tasks = every_task(sets, [list(order) for order in itertools.permutations(NAMES)])
    draw = random.Random(0)
    for tokenizer in (words, bpe, tokenize):
        if tokenizer is tokenize:
            model = TinyModel()
        else:
            torch.manual_seed(0)
            settings = {
                "embed_dim": 16,
                "image_tower": {
                    "name": "timm",
                    "model": "test_resnet",
                    "image_size": 32,
                    "pretrained": False,
                },
                "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2},
            }
            model = create_model(settings, tokenizer=tokenizer).eval()
        alone = {}
        for _ in range(12):
            company = draw.sample(sorted(tasks), 9)
            together = evaluate(model, tokenizer, {name: tasks[name] for name in company}, batch_size=7)
            for name in company:
                if name not in alone:
                    alone[name] = evaluate(model, tokenizer, {name: tasks[name]}, batch_size=7)[name]
                assert together[name] == alone[name], (name, company)


def test_the_order_of_the_classes_is_no_part_of_a_result(sets):
    """Labels follow names, so that a reversed list of classes changes nothing where the data names its classes."""
    for kind in ("folder", "tar", "cifar", "clip_benchmark"):
        results = [
            evaluate(
                TinyModel(),
                tokenize,
                {"z": {"kind": "zero_shot", **sets[kind], "classes": list(order), "templates": ["a {}"]}},
            )["z"]
            for order in (NAMES, NAMES[::-1], sorted(NAMES), [name.upper() for name in NAMES])
        ]
        if kind != "tar":
            results.pop()
        assert all(found["top1"] == pytest.approx(results[0]["top1"], abs=1e-12) for found in results[:3]), (
            kind
        )


def test_pairs_that_name_other_pictures_of_a_folder_are_another_set(tmp_path):
    """As many pairs about other pictures of the same folder."""
    tasks = {}
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(noise(i))
    for name, first in (("low", 0), ("high", 3)):
        rows = [
            {"filename": f"{i}.png", "caption": f"a{i}", "negative_caption": f"b{i}", "task": "add"}
            for i in range(first, first + 3)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        tasks[name] = {
            "kind": "compositional",
            "folder": str(tmp_path),
            "pairs": str(tmp_path / f"{name}.jsonl"),
        }
    together = evaluate(TinyModel(), tokenize, tasks)
    assert together == {name: evaluate(TinyModel(), tokenize, {name: tasks[name]})[name] for name in tasks}


@pytest.mark.parametrize(
    ("found", "classes", "rows"),
    [
        (["cat", "dog"], ["Dog", "Cat"], [1, 0]),
        (["polar_bear"], ["cat", "Polar Bear"], [1]),
        (["POLAR-BEAR"], ["cat", "polar  bear"], [1]),
        (["jack-o'-lantern"], ["jack o' lantern", "cat"], [0]),
        (["caf\u00e9"], ["cafe", "cafe\u0301"], [1]),
        (["us", "US"], ["US", "us"], [1, 0]),
        (["owl"], ["cat", "dog", "owl"], [2]),
    ],
)
def test_names_are_matched_by_what_they_say(found, classes, rows):
    assert list(match_classes(found, classes, what="folder").values()) == rows


@pytest.mark.parametrize(
    ("found", "classes", "message"),
    [
        (["n001", "n002"], ["cat", "dog"], "'n001' is none of the 2 classes.*same size are not matched"),
        (["0", "1"], ["cat", "dog"], "Give `classes` as a mapping"),
        (["Cat", "cat "], ["cat"], "'Cat' and 'cat ' would both be class 'cat'|would both be class"),
        (["c a t"], ["c-a-t", "c_a_t"], "could be 'c-a-t' .class 0., 'c_a_t' .class 1."),
        (["crane"], ["crane", "crane"], "could be"),
        (["cat"], ["cats", "dog"], "Did you mean 'cats'"),
    ],
)
def test_names_that_say_nothing_are_refused_with_what_to_do(found, classes, message):
    with pytest.raises(ValueError, match=message):
        match_classes(found, classes, what="folder")


def test_two_folders_are_not_swapped(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(image_bytes(9))
    spec = {"kind": "zero_shot", "folder": str(tmp_path), "templates": ["{}"]}

    def items(classes):
        return create_tasks({"z": {**spec, "classes": classes}})["z"].data.source.items

    assert items(["Dog", "Cat"]) == [("cat/a.png", 1, []), ("dog/a.png", 0, [])]
    assert items({"dog": "a big dog", "cat": "a small cat"}) == [("cat/a.png", 1, []), ("dog/a.png", 0, [])]
    (tmp_path / "names.tsv").write_text("folder\tname\ndog\tHund\ncat\tKatze\n")
    assert items(str(tmp_path / "names.tsv")) == [("cat/a.png", 1, []), ("dog/a.png", 0, [])]
    with pytest.raises(ValueError, match="folder 'cat' is none of the 2 classes"):
        items(["Hund", "Katze"])


def test_names_beside_a_clip_benchmark_folder_are_matched_with_the_given_ones(sets):
    spec = {"kind": "zero_shot", **sets["clip_benchmark"], "templates": ["{}"]}
    own = create_tasks({"z": spec})["z"].data
    other = create_tasks({"z": {**spec, "classes": ["Owl", "Dog", "Cat", "Polar bear", "emu"]}})["z"].data
    for (_, a, _), (_, b, _) in zip(own.source.items, other.source.items, strict=True):
        assert normalised(own.classes[a]) == normalised(other.classes[b])
    with pytest.raises(ValueError, match="test: class 'owl' is none of the 4 classes"):
        create_tasks({"z": {**spec, "classes": ["eule", "dog", "cat", "polar bear"]}})


def test_imagenet_s_classes_come_with_their_wnids(test_data):
    """Against the table that the ImageNet samples came with."""
    names, wnids = read_classes("imagenet")
    assert wnids is not None and len(names) == 1000
    with open(test_data("imagenet1k-samples") / "classes.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["wnid"] for row in rows] == wnids
    # The table has the older wording of some names.
    assert sum(row["name"] == name for row, name in zip(rows, names, strict=True)) > 600
