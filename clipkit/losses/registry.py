"""Loss names: `@register_loss("infonce")` files a class, `list_losses()` names them all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from clipkit.registry import Registry

T = TypeVar("T", bound=type)

losses = Registry("loss")
# What CLIP models return: any of it may be given to any loss, which leaves what it does not read.
MODEL_OUTPUT = ("image_features", "text_features", "logit_scale", "logit_bias")


def register_loss(name: str) -> Callable[[T], T]:
    """Decorator that makes an `nn.Module` class a loss that `create_loss` and a config can name.

    The class needs `inputs`, the names of the features its forward takes, as a class attribute or set by its
    constructor; `optional_inputs` (used where the features hold them) and `supplied_by` (input name to the
    setting that brings it, for the error about a missing one) are optional. A taken name is a ValueError.

    The class can then be called as training loops call open_clip's losses, `loss(**model_out,
    output_dict=True)`: of what CLIP models return (image_features, text_features, logit_scale, logit_bias) it
    leaves what it does not read, and with `output_dict` the value comes as {name: ()}.
    """
    file = losses.register(name)

    def add(loss: T) -> T:
        file(loss)
        forward = getattr(loss, "forward", None)
        if forward is not None:
            loss.forward = _as_loops_call(name, forward)
        return loss

    return add


def _as_loops_call(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(self: Any, *args: Any, output_dict: bool = False, **named: Any) -> Any:
        if named:
            for key in MODEL_OUTPUT:
                if key in named and key not in self.inputs:
                    del named[key]
        value = forward(self, *args, **named)
        return {name: value} if output_dict else value

    return call


def list_losses() -> list[str]:
    """Every registered loss name, sorted."""
    return losses.names()
