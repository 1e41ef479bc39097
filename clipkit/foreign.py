"""Files that may come from anybody, read so that they can do no more than be wrong.

Run folders, checkpoints, tokenizers and shards are passed on. Reading one of their files through this module never
blocks (a FIFO or device is refused), takes bounded memory and time, and gives a value of the shape that was asked for
or a `BrokenFile` that names the file and quotes nothing of it.

What such a file names is another matter. Inside `named_by(folder)`, whatever is about to be opened because a file of
that folder says so is asked about first, by `permit`: it must lie below the present folder or in that folder. A
`pipe:` command, a URL, or a path elsewhere is the user's own to give, on the command line or in YAML.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")

# Bytes of a small JSON file, of a tokenizer's vocabulary, of a YAML file, of an image file.
JSON_BYTES, VOCABULARY_BYTES, YAML_BYTES, IMAGE_BYTES = 16 << 20, 256 << 20, 1 << 20, 256 << 20
# Of a metrics.jsonl: lines, bytes of all of them, and of one.
LINES, LINES_BYTES, LINE_BYTES = 500_000, 128 << 20, 1 << 20
_DEPTH, _NODES = 64, 2_000_000
_HALF = re.compile("[\\ud800-\\udfff]")


class BrokenFile(ValueError):
    """A file that is not what it should be; the message names it."""


def read_bytes(path: str | Path, *, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        BrokenFile: a FIFO, device or folder, or a larger file.
        OSError: it is not there, or may not be read.
    """
    # Opening a FIFO would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise BrokenFile(f"{path} is not a regular file (a folder, FIFO or device): it was not read")
    with open(descriptor, "rb") as file:
        if status.st_size > limit:
            raise BrokenFile(
                f"{path} has {status.st_size} bytes, more than the {limit} that such a file may have"
            )
        # Files of /proc state no size; a file may grow while it is read.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise BrokenFile(f"{path} has more than the {limit} bytes that such a file may have")
    return content


def read_text(path: str | Path, *, limit: int = JSON_BYTES) -> str:
    """A UTF-8 text file. Raises as `read_bytes`, and BrokenFile for other bytes."""
    return _decoded(read_bytes(path, limit=limit), str(path))


def read_json(path: str | Path, shape: type[T] | Any = dict[str, Any], *, limit: int = JSON_BYTES) -> T:
    """A JSON file's value, of the shape that a type states (msgspec.convert checks it; True is no number).

    Raises:
        BrokenFile: no JSON, one that is nested more than 64 deep, or another shape.
        OSError: as `read_bytes`.
    """
    return parse_json(read_bytes(path, limit=limit), shape, name=str(path))


