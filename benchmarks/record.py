"""What telling costs: `Record.step` on steps that are logged and on those that are not, a session's git record, the count.

    python benchmarks/record.py
    python benchmarks/record.py --steps 100000

Half a minute. Times are of this process alone, medians with the 20th and 80th percentiles. A step that is not logged is to
cost microseconds; one that is logged costs what its loggers and the look at this machine's processes do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import quantiles

from clipkit.training.record import Record
from clipkit.training.sessions import begin_session
from clipkit.training.speed import Speed, step_flops

NUMBERS = {"loss": 1.0, "infonce": 1.0, "cyclic": 0.5, "grad_norm": 2.0}
MODEL = {
    "embed_dim": 128,
    "image_tower": {"name": "timm", "model": "resnet50", "pretrained": False, "image_size": 224},
    "text_tower": {"name": "transformer", "width": 512, "layers": 12, "heads": 8},
    "loss": {"infonce": {}},
    "data": {"sentences": None},
    "batch_size": 256,
}


def steps(folder: Path, loggers: dict[str, Any], *, every: int, count: int) -> list[float]:
    """Seconds of each call."""
    record = Record(
        folder, total_steps=10**9, log_every=every, speed=Speed(256), loggers=loggers, loss_spike=3.0
    )
    scale, found = torch.tensor(14.0), []
    with contextlib.redirect_stdout(io.StringIO()):
        record.start(0)
        for step in range(1, count + 1):
            with record.waiting():
                pass
            began = time.perf_counter()
            record.step(step, NUMBERS, lr=1e-3, logit_scale=scale, keys=[])
            found.append(time.perf_counter() - began)
        record.close()
    return found


def repeated(call: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Time what a run tells of itself.")
    parser.add_argument("--steps", type=int, default=20_000, help="steps that are not logged")
    given = parser.parse_args()
    tokenizer = SimpleNamespace(vocab_size=49_408, context_length=77, pad_id=0, sot_id=49_406, eot_id=49_407)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found["step, not logged"] = steps(folder, {}, every=10**9, count=given.steps)
        found["step, logged to metrics.jsonl"] = steps(folder, {}, every=1, count=300)
        found["step, logged to TensorBoard too"] = steps(folder, {"tensorboard": {}}, every=1, count=300)
        found["session, git asked"] = repeated(lambda: begin_session(folder, 0, say=print), 10)
    found["operations of RN50 counted"] = repeated(lambda: step_flops(MODEL, tokenizer), 3)
    table = {name: quantiles(samples) for name, samples in found.items()}
    for name, (median, low, high) in table.items():
        print(f"{name:<34}{median * 1e3:>12.4f} ms  ({low * 1e3:.4f} to {high * 1e3:.4f})")
    print(
        json.dumps(
            {
                name: {"median_s": median, "p20": low, "p80": high}
                for name, (median, low, high) in table.items()
            }
        )
    )


if __name__ == "__main__":
    main()
