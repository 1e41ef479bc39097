"""A command line's overrides: composed with conf/ by hydra, checked, and told apart from a run folder's.

Errors say what to do: hydra's own suggest nothing, and YAML alone takes what nobody reads. Nothing here
imports torch.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

from clipkit.recipes import run_folder
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


def config_path() -> str:
    """hydra's name for conf/: the installed package, or the repository's folder when that shadows the
    package.
    """
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


def register_resolvers() -> None:
    """What the YAML files call as `${name:...}`; each process of a launcher registers them anew."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def start_hydra(config_dir: str | None = None) -> Any:
    """hydra's config loader over conf/, and over the user's `--config-dir` before it."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path

    path = create_config_search_path(config_path())
    if config_dir:
        path.prepend("command-line", f"file://{Path(config_dir).resolve()}")
    GlobalHydra.instance().clear()
    return Hydra.create_main_hydra2(task_name="clipkit", config_search_path=path).config_loader


def _with_loader(config_name: str) -> Any:
    """hydra's config loader, also after a failed composition has torn hydra down."""
    return (
        GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else start_hydra()
    )


def compose(config_name: str, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """The config with these overrides, and hydra's own under `hydra`."""
    # The resolvers `hydra:` and `run_name:` are not evaluated here, only keys and types are looked at.
    return _with_loader(config_name).load_configuration(
        config_name=config_name, overrides=overrides, run_mode=mode
    )


def fixed(overrides: list[str]) -> list[str]:
    """The overrides that are the same for every job of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [
        entry.input_line
        for entry in OverridesParser.create().parse_overrides(overrides)
        if not entry.is_sweep_override()
    ]


def is_hydras(override: str) -> bool:
    """Whether an override is of hydra's own settings, such as hydra/launcher=joblib."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))


def job_folder(config_name: str, overrides: list[str]) -> Path:
    """The run folder that these overrides have, all of them checked.

    Raises:
        ValueError: a mistake that the command itself would refuse, or an override of hydra's own settings.
        hydra.errors.HydraException: one that hydra refuses.
    """
    own = [entry for entry in overrides if is_hydras(entry)]
    if own:
        raise ValueError(
            f"{own[0]}: the jobs of this command are its own processes; launchers and sweepers are for clipkit-{config_name} -m"
        )
    cfg = compose(config_name, overrides)
    check_overrides(cfg, config_name, overrides)
    folder = Path(os.path.abspath(cfg.hydra.run.dir))
    if run_folder.read_summary(folder).get("finished"):
        check_unchanged(cfg, folder)
    return folder


def check_unchanged(cfg: DictConfig, folder: Path) -> None:
    """ValueError when a finished run was made from other settings than these overrides now give: a YAML file
    has changed.

    Settings that are null here, or read what is not known before the run, such as where generated data is,
    are not compared.
    """
    record = OmegaConf.load(folder / "config.yaml")
    changed = []
    for key, _ in _leaves(cfg):
        # Drawn data is read from the shards it was written to.
        if (
            key.split(".")[0] in ("hydra", *run_folder.FREE)
            or key == "data.kind"
            or OmegaConf.is_missing(cfg, key)
        ):
            continue
        new = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        new = OmegaConf.to_container(new) if OmegaConf.is_config(new) else new
        # A setting that is younger than the run stands for what the run did.
        old = OmegaConf.select(record, key, default=new)
        old = OmegaConf.to_container(old) if OmegaConf.is_config(old) else old
        if new is not None and new != {} and old != new:
            changed.append(f"{key}: {old!r} -> {new!r}")
    if changed:
        raise ValueError(
            f"{folder} holds a finished run of other settings ({'; '.join(changed[:5])}): give name=ANOTHER to train beside it, or "
            "delete the folder"
        )


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
    options = sorted(_with_loader(config_name).get_group_options(group))
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
    return bool(_with_loader(config_name).get_group_options(key.lstrip("+~").split("@")[0]))


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
        if not _fits(wanted, got):
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
