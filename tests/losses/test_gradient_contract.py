"""However the batch is split over ranks, a loss has the gradients of one process, in float64."""

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
def ranks():
    """World size to the ranks' findings; each world is spawned once."""
    return {world: launch(gloo_cases.run_rank, world) for world in WORLDS}


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
    assert {name for spec in gloo_cases.SPECS.values() for name in spec} == set(list_losses())


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
