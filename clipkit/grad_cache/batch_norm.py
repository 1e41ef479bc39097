"""BatchNorm when one batch is seen as several micro-batches.

`UpdateOnce` moves the running statistics once per batch, whatever the number of passes. `WholeBatch` also
normalises every micro-batch by the whole batch's statistics, at the price of passes.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

_BATCH_NORM = inspect.signature(F.batch_norm)


class UpdateOnce:
    """Collect every micro-batch's statistics, undo what the passes did to the buffers, update them once.

        with UpdateOnce(model) as norms:          # buffers are saved
            with norms.recording():               # statistics are read off here
                for part in parts:
                    model(part); norms.end_micro_batch()
            ...                                   # any further forward leaves no trace
                                                  # buffers: one update per call of the layer in a forward

    The update is torch's own, running <- (1 - momentum) running + momentum * statistic, with the mean and the
    unbiased variance of all micro-batches together (variance within plus variance between). The count of
    values per channel comes from a forward hook. Inside torch.compile hooks do not run; there the statistic
    is read from the buffers after the micro-batch and the count taken as large, which overstates the variance
    by at most 1 / (values per channel). After an exception the buffers are as they were.
    """

    def __init__(self, model: nn.Module):
        self.layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
        ]

    def __enter__(self) -> UpdateOnce:
        self.saved = [[buffer.clone() for buffer in _buffers(layer)] for layer in self.layers]
        # Per layer, per call within a forward, per micro-batch: (count, mean, variance, updates).
        self.calls: list[list[list[tuple]]] = [[] for _ in self.layers]
        return self

    def __exit__(self, failure, *_) -> None:
        for layer, saved, calls in zip(self.layers, self.saved, self.calls, strict=True):
            for buffer, value in zip(_buffers(layer), saved, strict=True):
                buffer.copy_(value)
            if failure is None:
                for statistics in calls:
                    _update(layer, statistics)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self.layers):
            _clear(layer)
            handles.append(layer.register_forward_hook(self._hook(index)))
        self.seen = [0] * len(self.layers)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int):
        def read(layer: _BatchNorm, args: tuple, output: torch.Tensor) -> None:
            x = args[0] if args else output
            self._record(index, x.numel() // max(1, x.shape[1]), updates=1)

        return read

    def _record(self, index: int, count: float, updates: int) -> None:
        layer, calls = self.layers[index], self.calls[index]
        if len(calls) == self.seen[index]:
            calls.append([])
        # From cleared buffers, `updates` of them leave the statistic times this factor.
        factor = 1.0 if layer.momentum is None else 1 - (1 - layer.momentum) ** updates
        if factor > 0:
            mean, variance = _running(layer)
            statistic = (count, mean / factor, variance / factor, updates)
            calls[self.seen[index]].append(statistic)
        self.seen[index] += 1
        _clear(layer)

    def forget(self) -> None:
        """Drop what was recorded: the statistics to move towards come from elsewhere."""
        self.calls = [[] for _ in self.layers]

    def index_of(self, running_mean: torch.Tensor | None) -> int | None:
        """The layer that owns this buffer; None for a layer without running statistics."""
        return next((i for i, layer in enumerate(self.layers) if layer.running_mean is running_mean), None)

    def end_micro_batch(self) -> None:
        for index, layer in enumerate(self.layers):
            if not self.seen[index] and layer.num_batches_tracked is not None:
                updates = int(layer.num_batches_tracked)
                if updates:
                    self._record(index, math.inf, updates)
            self.seen[index] = 0


def pool(statistics: list[tuple[float, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of all values, from (count, mean, unbiased variance) of each part."""
    means = torch.stack([mean.double() for _, mean, _ in statistics])
    variances = torch.stack([variance.double() for _, _, variance in statistics])
    counts = torch.tensor([count for count, _, _ in statistics], dtype=torch.float64, device=means.device)
    if torch.isinf(counts).any():
        mean = means.mean(0)
        return mean, variances.mean(0) + (means - mean).square().mean(0)
    total = counts.sum()
    mean = (counts[:, None] * means).sum(0) / total
    spread = ((counts[:, None] - 1) * variances + counts[:, None] * (means - mean).square()).sum(0)
    return mean, spread / (total - 1)


