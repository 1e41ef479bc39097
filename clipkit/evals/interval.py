"""How sure a metric is: a bootstrap interval over what was scored, and the number that guessing would have.

Items are drawn again with replacement, as many as there are, a thousand times (Efron, 1979); the interval is from the
2.5th to the 97.5th percentile of the metric over the draws. Captions are drawn with their picture, since those of one
picture are no independent queries. It says how the metric would vary over sets of this size; how it varies over training
seeds it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 1000
# Numbers of one block of draws.
_BLOCK = 1 << 22


@dataclass
class Scored:
    """A metric as a function of how often each item counts.

    Attributes:
        n: items.
        statistic: (draws, n) float64 weights -> (draws,) values of the metric; None: no interval.
        units: (n,) int64, what is drawn together, from 0; None: each item alone.
        chance: the metric of random guessing, or None where that is no number.
        tied: items whose value is an expectation over the order of ties, or None where none is taken.
    """

    n: int
    statistic: Callable[[Tensor], Tensor] | None = None
    units: Tensor | None = None
    chance: float | None = None
    tied: int | None = None


def mean_of(
    values: Tensor,
    *,
    units: Tensor | None = None,
    chance: float | None = None,
    tied: Tensor | None = None,
) -> Scored:
    """The mean of (n,) values; `tied` is (n,) true or above 0 where a tie decided."""
    values = values.double().cpu()

    def statistic(weights: Tensor) -> Tensor:
        return weights @ values / weights.sum(1)

    decided = None if tied is None else int(torch.count_nonzero(tied))
    return Scored(len(values), statistic, units, chance, decided)


def mean_of_groups(values: Tensor, groups: Tensor, *, chance: float | None = None) -> Scored:
    """The mean, over the groups that are drawn, of the mean of (n,) values in each; `groups` is (n,) int64."""
    values, present = values.double().cpu(), groups.cpu().unique(return_inverse=True)[1]
    size = int(present.max()) + 1

    def statistic(weights: Tensor) -> Tensor:
        counts, sums = weights.new_zeros(2, len(weights), size)
        counts.index_add_(1, present, weights)
        sums.index_add_(1, present, weights * values)
        return (sums / counts.clamp(min=1)).sum(1) / (counts > 0).sum(1)

    return Scored(len(values), statistic, None, chance)


def median_of(values: Tensor, *, units: Tensor | None = None, chance: float | None = None) -> Scored:
    """The median of (n,) values, the mean of the two middle ones where their number is even."""
    values, order = values.double().cpu().sort()

    def statistic(weights: Tensor) -> Tensor:
        upto = weights[:, order].cumsum(1)
        half = upto[:, -1:] / 2
        low = torch.searchsorted(upto, half).clamp(max=len(values) - 1)
        high = torch.searchsorted(upto, half, right=True).clamp(max=len(values) - 1)
        return ((values[low] + values[high]) / 2).squeeze(1)

    return Scored(len(values), statistic, units, chance)


def correlation_of(similarity: Tensor, gold: Tensor, *, scale: float = 100.0) -> Scored:
    """Spearman's correlation of (n,) and (n,), times `scale`: ranks are those among the items drawn."""
    levels = [x.double().round(decimals=12).unique(return_inverse=True)[1] for x in (similarity, gold)]

    def statistic(weights: Tensor) -> Tensor:
        total = weights.sum(1, keepdim=True)
        centred = []
        for level in levels:
            counts = torch.zeros(len(weights), int(level.max()) + 1, dtype=torch.float64)
            counts.index_add_(1, level, weights)
            # The mean rank of equal ones: those before them, and half of themselves.
            ranks = (counts.cumsum(1) - (counts - 1) / 2)[:, level]
            centred.append(ranks - (weights * ranks).sum(1, keepdim=True) / total)
        a, b = centred
        spread = ((weights * a * a).sum(1) * (weights * b * b).sum(1)).sqrt()
        return scale * torch.where(spread > 0, (weights * a * b).sum(1) / spread.clamp(min=1e-300), 0.0)

    return Scored(len(gold), statistic, None, 0.0)


def intervals(scored: Mapping[str, Scored], *, seed: int = 0) -> dict[str, list[float] | None]:
    """{metric: [low, high]} of 95 %; None where a metric has no statistic.

    Metrics of as many units share their draws. The draws are a function of `seed` and the number of units alone.
    """
    found: dict[str, list[float] | None] = dict.fromkeys(scored)
    by_units: dict[int, dict[str, Scored]] = {}
    for name, one in scored.items():
        if one.statistic is not None:
            count = one.n if one.units is None else int(one.units.max()) + 1
            by_units.setdefault(count, {})[name] = one
    for count, metrics in by_units.items():
        generator = torch.Generator().manual_seed(seed)
        values: dict[str, list[Tensor]] = {name: [] for name in metrics}
        largest = max(one.n for one in metrics.values())
        rows = max(1, min(DRAWS, _BLOCK // max(count, largest)))
        for start in range(0, DRAWS, rows):
            drawn = torch.randint(count, (min(rows, DRAWS - start), count), generator=generator)
            weights = torch.zeros(drawn.shape, dtype=torch.float64)
            weights.scatter_add_(1, drawn, torch.ones_like(weights))
            for name, one in metrics.items():
                assert one.statistic is not None
                each = weights if one.units is None else weights[:, one.units.cpu()]
                values[name].append(one.statistic(each))
        bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
        for name, parts in values.items():
            found[name] = torch.cat(parts).quantile(bounds).tolist()
    return found
