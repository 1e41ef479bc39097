"""What the training loop is fed: image-text batches, sentence batches beside them, on the device and
augmented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from clipkit.data import Augment, SentenceStream, Stream, create_sentences, create_stream
from clipkit.distributed import rank, world_size
from clipkit.towers import ImageTower

Batch = dict[str, Any]


def open_streams(
    data: Mapping[str, Any],
    inputs: Sequence[str],
    *,
    tokenizer: Callable[[list[str]], torch.Tensor],
    image_tower: ImageTower,
    batch_size: int,
    seed: int,
) -> tuple[Stream, SentenceStream | None]:
    """This rank's share of the image-text pairs, and of the NLI sentences that a loss asks for beside them.

    Args:
        data: the data settings; `sentences` is {"triplets": file, "pairs": file, "batch_size": over all ranks}.
        inputs: what the losses read.
        image_tower: says how large its pictures are, and how they are made.
        batch_size: pairs a step, over all ranks.

    Raises:
        ValueError: a batch that does not divide over the ranks, or a loss that learns from a file that is not
            given.
    """
    share = {"tokenizer": tokenizer, "seed": seed, "rank": rank(), "world_size": world_size()}
    stream = create_stream(
        data,
        image_size=image_tower.image_size,
        resize_mode=image_tower.resize_mode,
        interpolation=image_tower.interpolation,
        num_workers=data["num_workers"],
        batch_size=split(batch_size, world_size(), "batch_size"),
        **share,
    )
    needed = {"triplets": "premise_features" in inputs, "pairs": "pair_premise_features" in inputs}
    given = data["sentences"] or {}
    files = {name: given.get(name) for name in needed if needed[name]}
    for name, file in files.items():
        if not file:
            raise ValueError(
                f"this loss learns from NLI {name}: give data.sentences.{name}=FILE (jsonl or csv), or leave "
                "it out"
            )
    if not files:
        return stream, None
    rows = split(given["batch_size"], world_size(), "data.sentences.batch_size")
    return stream, create_sentences(files, batch_size=rows, **share)


def split(batch_size: int, world_size: int, name: str) -> int:
    """A rank's share of a global batch."""
    if batch_size < world_size or batch_size % world_size:
        raise ValueError(
            f"{name}={batch_size} does not divide evenly over {world_size} ranks: give a multiple of {world_size}"
        )
    return batch_size // world_size


def total_steps(steps: int | None, epochs: int | None, *, batch_size: int, batches_per_epoch: int) -> int:
    """The run's optimizer steps from `steps` or `epochs`, exactly one of which is given."""
    if steps is not None and epochs is None:
        total = steps
    elif epochs is not None and steps is None:
        total = epochs * batches_per_epoch
    else:
        raise ValueError(f"steps={steps} and epochs={epochs}: give exactly one of the two")
    if total < 1:
        raise ValueError(
            f"{total} steps to train: steps={steps}, epochs={epochs} with {batches_per_epoch} batches an epoch; "
            f"give more data or a batch_size smaller than {batch_size}"
        )
    return total


def joined(stream: Stream, sentences: SentenceStream | None) -> Iterator[Batch]:
    """Image-text batches, each with the next sentence batch's entries beside its own."""
    second = iter(sentences) if sentences else None
    for batch in stream:
        yield {**batch, **next(second)} if second else batch


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches with their tensors moved; keys and the like stay."""
    for batch in batches:
        yield {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
        }


def augmented(batch: Batch, augment: Augment, wanted: Sequence[str], draw: int) -> Batch:
    """The batch with its images augmented on the device, and the extra views that a loss asks for.

    Args:
        wanted: names of the features that the losses read.
        draw: a number that no other step and rank has: the masks are a function of it and the seed.
    """
    views = {
        f"image_view{n}": augment(batch["image"], draw=draw, view=n)
        for n in (1, 2)
        if f"image_features_view{n}" in wanted
    }
    return {**batch, **views, "image": augment(batch["image"], draw=draw)}
