"""What float32 blocks keep of float64's digits, at scales from 1 to 1e4, and that they use no float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipkit.kernels import chunked, pair_lse, pair_softplus

SCALES = (1.0, 10.0, 100.0, 1e3, 1e4)


class NoFloat64(TorchDispatchMode):
    """Refuses what a device without float64 (MPS) refuses."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), function
        return out


def draw(rows, columns, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (rows, columns)]


def settings(kind, rows, columns):
    if kind == "ids":
        return {"row_ids": torch.arange(rows) // 3, "col_ids": torch.arange(columns) // 3, "row_offset": 5}
    if kind == "weights":
        return {"col_log_weight": torch.randn(columns, generator=torch.Generator().manual_seed(1))}
    return {}


def by_loops(x, y, scale, upstream, *, row_ids=None, col_ids=None, row_offset=0, col_log_weight=None):
    """Row sums and, for sum_i upstream_i row_lse_i, the gradient of x and the scale; in Python floats."""
    x, y = x.tolist(), y.tolist()
    sums, d_x, d_scale = [], [], 0.0
    for i, row in enumerate(x):
        kept = [j for j in range(len(y)) if j != i + row_offset]
        if row_ids is not None:
            kept = [j for j in kept if int(row_ids[i]) != int(col_ids[j])]
        dots = {j: math.fsum(a * b for a, b in zip(row, y[j])) for j in kept}
        logits = {
            j: scale * dots[j] + (0.0 if col_log_weight is None else float(col_log_weight[j])) for j in kept
        }
        top = max(logits.values())
        total = math.fsum(math.exp(logit - top) for logit in logits.values())
        chance = {j: float(upstream[i]) * math.exp(logits[j] - top) / total for j in kept}
        sums.append(top + math.log(total))
        d_x.append([scale * math.fsum(chance[j] * y[j][k] for j in kept) for k in range(len(row))])
        d_scale += math.fsum(chance[j] * dots[j] for j in kept)
    return [torch.tensor(value, dtype=torch.float64) for value in (sums, d_x, d_scale)]


def error(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


@pytest.mark.parametrize("kind", ["plain", "ids", "weights"])
@pytest.mark.parametrize("scale", SCALES)
def test_float32_blocks_agree_with_float64_loops(scale, kind):
    """dx is a product of logits' rounding (6e-8 times the scale) and of how far the second best is."""
    x, y = draw(40, 55, 16)
    upstream = torch.rand(40, generator=torch.Generator().manual_seed(2))
    expected = by_loops(x, y, scale, upstream, **settings(kind, 40, 55))
    given = [x.requires_grad_(), torch.tensor(scale, requires_grad=True)]
    row_lse, _ = pair_lse(given[0], y, given[1], impl="chunked", chunk_size=16, **settings(kind, 40, 55))
    found = [row_lse, *torch.autograd.grad(row_lse, given, upstream)]
    for value, reference, limit in zip(found, expected, (2e-7, 1e-5, 1e-6), strict=True):
        assert error(value, reference) <= limit


@pytest.mark.parametrize(
    "operation, kind",
    [("lse", "plain"), ("lse", "ids"), ("lse", "weights"), ("softplus", "plain"), ("softplus", "ids")],
)
@pytest.mark.parametrize("scale", SCALES)
def test_float32_blocks_lose_no_more_than_the_whole_float32_matrix(operation, scale, kind):
    """Against float64 on the same numbers; its own dx is off by up to 2e-5 at 1e4."""
    x, y = draw(200, 260, 32)

    def run(impl, dtype):
        given = [t.to(dtype).requires_grad_() for t in (x, y, torch.tensor(scale))]
        if operation == "lse":
            results = pair_lse(*given, impl=impl, chunk_size=64, **settings(kind, 200, 260))
        else:
            results = [pair_softplus(*given, -10.0, impl=impl, chunk_size=64, **settings(kind, 200, 260))]
        return [*results, *torch.autograd.grad([r.sum() for r in results], given)]

    exact = run("dense", torch.float64)
    for blocks, matrix, reference in zip(
        run("chunked", torch.float32), run("dense", torch.float32), exact, strict=True
    ):
        assert error(blocks, reference) <= 2 * error(matrix, reference) + 5e-7


@pytest.mark.parametrize("scale", [10.0, 1e3])
def test_float32_features_meet_no_float64(scale):
    """The functions themselves: a mode does not see what an operator does inside."""
    (x, y), weight = draw(20, 30, 8), torch.randn(30)
    scale, bias, pairs = torch.tensor(scale), torch.tensor(-5.0), chunked.Pairs(2)
    needs = {"need_x": True, "need_y": True}
    with NoFloat64():
        row_lse, col_lse, *sums = chunked.lse_forward(x, y, scale, weight, pairs, 8)
        chunked.lse_backward(
            row_lse, col_lse, x, y, scale, weight, *sums, pairs, 8, **needs, need_weight=True
        )
        row_sum = chunked.softplus_forward(x, y, scale, bias, pairs, 8)
        chunked.softplus_backward(row_sum, x, y, scale, bias, pairs, 8, **needs, need_bias=True)
