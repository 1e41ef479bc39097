"""What losses with a teacher share: which of the student's features they compare, and a map to the teacher's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import check_matrix, check_unit_norm, reads_values
from clipkit.registry import unknown

SIDES = ("image", "text")
SUPPLIED_BY = (
    "a teacher: data.teacher, a folder of stored features that `clipkit-predict teacher` writes, or a teacher's forward "
    "on the same batch, under no_grad"
)


def check_sides(loss: str, sides: Sequence[str]) -> tuple[str, ...]:
    """`sides` as a tuple of distinct names of SIDES, at least one."""
    given = (sides,) if isinstance(sides, str) else tuple(sides)
    for side in given:
        if side not in SIDES:
            raise unknown(f"side of {loss}", side, SIDES)
    if not given or len(set(given)) < len(given):
        raise ValueError(f"{loss} got sides={list(given)}: give image, text or both")
    return given


def make_heads(
    loss: str, sides: Sequence[str], embed_dim: int | None, teacher_dim: int | None
) -> nn.ModuleDict:
    """A linear map from the student's width to the teacher's for each side; none without `teacher_dim`."""
    if teacher_dim is None:
        return nn.ModuleDict()
    if embed_dim is None:
        raise ValueError(
            f"{loss} maps features to teacher_dim={teacher_dim} columns and needs embed_dim, those they have: set "
            f"loss.{loss}.embed_dim"
        )
    heads = nn.ModuleDict()
    for side in sides:
        head = nn.Linear(int(embed_dim), int(teacher_dim), bias=False)
        nn.init.normal_(head.weight, std=int(embed_dim) ** -0.5)
        heads[side] = head
    return heads


def mapped(heads: nn.ModuleDict, side: str, features: Tensor) -> Tensor:
    """(B, D) features through the side's map, (B, E), unit norm again; themselves without one."""
    if side not in heads:
        return features
    head: Any = heads[side]
    made = head(features.to(head.weight.dtype))
    return nn.functional.normalize(made.to(compute_dtype(made)), dim=-1)


def check_teacher(
    module: Any,
    given: dict[str, Any],
    pairs: Sequence[tuple[str, str]],
    *,
    heads: nn.ModuleDict | None = None,
) -> None:
    """ValueError unless each pair of (student's, teacher's) features has the same rows and fitting widths.

    Args:
        module: the loss; `name` and what it remembers of its first call.
        given: feature name to tensor.
        pairs: names of the features that are compared row by row.
        heads: maps to the teacher's width; None: widths may differ.
    """
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    for name in names:
        check_matrix(name, given.get(name))  # pyright: ignore[reportArgumentType]
    first = given[names[0]]
    for name in names[1:]:
        if len(given[name]) != len(first) or given[name].device != first.device:
            raise ValueError(
                f"{names[0]} and {name} must have a row for each pair on one device, but have shapes "
                f"{tuple(first.shape)} and {tuple(given[name].shape)} on {first.device} and {given[name].device}"
            )
    for student, teacher in pairs if heads is not None else ():
        width, wanted = given[student].shape[1], given[teacher].shape[1]
        side = student.partition("_")[0]
        if heads is not None and side in heads:
            head: Any = heads[side]
            # (E, D)
            made, taken = head.weight.shape
            if (taken, made) != (width, wanted):
                raise ValueError(
                    f"{module.name}'s map was built for embed_dim={taken} and teacher_dim={made}, but {student} has "
                    f"{width} columns and {teacher} {wanted}"
                )
        elif width != wanted:
            raise ValueError(
                f"{student} has {width} columns and {teacher} {wanted}: set loss.{module.name}.teacher_dim={wanted} and "
                f"embed_dim={width} for a learned map between them"
            )
    if reads_values(module, first.device):
        check_unit_norm(**{name: given[name] for name in names})
