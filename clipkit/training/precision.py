"""What numbers the towers compute in: `precision` and `tf32` of a run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from clipkit.model import DualEncoder
from clipkit.registry import unknown

# {name: the type of autocast, None for none}.
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "pure_bf16": torch.bfloat16}


def autocast(name: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Makes autocast contexts for the towers of `precision=fp32|bf16|fp16|pure_bf16`."""
    if name not in _AUTOCAST:
        raise unknown("precision", name, _AUTOCAST)
    dtype = _AUTOCAST[name]
    if dtype is None:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=dtype)


def use_tf32(on: bool, device: torch.device) -> bool:
    """Let fp32 products and convolutions of this process round their operands to TF32 on a GPU; whether they do."""
    on = on and device.type == "cuda"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if on else "highest")
        torch.backends.cudnn.allow_tf32 = on
    return on


def cast_towers(model: DualEncoder, name: str, *, sharded: bool) -> None:
    """Hold the weights in bf16 for `precision=pure_bf16` (clipkit.model.DualEncoder.hold_in_bf16).

    Raises:
        ValueError: FSDP2 cannot hold weights of two types in one group.
    """
    if name != "pure_bf16":
        return
    if sharded:
        raise ValueError(
            "precision=pure_bf16 keeps the temperature in fp32, which parallel=fsdp cannot hold beside weights in bf16: give "
            "parallel=ddp, or precision=bf16"
        )
    model.hold_in_bf16()


class LossScale:
    """Dynamic loss scaling for fp16, whose smallest gradients vanish (Micikevicius et al. 2018, Mixed Precision Training).

    The loss is multiplied before the backward pass and the gradients divided after it. A step that overflows is left out and
    the scale halved; it is doubled after 2,000 steps in a row that did not. Whether one overflowed is told from the norm of the
    whole gradient, which is the same on every rank, whatever part of it a rank holds.

    Args:
        precision: any but fp16 has the scale 1, and no step is left out.
    """

    def __init__(self, precision: str, *, initial: float = 2.0**16, interval: int = 2000):
        self.enabled, self.interval = precision == "fp16", interval
        self.value, self.good = (initial, 0) if self.enabled else (1.0, 0)

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.value != 1.0:
            gradients = [one.grad for one in parameters if one.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.value)  # pyright: ignore[reportPrivateImportUsage]

    def overflowed(self, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether this step is to be left out for its scale, which is lowered; reads from the device in fp16 alone.

        A loss that is not finite, or a norm at the scale 1, is no overflow.

        Args:
            loss, norm: (), of the step, unscaled.
        """
        if not self.enabled:
            return False
        if math.isfinite(norm.item()):
            self.good += 1
            if self.good == self.interval:
                self.value, self.good = self.value * 2, 0
            return False
        if self.value <= 1 or not math.isfinite(loss.item()):
            return False
        self.value, self.good = self.value / 2, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good": self.good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError for what is no power of two in fp32's range, or no count."""
        value, good = float(state["value"]), int(state["good"])
        if not (1 <= value < 2.0**128 and math.frexp(value)[0] == 0.5 and 0 <= good < self.interval):
            raise ValueError(f"a loss scale of {value} after {good} steps is none")
        if self.enabled:
            self.value, self.good = value, good
