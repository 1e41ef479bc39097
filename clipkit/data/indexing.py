"""Counting and indexing shards ahead of a run: by many processes, and going on where it was stopped."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from clipkit.data.faults import DataError
from clipkit.data.index_cache import index_file, load_index, renew_index
from clipkit.data.remote import open_ranges
from clipkit.data.shardset import ShardSet
from clipkit.data.spec import cache_folder
from clipkit.data.tarindex import index_stream, probe
from clipkit.data.urls import expand_shards, is_stream

_SAY_EVERY_S = 5.0


def index_shards(
    shards: str | Path | Iterable[str],
    *,
    workers: int = 1,
    cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """Index shards that have no index yet, so that runs begin at once.

    A remote shard is read by ranges where its server gives them, and takes no room in the spool.

    Args:
        shards: paths, globs, braces or URLs.
        workers: processes.
        cache_dir: where the indexes go; None for that of runs.

    Returns:
        {"shards", "indexed": how many had no index yet, "samples", "bytes", "seconds", "faults": {cause: n}, "bad_shards":
        up to 20 of those without a sample, "counts": samples of each shard}.

    Raises:
        ValueError: no such shards.
    """
    names = expand_shards(shards)
    folder = Path(cache_dir) if cache_dir is not None else cache_folder({})
    began = said = time.monotonic()
    counts: dict[str, int] = {}
    faults: Counter[str] = Counter()
    bad: list[str] = []
    total, indexed = 0, 0
    for done, (name, found) in enumerate(zip(names, _map(names, folder, workers)), start=1):
        count, size, causes, new, problem = found
        counts[name] = count
        total, indexed = total + size, indexed + new
        faults.update(causes)
        if not count:
            bad.append(f"{name}: {problem or ', '.join(sorted(causes)) or 'no complete sample'}")
        if (now := time.monotonic()) - said > _SAY_EVERY_S:
            said = now
            left = (now - began) / done * (len(names) - done)
            print(
                f"clipkit-data index: {done:,} of {len(names):,} shards, {total / 1e9:.1f} GB, some {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
    return {
        "shards": len(names),
        "indexed": indexed,
        "samples": sum(counts.values()),
        "bytes": total,
        "seconds": round(time.monotonic() - began, 2),
        "faults": dict(sorted(faults.items())),
        "bad_shards": bad[:20],
        "counts": counts,
    }


_Found = tuple[int, int, dict[str, int], bool, str]


def _map(names: list[str], folder: Path, workers: int) -> Iterator[_Found]:
    if workers <= 1:
        yield from map(_one, names, repeat(folder))
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(_one, names, repeat(folder))
        finally:
            pool.shutdown(cancel_futures=True)


def _one(name: str, folder: Path) -> _Found:
    """Samples, bytes, faults by cause, whether it had no index, and what is wrong with all of it."""
    file = index_file(folder / "index", name)
    if is_stream(name):
        try:
            opened, size = open_ranges(name)
        except OSError:
            # No ranges: fetched like a run's.
            pass
        else:
            try:
                with opened:

                    def read(length: int, offset: int) -> bytes:
                        opened.seek(offset)
                        return opened.read(length)

                    index = load_index(file, size=size)
                    new = index is None or index.probe != probe(read, size)
                    if new or index is None:
                        index = renew_index(file, lambda: index_stream(opened, size))
                return len(index.keys), size, dict(Counter(cause for cause, _ in index.faults)), new, ""
            except OSError as error:
                return 0, 0, {"unreadable_shard": 1}, True, str(error)
    try:
        data = ShardSet([name], cache_dir=folder, on_bad_shard="skip")
    except DataError as error:
        return 0, 0, {error.cause: 1}, True, error.detail
    return len(data), data.bytes, dict(Counter(cause for _, cause, _ in data.faults)), data.indexed > 0, ""
