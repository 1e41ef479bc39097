"""A list of shards as one table of samples, read by number.

shards    [ a.tar: 3 samples ][ b.tar: 2 ]
sample      0     1     2        3     4        -> (shard, KEY, where its image, caption and json lie)
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.captions import clean_caption, decode_caption, listed, parse_meta
from clipkit.data.counts import declared_counts
from clipkit.data.faults import DataError
from clipkit.data.index_cache import identity, index_file, load_index, read_summary, renew_index
from clipkit.data.spool import Spool, locked
from clipkit.data.tarindex import BLOCK, ShardIndex, index_stream, probe_file
from clipkit.data.urls import is_stream
from clipkit.foreign import IMAGE_BYTES, JSON_BYTES

_OPEN_FILES, _OPEN_INDEXES = 64, 64
# Bytes of an image, a caption and a json that are read, and what more is.
_MOST = ((IMAGE_BYTES, "image_too_large"), (JSON_BYTES, "caption_not_utf8"), (JSON_BYTES, "broken_json"))
_WHOLE_SHARD = ("empty_shard", "unreadable_shard")
# Seconds before the first line about indexing, and between two.
_SAY_AFTER_S, _SAY_EVERY_S = 5.0, 15.0
_LOCKS = 256
_LOST = (
    "leave the shards alone while a run reads them, and start again: what has changed is then indexed anew"
)


class ShardSet:
    """The samples of a shard list.

    Only counts are held for all of it: a shard's index is read when the shard is. Each member's header is compared with
    the index whenever it is read.

    Args:
        shards: from `expand_shards`.
        cache_dir: folder for indexes and fetched shards.
        spool: how streams are fetched; None for the defaults.
        on_bad_shard: "error": a shard that is empty, unreadable or cannot be fetched is an error at once;
            "skip": it is left out and counted.
        declared: take the counts of shards that were never indexed from the files beside them (counts.py), so that they
            are not read now. What is wrong with such a shard shows when it is read.
        together: shards that are read at the same time; as many indexes stay open.

    Attributes:
        counts: samples of each shard.
        faults: (shard, cause, key) of everything that indexing left out, of the shards that were indexed.
        indexed: shards that had no index yet and whose count nothing said.
        declared: (shards,) bool: the count is what a file beside the shard says.

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
        declared: bool = False,
        together: int = 1,
    ):
        self.shards = list(shards)
        self._spool = spool or Spool(cache_dir / "shards")
        self._cache_dir = cache_dir / "index"
        self._most_indexes = min(max(_OPEN_INDEXES, 2 * together), 8192)
        self._files: OrderedDict[int, int] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._pid = os.getpid()
        self.faults: list[tuple[str, str, str]] = []
        n = len(self.shards)
        self._remote = np.fromiter(map(is_stream, self.shards), bool, n)
        # Of each tar: where its index is kept, bytes (-1: not known), time of its last modification, probe (0: not known).
        self._names = np.zeros(n, np.uint64)
        self._sizes, self._times = np.full(n, -1, np.int64), np.zeros(n, np.int64)
        self._probes = np.zeros(n, np.uint64)
        self.counts = np.full(n, -1, np.int64)
        self.declared = np.zeros(n, bool)
        self._name()
        empty = self._recall()
        # One that was found to hold nothing is looked at again.
        if declared and (missing := np.flatnonzero((self.counts < 0) & ~empty)).size:
            said = declared_counts([self.shards[i] for i in missing], self._remote[missing].tolist())
            self.declared[missing] = said > 0
            self.counts[missing] = said
        missing = np.flatnonzero(self.counts < 0)
        self.indexed = missing.size
        self._index_all(missing, on_bad_shard)
        self.faults.sort(key=lambda fault: self._order[fault[0]])
        del self._order
        # By sample, what reading its captions passed over.
        self._passed: dict[int, str] = {}
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        if not len(self):
            first = f"; the first of them says {self.faults[0][1]}" if self.faults else ""
            raise DataError(
                "empty_shard",
                f"none of the {len(self.shards)} shards has a complete sample (KEY.jpg with "
                f"KEY.txt or KEY.json){first}",
                shard=self.shards[0],
            )

    def _name(self) -> None:
        """Where each shard's index is kept: of a local one by what stat() tells now."""
        folders: dict[str, str] = {}
        self._order = {shard: place for place, shard in enumerate(self.shards)}
        for place, shard in enumerate(self.shards):
            if self._remote[place]:
                self._names[place] = int(index_file(self._cache_dir, shard).stem, 16)
                continue
            folder = os.path.dirname(shard)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            try:
                status = os.stat(shard)
            except OSError:
                continue
            self._names[place] = int(
                index_file(self._cache_dir, *identity(shard, status, folders[folder])).stem, 16
            )
            self._sizes[place], self._times[place] = status.st_size, status.st_mtime_ns

    def _index_path(self, shard: int) -> Path:
        return self._cache_dir / f"{int(self._names[shard]):016x}.index"

    def _recall(self) -> np.ndarray:
        """The counts of what was indexed before; returns which shards held nothing then, or are not there."""
        empty = ~self._remote & (self._sizes < 0)
        for shard in range(len(self.shards)):
            summary = read_summary(self._index_path(shard))
            if summary is None or self._sizes[shard] not in (-1, summary.size):
                continue
            if not summary.count:
                empty[shard] = True
                continue
            if summary.faults:
                index = load_index(self._index_path(shard), size=summary.size)
                if index is None:
                    continue
                self.faults += [(self.shards[shard], cause, key) for cause, key in index.faults]
            self.counts[shard], self._sizes[shard] = summary.count, summary.size
            if not self._remote[shard]:
                # Of a remote one another may be there now; its index is then made anew.
                self._probes[shard] = summary.probe
        return empty

    def _index_all(self, missing: np.ndarray, on_bad_shard: str) -> None:
        """Read the headers of these shards. The ranks of a machine begin at different ones and share what they find."""
        if not missing.size:
            return
        ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
        first = int(os.environ.get("LOCAL_RANK") or 0) * len(missing) // ranks
        done, began, lock = [0], time.monotonic(), threading.Lock()
        say = [began + _SAY_AFTER_S]

        def one(shard: int, wait: bool) -> ShardIndex | None:
            index = self._first_index(shard, wait=wait)
            with lock:
                done[0] += index is not None
                now = time.monotonic()
                if now > say[0] and index is not None:
                    say[0] = now + _SAY_EVERY_S
                    left = (now - began) / done[0] * (len(missing) - done[0])
                    print(
                        f"clipkit.data: indexed {done[0]} of {len(missing)} shards, some {left:.0f} s left. Once for "
                        "all, and by many processes: clipkit-data index SHARDS --workers N",
                        file=sys.stderr,
                        flush=True,
                    )
            return index

        pool = ThreadPoolExecutor(8 if self._remote[missing].any() else 2)
        try:
            found: dict[int, Future] = {
                int(shard): pool.submit(one, int(shard), False) for shard in np.roll(missing, -first)
            }
            for shard in map(int, missing):
                index = found.pop(shard).result() or one(shard, True)
                assert index is not None
                self._collect(shard, index, on_bad_shard)
        finally:
            pool.shutdown(cancel_futures=True)

    def _first_index(self, shard: int, *, wait: bool) -> ShardIndex | None:
        """The index of a shard that has none; None where another process is making it, unless it is waited for."""
        try:
            file = self._index_path(shard)
            with self._making(file, wait=wait) as mine:
                if not mine:
                    return None
                with open(self._open(shard), "rb") as opened:
                    size, found = os.fstat(opened.fileno()).st_size, probe_file(opened.fileno())
                    index = load_index(file, size=size)
                    same = index is not None and index.probe == found
                    return index if same else renew_index(file, lambda: index_stream(opened, size))
        except DataError as error:
            return ShardIndex([], np.empty((0, 3, 2), np.int64), [(error.cause, error.detail)])
        except OSError as error:
            return ShardIndex([], np.empty((0, 3, 2), np.int64), [("unreadable_shard", str(error))])

    @contextlib.contextmanager
    def _making(self, file: Path, *, wait: bool = True) -> Iterator[bool]:
        """Whether this process may make an index; not, where another is at it and is not waited for. A cache that cannot be
        written is not locked."""
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(
                    locked(self._cache_dir / f"{int(file.stem, 16) % _LOCKS:02x}.lock", wait=wait)
                )
            except BlockingIOError:
                yield False
                return
            except OSError:
                pass
            yield True

    def _collect(self, shard: int, index: ShardIndex, on_bad_shard: str) -> None:
        name = self.shards[shard]
        for cause, key in index.faults:
            if cause in _WHOLE_SHARD and on_bad_shard == "error":
                raise DataError(cause, key, shard=name)
            self.faults.append((name, cause, key))
        if not index.keys and on_bad_shard == "error":
            causes = sorted({cause for cause, _ in index.faults})
            raise DataError("empty_shard", f"no complete sample ({', '.join(causes)})", shard=name)
        self.counts[shard], self._sizes[shard] = len(index.keys), index.size
        self._probes[shard] = index.probe

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def bytes(self) -> int:
        """Bytes of all the tars whose size is known."""
        return int(self._sizes[self._sizes > 0].sum())

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, sample, side="right") - 1)

    def key(self, sample: int) -> str:
        """A sample's KEY."""
        shard = self.shard_of(sample)
        return self._index(shard).keys[int(sample - self.starts[shard])]

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
            # A shard that has changed, say, is no matter of this json.
            if error.cause != "broken_json":
                raise
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
        if not raw and not self._has(sample, 2):
            return {}
        return parse_meta(raw)

    def _has(self, sample: int, part: int) -> bool:
        shard = self.shard_of(sample)
        return self._index(shard).spans[sample - self.starts[shard], part, 0] >= 0

    def _read(self, sample: int, part: int) -> bytes:
        shard = self.shard_of(sample)
        index, row = self._index(shard), sample - self.starts[shard]
        offset, size = map(int, index.spans[row, part])
        if offset < 0:
            return b""
        limit, cause = _MOST[part]
        if size > limit:
            raise DataError(cause, f"{size} bytes, more than the {limit} that are read")
        # With the member's header, right before its contents.
        data = os.pread(self._file(shard), BLOCK + size, offset - BLOCK)
        if len(data) < BLOCK + size or zlib.crc32(data[:BLOCK]) != index.heads[row, part]:
            raise self._changed(shard, f"another member is where that of key {index.keys[row][:200]!r} was")
        return data[BLOCK:]

    def late_faults(self, sample: int) -> list[tuple[str, str, str]]:
        """(shard, cause, key) of what the index of a sample's shard left out, if nothing had been read of the shard when
        the set was made and the sample is its first: once an epoch.
        """
        shard = self.shard_of(sample)
        if sample != self.starts[shard] or not self.declared[shard]:
            return []
        return [(self.shards[shard], cause, key) for cause, key in self._index(shard).faults]

    def waits_for(self, samples: Sequence[int]) -> list[str]:
        """The shards of samples; first those that are still to be fetched, and said so."""
        shards = sorted({self.shard_of(sample) for sample in samples})
        missing = [one for one in shards if self._remote[one] and not self._spool.has(self.shards[one])]
        rest = [self.shards[one] for one in shards if one not in missing]
        return [f"{self.shards[one]} (not fetched yet)" for one in missing] + rest

    def streams(self, shards: Sequence[int]) -> list[str]:
        """The names of those that are fetched rather than opened in place."""
        return [self.shards[shard] for shard in shards if self._remote[shard]]

    def prepare(self, url: str) -> None:
        """Make the index of a shard that has been fetched, before it is needed."""
        file = index_file(self._cache_dir, url)
        with contextlib.suppress(OSError), open(self._spool.place(url), "rb") as opened:
            if read_summary(file) is None:
                with self._making(file):
                    renew_index(file, lambda: index_stream(opened, os.fstat(opened.fileno()).st_size))

    def _changed(self, shard: int, why: str) -> DataError:
        return DataError(
            "changed_shard",
            f"{why}: it was written anew since it was indexed; {_LOST}",
            shard=self.shards[shard],
        )

    def _index(self, shard: int) -> ShardIndex:
        """A shard's index, of the tar that is there."""
        self._own()
        if shard not in self._indexes:
            self._file(shard)
        self._indexes.move_to_end(shard)
        return self._indexes[shard]

    def _own(self) -> None:
        """Workers open their own."""
        if self._pid != os.getpid():
            self._files, self._indexes, self._pid = OrderedDict(), OrderedDict(), os.getpid()

    def _file(self, shard: int) -> int:
        """A file descriptor of a shard; its index is at hand too."""
        self._own()
        if shard in self._files and shard in self._indexes:
            self._files.move_to_end(shard)
            return self._files[shard]
        if shard in self._files:
            os.close(self._files.pop(shard))
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        while len(self._indexes) >= self._most_indexes:
            self._indexes.popitem(last=False)
        file = self._open(shard)
        try:
            found = probe_file(file)
            index = self._indexes.get(shard)
            if index is None or index.probe != found:
                index = self._verified(shard, file, found)
            self._probes[shard] = found
            self._check_count(shard, index)
        except BaseException:
            os.close(file)
            raise
        self._files[shard], self._indexes[shard] = file, index
        return file

    def _open(self, shard: int) -> int:
        name = self.shards[shard]
        try:
            file = self._spool.open(name) if self._remote[shard] else os.open(name, os.O_RDONLY)
        except OSError as error:
            raise DataError("unreadable_shard", str(error), shard=name) from None
        status = os.fstat(file)
        if not self._remote[shard]:
            size, modified = int(self._sizes[shard]), int(self._times[shard])
            if status.st_size != size or (status.st_mtime_ns != modified and not self._probes[shard]):
                os.close(file)
                raise self._changed(shard, f"its {'size' if status.st_size != size else 'time'} changed")
        return file

    def _verified(self, shard: int, file: int, found: int) -> ShardIndex:
        """The index of the tar that is open, made where there is none. DataError when it is another tar than this run had
        before.
        """
        if self._probes[shard] and int(self._probes[shard]) != found:
            raise self._changed(shard, "its content changed")
        name, size = self._index_path(shard), os.fstat(file).st_size
        index = load_index(name, size=size)
        if index is None or index.probe != found:
            with self._making(name):
                stored = read_summary(name)
                index = load_index(name, size=size)
                if index is None or index.probe != found:
                    if stored is not None and stored.probe != found and self._made_by_this_run(name):
                        raise self._changed(shard, "its content changed")
                    with open(os.dup(file), "rb") as opened:
                        index = renew_index(name, lambda: index_stream(opened, size))
                    if index.probe != found:
                        raise self._changed(shard, "its content changed")
        with contextlib.suppress(OSError):
            os.utime(name, (now := time.time(), now))
        return index

    def _made_by_this_run(self, name: Path) -> bool:
        """Whether an index was made, or found right, since this run began."""
        try:
            return name.stat().st_mtime >= self._spool.since
        except OSError:
            return False

    def _check_count(self, shard: int, index: ShardIndex) -> None:
        count, expected = len(index.keys), int(self.counts[shard])
        if count == expected:
            return
        causes = sorted({cause for cause, _ in index.faults})
        why = f" (left out by {', '.join(causes)})" if causes else ""
        said = (
            "the sizes.json or _stats.json beside it says"
            if self.declared[shard]
            else "it had when it was indexed:"
        )
        raise DataError(
            "wrong_count",
            f"it holds {count} complete samples{why}, {said} {expected}. The order of all samples hangs on the counts: run "
            "`clipkit-data index` on the shards, which counts them, and start a new run",
            shard=self.shards[shard],
        )

    def expect(self, probes: dict[int, int]) -> None:
        """Take a shard for changed when it has another probe than this. For a run that goes on.

        Raises:
            ValueError: one that is known to have another.
        """
        for shard, probe in probes.items():
            known = self.probe(shard)
            if known and known != probe:
                raise ValueError(
                    f"shard {self.shards[shard]} has the name and count of the one that the run began with and another "
                    "content: its position has no meaning here; give the same data.train or start a new run"
                )
            self._probes[shard] = probe

    def probe(self, shard: int) -> int:
        """The probe of a shard's tar; 0 where nothing of it is at hand."""
        if not self._probes[shard] and not self._remote[shard]:
            with contextlib.suppress(OSError), open(self.shards[shard], "rb") as file:
                self._probes[shard] = probe_file(file.fileno())
        if not self._probes[shard]:
            summary = read_summary(self._index_path(shard))
            return summary.probe if summary is not None else 0
        return int(self._probes[shard])

    def close(self) -> None:
        """Close the open files."""
        if self._pid == os.getpid():
            while self._files:
                os.close(self._files.popitem()[1])
            self._indexes.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": OrderedDict(), "_pid": -1}

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))
