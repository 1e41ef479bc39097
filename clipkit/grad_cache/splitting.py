"""A batch in micro-batches, whatever it is made of.

A batch is a mapping of fields (nested as one likes), or a tuple or list of them. A field is split along its own rows:

    {"image": (B, 3, H, W), "text": {"input_ids": (B, L), "attention_mask": (B, L)}, "key": [B strings]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

_HOLD_FIELDS = (torch.Tensor, Mapping, list, tuple)


def split_batch(batch: Any, micro_batch_size: int) -> list[Any]:
    """The batch in parts of at most `micro_batch_size` rows, each entry split along its own rows, in order.

    Larger pieces come last: of 9 rows in 2 pieces, 4 then 5; of 2 rows in 3 pieces, 0, 1, 1. What is split:

    - a tensor with at least one dimension, along its first;
    - a list or tuple of anything but tensors, mappings, lists and tuples (keys, captions): item by item;
    - a mapping, a tuple of tensors or of such, and a batch that is a list of them: entry by entry. Mappings come
      out as dicts;
    - a list of tensors or mappings within the batch: item by item, and only if it has the batch's rows.

    Anything else (a 0-dim tensor, a string, a number, None) is in every piece.

    Raises:
        ValueError: no rows; a list that could be rows or fields; a batch that is no mapping, tuple or list.
    """
    if not isinstance(batch, (Mapping, list, tuple)):
        raise ValueError(
            f"the batch is a {type(batch).__name__}: give a mapping of tensors (nested if you like), or a tuple "
            "or list of them"
        )
    entries = list(_entries(batch, ""))
    rows = {name: len(value) for name, value in entries if _has_rows(value)}
    if not rows or max(rows.values()) == 0:
        names = sorted(name for name, _ in entries)
        raise ValueError(f"the batch has no rows to split: entries {names}, rows {rows}")
    most = max(rows.values())
    for name, value in entries:
        if (
            isinstance(value, list)
            and any(isinstance(item, _HOLD_FIELDS) for item in value)
            and len(value) != most
        ):
            raise ValueError(
                f"batch entry {name} is a list of {len(value)} {type(value[0]).__name__}s where the batch has "
                f"{most} rows: give a tuple or a dict if they are fields of the batch, an item a row if they "
                "are its rows"
            )
    pieces = -(-most // micro_batch_size)
    return [
        map_entries(
            batch, lambda value, k=k: value[len(value) * k // pieces : len(value) * (k + 1) // pieces]
        )
        for k in range(pieces)
    ]


def map_entries(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The batch with `change` applied to every entry that has rows."""
    if isinstance(batch, Mapping):
        return {name: _map(value, change) for name, value in batch.items()}
    return (
        _rebuilt(batch, [_map(value, change) for value in batch])
        if is_fields(batch, top=True)
        else change(batch)
    )


def tensors_of(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor of the batch, however deep."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)


def move(value: Any, device: torch.device | str) -> Any:
    """The value with every tensor in it on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {name: move(item, device) for name, item in value.items()}
    if isinstance(value, (list, tuple)) and any(isinstance(item, _HOLD_FIELDS) for item in value):
        return _rebuilt(value, [move(item, device) for item in value])
    return value


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {name: _map(item, change) for name, item in value.items()}
    if is_fields(value):
        return _rebuilt(value, [_map(item, change) for item in value])
    return change(value) if _has_rows(value) else value


def _entries(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(path, entry) of all that is not itself made of entries."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _entries(item, f"{name}.{key}" if name else str(key))
    elif is_fields(value, top=not name):
        for index, item in enumerate(value):
            yield from _entries(item, f"{name}[{index}]")
    else:
        yield name, value


def is_fields(value: Any, *, top: bool = False) -> bool:
    """Whether a sequence is entries side by side: a tuple of tensors or such, or a batch that is a list."""
    kinds = (list, tuple) if top else tuple
    return isinstance(value, kinds) and any(isinstance(item, _HOLD_FIELDS) for item in value)


def _has_rows(value: Any) -> bool:
    return value.dim() > 0 if isinstance(value, torch.Tensor) else isinstance(value, (list, tuple))


def _rebuilt(like: Any, items: list[Any]) -> Any:
    """A list or tuple (named or not) of the items."""
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
