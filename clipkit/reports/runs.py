"""Run folders read back: their curves, their final numbers, and which of them differ by nothing but the seed.

A run folder may come from anybody. One that cannot be read is left out of what is made of the others, and says why
(`Run.problem`); what is read is bounded in names, points and characters, and every number is a float.
"""

from __future__ import annotations

import json
import math
import os
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from clipkit.foreign import (
    BrokenFile,
    checked,
    is_secret,
    iter_json_lines,
    leads_out,
    read_json,
    read_yaml,
    readable,
    redacted,
    shown,
)
from clipkit.reports.spread import deviation, mean
from clipkit.settings import experiment

# Of one run: its metrics, the characters of a metric's name, and the points of a curve.
METRICS, NAME, POINTS = 1000, 200, 2000
# Its settings, and the characters of their dotted names and values together.
SETTINGS, SETTINGS_TEXT = 20_000, 1 << 20
# Files and folders looked at below one path, and characters of a group's label.
ENTRIES, LABEL = 1_000_000, 160


class _Settings(TypedDict, total=False):
    """What reports read of config.yaml."""

    seed: int | None
    loss: dict[str, Any] | None
    eval: dict[str, dict[str, Any] | None] | None


class _Summary(TypedDict, total=False):
    """What reports read of summary.json."""

    finished: bool
    step: int
    seconds_this_session: float
    versions: dict[str, str]


class _Score(TypedDict, total=False):
    """What reports read of one metric in evaluation.json."""

    value: float
    n: int | None
    interval: list[float] | None
    chance: float | None


class _Evaluation(TypedDict, total=False):
    """What reports read of evaluation.json."""

    scores: dict[str, _Score]


class Curve:
    """A metric's finite values over the steps.

    Beyond POINTS points every second one is dropped, and from then on twice as many are passed over: what is kept
    depends on the place in the file alone, so the curves of equal runs keep the same steps. The last one is kept too.
    """

    def __init__(self) -> None:
        self._steps, self._values, self._seen, self._every = array("d"), array("d"), 0, 1
        self._last: tuple[float, float] | None = None

    def add(self, step: float, value: float) -> None:
        if math.isfinite(value):
            self._last = (step, value)
            if self._seen % self._every == 0:
                self._steps.append(step)
                self._values.append(value)
        self._seen += 1
        if len(self._steps) > POINTS:
            self._steps, self._values, self._every = self._steps[::2], self._values[::2], 2 * self._every

    def points(self) -> list[tuple[float, float]]:
        found = list(zip(self._steps, self._values, strict=True))
        return found + [self._last] if self._last and self._last not in found[-1:] else found


@dataclass
class Run:
    """One run folder.

    Attributes:
        config: config.yaml as plain values.
        curves: {metric: its values over the steps} of metrics.jsonl.
        final: {"task/metric": value} of the last evaluation; it may be inf or nan.
        summary: `finished`, `step`, `seconds_this_session` and `versions` of summary.json, or empty for a run that
            has not finished.
        scores: {"task/metric": items, interval and chance} of evaluation.json, as far as it has them.
        problem: why the folder could not be read, with its path; the rest is empty then.
        note: what of it was left out.
    """

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, _Score] = field(default_factory=dict)
    problem: str = ""
    note: str = ""

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of the lines that hold `name`, at most about POINTS of them."""
        return self.curves[name].points() if name in self.curves else []


@dataclass
class Group:
    """Runs of one experiment over several seeds."""

    label: str
    runs: list[Run]

    def spread(self, name: str) -> tuple[float, float | None, int] | None:
        """(mean, sample standard deviation or None for one run, number of runs) of a final metric; None
        without it.
        """
        values = [run.final[name] for run in self.runs if name in run.final]
        return (mean(values), deviation(values), len(values)) if values else None

    def about(self, name: str) -> _Score:
        """Items, interval and chance of a metric in the first run that has them."""
        return next((run.scores[name] for run in self.runs if name in run.scores), {})

    def mean_curve(self, name: str) -> list[tuple[float, float]]:
        """The runs' mean at every step that all of those with this metric have."""
        curves = [dict(curve) for run in self.runs if (curve := run.curve(name))]
        if not curves:
            return []
        steps = sorted(set.intersection(*[set(curve) for curve in curves]))
        return [(step, mean(curve[step] for curve in curves)) for step in steps]


