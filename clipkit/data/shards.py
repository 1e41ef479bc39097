"""The training stream: batches of uint8 images and token ids, in an order computed from numbers alone.

Position t of an endless line belongs to one sample (see order.py). Step b takes the W*B positions from b*W*B on, of W
ranks with B samples each; rank r takes

    b*W*B + r*B ... b*W*B + r*B + B-1

and with data.canonical_nodes = K above 1, where position t is of part t mod K, the r-th piece of the same length of the
step's positions sorted by part. So the ranks cut the line without overlap or loss, a global batch is the same whatever W
and B make it up, and the state of a run is one number. Workers compute whole batches by number; the loader hands them over in
order. Epochs follow each other without a gap: with n samples, position t is place t mod n of epoch t div n,
and no sample is dropped at a seam.
"""

from __future__ import annotations

import copy
import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from clipkit.data.ahead import Ahead
from clipkit.data.batches import Batches
from clipkit.data.decode import check_resizing
from clipkit.data.faults import SHARD_CAUSES, FaultCounter
from clipkit.data.order import EpochOrder, Mixture
from clipkit.data.shardset import ShardSet
from clipkit.data.spec import KINDS, cache_folder, check_kind, plain, resolve_data, sources
from clipkit.data.spool import Spool
from clipkit.data.table import open_registered, open_tables
from clipkit.data.teacher import Teacher
from clipkit.data.urls import expand_shards
from clipkit.data.workers import LOOK_EVERY_S, Workers
from clipkit.foreign import permit

_FIRST_WARNING_S = 30.0
# Shards of a set whose content a checkpoint knows.
_KNOWN_BY_CONTENT = 64
# Of what a position stands for, beside order and shards: raised where the same draws give another picture or caption.
VERSION = 2


