"""Starting recipes, alone and as ranks, and reading what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.processes import ROOT, Started, command, fork, fork_ranks

SMALL = [
    "data.shapes.train=600",
    "data.shapes.val=40",
    "batch_size=32",
    "warmup_steps=2",
    "log_every=1",
    "num_threads=1",
]


def start(*overrides: str, recipe: str = "pretrain.py", env: dict[str, str] | None = None) -> Started:
    return fork(ROOT / "recipes" / recipe, *overrides, env=env)


def run(
    *overrides: str, status: int = 0, recipe: str = "pretrain.py", env: dict[str, str] | None = None
) -> str:
    return start(*overrides, recipe=recipe, env=env).finished(status)


def typed(*overrides: str, recipe: str = "pretrain.py", status: int = 0, **given) -> str:
    """As a user types it: a fresh python that imports everything itself."""
    return command(ROOT / "recipes" / recipe, *overrides, **given).finished(status)


def torchrun(*overrides: str) -> Started:
    """Two ranks, as a user starts them."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return command(*launcher, ROOT / "recipes" / "pretrain.py", *overrides, env={"OMP_NUM_THREADS": "1"})


def ranks(*overrides: str, world_size: int = 2) -> list[Started]:
    return fork_ranks(world_size, ROOT / "recipes" / "pretrain.py", *overrides)


def run_ranks(*overrides: str, world_size: int = 2) -> str:
    """What all ranks printed, once they have all finished."""
    return "".join([rank.finished() for rank in ranks(*overrides, world_size=world_size)])


def kill(started: list[Started]) -> None:
    """All of a job's ranks, as when the machine goes down."""
    for rank in started:
        rank.kill()


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from clipkit.checkpoint import latest_checkpoint, load_checkpoint

    return load_checkpoint(latest_checkpoint(folder / "checkpoints"))["weights"]


def only_run(folder: Path) -> Path:
    (config,) = folder.rglob("config.yaml")
    return config.parent
