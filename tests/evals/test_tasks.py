"""`evaluate` on generated shards: one pass a data set, the same numbers on any number of ranks, errors that
name the cause.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from clipkit.data import write_shapes
from clipkit.evals import create_tasks, evaluate, list_tasks, register_task
from tests.processes import launch

# Spawned ranks import the cases by name, and inherit sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import eval_cases
from eval_cases import TinyModel, tokenize


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, list[str]]:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=8, val=30, seed=3)


@pytest.fixture
def tasks(shards) -> dict:
    return {
        "retrieval": {"kind": "retrieval", "shards": shards["val"]},
        "geometry": {"kind": "geometry", "shards": shards["val"]},
        "zero_shot": {
            "kind": "zero_shot",
            "shards": shards["zeroshot"],
            "classes": "shapes",
            "templates": "shapes",
        },
    }


def run(tasks, model=None):
    return evaluate(model or TinyModel(), tokenize, tasks, batch_size=8)


def image_bytes(colour: int) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (colour, 255 - colour, 128)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_a_data_set_is_encoded_once_for_all_its_tasks(tasks):
    model = TinyModel()
    results = run(tasks, model)
    assert model.encoded == 30 + 64
    assert set(results) == set(tasks)
    assert set(results["zero_shot"]) == {"top1", "top5", "mean_per_class"}
    # One image a class: the mean over classes is the mean over images.
    assert results["zero_shot"]["mean_per_class"] == pytest.approx(results["zero_shot"]["top1"])


def test_any_number_of_ranks_gives_the_same_numbers(tasks, tmp_path):
    (tmp_path / "class").mkdir()
    for name, data in (("a", image_bytes(0)), ("b", image_bytes(1)), ("c", b"broken")):
        (tmp_path / "class" / f"{name}.png").write_bytes(data)
    expected = eval_cases.rank_metrics(tasks, str(tmp_path))
    assert "1 of 3 samples are bad by corrupt_image" in expected[4] and "key 'class/c.png'" in expected[4]
    for world in (2, 4):
        ranks = launch(eval_cases.rank_metrics, world, tasks, str(tmp_path))
        # Image c is read by rank 0 of 2 and by rank 2 of 4; all come to the same end.
        assert all(found[4] == expected[4] for found in ranks)
        for found in ranks:
            # Ranks are counted in integers; only sums of floats may differ in their last digits.
            assert found[0] == expected[0]
            assert found[1] == pytest.approx(expected[1], abs=1e-12)
            for name in tasks:
                assert found[2][name] == pytest.approx(expected[2][name], abs=1e-6), name
            assert torch.allclose(torch.tensor(found[3]), torch.tensor(expected[3]), atol=1e-6)


def test_evaluation_draws_no_random_number_and_restores_training_mode(tasks):
    model = TinyModel().train()
    before = torch.get_rng_state()
    run(tasks, model)
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_a_task_set_to_null_is_left_out(tasks):
    assert list(run({**tasks, "zero_shot": None, "geometry": None})) == ["retrieval"]


def test_registered_names_are_listed_and_taken_once():
    kinds = {
        "retrieval",
        "zero_shot",
        "geometry",
        "linear_probe",
        "consistency",
        "compositional",
        "sts",
        "senteval",
    }
    assert kinds <= set(list_tasks())
    with pytest.raises(ValueError, match="'sts' is taken"):
        register_task("sts")(object)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "retreival"}, "unknown evaluation task 'retreival'. Did you mean 'retrieval'"),
        ({"kind": None}, "unknown evaluation task None"),
        ({"shard": "x"}, "unknown setting of evaluation 'a' .zero_shot. 'shard'. Did you mean 'shards'"),
        ({"templates": None}, "evaluation 'a': zero-shot classification needs templates"),
        ({"templates": []}, "needs templates"),
        ({"templates": ["a photo"]}, "template 'a photo' has no place for the class"),
        ({"templates": "imagnet"}, "unknown templates 'imagnet'. Did you mean 'imagenet'"),
        ({"classes": None}, "needs `classes`"),
        ({"classes": "shape"}, "unknown class list 'shape'. Did you mean 'shapes'"),
        ({"classes": ["cat", " "]}, "class 1 of the list is empty"),
        ({"classes": []}, "the class list .* is empty"),
        ({"shards": None}, "needs exactly one of shards, clip_benchmark, folder, tar, cifar; got none"),
        ({"folder": "there"}, "got shards, folder"),
        ({"shards": "nowhere/*.tar"}, "evaluation 'a': shards: no file matches 'nowhere/"),
    ],
)
def test_a_wrong_spec_is_refused_before_anything_is_read(tasks, change, message):
    spec = {**tasks["zero_shot"], **change}
    with pytest.raises(ValueError, match=message):
        create_tasks(
            {
                "a": {
                    key: value
                    for key, value in spec.items()
                    if value is not None or key in ("kind", "templates")
                }
            }
        )


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match=r"'p' \(linear_probe\) needs train, test"):
        create_tasks({"p": {"kind": "linear_probe"}})
    with pytest.raises(ValueError, match="'p' needs a `kind`"):
        create_tasks({"p": {"shards": "x"}})


def test_an_image_without_caption_is_named(tmp_path):
    path = write_tar(
        tmp_path / "0.tar",
        {
            "a.png": image_bytes(0),
            "a.txt": b"a thing",
            "a.json": b"{}",
            "b.png": image_bytes(9),
            "b.txt": b" ",
            "b.json": json.dumps({"caption": ""}).encode(),
        },
    )
    with pytest.raises(
        RuntimeError, match="1 of 2 samples are bad by empty_caption .* key 'b' of shard .*0.tar"
    ):
        run({"r": {"kind": "retrieval", "shards": path}})


def test_an_image_without_class_is_named(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"a.png": image_bytes(0), "a.txt": b"a thing", "a.json": b"{}"})
    with pytest.raises(ValueError, match="image '.*a' has no class id"):
        run({"z": {"kind": "zero_shot", "shards": path, "classes": ["x", "y"], "templates": ["{}"]}})


def test_a_label_outside_the_classes_is_named(shards):
    with pytest.raises(ValueError, match="has label 2, but there are 2 classes"):
        run(
            {
                "z": {
                    "kind": "zero_shot",
                    "shards": shards["zeroshot"],
                    "classes": ["x", "y"],
                    "templates": ["{}"],
                }
            }
        )


@pytest.mark.parametrize("tower", ["pixels", "characters"])
def test_a_diverged_model_is_named(tasks, tower):
    model = TinyModel()
    with torch.no_grad():
        getattr(model, tower)[ord(" "), 0] = float("nan")
    name = {"pixels": "image_features of shards", "characters": "text_features"}[tower]
    with pytest.raises(ValueError, match=f"{name}.* has non-finite values in .* of .* rows"):
        run(tasks, model)


def test_a_text_only_model_is_refused_for_images(tasks):
    class TextOnly(torch.nn.Module):
        encode_text = TinyModel.encode_text

    with pytest.raises(ValueError, match="TextOnly encodes text only"):
        run(tasks, TextOnly())


def test_image_folders_and_their_empty_class(tmp_path):
    for name, colour in (("red", 250), ("green", 3)):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.png").write_bytes(image_bytes(colour))
    spec = {"kind": "zero_shot", "folder": str(tmp_path), "templates": ["{}"]}
    task = create_tasks({"z": spec})["z"]
    assert task.data.classes == ["green", "red"]
    assert [label for _, label, _ in task.data.source.items] == [0, 0, 0, 1, 1, 1]
    assert set(run({"z": spec})["z"].values()) <= {i / 6 for i in range(7)}
    (tmp_path / "blue").mkdir()
    with pytest.raises(ValueError, match="class 'blue' is empty"):
        create_tasks({"z": spec})
    (tmp_path / "blue").rmdir()
    with pytest.raises(ValueError, match="folder 'red' is none of the 2 classes. Did you mean 'reds'"):
        create_tasks({"z": {**spec, "classes": ["green", "reds"]}})


def test_only_present_classes_compete_when_asked(tmp_path):
    """Two of five classes have images: guessing among them is 1/2, top-5 is certain."""
    for name in ("b", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(image_bytes(9))

    class Constant(TinyModel):
        def encode_image(self, image):
            return torch.ones(len(image), 16) / 4

        def encode_text(self, tokens):
            return torch.ones(len(tokens), 16) / 4

    spec = {"kind": "zero_shot", "folder": str(tmp_path), "classes": list("abcdefg"), "templates": ["{}"]}
    assert run({"z": spec}, Constant())["z"] == pytest.approx(
        {"top1": 1 / 7, "top5": 5 / 7, "mean_per_class": 1 / 7}
    )
    assert run({"z": {**spec, "present_only": True}}, Constant())["z"] == pytest.approx(
        {"top1": 1 / 2, "top5": 1.0, "mean_per_class": 1 / 2}
    )


def test_cifar_as_torchvision_keeps_it(tmp_path):
    import pickle

    import numpy as np

    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    pixels = np.arange(4 * 3072, dtype=np.int64).reshape(4, 3072).astype(np.uint8)
    (root / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"aquarium_fish"]}))
    (root / "test_batch").write_bytes(pickle.dumps({b"data": pixels, b"labels": [1, 0, 0, 1]}, protocol=2))
    spec = {"kind": "zero_shot", "cifar": str(tmp_path), "templates": ["{}"]}
    task = create_tasks({"z": spec})["z"]
    assert task.data.classes == ["cat", "aquarium fish"]
    _, batch = next(task.data.source.batches(32, 4))
    source = task.data.source
    assert [source.label(key, {}) for key in batch["keys"]] == [1, 0, 0, 1]
    assert torch.equal(batch["image"], torch.from_numpy(pixels.reshape(4, 3, 32, 32)))
    assert set(run({"z": spec})["z"].values()) <= {i / 4 for i in range(5)}
    (root / "test_batch").write_bytes(pickle.dumps({b"data": print, b"labels": []}))
    with pytest.raises(ValueError, match="holds .*print, which is no array"):
        create_tasks({"z": spec})
    with pytest.raises(ValueError, match="splits test and train"):
        create_tasks({"z": {**spec, "split": "val"}})


def test_clip_benchmarks_layout(tmp_path):
    """What CLIP_benchmark's webdataset converter writes: N.tar of sXXXXXXX.webp/.cls, names and templates
    beside.
    """
    for shard in range(2):
        write_tar(
            tmp_path / "test" / f"{shard}.tar",
            {
                f"s{i:07d}.{end}": image_bytes(40 * i) if end == "png" else str(i % 2).encode()
                for i in range(3 * shard, 3 * shard + 3)
                for end in ("cls", "png")
            },
        )
    (tmp_path / "test" / "nshards.txt").write_text("2\n")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c}.\n")
    spec = {"kind": "zero_shot", "clip_benchmark": str(tmp_path)}
    task = create_tasks({"z": spec})["z"]
    assert task.data.classes == ["cat", "dog"]
    assert [make("cat") for make in task.templates] == ["a cat.", "the cat."]
    assert [label for _, label, _ in task.data.source.items] == [0, 1, 0, 1, 0, 1]
    assert set(run({"z": spec})["z"].values()) <= {i / 6 for i in range(7)}
    with pytest.raises(ValueError, match="split train holds no tar; splits found: test"):
        create_tasks({"z": {**spec, "split": "train"}})
    (tmp_path / "test" / "nshards.txt").write_text("3\n")
    with pytest.raises(ValueError, match="nshards.txt says 3, found 2 tars"):
        create_tasks({"z": spec})


def test_clip_benchmarks_retrieval_layout(tmp_path):
    write_tar(
        tmp_path / "test" / "0.tar",
        {
            f"s{i}.{end}": image_bytes(70 * i) if end == "png" else f"first {i}\nsecond {i}\n".encode()
            for i in range(3)
            for end in ("png", "txt")
        },
    )
    task = create_tasks({"r": {"kind": "retrieval", "clip_benchmark": str(tmp_path)}})["r"]
    assert [captions for _, _, captions in task.source.items] == [
        [f"first {i}", f"second {i}"] for i in range(3)
    ]
    assert (
        run({"r": {"kind": "retrieval", "clip_benchmark": str(tmp_path)}})["r"]["image_to_text_R@10"] == 1.0
    )


def test_sugarcrepe_counts_the_preferred_captions(tmp_path):
    """Two pairs of which one is right, a tie, and an image that is missing."""
    from clipkit.evals.compositional import choice_metrics

    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    right = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    wrong = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.6, -0.8], [0.6, 0.8]])
    found = choice_metrics(images, right, wrong, ["swap", "swap", "add", "add"])
    assert found == pytest.approx({"swap": 0.5, "add": 0.75, "average": 0.625, "all": 0.625})
    tar = write_tar(tmp_path / "0.tar", {"a.png": image_bytes(0), "a.txt": b"a thing", "a.json": b"{}"})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"key": "z", "caption": "x", "negative_caption": "y", "task": "add"}) + "\n")
    spec = {"kind": "compositional", "shards": tar, "pairs": str(pairs)}
    with pytest.raises(ValueError, match="image 'z' of a pair is not among"):
        run({"c": spec})
    pairs.write_text(json.dumps({"key": "z", "caption": "x", "task": "add"}) + "\n")
    with pytest.raises(ValueError, match="pairs.jsonl, line 1 lacks negative_caption"):
        create_tasks({"c": spec})
