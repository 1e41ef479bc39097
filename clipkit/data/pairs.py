"""What a data set knows about its pairs beside picture and caption: which carry the same content, several captions a
picture, and captions that are wrong on purpose.

An id is a 63-bit hash of what the setting `data.pair_ids` names, so workers and ranks agree on it without a word. Two of
N different contents share one with a probability of about N^2 / 2^64: 6e-11 in a batch of 32,768.

    null          nothing; with several captions a picture, its number, so that they are each other's positives
    caption       the caption as `plain_caption` leaves it
    key           shard and key: a sample that is drawn twice (data.resample)
    key:SEP       what stands before the key's last SEP, in shards of one folder (pictures of others may be numbered
                  alike): with key:# the pairs 17#0 and 17#1. A key without SEP is a content of its own
    json:FIELD    a number or text in KEY.json; null or blank there: nothing is known of this pair
"""

from __future__ import annotations

import math
import os
import random
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from clipkit.data.captions import clean_caption
from clipkit.data.faults import DataError
from clipkit.data.order import number
from clipkit.data.shardset import ShardSet


def plain_caption(text: str) -> str:
    """What is compared of a caption: NFKC, case folded, runs of white space as one space, punctuation at the end
    left out (all of it only where something else stands before).
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = " ".join(folded.split())
    end = len(folded)
    while end and (folded[end - 1].isspace() or unicodedata.category(folded[end - 1]).startswith("P")):
        end -= 1
    return folded[:end] or folded


def content_id(*parts: int | str) -> int:
    """0 to 2^63 - 1, equal for equal parts."""
    return number("content", *parts) >> 1


class Known(NamedTuple):
    """A sample's captions, the content that its json names, and its hard negatives."""

    captions: list[str]
    content: str | None
    hard_negatives: list[str]


class Pairs:
    """Reads and draws a sample's texts, by the settings of `data`.

    Args:
        spec: the completed data settings.
        seed: of the run; what is drawn is a function of it, the epoch and the key.

    Attributes:
        per_image: captions a picture and step.
        negatives: hard negatives a picture and step, as many for each of its captions, or 0.
        have_ids: whether pairs have ids.
    """

    def __init__(self, spec: Mapping[str, Any], *, seed: int):
        self.seed, self.captions, self.weights = seed, spec["captions"], spec["caption_weights"]
        self.per_image: int = spec["captions_per_image"]
        self.field: str | None = spec["hard_negatives"]
        self.negatives: int = self.per_image * spec["hard_negatives_per_caption"] if self.field else 0
        self.way, _, self.name = (spec["pair_ids"] or "").partition(":")
        self.have_ids = bool(self.way) or self.per_image > 1

    def read(self, data: ShardSet, sample: int) -> Known:
        """What a sample's files say. DataError where its captions, its id or its hard negatives are missing."""
        captions, content, negatives = data.captions(sample), None, []
        if self.way == "json" or self.negatives:
            meta = data.meta(sample)
            if self.way == "json":
                content = _content(meta, self.name)
            if self.negatives:
                negatives = _negatives(meta, str(self.field))
        return Known(captions, content, negatives)

    def draw(self, known: Known, draw: float, epoch: int, key: str) -> tuple[list[str], list[str]]:
        """The captions of this step, `per_image` of them, and the hard negatives, `negatives` of them. Where there are
        fewer they come again.

        Args:
            draw: in [0, 1), which decides where a single caption is drawn.
        """
        texts = _repeated(self._captions(known.captions, draw, epoch, key), self.per_image)
        wrong = known.hard_negatives
        if len(wrong) > self.negatives:
            wrong = random.Random(number(self.seed, epoch, "hard negatives", key)).sample(
                wrong, self.negatives
            )
        return texts, _repeated(wrong, self.negatives)

    def _captions(self, captions: list[str], draw: float, epoch: int, key: str) -> list[str]:
        count = len(captions)
        if count == 1 or self.captions == "first":
            return captions[: self.per_image]
        if self.captions == "all":
            start = number(self.seed, key, "captions") + epoch * self.per_image
            return [captions[(start + i) % count] for i in range(min(count, self.per_image))]
        weights = _shares(self.weights, count)
        if self.per_image == 1:
            return [captions[_place(weights, draw)]]
        rng = random.Random(number(self.seed, epoch, "several captions", key))
        # Efraimidis and Spirakis 2006: the least of exponential times of these rates, one after the other, is drawing
        # without replacement.
        times = [(rng.expovariate(weight) if weight else math.inf, i) for i, weight in enumerate(weights)]
        drawn = sorted(one for one in times if one[0] < math.inf)
        return [captions[i] for _, i in drawn[: self.per_image]]

    def id(self, known: Known, text: str, data: ShardSet, sample: int, index: int) -> int:
        """The id of a sample whose caption in this step is `text`; `index` is its number over all sources."""
        if self.way == "caption":
            return content_id("caption", plain_caption(text))
        if self.way == "json" and known.content is not None:
            return content_id("json", known.content)
        if self.way == "key":
            shard, key = data.where(sample)
            if self.name and self.name in key:
                return content_id("stem", os.path.dirname(shard), key.rpartition(self.name)[0])
            return content_id("key", shard, key)
        return content_id("sample", index)


def _content(meta: Mapping[str, Any], name: str) -> str | None:
    value = meta.get(name, ...)
    # An empty cell of a table is blank text.
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        found = "is missing" if value is ... else f"is {repr(value)[:80]}, neither text nor a whole number"
        raise DataError("missing_pair_id", f"{name!r} {found}")
    return str(value)


def _negatives(meta: Mapping[str, Any], name: str) -> list[str]:
    value = meta.get(name)
    listed = value if isinstance(value, list) else [value]
    found = [text for text in (clean_caption(one) for one in listed if isinstance(one, str)) if text]
    if not found:
        raise DataError("missing_hard_negative", f"{name!r} holds no text")
    try:
        "".join(found).encode("utf-8")
    except UnicodeEncodeError as error:  # json can spell half of a surrogate pair
        raise DataError("caption_not_utf8", str(error)) from None
    return found


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """The weights of so many captions: even without any, and where those it has weigh nothing."""
    given = [1.0] * count if weights is None else [*map(float, weights[:count])]
    given += [0.0] * (count - len(given))
    return given if any(given) else [1.0] * count


def _place(weights: Sequence[float], draw: float) -> int:
    """The place that a draw in [0, 1) falls on, where places are as wide as their weights."""
    rest = draw * sum(weights)
    for i, weight in enumerate(weights):
        if rest < weight:
            return i
        rest -= weight
    return max(i for i, weight in enumerate(weights) if weight)


def _repeated(texts: list[str], count: int) -> list[str]:
    return [texts[i % len(texts)] for i in range(count)]
