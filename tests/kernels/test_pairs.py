"""pair_lse and pair_softplus, dense and chunked, against loops and against autograd's own rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clipkit.kernels import ops, pair_lse, pair_softplus

DOUBLE = torch.float64


def features(n, m, d, seed=0, dtype=DOUBLE):
    g = torch.Generator().manual_seed(seed)
    x, y = (normalize(torch.randn(k, d, generator=g, dtype=DOUBLE), dim=1) for k in (n, m))
    return x.to(dtype), y.to(dtype)


def looped(
    x, y, scale, *, term, row_offset=0, row_ids=None, col_ids=None, weight=None, exclude_positives=True
):
    """Lists of the terms of every row and of every column, by the definition, in Python floats."""
    rows, cols = [[] for _ in x], [[] for _ in y]
    for i in range(len(x)):
        for j in range(len(y)):
            if exclude_positives and j == row_offset + i:
                continue
            if row_ids is not None and int(row_ids[i]) == int(col_ids[j]):
                continue
            logit = float(scale) * math.fsum(float(a) * float(b) for a, b in zip(x[i], y[j]))
            value = term(logit + (float(weight[j]) if weight is not None else 0.0))
            rows[i].append(value)
            cols[j].append(value)
    return rows, cols


def log_sum(terms):
    total = math.fsum(terms)
    return math.log(total) if total else -math.inf


SETTINGS = {
    "square": {},
    "offset": {"row_offset": 2},
    "negative offset": {"row_offset": -3},
    "positives kept": {"exclude_positives": False},
    "ids": {"row_ids": torch.tensor([0, 0, 1, 2, 9]), "col_ids": torch.tensor([0, 1, 1, 2, 3, 3, 0])},
    "ids alone": {
        "row_ids": torch.tensor([0, 0, 1, 2, 9]),
        "col_ids": torch.tensor([0, 1, 1, 2, 3, 3, 0]),
        "exclude_positives": False,
    },
}


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_lse_equals_the_sums_written_out(impl, setting):
    x, y = features(5, 7, 4)
    weight = torch.tensor([0.3, -1.0, 0.0, -math.inf, 2.0, 0.1, 0.2], dtype=DOUBLE)
    rows, cols = looped(x, y, 9.0, term=math.exp, weight=weight, **SETTINGS[setting])
    row_lse, col_lse = pair_lse(
        x, y, 9.0, col_log_weight=weight, impl=impl, chunk_size=3, **SETTINGS[setting]
    )
    for found, terms in ((row_lse, rows), (col_lse, cols)):
        expected = torch.tensor([log_sum(t) for t in terms], dtype=DOUBLE)
        assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_softplus_equals_the_sums_written_out(impl, setting):
    x, y = features(5, 7, 4)
    rows, _ = looped(x, y, 30.0, term=lambda z: math.log1p(math.exp(z - 4.0)), **SETTINGS[setting])
    found = pair_softplus(x, y, 30.0, -4.0, impl=impl, chunk_size=3, **SETTINGS[setting])
    expected = torch.tensor([math.fsum(t) for t in rows], dtype=DOUBLE)
    assert torch.allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_one_pair_has_empty_sums_and_no_gradient(impl):
    x, y = (t.requires_grad_() for t in features(1, 1, 4))
    row_lse, col_lse = pair_lse(x, y, 100.0, impl=impl)
    assert row_lse.item() == col_lse.item() == -math.inf
    loss = torch.nn.functional.softplus(row_lse - 3.0).sum() + pair_softplus(x, y, 1.0, 0.0, impl=impl).sum()
    assert loss.item() == 0
    assert all(not grad.any() for grad in torch.autograd.grad(loss, (x, y)))


@pytest.mark.parametrize("impl", ["dense", "chunked"])
@pytest.mark.parametrize("n, m", [(0, 3), (3, 0), (0, 0)])
def test_an_empty_side_gives_empty_sums(impl, n, m):
    x, y = (t.requires_grad_() for t in features(n, m, 4))
    row_lse, col_lse = pair_lse(x, y, 2.0, impl=impl)
    assert row_lse.tolist() == [-math.inf] * n and col_lse.tolist() == [-math.inf] * m
    assert pair_softplus(x, y, 2.0, 0.0, impl=impl).tolist() == [0.0] * n


def test_gradients_are_those_of_the_definition():
    x, y = (3 * t for t in features(6, 8, 3))
    given = [
        t.requires_grad_() for t in (x, y, torch.tensor(2.0, dtype=DOUBLE), torch.randn(8, dtype=DOUBLE))
    ]
    ids = {"row_ids": torch.arange(6) // 2, "col_ids": torch.arange(8) // 2, "row_offset": 1}
    lse = lambda x, y, s, w: pair_lse(x, y, s, col_log_weight=w, impl="chunked", chunk_size=4, **ids)
    assert torch.autograd.gradcheck(lse, given)
    given[3] = torch.tensor(-1.0, dtype=DOUBLE, requires_grad=True)
    softplus = lambda x, y, s, b: pair_softplus(x, y, s, b, impl="chunked", chunk_size=4, **ids)
    assert torch.autograd.gradcheck(softplus, given)


@pytest.mark.parametrize("size", [1e-9, 3.0, 1e9])
def test_gradients_follow_the_upstream_gradient_at_any_size(size):
    x, y = (t.requires_grad_() for t in features(9, 11, 4, dtype=torch.float32))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (10.0, -2.0))
    weight = torch.randn(11, generator=torch.Generator().manual_seed(3)).requires_grad_()
    upstream = [size * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (9, 11)]
    results = []
    for impl in ("chunked", "dense"):
        sums = pair_lse(x, y, scale, col_log_weight=weight, impl=impl, chunk_size=4)
        row_sum = pair_softplus(x, y, scale, bias, impl=impl, chunk_size=4)
        results.append(
            [
                *torch.autograd.grad(sums, (x, y, scale, weight), upstream),
                *torch.autograd.grad(row_sum, (x, y, scale, bias), upstream[:1]),
            ]
        )
    for found, expected in zip(*results):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_a_row_left_with_absent_columns_alone_has_no_gradient(impl):
    x, y = (t.requires_grad_() for t in features(2, 2, 4))
    row_lse, col_lse = pair_lse(
        x, y, 5.0, col_log_weight=torch.tensor([0.0, -math.inf], dtype=DOUBLE), impl=impl
    )
    # Row 0 has column 1 alone, which is absent; row 1 has column 0.
    assert row_lse[0] == -math.inf and row_lse[1].isfinite()
    grad = torch.autograd.grad(torch.nn.functional.softplus(row_lse).sum(), x)[0]
    assert not grad[0].any() and grad[1].any() and grad.isfinite().all()


def opposed(n, m, d, dtype):
    """Every cosine near -1: all sums are small beside the largest that the norms allow."""
    x, y = features(n, m, d)
    away = normalize(torch.ones(d, dtype=DOUBLE), dim=0)
    return normalize(0.05 * x + away, dim=1).to(dtype), normalize(0.05 * y - away, dim=1).to(dtype)


def one_opposed(n, m, d, dtype):
    """One row opposed to every column, the others along them."""
    x, y = opposed(n, m, d, DOUBLE)
    return torch.cat([x[:1], -x[1:]]).to(dtype), y.to(dtype)


@pytest.mark.parametrize("scale", [1.0, 100.0, -100.0, 400.0, 5000.0])
@pytest.mark.parametrize("make", [features, opposed, one_opposed])
def test_chunked_is_exact_at_any_scale(make, scale):
    x, y = make(40, 50, 16, dtype=torch.float32)
    found, expected = [], []
    for results, impl, dtype in ((found, "chunked", torch.float32), (expected, "dense", DOUBLE)):
        given = [t.to(dtype).requires_grad_() for t in (x, y, torch.tensor(scale))]
        sums = pair_lse(*given, impl=impl, chunk_size=16)
        results += [*sums, *torch.autograd.grad([s.sum() for s in sums], given)]
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 2e-7 * max(30.0, abs(scale)) * b.norm().clamp(min=1e-6)


def test_float64_keeps_its_digits():
    x, y = (t.requires_grad_() for t in opposed(30, 20, 8, DOUBLE))
    scale = torch.tensor(100.0, dtype=DOUBLE, requires_grad=True)
    found = torch.autograd.grad(pair_lse(x, y, scale, impl="chunked", chunk_size=8)[0].sum(), (x, y, scale))
    expected = torch.autograd.grad(pair_lse(x, y, scale, impl="dense")[0].sum(), (x, y, scale))
    for a, b in zip(found, expected):
        assert (a - b).norm() <= 1e-12 * b.norm()


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunk_size_does_not_change_the_result(chunk_size):
    x, y = features(23, 31, 8)
    found = pair_lse(x, y, 20.0, impl="chunked", chunk_size=chunk_size)
    expected = pair_lse(x, y, 20.0, impl="dense")
    assert all(torch.allclose(a, b, rtol=1e-14, atol=1e-13) for a, b in zip(found, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_half_features_are_accumulated_in_float32(impl, dtype):
    x, y = (t.requires_grad_() for t in features(40, 30, 16, dtype=dtype))
    row_lse, col_lse = pair_lse(x, y, 100.0, impl=impl, chunk_size=16)
    assert row_lse.dtype == col_lse.dtype == torch.float32
    expected = pair_lse(x.detach().double(), y.detach().double(), 100.0, impl="dense")
    assert torch.allclose(row_lse.double(), expected[0], rtol=1e-6)
    grad = torch.autograd.grad(row_lse.sum(), x)[0]
    assert grad.dtype == dtype


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_autocast_does_not_reach_inside(impl):
    x, y = (t.requires_grad_() for t in features(20, 20, 8, dtype=torch.float32))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            sums = pair_lse(x, y, 50.0, impl=impl, chunk_size=8)
            losses = pair_softplus(x, y, 50.0, -5.0, impl=impl, chunk_size=8)
        results.append([*sums, losses, *torch.autograd.grad(sums[0].sum() + losses.sum(), (x, y))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_nan_reaches_what_it_touches_and_nothing_else(impl):
    x, y = features(6, 6, 4, dtype=torch.float32)
    x[2, 1] = float("nan")
    row_lse, col_lse = pair_lse(x, y, 10.0, impl=impl, chunk_size=4)
    assert row_lse.isnan().tolist() == [False, False, True, False, False, False]
    # Column 2 meets row 2 only as its positive, which is left out.
    assert col_lse.isnan().tolist() == [True, True, False, True, True, True]
    assert (
        pair_softplus(x, y, 10.0, -1.0, impl=impl, chunk_size=4).isnan().tolist() == row_lse.isnan().tolist()
    )


def test_strided_views_are_taken():
    x, y = features(12, 12, 6)
    views = torch.cat([x, x], 1)[:, :6], y.T.contiguous().T
    assert not views[0].is_contiguous() and not views[1].is_contiguous()
    for a, b in zip(pair_lse(*views, 5.0, impl="chunked"), pair_lse(x, y, 5.0, impl="dense")):
        assert torch.allclose(a, b, rtol=1e-13)


def test_gradients_come_only_where_they_are_asked_for():
    x, y = features(10, 12, 4)
    y.requires_grad_()
    row_lse, _ = pair_lse(x, y, 5.0, impl="chunked", chunk_size=4)
    expected = torch.autograd.grad(pair_lse(x, y, 5.0, impl="dense")[0].sum(), y)[0]
    row_lse.sum().backward()
    assert x.grad is None and torch.allclose(y.grad, expected)


def test_scale_of_one_element_and_of_another_dtype_gets_its_gradient():
    x, y = features(10, 12, 4, dtype=torch.float32)
    scale = torch.tensor([5.0], dtype=DOUBLE, requires_grad=True)
    pair_lse(x, y, scale, impl="chunked")[0].sum().backward()
    assert scale.grad.shape == (1,) and scale.grad.dtype == DOUBLE


class _Largest(TorchDispatchMode):
    """Records the largest number of elements any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.element_size()
            for t in tree_leaves(out)
            if isinstance(t, torch.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


def test_chunked_makes_no_tensor_of_all_pairs():
    n, chunk = 400, 32
    x, y = (t.requires_grad_() for t in features(n, n, 8, dtype=torch.float32))
    from clipkit.kernels import chunked

    pairs = chunked.Pairs()
    with torch.no_grad(), _Largest() as seen:
        _, _, row_sum, col_sum = chunked.lse_forward(x, y, torch.tensor(100.0), None, pairs, chunk)
        ones = torch.ones(n)
        chunked.lse_backward(
            ones,
            ones,
            x,
            y,
            torch.tensor(100.0),
            None,
            row_sum,
            col_sum,
            pairs,
            chunk,
            need_x=True,
            need_y=True,
            need_weight=False,
        )
        row_loss = chunked.softplus_forward(x, y, torch.tensor(10.0), torch.tensor(-10.0), pairs, chunk)
        chunked.softplus_backward(
            row_loss,
            x,
            y,
            torch.tensor(10.0),
            torch.tensor(-10.0),
            pairs,
            chunk,
            need_x=True,
            need_y=True,
            need_bias=True,
        )
    assert 0 < seen.elements <= n * 8, "nothing larger than the features themselves"


@pytest.mark.parametrize("impl", ["dense", "chunked"])
def test_compiles_whole(impl):
    x, y = (t.requires_grad_() for t in features(12, 9, 4, dtype=torch.float32))
    scale = torch.tensor(10.0, requires_grad=True)

    def loss(x, y, scale):
        row_lse, col_lse = pair_lse(x, y, scale, impl=impl, chunk_size=4)
        return row_lse.sum() + col_lse.sum() + pair_softplus(x, y, scale, -2.0, impl=impl, chunk_size=4).sum()

    # aot_eager traces forward and backward as the compiler does, without needing a C++ compiler.
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x, y, scale), (x, y, scale))
    found = torch.autograd.grad(compiled(x, y, scale), (x, y, scale))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(found, expected))


