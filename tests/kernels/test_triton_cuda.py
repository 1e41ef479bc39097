"""What only a CUDA device can show: large sizes, memory, repeatability, graphs and streams."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from clipkit.kernels import pair_lse, pair_softplus

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a CUDA device of capability 8.0 or later",
)


def features(n, d, dtype=torch.float16, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)
    return [
        normalize(torch.randn(n, d, device="cuda", generator=g), dim=1).to(dtype).requires_grad_()
        for _ in range(2)
    ]


def step(x, y, scale, impl="triton"):
    """Sums and gradients of both kinds."""
    row_lse, col_lse = pair_lse(x, y, scale, impl=impl)
    row_sum = pair_softplus(x, y, scale, -10.0, impl=impl)
    total = row_lse.sum() - col_lse.sum() / 2 + row_sum.sum()
    return [row_lse, col_lse, row_sum, *torch.autograd.grad(total, (x, y, scale))]


def test_two_runs_are_equal_bit_for_bit():
    x, y = features(9001, 512)
    scale = torch.tensor(100.0, device="cuda", requires_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(step(x, y, scale), step(x, y, scale)))


# Float32: tensor cores cut their accumulator off by up to 2^-23 at every 16 products. Of 80 times a cosine near 0.16,
# which is where these softmaxes lie, 512 / 16 such steps take up to 5e-5, and of the products with a block's
# coefficients 8448 / 16 steps, half a step each on sums that grow, about 1.6e-5.
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 6e-3), (torch.float32, 7e-5)]
)
def test_many_rows_equal_float64_on_a_sample(dtype, tolerance):
    n, d, sample = 33000, 512, slice(31000, 31064)
    x, y = features(n, d, dtype)
    scale = torch.tensor(80.0, device="cuda", requires_grad=True)
    row_lse, col_lse = pair_lse(x, y, scale, impl="triton")
    grad = torch.autograd.grad(row_lse.sum() + col_lse.sum(), x)[0]
    rows, columns = x.detach()[sample].double().requires_grad_(), y.detach().double()
    exact, _ = pair_lse(rows, columns, 80.0, row_offset=sample.start, impl="dense")
    assert torch.allclose(row_lse[sample].double(), exact, rtol=2e-6, atol=5e-5)
    # The columns' part of a row's gradient needs every column's sum: taken from the float32 outputs.
    logits = 80.0 * rows.detach() @ columns.T
    weights = (logits - exact.detach()[:, None]).exp() + (logits - col_lse.double()[None, :]).exp()
    weights[torch.arange(64), torch.arange(sample.start, sample.stop)] = 0
    expected = 80.0 * weights @ columns
    assert float((grad[sample].double() - expected).norm() / expected.norm()) <= tolerance


def test_memory_does_not_grow_with_the_square():
    scale, peaks = torch.tensor(50.0, device="cuda", requires_grad=True), {}
    for n in (33792, 67584):
        x, y = features(n, 256)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step(x, y, scale)
        torch.cuda.synchronize()
        peaks[n] = torch.cuda.max_memory_allocated() - base
    # Workspaces (outer blocks) are the same at both sizes; the rest is linear in N.
    assert peaks[67584] <= 2 * peaks[33792]
    assert peaks[67584] < 67584**2 * 2 / 8, "an eighth of one float16 matrix of all pairs"


def test_is_captured_in_a_cuda_graph():
    x, y = features(3000, 256)
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(x, y, scale)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(x, y, scale)
    fresh_x, fresh_y = features(3000, 256, seed=1)
    with torch.no_grad():
        x.copy_(fresh_x)
        y.copy_(fresh_y)
        scale.fill_(100.0)
    graph.replay()
    replayed = [value.clone() for value in captured]
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(x, y, scale)))


def test_runs_on_a_stream_that_is_not_the_default():
    x, y = features(5000, 256)
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)
    expected = step(x, y, scale)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = step(x, y, scale)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_auto_picks_triton_and_compiles_whole():
    x, y = features(600, 64)
    scale = torch.tensor(30.0, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda x, y, s: pair_lse(x, y, s)[0].sum(), fullgraph=True)
    expected = torch.autograd.grad(pair_lse(x, y, scale, impl="triton")[0].sum(), (x, y, scale))
    found = torch.autograd.grad(compiled(x, y, scale), (x, y, scale))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_autocast_takes_float32_features_in_half_precision():
    x, y = features(600, 64, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = pair_lse(x, y, 30.0, impl="triton")[0]
    expected = pair_lse(x, y, 30.0, impl="triton", precision="half")[0]
    assert torch.equal(half, expected) and half.dtype == torch.float32
