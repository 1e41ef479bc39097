"""The model's side of an evaluation: data in, features out, each data set encoded once whatever the number of
tasks.

With a group every rank encodes its share and all ranks hold the whole features afterwards (CPU, float32: 2 GB
for a million images of 512 dimensions), so that a metric is the same number on every rank.
"""

from __future__ import annotations

import hashlib
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from clipkit.data.decode import resizing_of
from clipkit.data.faults import DataError
from clipkit.evals.checks import TaskRecord, alike, groups_of, in_words, is_constant
from clipkit.evals.items import COLUMNS, ImageSource, check_faults

T = TypeVar("T")

# Seconds between two lines about one data set.
EVERY = 10.0


def check_features(features: Tensor, name: str, keys: Sequence[str] | None = None) -> None:
    """Raise ValueError naming the first row of `features` (rows, D) that holds a NaN or an infinity."""
    bad = torch.nonzero(~torch.isfinite(features).all(dim=1)).squeeze(1)
    if len(bad):
        first = int(bad[0])
        which = f"row {first}" if keys is None else f"row {first}, {keys[first]!r}"
        raise ValueError(
            f"{name} has non-finite values in {len(bad)} of {len(features)} rows (first: {which}): "
            "the model diverged or its checkpoint is damaged; no metric of it means anything"
        )


def _rows(tokens: Any, texts: Sequence[str]) -> Sequence[Any]:
    """What tells each text's tokens from others', in whatever form a tokenizer gives them."""
    if isinstance(tokens, Tensor):
        return [row.tobytes() for row in tokens.cpu().numpy()]
    if isinstance(tokens, Mapping) and isinstance(ids := tokens.get("input_ids"), Tensor):
        # Padded to the longest of the batch: the mask says what is text.
        mask = tokens.get("attention_mask", torch.ones_like(ids)).bool()
        return [row[kept].cpu().numpy().tobytes() for row, kept in zip(ids, mask, strict=True)]
    return [text.encode() for text in texts]


def _digest(row: bytes) -> bytes:
    return hashlib.blake2b(row, digest_size=16).digest()


@dataclass
class EncodedImages:
    """A data set after the image tower.

    Attributes:
        image_features: (N, D) CPU float32, unit norm.
        captions, keys, meta, where, pixels: one entry an image; `where` is its shard, `pixels` a sum (CRC-32) of its
            pixels as the model saw them.
        labels: one entry an image, None where the source is not labelled or the data has none.
        same: groups of rows whose pictures have the same pixels, and therefore the same features to the bit.
        faults: the items left out, by any rank: each with its shard and key.
        count, shards: how many items there are with those, and how many shards.
    """

    image_features: Tensor
    captions: list[list[str]]
    keys: list[str]
    meta: list[dict[str, Any]]
    where: list[str]
    pixels: list[int]
    labels: list[int | None]
    same: list[list[int]] = field(default_factory=list)
    faults: list[DataError] = field(default_factory=list)
    count: int = 0
    shards: int = 1
    text: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    same_captions: list[list[int]] = field(default_factory=list, repr=False)

    @property
    def skipped(self) -> dict[str, int]:
        """{"skipped": number of items left out}, to stand among a task's metrics; empty where none was."""
        return {"skipped": len(self.faults)} if self.faults else {}

    def labelled(self, source: ImageSource) -> EncodedImages:
        """The same images with the labels that `source` gives; those whose label is broken are among the faults."""
        labels = [source.label(key, meta) for key, meta in zip(self.keys, self.meta, strict=True)]
        kept = [row for row, label in enumerate(labels) if not isinstance(label, DataError)]
        broken = [
            DataError(label.cause, label.detail, shard=self.where[row], key=self.keys[row])
            for row, label in enumerate(labels)
            if isinstance(label, DataError)
        ]
        columns: dict[str, Any] = {
            name: [getattr(self, name)[row] for row in kept] for name in (*COLUMNS, "pixels")
        }
        return EncodedImages(
            self.image_features[kept] if broken else self.image_features,
            **columns,
            labels=[label for label in labels if not isinstance(label, DataError)],
            same=_kept(self.same, kept) if broken else self.same,
            faults=[*self.faults, *broken],
            count=self.count,
            shards=self.shards,
        )


