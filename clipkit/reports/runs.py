"""Run folders read back: their curves, their final numbers, and which of them differ by nothing but the seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clipkit.settings import experiment


@dataclass
class Run:
    """One run folder.

    Attributes:
        lines: metrics.jsonl, one dict a logged step.
        final: {"task/metric": value} of the last evaluation.
        config: config.yaml.
        summary: summary.json, or empty for a run that has not finished.
    """

    path: Path
    config: dict[str, Any]
    lines: list[dict[str, float]]
    final: dict[str, float]
    summary: dict[str, Any]

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every line that holds `name`."""
        return [(line["step"], line[name]) for line in self.lines if isinstance(line.get(name), (int, float))]


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
        if not values:
            return None
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)

    def mean_curve(self, name: str) -> list[tuple[float, float]]:
        """The runs' mean at every step that all of those with this metric have."""
        curves = [dict(curve) for run in self.runs if (curve := run.curve(name))]
        if not curves:
            return []
        steps = sorted(set.intersection(*[set(curve) for curve in curves]))
        return [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Every run folder at or below the paths, in path order.

    Raises:
        ValueError: a path that does not exist, or holds no run.
    """
    runs = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"there is no folder {path}: give run folders, or folders that hold them")
        found = sorted({file.parent for file in path.rglob("metrics.jsonl")})
        if not found:
            raise ValueError(f"no run under {path}: a run folder holds config.yaml and metrics.jsonl")
        runs += [read_run(folder) for folder in found]
    return list({run.path.resolve(): run for run in runs}.values())


def read_run(folder: Path) -> Run:
    """Read one run folder; a half-written last line is left out."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    final: dict[str, float] = {}
    for line in lines:
        final.update({key[len("eval/") :]: value for key, value in line.items() if key.startswith("eval/")})
    summary = folder / "summary.json"
    config = folder / "config.yaml"
    return Run(
        path=folder,
        config=yaml.safe_load(config.read_text("utf-8")) if config.exists() else {},
        lines=lines,
        final={key: value for key, value in final.items() if isinstance(value, (int, float))},
        summary=json.loads(summary.read_text("utf-8")) if summary.exists() else {},
    )


def metric_names(groups: Sequence[Group]) -> list[str]:
    """Every final metric of any run, in the order of their first appearance."""
    return list(dict.fromkeys(name for group in groups for run in group.runs for name in run.final))


def without_seed(run: Run) -> dict[str, Any]:
    """The settings that make another experiment: those of the run, but for its seed."""
    return {key: value for key, value in experiment(run.config).items() if key != "seed"}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs whose settings agree but for the seed stand together; labels say what differs between groups."""
    keyed: dict[str, list[Run]] = {}
    for run in runs:
        keyed.setdefault(json.dumps(without_seed(run), sort_keys=True, default=str), []).append(run)
    groups = list(keyed.values())
    flat = [flatten(without_seed(group[0])) for group in groups]
    labels = [_label(i, flat, group[0]) for i, group in enumerate(groups)]
    return [
        Group(label if labels.count(label) == 1 else f"{label} ({group[0].path.name})", group)
        for label, group in zip(labels, groups, strict=True)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested mappings."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    return {
        k: v
        for key, item in value.items()
        for k, v in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _label(index: int, flat: list[dict[str, Any]], run: Run) -> str:
    losses = [
        "+".join(dict.fromkeys(key.split(".")[1] for key in one if key.startswith("loss."))) for one in flat
    ]
    parts = [losses[index]] if losses[index] else []
    for key, value in flat[index].items():
        # Paths, and what another loss brings with it, say nothing new.
        if key.startswith(("loss.", "eval.", "data.")) and len(set(losses)) > 1:
            continue
        if any(other.get(key, value) != value for other in flat):
            # A searched value has more digits than a table has room for.
            parts.append(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}")
    return ", ".join(parts[:4]) or run.path.name
