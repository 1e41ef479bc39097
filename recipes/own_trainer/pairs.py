"""What the examples beside this file train on: coloured blocks, their captions, and a model of two small
towers.

Nothing here is needed to use clipkit's losses: it stands where your data and your model are.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# The terms to train with, as `clipkit.losses.create_loss` takes them: CyCLIP with a small weight on its
# cycles.
LOSS = {"infonce": {}, "cyclic": {"weight": 0.05}}
LEARNING_RATE = 3e-3
COLORS, PLACES, FILLERS = 8, 16, 8


def arguments(**more: dict) -> argparse.Namespace:
    """--steps, --batch-size (pairs of the whole step, over all processes) and an example's own options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a step, over all processes")
    for name, settings in more.items():
        parser.add_argument("--" + name.replace("_", "-"), **settings)
    return parser.parse_args()


def make_pairs(count: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """`count` pairs: image (3, 16, 16) uint8, a block of one color at one place, and text (3,) token ids."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.rand(COLORS, 3, generator=generator)
    pairs = []
    for _ in range(count):
        color, place, filler = (
            int(torch.randint(0, n, (), generator=generator)) for n in (COLORS, PLACES, FILLERS)
        )
        image = 0.3 * torch.rand(3, 16, 16, generator=generator)
        top, left = 4 * (place // 4), 4 * (place % 4)
        image[:, top : top + 4, left : left + 4] = palette[color][:, None, None]
        text = torch.tensor([color, COLORS + place, COLORS + PLACES + filler])
        pairs.append({"image": (255 * image).to(torch.uint8), "text": text})
    return pairs


def batches(
    pairs: list[dict[str, torch.Tensor]], batch_size: int, *, rank: int = 0, ranks: int = 1
) -> Iterator[dict]:
    """Batches in the order of `pairs`; of each, rank r takes rows r, r + ranks, ... as samplers do."""
    for start in range(0, len(pairs) - batch_size + 1, batch_size):
        rows = pairs[start + rank : start + batch_size : ranks]
        yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class SmallDualEncoder(nn.Module):
    """forward(batch) -> {"image_features" (B, 32), "text_features" (B, 32), "logit_scale" ()}, unit norm."""

    def __init__(self, *, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Sequential(
            nn.Conv2d(3, 16, 4, stride=4),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.GELU(),
            nn.Linear(64, 32),
        )
        self.text = nn.Sequential(
            nn.EmbeddingBag(COLORS + PLACES + FILLERS, 64), nn.GELU(), nn.Linear(64, 32)
        )
        self.log_logit_scale = nn.Parameter(torch.tensor([2.0]))

    def forward(
        self, batch: dict[str, torch.Tensor], inputs: tuple[str, ...] | None = None
    ) -> dict[str, torch.Tensor]:
        return {
            "image_features": F.normalize(self.image(batch["image"] / 255), dim=-1),
            "text_features": F.normalize(self.text(batch["text"]), dim=-1),
            "logit_scale": self.log_logit_scale.exp()[0],
        }


def finish(losses: list[float], **more: object) -> None:
    """Print the loss of every step as the last line, JSON."""
    print(json.dumps({"losses": losses, **more}))


def end_process_group() -> None:
    """Take the process group down, once no variable holds anything of the training.

    gloo's threads end with the last that holds the group, and one that lets go of a tensor while Python ends
    aborts the process. A model under DDP holds the group, and is itself held by a cycle.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
