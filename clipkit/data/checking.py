"""Looking at shards before a run: every fault by cause, duplicates, caption statistics, overlap with an
evaluation set.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipkit.data.decode import MAX_PIXELS, decode, read_size
from clipkit.data.faults import SHARD_CAUSES, DataError
from clipkit.data.shardset import ShardSet
from clipkit.data.spec import cache_folder
from clipkit.data.tarindex import index_tar
from clipkit.data.urls import expand_shards

_LISTED = 20


def check(
    shards: str | Path | Iterable[str],
    *,
    overlap_with: str | Path | Iterable[str] | None = None,
    workers: int = 1,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Decode every sample and count.

    Args:
        shards: paths, globs, braces or URLs.
        overlap_with: shards of an evaluation set, to be compared by picture and by caption.
        workers: processes.
        max_pixels: larger pictures count as image_too_large.

    Returns:
        {"shards", "samples", "good": whole samples, "faults": {cause: n}, "examples": {cause: up to 20 "shard
        key: detail"}, "duplicate_keys": keys that stand in several shards, which are among the examples,
        "duplicate_images": samples whose file is byte for byte that of an earlier one, "similar_images": samples whose 64-bit difference hash
        is that of an earlier one with other bytes, "captions": statistics, "overlap": {"images",
        "similar_images", "captions": samples that are in the other set too}}.

    Raises:
        ValueError: no such shards.
    """
    names = expand_shards(shards)
    faults: Counter[str] = Counter()
    examples: dict[str, list[str]] = defaultdict(list)
    keys: dict[str, str] = {}
    repeated: set[str] = set()
    images: Counter[bytes] = Counter()
    hashes: set[int] = set()
    similar, good, both, texts = 0, 0, 0, Texts()
    other = _fingerprints(overlap_with, workers, max_pixels) if overlap_with else None
    overlap = Counter(images=0, similar_images=0, captions=0)
    for name, (found, problems) in zip(names, _map(names, workers, max_pixels), strict=True):
        kept = {sample[0] for sample in found}
        for shard, cause, key, detail in problems:
            faults[cause] += 1
            both += cause == "broken_json" and key in kept
            if len(examples[cause]) < _LISTED:
                examples[cause].append(f"{shard} {key}{': ' + detail if detail else ''}".strip())
        for key, image, similarity, captions in found:
            good += 1
            if (first := keys.setdefault(key, name)) != name:
                repeated.add(key)
                if len(examples["duplicate_keys"]) < _LISTED:
                    examples["duplicate_keys"].append(f"{key}: {first} and {name}")
            similar += similarity in hashes and image not in images
            hashes.add(similarity)
            images[image] += 1
            texts.add(captions)
            if other is not None:
                overlap.update(
                    images=image in other[0],
                    similar_images=similarity in other[1],
                    captions=any(text.lower() in other[2] for text in captions),
                )
    report = {
        "shards": len(names),
        "samples": good + sum(faults.values()) - both,
        "good": good,
        "faults": dict(sorted(faults.items())),
        "examples": {cause: known for cause, known in examples.items() if known},
        "duplicate_keys": len(repeated),
        "duplicate_images": sum(n - 1 for n in images.values()),
        "similar_images": similar,
        "captions": texts.report(),
    }
    return {**report, "overlap": dict(overlap)} if other is not None else report


def stats(shards: str | Path | Iterable[str]) -> dict[str, Any]:
    """What shards hold, without decoding a picture: samples, bytes, sides in pixels, captions.

    Returns:
        {"shards", "samples", "bytes", "samples_per_shard": {min, median, max}, "width", "height": {min,
        median, max} in pixels, "captions": {...}}.
    """
    names = expand_shards(shards)
    data = ShardSet(names, cache_dir=cache_folder({}), on_bad_shard="skip")
    texts, widths, heights = Texts(), [], []
    for sample in data:
        try:
            texts.add(data.captions(sample))
            height, width = read_size(data.image(sample))
        except DataError as error:
            if error.cause in SHARD_CAUSES:
                raise
            continue
        widths.append(width)
        heights.append(height)
    data.close()
    return {
        "shards": len(names),
        "samples": len(data),
        "bytes": int(data.bytes),
        "samples_per_shard": _spread(data.counts),
        "width": _spread(widths),
        "height": _spread(heights),
        "captions": texts.report(),
    }


