"""Tile and block sizes by architecture and D: a table, never a search at run time.

`find` looks up (kind, compute capability, padded D). The entries for 9.0 start from compile-time figures
(registers, shared memory, two programs per multiprocessor); `python -m clipkit.kernels.tune` measures
alternatives on the GPU at hand and writes a JSON file that `CLIPKIT_KERNEL_CONFIGS=FILE` puts in front of
this table.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

KINDS = ("lse_sums", "lse_coef", "softplus_sums", "softplus_coef")


@dataclass(frozen=True)
class TileConfig:
    """One kernel's launch. `descriptors`: load by tensor descriptors (TMA) rather than pointers. `outer` is
    the side of the block of logits handled by one launch: for coefficients it sets the workspace (outer^2 * 2
    bytes), for sums that of the partial sums (outer^2 / 16 bytes)."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    group: int = 8
    num_warps: int = 4
    num_stages: int = 3
    descriptors: bool = True
    outer: int = 8448

    def __post_init__(self):
        if self.outer % self.block_m or self.outer % self.block_n:
            # A tile across the edge of a block would be counted in both.
            raise ValueError(
                f"outer must be a multiple of block_m and block_n, got {self.outer}, {self.block_m}, "
                f"{self.block_n}"
            )


# (kind prefix, capability major, largest padded D): first match wins; None matches everything.
# Outer blocks of 8448 = 66 * 128 fill whole waves of cuBLAS's 128 x 256 tiles on 132 multiprocessors.
_TABLE: tuple[tuple[str, int | None, int | None, TileConfig], ...] = (
    ("lse_sums", 9, None, TileConfig(outer=33792)),
    ("softplus_sums", 9, None, TileConfig(num_warps=8, outer=33792)),
    ("lse_coef", 9, 512, TileConfig(outer=8448)),
    ("lse_coef", 9, 768, TileConfig(outer=11264)),
    ("lse_coef", 9, None, TileConfig(outer=8448)),
    ("softplus_coef", 9, 512, TileConfig(outer=8448)),
    ("softplus_coef", 9, 768, TileConfig(outer=11264)),
    ("softplus_coef", 9, None, TileConfig(outer=8448)),
    ("", 8, None, TileConfig(block_k=32, num_warps=8, descriptors=False, outer=8192)),
    ("", None, None, TileConfig(num_warps=8, outer=8192)),
)


_tried: dict[str, TileConfig] = {}


@contextlib.contextmanager
def trying(kind: str, config: TileConfig) -> Iterator[None]:
    """Within it kernels of this kind launch with `config`, before any file or table."""
    _tried[kind] = config
    try:
        yield
    finally:
        del _tried[kind]


def find(kind: str, capability: tuple[int, int], padded_dim: int) -> TileConfig:
    """The configuration of one kernel, `kind` of KINDS; an override file comes before the table."""
    if kind in _tried:
        return _tried[kind]
    path = os.environ.get("CLIPKIT_KERNEL_CONFIGS")
    if path:
        for entry in _overrides(path):
            if (
                entry["kind"] == kind
                and tuple(entry["capability"]) == capability
                and padded_dim <= entry["max_dim"]
            ):
                return TileConfig(**entry["config"])
    for prefix, major, largest, config in _TABLE:
        if (
            kind.startswith(prefix)
            and major in (None, capability[0])
            and (largest is None or padded_dim <= largest)
        ):
            return config
    raise AssertionError("the table's last entry matches everything")


@functools.cache
def _overrides(path: str) -> list[dict]:
    """Entries of an override file, checked; smaller max_dim first, so that the nearest bucket wins."""
    try:
        entries = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"CLIPKIT_KERNEL_CONFIGS={path} cannot be read as JSON: {error}") from error
    known = {field.name for field in fields(TileConfig)}
    for entry in entries:
        if set(entry) != {"kind", "capability", "max_dim", "config"} or entry["kind"] not in KINDS:
            raise ValueError(
                f"{path}: an entry needs kind (one of {KINDS}), capability, max_dim, config; got {entry}"
            )
        if not set(entry["config"]) <= known:
            raise ValueError(f"{path}: config takes {sorted(known)}, got {sorted(entry['config'])}")
    return sorted(entries, key=lambda entry: entry["max_dim"])


def read_overrides(path: str | Path) -> dict[tuple[str, tuple[int, int], int], TileConfig]:
    """{(kind, capability, max_dim): config} of an override file, as `write_overrides` takes it."""
    return {
        (entry["kind"], tuple(entry["capability"]), entry["max_dim"]): TileConfig(**entry["config"])
        for entry in _overrides.__wrapped__(str(path))
    }


def write_overrides(path: str | Path, found: dict[tuple[str, tuple[int, int], int], TileConfig]) -> None:
    """Write {(kind, capability, max_dim): config} as an override file."""
    entries = [
        {"kind": kind, "capability": list(capability), "max_dim": max_dim, "config": asdict(config)}
        for (kind, capability, max_dim), config in sorted(found.items())
    ]
    Path(path).write_text(json.dumps(entries, indent=1) + "\n")
