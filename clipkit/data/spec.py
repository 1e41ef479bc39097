"""The data settings: which keys there are, what they default to, and what they stand for on disk.

Every function that takes a `spec` takes the dictionary that conf/data/*.yaml composes. It is checked here
once: an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clipkit.data.synthetic import SHAPE_CLASSES, SHAPE_TEMPLATES, shape_paths, write_shapes
from clipkit.foreign import permit
from clipkit.registry import Registry, check_keys, unknown

# The meaning and unit of each key stand in conf/data/shapes.yaml.
DATA_DEFAULTS: dict[str, Any] = {
    "kind": "shards",
    "root": None,
    "train": None,
    "val": None,
    "zeroshot": None,
    "shapes": None,
    "table": None,
    "source": None,
    "sentences": None,
    "tokenizer": None,
    "num_workers": 0,
    "prefetch": 2,
    "captions": "random",
    "caption_weights": None,
    "captions_per_image": 1,
    "pair_ids": None,
    "hard_negatives": None,
    "hard_negatives_per_caption": 1,
    "teacher": None,
    "augmentation": {
        "crop_scale": [0.9, 1.0],
        "crop_ratio": [0.75, 1.3333],
        "flip": 0.0,
        "colour_jitter": None,
        "auto_augment": False,
    },
    "shuffle": True,
    "window": 16,
    "resample": False,
    "canonical_nodes": 1,
    "samples_per_epoch": None,
    "cache": "none",
    "cache_size": None,
    "cache_dir": None,
    "spool_gb": 50.0,
    "max_bad_fraction": 0.05,
    "on_bad_shard": "error",
    "max_pixels": 100_000_000,
    "timeout_s": 600.0,
    "shard_stall_s": 60.0,
    "shard_deadline_s": 600.0,
    "shard_retries": 5,
}
# Kinds of data that are clipkit's own; others are registered: clipkit.data.samples.
KINDS = ("shards", "shapes", "table")
kinds = Registry("kind of data")
_CHOICES = {
    "captions": ("random", "first", "all"),
    "cache": ("none", "ram"),
    "on_bad_shard": ("error", "skip"),
}
_PAIR_IDS = ("caption", "key", "key:SEP", "json:FIELD")
_TABLE = {"image": "image", "caption": "caption", "separator": None, "encoding": None, "quotes": "auto"}
_SHAPES = {"folder": "data/shapes", "train": 16_000, "val": 500, "seed": 0, "image_size": 32, "copies": 1}


def complete(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with every default filled in; ValueError for an unknown key or choice."""
    check_keys(spec, DATA_DEFAULTS, "data")
    full = {**DATA_DEFAULTS, **spec}
    given = full["augmentation"] or {}
    check_keys(given, DATA_DEFAULTS["augmentation"], "data.augmentation")
    full["augmentation"] = {**DATA_DEFAULTS["augmentation"], **given}
    if full["kind"] == "table":
        check_keys(full["table"] or {}, _TABLE, "data.table")
        full["table"] = {**_TABLE, **(full["table"] or {})}
    if full["source"] and full["kind"] in KINDS:
        raise ValueError(
            f"data.source is for kinds of data that a plugin registers, not for data.kind={full['kind']}"
        )
    for key, choices in _CHOICES.items():
        if full[key] not in choices:
            raise unknown(f"data.{key}", full[key], choices)
    _check_pairs(full)
    for name in ("crop_scale", "crop_ratio"):
        if name == "crop_scale" and full["augmentation"][name] is None:
            continue
        low, high = full["augmentation"][name]
        if not 0 < low <= high or (name == "crop_scale" and high > 1):
            raise ValueError(
                f"data.augmentation.{name} is {[low, high]}; expected [smallest, largest], above 0"
                f"{' and at most 1, or null for no crop' if name == 'crop_scale' else ''}"
            )
    return full


def check_kind(kind: object) -> None:
    """ValueError for a data.kind that nobody has registered."""
    if kind not in (*KINDS, *kinds.names()):
        raise unknown("data.kind", kind, [*KINDS, *kinds.names()])


def _check_pairs(spec: Mapping[str, Any]) -> None:
    """ValueError for settings of pairs that say nothing, or contradict each other."""
    ids = spec["pair_ids"]
    way, colon, name = str(ids).partition(":")
    good = way in ("caption", "key") and not colon or way in ("key", "json") and name
    if ids is not None and not (isinstance(ids, str) and good):
        raise unknown("data.pair_ids", ids, ("null", *_PAIR_IDS))
    for key in ("captions_per_image", "hard_negatives_per_caption"):
        if isinstance(spec[key], bool) or not isinstance(spec[key], int) or spec[key] < 1:
            raise ValueError(f"data.{key} is {spec[key]!r}; expected a whole number, 1 or more")
    if ids == "caption" and spec["captions_per_image"] > 1:
        raise ValueError(
            "data.pair_ids=caption names one caption's content, but data.captions_per_image="
            f"{spec['captions_per_image']} joins several: give null (a picture's captions are each other's positives), "
            "key, or json:FIELD"
        )
    weights = spec["caption_weights"]
    if weights is not None:
        if spec["captions"] != "random":
            raise ValueError(
                f"data.caption_weights are of captions drawn at random, but data.captions={spec['captions']}: leave "
                "one of them out"
            )
        if not weights or not all(_is_weight(one) for one in weights) or not any(weights):
            raise ValueError(
                f"data.caption_weights is {weights!r}; expected a list of finite numbers of 0 or more, not all 0"
            )
    if spec["hard_negatives"] is None and spec["hard_negatives_per_caption"] != 1:
        raise ValueError(
            "data.hard_negatives_per_caption counts what data.hard_negatives names, which is null: give it the field of "
            "KEY.json that holds them"
        )


