"""BatchNorm when one batch is seen as several micro-batches: its running statistics move once, not once per pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class UpdateOnce:
    """Collect the statistics of each micro-batch, undo what the passes did to the buffers, then update them once.

        with UpdateOnce(model) as norms:          # buffers are saved
            with norms.recording():               # statistics are read off here
                for part in parts:
                    model(part); norms.end_micro_batch()
            ...                                   # any further forward leaves no trace
                                                  # buffers: one update per call of the layer in a forward

    The update is torch's own, running <- (1 - momentum) running + momentum * statistic, with the mean and the unbiased
    variance of all micro-batches together (variance within plus variance between). The count of values per channel
    comes from a forward hook. Inside torch.compile hooks do not run; there the statistic is read from the buffers after
    the micro-batch and the count taken as large, which overstates the variance by at most 1 / (values per channel).
    After an exception the buffers are as they were.
    """

    def __init__(self, model: nn.Module):
        self.layers = [
            layer
            for layer in model.modules()
            if isinstance(layer, _BatchNorm) and layer.training and layer.running_mean is not None
        ]

    def __enter__(self) -> UpdateOnce:
        self.saved = [[buffer.clone() for buffer in _buffers(layer)] for layer in self.layers]
        # One list per layer and call within a forward, each of (count, mean, variance, updates) per micro-batch.
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
            statistic = (count, layer.running_mean / factor, layer.running_var / factor, updates)
            calls[self.seen[index]].append(statistic)
        self.seen[index] += 1
        _clear(layer)

    def end_micro_batch(self) -> None:
        for index, layer in enumerate(self.layers):
            if not self.seen[index] and layer.num_batches_tracked is not None:
                updates = int(layer.num_batches_tracked)
                if updates:
                    self._record(index, math.inf, updates)
            self.seen[index] = 0


def pool(statistics: list[tuple[float, torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of all values, from (count, mean, unbiased variance) of each part; float64 inside."""
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
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(updates)
    if layer.momentum is None:
        factor = 1 / float(layer.num_batches_tracked)
    else:
        factor = 1 - (1 - layer.momentum) ** updates
    layer.running_mean.lerp_(mean.to(layer.running_mean), factor)
    layer.running_var.lerp_(variance.to(layer.running_var), factor)


def _buffers(layer: _BatchNorm) -> list[torch.Tensor]:
    buffers = [layer.running_mean, layer.running_var]
    return buffers if layer.num_batches_tracked is None else [*buffers, layer.num_batches_tracked]


def _clear(layer: _BatchNorm) -> None:
    for buffer in _buffers(layer):
        buffer.zero_()
