"""Tables of captions or sentences, row by row: CSV, TSV, JSON lines and Parquet.

Every row comes out, or what is wrong with it. A separated table says of itself neither its encoding nor whether its
quotes quote, so what cannot be told is an error that names it and the option to say it with:

- bytes that are not UTF-8 (a byte order mark is read), a header that another separator would split;
- quotes: fields are unquoted as RFC 4180 has it where the whole table allows that. Where it does not, and every line
  has as many fields as the header, quotes are letters like others, as in the TSV files of Conceptual Captions and SNLI.
  Where both could be, and would give other rows, it is an error.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from clipkit.foreign import BrokenFile
from clipkit.registry import unknown

# Bytes of one field of a table, and of one of its lines.
_FIELD_BYTES, _LINE_BYTES = 1 << 24, 1 << 28
_SEPARATED = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*_SEPARATED, *_LINES, ".parquet")
QUOTES = ("auto", "csv", "none")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Of a column's name, a line or a value in a message.
_SHOWN = 300

# The number of a row's first line (of Parquet: of the row), and the row, or what is wrong with it.
Row = tuple[int, dict[str, Any] | str]


def read_table(
    path: str | Path,
    columns: Sequence[str] = (),
    *,
    separator: str | None = None,
    encoding: str | None = None,
    quotes: str = "auto",
) -> Iterator[Row]:
    """Every row of a table, in order.

    Args:
        path: .csv, .tsv, .txt (tabs), .jsonl, .ndjson or .parquet.
        columns: those that there have to be; of Parquet only they are read, where any are named.
        separator: between fields; None: a comma in .csv, a tab in .tsv and .txt.
        encoding: of text; None: UTF-8, or what a byte order mark says.
        quotes: "csv" (RFC 4180), "none" (letters like others), or "auto", which finds out.

    Yields:
        (number of the row's first line, from 1; its values by column, or a str that says why there are none: it has
        more or fewer fields than the header).

    Raises:
        ValueError: names the file, where it can the line, and what to change: a table of another kind or encoding, a
            missing column, quotes that could be read in two ways, a line that is no JSON object.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if quotes not in QUOTES:
        raise unknown("quotes", quotes, QUOTES)
    if separator is not None and len(separator) != 1:
        raise ValueError(f"separator is {separator!r}; expected one sign, such as ';'")
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError:
            raise ValueError(f"encoding is {encoding!r}, which Python does not know; cp1252, say") from None
    if suffix in _SEPARATED:
        yield from _Separated(path, separator or _SEPARATED[suffix], encoding, quotes).rows(columns)
    elif suffix in _LINES:
        yield from _json_rows(path, columns, encoding)
    elif suffix == ".parquet":
        yield from _parquet_rows(path, columns)
    else:
        packed = "; decompress it first" if suffix in (".gz", ".zst", ".bz2", ".xz", ".zip") else ""
        raise ValueError(f"{path} is not {', '.join(SUFFIXES)}{packed}")


