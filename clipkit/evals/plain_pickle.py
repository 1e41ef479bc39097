"""Pickles of plain values and arrays of bytes, as CIFAR is distributed: read without making any object by name.

A pickle is a program that may call what it names. Here it finds three stand-ins for NumPy's names and nothing else,
and the opcodes that plain data needs; Python's own unpickler runs them, so that the memory taken is that of what the
file holds, whatever numbers it claims.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.foreign import VOCABULARY_BYTES, BrokenFile, permit, read_bytes


class PickledArray:
    """Stands for a pickled numpy.ndarray."""

    _state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def bytes(self) -> np.ndarray:
        """The uint8 array that it is; an empty one where it is another."""
        try:
            _, shape, kind, fortran, raw = self._state
            if kind.code in ("u1", b"u1", "|u1") and not fortran and isinstance(raw, bytes):
                return np.frombuffer(raw, np.uint8).reshape(shape)
        except (TypeError, ValueError, AttributeError, OverflowError):
            pass
        return np.empty(0, np.uint8)


class _Kind:
    """Stands for a pickled numpy.dtype."""

    def __init__(self, code: Any = "", *options: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _latin1(text: Any, *encoding: Any) -> bytes:
    """Stands for _codecs.encode, by which protocol 2 writes bytes."""
    return str(text).encode("latin-1")


_STANDS_FOR = {"_reconstruct": lambda *_: PickledArray(), "ndarray": PickledArray, "dtype": _Kind}
# What plain values and arrays are written with; none puts anything into a set, or makes an object of a class.
_OPCODES = """PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE
NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES
BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
TUPLE3 EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD""".split()
# The one in Python: C's allocates what a memo's number claims. typeshed does not list it.
_Unpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009


class _PlainUnpickler(_Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _STANDS_FOR and module.split(".")[0] == "numpy":
            return _STANDS_FOR[name]
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise BrokenFile(f"it holds {module[:50]}.{name[:50]}, which is no array")

    def put(self, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple of tuples of tuples takes time without bound.
            if not isinstance(key, (bytes, str, int)):
                raise BrokenFile("it holds a dictionary with keys that are no text")
            self.stack[-1][key] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.put([key, value])

    def set_items(self) -> None:
        self.put(self.pop_mark())

    dispatch = {getattr(pickle, name)[0]: _Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES}
    dispatch |= {pickle.SETITEM[0]: set_item, pickle.SETITEMS[0]: set_items}


def read_pickle(path: Path) -> dict[Any, Any]:
    """A pickled dictionary of plain values and PickledArrays, its Python 2 texts as bytes.

    Raises:
        BrokenFile: anything else is in it, or it is cut short or altered.
        ValueError: it is not there.
    """
    permit(path, "cifar")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    raw = read_bytes(path, limit=VOCABULARY_BYTES)
    try:
        value = _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except BrokenFile as error:
        raise BrokenFile(f"{path} is not CIFAR's file, and was not loaded: {error}") from None
    except Exception:
        # Altered opcodes raise nearly anything.
        raise BrokenFile(f"{path} is not CIFAR's file: it is cut short or altered") from None
    if not isinstance(value, dict):
        raise BrokenFile(f"{path} is not CIFAR's file: it holds no dictionary")
    return value
