"""The training stream: batches of uint8 images and token ids, in an order that is a function of numbers alone.

Position t of an endless line belongs to one sample (see order.py). Step b of rank r takes the positions

    b*W*B + r*B ... b*W*B + r*B + B-1          W ranks, B samples a rank

so the ranks cut the line without overlap or loss, a global batch is the same whatever W and B make it up, and the state
of a run is one number. Workers compute whole batches by number; the loader hands them over in order. Epochs follow each
other without a gap: with n samples, position t is place t mod n of epoch t div n, and no sample is dropped at a seam.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from clipkit.data.decode import crop_box, decode_squashed, decode_train, resize
from clipkit.data.faults import SHARD_CAUSES, DataError, FaultCounter
from clipkit.data.order import EpochOrder, Mixture, number, uniforms
from clipkit.data.shardset import ShardSet
from clipkit.data.spec import cache_folder, plain, resolve_data, sources
from clipkit.data.urls import Spool, expand_shards

_DRAWS = 5  # area, shape, left, top of the crop; the caption
_ATTEMPTS = 100
_FIRST_WARNING_S = 30.0


class _Batches(torch.utils.data.Dataset):
    """Batch number -> batch. Holds everything a worker needs; workers are copies of it."""

    def __init__(self, spec: Mapping[str, Any], sets: list[ShardSet], orders: list[EpochOrder], mixture: Mixture | None,
                 *, tokenizer: Any, image_size: int, batch_size: int, seed: int, rank: int, world_size: int):
        self.sets, self.orders, self.mixture = sets, orders, mixture
        self.tokenizer, self.image_size, self.seed = tokenizer, image_size, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.captions, self.max_pixels = spec["captions"], spec["max_pixels"]
        self.scale = tuple(spec["augmentation"]["crop_scale"])
        self.ratio = tuple(spec["augmentation"]["crop_ratio"])
        self.offsets = np.concatenate([[0], np.cumsum([len(one) for one in sets])])
        self.cache = _Cache(spec["cache_size"] or _cache_side(image_size, self.scale), sets) \
            if spec["cache"] == "ram" else None

    def plan(self, start: int) -> list[tuple[int, int, int, int]]:
        """(source, epoch, place in the epoch, sample) of this rank's rows of the global batch at position `start`."""
        first = start + self.rank * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        if self.mixture is None:
            which, places = np.zeros(len(positions), np.int64), positions
        else:
            which, places = self.mixture.at(positions)
        rows: list[Any] = [None] * len(positions)
        for source in np.unique(which):
            total = self.orders[source].total
            epochs, inside = np.divmod(places, total)
            for epoch in np.unique(epochs[which == source]):
                at = np.flatnonzero((which == source) & (epochs == epoch))
                for row, sample in zip(at, self.orders[source].at(int(epoch), inside[at])):
                    rows[row] = (int(source), int(epoch), int(inside[row]), int(sample))
        return rows

    def __getitem__(self, start: int) -> dict[str, Any]:
        """The batch at `start`; an error travels as a value, so that it arrives whole from a worker."""
        try:
            return self._batch(start)
        except DataError as error:
            return {"error": error}

    def _batch(self, start: int) -> dict[str, Any]:
        faults: list[tuple[str, str, str, str]] = []
        texts, keys, index = [], [], []
        # Pixel by pixel in memory (channels_last), as decoders write and convolutions like it.
        images = torch.empty(self.batch_size, self.image_size, self.image_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        rows = self.plan(start)
        draws = self._draws([(source, epoch, sample) for source, epoch, _, sample in rows])
        for row, (source, epoch, place, sample) in enumerate(rows):
            images[row], text, sample = self._sample(source, epoch, place, sample, draws[row], faults)
            texts.append(text)
            keys.append(self.sets[source].key(sample))
            index.append(int(self.offsets[source]) + sample)
        return {"image": images, "text": self.tokenizer(texts), "key": keys,
                "sample_index": torch.tensor(index, dtype=torch.int64), "faults": faults}

    def _draws(self, rows: list[tuple[int, int, int]]) -> np.ndarray:
        """Each row's random numbers, a function of (seed, epoch, key): (n, 5) float64."""
        ids = [number(self.seed, epoch, "sample", self.sets[source].key(sample)) for source, epoch, sample in rows]
        return uniforms(0, np.array(ids, dtype=np.uint64), _DRAWS)

    def _sample(self, source: int, epoch: int, place: int, sample: int, draws: np.ndarray,
                faults: list[tuple[str, str, str, str]]) -> tuple[torch.Tensor, str, int]:
        """Image, caption and number of a sample, or of the first readable substitute."""
        for attempt in range(_ATTEMPTS):
            try:
                return *self._read(source, epoch, sample, draws.tolist()), sample
            except DataError as error:
                shard, key = self.sets[source].where(sample)
                if error.cause in SHARD_CAUSES:
                    # A shard that was there when the run began: no sample of it will come, so substitutes are no help.
                    raise DataError(error.cause, error.detail, shard=shard, key=key) from None
                faults.append((error.cause, shard, key, error.detail))
            sample = self.orders[source].substitute(epoch, place, attempt)
            draws = self._draws([(source, epoch, sample)])[0]
        shard, key = self.sets[source].where(sample)
        raise DataError(faults[-1][0], f"{_ATTEMPTS} samples in a row are bad; this is the last", shard=shard, key=key)

    def _read(self, source: int, epoch: int, sample: int, draws: list[float]) -> tuple[torch.Tensor, str]:
        data = self.sets[source]
        if self.cache is not None:
            captions, pixels, aspect = self.cache.get(source, sample, self.max_pixels)
            image = self._crop(pixels, aspect, draws)
        else:
            captions = data.captions(sample)
            image = decode_train(data.image(sample), self.image_size, draws=draws, scale=self.scale, ratio=self.ratio,
                                 max_pixels=self.max_pixels)
        return image, captions[self._pick(len(captions), draws[4], epoch, data.key(sample))]

    def _crop(self, pixels: torch.Tensor, aspect: float, draws: list[float]) -> torch.Tensor:
        """A random resized crop of a squashed picture (3, S, S), of the same area and shape as of the picture itself."""
        side = pixels.shape[1]
        if self.scale[0] == 1.0 and side == self.image_size:
            return pixels
        top, left, h, w = crop_box(1.0, aspect, draws, self.scale, self.ratio)
        y0, x0 = round(top * side), round(left / aspect * side)
        y1, x1 = max(y0 + 1, round((top + h) * side)), max(x0 + 1, round((left + w) / aspect * side))
        return resize(pixels[:, y0:y1, x0:x1].permute(1, 2, 0), self.image_size, self.image_size, mode="bilinear")

    def _pick(self, count: int, draw: float, epoch: int, key: str) -> int:
        """Which caption: the first; a random one; or (all) each in turn, epoch after epoch, from a start by key."""
        if self.captions == "first" or count == 1:
            return 0
        if self.captions == "random":
            return min(count - 1, int(draw * count))
        return (number(self.seed, key, "captions") + epoch) % count

    def __len__(self) -> int:
        return sys.maxsize


def _cache_side(image_size: int, scale: tuple[float, float]) -> int:
    """Pixels a side kept in memory: enough that the smallest usual crop (half the area) is not magnified."""
    return image_size if scale[0] == 1.0 else min(2 * image_size, round(image_size / max(0.5, scale[0]) ** 0.5))


class _Cache:
    """Every picture decoded once, squashed to S x S uint8, in memory that all workers share; captions beside it.

    What is read back is bit for bit what decoding again would give, so the cache never changes a batch.
    """

    def __init__(self, side: int, sets: list[ShardSet]):
        self.sets, self.side = sets, side
        self.pixels = [torch.zeros(len(one), side, side, 3, dtype=torch.uint8).share_memory_() for one in sets]
        self.aspect = [torch.zeros(len(one), dtype=torch.float64).share_memory_() for one in sets]
        self.texts: list[dict[int, list[str]]] = [{} for _ in sets]

    def get(self, source: int, sample: int, max_pixels: int) -> tuple[list[str], torch.Tensor, float]:
        data = self.sets[source]
        captions = self.texts[source].get(sample)
        if captions is None:
            captions = self.texts[source][sample] = data.captions(sample)
        pixels, aspect = self.pixels[source][sample].permute(2, 0, 1), float(self.aspect[source][sample])
        if aspect == 0.0:
            squashed, aspect = decode_squashed(data.image(sample), self.side, max_pixels=max_pixels)
            pixels.copy_(squashed)
            # Written last: another worker that sees it may use the pixels.
            self.aspect[source][sample] = aspect
        return captions, pixels, aspect


class Stream:
    """Batches for ever, or for `epochs`; see `create_stream`.

    Attributes:
        samples_per_epoch: samples in one epoch over all ranks; stated by the settings or the sum of the sources.
        batches_per_epoch: whole global batches in one epoch.
        batch_size, world_size, rank: as given.
    """

    def __init__(self, batches: _Batches, *, spec: Mapping[str, Any], samples_per_epoch: int, num_workers: int,
                 epochs: int | None):
        self._batches, self._spec = batches, spec
        self.batch_size, self.rank, self.world_size = batches.batch_size, batches.rank, batches.world_size
        self.global_batch_size = self.batch_size * self.world_size
        self.samples_per_epoch, self.num_workers, self.epochs = samples_per_epoch, num_workers, epochs
        self.batches_per_epoch = samples_per_epoch // self.global_batch_size
        self._position = 0
        self._samples = sum(len(one) for one in batches.sets)
        self._index_faults = [fault for one in batches.sets for fault in one.faults]
        self._faults = FaultCounter(spec["max_bad_fraction"], samples=self._samples + len(self._index_faults),
                                    shards=sum(len(one.shards) for one in batches.sets))
        for shard, cause, key in self._index_faults:
            whole = cause in SHARD_CAUSES
            self._faults.add(cause, shard=shard, key="" if whole else key, detail=key if whole else "")
        self._indexed = dict(self._faults.counts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        loader = torch.utils.data.DataLoader(
            self._batches, batch_size=None, sampler=_Starts(self), num_workers=self.num_workers,
            timeout=self._spec["timeout_s"] if self.num_workers else 0,
            prefetch_factor=self._spec["prefetch"] if self.num_workers else None,
            pin_memory=torch.cuda.is_available(), generator=torch.Generator(),
        )
        watch = _Watch(self)
        batches = iter(loader)
        try:
            while True:
                watch.waiting()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except RuntimeError as error:
                    if "timed out" in str(error):
                        raise RuntimeError(f"no batch for timeout_s = {self._spec['timeout_s']:g} s; waiting for "
                                           f"{self._awaited()}") from error
                    raise
                watch.arrived()
                if "error" in batch:
                    raise batch["error"]
                for cause, shard, key, detail in batch.pop("faults"):
                    self._faults.add(cause, shard=shard, key=key, detail=detail)
                self._position += self.global_batch_size
                yield batch
        finally:
            watch.stop()
            del batches

    def _awaited(self) -> str:
        """The shards that the next batch reads. Called by the watching thread too, hence the copies."""
        planner = copy.copy(self._batches)
        planner.orders = [order.fresh() for order in planner.orders]
        planner.mixture = planner.mixture and planner.mixture.fresh()
        rows = planner.plan(self._position)
        shards = sorted({self._batches.sets[source].where(sample)[0] for source, _, _, sample in rows})
        return f"{', '.join(shards[:3])}{f' and {len(shards) - 3} more shards' if len(shards) > 3 else ''}"

    @property
    def epoch(self) -> float:
        """Epochs delivered, with the fraction of the present one."""
        return self._position / self.samples_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The position as plain numbers and strings. Batches that workers have prepared ahead do not count."""
        return {"position": self._position, "seed": self._batches.seed, "data": self._fingerprint(),
                "faults": self._faults.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch that `state` was taken at; the world size may differ.

        Raises:
            ValueError: the state is of another seed or another shard list.
        """
        if state["seed"] != self._batches.seed:
            raise ValueError(f"the data position was saved with seed {state['seed']}, this run has seed "
                             f"{self._batches.seed}: the order would differ; use the same seed or start a new run")
        if state["data"] != self._fingerprint():
            raise ValueError("the shards differ from those of the checkpoint (names, sizes, weights or order settings), so "
                             "its position has no meaning here; give the same data.train or start a new run")
        self._position = int(state["position"])
        self._faults.load_state_dict(list(state["faults"]))

    def _fingerprint(self) -> str:
        parts = []
        for one, order in zip(self._batches.sets, self._batches.orders):
            names = [os.path.basename(shard) for shard in one.shards]
            parts.append([names, one.counts.tolist(), order.name, order.window, order.shuffle, order.resample])
        if self._batches.mixture is not None:
            parts.append(self._batches.mixture.quota.tolist())
        return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def report(self) -> dict[str, Any]:
        """{"samples_seen": by all ranks, "skipped": {cause: distinct faults}, "epochs": ...}.

        Faults found while indexing are reported by rank 0 alone and those found while decoding by the rank that met
        them, so the sum over ranks counts each once (a bad sample that two ranks met in different epochs counts twice).
        """
        skipped = dict(self._faults.counts)
        if self.rank > 0:
            skipped = {cause: n - self._indexed.get(cause, 0) for cause, n in skipped.items()}
        return {"samples_seen": self._position, "epochs": round(self.epoch, 4),
                "skipped": {cause: n for cause, n in sorted(skipped.items()) if n}}


class _Starts(torch.utils.data.Sampler):
    """The global positions at which batches start, from the stream's position on."""

    def __init__(self, stream: Stream):
        self._stream = stream

    def __iter__(self) -> Iterator[int]:
        position, step = self._stream._position, self._stream.global_batch_size
        epochs = self._stream.epochs
        end = sys.maxsize if epochs is None else int(epochs * self._stream.samples_per_epoch)
        while position + step <= end:
            yield position
            position += step


class _Watch:
    """Says on standard error what a stalled stream waits for: after 30 s, then after every doubling."""

    def __init__(self, stream: Stream):
        self._stream, self._first_s, self._since, self._ended = stream, _FIRST_WARNING_S, None, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def waiting(self) -> None:
        self._since = time.monotonic()

    def arrived(self) -> None:
        self._since = None

    def stop(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        said = self._first_s
        while not self._ended.wait(min(1.0, self._first_s / 4)):
            since = self._since
            if since is None:
                said = self._first_s
            elif time.monotonic() - since > said:
                which = "first" if self._stream._position == 0 else "next"
                print(f"clipkit.data: waiting {said:g} s for the {which} batch: reading {self._stream._awaited()}",
                      file=sys.stderr, flush=True)
                said *= 2


def create_stream(spec: Mapping[str, Any], *, tokenizer: Any, image_size: int, batch_size: int, seed: int, rank: int = 0,
                  world_size: int = 1, num_workers: int = 0, epochs: int | None = None) -> Stream:
    """The training stream.

    Args:
        spec: the data settings (conf/data/shapes.yaml explains every key).
        tokenizer: texts -> (B, L) int64.
        image_size: pixels a side of the delivered images.
        batch_size: samples a rank and step.
        seed: decides order, crops and captions, with the epoch and the shard list.
        rank, world_size: this process's share.
        num_workers: processes that decode; 0 decodes in this one.
        epochs: end after so many (the last incomplete global batch is left out); None never ends.

    Returns:
        An iterable of {"image": (B, 3, H, W) uint8, "text": (B, L) int64, "key": list of str, "sample_index": (B,)
        int64}. Images are neither flipped nor normalised: clipkit.data.augment does that on the device.

    Raises:
        ValueError: wrong settings, shards that are not there, a global batch larger than the data.
        DataError: an empty or unreadable shard.
    """
    full = resolve_data(plain(spec))
    if batch_size < 1 or not 0 <= rank < world_size or num_workers < 0:
        raise ValueError(f"create_stream got batch_size={batch_size}, rank={rank}, world_size={world_size}, "
                         f"num_workers={num_workers}; expected batch_size >= 1, 0 <= rank < world_size, num_workers >= 0")
    cache_dir = cache_folder(full)
    spool = Spool(cache_dir / "shards", limit_gb=full["spool_gb"], stall_s=full["shard_stall_s"],
                  deadline_s=full["shard_deadline_s"], retries=full["shard_retries"])
    given = sources(full["train"])
    weighted = given[0]["weight"] is not None
    lists = [expand_shards(source["shards"] or [], what="data.train") for source in given]
    if not weighted:
        lists, given = [[shard for one in lists for shard in one]], given[:1]
    sets = [ShardSet(one, cache_dir=cache_dir, spool=spool, on_bad_shard=full["on_bad_shard"]) for one in lists]
    orders = [EpochOrder(one.counts, seed=seed, name=source["name"] if weighted else "", window=full["window"],
                         shuffle=full["shuffle"], resample=full["resample"]) for one, source in zip(sets, given)]
    mixture = Mixture([source["weight"] for source in given], seed=seed) if weighted and len(sets) > 1 else None
    total = sum(map(len, sets))
    if batch_size * world_size > total and not full["resample"]:
        raise ValueError(f"the global batch of {batch_size} x {world_size} ranks is larger than the {total} training "
                         "samples: the same picture would stand in it twice; lower batch_size or set data.resample=true")
    batches = _Batches(full, sets, orders, mixture, tokenizer=tokenizer, image_size=image_size, batch_size=batch_size,
                       seed=seed, rank=rank, world_size=world_size)
    return Stream(batches, spec=full, samples_per_epoch=full["samples_per_epoch"] or total, num_workers=num_workers,
                  epochs=epochs)
