"""How many samples shards hold, as files beside them say: nothing of the shards themselves is read.

`sizes.json` in the folder of the shards, {"00000.tar": 9987, ...}; or `00000_stats.json` beside `00000.tar`, as img2dataset
writes it, whose `successes` are the samples in the shard.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np

from clipkit.data.remote import read_small, scheme
from clipkit.foreign import BrokenFile, parse_json, read_bytes

_BYTES = 1 << 27
_MOST = 1 << 40


def declared_counts(shards: Sequence[str], remote: Sequence[bool]) -> np.ndarray:
    """Samples of each shard as the files beside it say; -1 where they do not.

    Args:
        shards: paths or URLs.
        remote: which are fetched rather than opened in place.

    Raises:
        BrokenFile: a sizes.json that does not hold what it should.
        OSError: a server that does not say whether there is one.
    """
    counts = np.full(len(shards), -1, np.int64)
    folders: dict[str, list[int]] = {}
    for number, shard in enumerate(shards):
        if not (remote[number] and scheme(shard) == "pipe"):
            folders.setdefault(_split(shard)[0], []).append(number)
    for folder, members in folders.items():
        there = None if remote[members[0]] else _listed(folder)
        sizes = _sizes(folder, there)
        for number in members:
            counts[number] = sizes.get(_split(shards[number])[1], -1)
        rest = [number for number in members if counts[number] < 1]
        # Where the first has none beside it, a server is not asked for the others'.
        for some in (rest[:1], rest[1:]):
            with ThreadPoolExecutor(1 if there is not None else 32) as pool:
                for number, count in zip(
                    some, pool.map(_stats, [shards[one] for one in some], repeat(there))
                ):
                    counts[number] = count
            if some and there is None and counts[some[0]] < 0:
                break
    # What has no sample is looked at.
    counts[counts < 1] = -1
    return counts


def _split(shard: str) -> tuple[str, str]:
    """Folder, with its slash, and name; the query of a URL belongs to neither."""
    folder, slash, name = shard.partition("?")[0].rpartition("/")
    return folder + slash, name


def _listed(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder or "."))
    except OSError:
        return set()


def _sizes(folder: str, there: set[str] | None) -> dict[str, int]:
    if there is not None and "sizes.json" not in there:
        return {}
    raw = _read(f"{folder}sizes.json", remote=there is None)
    if raw is None:
        return {}
    try:
        sizes = parse_json(raw, dict[str, int], name=f"{folder}sizes.json")
    except BrokenFile as error:
        raise BrokenFile(f'{error}; expected {{"00000.tar": samples, ...}}: mend or remove it') from None
    wrong = next((name for name, count in sizes.items() if not 0 <= count < _MOST), None)
    if wrong is not None:
        raise BrokenFile(f"{folder}sizes.json says that {wrong[:200]!r} has {sizes[wrong]} samples")
    return sizes


def _stats(shard: str, there: set[str] | None) -> int:
    folder, name = _split(shard)
    stats = f"{name.removesuffix('.tar')}_stats.json"
    if there is not None and stats not in there:
        return -1
    raw = _read(folder + stats, remote=there is None)
    try:
        found = parse_json(raw or b"{}", name=stats).get("successes")
    except BrokenFile:
        return -1
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < _MOST else -1


def _read(name: str, *, remote: bool) -> bytes | None:
    if remote:
        return read_small(name, limit=_BYTES)
    try:
        return read_bytes(name, limit=_BYTES)
    except (OSError, BrokenFile):
        return None
