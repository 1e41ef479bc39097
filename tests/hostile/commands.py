"""The commands that are given a folder from somebody else, and what must hold after each, whatever is in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.make_corpus import KINDS, SECRET, SETTINGS, Place
from tests.hostile.measured import __file__ as MEASURED
from tests.processes import ROOT, Started, fork

# What one answer may take: processor's seconds, and megabytes above the idle command.
SECONDS, MEGABYTES = 10, 1024
# On a busy machine a process may wait for long.
PATIENCE = 120

# {command: its recipe, arguments with {run} for the folder, and what it may write besides the run folder}.
COMMANDS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "evaluate": ("evaluate.py", ["checkpoint={run}", "output_dir=records", "device=cpu"], ("records",)),
    "report": ("report.py", ["{run}", "--output", "page.html", "--queries", "2"], ("page.html",)),
    "predict": ("predict.py", ["embed", "{run}", "--texts", "captions.txt", "--output", "e.npy"], ("e.npy", "e.keys.json")),
    "export": ("export.py", ["checkpoint={run}", "output_dir=records"], ("records",)),
    "table": ("sweep.py", ["--table", "{run}", "--output", "table"], ("table.md", "table.csv", "table.json", "table.html")),
    "resume": ("pretrain.py", [*SETTINGS, "hydra.run.dir={run}"], ()),
}  # fmt: skip


@dataclass
class Answer:
    """What a command did.

    Attributes:
        faults: what must not be, in words; empty when all is well.
    """

    status: int
    output: str
    taken: dict[str, float]
    faults: list[str]


def snapshot(place: Place) -> dict[str, str]:
    """Every file of a place with its size, time and content, but for the run folder's."""
    found = {}
    for folder, folders, files in os.walk(place.root):
        if Path(folder) == place.run:
            folders.clear()
            continue
        for name in [*folders, *files]:
            path = Path(folder, name)
            status = path.lstat()
            whole = path.is_file() and not path.is_symlink() and status.st_size < 1 << 20
            content = hashlib.sha256(path.read_bytes()).hexdigest() if whole else ""
            time_ns = 0 if path.is_dir() else status.st_mtime_ns
            found[str(path.relative_to(place.root))] = (
                f"{status.st_mode} {status.st_size * whole} {time_ns} {content}"
            )
    return found


def start(place: Place, kind: str, command: str) -> Started:
    recipe, arguments, _ = COMMANDS[command]
    cwd = place.root / KINDS[kind].cwd
    if command == "resume":
        (place.run / "summary.json").unlink(missing_ok=True)
    beside = [str(Path("runs", f"good-{i}")) for i in range(KINDS[kind].beside)]
    several = beside if command in ("report", "table") else []
    given = []
    for argument in arguments:
        given += [argument.format(run=KINDS[kind].named), *(several if argument == "{run}" else [])]
    record = place.root / "taken.json"
    environment = {
        "HOME": str(place.root / "home"),
        "CLIPKIT_CACHE": str(place.root / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    program = [str(record), str(2 * MEGABYTES), str(ROOT / "recipes" / recipe)]
    return fork(Path(MEASURED), *program, *given, env=environment, cwd=cwd)


def answer(place: Place, kind: str, command: str) -> Answer:
    """Run one command on one kind and look at what it left."""
    (place.root / "taken.json").unlink(missing_ok=True)
    (place.root / "cache").mkdir(exist_ok=True)
    if command == "predict":
        (place.root / KINDS[kind].cwd / "captions.txt").write_text("a red circle\ntwo blue squares\n")
    before = snapshot(place)
    started = start(place, kind, command)
    deadline = time.monotonic() + PATIENCE
    while started.status is None and time.monotonic() < deadline:
        time.sleep(0.02)
    faults = []
    if started.status is None:
        faults.append(f"no answer in {PATIENCE} s")
        started.kill()
    status, output = started.wait(), started.output
    record = place.root / "taken.json"
    taken = json.loads(record.read_text()) if record.exists() else {}
    record.unlink(missing_ok=True)
    faults += _status(status, output, place, kind, command)
    faults += _writing(before, snapshot(place), kind, command)
    faults += _secrets(output, place, kind, command)
    if not taken and status >= 0:
        faults.append("it left no record of what it took")
    if "ended" in taken or taken.get("grown_mb", 0) > MEGABYTES:
        faults.append(f"it grew by {taken['grown_mb']:.0f} MB")
    if taken.get("processor_s", 0) > SECONDS:
        faults.append(f"it took {taken['processor_s']:.1f} s of the processor")
    return Answer(status, output, taken, faults)


def _status(status: int, output: str, place: Place, kind: str, command: str) -> list[str]:
    faults = []
    wanted = KINDS[kind].aims.get(command)
    if status not in ((0, 1) if wanted is None else (wanted,)):
        how = signal.Signals(-status).name if status < 0 else status
        faults.append(f"status {how}, not {'0 or 1' if wanted is None else wanted}")
    if "Traceback" in output:
        faults.append("a traceback")
    told = (
        re.split(r"^Error: ", output, flags=re.MULTILINE)[-1]
        if re.search("^Error: ", output, re.MULTILINE)
        else ""
    )
    # A run that goes on has said where it is.
    where = output if command == "resume" else told
    named = KINDS[kind].named in where or "its checkpoint is damaged" in told
    if status == 1 and not (named and told and len(where) < 20_000):
        faults.append("no short message that names the folder or a file in it")
    if "weights_only=False" in output:
        faults.append("it advises to trust a pickle")
    if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", output):
        faults.append("control characters in its output")
    return faults


def _writing(before: dict[str, str], after: dict[str, str], kind: str, command: str) -> list[str]:
    """What was made or changed outside the run folder, the command's own output and the cache apart."""
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    mine = [f"{KINDS[kind].cwd}/{name}" for name in COMMANDS[command][2]] + [
        "cache",
        f"{KINDS[kind].cwd}/cache",
    ]
    if command == "resume":
        mine += ["work/data"]
    wrong = sorted(name for name in changed if not any(f"{name}/".startswith(f"{one}/") for one in mine))
    return [f"written outside: {', '.join(wrong[:3])}"] if wrong else []


def _secrets(output: str, place: Place, kind: str, command: str) -> list[str]:
    """Another file's text, or a command's result, in what was printed or written."""
    faults = ["a command was run"] if place.canary.exists() or (place.run / "canary").exists() else []
    if SECRET in output:
        faults.append("another file's text in its output")
    cwd = place.root / KINDS[kind].cwd
    made = [cwd / name for name in COMMANDS[command][2]] + [place.run / "evaluations", place.run / "export"]
    folders = [one for one in made if one.is_dir() and not one.is_symlink()]
    for path in [*made, *(file for one in folders for file in one.rglob("*"))]:
        with suppress(OSError):
            if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
                faults.append(f"another file's text in {path.name}")
    return faults


def listener() -> socket.socket:
    """A server that nothing may connect to."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    server.setblocking(False)
    return server


def connected(server: socket.socket) -> bool:
    with suppress(BlockingIOError):
        server.accept()[0].close()
        return True
    return False


def check_every_command(place: Place, kind: str) -> None:
    """All commands on one kind; the last one goes on with the run, and changes it."""
    faults = {}
    for command in COMMANDS:
        found = answer(place, kind, command)
        if found.faults:
            faults[command] = (found.faults, found.output[-2000:])
    assert not faults, faults
