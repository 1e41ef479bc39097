"""What each rank of test_faults runs; spawned processes import it, so it is no test file itself."""

from __future__ import annotations

import torch

from clipkit.data import create_stream
from clipkit.distributed import rank, world_size
from clipkit.training.process import StopRequest


def tokenize(texts: list[str]) -> torch.Tensor:
    return torch.zeros(len(texts), 4, dtype=torch.int64)


def run_until_stopped(shards: list[str], batch_size: int) -> tuple[int, str]:
    """The samples that all ranks had read when the data's faults stopped them, and what was said."""
    stream = create_stream(
        {"train": shards},
        tokenizer=tokenize,
        image_size=8,
        batch_size=batch_size,
        seed=0,
        rank=rank(),
        world_size=world_size(),
    )
    stop = StopRequest(faults=stream.faults)
    try:
        for _ in stream:
            assert stop.agree(torch.device("cpu")) is None
    except RuntimeError as error:
        return stream.report()["samples_seen"], str(error)
    raise AssertionError("nothing stopped it")
