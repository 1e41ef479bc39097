"""The model that a run has left, made again from its checkpoint's settings and weights.

The folder may be a stranger's: what its settings describe is compared with the shapes of the weights before it takes
memory, and what they name is opened as clipkit.foreign.permit allows.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors.torch import load_file
from typing_extensions import NotRequired

from clipkit.checkpoint import (
    MANIFEST,
    SHARDS,
    find_checkpoint,
    frozen_file,
    load_checkpoint,
    split_weights,
    tensor_shapes,
)
from clipkit.data.tokenizers import Tokenizer, load_tokenizer
from clipkit.foreign import BrokenFile, checked, named_by, permit, read_json
from clipkit.model import DualEncoder, create_model
from clipkit.settings import ARCHITECTURE
from clipkit.towers.hugging_face import without_weights

# All weights of a `clipkit-export to=safetensors`, beside config.json and tokenizer.json.
EXPORTED = "model.safetensors"


class _Towers(TypedDict, total=False):
    embed_dim: int
    image_tower: dict[str, Any]
    text_tower: dict[str, Any]
    text_projection_bias: bool


class _ModelSettings(TypedDict):
    """What a config.json must hold for a model to be made."""

    embed_dim: int
    image_tower: dict[str, Any]
    text_tower: dict[str, Any]
    architecture: NotRequired[_Towers]


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", trust_paths: bool = False
) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """Rebuild the model of a run or checkpoint folder: (DualEncoder in eval mode, tokenizer, config).

    The folder may come from anybody: its architecture is compared with the shapes of its weights before it takes
    memory, and what its settings name is opened as clipkit.foreign.permit allows.

    Args:
        trust_paths: the settings may name local files anywhere.

    Raises:
        ValueError: no checkpoint there, a damaged one, or weights that do not fit the config beside them.
    """
    given, path = Path(path), model_folder(path)
    with named_by(path, trust_paths=trust_paths):
        # What a run folder's newest is has been found by its hashes.
        settings, weights, tokenizer, config = read_model(path, verified=path != given)
        model = create_model(settings, tokenizer=tokenizer)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise BrokenFile(
            f"the weights of {path} do not fit the architecture in its config.json: {error}"
        ) from error
    return model.to(device).eval(), tokenizer, config


def model_folder(path: str | Path) -> Path:
    """The folder of one model's files: a safetensors export, or the checkpoint that `find_checkpoint` finds."""
    path = Path(path)
    return path if _is_export(path) else find_checkpoint(path)


def read_model(
    path: Path, *, verified: bool = False
) -> tuple[dict[str, Any], dict[str, torch.Tensor], Tokenizer, dict[str, Any]]:
    """(what `create_model` takes, weights, tokenizer, config) of a `model_folder`, inside `named_by` of it.

    The average of the weights where the run keeps one, for that is what it was evaluated by. Raises as `load_model`.

    Args:
        verified: the hashes have been checked already.
    """
    tokenizer = load_tokenizer(path / "tokenizer.json")
    config = read_json(path / "config.json")
    checked(config, _ModelSettings, name=str(path / "config.json"))
    settings = model_config(config, pretrained=False)
    if _is_export(path):
        _check_architecture(settings, tokenizer, tensor_shapes(path / EXPORTED), path)
        return settings, load_file(path / EXPORTED), tokenizer, config
    _check_architecture(settings, tokenizer, _model_shapes(path), path)
    loaded = load_checkpoint(path, verified=verified, training=False)
    weights = split_weights(loaded["weights"], "average") or split_weights(loaded["weights"], "model")
    return settings, weights, tokenizer, config


def _is_export(path: Path) -> bool:
    return (path / EXPORTED).is_file() and not (path / MANIFEST).is_file()


def _model_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's model, without its weights."""
    files = sorted((path / SHARDS).iterdir()) if (path / SHARDS).is_dir() else [path / "model.safetensors"]
    frozen = frozen_file(path)
    files += [frozen] if frozen is not None else []
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not file.is_file():
            raise BrokenFile(f"checkpoint {path} is damaged: {file.name} is missing")
        found = tensor_shapes(file)
        if path / SHARDS in file.parents:
            # A file a rank: each states its part of a tensor, whose other sizes are the whole's.
            found = {name: (0, *shape[1:]) for name, shape in found.items()}
        shapes |= found
    return {name[6:]: shape for name, shape in shapes.items() if name.startswith("model.")}


