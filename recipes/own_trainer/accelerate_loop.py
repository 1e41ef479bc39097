"""clipkit's losses in a loop of Hugging Face Accelerate.

    pip install accelerate
    python recipes/own_trainer/accelerate_loop.py
    torchrun --standalone --nproc-per-node 2 recipes/own_trainer/accelerate_loop.py

`prepare` wraps model and optimizer; the loss is called as it is and meets the other processes by itself. A loss
with parameters of its own is prepared too. Accelerate's `gradient_accumulation_steps` adds up the losses of
small batches, which is another loss: `clipkit.grad_cache.cached_backward(model, loss, batch,
micro_batch_size=...)` in place of `accelerator.backward` has the large batch's own gradient.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
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

from clipkit.losses import create_loss


def main() -> None:
    given = arguments()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    loss = create_loss(LOSS)
    model = SmallDualEncoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model, optimizer = accelerator.prepare(model, optimizer)
    rows = make_pairs(given.steps * given.batch_size)
    # accelerator.prepare(DataLoader(...)) deals the rows out as well; here they stay in the other examples' order.
    ranks, rank = accelerator.num_processes, accelerator.process_index
    losses = []
    for batch in batches(rows, given.batch_size, rank=rank, ranks=ranks):
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        terms = loss(model(batch))
        accelerator.backward(terms["loss"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms["loss"].item())
    if accelerator.is_main_process:
        finish(losses)
    # Accelerate holds what it has prepared until it is told.
    accelerator.free_memory()


if __name__ == "__main__":
    main()
    end_process_group()
