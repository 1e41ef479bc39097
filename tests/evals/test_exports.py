"""Models by every name that an evaluation takes: clipkit's exports, open_clip's folders; their scale, bias and pictures."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipkit.data import create_tokenizer
from clipkit.evals import evaluate, load_any
from clipkit.evals.models import known_preprocessing, load_open_clip, other_library
from clipkit.export import save_open_clip, save_sentence_transformer
from clipkit.model import create_model
from clipkit.predict import Predictor

open_clip = pytest.importorskip("open_clip")
sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_labels import noise
from test_tasks import write_tar

SETTINGS = {
    "embed_dim": 16,
    "image_tower": {
        "name": "clip_vit",
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "layers": 1,
        "heads": 2,
    },
    "text_tower": {"name": "transformer", "width": 32, "layers": 1, "heads": 2},
    "init_logit_scale": 37.0,
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, tokenizer, open_clip's folder, sentence-transformers' folder) of clipkit's own writing."""
    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    tokenizer = create_tokenizer({"name": "clip_bpe", "context_length": 12})
    model = create_model(SETTINGS, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for parameter in model.image_tower.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_sentence_transformer(model, root / "sentences", tokenizer=tokenizer)
    return (
        model,
        tokenizer,
        save_open_clip(model, root / "open=clip", tokenizer=tokenizer),
        root / "sentences",
    )


@pytest.fixture
def photos(tmp_path) -> Path:
    """Long, wide and square pictures, for which resizing by the shorter side, or squashing, differ."""
    for i, size in enumerate([(60, 40), (40, 90), (32, 32)]):
        Image.open(io.BytesIO(noise(i))).resize(size).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture
def tasks(tmp_path) -> dict:
    members = {f"{i}.png": noise(i) for i in range(6)}
    members |= {f"{i}.json": json.dumps({"caption": f"a {i}", "cls": i % 3}).encode() for i in range(6)}
    shards = write_tar(tmp_path / "set.tar", members)
    labelled = {"shards": shards, "classes": ["cat", "dog", "owl"], "templates": ["a {}"]}
    return {"r": {"kind": "retrieval", "shards": shards}, "z": {"kind": "zero_shot", **labelled}}


def test_clipkit_s_exports_are_evaluated_as_the_model_itself(exported, tasks):
    model, tokenizer, folder, sentences = exported
    expected = evaluate(model, tokenizer, tasks)
    for name in (str(folder), f"open_clip:local-dir:{folder}", f"local-dir:{folder}"):
        found = evaluate(*load_any(name), tasks)
        for task, numbers in expected.items():
            assert found[task] == pytest.approx(numbers, abs=1e-6), name
    assert other_library(str(folder)) == f"open_clip:local-dir:{folder}"
    peer, peer_tokenizer = load_any(str(sentences))
    texts = ["a cat", "two dogs on a hill"]
    with torch.no_grad():
        ours, theirs = model.encode_text(tokenizer(texts)), peer.encode_text(peer_tokenizer(texts))
    assert torch.allclose(ours, theirs, atol=1e-5)


def peer_logits(folder: str, photos: Path, labels: list[str]) -> torch.Tensor:
    """open_clip's own model, transform and tokenizer."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([f"a photo of a {label}." for label in labels])
    pictures = torch.stack([transform(Image.open(path)) for path in sorted(photos.glob("*.png"))])
    with torch.no_grad():
        image, text = (
            model.eval().encode_image(pictures, normalize=True),
            model.encode_text(tokens, normalize=True),
        )
        logits = model.logit_scale.exp() * image @ text.T
        return logits if model.logit_bias is None else logits + model.logit_bias


def probabilities(found, labels):
    return torch.tensor([[dict(one)[label] for label in labels] for _, one in found])


LABELS = ["cat", "dog", "red lamp", "bus"]


def test_probabilities_have_the_model_s_own_temperature(exported, photos):
    folder = exported[2]
    wanted = peer_logits(str(folder), photos, LABELS).softmax(1)
    for model in (f"open_clip:local-dir:{folder}", str(folder)):
        found = Predictor(model).classify(photos, LABELS, k=4)
        assert torch.allclose(probabilities(found, LABELS), wanted, atol=2e-5)
    assert not torch.allclose(
        wanted, peer_logits(str(folder), photos, LABELS).mul(100 / 37).softmax(1), atol=1e-3
    )


def test_a_model_with_a_bias_has_sigmoids_and_its_own_resizing(exported, photos, tmp_path_factory):
    """As SigLIP's checkpoints are: logit_bias, pictures squashed, a mean of a half."""
    folder = tmp_path_factory.mktemp("siglip")
    config = json.loads((exported[2] / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = -3.0
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    config["preprocess_cfg"] = half
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = load_file(exported[2] / "open_clip_model.safetensors")
    save_file({**state, "logit_bias": torch.tensor(-2.5)}, folder / "open_clip_model.safetensors")
    predictor = Predictor(str(folder))
    tower = predictor.encoder.model.image_tower
    assert (tower.resize_mode, tower.interpolation) == ("squash", "bilinear")
    found = probabilities(predictor.classify(photos, LABELS, k=4), LABELS)
    logits = peer_logits(str(folder), photos, LABELS)
    assert torch.allclose(found, logits.sigmoid(), atol=2e-5)
    assert (found.sum(1) - 1).abs().min() > 1e-2


def test_a_file_of_siglip_s_weights_is_read_with_siglip_s_preprocessing(monkeypatch, tmp_path):
    """What open_clip's tables of pretrained weights say, where they agree; a file of weights does not."""
    squash = {
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    assert known_preprocessing("ViT-B-16-SigLIP") == squash
    assert known_preprocessing("RN50")["resize_mode"] == "shortest"
    assert known_preprocessing("ViT-L-14") == {} == known_preprocessing("ViT-S-32")
    (tmp_path / "weights.pt").write_bytes(b"x")
    seen = {}

    def create_model(name, **given):
        seen.update(given)
        raise RuntimeError("far enough")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    with pytest.raises(ValueError, match="far enough"):
        load_open_clip("ViT-B-16-SigLIP", str(tmp_path / "weights.pt"))
    assert seen["force_preprocess_cfg"] == squash


def test_labels_that_are_one_to_the_model_are_named(exported, photos):
    words = create_tokenizer(
        {"name": "words", "context_length": 8, "min_count": 1}, captions=["a photo of a cat"]
    )
    torch.manual_seed(0)
    predictor = Predictor(create_model(SETTINGS, tokenizer=words).eval(), words)
    found = predictor.classify(photos, ["daisy", "roses", "sunflowers"], k=3)
    assert all(p == pytest.approx(1 / 3) for _, one in found for _, p in one)
    assert [[label for label, _ in one] for _, one in found] == [["daisy", "roses", "sunflowers"]] * 3
    assert predictor.alike == [["daisy", "roses", "sunflowers"]]
    predictor.classify(photos, ["daisy", "cat"])
    assert predictor.alike == []


def test_weights_that_do_not_fit_are_an_error_that_says_so(exported, tmp_path):
    folder = exported[2]
    state = load_file(folder / "open_clip_model.safetensors")

    def broken(name: str, state=state, **changes) -> str:
        place = tmp_path / name
        place.mkdir()
        config = json.loads((folder / "open_clip_config.json").read_text())
        config["model_cfg"]["text_cfg"] |= changes.pop("text_cfg", {})
        config |= changes
        (place / "open_clip_config.json").write_text(json.dumps(config))
        if state is not None:
            save_file(state, place / "open_clip_model.safetensors")
        return f"open_clip:local-dir:{place}"

    other = {name: torch.zeros(3, 5) for name in state}
    for name, message in [
        (broken("other", state=other), "cannot load local-dir"),
        (broken("wide", text_cfg={"width": 64}), "pos_embed width changed"),
        (broken("none", state=None), "holds no weights"),
        (broken("shape", model_cfg=3), "model_cfg in .*open_clip_config.json"),
        (broken("elsewhere", text_cfg={"hf_model_name": "/etc"}), "'/etc', a path"),
        (f"open_clip:local-dir:{tmp_path}", "it has no open_clip_config.json"),
        ("open_clip:hf-hub:no-such-organisation/no-such-model", "open_clip cannot load hf-hub"),
        ("open_clip:RN50=nowhere.pt", "there is no file nowhere.pt"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_any(name)
    bare = tmp_path / "bare"
    bare.mkdir()
    save_file({"x": torch.zeros(1)}, bare / "model.safetensors")
    with pytest.raises(ValueError, match="weights without the settings of their model"):
        load_any(str(bare))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["RN50", "ViT-B-32"])
def test_weights_of_another_architecture_are_an_error_that_says_so(architecture, tmp_path):
    """ViT's weights given to a ResNet and the reverse, which open_clip itself meets with an AssertionError or a list."""
    other = {"RN50": "ViT-B-32", "ViT-B-32": "RN50"}[architecture]
    torch.save(open_clip.create_model(other).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt does not fit open_clip's {architecture}"):
        load_any(f"open_clip:{architecture}={tmp_path / 'weights.pt'}")