class _Separated:
    """One CSV or TSV file."""

    def __init__(self, path: Path, separator: str, encoding: str | None, quotes: str):
        self.path, self.separator, self.encoding, self.quotes = path, separator, encoding, quotes

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        with _fields_of_any_length():
            quoted = self.quotes == "csv" or (self.quotes == "auto" and self._quotes())
            records = self._records(quoted)
            header = [name.strip() for name in next((fields for _, fields, _ in records), [])]
            self._check_header(header, columns)
            for line, fields, _ in records:
                if len(fields) == len(header):
                    yield line, dict(zip(header, fields))
                else:
                    yield line, f"{len(fields)} fields under a header of {len(header)}"

    def _check_header(self, header: list[str], columns: Sequence[str]) -> None:
        if not header:
            raise BrokenFile(f"{self.path} is empty: expected a header with the columns' names")
        twice = {name for name in header if header.count(name) > 1}
        if twice & {*columns} or (twice and not columns):
            raise BrokenFile(f"{self.path}: its header names the column {sorted(twice)[0]!r} twice")
        missing = [name for name in columns if name not in header]
        if not missing:
            return
        if "\0" in "".join(header):
            raise BrokenFile(
                f"{self.path}: its header has zero bytes, as UTF-16 has: give encoding utf-16-le or -be"
            )
        line = self.separator.join(header)
        for other in ",;\t|":
            parts = [name.strip().strip('"') for name in line.split(other)]
            if other != self.separator and len(parts) > 1 and ({*parts} >= {*columns} or len(header) == 1):
                raise BrokenFile(
                    f"{self.path}: its header {line[:_SHOWN]!r} is separated by {other!r}, not by "
                    f"{self.separator!r}: give separator {other!r}"
                )
        raise BrokenFile(
            f"{self.path} has no column {missing[0]!r}; its columns are {', '.join(header)[:_SHOWN]}"
        )

    def _quotes(self) -> bool:
        """Whether quotes quote. BrokenFile where they may and may not."""
        if not self._has_quoted_fields():
            return True
        width, bad, bad_line = 0, 0, 0
        for line, fields, _ in self._records(False):
            width = width or len(fields)
            if len(fields) != width:
                bad, bad_line = bad + 1, bad_line or line
        advice = 'say which: quotes "csv" (they enclose fields) or "none" (they are letters)'
        off, evident, suspect = 0, False, None
        try:
            for line, fields, lines in self._records(True):
                off += len(fields) != width
                whole = sum(one.count(self.separator) == width - 1 for one in lines)
                if len(lines) > 1 and whole > 1:
                    suspect = suspect or (line, line + len(lines) - 1)
                elif len(fields) == width and (len(lines) > 1 or not whole):
                    # A separator or an end of line within quotes: without them this would be no row.
                    evident = True
        except csv.Error as error:
            if bad:
                raise BrokenFile(
                    f"{self.path}: its quotes do not enclose fields ({error}), and as letters they leave {bad} lines "
                    f"with other fields than the header (line {bad_line}, say). Mend them, or {advice}"
                ) from None
            return False
        if off and not bad:
            return False
        if suspect and not evident:
            raise BrokenFile(
                f"{self.path}, lines {suspect[0]} to {suspect[1]}: a quote opens on one line and closes on another, and "
                f"each of them could be a row of its own; {advice}"
            )
        return True

    def _has_quoted_fields(self) -> bool:
        start = re.compile(rf'(?:^|{re.escape(self.separator)})"')
        with self._text() as file:
            return any(start.search(line) for line in self._lines(file))

    def _records(self, quoted: bool) -> Iterator[tuple[int, list[str], list[str]]]:
        """(number of the first line, fields, lines) of every record; csv.Error where quotes enclose no fields."""
        with self._text() as file:
            taken: list[str] = []

            def remembered() -> Iterator[str]:
                for line in self._lines(file):
                    taken.append(line)
                    yield line

            quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            reader = csv.reader(remembered(), delimiter=self.separator, quoting=quoting, strict=quoted)
            number = 1
            while True:
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if quoted and self.quotes == "auto":
                        raise csv.Error(f"line {number}: {error}") from None
                    raise BrokenFile(f"{self.path}, near line {number}: {error}") from None
                # A blank line is no row.
                if fields:
                    yield number, fields, taken
                number += len(taken)
                taken = []

    def _lines(self, file: TextIO) -> Iterator[str]:
        number = 0
        while True:
            try:
                line = file.readline(_LINE_BYTES)
            except UnicodeError as error:
                raise BrokenFile(_not_text(self.path, self.encoding, error, number + 1)) from None
            if not line:
                return
            number += 1
            if len(line) >= _LINE_BYTES:
                raise BrokenFile(f"{self.path}, line {number}: longer than {_LINE_BYTES} signs")
            yield line

    def _text(self) -> TextIO:
        return open(self.path, encoding=self.encoding or _marked(self.path), newline="")


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    before = csv.field_size_limit(_FIELD_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _marked(path: Path) -> str:
    """The encoding that a byte order mark says, else UTF-8."""
    with open(path, "rb") as file:
        start = file.read(4)
    return next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")


def _not_text(path: Path, encoding: str | None, error: UnicodeError, line: int = 0) -> str:
    byte = f" (byte 0x{error.object[error.start]:02x})" if isinstance(error, UnicodeDecodeError) else ""
    if encoding is None and _marked(path) == "utf-8":
        # Text is decoded in blocks of lines; here the very line is found.
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as found:
                    line, byte = number, f" (byte 0x{raw[found.start]:02x})"
                    break
    where = f", line {line}" if line else ""
    other = "another" if encoding else "cp1252 (what Excel writes), say"
    return f"{path}{where}: not {encoding or 'UTF-8'} text{byte}: give its encoding, {other}"


def _json_rows(path: Path, columns: Sequence[str], encoding: str | None) -> Iterator[Row]:
    encoding = encoding or _marked(path)
    with open(path, "rb") as raw:
        # Lines of UTF-8 end at a newline alone; those of other encodings are made such.
        file = (
            raw if encoding.startswith("utf-8") else io.BytesIO(_decoded(path, raw.read(), encoding).encode())
        )
        number = 0
        while line := file.readline(_LINE_BYTES):
            number += 1
            if len(line) == _LINE_BYTES:
                raise BrokenFile(f"{path}, line {number}: longer than {_LINE_BYTES} bytes")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                row = _json_row(line, path, number)
                missing = [name for name in columns if name not in row]
                if missing and columns:
                    raise BrokenFile(
                        f"{path}, line {number} has no column {missing[0]!r}; its columns are "
                        f"{', '.join(map(str, row))[:_SHOWN]}"
                    )
                # Of later lines what is missing is theirs alone.
                columns = ()
                yield number, row


def _decoded(path: Path, raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeError as error:
        raise BrokenFile(_not_text(path, encoding, error)) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of which json itself keeps the last of two equal names."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)[:50]!r} twice")
    return found


def _json_row(raw: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise BrokenFile(_not_text(path, None, error, number)) from None
    except (ValueError, RecursionError) as error:
        raise BrokenFile(
            f"{path}, line {number}: not JSON, nested too deep, or ambiguous ({str(error)[:80]})"
        ) from None
    if not isinstance(row, dict):
        raise BrokenFile(f"{path}, line {number}: expected an object, got {type(row).__name__}")
    return row


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = list(file.schema_arrow.names)
        twice = {name for name in there if there.count(name) > 1}
        if twice & {*columns} or (twice and not columns):
            raise BrokenFile(f"{path}: it has the column {sorted(twice)[0]!r} twice")
        missing = [name for name in columns if name not in there]
        if missing:
            raise BrokenFile(
                f"{path} has no column {missing[0]!r}; its columns are {', '.join(there)[:_SHOWN]}"
            )
        number = 0
        for batch in file.iter_batches(256, columns=[*dict.fromkeys(columns)] or None):
            for row in batch.to_pylist():
                number += 1
                yield number, row
        if number != file.metadata.num_rows:
            raise BrokenFile(f"{path} says that it has {file.metadata.num_rows} rows, and gave {number}")
    except BrokenFile:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, LookupError) as error:
        raise BrokenFile(f"{path} is no Parquet file, or a damaged one: {str(error)[:200]}") from None
