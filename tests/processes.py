"""Processes that tests start. Each belongs to its test, which ends it and all it started, whatever happens.

`command` starts a program as a user does. `fork` starts it from a server that has imported everything once: a process
like any other (its own arguments, environment, session, signals and exit status) that is there in a tenth of a second
where the imports take eight. What a process prints goes to a file, so none waits for its reader.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

ROOT = Path(__file__).resolve().parent.parent
# Seconds for what should take a few: a machine may be slow, and every core busy.
PATIENCE = 600
# What marks a process, and every one that it starts, as this pytest process's own.
MARK, OWN = "CLIPKIT_STARTED_BY_TEST", uuid.uuid4().hex
PRELOADED = (
    "clipkit.command",
    "clipkit.evals",
    "clipkit.planner",
    "clipkit.recipes.pretrain",
    "tests.preloaded",
)

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(list(PRELOADED))
_started: list[Started] = []


class Started:
    """A started process: its status, and what it has printed.

    Args:
        process: a Popen or a multiprocessing Process.
        log: where its output goes.
    """

    def __init__(self, process: subprocess.Popen | multiprocessing.Process, log: Path):
        self.process, self.log, self.pid = process, log, process.pid
        _started.append(self)

    @property
    def status(self) -> int | None:
        """As Popen.returncode; None while it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", errors="replace")

    def wait(self) -> int:
        """Its status, once it has ended."""
        wait_until(lambda: self.status is not None, self)
        return self.status

    def finished(self, status: int | None = 0) -> str:
        """What it printed until it ended, with this status (None: any but 0)."""
        found = self.wait()
        assert found != 0 if status is None else found == status, f"status {found}:\n{self.output}"
        return self.output

    def wait_for(self, text: str) -> None:
        """Until it has printed `text`; fails when it ends without."""
        wait_until(lambda: text in self.output, self)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to it and to all below it, as when a machine goes down."""
        kill_tree(self.pid)
        self.wait()


def wait_until(happened, *while_running: Started) -> None:
    """Poll until `happened()`; fails when one of these ends before, or after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not happened():
        ended = [one for one in while_running if one.status is not None]
        # What it printed last may have come after the first look.
        if ended and not happened():
            raise AssertionError(f"it ended with status {ended[0].status} before that:\n{ended[0].output}")
        assert time.monotonic() < deadline, "".join(one.output for one in while_running)
        time.sleep(0.01)


def command(*arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Started:
    """Start `python ARGUMENTS...` as a user does, with these variables beside the environment's."""
    log = _new_log()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(env),
            cwd=cwd,
            start_new_session=True,
        )
    return Started(process, log)


def fork(
    program: Path, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Started:
    """Start `python PROGRAM ARGUMENTS...` from the server."""
    log = _new_log()
    given = (
        str(program),
        [str(argument) for argument in arguments],
        str(log),
        _environment(env),
        str(cwd or Path.cwd()),
    )
    process = _server.Process(target=_run, args=given)
    process.start()
    return Started(process, log)


def fork_ranks(world_size: int, program: Path, *arguments: str) -> list[Started]:
    """Start a program's ranks with the variables that torchrun gives them, but without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [
        fork(
            program,
            *arguments,
            env={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)},
        )
        for rank in range(world_size)
    ]


def launch(function: Callable[..., Any], world_size: int, *arguments: Any, **options: Any) -> list[Any]:
    """clipkit.distributed.launch, its ranks from the server. tests/test_distributed.py has them as users do."""
    # tests/conftest.py imports this module before it has set what torch reads when it is imported.
    from clipkit import distributed

    with mock.patch("torch.multiprocessing.get_context", return_value=_server):
        return distributed.launch(function, world_size, *arguments, **options)


def stop_server() -> None:
    """End the server that `fork` has started, so that its time counts as the test run's."""
    forkserver._forkserver._stop()


def _run(program: str, arguments: list[str], log: str, environment: dict[str, str], folder: str) -> None:
    """In the new process: become what `python PROGRAM ARGUMENTS...` would be."""
    os.setsid()
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    # DTensor's caches hold the mesh of FSDP2, and with it the group, as long as the process lives.
    if "parallel=fsdp" not in arguments:
        assert not gloo_threads(), f"they outlive the process group: {gloo_threads()}"


def gloo_threads() -> list[str]:
    """This process's threads that belong to a gloo process group; one that is there as Python ends may abort it."""
    names = []
    for task in Path("/proc/self/task").glob("*"):
        # One may end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append((task / "comm").read_text().strip())
    return [name for name in names if "gloo" in name]


def _new_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="clipkit-test-", suffix=".log")
    os.close(handle)
    return Path(name)


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(more or {}), MARK: OWN}


def children(pid: int) -> list[psutil.Process]:
    """The processes that a process has started itself."""
    return psutil.Process(pid).children()


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all below it: torchrun starts each rank in a session of its own."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


def end_started() -> None:
    """End what this test's processes have left: they themselves, and by their mark those that outlived them."""
    if not _started:
        return
    for one in _started:
        if one.status is None:
            kill_tree(one.pid)
        one.process.wait() if isinstance(one.process, subprocess.Popen) else one.process.join()
        one.log.unlink(missing_ok=True)
    _started.clear()
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == OWN:
                process.send_signal(signal.SIGKILL)
        except psutil.Error:
            # Gone, or another user's.
            pass
