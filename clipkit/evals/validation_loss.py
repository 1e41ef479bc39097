"""The training losses on held-out pairs, as an evaluation task."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from clipkit.evals.encoder import Encoder
from clipkit.evals.sources import open_source
from clipkit.evals.tasks import register_task
from clipkit.losses import WeightedSum, create_loss
from clipkit.model import DualEncoder

# What an evaluation has of a pair. Views, sentences and hidden tokens are training's own.
_KNOWN = {"image_features", "text_features", "logit_scale", "logit_bias"}


@register_task("validation_loss")
class ValidationLoss:
    """The loss and its terms over batches of held-out pairs: a picture's evaluation crop and its first caption.

    Batches are consecutive pairs in file order, as large as in training, since a contrastive loss depends on how many pairs it
    tells apart; pairs that fill none are left out. The model is in evaluation mode: no dropout, BatchNorm's running statistics.
    Terms that read more than pairs (views, sentences, hidden tokens) or have weights of their own are left out, which is said;
    then there is no "loss", only the others.

    Args:
        loss: as clipkit.losses.create_loss takes it.
        batch_size: pairs that each loss is taken over.
        shards, clip_benchmark, split: the source, as of the task `retrieval`.

    Raises:
        ValueError: no term of the loss can be taken of pairs alone.
    """

    def __init__(
        self,
        *,
        loss: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None],
        batch_size: int,
        shards: str | list[str] | None = None,
        clip_benchmark: str | None = None,
        split: str = "test",
    ):
        self.source = open_source(
            "validation_loss", shards=shards, clip_benchmark=clip_benchmark, split=split, captioned=True
        )
        # Some have weights: drawn here, they must not change what is drawn later.
        with torch.random.fork_rng(devices=[]):
            whole = create_loss(loss, group=None).eval()
        self.batch_size = batch_size
        terms = {name: term for name, term in whole.terms.items() if _of_pairs(term)}
        self.left_out = [name for name in whole.terms if name not in terms]
        if not terms:
            raise ValueError(
                f"no term of this loss ({', '.join(self.left_out)}) can be taken of image-text pairs alone"
            )
        self.loss = WeightedSum(terms, {name: whole.weights[name] for name in terms})
        self.metrics = (*terms, *([] if self.left_out else ["loss"]))

    @torch.no_grad()
    def __call__(self, encoder: Encoder) -> dict[str, float]:
        if not isinstance(encoder.model, DualEncoder):
            raise ValueError(
                f"validation_loss takes the temperature of a clipkit model; this is a {type(encoder.model).__name__}"
            )
        if self.left_out and encoder.world[0] == 0:
            print(
                f"clipkit.evals: validation_loss leaves out {', '.join(self.left_out)}, which read more than pairs",
                file=sys.stderr,
                flush=True,
            )
        images = encoder.images(self.source)
        texts, index = encoder.captions(self.source)
        # The first caption of each picture.
        first = torch.searchsorted(index, torch.arange(len(images.image_features)))
        batches = len(first) // self.batch_size
        if not batches:
            raise ValueError(
                f"{self.source.identity} holds {len(first)} pairs, fewer than a batch of {self.batch_size}: give "
                "validation_loss a smaller batch_size"
            )
        scalars = {"logit_scale": encoder.model.logit_scale}
        if encoder.model.logit_bias is not None:
            scalars["logit_bias"] = encoder.model.logit_bias.float().sum()
        sums = dict.fromkeys(self.metrics, 0.0)
        for number in range(batches):
            rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
            pairs = {"image_features": images.image_features[rows], "text_features": texts[first[rows]]}
            features = {name: value.to(encoder.device) for name, value in (pairs | scalars).items()}
            values = self.loss(features)
            for name in sums:
                sums[name] += float(values[name])
        return {**{name: value / batches for name, value in sums.items()}, **images.skipped}


def _of_pairs(term: nn.Module) -> bool:
    """Whether a term reads nothing but a batch of pairs and has no weights, which an evaluation does not have."""
    return set(WeightedSum({"term": term}).inputs) <= _KNOWN and not any(True for _ in term.parameters())