def parse_json(text: str | bytes, shape: type[T] | Any = dict[str, Any], *, name: str) -> T:
    """`read_json` of a text at hand; `name` stands for it in the message."""
    text = text if isinstance(text, str) else _decoded(text, name)
    try:
        value = json.loads(text)
    except RecursionError:
        raise BrokenFile(f"{name} is nested too deep to be read as JSON") from None
    except ValueError as error:
        # The decoder's own words are a place; an integer of thousands of digits is a ValueError too.
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise BrokenFile(f"{name} is not JSON: it is cut short or altered{where}") from None
    return checked(value, shape, name=name)


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The list of `iter_json_lines`."""
    return list(iter_json_lines(path))


def iter_json_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with one JSON object a line; other lines, such as a last one cut short, are left out.

    Raises:
        BrokenFile: more than 500,000 lines or 128 MiB, or no line that can be read; one of more than 1 MiB cannot.
        OSError: as `read_bytes`.
    """
    raw = read_bytes(path, limit=LINES_BYTES)
    if (lines := raw.count(b"\n")) > LINES:
        raise BrokenFile(f"{path} has {lines} lines, more than the {LINES} that such a file may have")
    readable = False
    for line in io.BytesIO(raw):
        try:
            found = parse_json(line, name=str(path)) if len(line) <= LINE_BYTES else None
        except BrokenFile:
            found = None
        if found is not None:
            readable = True
            yield found
    if raw and not readable:
        raise BrokenFile(f"{path} holds no line of JSON: it is cut short or altered")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file's mapping with text keys, built of plain values alone.

    Raises:
        BrokenFile: no YAML, no mapping, an empty file, or one that is nested or repeats itself without bound.
        OSError: as `read_bytes`.
    """
    text = read_text(path, limit=YAML_BYTES)
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise BrokenFile(f"{path} is nested too deep to be read as YAML") from None
    except yaml.MarkedYAMLError as error:
        where = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BrokenFile(f"{path} is not YAML of plain values: it is cut short or altered{where}") from None
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError):
        # Numbers and dates that match their patterns and cannot be made.
        raise BrokenFile(f"{path} is not YAML of plain values: it is cut short or altered") from None
    if value is None:
        raise BrokenFile(f"{path} is empty")
    return checked(value, dict[str, Any], name=str(path))


def checked(value: Any, shape: type[T] | Any, *, name: str) -> T:
    """The value, if it is of the shape and neither too deep nor too large; `name` stands for it in the message."""
    _measure(value, name)
    try:
        return msgspec.convert(value, shape, strict=True)
    except msgspec.ValidationError as error:
        raise BrokenFile(f"{name} does not hold what it should: {str(error)[:200]}") from None


def _measure(value: Any, name: str) -> None:
    """BrokenFile for what nests deeper than 64, or has more than two million parts when its aliases are written out."""
    parts, waiting = 0, [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if depth > _DEPTH:
            raise BrokenFile(f"{name} is nested more than {_DEPTH} deep")
        inner = [*one.keys(), *one.values()] if isinstance(one, dict) else one if _is_list(one) else [one]
        parts += 1 + len(inner)
        if parts > _NODES:
            raise BrokenFile(f"{name} holds more than {_NODES} values")
        waiting += [(part, depth + 1) for part in inner if isinstance(part, dict) or _is_list(part)]
        # Half of a surrogate pair, as an escape can spell it, can be neither printed nor written.
        if any(isinstance(part, str) and not part.isascii() and _HALF.search(part) for part in inner):
            raise BrokenFile(f"{name} holds a text that is no Unicode")


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set))


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise BrokenFile(f"{name} is not UTF-8 text: it is altered, or another kind of file") from None


# The folder whose files name what is opened, and whether the user trusts its paths; None: the user names it.
_named_by: ContextVar[tuple[Path, bool] | None] = ContextVar("clipkit.foreign", default=None)


@contextmanager
def named_by(folder: str | Path, *, trust_paths: bool = False) -> Iterator[None]:
    """What is opened inside is named by files of this run or checkpoint folder, not by the user: see `permit`.

    Args:
        trust_paths: the user has said that the folder may name local files anywhere; commands and URLs it still may not.
    """
    token = _named_by.set((Path(folder), trust_paths))
    try:
        yield
    finally:
        _named_by.reset(token)


def permit(location: str | Path, what: str) -> None:
    """BrokenFile for a location that the folder of `named_by` may not send this process to; nothing outside of it.

    Args:
        location: a path, URL or `pipe:` command, patterns expanded.
        what: the setting that names it, for the message.
    """
    given = _named_by.get()
    if given is None:
        return
    folder, trusted = given
    text = os.fspath(location)
    path = Path(text.removeprefix("file://").removeprefix("file:")).expanduser()
    if text.startswith("file:") or not re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:", text):
        if trusted or _near(path, folder):
            return
    raise BrokenFile(
        f"{what} is {redacted(text)!r} in the settings that {folder} carries. A run folder may come from anybody: "
        "what it names is opened below the folder you work in or in itself alone, and it names no command, URL or "
        "hidden file. Give the data yourself (eval=NAME), or, for local files of a run that you made, trust_paths=true "
        "(clipkit-report: --trust-paths)"
    )


@contextmanager
def blamed_on(folder: str | Path, *, settings: bool = True) -> Iterator[None]:
    """An error inside is a message that names this run or checkpoint folder, whatever it was.

    For what works on settings and weights that somebody else made: they can be wrong in more ways than are checked.
    What the system says (a file that is not there, a full disk) stays as it is.

    Args:
        settings: the folder says what is done. False: its model is used as the user says, so that a ValueError is
            the user's own to read, and only what is no message at all is blamed on the folder.

    Raises:
        BrokenFile: for the other exceptions.
    """
    try:
        yield
    except Exception as error:
        # clipkit's own kinds, such as DataError, are messages too.
        told = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("clipkit.")
        if isinstance(error, OSError) and error.errno is not None or told and not settings:
            raise
        named = str(folder) in str(error)
        if named and isinstance(error, ValueError):
            raise
        kind = "" if told else f"{type(error).__name__}: "
        text = f"{kind}{redacted(str(error))[:2000]}"
        raise BrokenFile(text if named else f"{folder} cannot be used: {text}") from error


def leads_out(path: str | Path, folder: str | Path) -> bool:
    """Whether links make of a path in a folder one that is outside."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return real != root and root not in real.parents


