"""What every recipe shares of hydra: where configs and run folders are, and errors that say what to do.

Nothing here imports torch: the command line answers a TAB or a typo in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf

import clipkit
from clipkit.recipes import jobs, run_folder, session
from clipkit.registry import suggest, unknown

# Groups whose entries are named by the user (loss terms, evaluation tasks, loggers): their own factories check them.
FREE_GROUPS = ("loss", "eval", "logger", "data", "hydra")
# What brings a choice of hydra/launcher or hydra/sweeper that hydra itself does not have.
PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit_local": "hydra-submitit-launcher",
    "submitit_slurm": "hydra-submitit-launcher",
    # The sweeper asks for Optuna 2, whose storage is written for SQLAlchemy 1.
    "optuna": "hydra-optuna-sweeper 'sqlalchemy<2'",
}
# Errors whose text is for the user; any other is a fault of ours, and comes with its traceback.
REPORTED = (HydraException, ValueError, RuntimeError, OSError)


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
    """Run `task(cfg, run_dir)` under hydra with the command line's overrides; exits with 1 and a message on an error.

    With `-m` it runs every job of the sweep, and ends with their comparison and with the list of those that failed.
    """
    register_resolvers()
    # hydra's own report hides the cause and suggests nothing: let errors reach us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sweep = None
    try:
        if {"-m", "--multirun"} & set(sys.argv[1:]):
            sweep = Sweep.from_command_line(config_name)
        function = JobFunction(task, config_name, sweep.records if sweep else None)
        hydra.main(version_base="1.3", config_path=config_path(), config_name=config_name)(function)()
    except (KeyboardInterrupt, SystemExit) as stopped:
        if sweep and not (isinstance(stopped, SystemExit) and stopped.code in (0, None)):
            sweep.end("a signal", signalled=True)
        raise
    except Exception as error:
        if sweep and sweep.records.read():
            sweep.end(explain(error, config_name))
        _fail(error, config_name)
    if sweep:
        sweep.end()


def _fail(error: Exception, config_name: str) -> None:
    """Exit with 1 and the error's text; one that is not for the user is raised as it is."""
    if "CLIPKIT_TRACEBACK" in os.environ or not isinstance(error, REPORTED):
        raise error
    print(f"\nError: {explain(error, config_name)}", file=sys.stderr)
    if isinstance(error, RuntimeError) and not _ours(error):
        traceback.print_exception(error)
    print("(CLIPKIT_TRACEBACK=1 shows where it was raised.)", file=sys.stderr)
    sys.exit(1)


@contextmanager
def reported(config_name: str) -> Iterator[None]:
    """For a command that is not hydra's but takes its overrides: an error inside is told as `run` tells it."""
    register_resolvers()
    try:
        yield
    except Exception as error:
        _fail(error, config_name)


def job_folder(config_name: str, overrides: list[str]) -> Path:
    """The run folder that these overrides have, all of them checked.

    Raises:
        ValueError: a mistake that the command itself would refuse, or an override of hydra's own settings.
        hydra.errors.HydraException: one that hydra refuses.
    """
    own = [entry for entry in overrides if entry.lstrip("+~").startswith(("hydra.", "hydra/"))]
    if own:
        raise ValueError(f"{own[0]}: the jobs of this command are its own processes; launchers and sweepers are for clipkit-{config_name} -m")
    cfg = _compose(config_name, overrides)
    check_overrides(cfg, config_name, overrides)
    folder = Path(os.path.abspath(cfg.hydra.run.dir))
    if run_folder.read_summary(folder).get("finished"):
        check_unchanged(cfg, folder)
    return folder


def check_unchanged(cfg: DictConfig, folder: Path) -> None:
    """ValueError when a finished run was made from other settings than these overrides now give: a YAML file has changed.

    Settings that are null here, or read what is not known before the run, such as where generated data is, are not compared.
    """
    record = OmegaConf.load(folder / "config.yaml")
    changed = []
    for key, node in _leaves(cfg):
        # Drawn data is read from the shards it was written to.
        if key.split(".")[0] in ("hydra", *run_folder.FREE) or key == "data.kind" or OmegaConf.is_missing(cfg, key):
            continue
        new = OmegaConf.select(cfg, key, throw_on_resolution_failure=False)
        new = OmegaConf.to_container(new) if OmegaConf.is_config(new) else new
        old = OmegaConf.select(record, key)
        old = OmegaConf.to_container(old) if OmegaConf.is_config(old) else old
        if new is not None and new != {} and old != new:
            changed.append(f"{key}: {old!r} -> {new!r}")
    if changed:
        raise ValueError(
            f"{folder} holds a finished run of other settings ({'; '.join(changed[:5])}): give name=ANOTHER to train beside it, or "
            "delete the folder")


