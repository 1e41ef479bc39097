"""A memory of past batches whose features are further negatives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks
from clipkit.losses.checks import check_number, check_width, meet
from clipkit.losses.compose import build
from clipkit.losses.registry import register_loss

_HARD = ("hard_negative_features", "hard_negative_image_features")


@register_loss("queue")
class MemoryQueue(nn.Module):
    """A pair loss whose rows also meet the features of the last `size` pairs, which get no gradient.

        L = loss(x, y, ..., hard negatives = the queue's texts for images, its images for texts)

    Wang et al. 2020, "Cross-Batch Memory for Embedding Learning" (a tower's features change slowly,
    so that yesterday's are good negatives); He et al. 2020, "Momentum Contrast for Unsupervised Visual
    Representation Learning", section 3.2, whose queue holds features of a momentum encoder: give those as the
    features to have it. Random unit vectors fill the queue before the first pairs, as in MoCo's code. In
    training mode a batch of the whole group joins after its loss and the oldest leave (one that is not finite does
    not); the queue is equal on
    all ranks, is not gathered, and is saved in the state dict. `pair_ids` and `content_features` tell nothing
    of what is in it. Under DistributedDataParallel pass broadcast_buffers=False: the ranks agree already.

    Args:
        loss: name of the inner loss, one that takes hard negatives of the group.
        size: pairs to remember, at least 1.
        embed_dim: D.
        settings: keyword arguments of the inner loss.
        group: passed to the inner loss.

    Siblings: `fastclip`, which remembers denominators in place of features.
    """

    __call__: Callable[..., Tensor]
    images: Tensor
    texts: Tensor

    def __init__(
        self,
        *,
        loss: str = "infonce",
        size: int = 4096,
        embed_dim: int,
        settings: Mapping[str, Any] | None = None,
        group: Group | str = "auto",
    ):
        super().__init__()
        self.size = int(check_number("size", size, 1))
        self.embed_dim = int(check_number("embed_dim", embed_dim, 1))
        self.loss: Any = build(loss, settings or {}, group=group)
        optional = tuple(getattr(self.loss, "optional_inputs", ()))
        if not set(_HARD) <= set(optional) or getattr(self.loss, "hard_negatives", None) != "group":
            raise ValueError(
                f"queue's inner loss {loss!r} does not meet the group's hard negatives: use infonce, sigmoid or "
                'infoloob, with hard_negatives="group"'
            )
        self.inputs = tuple(self.loss.inputs)
        self.optional_inputs = tuple(name for name in optional if name not in _HARD)
        self.supplied_by = getattr(self.loss, "supplied_by", {})
        self.group = self.loss.group
        generator = torch.Generator().manual_seed(0)
        for name in ("images", "texts"):
            vectors = torch.randn(self.size, self.embed_dim, generator=generator)
            self.register_buffer(name, nn.functional.normalize(vectors, dim=-1))

    def check(self, **features: Any) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        self.loss.check(**features)
        check_width("queue", self.embed_dim, features["image_features"])

    def forward(self, *, ranks: Ranks | None = None, **features: Any) -> Tensor:
        """The group's loss, (); in training mode its pairs join the queue.

        Args:
            features: the inner loss's inputs, as keywords.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: features of another width, or what the inner loss refuses.
        """
        ranks = meet(self, ranks, **features)
        images, texts = ranks.wide(self.images), ranks.wide(self.texts)
        # Every rank has the whole queue: it is its own gathered rows.
        remembered = ranks.deriving([(images, lambda: images), (texts, lambda: texts)])
        value = self.loss(
            **features,
            hard_negative_features=texts,
            hard_negative_image_features=images,
            ranks=remembered,
        )
        if self.training:
            # New tensors: the backward pass still needs the old.
            new_images = ranks.gather(ranks.wide(features["image_features"])).detach()
            new_texts = ranks.gather(ranks.wide(features["text_features"])).detach()
            # A batch that is not finite would stay, in every loss, until the last of it has left.
            joins = new_images.isfinite().all() & new_texts.isfinite().all()
            self.images = self._after(self.images, new_images, joins)
            self.texts = self._after(self.texts, new_texts, joins)
        return value

    def _after(self, queue: Tensor, new: Tensor, joins: Tensor) -> Tensor:
        after = torch.cat([queue, new.to(queue.dtype)])[-self.size :]
        return torch.where(joins, after, queue)