class Stream:
    """Batches for ever, or for `epochs`; see `create_stream`.

    Attributes:
        samples_per_epoch: samples in one epoch over all ranks; stated by the settings or the sum of the
            sources.
        batches_per_epoch: whole global batches in one epoch.
        batch_size, world_size, rank: as given.
        teacher: the stored features that it reads; None: none.
        faults: what was left out. A rank holds its own share against the limits, unless `faults.agreed`.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        spec: Mapping[str, Any],
        samples_per_epoch: int,
        num_workers: int,
        epochs: int | None,
        spool: Spool,
    ):
        self._batches, self._spec, self._spool = batches, spec, spool
        self.batch_size, self.rank, self.world_size = batches.batch_size, batches.rank, batches.world_size
        self.global_batch_size = self.batch_size * self.world_size
        self.samples_per_epoch, self.num_workers, self.epochs = samples_per_epoch, num_workers, epochs
        self.batches_per_epoch = samples_per_epoch // self.global_batch_size
        self.teacher = batches.teacher
        self._teacher = batches.teacher.fingerprint if batches.teacher is not None else ""
        self._position = 0
        self._restarts = 0
        self._samples = sum(len(one) for one in batches.sets)
        self._index_faults = [fault for one in batches.sets for fault in one.faults]
        self.faults = FaultCounter(
            spec["max_bad_fraction"],
            samples=self._samples + len(self._index_faults),
            shards=sum(len(one.shards) for one in batches.sets),
            one_shard=spec["on_bad_shard"] == "skip",
        )
        for shard, cause, key in self._index_faults:
            whole = cause in SHARD_CAUSES
            self.faults.find(cause, shard=shard, key="" if whole else key, detail=key if whole else "")
        self.faults.check()
        self._indexed = dict(self.faults.counts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        watch, ahead = _Watch(self), self._fetching()
        batches = self._from_workers() if self.num_workers else iter(self._loader())
        try:
            while True:
                if ahead is not None:
                    ahead.at(self._position)
                watch.waiting()
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                finally:
                    self._restarts = getattr(batches, "restarts", 0)
                watch.arrived()
                if "error" in batch:
                    raise batch["error"]
                for cause, shard, key, detail in batch.pop("faults"):
                    self.faults.add(cause, shard=shard, key=key, detail=detail)
                self._forward_to(self._position + self.global_batch_size)
                if not self.faults.agreed:
                    self.faults.check(share=1 / self.world_size)
                yield batch
        finally:
            watch.stop()
            if ahead is not None:
                ahead.stop()
            if isinstance(batches, Workers):
                batches.close()
            del batches

    def _forward_to(self, position: int) -> None:
        self._position = position
        self.faults.epochs = max(1, -(-position // self._samples))

    def _loader(self) -> torch.utils.data.DataLoader:
        """From the batch at the present position on."""
        wait = self._spec["timeout_s"] or LOOK_EVERY_S
        return torch.utils.data.DataLoader(
            self._batches,
            batch_size=None,
            sampler=_Starts(self),
            num_workers=self.num_workers,
            timeout=min(wait, LOOK_EVERY_S) if self.num_workers else 0,
            prefetch_factor=self._spec["prefetch"] if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def _fetching(self) -> Ahead | None:
        """What fetches shards before they are read, where some are fetched."""
        # A daemon may start no process.
        if multiprocessing.current_process().daemon or not any(
            one.streams(range(len(one.shards))) for one in self._batches.sets
        ):
            return None
        lead = self.global_batch_size * self._spec["prefetch"] * self.num_workers
        return Ahead(self._batches, self._spool, lead=lead)

    def _from_workers(self) -> Workers:
        return Workers(
            self._loader, timeout_s=self._spec["timeout_s"], awaited=self._awaited, restarts=self._restarts
        )

    def _awaited(self) -> str:
        """The shards that the next batch reads, those that are not here yet first. Called by the watching thread too,
        hence the copies.
        """
        planner = copy.copy(self._batches)
        planner.orders = [order.fresh() for order in planner.orders]
        planner.mixture = planner.mixture and planner.mixture.fresh()
        rows = planner.plan(self._position)
        shards = [
            shard
            for number, one in enumerate(self._batches.sets)
            for shard in one.waits_for([sample for source, _, _, sample in rows if source == number])
        ]
        shards.sort(key=lambda shard: not shard.endswith("(not fetched yet)"))
        return f"{', '.join(shards[:3])}{f' and {len(shards) - 3} more shards' if len(shards) > 3 else ''}"

    @property
    def epoch(self) -> float:
        """Epochs delivered, with the fraction of the present one."""
        return self._position / self.samples_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The position as plain numbers and strings. Batches that workers have prepared ahead do not
        count.
        """
        return {
            "position": self._position,
            "seed": self._batches.seed,
            "data": self.fingerprint(),
            "content": [
                "".join(f"{one.probe(shard):016x}" for shard in _some(len(one.shards)))
                for one in self._batches.sets
            ],
            "faults": self.faults.state_dict(),
            "version": VERSION,
            "teacher": self._teacher,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch that `state` was taken at; the world size may differ.

        Raises:
            ValueError: the state is of another seed or another shard list, a shard has another content than then, or a
                version of clipkit saved it that made other pictures. Content is told of 64 shards of a list, spread over
                it; of one elsewhere, when it is read.
        """
        if state.get("version", 1) != VERSION:
            raise ValueError(
                f"the data position was saved by a version of clipkit that made other pictures (data version "
                f"{state.get('version', 1)}, here {VERSION}: crops, their filter, EXIF orientations): the run would "
                "learn from two kinds. Finish it with the version that began it, or start a new run"
            )
        if state["seed"] != self._batches.seed:
            raise ValueError(
                f"the data position was saved with seed {state['seed']}, this run has seed "
                f"{self._batches.seed}: the order would differ; use the same seed or start a new run"
            )
        if state["data"] != self.fingerprint():
            raise ValueError(
                "the shards differ from those of the checkpoint (names, sizes, weights or order settings), "
                "so "
                "its position has no meaning here; give the same data.train or start a new run"
            )
        if state.get("teacher", "") != self._teacher:
            raise ValueError(
                "data.teacher holds other features than when the run began: the run would learn from two teachers; give the "
                "same folder, or start a new run"
            )
        for one, probes in zip(self._batches.sets, state.get("content", [])):
            found = [int(probes[at : at + 16], 16) for at in range(0, len(probes), 16)]
            one.expect({shard: probe for shard, probe in zip(_some(len(one.shards)), found) if probe})
        self._forward_to(int(state["position"]))
        self.faults.load_state_dict(state["faults"])

    def fingerprint(self) -> str:
        """What the order is a function of, beside the seed; the same on every rank."""
        parts = []
        for one, order in zip(self._batches.sets, self._batches.orders):
            names = [os.path.basename(shard) for shard in one.shards]
            resample = "by window" if order.resample else False
            parts.append([names, one.counts.tolist(), order.name, order.window, order.shuffle, resample])
            if order.parts > 1:
                parts.append(order.parts)
        if self._batches.mixture is not None:
            parts.append(self._batches.mixture.quota.tolist())
        return hashlib.blake2b(repr(parts).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def describe(self) -> str:
        """`12,000 samples in 12 shards`."""
        shards = sum(len(one.shards) for one in self._batches.sets)
        return f"{self._samples:,} samples in {shards:,} shards"

    def report(self) -> dict[str, Any]:
        """{"samples_seen": by all ranks, "skipped": {cause: faults}, "epochs": ...}, and where it is not 0
        "worker_restarts": how often this rank's workers were started again after one had died.

        Faults found while indexing are reported by rank 0 alone and those found while decoding by the rank
        that met them, so the sum over ranks counts each once an epoch.
        """
        skipped = dict(self.faults.counts)
        if self.rank > 0:
            skipped = {cause: n - self._indexed.get(cause, 0) for cause, n in skipped.items()}
        return {
            "samples_seen": self._position,
            "epochs": round(self.epoch, 4),
            "skipped": {cause: n for cause, n in sorted(skipped.items()) if n},
            **({"worker_restarts": self._restarts} if self._restarts else {}),
        }


def _some(count: int) -> list[int]:
    """At most _KNOWN_BY_CONTENT numbers below `count`, evenly spread."""
    some = min(count, _KNOWN_BY_CONTENT)
    return [count * place // some for place in range(some)]


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
        self._stream, self._first_s, self._since, self._ended = (
            stream,
            _FIRST_WARNING_S,
            None,
            threading.Event(),
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def waiting(self) -> None:
        self._since = time.monotonic()

    def arrived(self) -> None:
        self._since = None

    def stop(self) -> None:
        self._ended.set()
        # A thread that is waking while Python ends aborts the process.
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        said = self._first_s
        while not self._ended.wait(min(1.0, self._first_s / 4)):
            since = self._since
            if since is None:
                said = self._first_s
            elif time.monotonic() - since > said:
                which = "first" if self._stream._position == 0 else "next"
                print(
                    f"clipkit.data: waiting {said:g} s for the {which} batch: reading "
                    f"{self._stream._awaited()}",
                    file=sys.stderr,
                    flush=True,
                )
                said *= 2


def create_stream(
    spec: Mapping[str, Any],
    *,
    tokenizer: Callable[[list[str]], torch.Tensor],
    image_size: int | None,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    epochs: int | None = None,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    teacher_sides: Sequence[str] | None = None,
) -> Stream:
    """The training stream.

    Args:
        spec: the data settings (conf/data/shapes.yaml explains every key).
        tokenizer: texts -> (B, L) int64.
        image_size: pixels a side of the delivered images; None: captions alone, and no picture is read.
        batch_size: samples a rank and step.
        seed: decides order, crops and captions, with the epoch and the shard list.
        rank, world_size: this process's share.
        num_workers: processes that decode; 0 decodes in this one.
        epochs: end after so many (the last incomplete global batch is left out); None never ends.
        resize_mode: shortest, longest or squash, of pictures that are not cropped (crop_scale null).
        interpolation: bicubic or bilinear.
        teacher_sides: image, text or both: what is read of data.teacher; None: all it holds.

    Returns:
        An iterable of {"image": (B, 3, H, W) uint8, "text": (B, L) int64, "key": list of str, "sample_index":
        (B,) int64}, and by the settings "pair_ids": (B,) int64 and "hard_negative": (B, m h, L) int64; with m
        captions_per_image text is (B, m, L). With data.teacher also "dist_image_features": (B, E), "dist_text_features":
        (B, E) or (B, m, E) float32, and "dist_logit_scale": () of a teacher that has one. Images are neither flipped nor
        normalised: clipkit.data.augment does that on the device.

    Raises:
        ValueError: wrong settings, shards that are not there, a global batch larger than the data.
        DataError: an empty or unreadable shard.
    """
    full = resolve_data(plain(spec))
    if batch_size < 1 or not 0 <= rank < world_size or num_workers < 0:
        raise ValueError(
            f"create_stream got batch_size={batch_size}, rank={rank}, world_size={world_size}, "
            f"num_workers={num_workers}; expected batch_size >= 1, 0 <= rank < world_size, num_workers >= 0"
        )
    if not isinstance(full["canonical_nodes"], int) or full["canonical_nodes"] < 1:
        raise ValueError(
            f"data.canonical_nodes is {full['canonical_nodes']!r}; expected a whole number, 1 or more"
        )
    check_kind(full["kind"])
    check_resizing(resize_mode, interpolation)
    sets, given, spool = open_sets(full)
    weighted = given[0]["weight"] is not None
    orders = [
        EpochOrder(
            one.counts,
            seed=seed,
            name=source["name"] if weighted else "",
            window=full["window"],
            shuffle=full["shuffle"],
            resample=full["resample"],
            parts=full["canonical_nodes"],
        )
        for one, source in zip(sets, given)
    ]
    mixture = (
        Mixture([source["weight"] for source in given], seed=seed) if weighted and len(sets) > 1 else None
    )
    total, parts = sum(map(len, sets)), full["canonical_nodes"]
    if batch_size * world_size % parts or min(map(len, sets)) < parts:
        raise ValueError(
            f"each batch takes as many samples of each of the data.canonical_nodes={parts} parts, which the global batch of "
            f"{batch_size} x {world_size} ranks is no multiple of, or a source has fewer samples than that: give the number "
            "of nodes or a small multiple of it, and a batch size that is a multiple of that"
        )
    if batch_size * world_size > total and not full["resample"]:
        raise ValueError(
            f"the global batch of {batch_size} x {world_size} ranks is larger than the {total} training "
            "samples: the same picture would stand in it twice; lower batch_size or set data.resample=true"
        )
    batches = Batches(
        full,
        sets,
        orders,
        mixture,
        tokenizer=tokenizer,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        resize_mode=resize_mode,
        interpolation=interpolation,
        teacher=_open_teacher(full, teacher_sides),
    )
    return Stream(
        batches,
        spec=full,
        samples_per_epoch=full["samples_per_epoch"] or total,
        num_workers=num_workers,
        epochs=epochs,
        spool=spool,
    )


def open_sets(spec: Mapping[str, Any]) -> tuple[list[Any], list[dict[str, Any]], Spool]:
    """The samples of data.train: a set for each weighted source or one of all, the sources, and what fetches shards.

    Args:
        spec: completed settings (resolve_data).

    Raises:
        ValueError, DataError: as `create_stream`.
    """
    full = spec
    cache_dir = cache_folder(full)
    spool = Spool(
        cache_dir / "shards",
        limit_gb=full["spool_gb"],
        stall_s=full["shard_stall_s"],
        deadline_s=full["shard_deadline_s"],
        retries=full["shard_retries"],
    )
    given = sources(full["train"])
    weighted = given[0]["weight"] is not None
    gaps = full["on_bad_shard"] == "skip"
    sets: list[Any] = []
    if full["kind"] in KINDS:
        lists = [expand_shards(source["shards"] or [], what="data.train", gaps=gaps) for source in given]
        if not weighted:
            lists, given = [[shard for one in lists for shard in one]], given[:1]
        for one in lists:
            if full["kind"] == "table":
                sets.append(open_tables(full, one, cache_dir))
                continue
            sets.append(
                ShardSet(
                    one,
                    cache_dir=cache_dir,
                    spool=spool,
                    on_bad_shard=full["on_bad_shard"],
                    declared=True,
                    together=max(full["window"], full["canonical_nodes"]),
                )
            )
    else:
        sets += open_registered(full, cache_dir)
    return sets, given, spool


def _open_teacher(spec: Mapping[str, Any], sides: Sequence[str] | None) -> Teacher | None:
    if not spec["teacher"] or sides == []:
        return None
    permit(spec["teacher"], "data.teacher")
    return Teacher(spec["teacher"], sides)