def _is_weight(value: Any) -> bool:
    return (
        not isinstance(value, bool)
        and isinstance(value, (int, float))
        and math.isfinite(value)
        and value >= 0
    )


def locate_data(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The completed settings with every path in place, those of generated shapes too; nothing is written.

    Returns:
        The settings in which `train` and `val` are shards, and `zeroshot` is None or {"shards": ..., "classes":
        [...], "templates": [...]}.
    """
    full = complete(spec)
    if full["kind"] == "shapes":
        full["shapes"] = _complete_shapes(full["shapes"])
        paths = shape_paths(_shapes_folder(full["shapes"]), **_pick(full["shapes"], "train", "val"))
        full["train"], full["val"] = full["train"] or paths["train"], full["val"] or paths["val"]
        full["zeroshot"] = full["zeroshot"] or {
            "shards": paths["zeroshot"],
            "classes": SHAPE_CLASSES,
            "templates": SHAPE_TEMPLATES,
        }
    return full


def resolve_data(spec: Mapping[str, Any]) -> dict[str, Any]:
    """`locate_data`'s settings; generated shapes are written first when they are not there."""
    full = locate_data(spec)
    if full["kind"] == "shapes":
        shapes = full["shapes"]
        write_shapes(_shapes_folder(shapes), **_pick(shapes, "train", "val", "seed", "image_size", "copies"))
    return full


def _complete_shapes(given: Mapping[str, Any] | None) -> dict[str, Any]:
    check_keys(given or {}, _SHAPES, "data.shapes")
    return {**_SHAPES, **(given or {})}


def _shapes_folder(shapes: Mapping[str, Any]) -> Path:
    permit(shapes["folder"], "data.shapes.folder")
    copies = f"-copies{shapes['copies']}" if shapes["copies"] > 1 else ""
    return Path(shapes["folder"]) / ("{image_size}px-{train}-{val}-seed{seed}".format(**shapes) + copies)


def _pick(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: settings[name] for name in names}


def sources(train: Any) -> list[dict[str, Any]]:
    """`data.train` as a list of {"name", "shards", "weight"}; weight None means that the sources are simply
    joined.
    """
    if not train:
        raise ValueError(
            "data.train is not set: give a path, glob, brace pattern or URL of .tar shards, for example "
            "data.train='shards/*.tar'"
        )
    if isinstance(train, Mapping):
        train = [train]
    if isinstance(train, (str, Path)) or not any(isinstance(one, Mapping) for one in train):
        return [{"name": "train", "shards": train, "weight": None}]
    out = []
    for i, one in enumerate(train):
        if not isinstance(one, Mapping):
            one = {"shards": one}
        check_keys(one, ["name", "shards", "weight"], f"data.train[{i}]")
        weight = one.get("weight")
        if weight is not None and (
            isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight <= 0
        ):
            raise ValueError(
                f"data.train[{i}].weight is {weight!r}; expected a number above 0, or leave it out"
            )
        out.append({"name": one.get("name", f"source{i}"), "shards": one.get("shards"), "weight": weight})
    weighted = sum(one["weight"] is not None for one in out)
    if 0 < weighted < len(out):
        raise ValueError(
            "some entries of data.train have a weight and others none: give all a weight (mixed by weight) "
            "or "
            "none (every sample once an epoch)"
        )
    names = [one["name"] for one in out]
    if len(set(names)) < len(names):
        raise ValueError(f"the names of data.train's sources repeat: {names}")
    return out


def cache_folder(spec: Mapping[str, Any]) -> Path:
    """Where indexes and fetched shards are kept: data.cache_dir, $CLIPKIT_CACHE, or ~/.cache/clipkit."""
    if spec.get("cache_dir"):
        permit(spec["cache_dir"], "data.cache_dir")
    chosen = spec.get("cache_dir") or os.environ.get("CLIPKIT_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "clipkit"


def train_captions(spec: Mapping[str, Any]) -> Iterator[str]:
    """Every training caption once, in file order, for building a vocabulary."""
    from clipkit.data.table import iter_training_captions

    full = resolve_data(spec)
    train = full["train"]
    if full["kind"] in KINDS:
        train = _joined(train, gaps=full["on_bad_shard"] == "skip")
    return iter_training_captions(full, train, cache_folder(full))


def _joined(train: Any, *, gaps: bool) -> list[str]:
    from clipkit.data.urls import Expanded, expand_shards

    return Expanded(
        path
        for source in sources(train)
        for path in expand_shards(source["shards"] or [], what="data.train", gaps=gaps)
    )


def plain(value: Any) -> Any:
    """Lists and dictionaries of any kind as plain ones."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return value
