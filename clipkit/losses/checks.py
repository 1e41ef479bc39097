"""What every loss asks of its features, and the few lines of arithmetic they share.

Shapes and dtypes are checked on every call and cost nothing. Values (unit norm, views that differ) are
checked on every call on the CPU; on other devices only a module's first call reads them, since reading makes
the host wait. Under torch.compile and torch.func values are not checked. A NaN passes: it must reach the
loss, where the trainer looks for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, check_same_rows
from clipkit.kernels.pairs import IMPLEMENTATIONS
from clipkit.kernels.reference import compute_dtype
from clipkit.registry import unknown

# bf16 rounds a unit vector's norm by up to 0.4 %; raw features are off by far more.
NORM_TOLERANCE = 0.02


def check_matrix(name: str, features: Tensor, like: tuple[str, Tensor] | None = None) -> None:
    """ValueError unless `features` is a floating (B, D) tensor, shaped as `like` if given."""
    if not isinstance(features, Tensor):
        raise ValueError(f"{name} is a {type(features).__name__}: give a tensor of shape (B, D)")
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must be (B, D), but has shape {tuple(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"{name} must be floating point, but is {features.dtype}")
    if like is None:
        return
    other_name, other = like
    if features.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape (B, D), row i of one belonging to row i of "
            f"the other, but have {tuple(features.shape)} and {tuple(other.shape)}"
        )
    if features.device != other.device:
        raise ValueError(
            f"{name} is on {features.device} and {other_name} on {other.device}: move both to one device"
        )


def check_scalar(name: str, value: Tensor) -> None:
    """ValueError unless `value` is a tensor with one element."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is {value!r}"
        raise ValueError(f"{name} must be a tensor of shape (), but {shape}")


def check_ids(name: str, ids: Tensor, rows: int) -> None:
    """ValueError unless `ids` is an integer (rows,) tensor."""
    if ids.ndim != 1 or len(ids) != rows or ids.is_floating_point():
        raise ValueError(
            f"{name} must be integers of shape ({rows},), but is {ids.dtype} of shape {tuple(ids.shape)}"
        )


def check_rows(features: Tensor, group: Group) -> None:
    """ValueError, on every rank alike, unless all ranks bring the same number of rows above 0."""
    check_same_rows(len(features), group, features.device)
    if len(features) == 0:
        raise ValueError("the batch is empty: features have 0 rows")


def check_impl(impl: str) -> str:
    """`impl` if the kernels know it; ValueError with the nearest otherwise. They say if it runs here."""
    return check_choice("impl", impl, IMPLEMENTATIONS)


def check_negatives(loss: str, pairs: int) -> None:
    """ValueError for a group with a single pair, in a loss without a value there."""
    if pairs < 2:
        raise ValueError(
            f"{loss} needs at least 2 pairs in the group, but got {pairs}: a pair alone has no negative"
        )


def reads_values(module: nn.Module, device: torch.device) -> bool:
    """Whether this call may look at values: on the CPU always, else at first, compiled never."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if device.type == "cpu":
        return True
    first = not getattr(module, "_values_checked", False)
    # torch's stub has a module hold tensors and modules alone.
    module._values_checked = True  # pyright: ignore[reportArgumentType]
    return first


def check_unit_norm(**features: Tensor) -> None:
    """ValueError unless every row of each (B, D) tensor has norm 1 within 2 %. NaN rows pass."""
    for name, value in features.items():
        norms = torch.linalg.vector_norm(value.detach(), dim=1, dtype=compute_dtype(value))
        if bool(((norms - 1).abs() > NORM_TOLERANCE).any()):
            raise ValueError(
                f"{name} must have unit norm, but its rows have norms from {norms.min():.4g} to "
                f"{norms.max():.4g}: normalise them in fp32, torch.nn.functional.normalize(features.float(), "
                "dim=-1)"
            )


def check_pairs(module: nn.Module, image_features: Tensor, text_features: Tensor) -> None:
    """ValueError unless both are (B, D) of one shape and device and, where values may be read, of unit norm."""
    check_matrix("text_features", text_features, like=("image_features", image_features))
    check_matrix("image_features", image_features)
    if reads_values(module, image_features.device):
        check_unit_norm(image_features=image_features, text_features=text_features)


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """`value` as a finite float in [low, high], or (low, high] with `open_low`; ValueError otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}: give a number") from None
    if not (math.isfinite(number) and low <= number <= high) or (open_low and number == low):
        above = f"{'above' if open_low else 'at least'} {low:g}"
        raise ValueError(
            f"{name} is {number:g}: give a finite number {above}"
            + (f" and at most {high:g}" if high < math.inf else "")
        )
    return number


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`; ValueError with the nearest otherwise."""
    if value not in choices:
        raise unknown(name, value, choices)
    return value


def paired_logits(x: Tensor, y: Tensor, scale: Tensor | float) -> Tensor:
    """scale <x_i, y_i>, (B,), in fp32 (fp64 for fp64 features) whatever the autocast."""
    dtype = compute_dtype(x)
    return (x.to(dtype) * y.to(dtype)).sum(1) * (
        scale.to(dtype).reshape(()) if isinstance(scale, Tensor) else scale
    )


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), to rounding at every argument; torch's default is the identity above 20."""
    return nn.functional.softplus(x, threshold=40.0)


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b) whose gradient is 0, not NaN, where both are -inf (two empty sums)."""
    empty = (a == -torch.inf) & (b == -torch.inf)
    total = torch.logaddexp(a.masked_fill(empty, 0.0), b.masked_fill(empty, 0.0))
    return total.masked_fill(empty, -torch.inf)


def constant(value: float, like: Tensor) -> Tensor:
    """A () tensor of `value` beside `like`, made on its device without a copy from the host."""
    return torch.full((), value, device=like.device, dtype=compute_dtype(like))
