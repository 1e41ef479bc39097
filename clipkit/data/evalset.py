"""Reading for evaluation: every sample once, in file order, at full decoding quality."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from clipkit.data.decode import check_resizing, decode_eval
from clipkit.data.faults import SHARD_CAUSES, DataError
from clipkit.data.formats import MAX_PIXELS
from clipkit.data.samples import SampleSet
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
    on_bad: str | Callable[[DataError], None] = "error",
    cache_dir: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
) -> Iterator[dict[str, Any]]:
    """Batches of an evaluation set.

    Args:
        shards: paths, globs, braces or URLs.
        image_size: pixels a side.
        batch_size: pictures a batch; the last may have fewer.
        rank, world_size: rank r reads the r-th of `world_size` contiguous pieces.
        limit: read only the first so many samples of the set.
        on_bad: "error" raises at the first bad sample; "skip" leaves it out; a function is given its DataError,
            which names shard and key, and it is left out. A shard that cannot be read ends it in any case.
        cache_dir: folder for indexes and fetched shards.
        max_pixels: larger pictures are bad samples.
        resize_mode: shortest (the shorter side is resized to `image_size` and the centre kept), longest or squash.
        interpolation: bicubic or bilinear.

    Yields:
        {"image": (B, 3, H, W) uint8, "captions": B lists of str, "key": B str, "meta": B dict, "index": (B,)
        int64 place in the set}.

    Raises:
        ValueError: no such shards.
        DataError: a bad shard, or a bad sample under "error"; names shard and key.
    """
    check_resizing(resize_mode, interpolation)
    if on_bad not in ("error", "skip") and not callable(on_bad):
        raise ValueError(f"on_bad is {on_bad!r}; expected 'error', 'skip' or a function")
    with closing(open_set(shards, cache_dir)) as data:
        yield from read_set(
            data,
            image_size=image_size,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            limit=limit,
            on_bad=_raise if on_bad == "error" else _pass_over if isinstance(on_bad, str) else on_bad,
            max_pixels=max_pixels,
            resize_mode=resize_mode,
            interpolation=interpolation,
        )


def read_set(
    data: ShardSet,
    *,
    image_size: int,
    batch_size: int,
    on_bad: Callable[[DataError], None],
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
) -> Iterator[dict[str, Any]]:
    """`iter_eval` of a set that is open."""
    total = len(data) if limit is None else min(limit, len(data))
    rows: list[tuple] = []
    for sample in range(total * rank // world_size, total * (rank + 1) // world_size):
        try:
            meta = data.meta(sample)
            image = decode_eval(
                data.image(sample),
                image_size,
                resize_mode=resize_mode,
                interpolation=interpolation,
                max_pixels=max_pixels,
            )
            rows.append((image, data.captions(sample), data.key(sample), meta, sample))
        except DataError as error:
            if error.cause in SHARD_CAUSES:
                # No sample of it will come.
                raise
            shard, key = data.where(sample)
            on_bad(DataError(error.cause, error.detail, shard=shard, key=key))
        if len(rows) == batch_size:
            yield _batch(rows)
            rows = []
    if rows:
        yield _batch(rows)


def _raise(error: DataError) -> None:
    raise error from None


def _pass_over(error: DataError) -> None:
    pass


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
    return len(open_set(shards, cache_dir))


def iter_captions(
    shards: str | Path | Iterable[str], *, cache_dir: str | Path | None = None, on_bad_shard: str = "error"
) -> Iterator[str]:
    """Every caption once, in file order; samples without a readable one are passed over, bad shards under
    "skip". DataError for a shard that is gone, or another one, when its captions are read.
    """
    with closing(open_set(shards, cache_dir, on_bad_shard)) as data:
        yield from set_captions(data)


def set_captions(data: ShardSet | SampleSet) -> Iterator[str]:
    """`iter_captions` of a set that is open."""
    for sample in data:
        try:
            yield from data.captions(sample)
        except DataError as error:
            if error.cause in SHARD_CAUSES:
                raise


def open_set(shards: Any, cache_dir: str | Path | None = None, on_bad_shard: str = "error") -> ShardSet:
    """The samples of shards, paths, globs, braces or URLs."""
    names = expand_shards(shards)
    return ShardSet(
        names, cache_dir=Path(cache_dir) if cache_dir else cache_folder({}), on_bad_shard=on_bad_shard
    )
