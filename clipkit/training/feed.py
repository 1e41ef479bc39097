"""What the training loop is fed: image-text batches, sentence batches beside them, on the device and
augmented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from clipkit.data import Augment, SentenceStream, Stream, create_sentences, create_stream
from clipkit.data.teacher import Teacher
from clipkit.distributed import gather_objects, rank, world_size
from clipkit.losses import WeightedSum
from clipkit.towers import ImageTower

Batch = dict[str, Any]


def open_streams(
    data: Mapping[str, Any],
    loss: WeightedSum,
    *,
    tokenizer: Callable[[list[str]], torch.Tensor],
    image_tower: ImageTower,
    batch_size: int,
    seed: int,
) -> tuple[Stream, SentenceStream | None]:
    """This rank's share of the image-text pairs, and of the NLI sentences that a loss asks for beside them.

    Args:
        data: the data settings; `sentences` is {"triplets": file, "pairs": file, "batch_size": over all ranks}.
        loss: its terms say what they read.
        image_tower: says how large its pictures are, and how they are made.
        batch_size: pairs a step, over all ranks.

    Raises:
        ValueError: a batch that does not divide over the ranks, ranks that see other shards, a loss that learns from a
            file that is not given, or see `check_pairs`.
    """
    check_pairs(data, loss)
    inputs = loss.inputs
    share = {"tokenizer": tokenizer, "seed": seed, "rank": rank(), "world_size": world_size()}
    stream = create_stream(
        data,
        image_size=image_tower.image_size if image_tower.encodes else None,
        resize_mode=image_tower.resize_mode,
        interpolation=image_tower.interpolation,
        num_workers=data["num_workers"],
        batch_size=split(batch_size, world_size(), "batch_size"),
        teacher_sides=[side for side in ("image", "text") if f"dist_{side}_features" in inputs],
        **share,
    )
    agree(stream)
    _check_teacher(stream.teacher, inputs)
    needed = {"triplets": "premise_features" in inputs, "pairs": "pair_premise_features" in inputs}
    given = data["sentences"] or {}
    files = {name: given.get(name) for name in needed if needed[name]}
    for name, file in files.items():
        if not file:
            raise ValueError(
                f"this loss learns from NLI {name}: give data.sentences.{name}=FILE (jsonl, csv, tsv or parquet), or leave "
                "it out"
            )
    if not files:
        return stream, None
    rows = split(given["batch_size"], world_size(), "data.sentences.batch_size")
    return stream, create_sentences(files, batch_size=rows, **share)


def check_pairs(data: Mapping[str, Any], loss: WeightedSum) -> None:
    """ValueError where the data knows of its pairs what no loss reads, or a loss needs what the data does not give.

    Args:
        data: the completed data settings.
        loss: its terms say what they read.
    """
    terms = {name: _reads(term) for name, term in loss.terms.items()}
    with_ids = [name for name, reads in terms.items() if "pair_ids" in reads]
    if data["pair_ids"] and not with_ids:
        raise ValueError(
            f"data.pair_ids={data['pair_ids']}, but no term of the loss ({', '.join(terms)}) reads ids: leave it out, "
            "or train with one that does, such as infonce or sigmoid"
        )
    several = data["captions_per_image"] > 1
    for name, term in loss.terms.items():
        if not data["pair_ids"] and not several and _needs_ids(term):
            raise ValueError(
                f"loss.{name} is told what pairs that share an id are to each other, but the data gives no ids: set "
                "data.pair_ids (caption, key, or json:FIELD), or leave loss."
                f"{name}.same_ids at its default"
            )
        pairs = {"image_features", "text_features"} & terms[name]
        contrasts = "image_features" in pairs and not getattr(term, "without_negatives", False)
        if several and contrasts and name not in with_ids:
            raise ValueError(
                f"data.captions_per_image={data['captions_per_image']}: captions of one picture would be each other's "
                f"negatives in {name}, which reads no ids. Set it to 1 (data.captions=random draws one a step), or "
                "train with infonce, sigmoid or cyclic"
            )
    taught = [name for name, reads in terms.items() if any(one.startswith("dist_") for one in reads)]
    if data["teacher"] and not taught:
        raise ValueError(
            f"data.teacher={data['teacher']}, but no term of the loss ({', '.join(terms)}) has a teacher: leave it out, or "
            "train with one that has, such as distill_features"
        )
    if taught and not data["teacher"]:
        raise ValueError(
            f"{', '.join(taught)} learns from a teacher: write its features with `clipkit-predict teacher` and set "
            "data.teacher to their folder"
        )
    with_negatives = [name for name, reads in terms.items() if "hard_negative_features" in reads]
    if data["hard_negatives"] and not with_negatives:
        raise ValueError(
            f"data.hard_negatives={data['hard_negatives']}, but no term of the loss ({', '.join(terms)}) reads hard "
            "negatives: leave it out"
        )
    if not data["hard_negatives"] and "hard_negative_features" in loss.inputs:
        raise ValueError(
            "this loss learns from hard negatives: set data.hard_negatives to the field of KEY.json that holds them"
        )


def _check_teacher(teacher: Teacher | None, inputs: Sequence[str]) -> None:
    if "dist_logit_scale" in inputs and teacher is not None and teacher.logit_scale is None:
        raise ValueError(
            f"distill compares similarities at the teacher's temperature, and that of {teacher.folder} has none: it is no "
            "CLIP model. Train with distill_features, distill_relations or distill_contrastive"
        )


def _reads(term: Any) -> set[str]:
    return {*term.inputs, *getattr(term, "optional_inputs", ())}


def _needs_ids(term: torch.nn.Module) -> bool:
    """Whether a term, or one inside of it, is set to something that means nothing without ids."""
    return "pair_ids" in getattr(term, "inputs", ()) or any(
        getattr(part, "same_ids", "positive") != "positive" for part in term.modules()
    )


def agree(stream: Stream) -> None:
    """ValueError where the ranks' shards differ, or their counts: each would read in another order."""
    said = gather_objects((stream.fingerprint(), stream.describe()))
    if len({fingerprint for fingerprint, _ in said}) > 1:
        seen: dict[str, str] = {}
        for number, (fingerprint, what) in enumerate(said):
            seen.setdefault(fingerprint, f"rank {number}: {what}")
        raise ValueError(
            f"the ranks see other shards, or count them differently ({'; '.join(seen.values())}): give every node the same "
            "data.train, and the same counts by `clipkit-data index --sizes` and a sizes.json beside the shards"
        )


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
    if "image" not in batch:
        return batch
    views = {
        f"image_view{n}": augment(batch["image"], draw=draw, view=n)
        for n in (1, 2)
        if f"image_features_view{n}" in wanted
    }
    return {**batch, **views, "image": augment(batch["image"], draw=draw)}
