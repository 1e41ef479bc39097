"""What every recipe shares of hydra: where configs and run folders are, and errors that say what to do.

Nothing here imports torch: the command line answers a TAB or a typo in a fraction of a second.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

import clipkit
from clipkit.registry import suggest

# Groups whose entries are named by the user (loss terms, evaluation tasks, loggers): their own factories check them.
FREE_GROUPS = ("loss", "eval", "logger", "data", "hydra")


def config_path() -> str:
    """hydra's name for conf/: the installed package, or the repository's folder when that shadows the package."""
    try:
        if importlib.util.find_spec("clipkit.conf") is not None:
            return "pkg://clipkit.conf"
    except ModuleNotFoundError:
        pass
    return str(Path(__file__).resolve().parent.parent / "conf")


def run_name(overrides: str) -> str:
    """A run folder's name from the overrides: the same command finds the same folder, and so resumes.

    Args:
        overrides: hydra's `override_dirname`, such as "experiment=quickstart,loss=cyclip,seed=1".
    """
    experiment = re.search(r"(?:^|,)experiment=([\w\-]+)", overrides)
    rest = re.sub(r"(?:^|,)experiment=[\w\-]+", "", overrides).strip(",")
    # No "=": the folder is to be given to hydra as checkpoint=FOLDER.
    slug = re.sub(r"[^\w.+]+", "-", rest).strip("-")[:60]
    # Raw overrides overflow a path's length, and two may share a slug: the hash tells them apart.
    name = f"{slug}-{hashlib.sha256(rest.encode()).hexdigest()[:6]}" if rest else "default"
    return f"{experiment.group(1) if experiment else 'quickstart'}/{name}"


def run(task: Callable[[DictConfig, Path], Any], config_name: str) -> Any:
    """Run `task(cfg, run_dir)` under hydra with the command line's overrides; exits with 1 and a message on an error."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    # hydra's own report hides the cause and suggests nothing: let errors reach us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    full = "CLIPKIT_TRACEBACK" in os.environ

    def job(cfg: DictConfig) -> Any:
        check_overrides(cfg, config_name)
        return task(cfg, Path(HydraConfig.get().runtime.output_dir))

    try:
        return hydra.main(version_base="1.3", config_path=config_path(), config_name=config_name)(job)()
    except KeyboardInterrupt:
        raise
    except (HydraException, ValueError, RuntimeError, OSError) as error:
        if full:
            raise
        message = explain(error, config_name)
        print(f"\nError: {message}", file=sys.stderr)
        if isinstance(error, RuntimeError) and not _ours(error):
            traceback.print_exc()
        print("(CLIPKIT_TRACEBACK=1 shows where it was raised.)", file=sys.stderr)
        sys.exit(1)


def _ours(error: BaseException) -> bool:
    """Whether clipkit raised it, with a message written for the user; one of torch's needs its traceback."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return any(folder in raised_in.parents for folder in (Path(__file__).resolve().parent, Path(clipkit.__file__).resolve().parent))


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
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and "output_dir=" not in text:
        # hydra makes the run folder before anything of ours runs.
        return f"{text}; give output_dir= a folder you can write"
    missing = re.search(r"Could not (?:find|load) '([\w/]+)/([\w\-]+)'", text)
    if missing:
        return _unknown_choice(missing.group(1), missing.group(2), config_name)
    override = re.search(r"Could not override '([\w.@/\-]+)'", text) or re.search(r"full_key: ([\w.]+)", text)
    if isinstance(error, ConfigCompositionException) and override:
        return _unknown_key(override.group(1), config_name)
    return text


def _loader() -> Any:
    return GlobalHydra.instance().config_loader()


def _with_loader(config_name: str) -> Any:
    """hydra's config loader, also after a failed composition has torn hydra down."""
    if GlobalHydra.instance().is_initialized():
        return _loader()
    path = config_path()
    if path.startswith("pkg://"):
        hydra.initialize_config_module(path[len("pkg://"):], version_base="1.3")
    else:
        hydra.initialize_config_dir(path, version_base="1.3")
    return _loader()


def _unknown_choice(group: str, name: str, config_name: str) -> str:
    options = sorted(_with_loader(config_name).get_group_options(group))
    return f"unknown {group} {name!r}.{suggest(name, options)} Valid names: {', '.join(options)}."


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    # The resolvers `hydra:` and `run_name:` are not evaluated here, only keys and types are looked at.
    return _with_loader(config_name).load_configuration(
        config_name=config_name, overrides=overrides, run_mode=RunMode.RUN)


def _is_group(key: str, config_name: str) -> bool:
    return bool(_with_loader(config_name).get_group_options(key.lstrip("+~").split("@")[0]))


def _group_choices(overrides: list[str], config_name: str) -> list[str]:
    """The overrides that choose files of a group, such as `loss=[cyclip,simcse]`: they decide which keys exist."""
    return [entry for entry in overrides if _is_group(entry.split("=")[0], config_name)]


def _unknown_key(key: str, config_name: str) -> str:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = [entry for entry in sys.argv[1:] if "=" in entry and not entry.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(_group_choices(given, config_name))
        # A sweep's comma lists are not choices; their files all hold the same keys.
        choices = [entry.input_line for entry in parsed if not entry.is_sweep_override()]
        reference = _compose(config_name, choices)
    except HydraException:
        reference = _compose(config_name, [])
    parts = key.split(".")
    node: Any = reference
    for depth, part in enumerate(parts):
        if not isinstance(node, DictConfig) or part not in node:
            valid = sorted(str(name) for name in node if name != "hydra") if isinstance(node, DictConfig) else []
            where = ".".join(parts[:depth]) or "the config"
            return f"unknown key {key!r}: {where} has no {part!r}.{suggest(part, valid)} Valid keys: {', '.join(valid)}."
        node = node[part]
    return f"{key!r} cannot be set that way: it holds {OmegaConf.to_container(node) if OmegaConf.is_config(node) else node!r}"


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, raw value) of every leaf, interpolations unresolved."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
        for key in node:
            child = node._get_node(key)
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def check_overrides(cfg: DictConfig, config_name: str) -> None:
    """Refuse an override whose type differs from the YAML's, or that adds a key nobody reads.

    YAML alone takes `optim.lr=abc`, and a `+` takes any key. The reference is the same config composed from the group
    choices alone, so a key and its type stand in one place, the YAML file.
    """
    given = list(HydraConfig.get().overrides.task)
    for entry in given:
        group, _, value = entry.partition("=")
        other = next((e.partition("=")[2] for e in given if e.startswith(group[1:] + "=")), None)
        if group.startswith("+") and other is not None:
            # hydra would drop one of the two without a word.
            both = ",".join([other.strip("[]"), value.strip("[]")])
            raise ValueError(f"{entry} beside {group[1:]}={other}: only one would count; give {group[1:]}=[{both}]")
    reference = dict(_leaves(_compose(config_name, _group_choices(given, config_name))))
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
        if not _fits(wanted, got):
            raise ValueError(
                f"{key}={got!r} is {_kind(got)}, but {key} takes {_kind(wanted)} (its default is {wanted!r})")


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
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping"}
    return names.get(type(value), type(value).__name__)
