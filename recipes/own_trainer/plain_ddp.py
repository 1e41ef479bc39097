"""clipkit's losses in a loop of plain PyTorch, on one process or several.

    python recipes/own_trainer/plain_ddp.py
    torchrun --standalone --nproc-per-node 2 recipes/own_trainer/plain_ddp.py
    torchrun --standalone --nproc-per-node 2 recipes/own_trainer/plain_ddp.py --micro-batch-size 8

The three print the same losses up to rounding. There is nothing to gather and no world size to multiply with:
the loss meets the other ranks by itself, and DDP's mean of gradients is the gradient of the whole batch.
Needs clipkit and torch. If a loss has parameters of its own (a head), wrap it in DDP as well and give them to
the optimizer.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from pairs import (
    LEARNING_RATE,
    LOSS,
    SmallDualEncoder,
    arguments,
    batches,
    end_process_group,
    finish,
    make_pairs,
)
from torch.nn.parallel import DistributedDataParallel

from clipkit.grad_cache import cached_backward
from clipkit.losses import create_loss


def main() -> None:
    given = arguments(
        micro_batch_size={"type": int, "default": None, "help": "rows a rank holds activations for"}
    )
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    loss = create_loss(LOSS)
    model = SmallDualEncoder()
    if ranks > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for batch in batches(
        make_pairs(given.steps * given.batch_size), given.batch_size, rank=rank, ranks=ranks
    ):
        if given.micro_batch_size:
            terms = cached_backward(model, loss, batch, micro_batch_size=given.micro_batch_size)
        else:
            terms = loss(model(batch))
            terms["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms["loss"].item())
    if rank == 0:
        finish(losses)


if __name__ == "__main__":
    main()
    end_process_group()
