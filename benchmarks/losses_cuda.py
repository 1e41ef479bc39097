"""The CUDA half of benchmarks/losses.py: every candidate at the sizes of the kernel goals, in one process.

Fractions are of the rate that cuBLAS reaches here on an 8192^3 float16 product, counting useful operations: 2
N^2 D forward, 6 N^2 D backward (the logits again, and two products with the coefficients), 8 N^2 D both.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import PeakMemory, quantiles, table, time_loss
from losses import features, open_clip_loss, ours, parity
from torch import Tensor

from clipkit.losses import CyclicGeometry

# (loss, N, D, repeats, goal in ms for forward and backward)
SIZES = (
    ("infonce", 32768, 512, 15, 7.5),
    ("infonce", 65536, 768, 7, 45.0),
    ("infonce", 131072, 512, 5, 121.0),
    ("infonce", 1 << 20, 512, 1, 7700.0),
    ("sigmoid", 65536, 768, 7, 33.0),
    ("cyclic", 32768, 512, 15, 1.0),
)


def cublas_rate(size: int = 8192, repeats: int = 20) -> float:
    """Operations a second of a float16 product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    out = torch.empty_like(a)
    times = []
    for _ in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.mm(a, b, out=out)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * size**3 / quantiles(times[5:])[0]


def under_autocast(loss: Callable, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return loss(x, y, scale)


def checkpointed(x: Tensor, y: Tensor, scale: Tensor, chunk: int = 2048) -> Tensor:
    """The usual remedy: rows in chunks, each recomputed in the backward pass; both directions."""
    from torch.utils.checkpoint import checkpoint

    def part(rows: Tensor, columns: Tensor, scale: Tensor, first: int) -> Tensor:
        labels = torch.arange(first, first + len(rows), device=rows.device)
        return F.cross_entropy(scale * rows @ columns.T, labels, reduction="sum")

    total = 0.0
    for rows, columns in ((x, y), (y, x)):
        for first in range(0, len(rows), chunk):
            total = total + checkpoint(
                part, rows[first : first + chunk], columns, scale, first, use_reentrant=False
            )
    return total / (2 * len(x))


def _inf_cl() -> Callable:
    from inf_cl import cal_flash_loss

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        one, other = cal_flash_loss(x, y, scale=scale), cal_flash_loss(y, x, scale=scale)
        return (one.mean() + other.mean()) / 2

    return loss


def _memeff() -> Callable:
    from memeff import MemoryEfficientCLIPLoss

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        # Its temperature is a float: read here once a call, as its users must.
        return MemoryEfficientCLIPLoss(temperature=1 / scale.item(), normalized_inputs=True, stable=False)(
            x, y
        )

    return loss


def _siglip_kernel() -> Callable:
    from siglip_kernel import fused_siglip_loss

    return lambda x, y, scale: fused_siglip_loss(x, y, scale.log(), torch.tensor(-10.0, device=x.device))


# name -> (maker, dtype of the features, tolerance of the gate, largest N it is tried at)
INFONCE = {
    "clipkit InfoNCE, float16": (partial(ours, "infonce", "triton"), torch.float16, 2e-3, 1 << 20),
    "clipkit InfoNCE, bfloat16": (partial(ours, "infonce", "triton"), torch.bfloat16, 1e-2, 131072),
    "clipkit InfoNCE, float32 (high)": (partial(ours, "infonce", "triton"), torch.float32, 2e-5, 65536),
    "open_clip ClipLoss, autocast": (
        lambda: partial(under_autocast, open_clip_loss()),
        torch.float32,
        5e-2,
        65536,
    ),
    "open_clip ClipLoss, autocast, compiled": (
        lambda: torch.compile(partial(under_autocast, open_clip_loss())),
        torch.float32,
        5e-2,
        65536,
    ),
    "ClipLoss, chunked and checkpointed": (
        lambda: partial(under_autocast, checkpointed),
        torch.float32,
        5e-2,
        131072,
    ),
    "inf-cl": (_inf_cl, torch.float16, 5e-2, 131072),
    "memeff": (_memeff, torch.float16, 5e-2, 131072),
}
SIGMOID = {
    "clipkit sigmoid, float16": (partial(ours, "sigmoid", "triton"), torch.float16, 2e-3, 1 << 20),
    "siglip-kernel, sigmoid": (_siglip_kernel, torch.bfloat16, 5e-2, 131072),
}
CYCLIC = {
    "clipkit cyclic, closed form": (
        lambda: lambda x, y, scale: CyclicGeometry(group=None)(x, y),
        torch.float32,
        1e-4,
        1 << 20,
    ),
}
CANDIDATES = {"infonce": INFONCE, "sigmoid": SIGMOID, "cyclic": CYCLIC}


def gate() -> tuple[dict[str, Callable], list[str]]:
    """Candidates that import and agree with the definition; ours must, or the run stops."""
    usable, skipped = {}, []
    for group in CANDIDATES.values():
        for name, (make, dtype, tolerance, _) in group.items():
            try:
                loss = make()
                problem = parity(name, loss, "cuda", dtype, tolerance)
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if not problem:
                usable[name] = loss
            elif name.startswith("clipkit"):
                raise SystemExit(f"parity: {name}: {problem}")
            else:
                skipped.append(f"{name}: {problem}")
    return usable, skipped


def measure(loss: Callable, pairs: int, dim: int, dtype: torch.dtype, repeats: int) -> dict:
    leaves = features(pairs, dim, "cuda", dtype)
    memory = PeakMemory(leaves[0].device)
    samples = time_loss(lambda: loss(*leaves), leaves, repeats=repeats, warm_up=min(3, repeats))
    return samples | {"peak": memory.bytes()}


def row(
    name: str, pairs: int, dim: int, result: dict, rate: float, goal: float | None, eager: dict | None
) -> dict[str, str]:
    forward, backward, both = (quantiles(result[key]) for key in ("forward", "backward", "both"))
    share = lambda flops, seconds: f"{flops * pairs**2 * dim / seconds / rate:.0%}"
    milliseconds = lambda q: "{:.2f} ({:.2f}-{:.2f})".format(*(1e3 * value for value in q))
    counted = "cyclic" not in name
    against = ""
    if eager:
        faster, smaller = quantiles(eager["both"])[0] / both[0], eager["peak"] / result["peak"]
        against = f"x{faster:.1f}, memory x{smaller:.1f}"
    return {
        "loss": name,
        "N": str(pairs),
        "D": str(dim),
        "forward, ms": milliseconds(forward),
        "backward, ms": milliseconds(backward),
        "both, ms": milliseconds(both),
        "of cuBLAS, forward": share(2, forward[0]) if counted else "",
        "backward": share(6, backward[0]) if counted else "",
        "both": share(8, both[0]) if counted else "",
        "peak, MB": f"{result['peak'] / 1e6:.0f}",
        "goal, ms": f"{goal:g}" if goal else "",
        "eager open_clip over this": against,
    }


def run_cuda(minutes: float) -> tuple[list, dict, list[str]]:
    started = time.monotonic()
    usable, skipped = gate()
    rate = cublas_rate()
    rows, results = [], {"cublas": rate}
    for kind, pairs, dim, repeats, goal in SIZES:
        measured: dict[str, dict] = {}
        for name, (_, dtype, _, largest) in CANDIDATES[kind].items():
            if name not in usable:
                continue
            if pairs > largest:
                skipped.append(f"{name} at N = {pairs}: tried up to {largest} only")
                continue
            if time.monotonic() - started > 60 * minutes:
                skipped.append(f"{name} at N = {pairs}: {minutes} minutes were over")
                continue
            try:
                measured[name] = measure(usable[name], pairs, dim, dtype, repeats)
            except Exception as error:
                torch.cuda.empty_cache()
                skipped.append(f"{name} at N = {pairs}, D = {dim}: {type(error).__name__}")
        eager = measured.get("open_clip ClipLoss, autocast")
        for name, result in measured.items():
            ours_goal = (
                goal
                if name in ("clipkit InfoNCE, float16", "clipkit sigmoid, float16") or kind == "cyclic"
                else None
            )
            rows.append(row(name, pairs, dim, result, rate, ours_goal, eager))
            results[f"{name}, N={pairs}, D={dim}"] = result
    text = f"cuBLAS, float16 8192^3: {rate / 1e12:.0f} TFLOP/s.\n\n" + table(rows)
    seconds = math.ceil(time.monotonic() - started)
    return [("Time and memory", text), ("Length of the run", f"{seconds} s")], results, skipped
