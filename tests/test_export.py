"""Exported weights compute the same in open_clip and sentence-transformers, and come back unchanged."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipkit.data import create_tokenizer
from clipkit.export import (
    hugging_face_tokenizer,
    load_open_clip_state_dict,
    open_clip_config,
    open_clip_state_dict,
    save_open_clip,
    save_sentence_transformer,
)
from clipkit.model import create_model

open_clip = pytest.importorskip("open_clip")

IMAGE = {
    "timm": {"name": "timm", "model": "test_resnet", "image_size": 32},
    "clip_resnet50": {"name": "clip_resnet50", "image_size": 32, "layers": [1, 2, 1, 1], "width": 16},
    "clip_vit": {
        "name": "clip_vit",
        "image_size": 32,
        "patch_size": 16,
        "width": 64,
        "layers": 2,
        "heads": 2,
    },
}
TEXT = {"name": "transformer", "width": 32, "layers": 2, "heads": 4, "dropout": 0.1}
CAPTIONS = [
    "A dog runs over wet sand !",
    "wow!!! two men's hats, don't they match?",
    "Café at 12:30 -- naïve, 50% off (really)",
    "one",
    "",
    "a red circle above a small blue square " * 9,
]


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "clip_bpe": create_tokenizer({"name": "clip_bpe", "context_length": 24}),
        "words": create_tokenizer({"name": "words", "context_length": 12}, captions=CAPTIONS),
    }


def make(tokenizer, image="clip_vit", text=None, **settings):
    torch.manual_seed(0)
    spec = IMAGE[image] if isinstance(image, str) else image
    model = create_model(
        {"embed_dim": 24, "image_tower": spec, "text_tower": {**TEXT, **(text or {})}, **settings},
        tokenizer=tokenizer,
    )
    # Running statistics and norms away from their initial values, or a lost one would not be seen.
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def images(model):
    size = model.image_tower.image_size
    return torch.randint(
        0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", ["clip_bpe", "words"])
def test_an_exported_tokenizer_cleans_as_it_did(tmp_path, name):
    captions = [
        "A RED_circle!",
        "it's (not) a star, is it?",
        "  two   spaces ",
        "a-b [c] {d} ^e\\f ~ | `g`",
        "10% & <b>",
    ]
    spec = {"name": name, "context_length": 24, "clean": "canonicalize"}
    tokenizer = create_tokenizer(spec, captions=captions if name == "words" else None)
    expected = tokenizer(captions)
    out = hugging_face_tokenizer(tokenizer)(
        captions, padding="max_length", truncation=True, return_tensors="pt"
    )
    assert torch.equal(out["input_ids"].masked_fill(out["attention_mask"] == 0, tokenizer.pad_id), expected)
    folder = save_open_clip(make(tokenizer, "clip_vit"), tmp_path / "out", tokenizer=tokenizer)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{folder}")(captions), expected)


@pytest.mark.parametrize("name", ["clip_bpe", "words"])
@pytest.mark.parametrize("image", IMAGE)
@torch.no_grad()
def test_open_clip_loads_the_folder_and_gives_the_same_features(tmp_path, tokenizers, image, name):
    tokenizer = tokenizers[name]
    model = make(tokenizer, image, init_logit_scale=20.0)
    folder = save_open_clip(model, tmp_path / "out", tokenizer=tokenizer)
    peer, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    peer.eval()
    assert type(peer) is open_clip.CLIP
    mean, std = (
        torch.tensor(v).view(3, 1, 1)
        for v in (peer.visual.preprocess_cfg["mean"], peer.visual.preprocess_cfg["std"])
    )
    image = images(model)
    theirs = peer.encode_image((image / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(model.encode_image(image), theirs, atol=1e-6, rtol=0)
    text = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert torch.equal(text, tokenizer(CAPTIONS))
    torch.testing.assert_close(
        model.encode_text(text), peer.encode_text(text, normalize=True), atol=1e-6, rtol=0
    )
    assert peer.logit_scale.exp().item() == pytest.approx(20.0, rel=1e-6)


@pytest.mark.parametrize("image", IMAGE)
@torch.no_grad()
def test_open_clips_weights_come_back(tokenizers, image):
    tokenizer = tokenizers["clip_bpe"]
    model = make(tokenizer, image, init_logit_bias=-1.0)
    torch.manual_seed(5)
    peer = open_clip.CLIP(**open_clip_config(model)).eval()
    nn.init.constant_(peer.logit_bias, -7.0)
    nn.init.constant_(peer.logit_scale, 3.0)
    picture, text = images(model), tokenizer(CAPTIONS)
    before = model.encode_text(text)
    load_open_clip_state_dict(model, peer.state_dict())
    assert not torch.allclose(model.encode_text(text), before, atol=1e-2)
    theirs = peer.encode_image(model.normalize_image(picture), normalize=True)
    torch.testing.assert_close(model.encode_image(picture), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        model.encode_text(text), peer.encode_text(text, normalize=True), atol=1e-6, rtol=0
    )
    assert model.log_logit_scale.tolist() == [3.0] and model.logit_bias.tolist() == [-7.0]
    again = open_clip_state_dict(model)
    assert again.keys() == peer.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in peer.state_dict().items())


@torch.no_grad()
def test_an_end_token_that_is_not_the_largest_id_is_still_pooled(tokenizers):
    # RoBERTa's numbering: start 0, padding 1, end 2.
    tokenizer = SimpleNamespace(vocab_size=30, context_length=8, pad_id=1, sot_id=0, eot_id=2)
    model = make(tokenizer)
    peer = open_clip.CLIP(**open_clip_config(model)).eval()
    peer.load_state_dict(open_clip_state_dict(model))
    text = torch.tensor([[0, 29, 7, 2, 1, 1, 1, 1], [0, 3, 4, 5, 6, 28, 9, 2]])
    torch.testing.assert_close(
        model.encode_text(text), peer.encode_text(text, normalize=True), atol=1e-6, rtol=0
    )


def test_open_clips_own_rn50_config_is_what_ours_exports():
    tokenizer = create_tokenizer("clip_bpe")
    with torch.device("meta"):
        config = {
            "embed_dim": 1024,
            "image_tower": {"name": "clip_resnet50"},
            "text_tower": {"name": "transformer"},
        }
        model = create_model(config, tokenizer=tokenizer)
    theirs, ours = open_clip.get_model_config("RN50"), open_clip_config(model)
    assert ours["embed_dim"] == theirs["embed_dim"]
    for part in ("vision_cfg", "text_cfg"):
        wanted = {key: value for key, value in theirs[part].items() if value is not None}
        assert {key: ours[part][key] for key in wanted} == wanted


@pytest.mark.parametrize("name", ["clip_bpe", "words"])
@pytest.mark.parametrize("settings", [{}, {"quick_gelu": True}, {"pooling": "mean"}])
@torch.no_grad()
def test_sentence_transformers_loads_the_text_transformer(tmp_path, tokenizers, name, settings):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer = tokenizers[name]
    model = make(tokenizer, text=settings)
    folder = save_sentence_transformer(model, tmp_path / "out", tokenizer=tokenizer)
    assert not list(folder.rglob("*.py"))
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    assert "clipkit" not in {type(module).__module__.split(".")[0] for module in peer.modules()}
    theirs = torch.from_numpy(peer.encode(CAPTIONS))
    torch.testing.assert_close(model.encode_text(tokenizer(CAPTIONS)), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "cls", "eot"])
@torch.no_grad()
def test_sentence_transformers_loads_a_hugging_face_tower(tmp_path, test_data, pooling):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer = create_tokenizer(
        {"name": "hf", "model": str(roberta_folder(test_data)), "context_length": 20}
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"name": "hf", "model_type": "roberta", "config": sizes, "pooling": pooling}
    config = {"embed_dim": 24, "image_tower": IMAGE["timm"], "text_tower": text}
    torch.manual_seed(0)
    model = create_model(config, tokenizer=tokenizer).eval()
    folder = save_sentence_transformer(model, tmp_path / "out", tokenizer=tokenizer)
    peer = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    theirs = torch.from_numpy(peer.encode(CAPTIONS))
    torch.testing.assert_close(model.encode_text(tokenizer(CAPTIONS)), theirs, atol=1e-6, rtol=0)
    states = save_sentence_transformer(model, tmp_path / "states", tokenizer=tokenizer, project=False)
    theirs = torch.from_numpy(
        sentence_transformers.SentenceTransformer(str(states), device="cpu").encode(CAPTIONS)
    )
    torch.testing.assert_close(model.text_tower(tokenizer(CAPTIONS)), theirs, atol=1e-5, rtol=0)


def roberta_folder(test_data):
    root = test_data("tokenizers")
    return next(path.parent for path in root.rglob("merges.txt"))


def test_transformers_tokenizers_give_clipkits_ids_on_real_captions(test_data):
    captions = [
        caption
        for line in test_data("flickr8k-mini/val_retrieval.jsonl").read_text(encoding="utf-8").splitlines()
        for caption in json.loads(line)["captions"]
    ]
    assert len(captions) == 5000
    clip = create_tokenizer({"name": "clip_bpe", "context_length": 40})
    words = create_tokenizer({"name": "words", "context_length": 40}, captions=captions[:1000])
    for tokenizer in (clip, words):
        out = hugging_face_tokenizer(tokenizer)(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        )
        ids = out["input_ids"].masked_fill(out["attention_mask"] == 0, tokenizer.pad_id)
        assert torch.equal(ids, tokenizer(captions))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": {"pooling": "mean"}}, "pooling 'mean'"),
        ({"text": {"causal": False}}, "text_tower.causal False"),
        ({"text": {"quick_gelu": True}}, "one quick_gelu"),
        ({"image": {"name": "timm", "model": "test_vit", "image_size": 32}}, "own image_size"),
    ],
)
def test_what_open_clip_cannot_build_is_refused(tmp_path, tokenizers, settings, message):
    model = make(tokenizers["words"], **settings)
    with pytest.raises(ValueError, match=message):
        save_open_clip(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_hugging_face_towers_are_pointed_to_sentence_transformers(tokenizers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"name": "hf", "model_type": "bert", "config": sizes}
    model = create_model(
        {"embed_dim": 8, "image_tower": IMAGE["timm"], "text_tower": text}, tokenizer=tokenizers["words"]
    )
    with pytest.raises(ValueError, match="save_sentence_transformer"):
        open_clip_state_dict(model)


def test_a_bidirectional_transformer_is_refused_by_sentence_transformers(tmp_path, tokenizers):
    model = make(tokenizers["words"], text={"causal": False})
    with pytest.raises(ValueError, match="text_tower.causal: true"):
        save_sentence_transformer(model, tmp_path, tokenizer=tokenizers["words"])


def test_weights_of_another_architecture_change_nothing(tokenizers):
    tokenizer = tokenizers["words"]
    model, other = make(tokenizer), make(tokenizer, text={"width": 64})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"'positional_embedding' is \(12, 64\) in the weights and \(12, 32\)"
    ):
        load_open_clip_state_dict(model, open_clip_state_dict(other))
    partial = open_clip_state_dict(model)
    del partial["ln_final.bias"]
    with pytest.raises(ValueError, match="'ln_final.bias' is nothing in the weights"):
        load_open_clip_state_dict(model, partial)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_features_of_the_export_are_unit_norm_products_of_the_projection(tokenizers):
    # Against the layout's definition, by hand: the end state times text_projection (width, D).
    tokenizer = tokenizers["words"]
    model = make(tokenizer)
    state = open_clip_state_dict(model)
    text = tokenizer(CAPTIONS[:2])
    pooled = model.text_tower(text)
    torch.testing.assert_close(
        model.encode_text(text), F.normalize(pooled @ state["text_projection"], dim=-1)
    )
