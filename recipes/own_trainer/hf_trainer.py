"""clipkit's losses in the Hugging Face Trainer.

    pip install transformers accelerate
    python recipes/own_trainer/hf_trainer.py
    torchrun --standalone --nproc-per-node 2 recipes/own_trainer/hf_trainer.py

Override `compute_loss` and nothing else: the model returns features, the loss takes them. The Trainer's own
`gradient_accumulation_steps` sums the losses of small batches, which is another loss: keep it at 1, and use
`clipkit.grad_cache.cached_backward` in an overridden `training_step` for batches beyond memory.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from pairs import LEARNING_RATE, LOSS, SmallDualEncoder, arguments, end_process_group, finish, make_pairs
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from clipkit.losses import create_loss


class ContrastiveTrainer(Trainer):
    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.loss = create_loss(LOSS).to(self.args.device)
        self.losses: list[float] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        features = model(inputs)
        terms = self.loss(features)
        self.losses.append(terms["loss"].item())
        return (terms["loss"], features) if return_outputs else terms["loss"]

    def get_train_dataloader(self) -> DataLoader:
        # In order, so that the curve can be compared with the other examples'; leave this out to have it
        # shuffled.
        rows = DataLoader(self.train_dataset, batch_size=self.args.train_batch_size)
        return self.accelerator.prepare(rows)


def main() -> None:
    given = arguments()
    model = SmallDualEncoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, max_steps=given.steps, per_device_train_batch_size=given.batch_size,
            max_grad_norm=0.0, remove_unused_columns=False, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        settings.per_device_train_batch_size //= max(1, settings.world_size)
        trainer = ContrastiveTrainer(
            model=model, args=settings, train_dataset=make_pairs(given.steps * given.batch_size),
            optimizers=(optimizer, constant),
        )  # fmt: skip
        trainer.train()
        if trainer.is_world_process_zero():
            finish(trainer.losses)


if __name__ == "__main__":
    main()
    end_process_group()
