"""An experiment's settings for a group count while that group's choice is the experiment's own.

An experiment chooses `image_tower: timm` and sets `image_tower.model`. hydra merges its file last, so on
`image_tower=resnet50` the model would still be the experiment's, under the name resnet50. Here what it sets inside a group is
left out, and said, as soon as the group's choice is another one, wherever hydra composes: one run, `--cfg`, `-m`, a sweep's
processes. Nothing here imports torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ConfigDefault, GroupDefault, ResultDefault
from omegaconf import DictConfig, OmegaConf, open_dict

_FOLDER = "experiment/"
# Where hydra keeps a composition's choices, and this module what it has left out.
LEFT_OUT = "left_out"


def install() -> None:
    """Make hydra's loader compose so, in this process; once is enough, and twice does no harm."""
    if hasattr(ConfigLoaderImpl, "_clipkit"):
        return
    ConfigLoaderImpl._clipkit = True  # pyright: ignore[reportAttributeAccessIssue]
    compose, load = ConfigLoaderImpl._compose_config_from_defaults_list, ConfigLoaderImpl._load_single_config

    @functools.wraps(compose)
    def composing(self: Any, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        self._clipkit_left_out = left_out(defaults, repo)
        cfg = compose(self, defaults=defaults, repo=repo)
        if "hydra" in cfg:
            with open_dict(cfg.hydra.runtime.choices):
                cfg.hydra.runtime.choices[LEFT_OUT] = sentences(self._clipkit_left_out)
        return cfg

    @functools.wraps(load)
    def loading(self: Any, default: ResultDefault, repo: Any) -> Any:
        found = load(self, default=default, repo=repo)
        groups = self._clipkit_left_out.get(default.config_path, {})
        if groups:
            kept = {key: found.config._get_node(key) for key in found.config if key not in groups}
            found.config = OmegaConf.create(kept, flags=found.config._metadata.flags)
        return found

    ConfigLoaderImpl._compose_config_from_defaults_list = composing
    ConfigLoaderImpl._load_single_config = loading


def left_out(defaults: Sequence[ResultDefault], repo: Any) -> dict[str, dict[str, tuple[Any, list[str]]]]:
    """{an experiment's file: {group: (its own choice, the keys it sets there)}} of those that do not count."""
    chosen: dict[str, list[str]] = {}
    for default in defaults:
        group, slash, name = (default.config_path or "").rpartition("/")
        # A choice stands in the defaults of a main file; what a choice is made of stands in its own.
        if slash and _is_main(default.parent):
            chosen.setdefault(group, []).append(name)
    own = {
        parent: _choices(parent, repo)
        for parent in {default.parent for default in defaults}
        if _is_main(parent)
    }
    base = {group: names for choices in own.values() for group, names in choices.items()}
    found: dict[str, dict[str, tuple[Any, list[str]]]] = {}
    for default in defaults:
        path = default.config_path or ""
        if not path.startswith(_FOLDER):
            continue
        mine = {**base, **_choices(path, repo)}
        settings = repo.load_config(config_path=path).config
        for group in chosen:
            if group not in settings or not isinstance(settings._get_node(group), DictConfig):
                continue
            wanted = mine.get(group, [])
            if wanted != chosen[group] and not any("${" in name for name in wanted):
                keys = [str(key) for key in settings[group]]
                found.setdefault(path, {})[group] = (wanted, keys)
    return found


def sentences(found: dict[str, dict[str, tuple[Any, list[str]]]]) -> list[str]:
    """What is left out, a line a group."""
    return [
        f"{path.removeprefix(_FOLDER)} sets {', '.join(f'{group}.{key}' for key in keys)} for "
        f"{group}={'+'.join(own) or 'none'} alone: left out"
        for path, groups in found.items()
        for group, (own, keys) in groups.items()
    ]


def _is_main(path: str | None) -> bool:
    """Whether a file stands beside the groups, such as pretrain.yaml."""
    return bool(path) and "/" not in str(path) and not str(path).startswith(("_", "<"))


def _choices(path: str | None, repo: Any) -> dict[str, list[str]]:
    """{group: names} that a file chooses in its defaults list, and the files it is made of."""
    found: dict[str, list[str]] = {}
    loaded = repo.load_config(config_path=path)
    folder = str(path).rpartition("/")[0]
    entries = loaded.defaults_list if loaded is not None else []
    for entry in entries:
        if isinstance(entry, ConfigDefault) and entry.path and entry.path != "_self_":
            inner = (
                entry.path.lstrip("/") if entry.path.startswith("/") else f"{folder}/{entry.path}".lstrip("/")
            )
            found |= _choices(inner, repo)
    for entry in entries:
        if isinstance(entry, GroupDefault) and entry.group:
            names = entry.value if isinstance(entry.value, (list, tuple)) else [entry.value]
            found[entry.group.lstrip("/").partition("@")[0]] = [
                str(name) for name in names if name is not None
            ]
    return found
