"""A run's folder: config.yaml, metrics.jsonl, checkpoints/, summary.json; what tells a finished run from one
to resume.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from clipkit.files import write_json, write_text
from clipkit.settings import differences, experiment

# sysexits' EX_TEMPFAIL: a run that was asked to stop, with everything saved; the same command goes on.
STOPPED = 75


def open_run(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make or enter a run's folder; the summary if the run in it is finished, else None.

    Raises:
        ValueError: the folder holds a run of other settings, or holds one and `resume=false`.
        OSError: the folder cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"the run folder {run_dir} cannot be made ({error}); give output_dir= a folder you can write"
        ) from error
    if not os.access(run_dir, os.W_OK):
        raise OSError(f"the run folder {run_dir} cannot be written; give output_dir= a folder you can write")
    record = run_dir / "config.yaml"
    if record.exists():
        if not config["resume"]:
            raise ValueError(
                f"{run_dir} holds a run and resume=false: give name=ANOTHER, or delete the folder"
            )
        check_unchanged(run_dir, config)
        if (found := read_summary(run_dir)).get("finished"):
            return found
    else:
        write_text(record, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    return None


def check_unchanged(run_dir: Path, config: Mapping[str, Any]) -> None:
    """ValueError when the run in a folder has other settings than these, those of its execution apart."""
    before = yaml.safe_load((run_dir / "config.yaml").read_text("utf-8"))
    # A top-level setting that the record lacks came with a later version of clipkit.
    now = {key: value for key, value in config.items() if key in before}
    changed = [
        f"{key}: {old!r} -> {new!r}" for key, old, new in differences(experiment(before), experiment(now))
    ]
    if changed:
        raise ValueError(
            f"{run_dir} holds a run of other settings ({'; '.join(changed[:5])}): give name=ANOTHER to train "
            "beside it, or delete the folder"
        )


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, or an empty dict where no run has ended."""
    summary = run_dir / "summary.json"
    return json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}


def write_summary(run_dir: Path, **entries: Any) -> None:
    """summary.json: final metrics, samples seen, skip counts by cause, wall-clock, versions."""
    versions = {"python": platform.python_version()}
    for package in ("clipkit", "torch", "timm", "open_clip_torch", "transformers", "webdataset"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    write_json(run_dir / "summary.json", {**entries, "versions": versions, "command": sys.argv})


def finish(
    run_dir: Path, steps: int, metrics: Mapping[str, float], reports: list[dict[str, Any]], *, seconds: float
) -> None:
    """Leave the summary that marks the run as finished, and print the final table.

    Args:
        reports: each rank's stream.report().
        seconds: of this session.
    """
    write_summary(
        run_dir,
        finished=True,
        step=steps,
        metrics=metrics,
        data=joined_reports(reports),
        seconds_this_session=round(seconds, 1),
    )
    scores = f"(fractions, 1 is perfect):\n{table(metrics)}" if metrics else "none: eval= names no task"
    print(f"\nFinal numbers after {steps} steps {scores}")
    print(f"Everything is in {run_dir}: metrics.jsonl, checkpoints/, summary.json")


def joined_reports(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' data reports as one: every rank counts all samples, but only the faults it met itself."""
    skipped: dict[str, int] = {}
    for report in reports:
        for cause, count in report["skipped"].items():
            skipped[cause] = skipped.get(cause, 0) + count
    return {**reports[0], "skipped": skipped}


def flatten(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """{task: {metric: value}} as {"task/metric": value}."""
    return {f"{task}/{name}": value for task, numbers in results.items() for name, value in numbers.items()}


def table(metrics: Mapping[str, float]) -> str:
    """The final table: a line a task and direction, its metrics side by side."""
    rows: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for name, value in metrics.items():
        task, _, metric = name.rpartition("/")
        direction = next((d for d in ("image_to_text", "text_to_image") if metric.startswith(d + "_")), "")
        rows.setdefault((task, direction), []).append((metric.removeprefix(direction + "_"), value))
    lines, header = [], None
    for (task, direction), cells in rows.items():
        names = [name for name, _ in cells]
        if names != header:
            lines.append(" " * 32 + "".join(f"{name:>16}" for name in names))
            header = names
        label = f"  {task} {direction.replace('_', ' ')}".rstrip()
        lines.append(f"{label:<32}" + "".join(f"{value:>16.4g}" for _, value in cells))
    return "\n".join(lines)


@contextmanager
def failure_recorded(run_dir: Path) -> Iterator[None]:
    """Leave an error in RUN/error.txt, so that a sweep's failed job can be read later; the next session
    removes it.

    Of several ranks' errors the first stays: the others' are that their peer has gone.
    """
    record = run_dir / "error.txt"
    if os.environ.get("RANK", "0") == "0":
        record.unlink(missing_ok=True)
    try:
        yield
    except Exception:
        try:
            with open(record, "x", encoding="utf-8") as file:
                file.write(traceback.format_exc())
        except OSError:
            pass
        raise
