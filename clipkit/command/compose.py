"""Settings composed from conf/ and a command line's overrides by hydra, as plain values for a program.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError

import clipkit
from clipkit.command import experiments
from clipkit.data import locate_data
from clipkit.loggers import loggers, settings_of
from clipkit.settings import EXECUTION

# hydra's name for conf/, wherever clipkit is imported from.
CONFIG_PATH = "pkg://clipkit.conf"
# Settings of clipkit-pretrain that a program reads nothing of: they may name what is not there.
UNREAD = {"plan": ("eval", "logger")}


def run_name(overrides: str, output_dir: str | None = None) -> str:
    """A run folder's name from the overrides: the same command finds the same folder, and so resumes.

    Args:
        overrides: hydra's `override_dirname`, such as "experiment=quickstart,loss=cyclip,seed=1".
        output_dir: where the folder is looked for under the name that earlier versions gave it.
    """
    experiment = re.search(r"(?:^|,)experiment=([\w\-]+)", overrides)
    rest = re.sub(r"(?:^|,)experiment=[\w\-]+", "", overrides).strip(",")
    group = experiment.group(1) if experiment else "quickstart"
    if not rest:
        return f"{group}/default"
    # Two may share a readable part, and raw overrides overflow a path's length: the hash tells them apart.
    digest, whole = hashlib.sha256(rest.encode()).hexdigest()[:6], _slug(rest)
    earlier = f"{group}/{whole[:60]}-{digest}"
    if len(whole) <= 60 or (output_dir and (Path(output_dir) / earlier).is_dir()):
        return earlier
    return f"{group}/{_abridged(rest, 80 if whole.isascii() else 60)}-{digest}"


def _slug(text: str) -> str:
    # No "=": the folder is to be given to hydra as checkpoint=FOLDER.
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


def _abridged(overrides: str, limit: int) -> str:
    """Something of every override, in so many letters."""
    given = [part.partition("=") for part in re.split(r",(?=[+~]*[\w@./:\-]+=)", overrides)]
    lasts = [re.split(r"[./@]", key)[-1] for key, _, _ in given]
    parts = [
        (_slug(last if lasts.count(last) == 1 else key), _slug(value))
        for (key, _, value), last in zip(given, lasts, strict=True)
    ]
    sizes, room = [len(key) + 1 + len(value) for key, value in parts], limit - (len(parts) - 1)
    # The short ones whole, and the rest shared out among the long ones.
    width = max((w for w in range(limit + 1) if sum(min(size, w) for size in sizes) <= room), default=0)
    return "-".join(_cut(key, value, width) for key, value in parts)[:limit].strip("-.")


def _cut(key: str, value: str, width: int) -> str:
    """KEY-VALUE in so many letters: of the key the beginning, of a value that is longer both ends."""
    if len(value) + 3 <= width:
        return f"{key[: width - len(value) - 1].rstrip('._')}-{value}"
    key = key[: width // 4]
    room = width - len(key) - 3
    head = room // 3
    if head > 0:
        return f"{key}-{value[:head]}..{value[head - room :]}"
    # A few letters are the value's last.
    return value[max(0, len(value) - width) :]


def execution_settings() -> list[str]:
    """The keys that a run folder's name leaves out, each as a command line writes it."""
    return [*EXECUTION, *(f"logger.{name}.{key}" for name in loggers.names() for key in settings_of(name))]


def register_resolvers() -> None:
    """What the YAML files call as `${name:...}`, and how experiments count; each process of a launcher does it anew."""
    experiments.install()
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    OmegaConf.register_new_resolver("execution_settings", execution_settings, replace=True)


def check_config_dir(config_dir: str | None) -> None:
    """ValueError for a `--config-dir` that is not there, or has a file of the same name as one of clipkit's."""
    if config_dir is None:
        return
    if not Path(config_dir).is_dir():
        raise ValueError(f"--config-dir: there is no folder {config_dir}")
    check_no_clash(Path(config_dir))


def check_no_clash(folder: Path) -> None:
    """ValueError for a YAML file with the name of one of clipkit's: hydra would take one of the two without a word."""
    ours = Path(clipkit.__file__).parent / "conf"
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        if (ours / name).is_file():
            raise ValueError(
                f"{path} has the name of clipkit's own {name}: only one of the two would count. Give yours another name, "
                f"such as {name.with_stem('my_' + name.stem)}; it may start from ours by `defaults: [{name.stem}, _self_]`"
            )


def start_hydra(config_dir: str | None = None) -> Any:
    """hydra's config loader over conf/, and over the user's `--config-dir` beside it."""
    check_config_dir(config_dir)
    path = create_config_search_path(CONFIG_PATH)
    if config_dir:
        path.prepend("command-line", f"file://{Path(config_dir).resolve()}")
    GlobalHydra.instance().clear()
    return Hydra.create_main_hydra2(task_name="clipkit", config_search_path=path).config_loader


def loader() -> Any:
    """hydra's config loader, also after a failed composition has torn hydra down."""
    return (
        GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else start_hydra()
    )


def compose(config_name: str, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    """The config with these overrides, and hydra's own under `hydra`."""
    # The resolvers `hydra:` and `run_name:` are not evaluated here, only keys and types are looked at.
    return loader().load_configuration(config_name=config_name, overrides=overrides, run_mode=mode)


def resolved(cfg: DictConfig, config_name: str) -> dict[str, Any]:
    """The settings as plain values, interpolations replaced.

    Raises:
        ValueError: an interpolation of what is not there, such as the zero-shot set of data that has none.
    """
    with open_dict(cfg):
        if "data" in cfg:
            # Paths of generated data are known before it is drawn, so that `${data.val}` names real shards.
            cfg.data = locate_data(_plain(cfg.data))
        # An empty choice, such as eval=[], leaves its group out altogether.
        for group in ("loss", "eval", "logger"):
            if group in cfg or "data" in cfg:
                cfg[group] = cfg.get(group) or {}
        for group in ("hydra", *UNREAD.get(config_name, ())):
            cfg.pop(group, None)
    try:
        return _plain(cfg)
    except InterpolationResolutionError as error:
        raise ValueError(
            f"{error.full_key} reads a setting that is not there ({str(error).splitlines()[0]}). If this data "
            "has no such part, choose another eval= (eval=none for no evaluation)"
        ) from error


def _plain(cfg: DictConfig) -> dict[str, Any]:
    """The settings as plain dicts and lists, without interpolations."""
    return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))


def fixed(overrides: Sequence[str]) -> list[str]:
    """The overrides that are the same for every job of a sweep."""
    return [
        entry.input_line
        for entry in OverridesParser.create().parse_overrides(list(overrides))
        if entry.input_line is not None and not entry.is_sweep_override()
    ]


def is_hydras(override: str) -> bool:
    """Whether an override is of hydra's own settings, such as hydra/launcher=joblib."""
    return override.lstrip("+~").startswith(("hydra.", "hydra/"))
