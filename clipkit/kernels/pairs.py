"""The public functions: what they compute, the checks of their arguments, and the choice of
implementation."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from clipkit.kernels import ops, reference
from clipkit.kernels.chunked import DEFAULT_CHUNK
from clipkit.registry import unknown

IMPLEMENTATIONS = ("auto", "chunked", "dense", "triton")
PRECISIONS = ("auto", "half", "high")
# Up to this many pairs the whole matrix is a few tens of megabytes and one product is the fastest way.
DENSE_PAIRS = 1024 * 1024


def pair_lse(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    col_log_weight: Tensor | None = None,
    exclude_positives: bool = True,
    impl: str = "auto",
    chunk_size: int | None = None,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over the negatives of every row and of every column.

        s_ij = scale <x_i, y_j> + col_log_weight_j
        row_lse_i = log sum_j exp(s_ij)    over the columns j that are not positives of row i
        col_lse_j = log sum_i exp(s_ij)    over the rows i that column j is not a positive of

    The positive is left out and added by the loss, `loss_i = softplus(row_lse_i - s_ii)`: near convergence
    the difference of a log-sum-exp that contains the positive and the positive itself has lost its digits.
    Differentiable in x, y, scale and col_log_weight. Autocast does not reach inside.

    Args:
        x: (N, D) rows, of this process. Any norm; float64, float32, bfloat16 or float16.
        y: (M, D) columns, of the same D and device.
        scale: () multiplier of the similarities.
        row_offset: the positive of row i is column row_offset + i; where there is no such column, none.
        row_ids, col_ids: (N,) and (M,) integers; pairs with equal ids are left out too, whatever
            exclude_positives says.
        col_log_weight: (M,) added to column j's logits; -inf leaves the column out.
        exclude_positives: False keeps the pairs (i, row_offset + i) in.
        impl: "dense" (whole matrix; twice differentiable), "chunked" (bounded memory, any device), "triton"
            (CUDA sm_80 or later) or "auto": triton where it runs, else dense for small and chunked for large
            blocks; dense under torch.func.
        chunk_size: rows and columns of a chunked block.
        precision: of triton's products alone. "half" rounds operands to float16, scaled so that their norm
            does not matter; "high" splits each in two (float32's accuracy for 3 times the operations); "auto"
            is "high" for float32 features outside autocast, else "half".

    Returns:
        row_lse (N,) and col_lse (M,) in float32, or float64 for float64 features; -inf for an empty sum.

    Raises:
        ValueError: shapes, devices or names that do not fit.
    """
    x, y, scale = _check_features(x, y, scale)
    _check_ids(x, y, row_ids, col_ids)
    if col_log_weight is not None and col_log_weight.shape != (y.shape[0],):
        raise ValueError(f"col_log_weight must be (M,) = ({y.shape[0]},), got {tuple(col_log_weight.shape)}")
    chunk = _check_chunk(chunk_size)
    impl = choose_implementation(impl, precision, x, y)
    if impl == "dense":
        return reference.pair_lse(
            x,
            y,
            scale,
            row_offset=row_offset,
            row_ids=row_ids,
            col_ids=col_ids,
            col_log_weight=col_log_weight,
            exclude_positives=exclude_positives,
        )
    row_lse, col_lse, *_ = ops.pair_lse_op(
        x, y, scale, row_ids, col_ids, col_log_weight, row_offset, exclude_positives, impl, chunk
    )
    return row_lse, col_lse


def pair_softplus(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    exclude_positives: bool = True,
    impl: str = "auto",
    chunk_size: int | None = None,
    precision: str = "auto",
) -> Tensor:
    """Sum over the negatives of every row of softplus(scale <x_i, y_j> + bias).

    The pairwise sigmoid loss is (this + softplus(-(s_ii + bias))) summed over rows, divided by N
    (SigLIP, arXiv 2303.15343, section 3.2). Differentiable in x, y, scale and bias. Arguments as in
    `pair_lse`.

    Args:
        bias: () added to every logit.

    Returns:
        (N,) in float32, or float64 for float64 features; 0 for an empty sum.
    """
    x, y, scale = _check_features(x, y, scale)
    bias = _scalar(bias, "bias", x)
    _check_ids(x, y, row_ids, col_ids)
    chunk = _check_chunk(chunk_size)
    impl = choose_implementation(impl, precision, x, y)
    if impl == "dense":
        return reference.pair_softplus(
            x,
            y,
            scale,
            bias,
            row_offset=row_offset,
            row_ids=row_ids,
            col_ids=col_ids,
            exclude_positives=exclude_positives,
        )
    return ops.pair_softplus_op(
        x, y, scale, bias, row_ids, col_ids, row_offset, exclude_positives, impl, chunk
    )


