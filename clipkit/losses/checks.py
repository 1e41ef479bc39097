"""What every loss asks of its features, and the few lines of arithmetic they share.

Shapes and dtypes are checked on every call and cost nothing. Values (unit norm, views that differ) are
checked on every call on the CPU; on other devices only a module's first call reads them, since reading makes
the host wait. Under torch.compile and torch.func values are not checked. A NaN passes: it must reach the
loss, where the trainer looks for it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, agree, assert_same_rows, check_same_rows, resolve_group
from clipkit.kernels.pairs import IMPLEMENTATIONS, PRECISIONS
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


def check_width(what: str, embed_dim: int, features: Tensor) -> None:
    """ValueError unless (B, D) `features` have the width that `what` was built for."""
    width = features.shape[1]
    if width != embed_dim:
        raise ValueError(f"{what} was built for embed_dim={embed_dim}, but features are {width} wide")


def head_width(loss: str, embed_dim: int | None) -> int:
    """`embed_dim` for a loss's head; ValueError where it was not given."""
    if embed_dim is None:
        raise ValueError(
            f"{loss}'s head needs embed_dim, the features' width: set loss.{loss}.embed_dim, or head=False"
        )
    return int(embed_dim)


def check_scalar(name: str, value: Tensor | float) -> None:
    """ValueError unless `value` is a number or a tensor with one element."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return
        raise ValueError(f"{name} must be a tensor of shape (), but has shape {tuple(value.shape)}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} must be a number or a tensor of shape (), but is {value!r}")


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """What `check_scalar` passed as a () tensor in the compute dtype of `like`, beside it."""
    if not isinstance(value, Tensor):
        return constant(float(value), like)
    if value.ndim == 0 and value.dtype == compute_dtype(like) and value.device == like.device:
        return value
    return value.to(like.device, compute_dtype(like)).reshape(())


def check_ids(name: str, ids: Tensor | Sequence[int], rows: int) -> None:
    """ValueError unless `ids` is a list of `rows` integers or an integer (rows,) tensor."""
    if not isinstance(ids, Tensor):
        if not isinstance(ids, (list, tuple)) or not all(type(number) is int for number in ids):
            raise ValueError(f"{name} must be integers of shape ({rows},), but is {_short(ids)}")
        if len(ids) != rows:
            raise ValueError(f"{name} must be integers of shape ({rows},), but is a list of {len(ids)}")
        return
    if ids.ndim != 1 or len(ids) != rows or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"{name} must be integers of shape ({rows},), but is {ids.dtype} of shape {tuple(ids.shape)}"
        )


def integers(ids: Tensor | Sequence[int], like: Tensor) -> Tensor:
    """What `check_ids` passed as an int64 tensor beside `like`."""
    return torch.as_tensor(ids, dtype=torch.int64, device=like.device)


def _short(value: object) -> str:
    told = repr(value)
    return told if len(told) <= 60 else told[:57] + "..."


def check_rows(features: Tensor, group: Group) -> None:
    """ValueError, on every rank alike, unless all ranks bring the same number of rows above 0.

    For a loss of your own without a `check`; `meet` asks it together with all else.
    """
    check_same_rows(len(features), group, features.device)
    check_not_empty(features)


def check_not_empty(features: Tensor) -> None:
    """ValueError for a batch without rows."""
    if len(features) == 0:
        raise ValueError("the batch is empty: features have 0 rows")


def meet(module: Any, ranks: Ranks | None = None, **inputs: Any) -> Ranks:
    """The ranks that this call of a loss compares against, once they all have checked what they were given.

    `module.check(**inputs)` raises for what it refuses. One small all-gather carries whether it did, and
    the inputs' shapes and types, to every rank, so that all raise the same error and none waits for one that
    raised. The host reads the result where that costs nothing (on the CPU), in a module's first call and
    when its shapes change; in between, and under torch.compile, the device asserts it.

    Args:
        module: a loss with `group` and `check`. Its `uneven_rows`, where it has one, allows ranks to bring
            different numbers of rows.
        ranks: what a weighted sum hands its terms, which has met already: it comes back at once.
        inputs: what forward was given, by name.

    Raises:
        ValueError: what `check` refuses, on any rank, or inputs that differ over ranks.
    """
    if ranks is not None:
        return ranks
    ranks = Ranks(resolve_group(module.group))
    if ranks.group is None or torch.compiler.is_compiling():
        module.check(**inputs)
    uneven = getattr(module, "uneven_rows", False)
    problem = agreed(module, ranks.group, lambda: module.check(**inputs), inputs, inputs if uneven else ())
    if problem is not None:
        raise ValueError(problem)
    return ranks


def agreed(
    module: Any,
    group: Group,
    check: Callable[[], None],
    inputs: Mapping[str, Any],
    uneven: Iterable[str],
) -> str | None:
    """`meet` for one group: what is wrong on some rank of it, or None.

    Args:
        module: remembers what its ranks agreed on.
        check: raises for what this rank refuses.
        inputs: name to tensor.
        uneven: the inputs of which ranks may bring different numbers of rows.
    """
    if group is None:
        return None
    device = _device(inputs, group)
    if torch.compiler.is_compiling():
        rows = [len(v) for k, v in inputs.items() if isinstance(v, Tensor) and v.ndim and k not in uneven]
        assert_same_rows(rows, group, device)
        return None
    problem = None
    try:
        check()
    except Exception as error:
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    brought = {key: _described(value, key in uneven) for key, value in inputs.items() if value is not None}
    read = device.type == "cpu" or problem is not None or getattr(module, "_agreed_on", None) != brought
    module._agreed_on = brought
    return agree(group, problem, brought, device, read=read)


def _described(value: Any, uneven: bool) -> tuple[Any, ...]:
    """What has to be equal on all ranks: (rows, *other dimensions, dtype)."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.is_floating_point():
            return ("one", "number")
        shape = tuple(value.shape)
        return ("any" if uneven else shape[0] if shape else "no", *shape[1:], str(value.dtype))
    if isinstance(value, (list, tuple)):
        return (len(value), str(torch.int64))
    return ("one", "number")


