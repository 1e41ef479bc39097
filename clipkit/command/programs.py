"""One run of a program or a sweep of them under hydra: compose, check, then import the program and call it.

A program is a function of recipes/ that takes its settings as plain values. Nothing here imports torch before a job
starts: the command line answers a TAB or a typo in a fraction of a second.
"""

from __future__ import annotations

import importlib
import math
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

import clipkit
from clipkit.command import jobs, plugins
from clipkit.command.check import check_overrides, explain
from clipkit.command.compose import (
    CONFIG_PATH,
    check_config_dir,
    compose,
    fixed,
    is_hydras,
    register_resolvers,
    resolved,
    start_hydra,
)
from clipkit.command.experiments import LEFT_OUT
from clipkit.command.launch import adopt_slurm
from clipkit.command.listing import ls
from clipkit.command.unread import unread
from clipkit.command.values import check_values
from clipkit.registry import unknown
from clipkit.training import run_folder

# Errors whose text is for the user; any other is a fault of ours, and comes with its traceback.
REPORTED = (HydraException, ValueError, RuntimeError, OSError)


def run(program: str) -> None:
    """Run a program with the command line's overrides; exits with 1 and a message on an error.

    With `-m` it runs every job of the sweep, and ends with their comparison and with the list of those that failed.

    Args:
        program: the name of a module of recipes/, of the function in it, and of its settings, conf/PROGRAM.yaml.
    """
    register_resolvers()
    # hydra's own report hides the cause and suggests nothing: let errors reach us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sweep = None
    try:
        if "--version" in sys.argv[1:]:
            # The parser would print hydra's and leave.
            print(f"clipkit {clipkit.__version__}")
            return
        given = get_args_parser().parse_args(sys.argv[1:])
        check_config_dir(given.config_dir)
        if given.overrides[:1] == ["ls"]:
            print(ls(program, given.overrides[1:], given.config_dir))
            return
        plugins.search(plugins.given(given.overrides))
        if given.cfg == "job" and given.resolve:
            # hydra's own would resolve before the paths of generated data are in place.
            start_hydra(given.config_dir)
            print(yaml.safe_dump(resolved(compose(program, given.overrides), program), sort_keys=False))
            return
        adopt_slurm()
        if given.multirun:
            sweep = Sweep.from_command_line(program)
        job = JobFunction(program, sweep.records if sweep else None)
        hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name=program)(job)()
    except (KeyboardInterrupt, SystemExit) as stopped:
        if sweep and not (isinstance(stopped, SystemExit) and stopped.code in (0, None)):
            sweep.end("a signal", signalled=True)
        if isinstance(stopped, KeyboardInterrupt) and "CLIPKIT_TRACEBACK" not in os.environ:
            print("\nInterrupted", file=sys.stderr)
            # The shell's status of a process that SIGINT has ended.
            sys.exit(130)
        raise
    except Exception as error:
        if sweep and sweep.records.read():
            sweep.end(explain(error, program))
        _fail(error, program)
    if sweep:
        sweep.end()


def _fail(error: Exception, program: str) -> NoReturn:
    """Exit with 1 and the error's text; one that is not for the user is raised as it is."""
    if "CLIPKIT_TRACEBACK" in os.environ or not isinstance(error, REPORTED):
        raise error
    print(f"\nError: {explain(error, program)}", file=sys.stderr)
    if isinstance(error, RuntimeError) and not _ours(error):
        traceback.print_exception(error)
    print("(CLIPKIT_TRACEBACK=1 shows where it was raised.)", file=sys.stderr)
    sys.exit(1)


@contextmanager
def reported(program: str) -> Iterator[None]:
    """For a command that is not hydra's but takes its overrides: an error inside is told as `run` tells it."""
    register_resolvers()
    try:
        yield
    except Exception as error:
        _fail(error, program)