def _update(layer: _BatchNorm, statistics: list[tuple]) -> None:
    if not statistics:
        return
    updates = statistics[0][3]
    mean, variance = pool([statistic[:3] for statistic in statistics])
    tracked = layer.num_batches_tracked
    if tracked is not None:
        tracked.add_(updates)
    if layer.momentum is not None:
        factor = 1 - (1 - layer.momentum) ** updates
    else:
        assert tracked is not None, "torch keeps it beside the running mean"
        factor = 1 / float(tracked)
    for running, towards in zip(_running(layer), (mean, variance), strict=True):
        running.lerp_(towards.to(running), factor)


def _running(layer: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """The running mean and variance of a layer that keeps them, as those of UpdateOnce do."""
    assert layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean, layer.running_var


def _buffers(layer: _BatchNorm) -> list[torch.Tensor]:
    buffers = [*_running(layer)]
    return buffers if layer.num_batches_tracked is None else [*buffers, layer.num_batches_tracked]


def _clear(layer: _BatchNorm) -> None:
    for buffer in _buffers(layer):
        buffer.zero_()


_OTHER_LAYERS = "batch_norm='whole' needs every micro-batch to call the same BatchNorm layers"


class WholeBatch:
    """BatchNorm of micro-batches with the whole batch's statistics, forward and backward, in their memory.

    A layer's statistics are known once every micro-batch has come to it, so they are found one BatchNorm call
    after another: forwards() runs all micro-batches up to call 0, then up to call 1 with call 0 known, and so
    on. The gradient through the statistics needs two sums per call and channel over the batch, sum dy and sum
    dy x_hat (Ioffe and Szegedy 2015, section 3), which backwards() finds from the last call to the first.
    With L calls that is about 1.5 L + 3 forward and L / 2 + 1 backward passes where the gradient cache alone
    makes 2 and 1: for a network with a few such layers, or to check one with many.
    """

    def __init__(self, norms: UpdateOnce):
        self.norms = norms
        self.statistics: list[tuple[float, torch.Tensor, torch.Tensor]] = []
        self.sums: dict[int, torch.Tensor] = {}
        self.layers: list[int | None] = []

    def running(self, **settings: int) -> _NormaliseMode:
        return _NormaliseMode(self, **settings)

    def forwards(self, run: Callable[[int], Any], parts: int) -> list[Any]:
        """What run(k) returns for each micro-batch k, once all statistics are known; without a graph."""
        while True:
            found, results = [], []
            for k in range(parts):
                mode = self.running(stop_at=len(self.statistics))
                with torch.no_grad(), mode, contextlib.suppress(_Reached):
                    results.append(run(k))
                if mode.found is not None:
                    found.append(mode.found)
                    layer = mode.layer
            if not found:
                break
            if len(found) != parts:
                raise RuntimeError(_OTHER_LAYERS)
            self.statistics.append(pool_biased(found))
            self.layers.append(self.norms.index_of(layer))
        for index, (count, mean, variance) in zip(self.layers, self.statistics, strict=True):
            if index is not None:
                self.norms.calls[index].append([(count, mean, variance * (count / (count - 1)), 1)])
        return results

    def backwards(
        self, run: Callable[[int], tuple[list[torch.Tensor], list[torch.Tensor]]], parts: int
    ) -> None:
        """Find the sums of every call; run(k) makes micro-batch k's outputs and names their gradients."""
        for call in reversed(range(len(self.statistics))):
            total = 0
            for k in range(parts):
                with self.running(keep=call) as mode:
                    tensors, gradients = run(k)
                if mode.kept is None:
                    raise RuntimeError(_OTHER_LAYERS)
                x, y = mode.kept
                gradient = None
                if tensors and y.requires_grad:
                    (gradient,) = torch.autograd.grad(tensors, y, gradients, allow_unused=True)
                if gradient is not None:
                    _, mean, variance = self.statistics[call]
                    total = total + _sums(gradient, _normalise(x, mean, variance, mode.eps))
            self.sums[call] = total if isinstance(total, torch.Tensor) else torch.zeros(2, 1, device=y.device)


class _Reached(Exception):
    """A forward has come to the BatchNorm call whose statistics are being collected."""


class _NormaliseMode(TorchFunctionMode):
    """While active, F.batch_norm in training takes statistics and sums from `whole`, call by call."""

    def __init__(self, whole: WholeBatch, *, stop_at: int | None = None, keep: int | None = None):
        super().__init__()
        self.whole, self.stop_at, self.keep = whole, stop_at, keep
        self.calls = 0
        self.found: tuple[float, torch.Tensor, torch.Tensor] | None = None
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        given = _BATCH_NORM.bind(*args, **kwargs)
        given.apply_defaults()
        given = given.arguments
        if not given["training"]:
            return func(*args, **kwargs)
        x, call = given["input"], self.calls
        self.calls += 1
        if call == self.stop_at:
            wide = _wide(x)
            axes = _axes(x)
            mean = wide.mean(axes)
            self.layer = given["running_mean"]
            self.found = (x.numel() / x.shape[1], mean, (wide - _per_channel(mean, x)).square().mean(axes))
            raise _Reached
        count, mean, variance = self.whole.statistics[call]
        sums = self.whole.sums.get(call)
        y = _WholeNorm.apply(x, given["weight"], given["bias"], mean, variance, given["eps"], sums, count)
        if call == self.keep:
            self.kept, self.eps = (x.detach(), y), given["eps"]
            # An in-place activation behind this layer would turn the kept tensor into its own output.
            return y.clone()
        return y


class _WholeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps, sums, count):
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.sums, ctx.count = eps, sums, count
        y = _normalise(x, mean, variance, eps)
        y = y if weight is None else y * _per_channel(weight, x)
        y = y if bias is None else y + _per_channel(bias, x)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, variance = ctx.saved_tensors
        x_hat = _normalise(x, mean, variance, ctx.eps)
        own = _sums(dy, x_hat)
        dx = None
        if ctx.needs_input_grad[0]:
            # While the sums of an earlier call are looked for, those of this call are known already.
            centre, slope = ctx.sums / ctx.count
            dx = _wide(dy) - _per_channel(centre, x) - x_hat * _per_channel(slope, x)
            scale = (variance + ctx.eps).rsqrt() * (1 if weight is None else weight)
            dx = (dx * _per_channel(scale, x)).to(x.dtype)
        dweight = own[1].to(weight.dtype) if weight is not None and ctx.needs_input_grad[1] else None
        dbias = (
            own[0].to(dweight.dtype if dweight is not None else own.dtype)
            if ctx.needs_input_grad[2]
            else None
        )
        return dx, dweight, dbias, None, None, None, None, None


def pool_biased(
    parts: list[tuple[float, torch.Tensor, torch.Tensor]],
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Count, mean and biased variance of all values, from those of each part."""
    total = sum(count for count, _, _ in parts)
    mean = reduce(torch.add, [mean * (count / total) for count, mean, _ in parts])
    spread = [(var + (part - mean).square()) * (count / total) for count, part, var in parts]
    return total, mean, reduce(torch.add, spread)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _axes(x: torch.Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _per_channel(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return value.view(1, -1, *[1] * (like.dim() - 2))


def _normalise(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, eps: float) -> torch.Tensor:
    return (_wide(x) - _per_channel(mean, x)) * _per_channel((variance + eps).rsqrt(), x)


def _sums(dy: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """(2, C): the sums over all but the channels of dy and of dy x_hat."""
    dy, axes = _wide(dy), _axes(dy)
    return torch.stack([dy.sum(axes), (dy * x_hat).sum(axes)])