def output_in_run(checkpoint: Path, *parts: str) -> Path:
    """A place to write to by default in the run folder of a checkpoint, RUN/checkpoints/step_* or RUN/step_*.

    Raises:
        BrokenFile: it is outside by a link.
    """
    run = checkpoint.parent
    run = run.parent if run.name == "checkpoints" else run
    path = run.joinpath(*parts)
    if leads_out(path, run):
        raise BrokenFile(
            f"{path} leads out of {run} by a link, and a run folder may come from anybody: nothing is written there. "
            "Give output=ANOTHER"
        )
    return path


def _near(path: Path, folder: Path) -> bool:
    """Whether a path lies in a run folder, or below the present one."""
    if _below(path, folder):
        return not leads_out(path, folder)
    here = Path.cwd()
    if not _below(path, here):
        return False
    # The present folder's links are the user's own, but runs/theirs may have come with a runs/also-theirs.
    together = here / Path(os.path.relpath(folder, here)).parts[0]
    return not _below(path, together) or not leads_out(path, together)


def _below(path: Path, folder: Path) -> bool:
    """Whether a path lies below a folder other than the root, through no hidden name."""
    inside, root = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    if root == Path(root.anchor) or (inside != root and root not in inside.parents):
        return False
    return not any(part.startswith(".") for part in inside.relative_to(root).parts)


_CREDENTIALS = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*://)(?:[^\s?#'\"]*@)?(?P<place>[^\s?#'\",]*)(?P<query>[?#][^\s'\",]*)?"
)
# A command may begin with variables, NAME=VALUE, and go on over lines.
_COMMAND = re.compile(r"pipe:\s*(?P<program>[^\s'\",|;&=]*).*", re.IGNORECASE | re.DOTALL)


def redacted(text: str) -> str:
    """A text to be shown to others: no user, password or query in its URLs, no arguments of its pipe: commands."""
    text = _COMMAND.sub(lambda found: f"pipe:{found['program']} ...", text)
    return _CREDENTIALS.sub(
        lambda found: found["scheme"] + found["place"] + ("?..." if found["query"] else ""), text
    )


_UNREADABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def readable(text: str) -> str:
    """A text that a terminal and a file take: no control character, change of direction or half of a pair."""
    return _UNREADABLE.sub(lambda found: " " if found[0] in "\t\r\n" else "\ufffd", text)


_SECRET = re.compile(
    r"(?:^|[._\-])(?:password|passwd|secret|token|api_?key|access_?key|credentials?)$", re.IGNORECASE
)


def is_secret(key: str) -> bool:
    """Whether a setting's name, dotted or not, says that its value is for nobody else."""
    return bool(_SECRET.search(key))


def shown(value: Any) -> Any:
    """Nested settings with `redacted` texts, and without the values of settings whose names say that they are secret."""
    if isinstance(value, Mapping):
        return {key: "..." if is_secret(str(key)) and one else shown(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [shown(one) for one in value]
    return redacted(value) if isinstance(value, str) else value