def find_runs(paths: Sequence[str | Path], *, trust_paths: bool = False) -> list[Run]:
    """Every run folder at or below the paths, in path order; links to folders are not followed.

    A folder that cannot be read is among them with its `problem`, and said on standard error.

    Args:
        trust_paths: a run folder's files may be links that lead out of it.

    Raises:
        ValueError: a path that does not exist, or holds no run, or no run at all could be read.
    """
    runs: dict[str, Run] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"there is no folder {path}: give run folders, or folders that hold them")
        found = _run_folders(path)
        if not found:
            raise ValueError(f"no run under {path}: a run folder holds config.yaml and metrics.jsonl")
        for folder in found:
            if (real := os.path.realpath(folder)) not in runs:
                runs[real] = _read_or_tell(folder, trust_paths)
    if all(run.problem for run in runs.values()):
        problems = [run.problem for run in runs.values()]
        raise ValueError("no run could be read: " + "; ".join(problems[:5] + ["..."][: len(problems) > 5]))
    return list(runs.values())


def _run_folders(root: Path) -> list[Path]:
    found, waiting, seen = [], [root], 0
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    seen += 1
                    if seen > ENTRIES:
                        raise ValueError(
                            f"more than {ENTRIES} files below {root}: give the run folders themselves"
                        )
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(folder / entry.name)
                    elif entry.name == "metrics.jsonl":
                        found.append(folder)
        except OSError:
            # It may not be read, or is too deep for a path.
            continue
    return sorted(found)


def _read_or_tell(folder: Path, trust_paths: bool) -> Run:
    try:
        return read_run(folder, trust_paths=trust_paths)
    except (ValueError, OSError) as error:
        text = str(error) if str(folder) in str(error) else f"{folder}: {error}"
        problem = readable(redacted(text))
        print(f"left out: {problem}", file=sys.stderr)
        return Run(folder, problem=problem)


def read_run(folder: Path, *, trust_paths: bool = False) -> Run:
    """Read one run folder; lines that are cut short, and entries that are no numbers, are left out.

    Of very many metrics the first are kept, and `Run.note` says so.

    Args:
        trust_paths: as in `find_runs`.

    Raises:
        BrokenFile: a file of it that is not what it should be, or leads out of it.
        OSError: one that may not be read.
    """

    def own(name: str) -> Path | None:
        path = folder / name
        if not os.path.lexists(path):
            return None
        if leads_out(path, folder) and not trust_paths:
            raise BrokenFile(
                f"{path} is a link that leads out of the run folder: it was not read. Put a copy of the file there, "
                "or, for a report, give --trust-paths"
            )
        return path

    settings, ended = own("config.yaml"), own("summary.json")
    config = _plain(read_yaml(settings), str(settings)) if settings else {}
    if settings:
        checked(config, _Settings, name=str(settings))
    run = Run(folder, config=config)
    if ended:
        run.summary = read_json(ended, _Summary)
        run.summary["versions"] = {
            readable(name): readable(text)
            for name, text in list(run.summary.get("versions", {}).items())[:50]
        }
    _read_lines(run, own("metrics.jsonl") or folder / "metrics.jsonl")
    if about := own("evaluation.json"):
        run.scores = _scores(read_json(about, _Evaluation).get("scores", {}))
    return run


def _scores(given: Mapping[str, _Score]) -> dict[str, _Score]:
    """Those with finite numbers, of as many metrics as are shown; an interval has two ends."""
    found: dict[str, _Score] = {}
    for name, one in list(given.items())[:METRICS]:
        ends = one.get("interval") or [0.0, 0.0]
        chance = one.get("chance")
        if len(ends) == 2 and all(map(math.isfinite, (*ends, chance if chance is not None else 0.0))):
            found[readable(name)] = one
    return found


