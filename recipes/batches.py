"""What the training loop is fed: image-text batches, sentence batches beside them, on the device and
augmented.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def sentence_stream(
    config: dict[str, Any], inputs: tuple[str, ...], tokenizer: Any, share: dict[str, int]
) -> Any:
    """The second stream, of NLI sentences, when a loss asks for it; None otherwise."""
    from clipkit.data import create_sentences

    needed = {"triplets": "premise_features" in inputs, "pairs": "pair_premise_features" in inputs}
    if not any(needed.values()):
        return None
    given = config["data"]["sentences"] or {}
    for name in (name for name in needed if needed[name]):
        if not given.get(name):
            raise ValueError(
                f"this loss learns from NLI {name}: give data.sentences.{name}=FILE (jsonl or csv), or leave it out"
            )
    return create_sentences(
        {name: given[name] for name in needed if needed[name]},
        tokenizer=tokenizer,
        batch_size=split(given["batch_size"], share["world_size"], "data.sentences.batch_size"),
        **share,
    )


def split(batch_size: int, world_size: int, name: str) -> int:
    """A rank's share of a global batch."""
    if batch_size < world_size or batch_size % world_size:
        raise ValueError(
            f"{name}={batch_size} does not divide evenly over {world_size} ranks: give a multiple of {world_size}"
        )
    return batch_size // world_size


def total_steps(config: dict[str, Any], batches_per_epoch: int) -> int:
    """The run's optimizer steps from `steps` or `epochs`, exactly one of which is given."""
    if (config["steps"] is None) == (config["epochs"] is None):
        raise ValueError(
            f"steps={config['steps']} and epochs={config['epochs']}: give exactly one of the two"
        )
    total = config["steps"] if config["steps"] is not None else config["epochs"] * batches_per_epoch
    if total < 1:
        raise ValueError(
            f"{total} steps to train: steps={config['steps']}, epochs={config['epochs']} with {batches_per_epoch} "
            f"batches an epoch; give more data or a batch_size smaller than {config['batch_size']}"
        )
    return total


def joined(stream: Any, sentences: Any) -> Iterator[dict[str, Any]]:
    """Image-text batches, each with the next sentence batch's entries beside its own."""
    second = iter(sentences) if sentences else None
    for batch in stream:
        yield {**batch, **next(second)} if second else batch


def augmented(batch: dict[str, Any], augment: Any, wanted: tuple[str, ...], draw: int) -> dict[str, Any]:
    """The batch with its images augmented on the device, and the extra views that a loss asks for."""
    views = {
        f"image_view{n}": augment(batch["image"], draw=draw, view=n)
        for n in (1, 2)
        if f"image_features_view{n}" in wanted
    }
    return {**batch, **views, "image": augment(batch["image"], draw=draw)}


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """Tensors moved; keys and the like stay."""
    import torch

    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()
    }
