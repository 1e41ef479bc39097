"""InfoNCE beside open_clip's ClipLoss on small batches, where the time is that of the operators' number.

    OMP_NUM_THREADS=1 python benchmarks/small_losses.py --out benchmarks/results/2026-11-cpu2-small_losses.md

Value and gradients of both agree first. Then forward and backward of one and the other in turn, in one process,
so that both see the same machine; medians, and the ratio of them. The goal is 1.2 at every size. Under a minute
on a quiet core.
"""

from __future__ import annotations

import argparse
import time

import torch
from harness import header, quantiles, report, table
from open_clip.loss import ClipLoss
from torch.nn import functional as F

from clipkit.losses import InfoNCE

SIZES = (32, 64, 128, 256, 512, 1024)
GOAL = 1.2


def batch(pairs: int, dim: int) -> list[torch.Tensor]:
    """Image and text features, and a scale."""
    generator = torch.Generator().manual_seed(0)
    sides = F.normalize(torch.randn(2, pairs, dim, generator=generator), dim=-1)
    return [*(side.clone().requires_grad_() for side in sides), torch.tensor(14.3, requires_grad=True)]


def step(loss: torch.nn.Module, leaves: list[torch.Tensor]) -> float:
    """Seconds of forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    start = time.perf_counter()
    loss(*leaves).backward()
    return time.perf_counter() - start


def check(ours: torch.nn.Module, theirs: torch.nn.Module, leaves: list[torch.Tensor]) -> None:
    """RuntimeError unless value and gradients agree to fp32's rounding."""
    values = [loss(*leaves) for loss in (ours, theirs)]
    gradients = [torch.autograd.grad(value, leaves) for value in values]
    for mine, other in zip((values[0], *gradients[0]), (values[1], *gradients[1])):
        error = float(((mine - other).norm() / other.norm()).detach())
        if error > 1e-4:
            raise RuntimeError(f"InfoNCE and ClipLoss differ by {error:.1e} at {len(leaves[0])} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each size, about")
    parser.add_argument("--out")
    options = parser.parse_args()
    facts, rows, results = header(torch.device("cpu")), [], {}
    ours, theirs = InfoNCE(), ClipLoss()
    for pairs in SIZES:
        leaves = batch(pairs, options.dim)
        check(ours, theirs, leaves)
        samples: dict[str, list[float]] = {"InfoNCE": [], "ClipLoss": []}
        for _ in range(5):
            step(ours, leaves), step(theirs, leaves)
        ending = time.perf_counter() + options.seconds
        while time.perf_counter() < ending or len(samples["InfoNCE"]) < 10:
            samples["InfoNCE"].append(step(ours, leaves))
            samples["ClipLoss"].append(step(theirs, leaves))
        medians = {name: quantiles(times) for name, times in samples.items()}
        ratio = medians["InfoNCE"][0] / medians["ClipLoss"][0]
        results[str(pairs)] = {"ratio": ratio, **{name: times[0] for name, times in medians.items()}}
        told = {
            name: f"{middle * 1e3:.3f} ({low * 1e3:.3f} to {high * 1e3:.3f})"
            for name, (middle, low, high) in medians.items()
        }
        met = "yes" if ratio <= GOAL else "NO"
        rows.append({"pairs": str(pairs), **told, "ratio": f"{ratio:.2f}", f"at most {GOAL}": met})
    report(
        "InfoNCE on small batches",
        {**facts, "Features": f"fp32, {options.dim} wide"},
        [("Forward and backward, ms: median (20 % to 80 %)", table(rows))],
        results,
        ["CUDA, where `auto` is the Triton kernel"],
        options.out,
    )


if __name__ == "__main__":
    main()