class Texts:
    """Caption statistics, gathered one sample at a time."""

    def __init__(self) -> None:
        self._words: Counter[int] = Counter()
        self._per_sample: Counter[int] = Counter()
        self._seen: set[bytes] = set()
        self._vocabulary: Counter[str] = Counter()

    def add(self, captions: Sequence[str]) -> None:
        self._per_sample[len(captions)] += 1
        for text in captions:
            words = text.lower().split()
            self._words[len(words)] += 1
            self._vocabulary.update(words)
            self._seen.add(hashlib.blake2b(text.encode(), digest_size=8).digest())

    def report(self) -> dict[str, Any]:
        """{"captions", "distinct", "per_sample", "words": {min, median, max}, "vocabulary": distinct
        words}.
        """
        return {
            "captions": sum(self._words.values()),
            "distinct": len(self._seen),
            "per_sample": _spread(list(self._per_sample.elements())),
            "words": _spread(list(self._words.elements())),
            "vocabulary": len(self._vocabulary),
        }


def _spread(values: Any) -> dict[str, float]:
    if not len(values):
        return {}
    return {"min": int(min(values)), "median": float(np.median(values)), "max": int(max(values))}


def difference_hash(pixels: np.ndarray) -> int:
    """64 bits: whether each of 8 x 8 cells of the picture in grey is brighter than its right neighbour."""
    grey = np.asarray(
        Image.fromarray(pixels).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16
    )
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def _shard(name: str, max_pixels: int) -> tuple[list[tuple], list[tuple]]:
    """One shard's good samples (key, image digest, difference hash, captions) and faults."""
    good, faults = [], []
    try:
        data = ShardSet([name], cache_dir=cache_folder({}), on_bad_shard="skip")
    except DataError as error:
        # Nothing in it can be read; its single faults are in the index, which the error does not carry.
        return [], [
            *_index_faults(name),
            *([(name, error.cause, "", error.detail)] if not _index_faults(name) else []),
        ]
    for shard, cause, key in data.faults:
        faults.append((shard, cause, key, ""))
    for sample in data:
        key = data.key(sample)
        try:
            raw, captions = data.image(sample), data.captions(sample)
            pixels = decode(raw, max_pixels=max_pixels)
            faults += [(name, cause, key, detail[:120]) for cause, _, _, detail in data.passed_over(sample)]
        except DataError as error:
            faults.append((name, error.cause, key, error.detail[:120]))
            continue
        good.append((key, hashlib.blake2b(raw, digest_size=16).digest(), difference_hash(pixels), captions))
    data.close()
    return good, faults


def _index_faults(name: str) -> list[tuple]:
    try:
        return [(name, cause, key, "") for cause, key in index_tar(name).faults]
    except OSError:
        return []


def _map(names: list[str], workers: int, max_pixels: int) -> Iterator[tuple[list[tuple], list[tuple]]]:
    if workers <= 1:
        yield from map(_shard, names, repeat(max_pixels))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_shard, names, repeat(max_pixels))


def _fingerprints(shards: Any, workers: int, max_pixels: int) -> tuple[set[bytes], set[int], set[str]]:
    """Image digests, difference hashes and captions of a set."""
    images, similar, texts = set(), set(), set()
    for found, _ in _map(expand_shards(shards, what="--overlap"), workers, max_pixels):
        for _, image, similarity, captions in found:
            images.add(image)
            similar.add(similarity)
            texts.update(text.lower() for text in captions)
    return images, similar, texts
