"""Pictures that a table names, CSV, TSV, JSON lines or Parquet, in the place of shards.

The rows are read once and kept in the cache folder, named by the table's path, size and times; from there the processes of
a machine share them. Blocks of 1,000 rows are to the order what shards are, so it is exact and a run resumes in the same way.

row       [ 0 ... 999 ][ 1000 ... 1999 ][ 2000 ... 2345 ]
"shard"         0              1                2
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.data.captions import clean_caption, listed
from clipkit.data.evalset import iter_captions, set_captions
from clipkit.data.faults import DataError
from clipkit.data.order import number
from clipkit.data.samples import SampleSet
from clipkit.data.spec import KINDS, kinds, sources
from clipkit.data.spool import locked
from clipkit.data.tables import read_table
from clipkit.foreign import IMAGE_BYTES, BrokenFile, permit, read_bytes

BLOCK = 1_000
_VERSION = 1
# Rows whose pictures are looked for before a run begins.
_LOOKED_FOR = 20


class TableSet(SampleSet):
    """The rows of one or several tables, read as `ShardSet` reads samples.

    Args:
        tables: paths.
        cache_dir: where the rows are kept.
        image: the column with the picture's path.
        caption: the column, or columns, with captions; in JSON lines and Parquet one may hold a list.
        keep: more columns, for `meta`.
        root: folder that relative paths are relative to; None: that of the table.
        separator, encoding, quotes: of `read_table`.

    Attributes:
        shards: the table of each block.
        counts: rows of each block.
        faults: (table, cause, line) of the rows that are none.

    Raises:
        ValueError: a table that cannot be read as one, or whose pictures are not there.
    """

    def __init__(
        self,
        tables: Sequence[str],
        *,
        cache_dir: Path,
        image: str = "image",
        caption: str | Sequence[str] = "caption",
        keep: Sequence[str] = (),
        root: str | Path | None = None,
        separator: str | None = None,
        encoding: str | None = None,
        quotes: str = "auto",
    ):
        self._image = image
        self._captions = [caption] if isinstance(caption, str) else list(caption)
        columns = list(dict.fromkeys([image, *self._captions, *keep]))
        reading = {"separator": separator, "encoding": encoding, "quotes": quotes}
        names: list[str] = []
        faults: list[tuple[str, str, str]] = []
        counts: list[int] = []
        self._roots: list[Path] = []
        self._tables: list[tuple[np.ndarray, np.ndarray]] = []
        self._table_of: list[tuple[int, int]] = []
        for place, table in enumerate(tables):
            ends, blob, broken = _rows(Path(table), columns, reading, cache_dir / "tables")
            faults += [(table, cause, line) for cause, line in broken]
            self._tables.append((ends, blob))
            self._roots.append(Path(root) if root else Path(table).parent)
            for first in range(0, len(ends), BLOCK):
                names.append(table)
                counts.append(min(BLOCK, len(ends) - first))
                self._table_of.append((place, first))
        super().__init__(names, counts)
        self.faults = faults
        if not len(self):
            raise ValueError(f"{', '.join(tables)[:300]}: no row that can be read")
        self._look()

    def _look(self) -> None:
        """ValueError where none of some rows has its picture."""
        some = {len(self) * place // _LOOKED_FOR for place in range(_LOOKED_FOR)}
        if not any(os.path.exists(self._path(sample)) for sample in some):
            raise ValueError(
                f"none of {len(some)} pictures that the column {self._image!r} of {self.shards[0]} names is there, the first "
                f"{str(self._path(0))[:300]!r}: give the column by data.table.image, and the folder that its paths are relative "
                "to by data.root"
            )

    def _raw(self, sample: int) -> bytes:
        block = self.shard_of(sample)
        table, first = self._table_of[block]
        ends, blob = self._tables[table]
        row = first + sample - int(self.starts[block])
        return blob[int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes()

    def meta(self, sample: int) -> dict[str, Any]:
        """The row, by columns."""
        return json.loads(self._raw(sample))

    def key(self, sample: int) -> str:
        """The picture's path, as the table has it."""
        return str(self.meta(sample).get(self._image) or "")

    def _path(self, sample: int) -> Path:
        return self._roots[self._table_of[self.shard_of(sample)][0]] / self.key(sample)

    def image(self, sample: int) -> bytes:
        """The picture's bytes. DataError missing_image."""
        key = self.key(sample)
        if not key:
            raise DataError("missing_image", f"nothing stands in the column {self._image!r}")
        if "://" in key:
            raise DataError(
                "missing_image",
                "a URL; pictures are not fetched one by one: img2dataset makes shards of them",
            )
        try:
            permit(self._path(sample), "data.train")
            return read_bytes(self._path(sample), limit=IMAGE_BYTES)
        except (OSError, ValueError) as error:
            raise DataError("missing_image", str(error)) from None

    def captions(self, sample: int) -> list[str]:
        """The captions; never empty. DataError empty_caption or caption_not_utf8."""
        row = self.meta(sample)
        texts = [text for column in self._captions for text in listed(row, column)]
        found = [text for text in map(clean_caption, texts) if text]
        if not found:
            raise DataError("empty_caption")
        try:
            "".join(found).encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError("caption_not_utf8", str(error)) from None
        return found

    def probe(self, shard: int) -> int:
        """A digest of a block's rows."""
        digest = hashlib.blake2b(digest_size=8)
        for sample in range(int(self.starts[shard]), int(self.starts[shard + 1])):
            digest.update(self._raw(sample))
        return int.from_bytes(digest.digest(), "little")


