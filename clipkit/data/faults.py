"""Faults in data: one exception, the list of causes, and a counter with limits.

A bad sample never ends a run by itself and never disappears unseen: it is skipped, counted under one of
`CAUSES`, and when a cause passes its limit the run stops with the shard and the key in the message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

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
    "image_too_large": "the image's header claims more pixels than max_pixels",
    "empty_caption": "no caption has a visible character",
    "caption_not_utf8": "the caption is not valid UTF-8",
    "broken_json": "the json does not parse, or is not an object",
    # Rows of a table that is packed.
    "broken_row": "the row has more or fewer fields than the header",
    # Samples of a labelled evaluation set.
    "broken_label": "the class id is there and is no whole number",
}

# Letters of a key or detail in a message.
_SHOWN = 500

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
    """Counts distinct faults by cause and enforces limits.

    Args:
        max_bad_fraction: the largest tolerated fraction of bad samples (bad shards, for SHARD_CAUSES), per
            cause: one number for all, or a mapping {cause: fraction} whose "default" (0.05 when absent) holds
            for the rest.
        samples, shards: how many the fractions are of.
        advice: what to do when a limit is passed.
    """

    def __init__(
        self,
        max_bad_fraction: float | Mapping[str, float],
        *,
        samples: int,
        shards: int = 1,
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
        self.counts: Counter[str] = Counter()
        self._seen: dict[str, str] = {}

    def add(self, cause: str, *, shard: str, key: str, detail: str = "") -> None:
        """Count a fault once per (shard, key, cause); RuntimeError when the cause passes its limit."""
        where = f"{shard}\x1f{key}\x1f{cause}"
        if where in self._seen:
            return
        self._seen[where] = cause
        self.counts[cause] += 1
        limit = self.limits.get(cause, self.limits.get("default", 0.05))
        total, what = (self.shards, "shards") if cause in SHARD_CAUSES else (self.samples, "samples")
        if self.counts[cause] > limit * total:
            raise RuntimeError(
                f"{self.counts[cause]} of {total} {what} are bad by {cause} ({CAUSES[cause]}), more than "
                "max_bad_fraction = "
                f"{limit:g}. The last was {f'key {key[:_SHOWN]!r} of ' if key else ''}shard "
                f"{shard}{': ' + detail[:_SHOWN] if detail else ''}. "
                f"{self.advice}"
            )

    def state_dict(self) -> list[str]:
        """Every fault met so far, as strings; small because it is bounded by the limits."""
        return sorted(self._seen)

    def load_state_dict(self, state: list[str]) -> None:
        """Continue counting from a saved list."""
        self._seen = {where: where.rsplit("\x1f", 1)[1] for where in state}
        self.counts = Counter(self._seen.values())
