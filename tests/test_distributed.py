"""Collectives and their gradients on three real gloo ranks, spawned once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipkit import distributed
from clipkit.distributed import launch

# Spawned ranks import the worker by name, and inherit sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import gloo_primitives
from gloo_primitives import W, coefficients, own, partial_sums


@pytest.fixture(scope="module")
def ranks():
    return launch(gloo_primitives.run_rank, W)


def test_launch_returns_each_ranks_result_in_order(ranks):
    assert [found["rank"] for found in ranks] == [0, 1, 2]
    assert all(
        found["world_size"] == W and found["is_distributed"] and found["auto is the world"] for found in ranks
    )
    assert [found["environment"] for found in ranks] == [("0", "3"), ("1", "3"), ("2", "3")]
    assert all(found["threads"] == 1 and found["alone"] == (0, 1) for found in ranks)


def test_objects_are_gathered_in_rank_order(ranks):
    assert all(found["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}] for found in ranks)


def test_rows_are_gathered_in_rank_order(ranks):
    expected = torch.cat([own(rank) for rank in range(W)])
    for found in ranks:
        assert torch.equal(found["gathered"], expected) and torch.equal(found["strided"], expected)
        assert found["integers"].tolist() == [0, 0, 1, -1, 2, -2]


def test_a_gathered_row_gets_the_sum_of_what_all_ranks_want(ranks):
    wanted = sum(coefficients(rank) for rank in range(W))
    for rank, found in enumerate(ranks):
        assert torch.allclose(found["gathered gradient"], wanted[2 * rank : 2 * rank + 2], rtol=1e-14)


def test_half_precision_gradients_are_added_up_in_fp32(ranks):
    assert all(found["half gradient"].tolist() == [[258.0, 258.0]] for found in ranks)
    assert all(found["half gradient"].dtype == torch.bfloat16 for found in ranks)


def test_a_sum_gets_w_times_the_gradient_of_its_replicated_use(ranks):
    for found in ranks:
        assert torch.allclose(found["sum"], sum(own(rank) for rank in range(W)), rtol=1e-14)
        assert torch.allclose(found["sum gradient"], W * coefficients(0)[:2], rtol=1e-14)


def test_logsumexp_over_ranks_owns_its_columns_and_keeps_empty_ones_empty(ranks):
    partial = torch.stack([partial_sums(rank) for rank in range(W)])
    expected = torch.logsumexp(partial, 0)
    assert expected[0] == -torch.inf and expected[2] > 800
    # The owner of columns 2r, 2r + 1 weighs them (r + 1) and 2 (r + 1).
    weights = torch.tensor([1.0, 2.0, 2.0, 4.0, 3.0, 6.0], dtype=torch.float64)
    share = torch.softmax(partial, 0) * weights
    share[:, 0] = 0.0
    for rank, found in enumerate(ranks):
        assert torch.allclose(found["lse"], expected[2 * rank : 2 * rank + 2], rtol=1e-14)
        assert torch.allclose(found["lse gradient"], share[rank], rtol=1e-12, atol=1e-15)


def test_a_subgroup_meets_only_its_members(ranks):
    assert torch.equal(ranks[2]["pair"], torch.cat([own(0), own(2)]))
    assert ranks[0]["rank in pair"] == 0 and ranks[2]["rank in pair"] == 1
    assert "no member" in ranks[1]["stranger"]
    assert ranks[1]["group of one"] is None


def test_uneven_rows_are_refused_on_every_rank_with_the_counts(ranks):
    assert all("[1, 2, 3]" in found["uneven"] for found in ranks)


def test_ranks_agree_or_are_all_told_why_not(ranks):
    told = (
        "every rank of a group must bring x of the same shape and type, but brought rank 0: fp32 of shape (4, 2); "
        "rank 1: fp32 of shape (4, 2); rank 2: fp32 of shape (4, 3)"
    )
    for found in ranks:
        assert found["agreed"] is None and found["differ"] == told
        assert "rank 0: fp32 of shape (4); rank 1: none" in found["missing"]
        assert found["problem"] == "bad (on rank 2 of ranks 0..2)"


def test_where_no_host_looks_the_device_asserts_on_every_rank(ranks):
    for rank, found in enumerate(ranks):
        assert "do not fit together" in found["asserted"] and found["not asserted"] is None
        assert ("another rank" if rank == 1 else "do not fit together") in found["one looks"]


def test_without_a_group_everything_is_the_identity():
    x = own(0).requires_grad_()
    assert distributed.resolve_group("auto") is None and not distributed.is_distributed()
    assert distributed.all_gather_rows(x) is x
    assert distributed.all_reduce_sum(x) is x
    assert distributed.logsumexp_over_ranks(x) is x
    assert distributed.gather_objects("a") == ["a"]
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.barrier()


def test_a_misspelt_group_is_refused():
    with pytest.raises(ValueError, match="'atuo'.*auto"):
        distributed.resolve_group("atuo")


def test_a_failing_rank_brings_its_traceback_and_ends_the_others():
    with pytest.raises(RuntimeError, match="(?s)rank 1 of 2 failed.*a message only rank 1 knows"):
        launch(gloo_primitives.fail_on_rank_1, 2)


def test_a_rank_that_dies_without_a_word_is_told_from_one_that_is_late():
    # The survivor may see its connection close first, and then it is the one with a traceback.
    with pytest.raises(RuntimeError, match=r"(?s)exit codes by rank \{1: -6\}|rank 0 of 2 failed"):
        launch(gloo_primitives.die_on_rank_1, 2)


def test_a_rank_that_never_returns_is_killed_in_time():
    with pytest.raises(RuntimeError, match=r"did not finish in 2 s"):
        launch(gloo_primitives.never_return, 1, timeout_s=2)


def test_nothing_holds_a_process_group_that_was_taken_down(tmp_path):
    """A loss imported, a model under DDP, and the group's threads end with it."""
    program = f"""
import clipkit.losses, gc, torch
from tests.processes import gloo_threads
from torch import distributed, nn
distributed.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
assert gloo_threads()
del model
gc.collect()
distributed.destroy_process_group()
assert not gloo_threads(), gloo_threads()
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_launch_needs_a_rank():
    with pytest.raises(ValueError, match="world_size is 0"):
        launch(gloo_primitives.square, 0, 3)