def _read_lines(run: Run, path: Path) -> None:
    names: dict[str, str] = {}
    for line in iter_json_lines(path):
        step = as_float(line.pop("step", None))
        if step is None or not math.isfinite(step):
            continue
        for key, entry in line.items():
            if (value := as_float(entry)) is None:
                continue
            name = names.get(key)
            if name is None:
                if len(names) >= METRICS or len(key) > NAME:
                    run.note = f"of {path} the first {METRICS} metrics are shown, whose names have up to {NAME} characters"
                    continue
                name = names[key] = readable(key)
                run.curves[name] = Curve()
            run.curves[name].add(step, value)
            if name.startswith("eval/"):
                run.final[name.removeprefix("eval/")] = value


def as_float(value: Any) -> float | None:
    """A JSON number as a float, inf for one that is too large; None for what is no number, as true is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _plain(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Settings as dicts with text keys, lists, texts, numbers, booleans and None.

    Raises:
        BrokenFile: written out, with what YAML's aliases repeat, they are more than anybody's settings are.
    """
    values = characters = 0

    def copied(value: Any, prefix: int) -> Any:
        nonlocal values, characters
        if isinstance(value, int) and value.bit_length() > 1024:
            raise BrokenFile(f"{name} holds a number of more than 300 digits")
        nested = isinstance(value, (Mapping, list, tuple, set))
        if not nested and not isinstance(value, (int, float)) and value is not None:
            value = readable(str(value))
        values, characters = values + 1, characters + prefix + (0 if nested else len(str(value)))
        if values > SETTINGS or characters > SETTINGS_TEXT:
            raise BrokenFile(f"{name} holds more than {SETTINGS} settings, or {SETTINGS_TEXT} characters")
        if isinstance(value, Mapping):
            return {
                (key := readable(str(one))): copied(item, prefix + len(key) + 1)
                for one, item in value.items()
            }
        return [copied(item, 0) for item in value] if isinstance(value, (list, tuple, set)) else value

    return copied(config, 0)


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Every final metric of any run, in the order of their first appearance; of very many the first METRICS."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.final)
    return list(names)[:METRICS]


def without_seed(run: Run) -> dict[str, Any]:
    """The settings that make another experiment: those of the run, but for its seed."""
    return {key: value for key, value in experiment(run.config).items() if key != "seed"}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs whose settings agree but for the seed stand together; labels say what differs between groups.

    Those that could not be read are in none.
    """
    keyed: dict[str, list[Run]] = {}
    for run in runs:
        if not run.problem:
            keyed.setdefault(_key(without_seed(run)), []).append(run)
    groups = list(keyed.values())
    flat = [flatten(without_seed(group[0])) for group in groups]
    values: dict[str, set[str]] = {}
    for one in flat:
        for key, value in one.items():
            values.setdefault(key, set()).add(_key(value))
    differing = {key for key, found in values.items() if len(found) > 1}
    losses = [
        "+".join(dict.fromkeys(key.split(".")[1] for key in one if key.startswith("loss."))) for one in flat
    ]
    labels = [
        _label(one, loss, differing, len(set(losses)) > 1, group[0])
        for one, loss, group in zip(flat, losses, groups, strict=True)
    ]
    for told_apart_by in (lambda run: run.path.name, lambda run: str(run.path)):
        labels = [
            label if labels.count(label) == 1 else readable(f"{label} ({told_apart_by(group[0])})")
            for label, group in zip(labels, groups, strict=True)
        ]
    return [Group(label, group) for label, group in zip(labels, groups, strict=True)]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested mappings."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix or value else {}
    return {
        k: v
        for key, item in value.items()
        for k, v in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def public_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a report shows them: flattened, without users, passwords, queries of URLs and arguments of commands."""
    return {
        key: "..." if value and is_secret(key) else shown(value) for key, value in flatten(config).items()
    }


def _label(flat: dict[str, Any], loss: str, differing: set[str], several_losses: bool, run: Run) -> str:
    parts = [loss] if loss else []
    public = public_settings({key: flat[key] for key in flat if key in differing})
    for key, value in public.items():
        # Paths, and what another loss brings with it, say nothing new.
        if not (several_losses and key.startswith(("loss.", "eval.", "data."))):
            # A searched value has more digits than a table has room for.
            text = f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
            parts.append(cut(text, LABEL // 2))
    return cut(", ".join(parts[:4]), LABEL) or readable(run.path.name)


def cut(text: str, longest: int) -> str:
    """A text of at most so many characters, its middle left out."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"
