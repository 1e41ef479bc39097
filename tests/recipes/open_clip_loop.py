"""open_clip's own training loop on its own model, for test_open_clip_loop and the ranks that it spawns."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

STEPS, ROWS = 4, 8


class Batches(list):
    """Batches with what the loop reads of a loader."""

    num_batches = property(len)
    num_samples = property(lambda self: sum(len(images) for images, _ in self))


def make_batches(count: int, rows: slice = slice(0, ROWS)) -> Batches:
    generator = torch.Generator().manual_seed(0)
    batches = Batches()
    for _ in range(count):
        images = torch.randn(ROWS, 3, 16, 16, generator=generator)
        texts = torch.randint(1, 20, (ROWS, 4), generator=generator)
        batches.append((images[rows], texts[rows]))
    return batches


def make_model(*, bias: bool) -> nn.Module:
    import open_clip

    torch.manual_seed(0)
    return open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "patch_size": 8, "layers": 1, "width": 16, "head_width": 8},
        text_cfg={"context_length": 4, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
        output_dict=True,
        init_logit_scale=math.log(10) if bias else math.log(1 / 0.07),
        init_logit_bias=-10.0 if bias else None,
    )


class Recorder:
    """tb_writer's place in the loop: keeps the loss of every logged step."""

    def __init__(self):
        self.losses: list[float] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "train/loss":
            self.losses.append(value)


def train(
    loss: nn.Module,
    *,
    bias: bool = False,
    accum_freq: int = 1,
    precision: str = "fp32",
    rows: slice = slice(0, ROWS),
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and weights after `train_one_epoch`, as it ships."""
    from open_clip_train.train import train_one_epoch

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    model = make_model(bias=bias)
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2, weight_decay=0.0)
    args = SimpleNamespace(
        device="cpu", precision=precision, distill=False, accum_freq=accum_freq, skip_scheduler=False,
        grad_clip_norm=1.0, horovod=False, log_every_n_steps=1, wandb=False, batch_size=ROWS // ranks,
        world_size=ranks, rank=0, local_rank=0,
    )  # fmt: skip
    batches = make_batches(STEPS * accum_freq, rows)
    data = {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}
    recorder = Recorder()
    logging.disable(logging.INFO)
    try:
        train_one_epoch(wrapped, data, loss, 0, optimizer, None, lambda step: None, None, args, recorder)
    finally:
        logging.disable(logging.NOTSET)
    return recorder.losses, {name: value.detach().clone() for name, value in model.state_dict().items()}


def run_rank() -> tuple[list[float], dict[str, torch.Tensor]]:
    from clipkit.losses import create_loss

    share = ROWS // dist.get_world_size()
    rows = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    return train(create_loss({"infonce": {"weight": 0.5}, "cyclic": {"weight": 0.1}}), rows=rows)
