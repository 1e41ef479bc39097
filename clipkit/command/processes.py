"""A sweep whose jobs are processes of their own: planned, started, watched, and told to stop.

A job that is killed, or crashes in native code, ends itself and no other. Torch is not imported.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import clipkit.recipes
from clipkit.command import jobs
from clipkit.command.check import check_overrides
from clipkit.command.compose import compose, is_hydras, resolved
from clipkit.command.values import check_values
from clipkit.foreign import read_text
from clipkit.training import run_folder

LOG = "output.log"


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options about how jobs are run."""
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        help="ranks of each job, started by torchrun (default: %(default)s)",
    )
    parser.add_argument("--parallel", type=positive, default=1, help="jobs at a time (default: %(default)s)")
    parser.add_argument("--config-dir", metavar="FOLDER", help="settings of your own, as of clipkit-pretrain")
    parser.add_argument(
        "--threads", type=positive, help="CPU threads of each process (default: torch's own choice)"
    )


def positive(text: str) -> int:
    """argparse's type of a count."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def job_folder(config_name: str, overrides: list[str]) -> Path:
    """The run folder that these overrides have, all of them checked.

    Raises:
        ValueError: a mistake that the command itself would refuse, an override of hydra's own settings, or a
            finished run of other settings in that folder: a YAML file has changed.
        hydra.errors.HydraException: one that hydra refuses.
    """
    own = [entry for entry in overrides if is_hydras(entry)]
    if own:
        raise ValueError(
            f"{own[0]}: the jobs of this command are its own processes; launchers and sweepers are for "
            f"clipkit-{config_name} -m"
        )
    cfg = compose(config_name, overrides)
    check_overrides(cfg, config_name, overrides)
    folder = Path(os.path.abspath(cfg.hydra.run.dir))
    config = resolved(cfg, config_name)
    check_values(config, config_name)
    if finished(folder):
        run_folder.check_unchanged(folder, config)
    return folder


def plan(overrides: Sequence[list[str]], *, threads: int | None = None) -> list[jobs.Job]:
    """The jobs with their run folders; a mistake in any one is an error before the first starts.

    Raises:
        ValueError: what clipkit-pretrain would refuse, an override of hydra's own, or two jobs that are one
            run.
    """
    planned: list[jobs.Job] = []
    for entries in overrides:
        if threads:
            entries = [*entries, f"num_threads={threads}"]
        folder = job_folder("pretrain", entries)
        twin = next((job for job in planned if job.run_dir == str(folder)), None)
        if twin:
            raise ValueError(
                f"two jobs would be one run, in {folder}: {' '.join(twin.overrides)}, and {' '.join(entries)}. "
                "Give name=..., or leave one out"
            )
        planned.append(jobs.Job(list(entries), jobs.WAITING, str(folder)))
    return planned


@dataclass
class Running:
    """A job's process and its log, which is locked for as long as any process of the job lives."""

    job: jobs.Job
    process: subprocess.Popen
    log: IO[bytes]
    began: float
    told: bool = False


def run_all(
    planned: list[jobs.Job],
    *,
    processes: int = 1,
    parallel: int = 1,
    threads: int | None = None,
    config_dir: str | None = None,
) -> jobs.Outcome:
    """Run every job that is not finished, `parallel` at a time; says which began, finished or failed.

    SIGINT and SIGTERM are passed on to the jobs, and no other begins.
    """
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: signals.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    waiting, running, told = list(planned), [], 0
    try:
        while running or waiting and not signals:
            while waiting and len(running) < parallel and not signals:
                job = waiting.pop(0)
                label = f"[{planned.index(job) + 1}/{len(planned)}] {jobs.distinct(job, planned)}"
                started = start(job, label, processes, threads, config_dir)
                running += [started] if started else []
            if len(signals) > told:
                told = len(signals)
                say(f"{signal.Signals(signals[-1]).name}: {len(running)} jobs are told to save and stop")
                for one in running:
                    one.told = True
                    # A second Ctrl-C does not wait for the save; a scheduler's second SIGTERM does.
                    one.process.send_signal(signals[-1] if told > 1 else signal.SIGTERM)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                close(one, f"[{planned.index(one.job) + 1}/{len(planned)}]")
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    command = ["clipkit-sweep", "--processes", str(processes)] if processes > 1 else ["clipkit-pretrain"]
    command += ["--config-dir", config_dir] if config_dir else []
    return jobs.Outcome(planned, command, signalled=bool(signals))


def start(
    job: jobs.Job, label: str, processes: int, threads: int | None, config_dir: str | None
) -> Running | None:
    """Start a job's process; None where there is nothing to do, or another process is at it."""
    folder = Path(job.run_dir)
    if finished(folder):
        job.state = jobs.FINISHED
        say(f"{label}: is finished already")
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / LOG, "ab", opener=_in_place)
    except OSError as error:
        job.state, job.error = jobs.FAILED, f"its run folder cannot be written: {error}"
        say(f"{label}: {job.error}")
        return None
    try:
        # The job inherits the lock: one whose sweep was killed still holds it.
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.close()
        job.state, job.error = (
            jobs.FAILED,
            "another process is training in this folder; wait for it, or stop it",
        )
        say(f"{label}: {job.error}")
        return None
    (folder / "error.txt").unlink(missing_ok=True)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    program = Path(clipkit.recipes.__file__).resolve().parent / "pretrain.py"
    # A session of its own: a terminal's Ctrl-C reaches it through the sweep alone, once.
    process = subprocess.Popen(
        [*command, str(program), *(["--config-dir", config_dir] if config_dir else []), *job.overrides],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    job.state = jobs.RUNNING
    say(f"{label}: began, output in {folder / LOG}")
    return Running(job, process, log, time.monotonic())


def close(one: Running, label: str) -> None:
    """Read from its run folder and exit status how a job ended."""
    one.log.close()
    folder, status, seconds = Path(one.job.run_dir), one.process.returncode, time.monotonic() - one.began
    error = folder / "error.txt"
    if os.path.lexists(error):
        one.job.state, one.job.error = jobs.FAILED, _last_line(error)
    elif status == 0 and finished(folder):
        one.job.state = jobs.FINISHED
    elif status == run_folder.STOPPED or one.told:
        # torchrun has a status of its own for ranks that were told to stop, and so has a job that had not
        # begun to train.
        one.job.state = jobs.STOPPED_EARLY
    else:
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        one.job.state, one.job.error = (
            jobs.FAILED,
            f"{how}; its last words: {last_lines(folder / LOG, 1) or 'none'}",
        )
    say(
        f"{label} {one.job.state} after {seconds:.0f} s"
        + ("" if one.job.state == jobs.FINISHED else f": {one.job.reason}")
    )


def finished(folder: Path) -> bool:
    """Whether a run folder's run is finished."""
    return bool(run_folder.read_summary(folder).get("finished"))


def _in_place(path: str, flags: int) -> int:
    """open's opener: a link is not followed, and a FIFO is an error rather than a wait for its reader."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _last_line(error: Path) -> str:
    """What a job's error.txt says at its end."""
    try:
        lines = read_text(error).strip().splitlines()
    except (ValueError, OSError) as problem:
        return str(problem)
    return lines[-1] if lines else f"{error} is empty"


def last_lines(path: Path, count: int) -> str:
    """The last lines of a log that say anything, within its last 64 KiB."""
    try:
        with open(path, "rb", opener=_in_place) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - (64 << 10)))
            text = file.read(64 << 10).decode("utf-8", errors="replace")
    except OSError as error:
        return str(error)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def say(text: str) -> None:
    """One line about the sweep, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
