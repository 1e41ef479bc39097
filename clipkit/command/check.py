"""A command line's overrides checked before anything is built, and hydra's errors made to say what to do.

hydra's own errors suggest nothing, and YAML alone takes what nobody reads. Nothing here imports torch.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from typing import Any

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf

from clipkit.command.compose import compose, fixed, loader
from clipkit.command.values import SETTINGS
from clipkit.registry import suggest

# Groups whose entries are named by the user (loss terms, evaluation tasks, loggers): their own factories
# check them.
FREE_GROUPS = ("loss", "eval", "logger", "data", "hydra")
# What brings a choice of hydra/launcher or hydra/sweeper that hydra itself does not have.
PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    # The sweeper asks for Optuna 2, whose storage is written for SQLAlchemy 1.
    "optuna": "hydra-optuna-sweeper 'sqlalchemy<2'",
}


def explain(error: BaseException, config_name: str) -> str:
    """An error's text, with hydra's improved by the nearest match and the valid names."""
    chain = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            group, _, name = link.missing_cfg_file.rpartition("/")
            return _unknown_choice(group, name.removesuffix(".yaml"), config_name)
    text = str(error)
    if (
        isinstance(error, OSError)
        and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        and "output_dir=" not in text
    ):
        # hydra makes the run folder before anything of ours runs.
        return f"{text}; give output_dir= a folder you can write"
    missing = re.search(r"Could not (?:find|load) '([\w/]+)/([\w\-]+)'", text)
    if missing:
        return _unknown_choice(missing.group(1), missing.group(2), config_name)
    override = re.search(r"Could not override '([\w.@/\-]+)'", text) or re.search(r"full_key: ([\w.]+)", text)
    if isinstance(error, ConfigCompositionException) and override:
        return _unknown_key(override.group(1), config_name)
    return text


def _unknown_choice(group: str, name: str, config_name: str) -> str:
    options = sorted(loader().get_group_options(group))
    if name in PLUGINS and name not in options:
        return f"{group}={name} needs a plugin that is not installed: pip install 'clipkit[sweep]', or pip install {PLUGINS[name]}"
    return f"unknown {group} {name!r}.{suggest(name, options)} Valid names: {', '.join(options)}."


def _unknown_key(key: str, config_name: str) -> str:
    given = [entry for entry in sys.argv[1:] if "=" in entry and not entry.startswith("-")]
    try:
        # A sweep's comma lists are not choices; their files all hold the same keys.
        reference = compose(config_name, fixed(_group_choices(given, config_name)))
    except HydraException:
        reference = compose(config_name, [])
    parts = key.split(".")
    node: Any = reference
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            valid = (
                sorted(str(name) for name in node if name != "hydra") if isinstance(node, DictConfig) else []
            )
            where = ".".join(parts[:depth]) or "the config"
            return f"unknown key {key!r}: {where} has no {part!r}.{suggest(part, valid)} Valid keys: {', '.join(valid)}."
        node = node[part]
    return f"{key!r} cannot be set that way: it holds {OmegaConf.to_container(node) if OmegaConf.is_config(node) else node!r}"


def _is_group(key: str, config_name: str) -> bool:
    return bool(loader().get_group_options(key.lstrip("+~").split("@")[0]))


def _group_choices(overrides: list[str], config_name: str) -> list[str]:
    """The overrides that choose files of a group, such as `loss=[cyclip,simcse]`: they decide which keys
    exist.
    """
    return [entry for entry in overrides if _is_group(entry.split("=")[0], config_name)]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, raw value) of every leaf, interpolations unresolved."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        for key in node:
            child = node._get_node(key)
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def check_overrides(cfg: DictConfig, config_name: str, given: list[str]) -> None:
    """Refuse an override whose type differs from the YAML's, or that adds a key nobody reads.

    YAML alone takes `optim.lr=abc`, and a `+` takes any key. The reference is the same config composed from
    the group choices alone, so a key and its type stand in one place, the YAML file.

    Args:
        cfg: composed with the overrides `given`.
    """
    for entry in given:
        group, _, value = entry.partition("=")
        other = next((e.partition("=")[2] for e in given if e.startswith(group[1:] + "=")), None)
        if group.startswith("+") and other is not None:
            # hydra would drop one of the two without a word.
            both = ",".join([other.strip("[]"), value.strip("[]")])
            raise ValueError(
                f"{entry} beside {group[1:]}={other}: only one would count; give {group[1:]}=[{both}]"
            )
    reference = dict(_leaves(compose(config_name, _group_choices(given, config_name))))
    for key, node in _leaves(cfg):
        if key.split(".")[0] in FREE_GROUPS:
            continue
        if key not in reference:
            # A dict that is null or empty in the YAML is the user's to fill.
            parents = [key.rsplit(".", depth)[0] for depth in range(1, key.count(".") + 1)]
            if not any(parent in reference for parent in parents):
                raise ValueError(_unknown_key(key, config_name))
            continue
        wanted, got = _raw(reference[key]), _raw(node)
        kind = SETTINGS.get(config_name, {}).get(key)
        # A setting may be of several kinds, such as image_tower.freeze, a number or `all`.
        if not _fits(wanted, got) and not (kind and kind.holds(got)):
            raise ValueError(
                f"{key}={got!r} is {_kind(got)}, but {key} takes {_kind(wanted)} (its default is {wanted!r})"
            )


def _raw(node: Any) -> Any:
    if isinstance(node, ListConfig):
        return OmegaConf.to_container(node)
    return node._value() if hasattr(node, "_value") else node


def _fits(wanted: Any, got: Any) -> bool:
    interpolated = isinstance(wanted, str) and "${" in wanted or isinstance(got, str) and "${" in got
    if wanted is None or got is None or interpolated or wanted == "???":
        return True
    if isinstance(wanted, bool) or isinstance(got, bool):
        return isinstance(wanted, bool) and isinstance(got, bool)
    if isinstance(wanted, float):
        return isinstance(got, (int, float))
    return isinstance(got, type(wanted))


def _kind(value: Any) -> str:
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), type(value).__name__)