def register_resolvers() -> None:
    """What the YAML files call as `${name:...}`; each process of a launcher registers them anew."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)


class JobFunction:
    """What hydra calls with each job's config, here or, pickled, in a launcher's other processes.

    Args:
        task: called with the config and the run folder.
        records: of a sweep, where every job leaves its state; None for a single run.
    """

    def __init__(self, task: Callable[[DictConfig, Path], Any], config_name: str, records: jobs.Records | None):
        self.task, self.config_name, self.records, self.process = task, config_name, records, os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # In a fresh process the run folder's name is resolved before the job is called, but after it is unpickled.
        register_resolvers()

    def __call__(self, cfg: DictConfig) -> Any:
        context = HydraConfig.get()
        run_dir = Path(context.runtime.output_dir)
        overrides = list(context.overrides.task)
        if self.records is None:
            check_overrides(cfg, self.config_name, overrides)
            return self.task(cfg, run_dir)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with jobs.recorded(self.records, overrides, run_dir, lambda error: explain(error, self.config_name)), \
                    run_folder.failure_recorded(run_dir):
                check_overrides(cfg, self.config_name, overrides)
                check_objective(cfg)
                metrics = self.task(cfg, run_dir)
                value = objective_value(metrics, cfg.get("objective"))
        except jobs.Stopped:
            # Here it is the sweep that was told to stop; in a worker it is this job alone.
            if os.getpid() == self.process:
                sys.exit(session.STOPPED)
            raise
        finally:
            asked = session.StopRequest.received
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        if asked and os.getpid() == self.process:
            # It came too late to stop this job; it stops the sweep.
            sys.exit(session.STOPPED)
        return value


@dataclass
class Sweep:
    """A command line with `-m`.

    Attributes:
        planned: every job's overrides; empty where the sweeper makes them up as it goes.
        command: what repeats one job, given its overrides.
    """

    records: jobs.Records
    planned: list[list[str]]
    command: list[str]
    objective: str | None

    @classmethod
    def from_command_line(cls, config_name: str) -> Sweep:
        """Read sys.argv; ValueError under torchrun, and for a search without an objective."""
        from hydra._internal.utils import get_args_parser

        given = get_args_parser().parse_args(sys.argv[1:])
        refuse_torchrun(given.overrides)
        loader = start_hydra(given.config_dir)
        cfg = _compose(config_name, _fixed(given.overrides), mode=RunMode.MULTIRUN)
        sweeper = cfg.hydra.runtime.choices["hydra/sweeper"]
        if sweeper != "basic" and "objective" in cfg:
            check_search(sweeper, cfg, given.overrides)
        planned = jobs.expand(given.overrides, loader) if sweeper == "basic" else []
        command = [f"clipkit-{config_name}"] + (["--config-dir", given.config_dir] if given.config_dir else [])
        # hydra.main starts its own.
        GlobalHydra.instance().clear()
        return cls(jobs.Records.under(cfg.get("output_dir") or "."), planned, command, cfg.get("objective"))

    def end(self, trouble: str = "", *, signalled: bool = False) -> None:
        """Report, and exit with the sweep's status unless every job is finished.

        Args:
            trouble: what ended the sweep before its jobs.
            signalled: that was a signal.
        """
        outcome = jobs.Outcome(self.records.read(self.planned), self.command, signalled)
        outcome.report(self.objective)
        if trouble and all(job.state != jobs.FAILED for job in outcome.jobs):
            print(f"The sweep was ended by {trouble.strip().splitlines()[0]}", file=sys.stderr)
        self.records.remove()
        if outcome.status:
            sys.exit(outcome.status)


def check_search(sweeper: str, cfg: DictConfig, overrides: list[str]) -> None:
    """ValueError for a search that has no objective, or whose direction nobody chose."""
    if not cfg.objective:
        raise ValueError(
            f"hydra/sweeper={sweeper} looks for the settings with the best objective, and objective= is not given: "
            "give objective=TASK/METRIC, such as objective=retrieval/text_to_image_R@1")
    if sweeper == "optuna" and not any("hydra.sweeper.direction=" in entry for entry in overrides):
        raise ValueError(
            "hydra/sweeper=optuna minimises unless told otherwise: give hydra/sweeper=search, the same sweeper with defaults "
            f"for training, or hydra.sweeper.direction=maximize (or minimize) for {cfg.objective}")


def refuse_torchrun(overrides: list[str]) -> None:
    """ValueError when this process is one of a torchrun's: its second job would meet the first one's store and hang."""
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")
        raise ValueError(
            "-m under torchrun would run every job in one process group; let each job have its own:\n"
            f"    {shlex.join(['clipkit-sweep', '--processes', ranks, *overrides])}")


def check_objective(cfg: DictConfig) -> None:
    """ValueError before training when `objective` names no task of the evaluation."""
    wanted = cfg.get("objective")
    if wanted and wanted.split("/")[0] not in (cfg.get("eval") or {}):
        raise unknown("task of objective", wanted, [f"{task}/..." for task in cfg.get("eval") or {}])


def objective_value(metrics: Any, name: str | None) -> Any:
    """The one number a search maximises; without an objective, what the job returned."""
    if not name:
        return metrics
    if name not in metrics:
        raise unknown("objective", name, metrics)
    if not math.isfinite(metrics[name]):
        raise ValueError(f"the objective {name} is {metrics[name]}, which cannot be ranked")
    return metrics[name]


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
    return _loader() if GlobalHydra.instance().is_initialized() else start_hydra()


def start_hydra(config_dir: str | None = None) -> Any:
    """hydra's config loader over conf/, and over the user's `--config-dir` before it."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path

    path = create_config_search_path(config_path())
    if config_dir:
        path.prepend("command-line", f"file://{Path(config_dir).resolve()}")
    GlobalHydra.instance().clear()
    return Hydra.create_main_hydra2(task_name="clipkit", config_search_path=path).config_loader


