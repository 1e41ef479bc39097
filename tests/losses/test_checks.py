import math

import pytest
import torch
from torch import nn

from clipkit.losses.checks import check_number, check_unit_norm, logaddexp, reads_values, softplus


@pytest.mark.parametrize("x", [-700.0, -30.0, -1e-3, 0.0, 3.0, 19.9, 20.1, 39.9, 40.1, 800.0])
def test_softplus_is_exact_at_every_argument(x):
    found = softplus(torch.tensor(x, dtype=torch.float64)).item()
    assert found == pytest.approx(max(x, 0) + math.log1p(math.exp(-abs(x))), rel=1e-15)


def test_softplus_of_an_empty_sum_is_zero_with_gradient_zero():
    x = torch.tensor(-torch.inf, requires_grad=True)
    softplus(x).backward()
    assert softplus(x) == 0.0 and x.grad == 0.0


def test_logaddexp_of_two_empty_sums_is_empty_with_gradient_zero():
    a = torch.tensor([-torch.inf, -torch.inf, 1.0], requires_grad=True)
    b = torch.tensor([-torch.inf, 2.0, 3.0], requires_grad=True)
    total = logaddexp(a, b)
    assert total.tolist() == pytest.approx([-math.inf, 2.0, math.log(math.e + math.e**3)])
    softplus(total).sum().backward()
    assert a.grad[0] == b.grad[0] == 0.0
    assert a.grad.isfinite().all() and b.grad.isfinite().all()
    assert b.grad[1].item() == pytest.approx(1 / (1 + math.exp(-2.0)))


def test_unit_norm_allows_the_rounding_of_bf16_and_no_more():
    x = nn.functional.normalize(torch.randn(500, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    check_unit_norm(x=x.bfloat16())
    x[3] *= 1.05
    with pytest.raises(ValueError, match="norms from .* to 1.05"):
        check_unit_norm(x=x)


def test_values_are_read_each_time_on_the_cpu_and_once_elsewhere():
    module = nn.Module()
    assert [reads_values(module, torch.device("cpu")) for _ in range(3)] == [True] * 3
    assert [reads_values(module, torch.device("cuda")) for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1, "x", None])
def test_numbers_out_of_range_are_refused_by_name(value):
    with pytest.raises(ValueError, match="width"):
        check_number("width", value, 0.0, 1.0)
