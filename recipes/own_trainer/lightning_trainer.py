"""clipkit's losses in a LightningModule.

    pip install lightning
    python recipes/own_trainer/lightning_trainer.py
    python recipes/own_trainer/lightning_trainer.py --devices 2

The loss is made once and used in `training_step`; with several devices Lightning's DDP averages gradients and
the loss does the rest. A loss with parameters of its own is a submodule of the LightningModule, and so
reduced with it.
"""

from __future__ import annotations

import lightning
import torch
from pairs import LEARNING_RATE, LOSS, SmallDualEncoder, arguments, end_process_group, finish, make_pairs
from torch.utils.data import DataLoader, DistributedSampler

from clipkit.losses import create_loss


class Contrastive(lightning.LightningModule):
    def __init__(self, rows: list[dict[str, torch.Tensor]], batch_size: int):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size
        self.model = SmallDualEncoder()
        self.loss = create_loss(LOSS)
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        terms = self.loss(self.model(batch))
        self.log_dict({f"train/{name}": value for name, value in terms.items()})
        self.losses.append(terms["loss"].item())
        return terms["loss"]

    def train_dataloader(self) -> DataLoader:
        # Lightning's own sampler would shuffle; in order, the curve can be compared with the other examples'.
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(self.rows, ranks, rank, shuffle=False)
        return DataLoader(self.rows, batch_size=self.batch_size // ranks, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)


def main() -> None:
    given = arguments(devices={"type": int, "default": 1}, accelerator={"default": "auto"})
    trainer = lightning.Trainer(
        max_epochs=1, accelerator=given.accelerator, devices=given.devices,
        strategy="ddp" if given.devices > 1 else "auto", use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Contrastive(make_pairs(given.steps * given.batch_size), given.batch_size)
    trainer.fit(module)
    if trainer.is_global_zero:
        finish(module.losses)


if __name__ == "__main__":
    main()
    end_process_group()
