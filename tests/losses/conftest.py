"""Feature tensors for the loss tests, and their dot products as plain Python floats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def unit() -> Callable[..., torch.Tensor]:
    """`unit(rows, dim, seed)`: (rows, dim) rows of unit norm, float64, that require grad."""

    def make(rows: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
        return (x / x.norm(dim=1, keepdim=True)).to(dtype).requires_grad_()

    return make


@pytest.fixture
def dots() -> Callable[[torch.Tensor, torch.Tensor], list[list[float]]]:
    """`dots(x, y)[i][j]`: <x_i, y_j> summed in plain Python."""

    def make(x: torch.Tensor, y: torch.Tensor) -> list[list[float]]:
        return [[sum(a * b for a, b in zip(row, column)) for column in y.tolist()] for row in x.tolist()]

    return make


@pytest.fixture
def scale() -> torch.Tensor:
    """A logit scale of 7, float64, that requires grad."""
    return torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
