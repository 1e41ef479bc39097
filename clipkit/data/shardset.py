"""A list of shards as one table of samples, read by number.

shards    [ a.tar: 3 samples ][ b.tar: 2 ]
sample      0     1     2        3     4        -> (shard, KEY, where its image, caption and json lie)
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.captions import clean_caption, decode_caption, listed, parse_meta
from clipkit.data.faults import DataError
from clipkit.data.tarindex import ShardIndex, cached_index, index_file, index_tar, load_index, store_index
from clipkit.data.urls import Spool, is_stream
from clipkit.foreign import IMAGE_BYTES, JSON_BYTES

_OPEN_FILES = 64
# Bytes of an image, a caption and a json that are read, and what more is.
_MOST = ((IMAGE_BYTES, "image_too_large"), (JSON_BYTES, "caption_not_utf8"), (JSON_BYTES, "broken_json"))
_WHOLE_SHARD = ("empty_shard", "unreadable_shard")


class ShardSet:
    """The samples of a shard list.

    Args:
        shards: from `expand_shards`.
        cache_dir: folder for indexes and fetched shards.
        spool: how streams are fetched; None for the defaults.
        on_bad_shard: "error": a shard that is empty, unreadable or cannot be fetched is an error at once;
            "skip": it is left out and counted.

    Attributes:
        counts: samples of each shard.
        faults: (shard, cause, key) of everything that indexing left out.

    Raises:
        DataError: a bad shard under "error", or no sample at all.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        cache_dir: Path,
        spool: Spool | None = None,
        on_bad_shard: str = "error",
    ):
        self.shards = list(shards)
        self._spool = spool or Spool(cache_dir / "shards")
        self._cache_dir = cache_dir / "index"
        self._files: OrderedDict[int, int] = OrderedDict()
        self._pid = os.getpid()
        self.faults: list[tuple[str, str, str]] = []
        self._passed: dict[int, str] = {}
        keys: list[bytes] = []
        spans, counts, self._sizes = [], [], []
        with ThreadPoolExecutor(8 if any(map(is_stream, shards)) else 1) as pool:
            for shard, index in zip(self.shards, pool.map(self._index, self.shards)):
                self._collect(shard, index, on_bad_shard)
                keys += [key.encode("utf-8", "surrogateescape") for key in index.keys]
                spans.append(index.spans)
                counts.append(len(index.keys))
                self._sizes.append(index.size)
        self.counts = np.asarray(counts, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._spans = np.concatenate(spans)
        # One blob instead of a list of strings: workers share it and Python's reference counts do not copy
        # it.
        self._key_ends = np.cumsum([0, *map(len, keys)])
        self._key_blob = np.frombuffer(b"".join(keys), dtype=np.uint8)
        if not len(self):
            first = f"; the first of them says {self.faults[0][1]}" if self.faults else ""
            raise DataError(
                "empty_shard",
                f"none of the {len(self.shards)} shards has a complete sample (KEY.jpg with "
                f"KEY.txt or KEY.json){first}",
                shard=self.shards[0],
            )

    def _index(self, shard: str) -> ShardIndex:
        try:
            if not is_stream(shard):
                return cached_index(shard, self._cache_dir)
            # A stream's index is kept by its name, so that a later run fetches only what it reads.
            file = index_file(self._cache_dir, shard)
            index = load_index(file)
            if index is None:
                index = index_tar(self._local(shard))
                store_index(file, index)
            return index
        except DataError as error:
            return ShardIndex([], np.empty((0, 3, 2), np.int64), [(error.cause, error.detail)])
        except OSError as error:
            return ShardIndex([], np.empty((0, 3, 2), np.int64), [("unreadable_shard", str(error))])

    def _collect(self, shard: str, index: ShardIndex, on_bad_shard: str) -> None:
        for cause, key in index.faults:
            if cause in _WHOLE_SHARD and on_bad_shard == "error":
                raise DataError(cause, key, shard=shard)
            self.faults.append((shard, cause, key))
        if not index.keys and on_bad_shard == "error":
            causes = sorted({cause for cause, _ in index.faults})
            raise DataError("empty_shard", f"no complete sample ({', '.join(causes)})", shard=shard)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        """Bytes of all the tars."""
        return sum(self._sizes)

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample, side="right") - 1)

    def key(self, sample: int) -> str:
        """A sample's KEY."""
        raw = self._key_blob[self._key_ends[sample] : self._key_ends[sample + 1]].tobytes()
        return raw.decode("utf-8", "surrogateescape")

    def where(self, sample: int) -> tuple[str, str]:
        """A sample's shard and key, for messages and counts."""
        return self.shards[self.shard_of(sample)], self.key(sample)

    def image(self, sample: int) -> bytes:
        """The image file's bytes."""
        return self._read(sample, 0)

    def captions(self, sample: int) -> list[str]:
        """The captions, cleaned: json `captions`, else the caption file, else json `caption`; never empty.

        A json that does not parse is passed over where the caption file has a caption: see `passed_over`.

        Raises:
            DataError: caption_not_utf8, broken_json or empty_caption.
        """
        broken = None
        try:
            meta = self._json(sample)
        except DataError as error:
            broken, meta = error, {}
        found = [text for text in map(clean_caption, listed(meta, "captions")) if text]
        if not found:
            texts = decode_caption(self._read(sample, 1)) or listed(meta, "caption")
            found = [text for text in map(clean_caption, texts) if text]
        if not found:
            raise broken or DataError("empty_caption")
        try:
            "".join(found).encode("utf-8")
        except UnicodeEncodeError as error:  # json can spell half of a surrogate pair
            raise DataError("caption_not_utf8", str(error)) from None
        if broken:
            self._passed[sample] = broken.detail
        return found

    def passed_over(self, sample: int) -> list[tuple[str, str, str, str]]:
        """(cause, shard, key, detail) of what `captions` passed over in a sample that it read."""
        if sample not in self._passed:
            return []
        shard, key = self.where(sample)
        return [("broken_json", shard, key, self._passed[sample])]

    def meta(self, sample: int) -> dict[str, Any]:
        """The json file, or an empty dictionary when there is none. DataError broken_json."""
        meta = self._json(sample)
        return meta if isinstance(meta, dict) else {"captions": meta}

    def _json(self, sample: int) -> dict[str, Any] | list[str]:
        raw = self._read(sample, 2)
        if not raw and self._spans[sample, 2, 0] < 0:
            return {}
        return parse_meta(raw)

    def _read(self, sample: int, part: int) -> bytes:
        offset, size = self._spans[sample, part]
        if offset < 0:
            return b""
        limit, cause = _MOST[part]
        if size > limit:
            raise DataError(cause, f"{size} bytes, more than the {limit} that are read")
        data = os.pread(self._file(self.shard_of(sample)), int(size), int(offset))
        if len(data) < size:
            raise DataError("truncated_shard", "the file is shorter than when it was indexed")
        return data

    def _local(self, shard: str) -> str:
        return self._spool.path(shard) if is_stream(shard) else shard

    def _file(self, shard: int) -> int:
        """A file descriptor of a shard; workers open their own."""
        if self._pid != os.getpid():
            self._files, self._pid = OrderedDict(), os.getpid()
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        file = os.open(self._local(self.shards[shard]), os.O_RDONLY)
        if os.fstat(file).st_size != self._sizes[shard]:
            os.close(file)
            raise RuntimeError(
                f"shard {self.shards[shard]} is not the one that was indexed (its size changed); leave "
                "shards "
                f"alone during a run, or remove {self._cache_dir} when a remote shard was replaced"
            )
        self._files[shard] = file
        return file

    def close(self) -> None:
        """Close the open files."""
        if self._pid == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_pid": -1}

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))
