"""Loss names: `@register_loss("infonce")` files a class, `list_losses()` names them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from clipkit.registry import Registry

T = TypeVar("T")

losses = Registry("loss")


def register_loss(name: str) -> Callable[[T], T]:
    """Decorator that makes an `nn.Module` class a loss that `create_loss` and a config can name.

    The class needs `inputs`, the names of the features its forward takes, as a class attribute or set by its
    constructor; `optional_inputs` (used where the features hold them) and `supplied_by` (input name to the
    setting that brings it, for the error about a missing one) are optional. A taken name is a ValueError.
    """
    return losses.register(name)


def list_losses() -> list[str]:
    """Every registered loss name, sorted."""
    return losses.names()
