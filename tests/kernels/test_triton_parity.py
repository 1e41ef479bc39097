"""The Triton kernels against the dense float64 definition: forward and every gradient.

On a CUDA machine the kernels run there; elsewhere in Triton's interpreter, in a process of its own (it is
chosen when the kernels are first imported).
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from tests.processes import command

HERE = Path(__file__).resolve().parent

_spec = importlib.util.spec_from_file_location("clipkit_parity_cases", HERE / "parity_cases.py")
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

pytest.importorskip("triton", reason="triton is not installed: the kernels cannot run, interpreted or not")

# What a tensor core cuts off: it adds 16 products at a time, each time up to 2^-23 of its accumulator toward zero, so a
# logit of D dimensions (split operands: their last D) is off by up to D / 16 2^-23 of its size; a relative error of
# the coefficients is an absolute one of the logits. The interpreter rounds as numpy does.
TRUNCATED = 2.0**-23 / 16 if torch.cuda.is_available() else 0.0
# ||out - ref|| / ||ref|| by (output or gradient), for operands that are exact in float16 (half) or split
# (high). Gradients of half precision carry the rounding of G to float16, and bfloat16's that of the result
# itself.
TOLERANCE = {"float32": (1e-6, 1e-5), "float16": (1e-6, 1e-3), "bfloat16": (1e-6, 4e-3)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """name -> outputs and gradients of the kernels."""
    if torch.cuda.is_available():
        found = {}
        for name in [*cases.CASES, *cases.NAN_CASES]:
            inputs, settings = cases.problem(name, "cuda")
            with cases.exact_tiles() as exact:
                found[name] = cases.evaluate(inputs, settings, "triton")
            found[name]["exact"] = torch.tensor(float(any(exact)))
        inputs, settings = cases.problem("several blocks", "cuda")
        found["again"] = cases.evaluate(inputs, settings, "triton")
        return found
    out = tmp_path_factory.mktemp("interpreter") / "results.pt"
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command("-W", "ignore", HERE / "parity_cases.py", out, env=environment).finished()
    return torch.load(out, weights_only=True)


def reference(name: str) -> dict[str, torch.Tensor]:
    """The dense definition in float64, of the inputs as the kernels got them (rounded to the case's
    dtype)."""
    inputs, settings = cases.problem(name, "cpu")
    settings.pop("precision")
    exact = {
        key: value.detach().double().requires_grad_(value.requires_grad) for key, value in inputs.items()
    }
    return cases.evaluate(exact, settings, "dense")


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert value.shape == expected.shape
    infinite = expected.isinf()
    assert torch.equal(value[infinite], expected[infinite]), "an empty sum is -inf, and only an empty sum"
    value, expected = value[~infinite], expected[~infinite]
    return float((value - expected).norm() / expected.norm().clamp(min=1e-30)) if expected.numel() else 0.0


@pytest.mark.parametrize("name", [name for name in cases.CASES if cases.CASES[name]["features"] != "equal"])
def test_equals_the_dense_definition(results, name):
    found, expected = dict(results[name]), reference(name)
    found.pop("exact")
    assert found.keys() == expected.keys()
    settings = cases.CASES[name]
    forward, backward = TOLERANCE[settings["dtype"]]
    if settings["dtype"] == "float32" and settings["precision"] == "half":
        # The features themselves are rounded to 11 bits.
        forward, backward = 3e-4, 3e-3
    for key in expected:
        truncated = TRUNCATED * (settings["d"] + 15)
        if key.startswith("d"):
            inputs, _ = cases.problem(name, "cpu")
            for side in "xy":
                truncated *= max(inputs[side].detach().double().norm(dim=1).tolist(), default=0.0)
            truncated *= abs(settings["scale"])
        tolerance = (backward if key.startswith("d") else forward) + truncated
        if name == "converged":
            # The sums are near log 23, of logits 0 that are differences of products with scale 100.
            tolerance = 1e-5
            if key == "ds":
                # The mean of cosines near 0, each with float32's error of a product of unit vectors.
                assert abs(float(found[key] - expected[key])) <= 1e-5
                continue
        if expected[key].ndim == 0:
            # One number, the sum of terms of either sign: its own size says little about the size of what was
            # summed.
            tolerance *= 10
        if key == "dx" and settings["n"] == 1 and settings["m"] == 1:
            assert torch.equal(found[key], expected[key])
        assert relative(found[key], expected[key]) <= tolerance, (name, key)


@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith(("gap", "flushed"))])
def test_modality_gaps_leave_the_fast_coefficients_where_the_floor_says(results, name):
    """Bits of the smallest sum less the shift, from the definition's own sums; CLIP's gap is far above."""
    expected, settings = reference(name), cases.CASES[name]
    n, m = settings["n"], settings["m"]
    # Unit norms and the scale 100: log2(e) 100 + log2 max(N, M) bits, of which 100 are held.
    shift = math.ceil(100 * math.log2(math.e) + math.log2(max(n, m)) - 100)
    lowest = min(float(expected[key].min()) for key in ("row_lse", "col_lse")) / math.log(2) - shift
    share = 14 if settings["dtype"] == "float16" else 20
    floor = math.log2(max(n, m)) - 126 + share
    assert abs(lowest - floor) > 0.05, "this case cannot tell"
    assert bool(results[name]["exact"]) == (lowest < floor)
    assert not (name.startswith("gap of 0.8") and bool(results[name]["exact"]))


def test_gradient_vanishes_when_all_features_are_equal(results):
    # With equal rows every softmax is uniform: G y is a multiple of the common feature, equal for all rows up
    # to the upstream gradient. A relative comparison per element would divide by nothing; compare absolutely.
    found, expected = results["all features equal"], reference("all features equal")
    for key in expected:
        assert torch.allclose(
            found[key], expected[key], rtol=1e-3, atol=1e-3 * float(expected[key].abs().max())
        ), key


@pytest.mark.parametrize("name", list(cases.NAN_CASES))
def test_nan_in_a_row_reaches_its_sum_and_no_other_row(results, name):
    found, expected = results[name], reference(name)
    for key in expected:
        assert torch.equal(found[key].isnan(), expected[key].isnan()), key
    rows = found["row_sum" if "row_sum" in found else "row_lse"]
    assert rows.isnan().sum() == 1


def test_two_runs_are_equal_bit_for_bit(results):
    for key, value in results["several blocks"].items():
        assert key == "exact" or torch.equal(value, results["again"][key]), key


def test_infonce_built_on_it_keeps_its_digits_near_convergence(results):
    # loss_i = log(1 + exp(row_lse_i - s_ii)), about 1e-43 here: as a difference of two log-sum-exps it would
    # be 0.
    inputs, _ = cases.problem("converged", "cpu")
    x, y, scale = (inputs[key].detach().double() for key in "xys")
    positives = scale * (x * y).sum(1)
    expected = torch.tensor(
        [
            sum(float(torch.exp(scale * (x[i] @ y[j]) - positives[i])) for j in range(len(y)) if j != i)
            for i in range(len(x))
        ]
    )
    found = torch.exp(results["converged"]["row_lse"] - positives)
    assert relative(found, expected.double()) <= 3e-5
    assert 0 < expected.max() < 1e-10