def _ours(error: BaseException) -> bool:
    """Whether clipkit raised it, with a message written for the user; one of torch's needs its traceback."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    package = Path(clipkit.__file__).parent
    return any(folder.resolve() in raised_in.parents for folder in (package, package / "recipes"))


class JobFunction:
    """What hydra calls with each job's config, here or, pickled, in a launcher's other processes.

    Args:
        program: as for `run`.
        records: of a sweep, where every job leaves its state; None for a single run.
    """

    def __init__(self, program: str, records: jobs.Records | None):
        self.program, self.records, self.process = program, records, os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # In a fresh process the run folder's name is resolved before the job is called, but after it is unpickled.
        register_resolvers()

    def __call__(self, cfg: DictConfig) -> Any:
        context = HydraConfig.get()
        run_dir, overrides = Path(context.runtime.output_dir), list(context.overrides.task)
        if self.records is None:
            try:
                return self._call(cfg, run_dir, overrides)
            except Exception as error:
                # Here, for hydra would print the overrides first.
                _fail(error, self.program)
        recorded = jobs.recorded(self.records, overrides, run_dir, lambda error: explain(error, self.program))
        mine = os.getpid() == self.process
        try:
            with _handlers_kept(), recorded, run_folder.failure_recorded(run_dir):
                value = objective_value(self._call(cfg, run_dir, overrides), cfg.get("objective"))
        except jobs.Stopped:
            # A signal here tells the sweep to stop; in a worker, or when its minutes are up, it is this job alone.
            if mine and _signalled():
                sys.exit(run_folder.STOPPED)
            raise
        if mine and _signalled():
            # It came too late to stop this job; it stops the sweep.
            sys.exit(run_folder.STOPPED)
        return value

    def _call(self, cfg: DictConfig, run_dir: Path, overrides: list[str]) -> Any:
        """Check the settings, then import the program, and torch with it."""
        if os.environ.get("RANK", "0") == "0":
            for line in HydraConfig.get().runtime.choices.get(LEFT_OUT, []):
                print(f"experiment {line}", flush=True)
        check_overrides(cfg, self.program, overrides)
        check_objective(cfg)
        config = resolved(cfg, self.program)
        check_values(config, self.program)
        if self.program == "pretrain" and os.environ.get("RANK", "0") == "0":
            for line in unread(config, overrides):
                print(f"warning: {line}", flush=True)
        plugins.load(config.get("plugins") or [])
        function = getattr(importlib.import_module(f"clipkit.recipes.{self.program}"), self.program)
        if self.program == "pretrain":
            # It imports what the program does, torch among it.
            importlib.import_module("clipkit.training.names").check_names(config)
        return function(config, run_dir)


def _signalled() -> bool:
    """Whether a program in this process was asked to stop."""
    process = sys.modules.get("clipkit.training.process")
    return process is not None and process.StopRequest.received is not None


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Put the signals' handlers back after a job, whose own would swallow a Ctrl-C between two jobs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    def from_command_line(cls, program: str) -> Sweep:
        """Read sys.argv; ValueError under torchrun, and for a search without an objective."""
        given = get_args_parser().parse_args(sys.argv[1:])
        refuse_torchrun(given.overrides)
        loader = start_hydra(given.config_dir)
        cfg = compose(program, fixed(given.overrides), mode=RunMode.MULTIRUN)
        sweeper = cfg.hydra.runtime.choices["hydra/sweeper"]
        if sweeper != "basic" and "objective" in cfg:
            check_search(sweeper, cfg, given.overrides)
        own = [entry for entry in given.overrides if not is_hydras(entry)]
        planned = jobs.expand(own, loader) if sweeper == "basic" else []
        command = [f"clipkit-{program}"] + (["--config-dir", given.config_dir] if given.config_dir else [])
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
            "give objective=TASK/METRIC, such as objective=retrieval/text_to_image_R@1"
        )
    if sweeper == "optuna" and not any("hydra.sweeper.direction=" in entry for entry in overrides):
        raise ValueError(
            "hydra/sweeper=optuna minimises unless told otherwise: give hydra/sweeper=search, the same sweeper with defaults "
            f"for training, or hydra.sweeper.direction=maximize (or minimize) for {cfg.objective}"
        )


def refuse_torchrun(overrides: list[str]) -> None:
    """ValueError when this process is one of a torchrun's: its second job would meet the first one's store
    and hang.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1")
        raise ValueError(
            "-m under torchrun would run every job in one process group; let each job have its own:\n"
            f"    {shlex.join(['clipkit-sweep', '--processes', ranks, *overrides])}"
        )


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
