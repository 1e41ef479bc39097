"""What each rank of test_distributed runs; spawned processes import it, so it is no test file itself."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from clipkit import distributed

W = 3


def own(rank: int) -> torch.Tensor:
    """This rank's two rows of four numbers."""
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def partial_sums(rank: int) -> torch.Tensor:
    """Log-sums of W columns: one empty on this rank, one empty everywhere, one beyond exp's range."""
    x = torch.randn(W * 2, generator=torch.Generator().manual_seed(50 + rank), dtype=torch.float64)
    x[0] = -torch.inf
    x[1] = -torch.inf if rank != 1 else 0.5
    x[2] += 900.0
    return x


def coefficients(rank: int) -> torch.Tensor:
    """What this rank's part of the loss wants of each gathered entry."""
    return torch.randn(W * 2, 4, generator=torch.Generator().manual_seed(90 + rank), dtype=torch.float64)


def run_rank() -> dict:
    rank = dist.get_rank()
    group = distributed.resolve_group("auto")
    found = {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "is_distributed": distributed.is_distributed(),
        "auto is the world": group is dist.group.WORLD,
        "alone": (distributed.rank(None), distributed.world_size(None)),
        "objects": distributed.gather_objects({"rank": rank}),
        "threads": torch.get_num_threads(),
        "environment": (os.environ["RANK"], os.environ["WORLD_SIZE"]),
    }
    x = own(rank).requires_grad_()
    gathered = distributed.all_gather_rows(x, group)
    (gathered * coefficients(rank)).sum().backward()
    found["gathered"], found["gathered gradient"] = gathered.detach(), x.grad

    half = torch.full((1, 2), 0.5, dtype=torch.bfloat16).requires_grad_()
    # 256 + 1 + 1 is 256 when each addition is rounded to bf16, 258 when the sum is.
    (distributed.all_gather_rows(half, group) * (256.0 if rank == 0 else 1.0)).sum().backward()
    found["half gradient"] = half.grad

    transposed = own(rank).T.contiguous().T.requires_grad_()
    found["strided"] = distributed.all_gather_rows(transposed, group).detach()
    found["integers"] = distributed.all_gather_rows(torch.tensor([rank, -rank]), group)

    x = own(rank).requires_grad_()
    total = distributed.all_reduce_sum(x, group)
    (total * coefficients(0)[:2]).sum().backward()
    found["sum"], found["sum gradient"] = total.detach(), x.grad

    x = partial_sums(rank).requires_grad_()
    combined = distributed.logsumexp_over_ranks(x, group)
    weights = torch.tensor([1.0, 2.0]) * (rank + 1)
    (combined.masked_fill(combined == -torch.inf, 0.0) * weights).sum().backward()
    found["lse"], found["lse gradient"] = combined.detach(), x.grad

    pair = dist.new_group([0, 2])
    if rank != 1:
        found["pair"] = distributed.all_gather_rows(own(rank), distributed.resolve_group(pair))
        found["rank in pair"] = distributed.rank(pair)
    else:
        try:
            distributed.resolve_group(pair)
        except ValueError as error:
            found["stranger"] = str(error)
    lone = dist.new_group([1])
    found["group of one"] = distributed.resolve_group(lone) if rank == 1 else None
    try:
        distributed.all_gather_rows(torch.zeros(rank + 1, 2), group)
    except ValueError as error:
        found["uneven"] = str(error)
    found["agreed"] = distributed.agree(group, None, {"x": (4, 2, "fp32")}, torch.device("cpu"))
    found["differ"] = distributed.agree(group, None, {"x": (4, 2 + rank // 2, "fp32")}, torch.device("cpu"))
    found["missing"] = distributed.agree(
        group, None, {} if rank == 1 else {"x": (4, "fp32")}, torch.device("cpu")
    )
    found["problem"] = distributed.agree(
        group, "bad" if rank == 2 else None, {"x": (4, "fp32")}, torch.device("cpu")
    )
    # Where the host does not look, as on CUDA between changes of shape, the device asserts.
    for name, given in (("asserted", rank), ("not asserted", 0)):
        try:
            found[name] = distributed.agree(group, None, {"x": (given,)}, torch.device("cpu"), read=False)
        except RuntimeError as error:
            found[name] = str(error)
    # A rank whose shapes changed looks, alone: it must not wait for messages of the others.
    try:
        found["one looks"] = distributed.agree(
            group, None, {"x": (rank == 1,)}, torch.device("cpu"), read=rank == 1
        )
    except RuntimeError as error:
        found["one looks"] = str(error)
    distributed.barrier()
    return found


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise KeyError("a message only rank 1 knows")
    dist.barrier()


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os.abort()
    dist.barrier()


def never_return() -> None:
    import time

    time.sleep(600)


def square(x: int) -> int:
    return x * x
