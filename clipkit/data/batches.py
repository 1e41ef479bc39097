"""One batch of the training stream, from its number: read, decode, crop, tokenise.

Nothing here remembers what came before. A worker is a copy of `Batches` and makes any batch it is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from clipkit.data.decode import DRAWS, crop, decode_eval, decode_small, decode_train
from clipkit.data.faults import SHARD_CAUSES, DataError
from clipkit.data.order import EpochOrder, Mixture, number, uniforms
from clipkit.data.pairs import Known, Pairs
from clipkit.data.shardset import ShardSet
from clipkit.data.teacher import Teacher, content_of

# Of the crop's DRAWS random numbers, the one that it leaves to the caption.
_CAPTION = 4
_ATTEMPTS = 100


class Batches(torch.utils.data.Dataset):
    """Batch number -> batch. Holds everything a worker needs; workers are copies of it."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        sets: list[ShardSet],
        orders: list[EpochOrder],
        mixture: Mixture | None,
        *,
        tokenizer: Callable[[list[str]], torch.Tensor],
        image_size: int | None,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
        teacher: Teacher | None = None,
    ):
        self.sets, self.orders, self.mixture = sets, orders, mixture
        self.tokenizer, self.image_size, self.seed = tokenizer, image_size, seed
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.teacher = teacher
        self.pairs, self.max_pixels = Pairs(spec, seed=seed), spec["max_pixels"]
        scale = spec["augmentation"]["crop_scale"]
        self.scale = None if scale is None else tuple(scale)
        self.ratio = tuple(spec["augmentation"]["crop_ratio"])
        self.resize_mode, self.interpolation = resize_mode, interpolation
        self.offsets = np.concatenate([[0], np.cumsum([len(one) for one in sets])])
        self.cache = (
            _Cache(_cache_side(image_size, self.scale, spec["cache_size"]), sets, self.pairs, self._keep)
            if spec["cache"] == "ram" and image_size is not None
            else None
        )

    def plan(self, start: int) -> list[tuple[int, int, int, int]]:
        """(source, epoch, place in the epoch, sample) of this rank's rows of the global batch at position
        `start`.
        """
        parts = self.orders[0].parts
        # The global batch part by part, so that a rank's rows are of as few parts as can be.
        part, inside = np.divmod(
            np.arange(self.rank * self.batch_size, (self.rank + 1) * self.batch_size),
            self.batch_size * self.world_size // parts,
        )
        inside += start // parts
        if self.mixture is None:
            which = np.zeros(len(inside), np.int64)
        else:
            which, inside = self.mixture.at(inside)
        places = inside * parts + part
        rows: list[Any] = [None] * len(places)
        for source in np.unique(which):
            epochs, inside = self.orders[source].epochs(places)
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
        texts, wrong, keys, index, ids, contents = [], [], [], [], [], []
        # Pixel by pixel in memory (channels_last), as decoders write and convolutions like it.
        side = self.image_size or 0
        images = torch.empty(self.batch_size, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        rows = self.plan(start)
        draws = self._draws([(source, epoch, sample) for source, epoch, _, sample in rows])
        for row, (source, epoch, place, sample) in enumerate(rows):
            data = self.sets[source]
            for shard, cause, key in data.late_faults(sample):
                whole = cause in SHARD_CAUSES
                faults.append((cause, shard, "" if whole else key, key if whole else ""))
            image, known, content, sample, draw = self._sample(
                source, epoch, place, sample, draws[row], faults
            )
            if image is not None:
                images[row] = image
            captions, negatives = self.pairs.draw(known, draw, epoch, data.key(sample))
            texts += captions
            wrong += negatives
            keys.append(data.key(sample))
            contents.append(content)
            index.append(int(self.offsets[source]) + sample)
            ids.append(self.pairs.id(known, captions[0], data, sample, index[-1]))
        batch = {
            **({} if self.image_size is None else {"image": images}),
            "text": self.tokenizer(texts),
            "key": keys,
            "sample_index": torch.tensor(index, dtype=torch.int64),
            "faults": faults,
        }
        if self.pairs.per_image > 1:
            batch["text"] = batch["text"].unflatten(0, (self.batch_size, self.pairs.per_image))
        if self.pairs.negatives:
            batch["hard_negative"] = self.tokenizer(wrong).unflatten(
                0, (self.batch_size, self.pairs.negatives)
            )
        if self.pairs.have_ids:
            batch["pair_ids"] = torch.tensor(ids, dtype=torch.int64)
        if self.teacher is not None:
            batch |= self.teacher.entries(contents, texts, self.pairs.per_image)
        return batch

    def _draws(self, rows: list[tuple[int, int, int]]) -> np.ndarray:
        """Each row's random numbers, a function of (seed, epoch, key): (n, DRAWS) float64."""
        ids = [
            number(self.seed, epoch, "sample", self.sets[source].key(sample))
            for source, epoch, sample in rows
        ]
        return uniforms(0, np.array(ids, dtype=np.uint64), DRAWS)

    def _sample(
        self,
        source: int,
        epoch: int,
        place: int,
        sample: int,
        draws: np.ndarray,
        faults: list[tuple[str, str, str, str]],
    ) -> tuple[torch.Tensor | None, Known, int, int, float]:
        """Image, texts, the image file's content and the number of a sample, or of the first readable substitute, and its
        caption's draw.
        """
        cause = ""
        for attempt in range(_ATTEMPTS):
            try:
                read = self._read(source, sample, draws.tolist())
                if attempt == 0:
                    faults += self.sets[source].passed_over(sample)
                return *read, sample, float(draws[_CAPTION])
            except DataError as error:
                shard, key = self.sets[source].where(sample)
                if error.cause in SHARD_CAUSES:
                    # A shard that was there when the run began: no sample of it will come, so substitutes are
                    # no help.
                    raise DataError(error.cause, error.detail, shard=shard, key=key) from None
                cause = error.cause
                if attempt == 0:
                    # A substitute has a place of its own, where it is counted.
                    faults.append((cause, shard, key, error.detail))
            sample = self.orders[source].substitute(epoch, place, attempt)
            draws = self._draws([(source, epoch, sample)])[0]
        shard, key = self.sets[source].where(sample)
        raise DataError(
            cause, f"{_ATTEMPTS} samples in a row are bad; this is the last", shard=shard, key=key
        )

    def _read(self, source: int, sample: int, draws: list[float]) -> tuple[torch.Tensor | None, Known, int]:
        data = self.sets[source]
        if self.image_size is None:
            known, image, content = self.pairs.read(data, sample), None, 0
            if self.teacher is not None and "image" in self.teacher.sides:
                # Which picture it is says its bytes, though nobody looks at it.
                content = content_of(data.image(sample))
        elif self.cache is not None:
            known, pixels, shape, content = self.cache.get(source, sample)
            image = self._crop(pixels, shape, draws)
        else:
            known = self.pairs.read(data, sample)
            raw = data.image(sample)
            content = 0 if self.teacher is None else content_of(raw)
            image = decode_train(
                raw,
                self.image_size,
                draws=draws,
                scale=self.scale,
                ratio=self.ratio,
                interpolation=self.interpolation,
                resize_mode=self.resize_mode,
                max_pixels=self.max_pixels,
            )
        if self.teacher is not None:
            self.teacher.check(content, known.captions)
        return image, known, content

    def _keep(self, data: bytes, area: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """What is kept in memory of a picture, (h, w, 3) uint8 of at most `area` pixels, and its own height and width."""
        if self.scale is not None:
            return decode_small(data, area, interpolation=self.interpolation, max_pixels=self.max_pixels)
        assert self.image_size is not None
        image = decode_eval(
            data,
            self.image_size,
            resize_mode=self.resize_mode,
            interpolation=self.interpolation,
            max_pixels=self.max_pixels,
        )
        return image.permute(1, 2, 0), (self.image_size, self.image_size)

    def _crop(self, pixels: torch.Tensor, shape: tuple[int, int], draws: list[float]) -> torch.Tensor:
        """The training picture from what is kept of it."""
        if self.scale is None:
            return pixels.permute(2, 0, 1)
        assert self.image_size is not None
        return crop(
            pixels.numpy(),
            self.image_size,
            draws,
            self.scale,
            self.ratio,
            shape=shape,
            interpolation=self.interpolation,
        )

    def __len__(self) -> int:
        return sys.maxsize


def _cache_side(image_size: int, scale: tuple[float, float] | None, wanted: int | None) -> int:
    """The root of the pixels kept of a picture: `wanted`, or enough that the smallest usual crop (half the area) is not
    magnified; the picture itself where it is not cropped.
    """
    if scale is None:
        return image_size
    if wanted:
        return wanted
    return min(2 * image_size, round(image_size / max(0.5, scale[0]) ** 0.5))


class _Cache:
    """Every picture decoded once, in its own shape, in memory that all workers share; captions beside it.

    A picture of more than side * side pixels is reduced to so many, so its crops are resized twice: the same crops as
    without a cache, of slightly other pixels. What is read back is bit for bit what decoding again would give, so the
    order of reading never changes a batch.
    """

    def __init__(
        self,
        side: int,
        sets: list[ShardSet],
        pairs: Pairs,
        keep: Callable[[bytes, int], tuple[torch.Tensor, tuple[int, int]]],
    ):
        self.sets, self.area, self.pairs, self.keep = sets, side * side, pairs, keep
        self.pixels = [
            torch.zeros(len(one), side * side * 3, dtype=torch.uint8).share_memory_() for one in sets
        ]
        # Height and width of what is kept, and of the picture itself.
        self.shapes = [torch.zeros(len(one), 4, dtype=torch.int32).share_memory_() for one in sets]
        self.ready = [torch.zeros(len(one), dtype=torch.bool).share_memory_() for one in sets]
        # The image files', which a teacher's features are found by.
        self.contents = [torch.zeros(len(one), dtype=torch.int64).share_memory_() for one in sets]
        self.texts: list[dict[int, Known]] = [{} for _ in sets]

    def get(self, source: int, sample: int) -> tuple[Known, torch.Tensor, tuple[int, int], int]:
        data = self.sets[source]
        known = self.texts[source].get(sample)
        if known is None:
            known = self.texts[source][sample] = self.pairs.read(data, sample)
        slot, shapes = self.pixels[source][sample], self.shapes[source][sample]
        if not self.ready[source][sample]:
            raw = data.image(sample)
            pixels, own = self.keep(raw, self.area)
            self.contents[source][sample] = content_of(raw)
            shapes.copy_(torch.tensor([*pixels.shape[:2], *own]))
            slot[: pixels.numel()].view(pixels.shape).copy_(pixels)
            # Written last: another worker that sees it may use the pixels.
            self.ready[source][sample] = True
        h, w, height, width = shapes.tolist()
        content = int(self.contents[source][sample])
        return known, slot[: h * w * 3].view(h, w, 3), (height, width), content
