"""However the batch is split over ranks, a loss has the gradients of one process, in float64; and a bad input on
one rank is the same error on every rank."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from clipkit.losses import list_losses
from tests.processes import launch

# Spawned ranks import the cases by name, and inherit sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gloo_agreement
import gloo_cases

TOLERANCE = 1e-10
WORLDS = (2, 4)
RUNS = [
    (case, impl)
    for case in gloo_cases.SPECS
    for impl in gloo_cases.IMPLEMENTATIONS
    if impl == "dense" or gloo_cases.has_implementations(case)
]


@pytest.fixture(scope="module")
def both():
    """World size to the ranks' findings; each world is spawned once."""
    return {world: launch(gloo_agreement.run_both, world) for world in WORLDS}


@pytest.fixture(scope="module")
def ranks(both):
    return {world: [found["contract"] for found in each] for world, each in both.items()}


@pytest.fixture(scope="module", params=WORLDS)
def agreement(request, both):
    return [found["agreement"] for found in both[request.param]]


@functools.cache
def one_process(case: str, start: int = 0, stop: int = gloo_cases.N) -> dict[str, torch.Tensor]:
    return gloo_cases.run(case, "dense", slice(start, stop), None, None)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    if torch.equal(found, expected):
        return 0.0
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert relative(found[name], expected[name]) < TOLERANCE, name


def test_every_registered_loss_has_a_case():
    named = {s.get("name", name) for spec in gloo_cases.SPECS.values() for name, s in spec.items()}
    assert named == set(list_losses())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case, impl", RUNS)
def test_ranks_have_the_gradient_of_one_process(ranks, case, impl, world):
    expected = one_process(case)
    assert any("gradient of model" in name and value.norm() > 1e-6 for name, value in expected.items())
    for found in ranks[world]:
        assert_same(found[case, impl, "world"], expected)


@pytest.mark.parametrize("case", gloo_cases.SPECS)
def test_groups_of_two_ranks_average_their_own_losses(ranks, case):
    halves = [one_process(case, 0, 4), one_process(case, 4, 8)]
    for rank, found in enumerate(ranks[4]):
        found = found[case, "dense", "halves"]
        own = halves[rank // 2]
        for name in own:
            expected = (halves[0][name] + halves[1][name]) / 2 if name.startswith("gradient") else own[name]
            assert relative(found[name], expected) < TOLERANCE, name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", gloo_cases.UNEVEN)
def test_uneven_ranks_have_the_gradient_of_one_process(ranks, case, world):
    expected = one_process(case)
    for found in ranks[world]:
        assert_same(found[case, "dense", "uneven"], expected)


@pytest.mark.parametrize("world, counts", [(2, [8, 0]), (4, [6, 1, 1, 0])])
def test_uneven_ranks_are_refused_by_name_on_every_rank(ranks, world, counts):
    for found in ranks[world]:
        assert str(counts) in found["refusal"] and "drop_last" in found["refusal"]


@pytest.mark.parametrize("overlap", ["none", "ring"])
@pytest.mark.parametrize("world", WORLDS)
def test_half_precision_gradients_of_the_ranks_are_added_up_before_they_are_rounded(ranks, world, overlap):
    exact = gloo_cases.half_gradient(slice(0, gloo_cases.N), None, torch.float64)
    gradients = [found[f"half gradient {overlap}"] for found in ranks[world]]
    found = torch.cat(gradients).double() / world
    assert gradients[0].dtype == torch.bfloat16
    # One rounding to 8 bits, and the arithmetic's own error in fp32; on one process too.
    alone = gloo_cases.half_gradient(slice(0, gloo_cases.N), None).double()
    for gradient in (found, alone):
        assert ((gradient - exact).abs() <= exact.abs() * 2.0**-8 + 1e-7).all()


def test_a_bad_input_on_one_rank_is_the_same_error_on_every_rank(agreement):
    wrong = {}
    for case in agreement[0]:
        told = {found[case] for found in agreement}
        if case[-1] not in ("good", "nan") and (
            len(told) > 1 or not next(iter(told)).startswith("ValueError")
        ):
            wrong[case] = told
    assert not wrong and len(agreement[0]) > 100


def test_the_error_names_the_rank_or_what_each_brought(agreement):
    for case, told in agreement[0].items():
        if case[-1] in ("good", "nan") or "needs at least 2" in told:
            continue
        if case == ("fastclip", "sample_index", "out of range"):
            # All ranks have seen all of them.
            continue
        assert any(words in told for words in ("on rank 1 of", "rank 1: ", "but ranks 0..")), (case, told)


def test_a_nan_on_one_rank_is_a_nan_on_every_rank(agreement):
    cases = [case for case in agreement[0] if case[-1] == "nan"]
    assert len(cases) > 5
    assert all(found[case] != found[case] for found in agreement for case in cases)


def test_after_an_error_a_good_batch_is_as_it_was(agreement):
    for case in (case for case in agreement[0] if case[-1] == "good"):
        values = {value for found in agreement for value in found[case]}
        assert max(values) - min(values) < 1e-9 and min(values) == min(values), case
