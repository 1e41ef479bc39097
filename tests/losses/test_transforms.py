"""What else than backward may be asked of a registered loss: the table in clipkit/losses/README.md, by name.

torch.func's grad and vmap, torch.export with a batch of any size, second derivatives on one process and on several,
float32 alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from clipkit.losses import FastCLIP, InfoNCE, list_losses
from tests.kernels.test_chunked_precision import NoFloat64
from tests.losses.test_every_loss import build, make
from tests.processes import launch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gloo_cases
import second_derivatives

# Torch's attention has no second derivative, nor what is written with one derivative by hand.
NO_SECOND = {"cloob", "distill"} & set(list_losses())
# Its autograd.Function is not written for torch.func, nor its loop over rows for a size that is a symbol.
NO_FUNC = {"distill"} & set(list_losses())
WITH_FUNC = sorted(set(list_losses()) - NO_FUNC)


def function_of(name, dtype=torch.float32):
    """The term as a function of its float features, and these."""
    given = make(build(name), grad=False, dtype=dtype)
    floats = {key: value.to(dtype) for key, value in given.items() if value.is_floating_point()}
    term = build(name).to(dtype).terms[name]
    if any(True for _ in term.buffers()):
        # In training it writes its state, which belongs to no one of several batches at once.
        term.eval()
    return (lambda floats: term(**{**given, **floats})), floats


@pytest.mark.parametrize("name", WITH_FUNC)
def test_torch_func_grad_is_backward(name):
    function, floats = function_of(name)
    found = torch.func.grad(function)(floats)
    leaves = {key: value.clone().requires_grad_() for key, value in floats.items()}
    expected = torch.autograd.grad(
        function(leaves), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    for key, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[key], gradient, msg=key)


def test_a_loss_without_torch_func_says_so():
    for name in sorted(NO_FUNC):
        function, floats = function_of(name)
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(function)(floats)


@pytest.mark.parametrize("name", WITH_FUNC)
def test_vmap_is_a_loop_over_batches(name):
    function, floats = function_of(name)
    move = lambda x: normalize(x + 0.2, dim=-1) if x.ndim == 2 else x + 0.2
    many = {key: torch.stack([value, move(value)]) for key, value in floats.items()}
    found, gradients = torch.func.vmap(torch.func.grad_and_value(function))(many)[::-1]
    for index in range(2):
        one = {key: value[index] for key, value in many.items()}
        gradient, value = torch.func.grad_and_value(function)(one)
        torch.testing.assert_close(found[index], value)
        for key in one:
            torch.testing.assert_close(gradients[key][index], gradient[key], msg=key)


def test_under_torch_func_the_whole_matrix_is_taken_and_blocks_are_refused():
    given = [normalize(torch.randn(5, 4), dim=-1) for _ in range(2)] + [torch.tensor(5.0)]
    found = torch.func.grad(InfoNCE())(*given)
    torch.testing.assert_close(found, torch.func.grad(InfoNCE(impl="dense"))(*given))
    with pytest.raises(ValueError, match='impl="chunked" knows no torch.func transform.*use impl="dense"'):
        torch.func.grad(InfoNCE(impl="chunked"))(*given)


class _Value(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.loss = build(name)

    def forward(self, features):
        return self.loss(features)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_FUNC)
def test_exports_for_a_batch_of_any_size(name):
    """strict=True: without it torch.export takes len() for a constant, and says so."""
    torch._dynamo.reset()
    rows = torch.export.Dim("rows", min=2, max=64)
    features = make(build(name), grad=False)
    sizes = {key: {0: rows} if value.dim() else None for key, value in features.items()}
    exported = torch.export.export(_Value(name), (features,), dynamic_shapes=(sizes,), strict=True)
    others = make(build(name), rows=9, grad=False)
    torch.testing.assert_close(exported.module()(others), _Value(name)(others))


@pytest.mark.parametrize("name", sorted(set(list_losses()) - NO_SECOND))
def test_second_derivatives_on_one_process_are_those_of_finite_differences(name):
    """d |dL/dx|^2 along one direction of the first matrix, against the difference of two evaluations."""
    function, floats = function_of(name, torch.float64)
    key = next(key for key, value in floats.items() if value.ndim == 2)

    def penalty(x):
        given = {**floats, key: x}
        (gradient,) = torch.autograd.grad(function(given), x, create_graph=True)
        # A loss that is linear in x (distill_features) has a gradient that hangs on nothing.
        return gradient.square().sum() + 0 * x.sum()

    x = floats[key].requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found = (torch.autograd.grad(penalty(x), x)[0] * direction).sum()
    step = 1e-5
    ends = [penalty((x.detach() + sign * step * direction).requires_grad_()) for sign in (1, -1)]
    assert found.item() == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), rel=1e-6)


@pytest.mark.parametrize("name", sorted(NO_SECOND))
def test_a_second_derivative_that_is_not_there_is_an_error(name):
    function, floats = function_of(name, torch.float64)
    x = floats["image_features"].requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented|first derivatives only"):
        (first,) = torch.autograd.grad(function(floats), x, create_graph=True)
        torch.autograd.grad(first.square().sum(), x)


@pytest.fixture(scope="module")
def ranks():
    return launch(second_derivatives.run_rank, 2)


@pytest.mark.parametrize("how", ["grad", "backward"])
@pytest.mark.parametrize("case", gloo_cases.SPECS)
def test_second_derivatives_over_ranks_are_right_or_refused(ranks, case, how):
    """Never a number that leaves out what a rank's gradient owes to the others: it was off by up to 1.2."""
    expected = second_derivatives.penalty_gradient(case, slice(0, gloo_cases.N), None)
    for rank, found in enumerate(ranks):
        found = found["second"][case, how]
        if isinstance(found, str):
            assert "first derivatives only" in found or "not implemented" in found, found
            continue
        assert not isinstance(expected, str), expected
        rows = slice(rank * gloo_cases.N // 2, (rank + 1) * gloo_cases.N // 2)
        for own, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(own, whole[rows], rtol=1e-9, atol=1e-12)


def test_infonce_over_ranks_says_what_to_do_about_second_derivatives(ranks):
    for found in ranks:
        assert "group=None" in found["second"]["infonce", "grad"]


def test_a_nan_on_one_rank_leaves_no_trace_in_fastclips_state(ranks):
    loss, good = FastCLIP(num_samples=40, gamma=0.4).double(), second_derivatives.features(slice(0, 8))
    for _ in range(2):
        with torch.no_grad():
            loss(*(good[name] for name in loss.inputs))
    for found in ranks:
        for name, value in loss.state_dict().items():
            torch.testing.assert_close(found["fastclip"][name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list_losses())
def test_float32_features_meet_no_float64(name):
    """What MPS lacks; the blocks of `impl="chunked"` are asked in tests/kernels."""
    features, loss = make(build(name)), build(name)
    with NoFloat64():
        loss(features)["loss"].backward()
