"""Starting recipes as a user would, and reading what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "data.shapes.train=600",
    "data.shapes.val=40",
    "batch_size=32",
    "optim.warmup_steps=2",
    "log_every=1",
    "num_threads=1",
]


def start(
    *overrides: str, recipe: str = "pretrain.py", env: dict[str, str] | None = None
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / recipe), *overrides],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(env or {})},
        start_new_session=True,
    )


def run(
    *overrides: str, status: int = 0, recipe: str = "pretrain.py", env: dict[str, str] | None = None
) -> str:
    process = start(*overrides, recipe=recipe, env=env)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from clipkit.checkpoint import latest_checkpoint, load_checkpoint

    return load_checkpoint(latest_checkpoint(folder / "checkpoints"))["weights"]


def only_run(folder: Path) -> Path:
    (config,) = folder.rglob("config.yaml")
    return config.parent