def _scalar(value: Tensor | float, name: str, x: Tensor) -> Tensor:
    """A () tensor in the compute dtype on x's device; a parameter of shape (1,) is taken too."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=reference.compute_dtype(x), device=x.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, shape (), got shape {tuple(value.shape)}")
    if value.device != x.device:
        # A 0-dim CPU tensor mixes with CUDA tensors everywhere else in torch; here it would be read on the
        # device.
        value = value.to(x.device)
    return value.reshape(()).to(reference.compute_dtype(x))


def _check_features(x: Tensor, y: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features must be (N, D) and (M, D) with one D, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.is_floating_point() and y.is_floating_point()):
        raise ValueError(f"features must be floating point, got {x.dtype} and {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"features must be on one device, got {x.device} and {y.device}")
    if x.dtype != y.dtype:
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(dtype), y.to(dtype)
    return x, y, _scalar(scale, "scale", x)


def _check_ids(x: Tensor, y: Tensor, row_ids: Tensor | None, col_ids: Tensor | None) -> None:
    if row_ids is None and col_ids is None:
        return
    if row_ids is None or col_ids is None:
        raise ValueError("row_ids and col_ids come together: give both or neither")
    if row_ids.shape != (x.shape[0],) or col_ids.shape != (y.shape[0],):
        raise ValueError(
            f"row_ids and col_ids must be ({x.shape[0]},) and ({y.shape[0]},), got "
            f"{tuple(row_ids.shape)} and {tuple(col_ids.shape)}"
        )
    if row_ids.is_floating_point() or col_ids.is_floating_point():
        raise ValueError(f"row_ids and col_ids must be integers, got {row_ids.dtype} and {col_ids.dtype}")


def _check_chunk(chunk_size: int | None) -> int:
    if chunk_size is None:
        return DEFAULT_CHUNK
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    return chunk_size


def choose_implementation(impl: str, precision: str, x: Tensor, y: Tensor) -> str:
    """The name the operators know: "dense", "chunked", "triton" or "triton_high"."""
    if impl not in IMPLEMENTATIONS:
        raise unknown("impl", impl, IMPLEMENTATIONS)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if torch._C._are_functorch_transforms_active():
        # The operators have no rules for torch.func; the whole matrix is plain torch.
        if impl not in ("auto", "dense"):
            raise ValueError(
                f'impl="{impl}" knows no torch.func transform (grad, vmap, ...): use impl="dense"'
            )
        return "dense"
    if impl == "auto":
        if runs_triton(x):
            impl = "triton"
        else:
            impl = "dense" if x.shape[0] * y.shape[0] <= DENSE_PAIRS else "chunked"
    elif impl == "triton" and not (runs_triton(x) or _interpreted(x)):
        raise ValueError(
            'impl="triton" needs float32, bfloat16 or float16 features on a CUDA device of capability 8.0 or '
            f'later with triton installed, got {x.dtype} on {x.device}. Use impl="auto" or "chunked".'
        )
    if impl == "triton":
        full = x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        return "triton_high" if precision == "high" or (precision == "auto" and full) else "triton"
    return impl


def _interpreted(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype != torch.float64 and os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take these features where they are."""
    if x.dtype == torch.float64:
        return False
    return _assumed or (x.device.type == "cuda" and _device_runs_triton(x.device.index))


_assumed = False


@contextlib.contextmanager
def assume_triton() -> Iterator[None]:
    """Within it features on any device are taken to be where the Triton kernels run: for those who ask what a
    GPU would do and run no operator for real, such as a plan on fake tensors."""
    global _assumed
    before, _assumed = _assumed, True
    try:
        yield
    finally:
        _assumed = before


def _device_runs_triton(index: int) -> bool:
    # torch's ROCm builds call their devices cuda too; nothing here has been run on one.
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(index) >= (8, 0)


# What torch.compiler.assume_constant_result sets; calling that at import would import torch._dynamo and
# triton with it.
_device_runs_triton._dynamo_marked_constant = True
