"""clipkit's sentence losses in sentence-transformers' trainer.

    pip install sentence-transformers accelerate datasets
    python recipes/own_trainer/sentence_transformers_trainer.py

A loss there is a module called with the tokenised columns; `Triplets` below embeds them with the model and
hands them to clipkit's NLIContrastive (the supervised SimCSE), whose negatives are all ranks' sentences. The
trainer logs no per-step losses of itself, so the module keeps them.
"""

from __future__ import annotations

import random
import tempfile

import torch
from datasets import Dataset
from pairs import LEARNING_RATE, arguments, finish
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from torch.utils.data import SequentialSampler

from clipkit.losses import NLIContrastive

PEOPLE = ["a man", "a woman", "a child", "a dog", "two girls", "an old sailor", "the team", "a cook"]
DEEDS = ["runs", "sleeps", "sings", "jumps", "reads", "swims", "paints", "waits"]
PLACES = ["in the park", "at home", "on the beach", "near a bridge", "by the lake", "under a tree"]


class Triplets(nn.Module):
    """Premise, entailment and contradiction columns -> clipkit's loss on their embeddings."""

    def __init__(self, model: SentenceTransformer):
        super().__init__()
        self.model = model
        self.loss = NLIContrastive()
        self.losses: list[float] = []

    def forward(
        self, sentence_features: list[dict[str, torch.Tensor]], labels: torch.Tensor | None
    ) -> torch.Tensor:
        embeddings = [self.model(column)["sentence_embedding"] for column in sentence_features]
        loss = self.loss(*(nn.functional.normalize(embedding, dim=-1) for embedding in embeddings))
        self.losses.append(loss.item())
        return loss


def make_triplets(count: int, *, seed: int = 0) -> dict[str, list[str]]:
    """Sentences, what follows from each, and what contradicts it."""
    draw = random.Random(seed)
    columns: dict[str, list[str]] = {"premise": [], "entailment": [], "contradiction": []}
    for _ in range(count):
        who, deed, other = draw.choice(PEOPLE), draw.choice(DEEDS), draw.choice(DEEDS)
        columns["premise"].append(f"{who} {deed} {draw.choice(PLACES)}")
        columns["entailment"].append(f"{who} {deed}")
        columns["contradiction"].append(f"{who} {other} and never {deed}")
    return columns


def make_model(*, seed: int = 0) -> SentenceTransformer:
    """Averaged word vectors over the sentences' own words: a model that needs no download."""
    try:
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    except ImportError:  # where older releases keep it
        from sentence_transformers.models import StaticEmbedding

    words = sorted({word for phrase in [*PEOPLE, *DEEDS, *PLACES, "and never"] for word in phrase.split()})
    tokenizer = Tokenizer(
        WordLevel({word: index for index, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(seed)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=32)], device="cpu")


class InOrder(SentenceTransformerTrainer):
    def get_batch_sampler(self, dataset, batch_size, drop_last, *args, **settings):
        # In order, so that the curve can be compared; leave this out to have it shuffled.
        return torch.utils.data.BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def main() -> None:
    given = arguments()
    model = make_model()
    loss = Triplets(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder, max_steps=given.steps, per_device_train_batch_size=given.batch_size,
            max_grad_norm=0.0, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        rows = Dataset.from_dict(make_triplets(given.steps * given.batch_size))
        trainer = InOrder(
            model=model, args=settings, train_dataset=rows, loss=loss, optimizers=(optimizer, constant)
        )
        trainer.train()
    finish(loss.losses)


if __name__ == "__main__":
    main()