def test_operators_keep_torchs_rules():
    x, y = (t.requires_grad_() for t in features(7, 9, 5, dtype=torch.float32))
    scale, bias = (torch.tensor(v, requires_grad=True) for v in (3.0, -1.0))
    weight = torch.randn(9, requires_grad=True)
    ids = torch.arange(7), torch.arange(9)
    torch.library.opcheck(ops.pair_lse_op, (x, y, scale, *ids, weight, 1, True, "chunked", 4))
    torch.library.opcheck(ops.pair_softplus_op, (x, y, scale, bias, None, None, 0, True, "chunked", 4))


def test_a_second_gradient_is_refused_and_dense_gives_it():
    x, y = (t.requires_grad_() for t in features(5, 6, 3))
    for call in (
        lambda impl: pair_lse(x, y, 3.0, impl=impl)[0],
        lambda impl: pair_softplus(x, y, 3.0, 0.0, impl=impl),
    ):
        first = torch.autograd.grad(call("chunked").sum(), x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match='impl="dense"'):
            first.sum().backward()
        first = torch.autograd.grad(call("dense").sum(), x, create_graph=True)[0]
        assert torch.autograd.grad(first.square().sum(), x)[0].norm() > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"impl": "chunky"}, "Did you mean 'chunked'"),
        ({"precision": "hi"}, "precision"),
        ({"impl": "triton"}, "needs float32, bfloat16 or float16 features on a CUDA device"),
        ({"chunk_size": 0}, "at least 1"),
        ({"row_ids": torch.arange(3)}, "both or neither"),
        ({"row_ids": torch.arange(3), "col_ids": torch.arange(9)}, r"\(3,\) and \(4,\)"),
        ({"row_ids": torch.ones(3), "col_ids": torch.ones(4)}, "integers"),
        ({"col_log_weight": torch.ones(3)}, r"\(M,\) = \(4,\)"),
        ({"y": torch.ones(4, 6)}, "with one D"),
        ({"x": torch.ones(3, 5, dtype=torch.int64)}, "floating point"),
        ({"scale": torch.ones(2)}, "one number"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"x": torch.ones(3, 5), "y": torch.ones(4, 5), "scale": 1.0} | change
    x, y, scale = given.pop("x"), given.pop("y"), given.pop("scale")
    with pytest.raises(ValueError, match=message):
        pair_lse(x, y, scale, **given)
