"""One rank of a run that reads shards from a server: the program of test_nodes.py and benchmarks/shards.py.

    python remote_run.py SHARDS FOLDER RANK WORLD_SIZE RENDEZVOUS SPEC

SPEC is JSON: the data settings, and `run` {"batch_size", "epochs", "workers", "seconds": of pretended work a step}. The
keys of each step, and at the end how long it waited for batches, go to FOLDER/RANK.jsonl.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from clipkit.data import create_stream


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.tensor([list(text.encode()[:8].ljust(8)) for text in texts], dtype=torch.int64)


def main(shards: str, folder: Path, rank: int, world_size: int, rendezvous: str, spec: dict) -> None:
    torch.set_num_threads(1)
    began = time.monotonic()
    run = spec.pop("run")
    store = torch.distributed.FileStore(rendezvous, world_size)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=300)
    )
    stream = create_stream(
        {"train": shards, **spec},
        tokenizer=tokenize,
        image_size=8,
        batch_size=run["batch_size"],
        seed=3,
        rank=rank,
        world_size=world_size,
        num_workers=run["workers"],
        epochs=run["epochs"],
    )
    waited, first, asked = 0.0, None, time.monotonic()
    with open(folder / f"{rank}.jsonl", "w") as log:
        for batch in stream:
            now = time.monotonic()
            first = first or now - began
            waited += now - asked if stream.state_dict()["position"] > stream.global_batch_size else 0.0
            log.write(json.dumps({"keys": batch["key"]}) + "\n")
            time.sleep(run["seconds"])
            # As in training, no rank is a step ahead.
            torch.distributed.all_reduce(torch.zeros(1))
            asked = time.monotonic()
        seconds = time.monotonic() - began - (first or 0.0)
        log.write(json.dumps({"first": first, "waited": waited, "seconds": seconds}) + "\n")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    shards, folder, rank, world_size, rendezvous, spec = sys.argv[1:]
    main(shards, Path(folder), int(rank), int(world_size), rendezvous, json.loads(spec))
