"""Names to things: one small registry for losses, towers, tokenizers and evaluation tasks.

A wrong name is the commonest mistake in a config, so every lookup ends in an error that names the nearest
match and then the whole list. Standard library only: the command line completes without importing torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def suggest(name: object, valid: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the nearest valid name, or an empty string when none is near."""
    near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def unknown(what: str, name: object, valid: Iterable[str]) -> ValueError:
    """The error for an unknown name: what was given, the nearest match, then every valid name."""
    valid = sorted(valid)
    listed = ", ".join(valid) if valid else "none"
    return ValueError(f"unknown {what} {name!r}.{suggest(name, valid)} Valid names: {listed}.")


def check_keys(given: Iterable[str], valid: Iterable[str], what: str) -> None:
    """Raise ValueError for the first key of `given` that is not in `valid`; `what` names the settings' owner."""
    valid = set(valid)
    for key in given:
        if key not in valid:
            raise unknown(f"setting of {what}", key, valid)


class Registry:
    """A mapping from names to factories whose lookups fail helpfully.

    Args:
        what: the noun used in messages, such as "loss" or "image tower".
    """

    def __init__(self, what: str):
        self.what = what
        self._entries: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files a class or function under `name`; a taken name is a ValueError."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(
                    f"the {self.what} name {name!r} is taken by {self._entries[name]!r}; choose another name"
                )
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: object) -> Any:
        """The entry filed under `name`; ValueError with the nearest match and the list otherwise."""
        if not isinstance(name, str) or name not in self._entries:
            raise unknown(self.what, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self._entries)
