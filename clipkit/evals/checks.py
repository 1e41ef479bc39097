"""What is looked at before a task is scored, and what its numbers rest on: kept, and said once.

Numbers stay right where something is found (ties count by their expectation over a random order), but mean less than
they seem to: classes whose prompts are the same tokens, pictures that are the same, features that are all one, classes
without a picture.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clipkit.evals.interval import Scored, intervals
from clipkit.foreign import readable

# Groups and names that a message or a file lists.
_LISTED = 10
# Characters of a name in either.
_NAME = 100
_said: set[str] = set()


@dataclass
class TaskRecord:
    """What one task was scored on.

    Attributes:
        data: {source: {"items": number scored, "skipped": number left out, "digest": of their keys, texts, labels and
            pixels at the model's size}}, which tells whether two numbers are of the same data.
        checks: {check: what was found}, empty where nothing was.
        scored: {metric: its items, for intervals, and its chance level}, as far as the task gives them.
    """

    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    scored: dict[str, Scored] = field(default_factory=dict)

    def numbers(self, metrics: Mapping[str, float]) -> dict[str, dict[str, Any]]:
        """{metric: {"value", "n", "interval" of 95 %, "chance", "tied"}}, None for what a metric has not."""
        bounds = intervals({name: one for name, one in self.scored.items() if name in metrics})
        found = {}
        for name, value in metrics.items():
            one = self.scored.get(name)
            about = (one.n, bounds[name], one.chance, one.tied) if one else (None,) * 4
            found[name] = {
                "value": value,
                **dict(zip(("n", "interval", "chance", "tied"), about, strict=True)),
            }
        return found

    def read(self, source: str, content: Any, *, items: int, skipped: int = 0) -> None:
        """Keep what a task has read."""
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        self.data[source] = {"items": items, "skipped": skipped, "digest": digest}

    def found(self, check: str, what: str, details: dict[str, Any], *, say: bool) -> None:
        """Keep what a check has found; the first time in a process, say it."""
        self.checks[check] = {"found": what, **details}
        if say and what not in _said:
            _said.add(what)
            print(f"clipkit.evals: {readable(what)}", file=sys.stderr, flush=True)


def about_numbers(
    results: Mapping[str, Mapping[str, float]], records: Mapping[str, TaskRecord]
) -> dict[str, Any]:
    """What a file holds beside the numbers of `clipkit.evals.evaluate`: of each metric, and of each task.

    Returns:
        {"scores": {"task/metric": as TaskRecord.numbers}, "records": {task: {"data", "checks"}}}.
    """
    scores = {name: record.numbers(results[name]) for name, record in records.items()}
    return {
        "scores": {
            f"{name}/{metric}": one for name, found in scores.items() for metric, one in found.items()
        },
        "records": {name: {"data": record.data, "checks": record.checks} for name, record in records.items()},
    }


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal keys, each group of two or more in order."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, key in enumerate(keys):
        places[key].append(place)
    return [group for group in places.values() if len(group) > 1]


def groups_of(names: Sequence[str], groups: Sequence[Sequence[int]]) -> list[list[str]]:
    """The names in the first groups, to be listed."""
    return [[names[place][:_NAME] for place in group[:_LISTED]] for group in groups[:_LISTED]]


def in_words(groups: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The first group in words: 'tench' = 'goldfish' = ..."""
    first = groups[0]
    return " = ".join(repr(names[place][:_NAME]) for place in first[:4]) + (
        " = ..." if len(first) > 4 else ""
    )


def is_constant(features: Tensor) -> bool:
    """Whether several rows of unit-norm features are one, up to rounding."""
    return len(features) > 1 and float((features.amax(0) - features.amin(0)).max()) < 1e-6