def takes_ranks(loss: Any) -> bool:
    """Whether a loss can be given the ranks that a sum of losses has met: it has a `check` and takes `ranks`."""
    return hasattr(loss, "check") and "ranks" in inspect.signature(loss.forward).parameters


def _device(inputs: Mapping[str, Any], group: Group) -> torch.device:
    """Where the ranks' numbers travel: beside the inputs, unless the backend serves another device alone."""
    if "nccl" in str(dist.get_backend(group)):
        return torch.device("cuda", torch.cuda.current_device())
    found = (value.device for value in inputs.values() if isinstance(value, Tensor) and value.ndim)
    return next(found, torch.device("cpu"))


def check_impl(impl: str) -> str:
    """`impl` if the kernels know it; ValueError with the nearest otherwise. They say if it runs here."""
    return check_choice("impl", impl, IMPLEMENTATIONS)


def check_precision(precision: str) -> str:
    """`precision` if the kernels know it; ValueError with the nearest otherwise."""
    return check_choice("precision", precision, PRECISIONS)


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


def value_checks(device: torch.device) -> bool:
    """Whether optional inputs have their values checked: on the CPU, outside torch.compile and torch.func."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return device.type == "cpu"


def check_unit_norm(**features: Tensor) -> None:
    """ValueError unless every row of each (B, D) tensor has norm 1 within 2 %. A batch with a NaN passes."""
    norms = {
        name: torch.linalg.vector_norm(value.detach(), dim=1, dtype=compute_dtype(value))
        for name, value in features.items()
        if len(value)
    }
    # One read for all, of a NaN too: it compares as false.
    if not norms or not float(torch.cat(list(norms.values())).sub_(1).abs_().max()) > NORM_TOLERANCE:
        return
    for name, values in norms.items():
        if bool(((values - 1).abs() > NORM_TOLERANCE).any()):
            raise ValueError(
                f"{name} must have unit norm, but its rows have norms from {values.min():.4g} to "
                f"{values.max():.4g}: normalise them in fp32, torch.nn.functional.normalize(features.float(), "
                "dim=-1)"
            )


def check_pairs(
    module: nn.Module, image_features: Tensor, text_features: Tensor, **scales: Tensor | float
) -> None:
    """ValueError unless both are (B, D) of one shape and device and, where values may be read, of unit norm, and
    each of the scales has one element."""
    check_matrix("image_features", image_features)
    check_matrix("text_features", text_features, like=("image_features", image_features))
    if reads_values(module, image_features.device):
        check_unit_norm(image_features=image_features, text_features=text_features)
    for name, value in scales.items():
        check_scalar(name, value)


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


def kernel_settings(loss: Any, features: Tensor) -> dict[str, Any]:
    """The kernels' `impl` and `precision`, which are the loss's; "auto" goes by the features as they were given:
    `Ranks.wide` hands them on in fp32."""
    half = loss.precision == "auto" and features.dtype in (torch.float16, torch.bfloat16)
    return {"impl": loss.impl, "precision": "half" if half else loss.precision}


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
