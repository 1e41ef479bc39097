"""Matryoshka: any loss on several prefixes of the features, so that each prefix is an embedding."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import check_number, meet, takes_ranks
from clipkit.losses.compose import build
from clipkit.losses.registry import losses, register_loss


@register_loss("matryoshka")
class Matryoshka(nn.Module):
    """Weighted sum of one loss over the features' first m coordinates.

        L = sum_{m in dims} c_m loss(norm(x_{1:m}), norm(y_{1:m}), ...)

    Kusupati et al. 2022, "Matryoshka Representation Learning", equation 1, with c_m = 1. Every input whose
    name says features is cut and normalised again in fp32; scale, bias, labels and ids pass as they are. A
    loss with parameters (a classifier, a head) is built once a prefix, at that width.

    Args:
        loss: name of the inner loss.
        dims: prefix lengths, each at least 1 and at most D, usually with D itself; None is D/8, D/4, D/2 and
            D.
        embed_dim: D, against which dims are checked when the loss is built; needed where dims is None.
        settings: keyword arguments of the inner loss, without embed_dim.
        dim_weights: c_m for each of dims; all 1 by default.
        group: passed to the inner loss.
    """

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        *,
        loss: str = "infonce",
        dims: Sequence[int] | None = None,
        embed_dim: int | None = None,
        settings: Mapping[str, Any] | None = None,
        dim_weights: Sequence[float] | None = None,
        group: Group | str = "auto",
    ):
        super().__init__()
        if dims is None:
            if embed_dim is None:
                raise ValueError(
                    "matryoshka needs dims, its prefix lengths, or embed_dim to take an eighth to the whole of"
                )
            dims = sorted({max(1, int(embed_dim) // part) for part in (8, 4, 2, 1)})
        highest = math.inf if embed_dim is None else int(embed_dim)
        self.dims = tuple(int(check_number("dims", dim, 1, highest)) for dim in dims)
        if not self.dims or len(set(self.dims)) != len(self.dims):
            raise ValueError(f"dims is {list(dims)}: give one or more different prefix lengths")
        weights = [1.0] * len(self.dims) if dim_weights is None else list(dim_weights)
        if len(weights) != len(self.dims):
            raise ValueError(
                f"dim_weights has {len(weights)} values for {len(self.dims)} dims: give one for each"
            )
        self.dim_weights = tuple(check_number("dim_weights", weight, 0.0) for weight in weights)
        sized = "embed_dim" in inspect.signature(losses.get(loss)).parameters
        self.losses: Any = nn.ModuleList(
            build(loss, {**(settings or {}), **({"embed_dim": dim} if sized else {})}, group=group)
            for dim in self.dims
        )
        self.inputs = self.losses[0].inputs
        self.optional_inputs = getattr(self.losses[0], "optional_inputs", ())
        self.supplied_by = getattr(self.losses[0], "supplied_by", {})
        self.uneven_rows = getattr(self.losses[0], "uneven_rows", False)
        self.group = getattr(self.losses[0], "group", None)
        self._shares = takes_ranks(self.losses[0])

    def check(self, **features: Tensor) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        for dim, loss in zip(self.dims, self.losses):
            parts = {name: _prefix(name, value, dim) for name, value in features.items()}
            if self._shares:
                loss.check(**parts)

    def forward(self, *, ranks: Ranks | None = None, **features: Tensor) -> Tensor:
        """The sum over prefixes of the group's loss, ().

        Args:
            features: the inner loss's inputs, as keywords.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: features narrower than a prefix, or what the inner loss refuses.
        """
        ranks = meet(self, ranks, **features)
        features = {
            name: ranks.wide(value) if "features" in name else value for name, value in features.items()
        }
        values = []
        for dim, weight, loss in zip(self.dims, self.dim_weights, self.losses):
            parts = {name: _prefix(name, value, dim) for name, value in features.items()}
            shared = {}
            if self._shares:
                # The whole features are gathered, once for all prefixes.
                made = [
                    (parts[name], partial(_gathered_prefix, ranks, name, value, dim))
                    for name, value in features.items()
                    if parts[name] is not value
                ]
                shared["ranks"] = ranks.deriving(made)
            values.append(weight * loss(**parts, **shared))
        return reduce(torch.add, values)


def _gathered_prefix(ranks: Ranks, name: str, value: Tensor, dim: int) -> Tensor:
    return _prefix(name, ranks.gather(value), dim)


def _prefix(name: str, value: Tensor, dim: int) -> Tensor:
    """(..., D) features cut to (..., dim), unit norm; anything else unchanged."""
    if "features" not in name:
        return value
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be floating point of shape (B, D), but is {given}")
    if value.shape[-1] < dim:
        raise ValueError(
            f"matryoshka's prefix of {dim} does not fit {name} of shape {tuple(value.shape)}: choose dims up "
            "to D"
        )
    return nn.functional.normalize(value[..., :dim].to(compute_dtype(value)), dim=-1)
