"""Single towers of other libraries as sources: timm's image models, Hugging Face and sentence-transformers text encoders.

They are made by clipkit's own towers, which know how each library loads its weights without running code.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from clipkit.data import Tokenizer, create_tokenizer
from clipkit.foreign import BrokenFile, read_json
from clipkit.loggers import tolerate_broken_wandb
from clipkit.sources.source import Source
from clipkit.towers import create_text_tower
from clipkit.towers.hugging_face import longest_text, without_weights
from clipkit.towers.image import TimmTower

_POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}


def from_timm(name: str, model: str) -> Source:
    """A timm name with published weights, or `local-dir:FOLDER` and `hf-hub:NAME` as timm has them."""
    if model.startswith("local-dir:") and not Path(model[10:], "config.json").is_file():
        raise ValueError(f"{name}: {model[10:]} is no folder of a timm model: it has no config.json")
    # timm imports wandb.
    tolerate_broken_wandb()
    try:
        trunk = TimmTower(model=model, pretrained=True).trunk
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: timm gave no weights for {model}: {line[:300]}. A folder that timm.models.save_for_hf wrote is "
            "timm:local-dir:FOLDER"
        ) from error
    published = trunk.pretrained_cfg
    if not published.get("architecture"):
        raise ValueError(f"{name}: timm does not say which architecture {model} is")
    tower = {
        "name": "timm",
        "model": published["architecture"],
        "image_size": published["input_size"][-1],
        "mean": list(published["mean"]),
        "std": list(published["std"]),
        "interpolation": "bilinear" if published.get("interpolation") == "bilinear" else "bicubic",
    }
    weights = {f"image_tower.trunk.{key}": tensor for key, tensor in trunk.state_dict().items()}
    return Source(name, "a timm model", model, weights, {"image_tower": tower})


def from_hugging_face(name: str, model: str) -> Source:
    """A text encoder by Hugging Face name or folder, with its tokenizer."""
    limit = longest_text(model)
    tokenizer = create_tokenizer({"name": "hf", "model": model, "context_length": min(limit or 512, 512)})
    tower, settings = _text_tower(name, model, tokenizer, None)
    return Source(name, "a Hugging Face model", model, _weights(tower), {"text_tower": settings}, tokenizer)


def from_sentence_transformers(name: str, given: str) -> Source:
    """A sentence-transformers folder, or an installed package that carries one: encoder, pooling, a linear Dense at most."""
    folder = sentence_folder(given)
    modules: list[dict[str, Any]] = read_json(folder / "modules.json", list[dict[str, Any]])
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    if (
        kinds[:2] != ["Transformer", "Pooling"]
        or not {*kinds[2:]} <= {"Dense", "Normalize"}
        or kinds.count("Dense") > 1
    ):
        raise ValueError(
            f"{name}: {folder} is made of {', '.join(kinds) or 'no modules'}; clipkit's text towers have the like of "
            "Transformer, Pooling, one linear Dense and Normalize"
        )
    prompt = _optional(folder / "config_sentence_transformers.json").get("default_prompt_name")
    if prompt:
        raise ValueError(
            f"{name}: {folder} puts the prompt {str(prompt)[:50]!r} before every text; a tower reads texts alone"
        )
    parts = [_inside(folder, str(module.get("path", ""))) for module in modules]
    limits = _optional(parts[0] / "sentence_bert_config.json")
    if limits.get("do_lower_case"):
        raise ValueError(
            f"{name}: {folder} makes texts lower case before its tokenizer: have the tokenizer do it"
        )
    encoder = str(parts[0])
    length = limits.get("max_seq_length") or _tokenizer_limit(parts[0]) or longest_text(encoder) or 512
    tokenizer = create_tokenizer({"name": "hf", "model": encoder, "context_length": int(length)})
    tower, settings = _text_tower(name, encoder, tokenizer, _pooling(name, parts[1] / "config.json"))
    source = Source(
        name,
        "a sentence-transformers model",
        str(folder),
        _weights(tower),
        {"text_tower": settings},
        tokenizer,
    )
    for kind, part in zip(kinds, parts, strict=True):
        if kind == "Dense":
            source.weights |= _dense(name, part)
            source.settings = {
                **source.settings,
                "text_projection_bias": "text_projection.bias" in source.weights,
            }
    return source


def sentence_folder(name: str) -> Path:
    """The folder with modules.json that a name stands for: itself, or one inside an installed package.

    Raises:
        ValueError: there is none.
    """
    folder = Path(name)
    if not folder.is_dir():
        spec = (
            importlib.util.find_spec(name.replace("-", "_")) if "/" not in name and "." not in name else None
        )
        roots = list(spec.submodule_search_locations or []) if spec else []
        found = sorted(path.parent for root in roots for path in Path(root).rglob("modules.json"))
        if not found:
            raise ValueError(
                f"{name!r} is neither a sentence-transformers folder nor an installed package that holds one"
            )
        folder = found[0]
    if not (folder / "modules.json").is_file():
        raise ValueError(f"{folder} is no sentence-transformers folder: it has no modules.json")
    return folder


def _text_tower(
    name: str, model: str, tokenizer: Tokenizer, pooling: str | None
) -> tuple[Any, dict[str, Any]]:
    """(the tower with its weights, its settings without a name to load)."""
    spec = {"name": "hf", "pretrained": model, "pooling": pooling, "context_length": tokenizer.context_length}
    try:
        tower = create_text_tower(
            spec,
            embed_dim=1,
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            eot_id=tokenizer.eot_id,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:
        # transformers and safetensors have kinds of their own for a file that is cut short.
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise BrokenFile(f"{name}: the weights of {model} could not be read: {line[:300]}") from error
    return tower, {**without_weights(spec), "pooling": tower.pooling}


def _weights(tower: Any) -> dict[str, Tensor]:
    return {f"text_tower.{name}": tensor for name, tensor in tower.state_dict().items()}


def _pooling(name: str, path: Path) -> str:
    given: dict[str, Any] = read_json(path)
    modes = [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, on in given.items()
        if on is True and key.startswith("pooling_mode_")
    ]
    named = given.get("pooling_mode")
    modes = [named] if isinstance(named, str) else [mode for mode in modes if isinstance(mode, str)]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ValueError(
            f"{name}: {path} pools by {', '.join(map(str, modes)) or 'nothing'}; clipkit has {', '.join(_POOLINGS)}"
        )
    return _POOLINGS[modes[0]]


def _dense(name: str, folder: Path) -> dict[str, Tensor]:
    given: dict[str, Any] = read_json(folder / "config.json")
    if (
        str(given.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
        != "Identity"
    ):
        raise ValueError(
            f"{name}: {folder} has an activation behind its Dense layer; clipkit's projection is linear"
        )
    try:
        found = load_file(folder / "model.safetensors")
    except Exception as error:
        raise BrokenFile(f"{folder / 'model.safetensors'} could not be read: {str(error)[:200]}") from None
    return {f"text_projection.{key.removeprefix('linear.')}": tensor for key, tensor in found.items()}


def _tokenizer_limit(folder: Path) -> int | None:
    limit = _optional(folder / "tokenizer_config.json").get("model_max_length")
    return limit if isinstance(limit, int) and limit < 65_536 else None


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _inside(folder: Path, path: str) -> Path:
    """A module's folder; BrokenFile for one that leads elsewhere."""
    if path.startswith("/") or ".." in path.split("/"):
        raise BrokenFile(f"{folder / 'modules.json'} names a folder outside of its own")
    return folder / path
