"""A run's folder: config.yaml, metrics.jsonl, checkpoints/, summary.json; what tells a finished run from one
to resume.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from clipkit.files import write_json, write_text
from clipkit.foreign import (
    BrokenFile,
    checked,
    read_json,
    read_json_lines,
    read_yaml,
    readable,
    redacted,
    shown,
)
from clipkit.registry import unknown
from clipkit.settings import AMENDABLE, LENGTH, differences, experiment, learnt

if TYPE_CHECKING:
    # It imports torch.
    from clipkit.sources import Report

# sysexits' EX_TEMPFAIL: a run that was asked to stop, with everything saved; the same command goes on.
STOPPED = 75
# What `amend` changed, a JSON line a change.
HISTORY = "history.jsonl"
# Which weights a run began with: loaded, resized, new, and left in the source.
START = "init_from.json"


# A record without these was not written whole.
_ALWAYS = {"seed", "batch_size", "data", "image_tower", "text_tower", "loss", "optim"}


def open_run(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Enter a run's folder, which is there; the summary if the run in it is finished, else None.

    Raises:
        ValueError: the folder holds a run of other settings, or one whose settings cannot be read, or holds one and
            `resume=false`.
        OSError: the folder cannot be written.
    """
    if not os.access(run_dir, os.W_OK):
        raise OSError(f"the run folder {run_dir} cannot be written; give output_dir= a folder you can write")
    for part in run_dir.iterdir():
        # Writing through one would change files elsewhere; a folder from somebody else may hold one.
        if part.is_symlink():
            raise ValueError(
                f"{part} is a link: a run folder's own files are written in it alone. To keep runs on another disk, "
                "give output_dir= a folder there"
            )
    record = run_dir / "config.yaml"
    if record.exists():
        if not config["resume"]:
            raise ValueError(
                f"{run_dir} holds a run and resume=false: give name=ANOTHER, or delete the folder"
            )
        check_unchanged(run_dir, config)
        found = read_summary(run_dir)
        if found.get("finished") and not _made_longer(run_dir, config, found):
            return found
    else:
        write_text(record, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    return None


def check_unchanged(run_dir: Path, config: Mapping[str, Any]) -> None:
    """ValueError when the run in a folder learns something else than these settings say.

    How it is carried out may differ. So may where its data lies and how long it is, which is said: what the data is, and at
    which rates the steps were taken, stands in the checkpoints.
    """
    before = recorded_settings(run_dir)
    # A top-level setting that the record lacks came with a later version of clipkit.
    now = {key: value for key, value in config.items() if key in before}
    changed = _changes(learnt(before), learnt(now))
    if changed:
        raise ValueError(
            f"{run_dir} holds a run of other settings ({'; '.join(changed[:5])}): give name=ANOTHER to train "
            "beside it, or delete the folder"
        )
    if moved := _changes(experiment(before), experiment(now)):
        print(f"{run_dir} goes on with {'; '.join(moved[:5])}", flush=True)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a user is told of settings that may be a stranger's: no credentials, nothing endless."""
    return [
        readable(redacted(f"{key}: {_short(old)} -> {_short(new)}"))
        for key, old, new in differences(before, now)
    ]


def _short(value: Any) -> str:
    text = redacted(repr(shown(value)))
    return text if len(text) <= 200 else text[:200] + "..."


def recorded_settings(run_dir: Path) -> dict[str, Any]:
    """config.yaml; where it is damaged, what the newest checkpoint says.

    Raises:
        ValueError: neither can be read.
    """
    record = run_dir / "config.yaml"
    try:
        found = read_yaml(record)
        if missing := sorted(_ALWAYS - found.keys()):
            raise BrokenFile(f"{record} has no {missing[0]}: it is cut short or altered")
        return found
    except (BrokenFile, OSError) as error:
        for checkpoint in sorted(run_dir.glob("checkpoints/step_*/config.json"), reverse=True):
            try:
                found = read_json(checkpoint)
            except (BrokenFile, OSError):
                continue
            if _ALWAYS <= found.keys():
                print(f"warning: {error}. The settings of {checkpoint} stand for it", file=sys.stderr)
                return found
        raise ValueError(
            f"{error}. No checkpoint says what the run's settings are either: give name=ANOTHER, or delete the folder"
        ) from None


def amended(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what was changed in earlier sessions of this run, and is changed in this one.

    That is by `amend`, or by another length than config.yaml says; all of this session's changes stand in the result's
    `amend`.

    Raises:
        ValueError: a setting that a run cannot change, or a value that it cannot have.
    """
    recorded = recorded_settings(run_dir)
    longer = {
        key: config[key]
        for key in LENGTH
        if key in config and key in recorded and config[key] != recorded[key]
    }
    told = {**longer, **(config["amend"] or {})}
    now = copy.deepcopy({**config, **{key: recorded[key] for key in longer}})
    for key, value in [*_amendments(run_dir).items(), *told.items()]:
        if key not in AMENDABLE:
            raise unknown("setting to amend in a run", key, AMENDABLE)
        *groups, name = key.split(".")
        place = now
        for group in groups:
            place = place[group]
        if name not in place:
            raise ValueError(f"amend names {key}, which this run has not")
        if not AMENDABLE[key].holds(value):
            raise ValueError(
                f"amend gives {key} the value {readable(repr(shown(value)))}: expected {AMENDABLE[key]}"
            )
        place[name] = value
        # A run's length is told in one of the two.
        if key in ("steps", "epochs") and value is not None:
            now["epochs" if key == "steps" else "steps"] = None
    return {**now, "amend": told or None}


def record_start(run_dir: Path, report: Report | None) -> None:
    """Print what a run's first weights are, and leave it in the run folder; nothing where they are all drawn."""
    if report is None or os.environ.get("RANK", "0") != "0":
        return
    write_json(run_dir / START, report.entries())
    print("\n".join(report.lines()), flush=True)


def _made_longer(run_dir: Path, config: Mapping[str, Any], summary: Mapping[str, Any]) -> bool:
    """Whether a run that has ended is now told another length than it had."""
    had = checked(
        summary.get("length", {}), dict[str, str | int | float | None], name=str(run_dir / "summary.json")
    )
    now, recorded = amended(run_dir, config), recorded_settings(run_dir)
    return any(now[key] != had.get(key, recorded.get(key, now[key])) for key in LENGTH if key in now)


def record_amendment(run_dir: Path, config: Mapping[str, Any], step: int) -> None:
    """Leave in history.jsonl from which step on `amend` holds, where that is not on record yet."""
    known = _amendments(run_dir)
    new = {
        key: value
        for key, value in (config["amend"] or {}).items()
        if key not in known or known[key] != value
    }
    if not new:
        return
    with (run_dir / HISTORY).open("a", encoding="utf-8") as file:
        file.write(
            json.dumps({"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "settings": new}) + "\n"
        )
        file.flush()
        os.fsync(file.fileno())
    print(f"from step {step} on: " + ", ".join(f"{key}={value}" for key, value in new.items()), flush=True)


def _amendments(run_dir: Path) -> dict[str, Any]:
    """What earlier sessions amended, the last value of each setting."""
    history, found = run_dir / HISTORY, {}
    for line in read_json_lines(history) if history.exists() else []:
        found |= checked(line.get("settings", {}), dict[str, Any], name=str(history))
    return found


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json; an empty dict where no run has ended, or where it cannot be read, which is said."""
    summary = run_dir / "summary.json"
    if not summary.exists():
        return {}
    try:
        found = read_json(summary)
        return {**found, "metrics": checked(found.get("metrics", {}), dict[str, float], name=str(summary))}
    except (BrokenFile, OSError) as error:
        print(f"warning: {error}. The run in it counts as unfinished", file=sys.stderr)
        return {}


def write_summary(run_dir: Path, **entries: Any) -> None:
    """summary.json: final metrics, samples seen, skip counts by cause, wall-clock, versions."""
    write_json(run_dir / "summary.json", {**entries, "versions": versions(), "command": sys.argv})


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for package in ("clipkit", "torch", "timm", "open_clip_torch", "transformers", "webdataset"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def finish(
    run_dir: Path,
    steps: int,
    metrics: Mapping[str, float],
    reports: list[dict[str, Any]],
    *,
    length: Mapping[str, Any],
    seconds: float,
    skipped_steps: Sequence[int] = (),
) -> None:
    """Leave the summary that marks the run as finished, and print the final table.

    Args:
        reports: each rank's stream.report().
        length: the settings that said so (clipkit.settings.LENGTH): told others, the run goes on.
        seconds: of this session.
        skipped_steps: that were left out because they were not finite.
    """
    write_summary(
        run_dir,
        finished=True,
        step=steps,
        length=dict(length),
        metrics=metrics,
        data=joined_reports(reports),
        seconds_this_session=round(seconds, 1),
        **({"skipped_steps": list(skipped_steps)} if skipped_steps else {}),
    )
    scores = f"(fractions, 1 is perfect):\n{table(metrics)}" if metrics else "none: eval= names no task"
    print(f"\nFinal numbers after {steps} steps {scores}")
    print(f"Everything is in {run_dir}: metrics.jsonl, checkpoints/, summary.json")


def show_finished(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Print what a run that is finished already has come to."""
    print(f"{run_dir} is finished; give name=ANOTHER to train again beside it. Its final numbers:")
    print(table(summary["metrics"]))


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
