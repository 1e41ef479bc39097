"""Mean and sample standard deviation of numbers that may be anything a file holds: nothing here raises.

Finite numbers give what `statistics` gives. Where one is not finite, or a sum is beyond what a float holds, the
result is inf or nan, as the tables then show it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def mean(values: Iterable[float]) -> float:
    """sum(x) / n of one value or more."""
    values = list(values)
    try:
        return statistics.fmean(values)
    except (OverflowError, ValueError):
        # fsum refuses a sum beyond the largest float, and inf - inf.
        return sum(value / len(values) for value in values)


def deviation(values: Sequence[float]) -> float | None:
    """sqrt(sum((x - mean)^2) / (n - 1)); None of fewer than two values."""
    if len(values) < 2:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan
    try:
        return statistics.stdev(values)
    except OverflowError:
        return math.inf
