"""A small training run that can be killed at any moment: the program of test_interrupted.py.

    python interrupted_run.py FOLDER SHARDS EPOCHS WORKERS RANK WORLD_SIZE RENDEZVOUS

It trains a linear model on the stream's batches, writes each step's keys to FOLDER/keys-RANK.jsonl, and every
three steps a checkpoint (weights and data position, written whole, then renamed). Started again it goes on
from the last checkpoint. With two ranks the gradients meet in a gloo all-reduce.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch

from clipkit.data import create_stream


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode()[:8].ljust(8)) for text in texts], dtype=torch.int64)


def main(
    folder: Path, shards: str, epochs: int, workers: int, rank: int, world_size: int, rendezvous: str
) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        store = torch.distributed.FileStore(rendezvous, world_size)
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30)
        )
    stream = create_stream(
        {"train": shards, "captions": "random", "augmentation": {"crop_scale": [0.3, 1.0]}},
        tokenizer=tokenize,
        image_size=8,
        batch_size=10,
        seed=3,
        rank=rank,
        world_size=world_size,
        num_workers=workers,
        epochs=epochs,
    )
    weight = torch.zeros(8, 3 * 8 * 8)
    step = 0
    # One checkpoint for all ranks, so that they go on from the same step.
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        weight, step = saved["weight"], saved["step"]
        stream.load_state_dict(saved["data"])
    with open(folder / f"keys-{rank}.jsonl", "a") as log:
        for batch in stream:
            image = batch["image"].float().flatten(1) / 255
            error = image @ weight.T - batch["text"].float() / 255
            gradient = error.T @ image / len(image)
            if world_size > 1:
                torch.distributed.all_reduce(gradient)
            weight = 0.99 * weight - 0.003 * gradient / world_size
            step += 1
            log.write(json.dumps([step, batch["key"]]) + "\n")
            log.flush()
            if step % 3 == 0 and rank == 0:
                torch.save({"weight": weight, "step": step, "data": stream.state_dict()}, folder / "part.pt")
                os.replace(folder / "part.pt", checkpoint)
    torch.save({"weight": weight, "step": step, "report": stream.report()}, folder / f"final-{rank}.part")
    os.replace(folder / f"final-{rank}.part", folder / f"final-{rank}.pt")
    if world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    folder, shards, *numbers, rendezvous = sys.argv[1:]
    main(Path(folder), shards, *map(int, numbers), rendezvous)
