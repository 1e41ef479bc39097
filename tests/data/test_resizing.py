"""Pictures without random crop: open_clip's own evaluation transforms, in every resize mode, wherever they are made."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data import create_stream, iter_eval
from clipkit.data.decode import RESIZING, decode_eval
from clipkit.evals import Encoder
from clipkit.evals.items import load_image
from clipkit.evals.models import load_open_clip
from clipkit.evals.sources import ImageFolder
from clipkit.export import save_open_clip
from clipkit.predict import Predictor
from clipkit.towers import base, create_image_tower
from tests.data.test_decode import far, save, smooth

# Width and height: wide, high, square, small, with rounding in each mode.
SIZES = [
    (300, 200),
    (200, 301),
    (64, 64),
    (100, 451),
    (33, 17),
    (17, 33),
    (7, 5),
    (640, 401),
    (63, 64),
    (129, 2),
]
MODES = [(mode, filter_) for mode in RESIZING["resize_mode"] for filter_ in RESIZING["interpolation"]]


def open_clips(data: bytes, size: int, mode: str, interpolation: str) -> np.ndarray:
    import open_clip

    transform = open_clip.image_transform(
        size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=mode, interpolation=interpolation
    )
    return (transform(Image.open(io.BytesIO(data))) * 255).round().numpy()


def test_the_names_stand_once_with_the_towers_and_once_with_the_data():
    assert base.RESIZING == RESIZING


@pytest.mark.parametrize("mode, interpolation", MODES)
def test_pixels_are_those_of_open_clips_transform(mode, interpolation):
    how = {"resize_mode": mode, "interpolation": interpolation}
    for size in SIZES:
        if (mode, size) == ("shortest", (129, 2)):
            # More than 16 times as long as wide: see test_the_centre_of_an_extreme_picture_is_that_of_the_whole.
            continue
        data = save(smooth(*size), "PNG")
        wanted = open_clips(data, 64, mode, interpolation)
        assert far(decode_eval(data, 64, **how), wanted) <= 2, size
        assert far(load_image(data, 64, **how), wanted) == 0, size


def test_a_line_keeps_a_pixel():
    assert decode_eval(save(smooth(400, 1), "PNG"), 8, resize_mode="longest").shape == (3, 8, 8)
    assert load_image(save(smooth(1, 400), "PNG"), 8, resize_mode="longest").shape == (3, 8, 8)


@pytest.mark.parametrize("cache", ["none", "ram"])
@pytest.mark.parametrize(
    "mode, interpolation", [("shortest", "bicubic"), ("longest", "bilinear"), ("squash", "bicubic")]
)
def test_training_without_a_crop_sees_what_evaluation_sees(
    mode, interpolation, cache, tmp_path, write_tar, byte_tokenizer
):
    how = {"resize_mode": mode, "interpolation": interpolation}
    members = []
    for i, size in enumerate(SIZES):
        members += [(f"{i}.png", save(smooth(*size), "PNG")), (f"{i}.txt", b"a picture")]
    shard = str(write_tar(tmp_path / "a.tar", members))
    settings = {"train": shard, "augmentation": {"crop_scale": None}, "cache": cache, "cache_size": 8}
    stream = create_stream(
        settings, tokenizer=byte_tokenizer, image_size=32, batch_size=5, seed=0, epochs=2, **how
    )
    (evaluated,) = iter_eval(shard, image_size=32, batch_size=10, **how)
    count = 0
    for batch in stream:
        for key, image in zip(batch["key"], batch["image"]):
            assert torch.equal(image, evaluated["image"][evaluated["key"].index(key)])
            count += 1
    assert count == 20


def test_a_name_that_is_none_is_an_error(tmp_path, byte_tokenizer):
    with pytest.raises(ValueError, match="unknown resize_mode 'shortes'. Did you mean 'shortest'"):
        create_image_tower({"name": "timm", "model": "test_resnet", "resize_mode": "shortes"}, embed_dim=8)
    with pytest.raises(ValueError, match="unknown interpolation 'nearest'"):
        create_stream(
            {"train": "x"},
            tokenizer=byte_tokenizer,
            image_size=8,
            batch_size=1,
            seed=0,
            interpolation="nearest",
        )
    with pytest.raises(ValueError, match="unknown resize_mode 'crop'"):
        next(iter_eval("x", image_size=8, batch_size=1, resize_mode="crop"))


def test_a_model_carries_how_its_pictures_are_made(tmp_path):
    """From the setting to the encoder, the predictor, and open_clip's own preprocessing of the exported model."""
    import open_clip

    from clipkit.data import create_tokenizer
    from clipkit.model import create_model

    tokenizer = create_tokenizer("clip_bpe")
    text = {"name": "transformer", "width": 32, "layers": 1, "heads": 1}
    image = {"name": "clip_vit", "image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "heads": 1}
    how = {"resize_mode": "squash", "interpolation": "bilinear"}
    torch.manual_seed(0)
    model = create_model(
        {"embed_dim": 16, "image_tower": {**image, **how}, "text_tower": text}, tokenizer=tokenizer
    ).eval()
    folder = tmp_path / "pictures" / "class"
    folder.mkdir(parents=True)
    (folder / "a.png").write_bytes(save(smooth(90, 30), "PNG"))
    data = (folder / "a.png").read_bytes()
    with torch.no_grad():
        wanted = model.encode_image(load_image(data, 32, **how)[None])
        default = model.encode_image(load_image(data, 32)[None])
    assert not torch.allclose(wanted, default, atol=1e-3)
    encoder = Encoder(model, tokenizer)
    assert torch.allclose(encoder.images(ImageFolder(folder.parent)).image_features, wanted, atol=1e-6)
    _, predicted = Predictor(model, tokenizer).embed_images([folder / "a.png"])
    assert torch.allclose(predicted, wanted, atol=1e-6)

    exported = save_open_clip(model, tmp_path / "exported", tokenizer=tokenizer)
    told = json.loads((exported / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert {key: told[key] for key in how} == how
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    with torch.no_grad():
        features = theirs.eval().encode_image(transform(Image.open(io.BytesIO(data)))[None], normalize=True)
    assert torch.allclose(features, wanted, atol=1e-5)


def test_an_open_clip_model_brings_its_own(monkeypatch):
    import open_clip

    create = open_clip.create_model

    def with_config(*args, **kwargs):
        model = create(*args, **kwargs)
        model.visual.preprocess_cfg = {"resize_mode": "squash", "interpolation": "random"}
        return model

    monkeypatch.setattr(open_clip, "create_model", with_config)
    tower = load_open_clip("ViT-S-32-alt")[0].image_tower
    assert (tower.resize_mode, tower.interpolation) == ("squash", "bicubic")
