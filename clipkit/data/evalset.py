"""Reading for evaluation: every sample once, in file order, at full decoding quality."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from clipkit.data.decode import MAX_PIXELS, decode_eval
from clipkit.data.faults import DataError
from clipkit.data.shardset import ShardSet
from clipkit.data.spec import cache_folder
from clipkit.data.urls import expand_shards


def iter_eval(
    shards: str | Path | Iterable[str],
    *,
    image_size: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    on_bad: str = "error",
    cache_dir: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[dict[str, Any]]:
    """Batches of an evaluation set.

    Args:
        shards: paths, globs, braces or URLs.
        image_size: pixels a side; the shorter side is resized to it and the centre kept.
        batch_size: pictures a batch; the last may have fewer.
        rank, world_size: rank r reads the r-th of `world_size` contiguous pieces.
        limit: read only the first so many samples of the set.
        on_bad: "error" raises at the first bad sample; "skip" leaves it out.
        cache_dir: folder for indexes and fetched shards.
        max_pixels: larger pictures are bad samples.

    Yields:
        {"image": (B, 3, H, W) uint8, "captions": B lists of str, "key": B str, "meta": B dict, "index": (B,)
        int64 place in the set}.

    Raises:
        ValueError: no such shards.
        DataError: a bad shard, or a bad sample under "error"; names shard and key.
    """
    if on_bad not in ("error", "skip"):
        raise ValueError(f"on_bad is {on_bad!r}; expected 'error' or 'skip'")
    data = _open(shards, cache_dir)
    total = len(data) if limit is None else min(limit, len(data))
    rows: list[tuple] = []
    for sample in range(total * rank // world_size, total * (rank + 1) // world_size):
        try:
            meta = data.meta(sample)
            image = decode_eval(data.image(sample), image_size, max_pixels=max_pixels)
            rows.append((image, data.captions(sample), data.key(sample), meta, sample))
        except DataError as error:
            if on_bad == "error":
                shard, key = data.where(sample)
                raise DataError(error.cause, error.detail, shard=shard, key=key) from None
        if len(rows) == batch_size:
            yield _batch(rows)
            rows = []
    if rows:
        yield _batch(rows)
    data.close()


def _batch(rows: list[tuple]) -> dict[str, Any]:
    images, captions, keys, metas, samples = zip(*rows)
    return {
        "image": torch.stack(images),
        "captions": list(captions),
        "key": list(keys),
        "meta": list(metas),
        "index": torch.tensor(samples, dtype=torch.int64),
    }


def count_samples(shards: str | Path | Iterable[str], *, cache_dir: str | Path | None = None) -> int:
    """How many complete samples shards hold."""
    return len(_open(shards, cache_dir))


def iter_captions(
    shards: str | Path | Iterable[str], *, cache_dir: str | Path | None = None, on_bad_shard: str = "error"
) -> Iterator[str]:
    """Every caption once, in file order; samples without a readable one are passed over, bad shards under
    "skip".
    """
    data = _open(shards, cache_dir, on_bad_shard)
    for sample in data:
        try:
            yield from data.captions(sample)
        except DataError:
            continue
    data.close()


def _open(shards: Any, cache_dir: str | Path | None, on_bad_shard: str = "error") -> ShardSet:
    names = expand_shards(shards)
    return ShardSet(
        names, cache_dir=Path(cache_dir) if cache_dir else cache_folder({}), on_bad_shard=on_bad_shard
    )
