"""open_clip's model with clipkit's loss in place of its own.

    python recipes/own_trainer/open_clip_loss.py                       # clipkit's InfoNCE
    python recipes/own_trainer/open_clip_loss.py --loss open_clip      # open_clip's ClipLoss: the same numbers
    torchrun --standalone --nproc-per-node 2 recipes/own_trainer/open_clip_loss.py

The swap is one line, since arguments and their order are ClipLoss's. On several ranks clipkit's needs no
`rank`, no `world_size`, no `local_loss` and no `gather_with_grad`, and its gradients are those of one process
(benchmarks/contract.py measures both). The model is open_clip's CLIP with random weights and a small
configuration.
"""

from __future__ import annotations

import os

import open_clip
import torch
import torch.distributed as dist
from pairs import (
    COLORS,
    FILLERS,
    LEARNING_RATE,
    PLACES,
    arguments,
    batches,
    end_process_group,
    finish,
    make_pairs,
)
from torch.nn.parallel import DistributedDataParallel

from clipkit.losses import InfoNCE


def make_model(*, seed: int = 0) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return open_clip.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 16, "patch_size": 4, "layers": 1, "width": 32, "head_width": 16},
        text_cfg={
            "context_length": 3,
            "vocab_size": COLORS + PLACES + FILLERS,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
        output_dict=True,
    )


def main() -> None:
    given = arguments(loss={"choices": ["clipkit", "open_clip"], "default": "clipkit"})
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if ranks > 1 else 0
    loss = InfoNCE() if given.loss == "clipkit" else open_clip.ClipLoss(rank=rank, world_size=ranks)
    model = make_model()
    if ranks > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for batch in batches(
        make_pairs(given.steps * given.batch_size), given.batch_size, rank=rank, ranks=ranks
    ):
        out = model(batch["image"] / 255, batch["text"])
        value = loss(out["image_features"], out["text_features"], out["logit_scale"])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    if rank == 0:
        finish(losses)


if __name__ == "__main__":
    main()
    end_process_group()
