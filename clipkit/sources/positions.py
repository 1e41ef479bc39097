"""Position embeddings for another picture size or text length.

A picture's grid is resized by bicubic interpolation with antialiasing (Dosovitskiy et al. 2021, section 3.2, in 2-d), the rows
before the grid (class token, registers) staying as they are; a text's positions linearly, in 1-d. Both are open_clip's own
choices, in fp32.
"""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor

_IMAGE = re.compile(r"(?:^|\.)(?:pos_embed|positional_embedding)$")
_TEXT = re.compile(
    r"(?:^|\.)(?:positional_embedding|position_embeddings\.weight|wpe\.weight|position_embedding\.weight)$"
)


def resized(name: str, given: Tensor, shape: tuple[int, ...], *, first: int = 0) -> Tensor | None:
    """A table of positions in another shape; None where it is none, or differs in more than their number.

    Args:
        name: the weight's, as the model has it: image_tower.* or text_tower.*.
        given: (n, width), or (1, n, width) as timm has it.
        shape: the model's; zero rows never.
        first: rows of a text's table that stand before the first token's (RoBERTa: 2).
    """
    image = name.startswith("image_tower.")
    if not (_IMAGE if image else _TEXT).search(name) or given.ndim != len(shape) or given.ndim not in (2, 3):
        return None
    if given.shape[-1] != shape[-1] or (given.ndim == 3 and not given.shape[0] == shape[0] == 1):
        return None
    table = given.reshape(-1, given.shape[-1]).float()
    made = _grid(table, shape[-2]) if image else _line(table, shape[-2], first)
    return None if made is None else made.reshape(shape).to(given.dtype)


def _grid(table: Tensor, rows: int) -> Tensor | None:
    old, new = math.isqrt(len(table)), math.isqrt(rows)
    kept = len(table) - old * old
    # A grid has as many rows before it as the other, and both are square.
    if kept != rows - new * new or not old or not new:
        return None
    grid = table[kept:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:kept], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])


def _line(table: Tensor, rows: int, first: int) -> Tensor | None:
    if not 0 <= first < min(len(table), rows):
        return None
    line = table[first:].T[None]
    line = F.interpolate(line, size=rows - first, mode="linear", align_corners=False)
    return torch.cat([table[:first], line[0].T])
