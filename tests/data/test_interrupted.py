"""SIGKILL at random moments, then resume: the same keys and the same bits as a run that nobody touched."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
import torch

from tests.processes import Started, fork, wait_until

PROGRAM = Path(__file__).with_name("interrupted_run.py")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_tar, sample) -> str:
    folder = tmp_path_factory.mktemp("interrupted")
    for s in range(12):
        write_tar(
            folder / f"{s:02d}.tar",
            [m for i in range(50) for m in sample(f"{s:02d}{i:03d}", i, ["one", "two", "three"])],
        )
    return f"{folder}/*.tar"


def start(folder: Path, shards: str, world_size: int, attempt: int) -> list[Started]:
    return [
        fork(PROGRAM, folder, shards, 3, 2, rank, world_size, folder / f"store{attempt}")
        for rank in range(world_size)
    ]


def finish(started: list[Started]) -> None:
    for process in started:
        process.finished()


def steps_of(folder: Path, world_size: int) -> dict[int, list[str]]:
    """Step -> keys of the global batch; steps done twice must have had the same keys both times."""
    steps: dict[int, list[str]] = {}
    for rank in range(world_size):
        mine: dict[int, list[str]] = {}
        for line in (folder / f"keys-{rank}.jsonl").read_text().splitlines():
            try:
                step, keys = json.loads(line)
            except ValueError:
                continue  # the kill cut this line; the step was done again
            assert mine.setdefault(step, keys) == keys, (
                f"step {step} of rank {rank} had other keys after a resume"
            )
        for step, keys in mine.items():
            steps.setdefault(step, []).extend(keys)
    return steps


@pytest.mark.parametrize(
    "world_size, kills",
    [
        (1, 3),
        (2, 3),
        pytest.param(1, 10, marks=pytest.mark.slow),
        pytest.param(2, 10, marks=pytest.mark.slow),
    ],
)
def test_kills_change_neither_keys_nor_weights(tmp_path, shards, world_size, kills):
    quiet, harassed = tmp_path / "quiet", tmp_path / "harassed"
    quiet.mkdir()
    harassed.mkdir()
    finish(start(quiet, shards, world_size, 0))
    expected = steps_of(quiet, world_size)
    assert len(expected) == 1800 // (10 * world_size)
    rng, log = random.Random(11), harassed / "keys-0.jsonl"
    killed_at = []
    for attempt in range(kills):
        before = log.stat().st_size if log.exists() else 0
        started = start(harassed, shards, world_size, attempt)
        # Wait for something new in the log, then a random moment: kills during start-up alone prove little.
        wait_until(lambda: log.exists() and log.stat().st_size > before, *started)
        time.sleep(rng.random() * 0.02)
        for process in started:
            process.kill()
        killed_at.append(len(log.read_text().splitlines()))
        assert not (harassed / "final-0.pt").exists(), (
            f"finished before the last kill; killed after lines {killed_at}"
        )
    finish(start(harassed, shards, world_size, kills))
    assert steps_of(harassed, world_size) == expected
    for rank in range(world_size):
        one = torch.load(quiet / f"final-{rank}.pt", weights_only=True)
        other = torch.load(harassed / f"final-{rank}.pt", weights_only=True)
        assert torch.equal(one["weight"], other["weight"]) and one["weight"].abs().max() > 0
        assert one["report"] == other["report"]
