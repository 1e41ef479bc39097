"""Where shards are: the names that a setting stands for.

A local tar is read in place, anything else (http:, https:, s3:, gs:, hf:, pipe:) is fetched: see spool.py. A `pipe:`
command is run by the shell: it is taken from the configuration alone, never from data.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

import braceexpand

from clipkit.foreign import permit

_SCHEME = re.compile(r"^(pipe|[a-z][a-z0-9+.-]+):", re.IGNORECASE)
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\}")
_MOST_SHARDS = 1_000_000


class Expanded(list[str]):
    """A list of shards that `expand_shards` made. Its names are shards, not patterns: expanding it again changes
    nothing.
    """


def is_stream(name: str) -> bool:
    """True for a name that is fetched rather than opened in place."""
    return bool(_SCHEME.match(name)) and not name.startswith("file:")


def expand_shards(
    shards: str | Path | Iterable[str | Path], *, what: str = "shards", gaps: bool = False
) -> Expanded:
    """The shard list that names stand for: braces, globs, folders (their *.tar), paths and URLs, in the order
    given.

    Args:
        shards: one name or several. `{000..331}` and `{a,b}` expand as in a shell; `*`, `?` and `[...]` match
            local files, sorted. A file that has such a name itself is that file. What was expanded before is
            returned as it is.
        what: the setting's name, for messages.
        gaps: keep the names of a brace pattern whose files are not there, where others of it are.

    Raises:
        ValueError: a name that matches nothing, a file that is not there or not a regular file, a repeated
            shard, or more than a million.
    """
    if isinstance(shards, Expanded):
        for name in shards:
            permit(name, what)
        return shards
    names = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not names:
        raise ValueError(f"{what} is empty: give a path, glob, brace pattern or URL of .tar shards")
    found = Expanded()
    for name in names:
        found += _expand(str(name), what, gaps)
    if len(set(found)) < len(found):
        repeated = min(name for name, count in Counter(found).items() if count > 1)
        raise ValueError(f"{what} names {repeated} more than once; every shard may stand once in a source")
    return found


def _expand(name: str, what: str, gaps: bool) -> list[str]:
    out, missing = [], []
    names = _braces(name, what)
    for one in names:
        if is_stream(one):
            permit(one, what)
            out.append(one)
            continue
        path = os.path.expanduser(one.removeprefix("file://").removeprefix("file:"))
        permit(_plain(path), what)
        if os.path.isdir(path):
            path = os.path.join(glob.escape(path), "*.tar")
        if glob.has_magic(path) and not os.path.exists(path):
            # Nor is a folder listed that may not be opened.
            parts = Path(path).parts
            permit(_plain(str(Path(*takewhile(lambda part: not glob.has_magic(part), parts)))), what)
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise ValueError(f"{what}: no file matches {path!r}. {_nearby(path)}")
        else:
            matches = [path]
        for match in matches:
            permit(_plain(match), what)
            out.append(_plain(match))
            if len(names) > 1 and not os.path.lexists(match):
                missing.append(match)
                continue
            _check_file(match, what)
    if missing and (not gaps or len(missing) == len(names)):
        raise ValueError(
            f"{what}: {len(missing)} of the {len(names)} shards of {name[:200]!r} are not there, the first {missing[0]!r}. "
            f"{_nearby(missing[0])} data.on_bad_shard=skip trains on the others"
        )
    return out


def _plain(path: str) -> str:
    """The same file by a name that is no command, no URL and no home folder, whoever reads it."""
    return f"./{path}" if _SCHEME.match(path) or path.startswith("~") else path


def _braces(name: str, what: str) -> list[str]:
    """What a brace pattern stands for."""
    if "{" not in name or os.path.lexists(name):
        return [name]
    count, groups = 1, []
    for found in _RANGE.finditer(name):
        if any(len(part or "") > 18 for part in found.groups()):
            count = _MOST_SHARDS + 1
            break
        first, last, step = (int(part or 1) for part in found.groups())
        count *= abs(last - first) // (step or 1) + 1
    # At most: the lists of nested braces are multiplied too.
    for letter in name:
        if letter == "{":
            groups.append(1)
        elif letter == "," and groups:
            groups[-1] += 1
        elif letter == "}" and groups:
            count *= groups.pop()
        if count > _MOST_SHARDS:
            raise ValueError(f"{what}: {name[:200]!r} stands for more than {_MOST_SHARDS:,} shards")
    try:
        return list(braceexpand.braceexpand(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {name[:200]!r} is no brace pattern ({str(error)[:100]})") from None


def _check_file(path: str, what: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # ValueError: a NUL in the name
        raise ValueError(f"{what}: there is no shard {path!r}. {_nearby(path)}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"{what}: {path!r} is not a regular file (a folder has no samples of its own, a FIFO or device would "
            "block); to read from a command write 'pipe:cat ...'"
        )


def _nearby(path: str) -> str:
    """What is there instead."""
    folder = Path(path).absolute().parent
    while not folder.is_dir() or glob.has_magic(folder.name):
        folder = folder.parent
    tars = sorted(entry.name for entry in folder.iterdir() if entry.suffix == ".tar")[:3]
    holds = f"holds {', '.join(tars)}{', ...' if len(tars) == 3 else ''}" if tars else "holds no .tar file"
    return f"The nearest folder that exists, {folder}, {holds}."
