"""The jobs of a sweep: which there are, what each leaves on record, and the list at the end of what is still
to do.

A job of `-m` may run in another process or on another machine (hydra's launchers), die there, or take its
launcher with it. So each writes its state to a file beside the run folders, and what it did not write it did
not do. Torch is not imported.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from clipkit.files import write_json
from clipkit.foreign import read_json
from clipkit.reports.comparison import compare, text_tables
from clipkit.training.run_folder import STOPPED

FINISHED, FAILED, STOPPED_EARLY, RUNNING, WAITING = (
    "finished",
    "failed",
    "stopped",
    "left no result",
    "not started",
)
REASONS = {
    STOPPED_EARLY: "stopped by a signal or by max_minutes; it goes on from what it saved",
    RUNNING: "killed outright, with its launcher's other jobs perhaps, or still running elsewhere",
    WAITING: "not started",
}


@dataclass
class Job:
    """One job of a sweep.

    Attributes:
        overrides: what makes it another job than the others, such as ["loss=clip", "seed=1"].
        state: one of the names above.
        run_dir: its run folder, once it has one.
        error: its last error's message.
    """

    overrides: list[str]
    state: str = WAITING
    run_dir: str = ""
    error: str = ""

    @property
    def reason(self) -> str:
        """Why it is not finished, in one line."""
        return self.error.splitlines()[0] if self.error else REASONS.get(self.state, self.state)


class Stopped(RuntimeError):
    """A job of a sweep stopped before its end, and saved; raised instead of SystemExit, which would end its
    worker.
    """


def expand(overrides: Sequence[str], loader: Any = None) -> list[list[str]]:
    """Every job's overrides, as hydra's basic sweeper expands comma lists, `range(...)`, `choice(...)` and
    `glob(...)`.

    Raises:
        hydra.errors.HydraException: an override that cannot be parsed, or a search space such as
            `interval(...)`.
    """
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(job) for job in jobs]


def distinct(job: Job, among: Sequence[Job]) -> str:
    """A job's overrides without those that all have in common, which tell none apart."""
    shared = set.intersection(*[set(other.overrides) for other in among]) if len(among) > 1 else set()
    return " ".join(entry for entry in job.overrides if entry not in shared) or " ".join(job.overrides)


@dataclass
class Records:
    """Where the jobs of one sweep leave their states: a folder under the sweep's, a JSON file a job."""

    folder: Path

    @classmethod
    def under(cls, sweep_dir: str | Path) -> Records:
        """A new sweep's, beside its run folders, where a launcher's other machines reach it too."""
        return cls(Path(sweep_dir).resolve() / ".sweeps" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")

    def write(self, job: Job) -> None:
        """Record a job's state, whole or not at all."""
        name = f"{Path(job.run_dir).parent.name}-{Path(job.run_dir).name}.json"
        write_json(self.folder / name, asdict(job))

    def read(self, planned: Sequence[Sequence[str]] = ()) -> list[Job]:
        """Every job on record, in the order of the plan; a planned one that never began is among them.

        A record that cannot be read is said on standard error, and its job counts as one that never began.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                found.append(read_json(path, Job))
            except (ValueError, OSError) as error:
                print(f"left out of the sweep's list: {error}", file=sys.stderr)
        by_overrides = {tuple(job.overrides): job for job in found}
        wanted = [tuple(overrides) for overrides in planned]
        rest = [job for job in found if tuple(job.overrides) not in wanted]
        return [by_overrides.get(overrides, Job(list(overrides))) for overrides in wanted] + rest

    def remove(self) -> None:
        """Once told, the run folders say the same; a job that may still run elsewhere keeps its file's
        folder.
        """
        if all(job.state != RUNNING for job in self.read()):
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
                self.folder.parent.rmdir()


@contextmanager
def recorded(
    records: Records, overrides: Sequence[str], run_dir: Path, message: Callable[[Exception], str]
) -> Iterator[None]:
    """Run one job inside: its state is on record before, and after however it ends, unless it is killed
    outright.

    Args:
        message: makes an exception's text for the user.

    Raises:
        Stopped: the job was told to stop and exited by itself, with everything saved.
        RuntimeError: it called sys.exit with another status.
    """
    job = Job(list(overrides), RUNNING, str(run_dir))
    records.write(job)
    # The last session's error is not this one's.
    (run_dir / "error.txt").unlink(missing_ok=True)
    try:
        yield
    except SystemExit as stopped:
        if stopped.code == STOPPED:
            job.state = STOPPED_EARLY
            raise Stopped(REASONS[STOPPED_EARLY]) from stopped
        job.state, job.error = FAILED, f"the job exited with {stopped.code!r}"
        raise RuntimeError(job.error) from stopped
    except Exception as error:
        job.state, job.error = FAILED, message(error)
        print(f"\nError in {run_dir}: {job.error}\nThe sweep goes on.", file=sys.stderr, flush=True)
        raise
    except BaseException:
        job.state = STOPPED_EARLY
        raise
    else:
        job.state = FINISHED
    finally:
        records.write(job)


@dataclass
class Outcome:
    """How a sweep went; `report` prints it."""

    jobs: list[Job]
    # The command that repeats one job is `command` and its overrides.
    command: list[str] = field(default_factory=lambda: ["clipkit-pretrain"])
    # Whether the sweep itself was told to stop.
    signalled: bool = False

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs if job.state != FINISHED]

    @property
    def status(self) -> int:
        """The exit status: 0 for all finished, 75 when what is missing was told to stop or not begun since,
        else 1.
        """
        if not self.unfinished:
            return 0
        states = {job.state for job in self.unfinished}
        return (
            STOPPED
            if (self.signalled or STOPPED_EARLY in states) and states <= {STOPPED_EARLY, WAITING}
            else 1
        )

    def report(self, objective: str | None = None, *, compared: bool = True) -> None:
        """Print the comparison of the finished runs, then each job that is not finished, why, and how to
        repeat it.
        """
        if compared:
            self._compare(objective)
        done = len(self.jobs) - len(self.unfinished)
        print(f"\n{done} of {len(self.jobs)} jobs finished" + (":" if self.unfinished else "."))
        for job in self.unfinished:
            print(f"  {job.state}: {distinct(job, self.jobs)}")
            if job.state == WAITING:
                continue
            print(f"    {job.reason}")
            if job.state == FAILED and job.run_dir:
                print(f"    traceback: {Path(job.run_dir) / 'error.txt'}")
            print(f"    repeat: {shlex.join([*self.command, *job.overrides])}")
        if self.unfinished:
            print("The same sweep again does only what is missing.")

    def _compare(self, objective: str | None) -> None:
        folders = [Path(job.run_dir) for job in self.jobs if job.state == FINISHED and job.run_dir]
        folders = [folder for folder in folders if (folder / "metrics.jsonl").exists()]
        if len(folders) < 2:
            return
        try:
            tables = text_tables(compare(folders, order=objective))
        except ValueError as error:
            # The list of what is to do says more than a table would have.
            print(f"\nNo comparison: {error}", file=sys.stderr)
            return
        if tables:
            print(
                f"\nFinal numbers, mean ± sample standard deviation over n runs that differ by the seed alone:\n{tables}"
            )
