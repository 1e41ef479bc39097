"""Zero-shot classification equals open_clip's own code with open_clip's own model class, on real photographs."""

from __future__ import annotations

import csv
import io
import tarfile

import pytest
import torch

from clipkit.evals import Encoder, create_tasks, load_any, zero_shot_classifier, zero_shot_logits
from clipkit.evals.models import OpenCLIP
from clipkit.registry import suggest

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    clip = open_clip.model.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        text_cfg={"context_length": 24, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    # open_clip's start value of 0 for the class token and small scales hide differences between images.
    with torch.no_grad():
        for parameter in clip.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=24)


def peer(model, tokenizer, tar, rows, classnames, templates):
    """open_clip's transform and classifier, and its training script's top-k; `rows` are (member, label)."""
    from PIL import Image

    transform = open_clip.image_transform(
        32, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, classnames, templates)
    with tarfile.open(tar) as archive:
        images = [transform(Image.open(io.BytesIO(archive.extractfile(name).read()))) for name, _ in rows]
    with torch.no_grad():
        features = torch.cat(
            [model.encode_image(part, normalize=True) for part in torch.stack(images).split(64)]
        )
    logits = 100.0 * features @ classifier
    hit = logits.topk(5, dim=1).indices == torch.tensor([label for _, label in rows])[:, None]
    return logits, float(hit[:, 0].double().mean()), float(hit.any(1).double().mean())


@pytest.mark.parametrize(
    ("folder", "tar", "labels", "classes", "templates"),
    [
        ("cifar10-mini", "test.tar", "test_labels.csv", "classes.txt", "imagenet"),
        ("flowers-mini", "test.tar", "test_labels.csv", "classes.txt", "imagenet_simple"),
        ("imagenet1k-samples", "images.tar", "images_labels.csv", "classes.tsv", "plain"),
    ],
)
def test_same_logits_and_accuracy_as_open_clip(
    test_data, model, tokenizer, folder, tar, labels, classes, templates
):
    root = test_data(folder)
    with open(root / labels, newline="") as file:
        rows = [(row["image"], int(row["label"])) for row in csv.DictReader(file)]
    if classes.endswith(".tsv"):
        with open(root / classes, newline="") as file:
            names = [row["name"] for row in csv.DictReader(file, delimiter="\t")]
    else:
        names = (root / classes).read_text().split("\n")[:-1]
    prompts = {
        "imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES,
        "imagenet_simple": open_clip.SIMPLE_IMAGENET_TEMPLATES,
        "plain": ["a photo of a {}."],
    }[templates]
    logits, top1, top5 = peer(model, tokenizer, root / tar, rows, names, prompts)

    wrapped = OpenCLIP(
        model, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD, image_size=32
    )
    encoder = Encoder(wrapped, tokenizer, batch_size=50)
    task = create_tasks(
        {
            "z": {
                "kind": "zero_shot",
                "tar": str(root / tar),
                "classes": str(root / classes),
                "templates": templates,
            }
        }
    )["z"]
    found = task(encoder)
    assert found["top1"] == pytest.approx(top1, abs=1e-5)
    assert found["top5"] == pytest.approx(top5, abs=1e-5)
    images = encoder.images(task.data.source)
    ours = zero_shot_logits(
        images.image_features, zero_shot_classifier(encoder, task.data.classes, task.templates)
    )
    place = {key: row for row, key in enumerate(images.keys)}
    order = [place[name] for name, _ in rows]
    # Logits are 100 x cosine in float32: 5e-5 is 5e-7 of a cosine.
    assert (ours[order] - logits).abs().max() < 5e-5
    assert [images.labels[i] for i in order] == [label for _, label in rows]
    assert logits.std() > 1e-2


def test_a_named_architecture_loads_with_its_own_tokenizer_and_normalisation():
    torch.manual_seed(0)
    model, tokenizer = load_any("open_clip:RN50")
    assert model.image_tower.image_size == 224
    assert torch.allclose(model.mean.flatten(), torch.tensor(open_clip.OPENAI_DATASET_MEAN))
    tokens = tokenizer(["a cat"])
    with torch.no_grad():
        assert torch.equal(model.encode_text(tokens), model.model.encode_text(tokens, normalize=True))


def test_wrong_models_are_named(tmp_path):
    with pytest.raises(
        ValueError,
        match="unknown open_clip model 'RN5'.*" + suggest("RN5", open_clip.list_models()).strip()[:12],
    ):
        load_any("open_clip:RN5")
    with pytest.raises(
        ValueError, match="no model 'nowhere': give a run or checkpoint folder, open_clip:NAME"
    ):
        load_any("nowhere")
    with pytest.raises(ValueError, match="neither a sentence-transformers folder nor an installed package"):
        load_any("sentence_transformers:no_such_package")
    with pytest.raises(ValueError, match="no modules.json"):
        load_any(f"sentence_transformers:{tmp_path}")
    torch.save({"text_projection": torch.zeros(4, 4)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not fit open_clip's RN50"):
        load_any(f"open_clip:RN50={tmp_path / 'other.pt'}")
