"""Image and text encoders by name, behind one interface each.

`create_image_tower({"name": "timm", "model": "resnet50"}, embed_dim=1024)` takes a config group's dict as it
is: `name` is the registry name, the rest are that tower's settings. Three settings belong to every tower:
`freeze` (0, a number of blocks, or all), `lora` (clipkit.towers.lora) and `activation_checkpointing`; two more to every
image tower, `resize_mode` and `interpolation`: how its pictures are made. `init_from`, where a training program takes a
tower's weights from, is clipkit.sources' to read. timm, open_clip and transformers are imported by the towers that need
them, when one is created.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from clipkit.registry import Registry, check_keys, unknown

# These register the built-in names.
from clipkit.towers import hugging_face, image, text  # noqa: F401
from clipkit.towers.base import RESIZING, ImageTower, TextTower, Tower
from clipkit.towers.lora import NONE, add_lora
from clipkit.towers.registry import image_towers, register_image_tower, register_text_tower, text_towers


def list_image_towers() -> list[str]:
    """Names that create_image_tower knows."""
    return image_towers.names()


def list_text_towers() -> list[str]:
    """Names that create_text_tower knows."""
    return text_towers.names()


def create_image_tower(spec: Mapping[str, Any] | str, *, embed_dim: int) -> ImageTower:
    """The image tower `spec["name"]` with the other entries of `spec` as its settings.

    Raises ValueError for an unknown name or setting (with the nearest match and the valid ones).
    """
    return _create(image_towers, spec, {"embed_dim": embed_dim})


def create_text_tower(
    spec: Mapping[str, Any] | str,
    *,
    embed_dim: int,
    vocab_size: int,
    pad_id: int,
    eot_id: int,
    context_length: int | None = None,
) -> TextTower:
    """The text tower `spec["name"]` for a tokenizer's vocabulary, with the other entries of `spec` as its
    settings.

    Args:
        context_length: the tokenizer's; used where `spec` has none.

    Raises ValueError for an unknown name or setting, or for a vocabulary or length the tower cannot hold.
    """
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    if spec.get("context_length") is None:
        spec["context_length"] = context_length
        if context_length is None:
            raise ValueError("no context_length: set text_tower.context_length, in tokens (CLIP: 77)")
    given = {"embed_dim": embed_dim, "vocab_size": vocab_size, "pad_id": pad_id, "eot_id": eot_id}
    return _create(text_towers, spec, given)


def check_image_tower(spec: Mapping[str, Any] | str) -> None:
    """ValueError for what create_image_tower would refuse in `spec` by its names alone; nothing is built."""
    _check(image_towers, spec, ("embed_dim",))


def check_text_tower(spec: Mapping[str, Any] | str) -> None:
    """ValueError for what create_text_tower would refuse in `spec` by its names alone; nothing is built."""
    _check(text_towers, spec, ("embed_dim", "vocab_size", "pad_id", "eot_id", "context_length"))


def _check(
    registry: Registry, spec: Mapping[str, Any] | str, given: Iterable[str]
) -> tuple[str, Callable[..., Tower], dict[str, Any], list[str]]:
    """A tower's name, factory, own settings, and the settings that it takes."""
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    name: Any = settings.pop("name", None)
    factory: Callable[..., Tower] = registry.get(name)
    parameters = inspect.signature(factory).parameters
    given = set(given) - {"context_length"}
    valid = [key for key in parameters if key not in given]
    resizing = RESIZING if registry is image_towers else {}
    shared = ["freeze", "lora", "activation_checkpointing", "init_from", *resizing]
    check_keys(settings, [*valid, *shared], f"the {registry.what} {name!r}")
    for key in settings:
        default = parameters[key].default if key in parameters else None
        if (
            settings[key] is None
            and default not in (None, inspect.Parameter.empty)
            and key != "context_length"
        ):
            raise ValueError(
                f"{registry.what.replace(' ', '_')}.{key} is null: {name!r} needs a value (its default: {default})"
            )
    lora: Any = settings.get("lora") or {}
    check_keys(lora, NONE, f"{registry.what.replace(' ', '_')}.lora")
    if lora.get("rank") and settings.get("freeze"):
        raise ValueError(
            f"{registry.what.replace(' ', '_')}.freeze={settings['freeze']} beside lora.rank={lora['rank']}: adapters leave all of "
            "the tower's own weights as they are; leave freeze at 0"
        )
    for key, choices in resizing.items():
        if settings.get(key, choices[0]) not in choices:
            raise unknown(key, settings[key], choices)
    missing = [
        key
        for key in valid
        if parameters[key].default is inspect.Parameter.empty and key not in {*settings, "context_length"}
    ]
    if missing:
        raise ValueError(
            f"the {registry.what} {name!r} needs the setting {missing[0]!r}; its settings: {', '.join(valid)}"
        )
    check = getattr(factory, "check", None)
    if check:
        check(
            **{key: value for key, value in settings.items() if key not in (*resizing, "init_from", "lora")}
        )
    return name, factory, settings, valid


def _create(registry: Registry, spec: Mapping[str, Any] | str, given: dict[str, Any]) -> Any:
    name, factory, settings, valid = _check(registry, spec, given)
    freeze = settings.pop("freeze", 0)
    lora = {**NONE, **(settings.pop("lora", None) or {})}
    recompute = settings.pop("activation_checkpointing", False)
    if settings.pop("init_from", None) is not None:
        raise ValueError(
            f"a tower is made with random weights: load those of init_from into it by clipkit.sources, as "
            f"clipkit-pretrain does (the {registry.what} {name!r})"
        )
    resizing = {key: settings.pop(key) for key in RESIZING if key in settings and key not in valid}
    parameters = inspect.signature(factory).parameters
    tower = factory(**{key: value for key, value in given.items() if key in parameters}, **settings)
    defaults = {key: parameters[key].default for key in valid}
    tower.settings = {"name": name, **defaults, **settings}
    for key, value in resizing.items():
        setattr(tower, key, value)
    tower.freeze(0 if freeze is None else freeze)
    if lora["rank"]:
        add_lora(tower, **lora)
    if recompute:
        tower.set_activation_checkpointing()
    return tower


__all__ = [
    "ImageTower",
    "TextTower",
    "Tower",
    "check_image_tower",
    "check_text_tower",
    "create_image_tower",
    "create_text_tower",
    "list_image_towers",
    "list_text_towers",
    "register_image_tower",
    "register_text_tower",
]
