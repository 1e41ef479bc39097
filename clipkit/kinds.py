"""What a setting may be: a number in a range, one of some words, a list, and so on, each with the words of an error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; `above`: more than `low`; `below`: less than `high`; `whole`: a whole one."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    above: bool = False
    below: bool = False

    def holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        low = value > self.low if self.above else value >= self.low
        return math.isfinite(value) and low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        if self.high < math.inf:
            start = f"above {self.low:g}" if self.above else f"from {self.low:g}"
            return f"{kind} {start} to {'below ' if self.below else ''}{self.high:g}"
        if self.low == -math.inf:
            return kind
        return f"{kind} above {self.low:g}" if self.above else f"{kind}, {self.low:g} or more"


@dataclass(frozen=True)
class OneOf:
    """One of some words."""

    names: tuple[str, ...]

    def holds(self, value: Any) -> bool:
        return value in self.names

    def __str__(self) -> str:
        return "one of " + ", ".join(self.names)


@dataclass(frozen=True)
class Kind:
    """Any value of some Python types."""

    types: tuple[type, ...]
    words: str

    def holds(self, value: Any) -> bool:
        return isinstance(value, self.types) and (not isinstance(value, bool) or bool in self.types)

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class ListOf:
    """A list, of so many parts where `length` says so."""

    part: Any
    length: int | None = None

    def holds(self, value: Any) -> bool:
        return (
            isinstance(value, list)
            and self.length in (None, len(value))
            and all(self.part.holds(one) for one in value)
        )

    def __str__(self) -> str:
        return f"a list of {'' if self.length is None else f'{self.length} times '}{self.part}"


@dataclass(frozen=True)
class Either:
    """One of several."""

    kinds: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        return any(kind.holds(value) for kind in self.kinds)

    def __str__(self) -> str:
        return ", or ".join(map(str, self.kinds))


class _Null:
    def holds(self, value: Any) -> bool:
        return value is None

    def __str__(self) -> str:
        return "null"


NULL = _Null()
FLAG = Kind((bool,), "true or false")
TEXT = Kind((str,), "text")
FREE = Kind((object,), "anything")
COUNT, NATURAL = Number(1, whole=True), Number(0, whole=True)
POSITIVE, FRACTION = Number(0, above=True), Number(0, 1)
PROBABILITY = Number(0, 1, below=True)
NAMES = Either((TEXT, ListOf(FREE), Kind((dict,), "a mapping"), NULL))


def or_null(kind: Any) -> Either:
    return Either((kind, NULL))
