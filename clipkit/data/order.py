"""Order from numbers alone: which sample stands at position t, without reading anything before it.

The training stream is one endless line of positions 0, 1, 2, ...  Position t belongs to one sample, found
from (seed, epoch, shard list) by arithmetic: no worker, rank or earlier batch takes part, so any number of
workers gives the same line, ranks cut it into disjoint pieces, and a resume starts anywhere.

Random numbers are SplitMix64 outputs of a counter (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), written out here because numpy does not promise that its shuffles stay the same
from one release to the next.

    positions      0 ........ n-1 | n ........ 2n-1 | ...          n samples an epoch
    epoch                0        |        1        |
    windows        [s3 s0][s1 s2] | [s2 s3][s0 s1]  |              shards permuted, then cut into windows of 2
    inside a window its samples are permuted together
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def number(*parts: int | str) -> int:
    """A 64-bit number that depends on every part and on nothing else."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"
    )


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def random_bits(key: int, counters: np.ndarray) -> np.ndarray:
    """SplitMix64 of each counter under `key`: (n,) uint64 -> (n,) uint64."""
    return _mix(np.uint64(key) + (counters.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniforms(key: int, ids: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each id, a function of (key, id) alone.

    Args:
        key: from `number`, names the purpose (seed, epoch, "crop").
        ids: (B,) uint64.

    Returns:
        (B, count) float64.
    """
    start = random_bits(key, ids)[:, None]
    columns = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(start + columns) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(key: int, n: int) -> np.ndarray:
    """A permutation of 0..n-1: the argsort of n random numbers."""
    return np.argsort(random_bits(key, np.arange(n, dtype=np.uint64)), kind="stable")


class EpochOrder:
    """Which sample of one source stands at a position of an epoch.

    Args:
        counts: samples in each shard, in the order of the shard list.
        seed: the run's seed.
        name: the source's name; two sources of one run get different orders.
        window: how many shards are mixed together. 1 keeps the reading nearly sequential, as many as there
            are shards is a shuffle of the whole set.
        shuffle: False gives file order in every epoch.
        resample: True draws every position independently, with replacement.
    """

    def __init__(
        self,
        counts: Sequence[int] | np.ndarray,
        *,
        seed: int,
        name: str = "",
        window: int = 16,
        shuffle: bool = True,
        resample: bool = False,
    ):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self.total = int(self.starts[-1])
        self.seed, self.name, self.shuffle, self.resample = seed, name, shuffle, resample
        self.window = max(1, min(window, len(self.counts)))
        self._shards: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def fresh(self) -> EpochOrder:
        """The same order with memory of its own, for another thread."""
        return EpochOrder(
            self.counts,
            seed=self.seed,
            name=self.name,
            window=self.window,
            shuffle=self.shuffle,
            resample=self.resample,
        )

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's shard permutation and the first position of each of its windows."""
        if epoch not in self._shards:
            shards = permutation(number(self.seed, self.name, epoch, "shards"), len(self.counts))
            ends = np.concatenate([[0], np.cumsum(self.counts[shards])])
            bounds = ends[np.append(np.arange(0, len(shards), self.window), len(shards))]
            self._shards[epoch] = (shards, bounds)
            while len(self._shards) > 2:
                self._shards.popitem(last=False)
        return self._shards[epoch]

    def _window(self, epoch: int, w: int) -> np.ndarray:
        """The sample numbers of window w, in order."""
        if (epoch, w) not in self._windows:
            shards = self._epoch(epoch)[0][w * self.window : (w + 1) * self.window]
            samples = np.concatenate(
                [np.arange(int(self.starts[s]), int(self.starts[s + 1]), dtype=np.int64) for s in shards]
            )
            key = number(self.seed, self.name, epoch, "window", w)
            self._windows[epoch, w] = samples[permutation(key, len(samples))]
            while len(self._windows) > 3:
                self._windows.popitem(last=False)
        return self._windows[epoch, w]

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample numbers, (n,) int64 in [0, total), of the given positions (n,) of one epoch."""
        if self.resample:
            bits = random_bits(number(self.seed, self.name, epoch, "resample"), positions)
            return (bits % np.uint64(self.total)).astype(np.int64)
        if not self.shuffle:
            return positions.astype(np.int64)
        bounds = self._epoch(epoch)[1]
        windows = np.searchsorted(bounds, positions, side="right") - 1
        samples = np.empty(len(positions), dtype=np.int64)
        for w in np.unique(windows):
            rows = windows == w
            samples[rows] = self._window(epoch, int(w))[positions[rows] - bounds[w]]
        return samples

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """The sample that takes the place of an unreadable one: again a function of numbers alone."""
        key = number(self.seed, self.name, epoch, "substitute", attempt)
        return int(random_bits(key, np.array([position], dtype=np.uint64))[0] % np.uint64(self.total))


class Mixture:
    """Which source a position reads from, by weight, in closed form.

    Positions are cut into blocks of 10,000. A block holds a fixed number of places for each source (its
    weight, rounded so that they add up), in an order permuted by (seed, block). How many places a source had
    before position t is then a multiplication and one look into t's own block.

    Args:
        weights: one positive number a source; only their ratios matter.
        seed: the run's seed.
    """

    BLOCK = 10_000

    def __init__(self, weights: Sequence[float], *, seed: int):
        shares = np.asarray(weights, dtype=np.float64)
        shares = shares / shares.sum() * self.BLOCK
        quota = np.floor(shares).astype(np.int64)
        short = self.BLOCK - int(quota.sum())
        quota[np.argsort(-(shares - quota), kind="stable")[:short]] += 1
        if (quota == 0).any():
            raise ValueError(
                f"a source's weight is below 1/{self.BLOCK} of the total in {list(weights)}: "
                "it would never be read; raise it or leave the source out"
            )
        self.weights, self.quota, self.seed = list(weights), quota, seed
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def fresh(self) -> Mixture:
        """The same mixture with memory of its own, for another thread."""
        return Mixture(self.weights, seed=self.seed)

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block not in self._blocks:
            sources = np.repeat(np.arange(len(self.quota)), self.quota)
            sources = sources[permutation(number(self.seed, "mixture", block), self.BLOCK)]
            places = np.empty(self.BLOCK, dtype=np.int64)
            for source, quota in enumerate(self.quota):
                places[sources == source] = block * quota + np.arange(quota)
            self._blocks[block] = (sources, places)
            while len(self._blocks) > 3:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For positions (n,): the source of each (n,) and its place in that source's own line (n,)."""
        sources = np.empty(len(positions), dtype=np.int64)
        places = np.empty(len(positions), dtype=np.int64)
        blocks = positions // self.BLOCK
        for block in np.unique(blocks):
            rows = blocks == block
            of_block, place = self._block(int(block))
            sources[rows] = of_block[positions[rows] % self.BLOCK]
            places[rows] = place[positions[rows] % self.BLOCK]
        return sources, places
