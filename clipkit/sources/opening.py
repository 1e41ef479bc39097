"""What a source's name stands for: see clipkit.sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clipkit.checkpoint import MANIFEST
from clipkit.foreign import named_by, read_json
from clipkit.loading import model_folder, read_model
from clipkit.model import create_model
from clipkit.sources import libraries, open_clip
from clipkit.sources.files import SUFFIXES, read_state_dict
from clipkit.sources.source import TOWERS, Source
from clipkit.towers.hugging_face import without_weights
from clipkit.towers.lora import merge_lora, without_adapters

_FORMS = (
    "a run or export of clipkit, open_clip:NAME=TAG_OR_FILE, local-dir:FOLDER, hf-hub:NAME, timm:NAME, hf:NAME, "
    f"sentence_transformers:NAME, a folder of one of these, or a file ({', '.join(SUFFIXES)})"
)
_PARTS = (
    "image_tower.",
    "text_tower.",
    "image_projection.",
    "text_projection.",
    "log_logit_scale",
    "logit_bias",
    "mlm_head.",
)


def open_source(name: str) -> Source:
    """Read a source by its name.

    Raises:
        ValueError: nothing of that name, or what it holds cannot be begun from; the message says why.
        BrokenFile: a file that is cut short or altered.
    """
    kind, colon, rest = name.partition(":")
    prefixes = {
        "open_clip": open_clip.from_name,
        "hf-hub": open_clip.from_hub,
        "timm": libraries.from_timm,
        "hf": libraries.from_hugging_face,
        "sentence_transformers": libraries.from_sentence_transformers,
    }
    # Weights drawn while a library makes its model must not change what is drawn later.
    with torch.random.fork_rng(devices=[]):
        if colon and kind == "local-dir":
            return open_clip.from_folder(name, Path(rest))
        if colon and kind in prefixes:
            return prefixes[kind](name, rest)
        path = Path(name).expanduser()
        if path.is_dir():
            return _folder(name, path)
        if path.is_file():
            return _file(name, path)
    raise ValueError(f"init_from={name}: there is no such file or folder. It is {_FORMS}")


def _folder(name: str, path: Path) -> Source:
    """A folder, told by the files in it."""
    if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir() or any(path.glob("step_*")):
        return _clipkit(name, path, "a clipkit run")
    if (path / open_clip.CONFIG).is_file():
        return open_clip.from_folder(name, path)
    if (path / "modules.json").is_file():
        return libraries.from_sentence_transformers(name, str(path))
    if (path / "config.json").is_file():
        config: dict[str, Any] = read_json(path / "config.json")
        if {"embed_dim", "image_tower", "text_tower"} <= config.keys():
            return _clipkit(name, path, "a clipkit export")
        if "model_type" in config:
            return libraries.from_hugging_face(name, str(path))
        if "architecture" in config:
            return libraries.from_timm(name, f"local-dir:{path}")
    held = ", ".join(sorted(one.name for one in path.iterdir())[:5]) or "nothing"
    raise ValueError(
        f"init_from={name}: the folder is none that weights are known to lie in (it holds {held}). It is {_FORMS}"
    )


def _clipkit(name: str, path: Path, kind: str) -> Source:
    place = model_folder(path)
    with named_by(place):
        settings, weights, tokenizer, _ = read_model(place, verified=place != path)
        if any((settings[tower].get("lora") or {}).get("rank") for tower in TOWERS):
            model = create_model(settings, tokenizer=tokenizer)
            model.load_state_dict(weights)
            for tower in (model.image_tower, model.text_tower):
                merge_lora(tower)
            weights = model.state_dict()
        settings = without_adapters(settings)
        if isinstance(settings["text_tower"].get("pretrained"), str):
            # A run of before checkpoints held its sizes.
            settings = {**settings, "text_tower": without_weights(settings["text_tower"])}
    return Source(name, kind, str(place), weights, settings, tokenizer)


def _file(name: str, path: Path) -> Source:
    """A file of weights, told by the names of its tensors."""
    state, archive = read_state_dict(path)
    if archive:
        return open_clip.from_openai(name, path, state)
    if open_clip.is_layout(state):
        weights, odd = open_clip.clipkit_names(state)
        return Source(name, "open_clip weights", str(path), weights, ignored=odd)
    # A checkpoint's own file has the average beside the weights, which is what a run is scored by.
    for part in ("average.", "model.", ""):
        ours = {key[len(part) :]: tensor for key, tensor in state.items() if key.startswith(part)}
        if ours and all(key.startswith(_PARTS) for key in ours):
            left = [key for key in state if part and not key.startswith(part)]
            return Source(name, "clipkit weights", str(path), ours, ignored=left)
    return Source(name, "a tower's weights", str(path), state, loose=True)
