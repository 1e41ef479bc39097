"""Faults in data: one exception, the list of causes, and a counter with limits.

A bad sample never ends a run by itself and never disappears unseen: it is skipped, counted under one of
`CAUSES`, and when a cause passes its limit the run stops with the shard and the key in the message.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from clipkit.registry import check_keys

CAUSES = {
    # Whole shards, found while indexing.
    "empty_shard": "the shard has no bytes or no complete sample",
    "unreadable_shard": "the shard is not a tar file, or could not be fetched",
    "truncated_shard": "the tar ends in the middle of a member; the samples before are used",
    "changed_shard": "the shard is not the one that was indexed",
    "wrong_count": "the shard holds more or fewer samples than was said of it",
    # Members of a tar, found while indexing.
    "corrupt_header": "a tar header fails its checksum; reading resumes at the next valid one",
    "not_a_file": "a directory, link, sparse file, FIFO or device; never followed or opened",
    "unsafe_path": "a member with an absolute path or '..' in it; never written anywhere",
    "duplicate_key": "a key's image, caption or json comes twice in a shard; the first is used",
    # Samples, found while indexing.
    "missing_image": "a key without an image",
    "missing_caption": "a key with neither a caption file nor a json",
    "empty_image": "an image of zero bytes",
    # Samples, found while decoding.
    "corrupt_image": "the image does not decode",
    "unsupported_image": "the image's format is one that Pillow does not read here",
    "image_too_large": "the image's header claims more pixels than max_pixels",
    "empty_caption": "no caption has a visible character",
    "caption_not_utf8": "the caption is not valid UTF-8",
    "broken_json": "the json does not parse, or is no object; the caption file, where there is one, is used without it",
    "missing_pair_id": "the json lacks the field that data.pair_ids names",
    "missing_hard_negative": "the json lacks the text that data.hard_negatives names",
    "missing_teacher": "data.teacher holds no feature of the image, or of one of its captions",
    # Rows of a table that is packed.
    "broken_row": "the row has more or fewer fields than the header",
    # Samples of a labelled evaluation set.
    "broken_label": "the class id is there and is no whole number",
}

# Letters of a key or detail in a message, and faults of each cause that are kept as examples.
_SHOWN, _EXAMPLES = 500, 5

# Counted against the number of shards, the others against the number of samples.
SHARD_CAUSES = ("empty_shard", "unreadable_shard", "truncated_shard", "changed_shard", "wrong_count")


class DataError(RuntimeError):
    """A fault in the data. `cause` is a key of CAUSES; `shard` and `key` say where, when known."""

    def __init__(self, cause: str, detail: str = "", *, shard: str = "", key: str = ""):
        self.cause, self.detail, self.shard, self.key = cause, detail, shard, key
        # A tar may have names of a megabyte.
        where = " ".join(
            part for part in (shard and f"shard {shard}", key and f"key {key[:_SHOWN]!r}") if part
        )
        why = detail[:_SHOWN] or CAUSES.get(cause, "")
        super().__init__(": ".join(part for part in (where, cause, why) if part))

    def __reduce__(self):
        return (_rebuild, (self.cause, self.detail, self.shard, self.key))


def _rebuild(cause: str, detail: str, shard: str, key: str) -> DataError:
    return DataError(cause, detail, shard=shard, key=key)


class FaultCounter:
    """Counts faults by cause and holds them against limits, over all ranks where they add their counts up.

    What indexing left out is `found` once, alike on every rank. What reading left out is `added` where a place of the
    epoch had to be filled by another sample; a place is read by one rank, once an epoch. So the ranks' counts can be
    added up, and with limits of what the epochs begun hold, every number of ranks passes one at the same global batch.

    Args:
        max_bad_fraction: the largest tolerated fraction of bad samples (bad shards, for SHARD_CAUSES), per
            cause: one number for all, or a mapping {cause: fraction} whose "default" (0.05 when absent) holds
            for the rest.
        samples, shards: how many the fractions are of, in an epoch.
        one_shard: one bad shard is tolerated whatever fraction it is, unless the limit is 0 or of that cause.
        advice: what to do when a limit is passed.

    Attributes:
        counts: {cause: how many this process counted}.
        epochs: how many epochs have begun.
        agreed: whether the ranks add their counts up and ask `check` with the sums; else each asks for its own share.
    """

    def __init__(
        self,
        max_bad_fraction: float | Mapping[str, float],
        *,
        samples: int,
        shards: int = 1,
        one_shard: bool = False,
        advice: str = "Mend the shards (clipkit-data check lists every fault) or raise max_bad_fraction.",
    ):
        self.advice = advice
        limits = (
            dict(max_bad_fraction) if isinstance(max_bad_fraction, Mapping) else {"default": max_bad_fraction}
        )
        check_keys(limits, [*CAUSES, "default"], "max_bad_fraction")
        for cause, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit <= 1:
                raise ValueError(f"max_bad_fraction of {cause} is {limit!r}; expected a fraction from 0 to 1")
        self.limits, self.samples, self.shards = limits, max(1, samples), max(1, shards)
        self.one_shard, self.epochs, self.agreed = one_shard, 1, False
        self._found: Counter[str] = Counter()
        self._added: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    @property
    def counts(self) -> Counter[str]:
        return self._found + self._added

    def find(self, cause: str, *, shard: str, key: str, detail: str = "") -> None:
        """Count what indexing left out."""
        self._found[cause] += 1
        self._keep(cause, shard, key, detail)

    def add(self, cause: str, *, shard: str, key: str, detail: str = "") -> None:
        """Count what reading left out of a place."""
        self._added[cause] += 1
        self._keep(cause, shard, key, detail)

    def _keep(self, cause: str, shard: str, key: str, detail: str) -> None:
        said = f"{f'key {key[:_SHOWN]!r} of ' if key else ''}shard {shard}{': ' + detail[:_SHOWN] if detail else ''}"
        self._examples[cause] = [*self._examples.get(cause, []), said][-_EXAMPLES:]

    def added(self) -> list[int]:
        """What reading left out, a number for each of CAUSES: for ranks to add up."""
        return [self._added[cause] for cause in CAUSES]

    def check(self, added: Sequence[int] | None = None, *, share: float = 1.0) -> None:
        """RuntimeError when a cause has passed its limit.

        Args:
            added: the ranks' `added`, summed; None: this process's own.
            share: the fraction of all samples that `added` is of. Below 1, chance is allowed for: four standard
                deviations of the number that the limit tolerates.
        """
        if over := self.over(added, share=share):
            raise self.error(over, added, self.examples(over))

    def over(self, added: Sequence[int] | None = None, *, share: float = 1.0) -> str | None:
        """The first cause that has passed its limit; arguments as of `check`."""
        for cause, count in zip(CAUSES, added if added is not None else self.added()):
            limit, total = self._limit(cause)
            allowed = limit * total
            if self.one_shard and cause in SHARD_CAUSES and 0 < limit and cause not in self.limits:
                allowed = max(1.0, allowed)
            left = (allowed - self._found[cause]) * share * self.epochs
            if left < 0 or count > (left if share == 1 else min(left / share, left + 4 * math.sqrt(left))):
                return cause
        return None

    def examples(self, cause: str) -> list[str]:
        """The last few faults by a cause that this process met."""
        return self._examples.get(cause, [])

    def error(self, cause: str, added: Sequence[int] | None, examples: Sequence[str]) -> RuntimeError:
        """What says that a cause has passed its limit."""
        read = (added if added is not None else self.added())[list(CAUSES).index(cause)]
        limit, total = self._limit(cause)
        what = "shards" if cause in SHARD_CAUSES else "samples"
        epochs = f" an epoch, in {self.epochs} epochs" if self.epochs > 1 else ""
        last = f" The last was {examples[-1]}." if examples else ""
        return RuntimeError(
            f"{self._found[cause] + read} of {total} {what}{epochs} are bad by {cause} ({CAUSES[cause]}), more than "
            f"max_bad_fraction = {limit:g}.{last} {self.advice}"
        )

    def _limit(self, cause: str) -> tuple[float, int]:
        limit = self.limits.get(cause, self.limits.get("default", 0.05))
        return limit, self.shards if cause in SHARD_CAUSES else self.samples

    def state_dict(self) -> dict[str, Any]:
        """What reading left out, as numbers and a few examples; what indexing left out is found again."""
        return {
            "counts": dict(self._added),
            "examples": {cause: list(one) for cause, one in self._examples.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting from a saved state."""
        counts, examples = state["counts"], state["examples"]
        self._added = Counter({cause: int(counts[cause]) for cause in CAUSES if cause in counts})
        for cause in CAUSES:
            known = [*map(str, examples.get(cause, [])), *self._examples.get(cause, [])]
            if known:
                self._examples[cause] = known[-_EXAMPLES:]


def joined_faults(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several ranks' states as one rank's."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for state in states:
        counts.update({cause: int(n) for cause, n in state["counts"].items()})
        for cause, known in state["examples"].items():
            examples[cause] = [*examples.get(cause, []), *known][-_EXAMPLES:]
    return {"counts": dict(counts), "examples": examples}