def _kept(groups: list[list[int]], kept: list[int]) -> list[list[int]]:
    """Groups of rows after the rows `kept` alone are left."""
    place = {row: new for new, row in enumerate(kept)}
    left = [[place[row] for row in group if row in place] for group in groups]
    return [group for group in left if len(group) > 1]


class Encoder:
    """A model with its tokenizer on a device, remembering every data set it has encoded.

    Args:
        model: has `encode_image(image (B, 3, H, W) uint8) -> (B, D)` and `encode_text(tokens) -> (B, D)`,
            unit norm, and `image_tower` with `image_size` and perhaps `resize_mode` and `interpolation`; a text-only
            model needs the second alone.
        tokenizer: list of str -> tokens with `.to(device)`.
        group: ranks that share the encoding, or None for this process alone.
        progress: is given lines that say how far the work has come, on rank 0; None: nothing is said.

    Attributes:
        record: what the present task rests on; `clipkit.evals.evaluate` begins one for each.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Any],
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 64,
        group: ProcessGroup | None = None,
        progress: Callable[[str], None] | None = None,
    ):
        # One of several classes that share their methods' names alone.
        self.model: Any = model
        self.tokenizer = tokenizer
        self.device, self.batch_size, self.group = torch.device(device), batch_size, group
        # By what is read, never with labels; and with the labels of one task's source.
        self._images: dict[Hashable, EncodedImages] = {}
        self._labelled: dict[ImageSource, EncodedImages] = {}
        self.record = TaskRecord()
        self._progress = progress

    def tell(self, line: str) -> None:
        """Say how far the work has come, where somebody wants to know."""
        if self._progress is not None and self.world[0] == 0:
            self._progress(line)

    def _told(self, what: str, total: Callable[[], int], work: Iterable[tuple[int, T]]) -> Iterator[T]:
        """Pairs (number of items, result) as results; says every ten seconds how many items this rank has done."""
        done, began = 0, time.monotonic()
        last = began
        for count, result in work:
            yield result
            done, now = done + count, time.monotonic()
            if now - last >= EVERY:
                last = now
                share = f" of this rank's about {-(-total() // self.world[1])}" if total() else ""
                self.tell(f"{done}{share} {what}, {done / (now - began):.0f}/s")

    @property
    def world(self) -> tuple[int, int]:
        """(rank, world size) of the group."""
        return (self.group.rank(), self.group.size()) if self.group is not None else (0, 1)

    @property
    def ranking_device(self) -> torch.device:
        """Where float64 scores are formed: the model's device, or the CPU where that has no float64."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    @torch.no_grad()
    def images(self, source: ImageSource) -> EncodedImages:
        """The images of `source`, which are encoded once for all sources of equal content, with its own labels.

        What cannot be read is left out and counted, on every rank alike; rank 0 says so once.

        Raises:
            RuntimeError: more than a twentieth of the items are left out by one cause; names shard and key.
        """
        if source.content not in self._images:
            self._images[source.content] = self._encode_images(source)
        images = self._images[source.content]
        if source.labelled:
            if source not in self._labelled:
                labelled = images.labelled(source)
                self._say(labelled, source.identity, known=len(images.faults))
                self._labelled[source] = labelled
            images = self._labelled[source]
        self._check(images, source)
        return images

    def _check(self, images: EncodedImages, source: ImageSource) -> None:
        """Put on record what was read, pictures that are the same, and features that are all one."""
        self.record.read(
            source.identity,
            (images.keys, images.captions, images.labels, images.pixels),
            items=len(images.keys),
            skipped=len(images.faults),
        )
        if images.same:
            count = sum(len(group) for group in images.same)
            self.found(
                "same_images",
                f"{count} of {len(images.keys)} pictures of {source.identity} are the same as another "
                f"({in_words(images.same, images.keys)})",
                {"images": count, "groups": groups_of(images.keys, images.same)},
            )
        if is_constant(images.image_features):
            self.found(
                "constant_image_features",
                f"the model has the same features for all {len(images.keys)} pictures of {source.identity}",
                {"images": len(images.keys)},
            )

    def found(self, check: str, what: str, details: dict[str, Any]) -> None:
        """Put what a check has found on the task's record, and say it once, on rank 0."""
        self.record.found(check, what, details, say=self.world[0] == 0)

    def _encode_images(self, source: ImageSource) -> EncodedImages:
        tower = getattr(self.model, "image_tower", None)
        if not hasattr(self.model, "encode_image") or not getattr(tower, "encodes", True):
            raise ValueError(f"{type(self.model).__name__} encodes text only; {source.identity} holds images")
        rank, world = self.world
        tower = self.model.image_tower
        how = resizing_of(tower)

        def encode() -> Iterator[tuple[int, tuple[int, Tensor | None, dict[str, Any]]]]:
            read = source.batches(tower.image_size, self.batch_size, rank=rank, world_size=world, **how)
            for number, batch in read:
                image = batch.pop("image")
                batch["pixels"] = [zlib.crc32(one) for one in image.numpy()]
                features = (
                    self.model.encode_image(image.to(self.device)).float().cpu() if len(image) else None
                )
                yield len(image), (number, features, batch)

        told = self._told(f"pictures of {source.identity}", lambda: source.count, encode())
        parts = sorted(self._gather(told), key=lambda part: part[0])
        merged: dict[str, Any] = {
            name: [x for part in parts for x in part[2].get(name, ())]
            for name in (*COLUMNS, "faults", "pixels")
        }
        features = [part[1] for part in parts if part[1] is not None]
        encoded = EncodedImages(
            torch.cat(features) if features else torch.empty(0, 0),
            **merged,
            labels=[None] * len(merged["keys"]),
            count=source.count,
            shards=len(source.shards),
        )
        self._say(encoded, source.identity)
        if not features:
            raise ValueError(f"{source.identity} holds no image; check the path")
        check_features(encoded.image_features, f"image_features of {source.identity}", encoded.keys)
        # A batch's company changes a row in its last digits: what is the same picture shall tie to the bit. The sums of
        # 32 bits are confirmed by the features.
        x = encoded.image_features
        for group in alike(encoded.pixels):
            rows = [row for row in group if (x[row] - x[group[0]]).abs().max() < 1e-4]
            if len(rows) > 1:
                x[rows] = x[rows[0]].clone()
                encoded.same.append(rows)
        return encoded

    def _say(self, images: EncodedImages, identity: str, *, known: int = 0) -> None:
        """Say what was left out, beyond the `known` first, and end where that is too much."""
        check_faults(images.faults, identity, items=images.count, shards=images.shards)
        new = images.faults[known:]
        if new and self.world[0] == 0:
            causes = ", ".join(
                f"{n} by {cause}" for cause, n in Counter(one.cause for one in new).most_common()
            )
            print(
                f"clipkit.evals: {len(new)} of {images.count} items of {identity} are left out ({causes}); the first: "
                f"{new[0]}",
                file=sys.stderr,
                flush=True,
            )

    def captions(self, source: ImageSource) -> tuple[Tensor, Tensor]:
        """(text_features (M, D), text_to_image_index (M,)) of every caption of `source`, in file order."""
        images = self.images(source)
        if images.text is None:
            for key, captions in zip(images.keys, images.captions, strict=True):
                if not captions or not all(caption.strip() for caption in captions):
                    raise ValueError(f"image {key!r} of {source.identity} has no caption (or an empty one)")
            texts = [caption for captions in images.captions for caption in captions]
            index = [i for i, captions in enumerate(images.captions) for _ in captions]
            keys = self.token_keys(texts)
            images.text = (self.texts(texts, keys=keys), torch.tensor(index))
            images.same_captions = [
                group for group in alike(keys) if len({index[place] for place in group}) > 1
            ]
        if images.same_captions:
            count = sum(len(group) for group in images.same_captions)
            texts = [caption for captions in images.captions for caption in captions]
            self.found(
                "shared_captions",
                f"{count} of {len(texts)} captions of {source.identity} are the same tokens as a caption of another "
                f"picture ({in_words(images.same_captions, texts)}): ties count by their expectation",
                {"captions": count, "groups": groups_of(texts, images.same_captions)},
            )
        return images.text

    def token_keys(self, texts: Sequence[str]) -> list[bytes]:
        """A digest of the tokens of each text: texts of equal keys are one to the model."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        rank, world = self.world

        def digests() -> Iterator[tuple[int, list[bytes]]]:
            for start in range(rank * self.batch_size, len(distinct), world * self.batch_size):
                some = distinct[start : start + self.batch_size]
                yield start, [_digest(tokens) for tokens in _rows(self.tokenizer(some), some)]

        parts = sorted(self._gather(digests()), key=lambda part: part[0])
        key = dict(zip(distinct, (one for _, keys in parts for one in keys), strict=True))
        return [key[text] for text in texts]

    @torch.no_grad()
    def texts(self, texts: Sequence[str], *, keys: Sequence[bytes] | None = None) -> Tensor:
        """(len(texts), D) CPU float32, unit norm, in the order given.

        Args:
            keys: `token_keys` of the texts, where they are known.
        """
        if not texts:
            raise ValueError("there is no text to encode")
        rank, world = self.world
        keys = self.token_keys(texts) if keys is None else keys
        # Each distinct row of tokens once, so that what is one to the model has equal features to the bit. Texts of like
        # length share a batch: a tokenizer that pads to the longest then pads little.
        shown = {key: text for text, key in sorted(zip(texts, keys, strict=True), reverse=True)}
        distinct = sorted(shown.values(), key=lambda text: (len(text), text))
        batches = [
            range(i, min(i + self.batch_size, len(distinct)))
            for i in range(0, len(distinct), self.batch_size)
        ]

        def encode() -> Iterator[tuple[int, tuple[range, Tensor]]]:
            for rows in batches[rank::world]:
                tokens = self.tokenizer([distinct[i] for i in rows]).to(self.device)
                yield len(rows), (rows, self.model.encode_text(tokens).float().cpu())

        told = self._told("texts", lambda: len(distinct), encode())
        parts = sorted(self._gather(told), key=lambda part: part[0].start)
        features = torch.cat([values for _, values in parts])
        check_features(features, "text_features", distinct)
        if is_constant(features):
            what = f"the model has the same features for all {len(distinct)} texts"
            self.found("constant_text_features", what, {"texts": len(distinct)})
        place = {text: row for row, text in enumerate(distinct)}
        return features[[place[shown[key]] for key in keys]]

    def _gather(self, work: Iterator[Any]) -> list[Any]:
        """Every rank's results in one list. An error on one rank is an error on all: none is left waiting for
        it.
        """
        if self.group is None:
            return list(work)
        mine, error = [], None
        try:
            mine = list(work)
        except Exception as caught:
            error = caught
        everyone: list[Any] = [None] * self.group.size()
        torch.distributed.all_gather_object(
            everyone, (mine, repr(error) if error else None), group=self.group
        )
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(everyone):
            if message is not None:
                raise RuntimeError(f"evaluation failed on rank {rank}: {message}")
        return [part for parts, _ in everyone for part in parts]
