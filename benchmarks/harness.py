"""What every benchmark here shares: times with their spread, peak memory, and a dated file that says what was
run.

On a CPU each candidate runs in a process of its own (`in_child`), since a process's peak memory is known only
as a whole; on CUDA in this one, where the allocator counts. Times are medians with the 20th and 80th
percentiles.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# A checkout's own package, installed or not.
sys.path.insert(0, str(ROOT))


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """(median, 20th percentile, 80th percentile), the nearest sample for the percentiles."""
    ordered = sorted(samples)
    at = lambda share: ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]
    return statistics.median(ordered), at(0.2), at(0.8)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_loss(
    loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor], *, repeats: int, warm_up: int = 1
) -> dict:
    """Seconds of forward, of backward and of both, and processor seconds of both, one number a repeat."""
    device = leaves[0].device
    samples: dict[str, list[float]] = {"forward": [], "backward": [], "both": [], "cpu": []}
    for step in range(warm_up + repeats):
        for leaf in leaves:
            leaf.grad = None
        used, start = time.process_time(), _clock(device)
        value = loss()
        middle = _clock(device)
        value.backward()
        end = _clock(device)
        if step >= warm_up:
            samples["forward"].append(middle - start)
            samples["backward"].append(end - middle)
            samples["both"].append(end - start)
            samples["cpu"].append(time.process_time() - used)
    return samples


class PeakMemory:
    """Bytes above what was held at the start, by the process (CPU, Linux) or by torch's allocator (CUDA)."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device)
        else:
            # "5" sets the high-water mark back to what is held now.
            Path("/proc/self/clear_refs").write_text("5")
            self.base = self._status("VmRSS")

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}: peak memory is read on Linux only")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        return self._status("VmHWM") - self.base


def in_child(script: str, job: dict[str, Any], *, timeout: float) -> dict[str, Any]:
    """The JSON line that `python SCRIPT --child JOB` prints last, or {"skipped": why}."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [sys.executable, script, "--child", json.dumps(job)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"over {timeout:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"skipped": f"exit {done.returncode}: {last}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def hardware(device: torch.device) -> str:
    """The kind of machine, never its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


def _allowed_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def header(device: torch.device) -> dict[str, str]:
    """Hardware, versions, commit and date, as the first lines of a result file state them."""
    try:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "CUDA": str(torch.version.cuda)}
    return {
        "Hardware": hardware(device),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Commit": commit or "not a git checkout",
        "Date": datetime.date.today().isoformat(),
        "Threads": f"{torch.get_num_threads()}, on {_allowed_cores()} of {os.cpu_count()} cores",
        "Load before": " ".join(f"{value:.1f}" for value in os.getloadavg()),
    }


def table(rows: list[dict[str, str]]) -> str:
    """Markdown; the columns are the first row's keys."""
    if not rows:
        return "(nothing was run)"
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(
    title: str,
    facts: dict[str, str],
    sections: list[tuple[str, str]],
    results: dict[str, Any],
    skipped: list[str],
    out: str | None,
) -> None:
    """Prints tables and one JSON line last; with `out`, writes the same as a result file.

    facts: `header(device)`, taken before anything was timed, so that it holds the load the run began under.
    """
    parts = [f"# {title}", "\n".join(f"- {name}: {value}" for name, value in facts.items())]
    parts += [f"## {name}\n\n{text}" for name, text in sections]
    parts.append(
        "## Not measured\n\n" + ("\n".join(f"- {line}" for line in skipped) or "- Nothing was left out.")
    )
    line = json.dumps({"title": title, **facts, "results": results, "skipped": skipped})
    text = "\n\n".join(parts)
    print(text + "\n\n" + line)
    if out:
        Path(out).write_text(text + f"\n\n```json\n{line}\n```\n")
