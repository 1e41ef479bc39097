"""The recipe under torchrun, as a user starts it, and the processes of such a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.recipes.runs import ROOT


def torchrun(*overrides: str, ranks: int = 2) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
            str(ROOT / "recipes" / "pretrain.py"),
            *overrides,
        ],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(process: subprocess.Popen, text: str) -> str:
    """What was printed up to the line that holds `text`."""
    output = ""
    while text not in output:
        line = process.stdout.readline()
        assert line, f"it ended before it printed {text!r}:\n{output}"
        output += line
    return output


def descendants(root: int) -> list[int]:
    """Every process below one, parents before children: torchrun starts each rank in a session of its own."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    parents = dict(tuple(map(int, line.split())) for line in listed.splitlines())
    found = [root]
    for pid in found:
        found += sorted(child for child, parent in parents.items() if parent == pid)
    return found[1:]


def kill_tree(root: int) -> None:
    """SIGKILL to a process and all below it."""
    for pid in [root, *descendants(root)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
