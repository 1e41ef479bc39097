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
from collections.abc import Iterator, Sequence

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
    """Which sample of one source stands at a place of its endless line.

    With `parts` K above 1 the samples are divided once, by the seed: shards are permuted, put end to end, and cut into K
    pieces of equal length (within one sample). Each part is a line of its own, ordered as one with K = 1 is, and place t
    of the whole line is place t div K of part t mod K. Who reads some parts alone then needs their shards alone, and a
    shard that a cut goes through belongs to two parts (Mosaic's StreamingDataset calls the parts canonical nodes).

        line     t    0  1  2  3  4  5 ...         K = 2
        part 0        0     1     2                shards s3, s1 and the first half of s0
        part 1           0     1     2             the second half of s0, s2, s4

    Args:
        counts: samples in each shard, in the order of the shard list.
        seed: the run's seed.
        name: the source's name; two sources of one run get different orders.
        window: how many shards are mixed together, over all parts. 1 keeps the reading nearly sequential, as many as
            there are shards is a shuffle of the whole set.
        shuffle: False gives file order in every epoch.
        resample: True draws with replacement: for each window, `window` shards (a shard as often as its samples are
            many), and from these as many samples as so many shards hold on average.
        parts: K.
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
        parts: int = 1,
    ):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self.total = int(self.starts[-1])
        self.seed, self.name, self.shuffle, self.resample, self.parts = seed, name, shuffle, resample, parts
        self.window = max(1, min(window, len(self.counts)))
        self._lines: dict[int, _Line] = {}

    def fresh(self) -> EpochOrder:
        """The same order with memory of its own, for another thread."""
        return EpochOrder(
            self.counts,
            seed=self.seed,
            name=self.name,
            window=self.window,
            shuffle=self.shuffle,
            resample=self.resample,
            parts=self.parts,
        )

    def _line(self, part: int) -> _Line:
        if part not in self._lines:
            self._lines[part] = _Line(self, part)
        return self._lines[part]

    def epochs(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For places (n,) of the endless line: the epoch of each (n,), and its place in that epoch (n,)."""
        inside, part = np.divmod(places, self.parts)
        totals = self.total * (part + 1) // self.parts - self.total * part // self.parts
        epochs, inside = np.divmod(inside, totals)
        return epochs, inside * self.parts + part

    def at(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample numbers, (n,) int64 in [0, total), of the given places (n,) of one epoch."""
        inside, parts = np.divmod(positions, self.parts)
        samples = np.empty(len(positions), dtype=np.int64)
        for part in np.unique(parts):
            rows = parts == part
            samples[rows] = self._line(int(part)).at(epoch, inside[rows])
        return samples

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """The sample of the same window that takes the place of an unreadable one: again a function of numbers alone, and
        of a shard that is at hand.
        """
        inside, part = divmod(position, self.parts)
        return self._line(part).substitute(epoch, inside, attempt)

    def upcoming(self, place: int, part: int = 0) -> Iterator[list[int]]:
        """The shards of the window that place `place` of a part's own endless line is in, then of each window after it."""
        line = self._line(part)
        epoch, inside = divmod(place, line.total)
        while True:
            shards, end = line.window_shards(epoch, inside)
            yield shards
            epoch, inside = (epoch, end) if end < line.total else (epoch + 1, 0)


class _Line:
    """One part of an order: pieces of shards, permuted anew each epoch and cut into windows."""

    def __init__(self, order: EpochOrder, part: int):
        self.order = order
        if order.parts == 1:
            self.shards, self.firsts, self.counts = (
                np.arange(len(order.counts)),
                order.starts[:-1],
                order.counts,
            )
            self.name: tuple[int | str, ...] = ()
        else:
            self.shards, self.firsts, self.counts = _cut(order, part)
            self.name = ("part", order.parts, part)
        self.total = int(self.counts.sum())
        self.window = max(1, min(-(-order.window // order.parts), len(self.counts)))
        self._shards: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def _number(self, epoch: int, *what: int | str) -> int:
        return number(self.order.seed, self.order.name, epoch, *what, *self.name)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of the pieces and the first place of each of its windows, ended by `total`."""
        if epoch not in self._shards:
            pieces = (
                permutation(self._number(epoch, "shards"), len(self.counts))
                if self.order.shuffle
                else np.arange(len(self.counts))
            )
            ends = np.concatenate([[0], np.cumsum(self.counts[pieces])])
            bounds = ends[np.append(np.arange(0, len(pieces), self.window), len(pieces))]
            self._shards[epoch] = (pieces, bounds)
            while len(self._shards) > 2:
                self._shards.popitem(last=False)
        return self._shards[epoch]

    def _window(self, epoch: int, w: int) -> np.ndarray:
        """The sample numbers of window w, in order."""
        if (epoch, w) not in self._windows:
            pieces = self._epoch(epoch)[0][w * self.window : (w + 1) * self.window]
            samples = np.concatenate(
                [
                    np.arange(int(self.firsts[p]), int(self.firsts[p] + self.counts[p]), dtype=np.int64)
                    for p in pieces
                ]
            )
            key = self._number(epoch, "window", w)
            self._windows[epoch, w] = (
                samples[permutation(key, len(samples))] if self.order.shuffle else samples
            )
            while len(self._windows) > 3:
                self._windows.popitem(last=False)
        return self._windows[epoch, w]

    def at(self, epoch: int, places: np.ndarray) -> np.ndarray:
        if self.order.resample:
            return self._drawn(epoch, places, "sample")
        if not self.order.shuffle:
            return places.astype(np.int64) + int(self.firsts[0])
        bounds = self._epoch(epoch)[1]
        windows = np.searchsorted(bounds, places, side="right") - 1
        samples = np.empty(len(places), dtype=np.int64)
        for w in np.unique(windows):
            rows = windows == w
            samples[rows] = self._window(epoch, int(w))[places[rows] - bounds[w]]
        return samples

    def substitute(self, epoch: int, place: int, attempt: int) -> int:
        if self.order.resample:
            return int(self._drawn(epoch, np.array([place]), "substitute", attempt)[0])
        w = int(np.searchsorted(self._epoch(epoch)[1], place, side="right")) - 1
        samples = self._window(epoch, w)
        key = self._number(epoch, "substitute", attempt)
        return int(samples[int(random_bits(key, np.array([place], np.uint64))[0] % np.uint64(len(samples)))])

    def _drawn(self, epoch: int, places: np.ndarray, *purpose: int | str) -> np.ndarray:
        """Samples drawn with replacement: a shard of the window's, then a sample of it."""
        windows = places // self._drawn_together()
        ids = np.stack([random_bits(self._number(epoch, *purpose, n), places) for n in range(2)])
        samples = np.empty(len(places), dtype=np.int64)
        for w in np.unique(windows):
            rows = windows == w
            slots = self._slots(epoch, int(w))[(ids[0, rows] % np.uint64(self.window)).astype(np.int64)]
            samples[rows] = self.firsts[slots] + (ids[1, rows] % self.counts[slots].astype(np.uint64)).astype(
                np.int64
            )
        return samples

    def _drawn_together(self) -> int:
        """How many samples in a row are drawn from one window."""
        return max(1, self.total * self.window // len(self.counts))

    def _slots(self, epoch: int, w: int) -> np.ndarray:
        """The pieces that window w draws from, each as likely as it has samples."""
        bits = random_bits(self._number(epoch, "resample", w), np.arange(self.window))
        places = (bits % np.uint64(self.total)).astype(np.int64)
        return np.searchsorted(np.cumsum(self.counts), places, side="right")

    def window_shards(self, epoch: int, place: int) -> tuple[list[int], int]:
        """The shards of the window that a place is in, and where the next window begins."""
        if self.order.resample:
            together = self._drawn_together()
            pieces, end = self._slots(epoch, place // together), (place // together + 1) * together
        else:
            order, bounds = self._epoch(epoch)
            w = int(np.searchsorted(bounds, place, side="right")) - 1
            pieces, end = order[w * self.window : (w + 1) * self.window], int(bounds[w + 1])
        return list(dict.fromkeys(self.shards[pieces[self.counts[pieces] > 0]].tolist())), end


def _cut(order: EpochOrder, part: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pieces of one part of several: their shards, first samples and counts."""
    key, n = number(order.seed, order.name, "parts", order.parts), order.total
    shards = permutation(key, len(order.counts)) if order.shuffle else np.arange(len(order.counts))
    ends = np.cumsum(order.counts[shards])
    low, high = n * part // order.parts, n * (part + 1) // order.parts
    places = slice(np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left") + 1)
    shards, ends = shards[places], ends[places]
    begins = ends - order.counts[shards]
    left, right = np.maximum(begins, low), np.minimum(ends, high)
    kept = right > left
    return shards[kept], (order.starts[shards] + left - begins)[kept], (right - left)[kept]


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

    def before(self, position: int) -> np.ndarray:
        """How many places each source had before a position: (sources,) int64."""
        block, inside = divmod(position, self.BLOCK)
        return block * self.quota + np.bincount(self._block(block)[0][:inside], minlength=len(self.quota))

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
