"""Which class a name in the data is: the one place where class names are compared."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from clipkit.registry import suggest

# Folders and classes whose names were compared letter by letter differ in these alone.
_BETWEEN = re.compile(r"[\W_]+")
_GIVE = (
    "Give `classes` as a mapping {name in the data: class}, or a .tsv with the columns folder and name; sets of the same "
    "size are not matched by position"
)


def normalised(name: str) -> str:
    """A class name without case, kind of letter (Unicode NFKC) and what stands between words: `Polar_bear`, `polar bear`."""
    return _BETWEEN.sub(" ", unicodedata.normalize("NFKC", name).casefold()).strip()


@dataclass(frozen=True)
class ClassNames:
    """The classes of a task.

    Attributes:
        names: what prompts are made of; a class is its row.
        given: what the data calls each, such as ImageNet's wnids, or None.
    """

    names: list[str]
    given: list[str] | None = None

    def match(self, found: Sequence[str], what: str) -> dict[str, int]:
        """`match_classes` of the data's names with these."""
        return match_classes(found, self.names, given=self.given, what=what)


def match_classes(
    found: Sequence[str], classes: Sequence[str], *, given: Sequence[str] | None = None, what: str
) -> dict[str, int]:
    """{name in the data: row of `classes`}, by equal names, or else by equal `normalised` names.

    Args:
        found: folder or class names of the data.
        classes, given: as ClassNames has them.
        what: the data and the kind of name, for the message: "image folder photos: folder".

    Raises:
        ValueError: a name that is none of them or could be two of them, or two names that are one.
    """
    rows: dict[str, int] = {}
    taken: dict[int, str] = {}
    known = [*(given or ()), *classes]
    exact: dict[str, set[int]] = {}
    loose: dict[str, set[int]] = {}
    for place, name in enumerate(known):
        exact.setdefault(name, set()).add(place % len(classes))
        loose.setdefault(normalised(name), set()).add(place % len(classes))
    for name in found:
        candidates = exact.get(name) or loose.get(normalised(name)) or set()
        if not candidates:
            raise ValueError(
                f"{what} {name!r} is none of the {len(classes)} classes.{suggest(name, known)} {_GIVE}"
            )
        if len(candidates) > 1:
            several = ", ".join(f"{classes[row]!r} (class {row})" for row in sorted(candidates)[:3])
            raise ValueError(f"{what} {name!r} could be {several}: {_GIVE}")
        row = next(iter(candidates))
        if row in taken and taken[row] != name:
            raise ValueError(
                f"{what} {name!r} and {taken[row]!r} would both be class {classes[row]!r}: {_GIVE}"
            )
        rows[name], taken[row] = row, name
    return rows
