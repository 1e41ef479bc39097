"""Does a difference between two settings show? Paired over seeds, with an interval, and a verdict by one
stated rule.

For seeds i = 1..n let d_i be the metric with the change minus the metric without it, both of seed i, so the
same data order.

    mean d = sum(d_i) / n        s = sqrt(sum((d_i - mean d)^2) / (n - 1))        standard error = s / sqrt(n)
    95 % interval = mean d -+ t(0.975, n - 1) * standard error, Student's t with n - 1 degrees of freedom (3
    seeds: 4.303)

The verdict on "d is above (or below) zero": `SHOWS` when the whole interval is on that side of zero,
`OPPOSITE` when it is on the other side, `UNTOLD` when zero is inside, or when one seed leaves no interval.
The rule takes seeds for independent and their differences for normal. It corrects nothing for many questions:
of those whose true answer is zero, 1 in 20 falls outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clipkit.reports.spread import deviation, mean

SHOWS, OPPOSITE, UNTOLD = "shows", "the opposite", "cannot be told"


def t_cumulative(t: float, df: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and
    26.7.4).

    With theta = atan(t / sqrt(df)) the probability between -t and t is, for odd df,
    2/pi (theta + sin(theta) (cos(theta) + 2/3 cos^3(theta) + ... up to cos^(df-2))), and for even df
    sin(theta) (1 + 1/2 cos^2(theta) + 3/8 cos^4(theta) + ... up to cos^(df-2)).
    """
    if df < 1:
        raise ValueError(f"df={df}: Student's t needs 1 degree of freedom or more")
    theta = math.atan(t / math.sqrt(df))
    term, total = (math.cos(theta) if df % 2 else 1.0), 0.0
    # Each term is the one before times cos^2 and k / (k + 1).
    for k in range(2 if df % 2 else 1, df, 2):
        total += term
        term *= math.cos(theta) ** 2 * k / (k + 1)
    between = 2 / math.pi * (theta + math.sin(theta) * total) if df % 2 else math.sin(theta) * total
    return 0.5 + between / 2


def t_quantile(df: int, p: float = 0.975) -> float:
    """The t with P(T <= t) = p, for p above 0.5, by halving an interval."""
    if not 0.5 < p < 1:
        raise ValueError(f"p={p}: expected a probability above 0.5 and below 1")
    low, high = 0.0, 1.0
    while t_cumulative(high, df) < p:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cumulative(middle, df) < p else (low, middle)
    return high


@dataclass(frozen=True)
class Difference:
    """A paired difference; the module says how each number is computed.

    Attributes:
        values: d_i, one a seed that both settings have.
        standard_error, low, high: None with fewer than two seeds.
    """

    values: tuple[float, ...]
    mean: float
    standard_error: float | None
    low: float | None
    high: float | None

    def verdict(self, sign: int) -> str:
        """Whether the difference is above zero (`sign` 1) or below it (-1); untold of numbers that are not finite."""
        if self.low is None or self.high is None:
            return UNTOLD
        if self.low > 0:
            return SHOWS if sign > 0 else OPPOSITE
        if self.high < 0:
            return SHOWS if sign < 0 else OPPOSITE
        return UNTOLD


def difference(values: Sequence[float]) -> Difference | None:
    """The mean of paired differences with its interval; None without any."""
    values = tuple(values)
    if not values:
        return None
    middle, spread = mean(values), deviation(values)
    if spread is None:
        return Difference(values, middle, None, None, None)
    error = spread / math.sqrt(len(values))
    reach = t_quantile(len(values) - 1) * error
    return Difference(values, middle, error, middle - reach, middle + reach)


def paired(changed: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """`changed` minus `base` over the seeds that both have; None when they share none.

    Args:
        changed, base: {seed: value}.
    """
    return difference([changed[seed] - base[seed] for seed in sorted(changed.keys() & base.keys())])


def paired_gains(
    changed: Mapping[int, float],
    base: Mapping[int, float],
    other_changed: Mapping[int, float],
    other_base: Mapping[int, float],
) -> Difference | None:
    """(changed - base) - (other_changed - other_base) over the seeds that all four have."""
    seeds = sorted(changed.keys() & base.keys() & other_changed.keys() & other_base.keys())
    return difference([(changed[s] - base[s]) - (other_changed[s] - other_base[s]) for s in seeds])
