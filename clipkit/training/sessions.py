"""Which code a session of a run was started from: RUN/sessions.jsonl, a JSON line a session, and RUN/git*.diff.

git is asked for the commit and for what differs from it, of the working directory's repository and of clipkit's own.
A repository may be somebody else's: nothing that its settings name is run (hooks, filters, diff and credential programs,
a file system monitor), nothing is fetched, and git has seconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import clipkit
from clipkit.distributed import world_size
from clipkit.files import append_line, write_bytes
from clipkit.foreign import BrokenFile, read_bytes

SESSIONS = "sessions.jsonl"
# Of one diff, and of what git is waited for.
_DIFF_BYTES, _SECONDS = 1_000_000, 10.0
_ELSEWHERE = (
    "GIT_DIR",
    "GIT_WORK_TREE",
    "GIT_INDEX_FILE",
    "GIT_OBJECT_DIRECTORY",
    "GIT_COMMON_DIR",
    "GIT_PREFIX",
)
_ENVIRONMENT = {
    "LC_ALL": "C",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_ALLOW_PROTOCOL": "none",
}


def begin_session(run_dir: Path, step: int, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Put a session that goes on after `step` on record, with the code it runs.

    Returns:
        {"step", "time", "ranks", "versions", "code"}, where "code" is {"working_directory": {"commit", "branch", "dirty",
        "diff": the file in the run folder}, "clipkit": ...} for those that lie in a repository, without the text of the
        diffs. What cannot be written is said.
    """
    session: dict[str, Any] = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "ranks": world_size(),
        "versions": {name: found for name in ("clipkit", "torch") if (found := _version(name))},
        "code": {},
    }
    try:
        for name, (entry, diff) in code_state().items():
            if diff:
                entry["diff"] = _keep(run_dir, name, step, diff)
            session["code"][name] = entry
        append_line(run_dir / SESSIONS, json.dumps(session))
    except OSError as error:
        say(f"warning: the code that this session runs is not on record: {error}")
    return session


def code_state() -> dict[str, tuple[dict[str, Any], bytes]]:
    """{"working_directory" | "clipkit": ({"commit", "branch", "dirty"}, diff)}, of those that lie in a git repository.

    clipkit is not named where it lies in the working directory's repository, or in one that does not track it, as one
    that is installed. The diff is against the commit, of tracked files alone, and cut at a million bytes; "dirty" is None
    where git took too long to tell. A repository without a commit counts as none.
    """
    found = {}
    here, package = _repository(Path.cwd()), Path(clipkit.__file__).resolve().parent
    if here:
        found["working_directory"] = _state(Path.cwd(), here)
    own = _repository(package)
    if (
        own
        and (not here or own["top"] != here["top"])
        and _git(package, "ls-files", "--error-unmatch", "__init__.py")
    ):
        found["clipkit"] = _state(package, own)
    return found


def _repository(folder: Path) -> dict[str, str] | None:
    """The repository that a folder lies in: its uppermost folder, its commit and branch ("HEAD": none)."""
    found = _git(folder, "rev-parse", "--show-toplevel", "HEAD", "--abbrev-ref", "HEAD")
    lines = found.decode("utf-8", "replace").splitlines() if found else []
    return dict(zip(("top", "commit", "branch"), lines, strict=True)) if len(lines) == 3 else None


def _state(folder: Path, repository: Mapping[str, str]) -> tuple[dict[str, Any], bytes]:
    entry = {"commit": repository["commit"], "branch": repository["branch"]}
    # A content filter is a program; one whose name a command line cannot carry leaves the diff out.
    filters = _git(
        folder,
        "config",
        "-z",
        "--name-only",
        "--get-regexp",
        r"^filter\..*\.(clean|smudge|process|required)$",
    )
    names = (filters or b"").decode("utf-8", "surrogateescape").split("\0")[:-1]
    if any("=" in name for name in names):
        return {**entry, "dirty": None}, b""
    off = [
        part for name in names for part in ("-c", f"{name}={'false' if name.endswith('required') else ''}")
    ]
    options = ("--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=all")
    diff = _git(folder, *off, "diff", *options, "--src-prefix=a/", "--dst-prefix=b/", "HEAD", "--")
    return {**entry, "dirty": None if diff is None else bool(diff)}, diff or b""


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git prints, cut at a million bytes; None where there is no git, or it fails or takes too long."""
    safe = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    # What leads git to another repository is of a hook that this process was started from.
    environment = {key: value for key, value in os.environ.items() if key not in _ELSEWHERE} | _ENVIRONMENT
    try:
        process = subprocess.Popen(
            ["git", "--no-pager", *safe, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError:
        return None
    end = threading.Timer(_SECONDS, _end, (process.pid,))
    end.start()
    with process:
        assert process.stdout is not None
        output = process.stdout.read(_DIFF_BYTES + 1)
        end.cancel()
        if cut := len(output) > _DIFF_BYTES:
            _end(process.pid)
    if cut:
        return output[:_DIFF_BYTES] + b"\n(cut here)\n"
    return output if process.returncode == 0 else None


def _end(pid: int) -> None:
    """git and what it has started, which have not been waited for."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _keep(run_dir: Path, name: str, step: int, diff: bytes) -> str:
    """The file that holds a diff: an earlier session's of the same content, or a new one."""
    stem = "git" if name == "working_directory" else f"git_{name}"
    for path in sorted(run_dir.glob(f"{stem}.diff")) + sorted(run_dir.glob(f"{stem}_step_*.diff")):
        with contextlib.suppress(BrokenFile, OSError):
            if read_bytes(path, limit=2 * _DIFF_BYTES) == diff:
                return path.name
    # What the folder holds for this step is of a session that came no further.
    new = run_dir / (f"{stem}_step_{step:08d}.diff" if step else f"{stem}.diff")
    write_bytes(new, diff)
    return new.name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
