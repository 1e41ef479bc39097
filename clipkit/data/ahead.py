"""Shards from elsewhere, fetched before they are read.

A process of its own, so that it takes no time of the one that trains, fetches the shards of the window that is being read
and, while the spool has room, those of the next one. The ranks of a machine share the work: none fetches what another is
fetching. What it does not fetch in time, or cannot, whoever reads it fetches.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from clipkit.data.batches import Batches
from clipkit.data.shardset import ShardSet
from clipkit.data.spool import Spool

# Shards that the ranks of a machine fetch at once, all together.
_AT_ONCE = 8
_LOOK_EVERY_S = 0.1
_MOST_BACKOFF_S = 60.0
_RESTARTS = 20


class Ahead:
    """Fetches for one rank's stream.

    Args:
        batches: what is read, by number.
        spool: where to.
        lead: positions between the batch that was delivered last and what workers read already.
    """

    def __init__(self, batches: Batches, spool: Spool, *, lead: int):
        self._given = (batches, spool, lead)
        self._context = multiprocessing.get_context("fork")
        self._position = self._context.Value("q", 0, lock=False)
        self._process: Any = None
        self._starts = 0

    def at(self, position: int) -> None:
        """The batch at this position is due."""
        self._position.value = position
        if self._process is not None and self._process.is_alive() or self._starts > _RESTARTS:
            return
        self._starts += 1
        given = (*self._given, self._position, os.getpid())
        self._process = self._context.Process(target=_run, args=given, daemon=True)
        self._process.start()

    def stop(self) -> None:
        """End the process."""
        self._starts = _RESTARTS + 1
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            self._process.join()


def windows(batches: Batches, start: int) -> list[tuple[ShardSet, Iterator[list[int]]]]:
    """For each set, and each of the order's parts that this rank reads of it: the shards of the window that the batch at
    `start` begins in, then of each window after it.
    """
    parts = batches.orders[0].parts
    rows = np.arange(batches.rank * batches.batch_size, (batches.rank + 1) * batches.batch_size)
    inside = start // parts
    places = [inside] if batches.mixture is None else batches.mixture.before(inside).tolist()
    return [
        (data, order.upcoming(place, int(part)))
        for part in np.unique(rows // (batches.batch_size * batches.world_size // parts))
        for data, order, place in zip(batches.sets, batches.orders, places)
    ]


def _plan(batches: Batches, start: int, lead: int) -> tuple[dict[str, ShardSet], dict[str, ShardSet]]:
    """The streams that are read between two positions, and those of the window after that."""
    now: dict[str, ShardSet] = {}
    then: dict[str, ShardSet] = {}
    # Another rank of the machine may be a step behind.
    behind = max(0, start - 2 * batches.batch_size * batches.world_size)
    for at in dict.fromkeys((behind, start, start + lead)):
        for data, following in windows(batches, at):
            now.update(dict.fromkeys(data.streams(next(following)), data))
            then.update(dict.fromkeys(data.streams(next(following)), data))
    return now, {url: data for url, data in then.items() if url not in now}


def _run(batches: Batches, spool: Spool, lead: int, position, parent: int) -> None:
    """The process: until its parent ends it, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    own = int(os.environ.get("LOCAL_RANK") or 0)
    at_once = max(2, _AT_ONCE // ranks)
    # Its memory of windows is its own.
    orders = [order.fresh() for order in batches.orders]
    batches.orders = orders
    fetching: dict[str, Future[bool]] = {}
    failed: dict[str, tuple[int, float]] = {}
    planned, now, then, said = -1, {}, {}, False
    with ThreadPoolExecutor(at_once) as pool:
        while os.getppid() == parent:
            if position.value != planned:
                planned = position.value
                now, then = _plan(batches, planned, lead)
                spool.keep([*then, *now])
            for url in [url for url, fetch in fetching.items() if fetch.done()]:
                if fetching.pop(url).result():
                    failed.pop(url, None)
                else:
                    tries = failed.get(url, (0, 0.0))[0] + 1
                    failed[url] = tries, time.monotonic() + min(2.0**tries, _MOST_BACKOFF_S)
            wanted = [(url, data) for group in (now, then) for url, data in _turned(group, own, ranks)]
            for url, data in wanted:
                if len(fetching) >= at_once:
                    break
                if url in fetching or failed.get(url, (0, 0.0))[1] > time.monotonic() or spool.has(url):
                    continue
                if url in then and not _has_room(spool, [*now, *then], len(fetching)):
                    if not said and spool.taken(now) and not set(fetching) & set(now):
                        said = True
                        print(
                            f"clipkit.data: data.spool_gb = {spool.limit / 1e9:g} does not hold two windows of shards, so "
                            "that not all is fetched before it is read; raise it, or lower data.window",
                            file=sys.stderr,
                            flush=True,
                        )
                    break
                fetching[url] = pool.submit(_fetch, data, spool, url)
            time.sleep(_LOOK_EVERY_S)
        os._exit(0)


def _turned(group: dict[str, ShardSet], own: int, ranks: int) -> list[tuple[str, ShardSet]]:
    """A list that each rank of a machine begins elsewhere."""
    listed = list(group.items())
    first = own * len(listed) // ranks
    return listed[first:] + listed[:first]


def _has_room(spool: Spool, urls: list[str], coming: int) -> bool:
    """Whether one more shard, of the size of the largest here, fits beside these without one of them going."""
    sizes = [size for size in (spool.taken([url]) for url in urls) if size]
    return sum(sizes) + (coming + 1) * max(sizes, default=0) <= spool.limit


def _fetch(data: ShardSet, spool: Spool, url: str) -> bool:
    came = spool.fetch_ahead(url)
    if came and spool.has(url):
        data.prepare(url)
    return came