def _fixed(overrides: list[str]) -> list[str]:
    """The overrides that are the same for every job of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [entry.input_line for entry in OverridesParser.create().parse_overrides(overrides) if not entry.is_sweep_override()]


def _unknown_choice(group: str, name: str, config_name: str) -> str:
    options = sorted(_with_loader(config_name).get_group_options(group))
    if name in PLUGINS and name not in options:
        return f"{group}={name} needs a plugin that is not installed: pip install 'clipkit[sweep]', or pip install {PLUGINS[name]}"
    return f"unknown {group} {name!r}.{suggest(name, options)} Valid names: {', '.join(options)}."


def _compose(config_name: str, overrides: list[str], mode: RunMode = RunMode.RUN) -> DictConfig:
    # The resolvers `hydra:` and `run_name:` are not evaluated here, only keys and types are looked at.
    return _with_loader(config_name).load_configuration(config_name=config_name, overrides=overrides, run_mode=mode)


def _is_group(key: str, config_name: str) -> bool:
    return bool(_with_loader(config_name).get_group_options(key.lstrip("+~").split("@")[0]))


def _group_choices(overrides: list[str], config_name: str) -> list[str]:
    """The overrides that choose files of a group, such as `loss=[cyclip,simcse]`: they decide which keys exist."""
    return [entry for entry in overrides if _is_group(entry.split("=")[0], config_name)]


def _unknown_key(key: str, config_name: str) -> str:
    given = [entry for entry in sys.argv[1:] if "=" in entry and not entry.startswith("-")]
    try:
        # A sweep's comma lists are not choices; their files all hold the same keys.
        reference = _compose(config_name, _fixed(_group_choices(given, config_name)))
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


def check_overrides(cfg: DictConfig, config_name: str, given: list[str]) -> None:
    """Refuse an override whose type differs from the YAML's, or that adds a key nobody reads.

    YAML alone takes `optim.lr=abc`, and a `+` takes any key. The reference is the same config composed from the group
    choices alone, so a key and its type stand in one place, the YAML file.

    Args:
        cfg: composed with the overrides `given`.
    """
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