def _check_architecture(
    settings: Mapping[str, Any], tokenizer: Tokenizer, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """BrokenFile unless the settings make a model of exactly these weights, found out without its memory."""
    where = f"{path / 'config.json'}"
    elements = max([math.prod(max(1, size) for size in shape) for shape in shapes.values()] or [0])
    sizes = {key: settings[key] for key in ("embed_dim", "image_tower", "text_tower") if key in settings}
    for key, value in _whole_numbers(sizes):
        # A sharded file states no first size.
        limit = len(shapes) if re.search("layer|depth|block", key) else max(elements, 1 << 16)
        # A family's own settings may be negative, such as the label that it leaves out of a sum (-100).
        if value > limit or (value < -1 and not key.startswith("text_tower.config.")):
            raise BrokenFile(f"{where}: {key}={value} is not what made the weights beside it")
    for key, text in _locations(settings):
        permit(text, key)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = create_model(settings, tokenizer=tokenizer)
    except (BrokenFile, OSError):
        raise
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise BrokenFile(f"{where} does not describe a model: {lines[0][:300]}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted({*wanted, *shapes}):
        here, there = shapes.get(name), wanted.get(name)
        if (
            here is None
            or there is None
            or (here != there and not (here[:1] == (0,) and here[1:] == there[1:]))
        ):
            raise BrokenFile(
                f"the weights of {path} do not fit the architecture in its config.json: {name} is "
                f"{here or 'missing'} in the weights and {there or 'not there'} in the architecture"
            )
    # Masks and the like are no weights, and take memory all the same.
    spare = sum(buffer.numel() for buffer in model.buffers()) - sum(
        math.prod(shape) for shape in wanted.values()
    )
    if spare > 1 << 26:
        raise BrokenFile(
            f"{where} describes a model with {spare} numbers beside its weights: it was not built"
        )


def _whole_numbers(settings: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, number) of nested settings."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _whole_numbers(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from _whole_numbers(value, prefix)
    elif isinstance(settings, int) and not isinstance(settings, bool):
        yield prefix, settings


def _locations(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(dotted key, path) of what a tower's settings have other libraries open on this machine."""
    for tower in ("image_tower", "text_tower"):
        for key in ("model", "pretrained"):
            value = (settings.get(tower) or {}).get(key)
            if isinstance(value, str):
                path = value.removeprefix("local-dir:")
                if path != value or path.startswith(("/", "~", ".")) or os.path.exists(path):
                    yield f"{tower}.{key}", path


def model_config(config: Mapping[str, Any], *, pretrained: bool = True) -> dict[str, Any]:
    """The part of a run's config that `create_model` takes; `pretrained=False` skips weights that will be
    replaced.
    """
    keys = (
        "embed_dim",
        "image_tower",
        "text_tower",
        "init_logit_scale",
        "init_logit_bias",
        "mlm_probability",
        "channels_last",
        "text_projection_bias",
    )
    part = {key: config[key] for key in keys if key in config} | config.get(ARCHITECTURE, {})
    for tower in ("image_tower", "text_tower"):
        # Where weights came from is none of the model's: clipkit.sources.
        part[tower] = {key: value for key, value in part[tower].items() if key != "init_from"}
        # timm's switch is a boolean; a Hugging Face folder still supplies the architecture's sizes.
        if not pretrained and isinstance(part[tower].get("pretrained"), bool):
            part[tower]["pretrained"] = False
    return part


def with_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config with the sizes of a text tower that started from a Hugging Face model, which its checkpoints then
    do without.
    """
    tower = config["text_tower"]
    settled = config.get(ARCHITECTURE, {})
    if "text_tower" in settled or not (
        isinstance(tower, Mapping) and isinstance(tower.get("pretrained"), str)
    ):
        return dict(config)
    return {**config, ARCHITECTURE: {**settled, "text_tower": without_weights(tower)}}
