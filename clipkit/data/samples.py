"""What a stream reads samples from: the base of a kind of data of one's own, and the registry of such kinds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.spec import kinds


class SampleSet:
    """Samples by number, in blocks that the order treats as shards: shuffled as wholes, and read a window of them at a time.

    A kind of data of one's own gives `__init__`, `key`, `image` and `captions`; also `meta` for `data.pair_ids=json:FIELD` and
    `data.hard_negatives`. Workers are copies of it: what cannot be pickled is opened when it is first read.

    Args:
        names: a name of each block, for messages; the same on every machine.
        counts: samples of each block, 1 or more.

    Attributes:
        shards, counts: as given. starts: the number of each block's first sample, and of all samples.
        faults: (block's name, cause, where) of what was left out, causes as in clipkit.data.CAUSES.
    """

    def __init__(self, names: Sequence[str], counts: Sequence[int]):
        self.shards, self.counts = list(names), np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        self.faults: list[tuple[str, str, str]] = []

    def key(self, sample: int) -> str:
        """A name that no other sample has: random crops hang on it."""
        raise NotImplementedError

    def image(self, sample: int) -> bytes:
        """The image file's bytes. DataError for a sample to be left out and counted."""
        raise NotImplementedError

    def captions(self, sample: int) -> list[str]:
        """The captions; never empty. DataError for a sample to be left out and counted."""
        raise NotImplementedError

    def meta(self, sample: int) -> dict[str, Any]:
        """What else is known of a sample."""
        return {}

    def probe(self, shard: int) -> int:
        """64 bits that tell a block's content from another's: here its keys'."""
        digest = hashlib.blake2b(digest_size=8)
        for sample in range(int(self.starts[shard]), int(self.starts[shard + 1])):
            digest.update(self.key(sample).encode("utf-8", "surrogateescape") + b"\0")
        return int.from_bytes(digest.digest(), "little")

    def close(self) -> None:
        """Let go of what is open."""

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def shard_of(self, sample: int) -> int:
        """The block of a sample."""
        return int(np.searchsorted(self.starts, sample, side="right") - 1)

    def where(self, sample: int) -> tuple[str, str]:
        """A sample's block and key, for messages and counts."""
        return self.shards[self.shard_of(sample)], self.key(sample)

    def late_faults(self, sample: int) -> list[tuple[str, str, str]]:
        """None: all was known when the set was made."""
        return []

    def passed_over(self, sample: int) -> list[tuple[str, str, str, str]]:
        """None: a sample is whole, or is none."""
        return []

    def waits_for(self, samples: Sequence[int]) -> list[str]:
        """The blocks of samples."""
        return sorted({self.shards[self.shard_of(sample)] for sample in samples})

    def streams(self, shards: Sequence[int]) -> list[str]:
        """None of it is fetched ahead."""
        return []

    def expect(self, probes: Mapping[int, int]) -> None:
        """ValueError where a block has another content than it had."""
        for shard, probe in probes.items():
            if self.probe(shard) != probe:
                raise ValueError(
                    f"{self.shards[shard]} has other samples than when the run began: its position has no meaning here; "
                    "give the same data.train or start a new run"
                )


# A kind's function takes data.train, data.source and the cache folder.
Opener = Callable[[Any, Mapping[str, Any], Path], SampleSet]


def register_data(name: str) -> Callable[[Opener], Opener]:
    """File a function `(train, settings, cache_dir) -> SampleSet` under a name for `data.kind`.

    `train` is data.train (or `shards` of one of its weighted sources), `settings` data.source. What is wrong with them is a
    ValueError.
    """
    return kinds.register(name)
