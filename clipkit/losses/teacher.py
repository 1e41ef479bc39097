"""What losses with a teacher share: which of the student's features they compare, and a map to the teacher's width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from clipkit.distributed import Group, Ranks
from clipkit.kernels.reference import compute_dtype
from clipkit.losses.checks import (
    check_matrix,
    check_not_empty,
    check_unit_norm,
    meet,
    reads_values,
    value_checks,
)
from clipkit.losses.reduction import check_weight
from clipkit.registry import unknown

SIDES = ("image", "text")
# The teacher's side of the same kind as the student's, and of the other.
SAME = {"image": "image", "text": "text"}
OTHER = {"image": "text", "text": "image"}
SUPPLIED_BY = (
    "a teacher: data.teacher, a folder of stored features that `clipkit-predict teacher` writes, or a teacher's forward "
    "on the same batch, under no_grad"
)


class TeacherLoss(nn.Module):
    """A loss between the student's features of some sides and a teacher's, row by row.

    Args:
        sides: image, text or both: of the student.
        against: the teacher's side for each of the student's.
        embed_dim, teacher_dim: widths of a learned map between them; None: widths must agree.
    """

    name: str
    # A loss that compares no columns takes any widths, and has no maps.
    any_widths = False
    heads: nn.ModuleDict

    def __init__(
        self,
        sides: Sequence[str],
        *,
        against: Mapping[str, str],
        group: Group | str,
        embed_dim: int | None = None,
        teacher_dim: int | None = None,
    ):
        super().__init__()
        self.group, self.sides = group, check_sides(self.name, sides)
        self.teacher_dim = None if teacher_dim is None else int(teacher_dim)
        self.heads = make_heads(self.name, self.sides, embed_dim, teacher_dim)
        self._pairs = [(f"{side}_features", f"dist_{against[side]}_features") for side in self.sides]
        self.inputs = tuple(name for pair in self._pairs for name in pair)
        self.supplied_by = {teacher: SUPPLIED_BY for _, teacher in self._pairs}

    def check(self, sample_weight: Any = None, **features: Any) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_teacher(self, features, self._pairs, heads=None if self.any_widths else self.heads)
        rows = features[self.inputs[0]]
        check_weight(sample_weight, len(rows), values=value_checks(rows.device))

    def begin(
        self, ranks: Ranks | None, *, sample_weight: Tensor | None = None, **given: Any
    ) -> tuple[Ranks, dict[str, Any]]:
        """The ranks, and those of forward's inputs that this loss reads, once all ranks have checked them."""
        read = {name: given[name] for name in self.inputs}
        ranks = meet(self, ranks, **read, sample_weight=sample_weight)
        check_not_empty(read[self.inputs[0]])
        return ranks, read


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