def open_tables(spec: Mapping[str, Any], tables: Sequence[str], cache_dir: Path) -> TableSet:
    """The rows of tables, by the data settings."""
    # What the settings of pairs read of KEY.json they read of a row here.
    way, _, field = str(spec.get("pair_ids") or "").partition(":")
    keep = [field] if way == "json" else []
    keep += [spec["hard_negatives"]] if spec.get("hard_negatives") else []
    if spec["root"]:
        permit(spec["root"], "data.root")
    return TableSet(tables, cache_dir=cache_dir, keep=keep, root=spec["root"], **spec["table"])


def open_registered(spec: Mapping[str, Any], cache_dir: Path) -> list[SampleSet]:
    """What a plugin's kind of data reads: a set for each weighted source, or one."""
    given = sources(spec["train"])
    weighted = given[0]["weight"] is not None
    trains = [source["shards"] for source in given] if weighted else [spec["train"]]
    return [kinds.get(spec["kind"])(train, spec["source"] or {}, cache_dir) for train in trains]


def iter_training_captions(spec: Mapping[str, Any], names: Any, cache_dir: Path) -> Iterator[str]:
    """Every caption of the tables, the shards or what a plugin reads once, in their order; samples without a readable one are passed over."""
    if spec["kind"] not in KINDS:
        data: list[SampleSet] = open_registered(spec, cache_dir)
    elif spec["kind"] == "table":
        data = [open_tables(spec, names, cache_dir)]
    else:
        yield from iter_captions(names, cache_dir=cache_dir, on_bad_shard=spec["on_bad_shard"])
        return
    for samples in data:
        yield from set_captions(samples)


def _rows(
    table: Path, columns: list[str], reading: Mapping[str, Any], cache: Path
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Where each row ends, the rows as JSON end to end, and (cause, line) of what is no row; from the cache if it is there."""
    status = table.stat()
    times = status.st_size, status.st_mtime_ns, status.st_ctime_ns
    name = number(_VERSION, os.path.realpath(table), *times, repr(columns), repr(sorted(reading.items())))
    file = cache / f"{name:016x}.rows"
    try:
        with locked(file.with_suffix(".lock")):
            found = _load(file)
            if found is None:
                _store(file, *_parse(table, columns, reading))
                found = _load(file)
    except OSError:
        # A cache that cannot be written is no error.
        found = None
    return found or _parse(table, columns, reading)


def _parse(
    table: Path, columns: list[str], reading: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    rows, faults = [], []
    for line, row in read_table(table, columns, **reading):
        if isinstance(row, str):
            faults.append(("broken_row", f"line {line}: {row}"))
            continue
        try:
            rows.append(json.dumps({name: row.get(name) for name in columns}).encode())
        except (TypeError, ValueError):
            raise BrokenFile(
                f"{table}, line {line}: a column holds neither text nor numbers; rows with the pictures' bytes are packed "
                "into shards (clipkit-data pack)"
            ) from None
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return ends, np.frombuffer(b"".join(rows), np.uint8), faults


def _store(file: Path, ends: np.ndarray, blob: np.ndarray, faults: list[tuple[str, str]]) -> None:
    part, told = file.with_suffix(".part"), json.dumps(faults).encode()
    with open(part, "wb") as out:
        for piece in (np.asarray([len(ends), len(blob), len(told)], np.int64), ends, blob, told):
            out.write(piece if isinstance(piece, bytes) else piece.tobytes())
    os.replace(part, file)


def _load(file: Path) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]] | None:
    """What was stored, as a memory map; None when there is none, or not the whole."""
    try:
        raw = np.memmap(file, np.uint8, "r")
        if len(raw) < 24:
            return None
        count, size, told = map(int, raw[:24].view(np.int64))
        if min(count, size, told) < 0 or len(raw) != 24 + 8 * count + size + told:
            return None
        ends, blob = raw[24 : 24 + 8 * count].view(np.int64), raw[24 + 8 * count : 24 + 8 * count + size]
        if count and ((np.diff(ends) <= 0).any() or ends[0] <= 0 or ends[-1] != size):
            return None
        faults = [(str(cause), str(line)) for cause, line in json.loads(raw[len(raw) - told :].tobytes())]
    except (OSError, ValueError, TypeError):
        return None
    return ends, blob, faults
