"""Evaluation images one by one: decoded, or left out and counted as a fault.

Every source yields its images once, in a fixed order, each batch with its place, so that ranks share the work
and the whole can be put together again. Images outside shards are decoded and resized by PIL: of an
upright RGB picture the pixels that open_clip's evaluation transform makes, before its normalisation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkit.data.decode import centre, read_image, resized_shape, seen
from clipkit.data.faults import DataError, FaultCounter
from clipkit.data.formats import MAX_PIXELS, decode_pillow, open_image
from clipkit.data.tarindex import IMAGES
from clipkit.evals.classes import ClassNames
from clipkit.foreign import BrokenFile

IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGES)
# The fraction of a set's items that may be left out, for each cause, before its metrics are those of another set.
MAX_BAD_FRACTION = 0.05
WHOLE = re.compile(r"\s*[+-]?\d{1,9}\s*", re.ASCII)


def load_image(
    data: bytes | Path,
    image_size: int,
    *,
    resize_mode: str = "shortest",
    interpolation: str = "bicubic",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """(3, image_size, image_size) uint8 RGB, upright, resized by Pillow; see `clipkit.data.decode.decode_eval`.

    Raises:
        DataError: it does not decode, its header claims more than `max_pixels`, or `data` is no regular file.
    """
    raw = data if isinstance(data, bytes) else read_image(data)
    open_image(raw, max_pixels=max_pixels).close()
    pixels = decode_pillow(raw)
    top, left, height, width = seen(pixels.shape[0], pixels.shape[1], resize_mode)
    image = Image.fromarray(pixels[top : top + height, left : left + width])
    height, width = resized_shape(height, width, image_size, resize_mode)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling[interpolation.upper()])
    return centre(torch.from_numpy(np.array(image)).permute(2, 0, 1), image_size)


def check_faults(faults: Sequence[DataError], identity: str, *, items: int, shards: int = 1) -> None:
    """RuntimeError naming an item's shard and key, when too many of a set's items are left out by one cause."""
    counter = FaultCounter(
        MAX_BAD_FRACTION,
        samples=items,
        shards=shards,
        advice=f"Mend {identity}: its metrics would be those of another set.",
    )
    for fault in faults:
        counter.add(fault.cause, shard=fault.shard, key=fault.key, detail=fault.detail)
    counter.check()


def class_id(value: Any) -> int | None | DataError:
    """A class id as the data gives it: None where there is none, a broken_label for what is no whole number."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        return int(value)
    if isinstance(value, str) and WHOLE.fullmatch(value):
        return int(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e9):
        return value
    return DataError("broken_label", f"the class id is of type {type(value).__name__}, and no whole number")


class ImageSource:
    """Images with captions or class labels.

    Attributes:
        identity: what the source reads, for messages.
        classes: the names of the labels 0, 1, ... that the source itself knows, or None.
        labelled: leave out images whose class id is no whole number.
        count, shards: how many items it has with those that are left out, and in how many shards; known once
            `batches` has been begun.
    """

    identity: str
    classes: list[str] | None = None
    labelled: bool = False
    count: int = 0
    shards: Sequence[str] = ("",)

    @property
    def content(self) -> Hashable:
        """All that decides which pictures and captions are read, in which order: equal contents are encoded once.

        Labels are no part of it: an encoded set has none, and `label` gives each task its own.
        """
        raise NotImplementedError

    def label(self, key: str, meta: dict[str, Any]) -> int | None | DataError:
        """The class id of one image: None where it has none, a broken_label where it is no whole number."""
        raise NotImplementedError

    def batches(
        self,
        image_size: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        resize_mode: str = "shortest",
        interpolation: str = "bicubic",
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """This rank's batches {image (B, 3, H, W) uint8, captions, keys, meta, where, faults}, each with its
        place among those of all ranks. `where` names an image's shard; `faults` are the items left out, as
        DataErrors; B may be 0.
        """
        how = {"resize_mode": resize_mode, "interpolation": interpolation}
        return self._batches(image_size, batch_size, rank, world_size, how)

    def _batches(
        self, image_size: int, batch_size: int, rank: int, world_size: int, how: dict[str, Any]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """`batches`; `how` is the resize_mode and interpolation of the pictures."""
        raise NotImplementedError


# What a batch has of each of its images beside the pixels.
COLUMNS = ("captions", "keys", "meta", "where")


def batch_of(rows: list[dict[str, Any]], faults: list[DataError], image_size: int) -> dict[str, Any]:
    """A batch of rows {image, captions, keys, meta, where} and of what was left out."""
    images = [row["image"] for row in rows]
    return {
        "image": torch.stack(images)
        if images
        else torch.empty(0, 3, image_size, image_size, dtype=torch.uint8),
        **{name: [row[name] for row in rows] for name in COLUMNS},
        "faults": faults,
    }


class Items(ImageSource):
    """Images listed beforehand; a subclass lists (key, label, captions) and reads the bytes of one.

    Attributes:
        lost: what was found to be no item while listing.
    """

    items: list[tuple[str, int | None, list[str]]]
    lost: Sequence[DataError] = ()

    @property
    def content(self):
        listed = [(key, captions) for key, _, captions in self.items]
        return type(self).__name__, self.identity, hashlib.sha256(repr(listed).encode()).hexdigest()

    def label(self, key, meta):
        return self._label_of[key]

    @cached_property
    def _label_of(self) -> dict[str, int | None]:
        return {key: label for key, label, _ in self.items}

    def read(self, key: str) -> bytes:
        raise NotImplementedError

    def _batches(self, image_size, batch_size, rank, world_size, how):
        self.count = len(self.items) + len(self.lost)
        for place in range(rank, -(-len(self.items) // batch_size), world_size):
            rows, faults = [], list(self.lost) if place == 0 else []
            for key, _, captions in self.items[place * batch_size : (place + 1) * batch_size]:
                try:
                    image = load_image(self.read(key), image_size, **how)
                except DataError as error:
                    faults.append(DataError(error.cause, error.detail, shard=self.identity, key=key))
                    continue
                except (OSError, BrokenFile) as error:
                    faults.append(DataError("missing_image", str(error), shard=self.identity, key=key))
                    continue
                rows.append(
                    {"image": image, "captions": captions, "keys": key, "meta": {}, "where": self.identity}
                )
            yield place, batch_of(rows, faults, image_size)

    def follow(self, classes: ClassNames) -> None:
        """Number the labels by the given classes instead of the source's own, which are matched by name.

        Raises:
            ValueError: as `clipkit.evals.classes.match_classes`, or for a class id that the source's own names lack.
        """
        own = self.classes
        if own is None or own == classes.names:
            return
        rows = classes.match(own, f"{self.identity}: class")
        for key, label, _ in self.items:
            if label is not None and not 0 <= label < len(own):
                raise ValueError(
                    f"{self.identity}: image {key!r} has class id {label}, but there are {len(own)} names"
                )
        self.items = [
            (key, None if label is None else rows[own[label]], captions)
            for key, label, captions in self.items
        ]
        self.classes = classes.names

    def _label_by_folder(self, keys: list[str], classes: ClassNames | None) -> None:
        """Fill `items` from the folder each key lies in; `classes` fixes the labels."""
        found = sorted({Path(key).parent.name for key in keys})
        self.classes = classes.names if classes else found
        labels = (
            classes.match(found, f"{self.identity}: folder")
            if classes
            else {name: label for label, name in enumerate(found)}
        )
        self.items = [(key, labels[Path(key).parent.name], []) for key in sorted(keys)]
        if not self.items:
            raise ValueError(f"{self.identity} holds no image in a class folder; expected CLASS/NAME.jpg")
