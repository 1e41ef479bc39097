"""Gradient errors of InfoNCE against float64, by what a run's precision makes of its products of similarities.

    python benchmarks/precision.py --out benchmarks/results/2026-11-cpu2-precision.md       # minutes

Features are fp32 and of unit norm, as the model hands them on in any run. Compared are the Triton kernels with
half operands (bf16, fp16 and pure_bf16 runs) and with split ones (fp32 and tf32 runs), and the loss as it is
usually written, with the whole matrix: in fp32, with operands rounded to TF32, and under bf16 autocast. The last
column is float64 on features rounded to bf16: what a bf16 tower's own last rounding does to the gradient.

On a machine without a GPU the kernels run in Triton's interpreter: the same operations in the same order, with
exp2 flushed as the chip flushes it; products accumulate as NumPy's do, which is more exact than tensor cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import header, report, table
from torch import Tensor

from clipkit.losses import InfoNCE

TITLE = "Gradient errors of InfoNCE by precision"
# The gap's direction matters to half operands: a coordinate that is the same in every row is rounded the same way in
# every row, which moves all negatives but not the positives, whose products are taken in fp32.
STATES = ("early", "converged", "1 % wrong pairs", "gap 0.8", "gap 0.8 along one coordinate")
SCALES = (14.0, 100.0)
# Cosine of partners once they are learnt: what makes the loss small at that scale.
LEARNT = {14.0: 0.95, 100.0: 0.35}
# The interpreter's only capability; tiles as on an H100.
_INTERPRETED = [
    {"kind": kind, "capability": [0, 0], "max_dim": 10**6, "config": {"descriptors": False, "outer": 8448}}
    for kind in ("lse_sums", "lse_coef", "softplus_sums", "softplus_coef")
]


def features(state: str, scale: float, pairs: int, dim: int) -> list[Tensor]:
    """Image and text features, (N, D) each, fp32 and of unit norm."""
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn(pairs, dim, generator=draw, dtype=torch.float64) for _ in range(2)]
    x = F.normalize(noise[0], dim=1)
    across = F.normalize(noise[1] - (noise[1] * x).sum(1, keepdim=True) * x, dim=1)
    cosine = 0.0 if state == "early" else LEARNT[scale]
    y = cosine * x + math.sqrt(1 - cosine**2) * across
    if state == "1 % wrong pairs":
        wrong = torch.arange(max(2, pairs // 100))
        y[wrong] = y[wrong.roll(1)]
    if "gap" in state:
        towards = 0.4
        axis = torch.eye(1, dim, dtype=torch.float64)[0]
        if "coordinate" not in state:
            axis = F.normalize(torch.randn(dim, generator=draw, dtype=torch.float64), dim=0)
        x, y = (F.normalize(side - (side @ axis)[:, None] * axis, dim=1) for side in (x, y))
        x, y = (math.sqrt(1 - towards**2) * side for side in (x, y))
        x, y = x + towards * axis, y - towards * axis
    return [x.float(), y.float()]


def dense(x: Tensor, y: Tensor, scale: Tensor, product: Callable = torch.matmul) -> Tensor:
    """CLIP's figure 3, as it is written."""
    logits, labels = scale * product(x, y.T), torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def under_autocast(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return dense(x, y, scale)


class Tf32Product(torch.autograd.Function):
    """a @ b of operands rounded to TF32's ten bits, and so backward."""

    @staticmethod
    def round(x: Tensor) -> Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return Tf32Product.round(a.contiguous()) @ Tf32Product.round(b.contiguous())

    @staticmethod
    def backward(ctx, grad):
        a, b = (Tf32Product.round(value.contiguous()) for value in ctx.saved_tensors)
        grad = Tf32Product.round(grad.contiguous())
        return grad @ b.T, a.T @ grad


CANDIDATES: dict[str, Callable] = {
    "kernels, split (fp32, tf32 runs)": InfoNCE(group=None, impl="triton", precision="high"),
    "kernels, half (bf16, fp16 runs)": InfoNCE(group=None, impl="triton", precision="half"),
    "dense fp32": dense,
    "dense TF32": lambda x, y, scale: dense(x, y, scale, Tf32Product.apply),
    "dense bf16 autocast": under_autocast,
    "float64 of features in bf16": lambda x, y, scale: dense(
        x.bfloat16().double(), y.bfloat16().double(), scale
    ),
}


def gradients(loss: Callable, given: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [value.detach().requires_grad_() for value in given]
    value = loss(*leaves)
    return value.detach(), [grad.double() for grad in torch.autograd.grad(value, leaves)]


def measure(pairs: int, dim: int, device: str) -> dict[str, dict]:
    """{"state, scale": {"loss": .., candidate: {"features": error of dx and dy, "scale": that of dscale}}}"""
    results: dict[str, dict] = {}
    for scale in SCALES:
        for state in STATES:
            given = [value.to(device) for value in (*features(state, scale, pairs, dim), torch.tensor(scale))]
            exact, (dx, dy, dscale) = gradients(
                InfoNCE(group=None, impl="dense"), [v.double() for v in given]
            )
            case: dict = {"loss": float(exact)}
            for name, loss in CANDIDATES.items():
                _, (of_x, of_y, of_scale) = gradients(loss, given)
                whole = torch.cat([dx, dy])
                case[name] = {
                    "features": float((torch.cat([of_x, of_y]) - whole).norm() / whole.norm()),
                    "scale": float((of_scale - dscale).abs() / dscale.abs()),
                }
            results[f"{state}, scale {scale:g}"] = case
    return results


def interpreted(arguments: list[str]) -> dict[str, dict]:
    """`measure` in a process whose kernels are interpreted, which is decided when they are imported."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "tiles.json"
        config.write_text(json.dumps(_INTERPRETED))
        environment = os.environ | {"TRITON_INTERPRET": "1", "CLIPKIT_KERNEL_CONFIGS": str(config)}
        command = [sys.executable, "-W", "ignore", __file__, *arguments, "--child"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("the interpreted half failed; its message stands above")
    return json.loads(done.stdout.splitlines()[-1])


def flush_as_the_chip() -> None:
    """exp2 of the interpreter as ex2.approx.ftz: what lies under 2^-126 is 0."""
    import numpy as np
    from triton.runtime import interpreter

    def exp2(values):
        found = np.exp2(values)
        return np.where(found < 2.0**-126, np.float32(0), found)

    interpreter.InterpreterBuilder.create_exp2 = lambda self, arg: self.unary_op(arg, exp2)


def rows(results: dict[str, dict], of: str) -> str:
    return table(
        [
            {"features": name, "loss": f"{case['loss']:.1e}"}
            | {candidate: f"{case[candidate][of]:.1e}" for candidate in CANDIDATES}
            for name, case in results.items()
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="result file to write")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        flush_as_the_chip()
        print(json.dumps(measure(given.pairs, given.dim, "cpu")))
        return
    facts = header(torch.device(given.device))
    facts["Size"] = f"{given.pairs} pairs of {given.dim} dimensions"
    if given.device == "cpu":
        results = interpreted(["--pairs", str(given.pairs), "--dim", str(given.dim)])
        skipped = ["Tensor cores: the kernels ran in Triton's interpreter, bf16 and TF32 on the CPU."]
    else:
        results, skipped = measure(given.pairs, given.dim, given.device), []
    sections = [
        ("||error|| / ||gradient|| of the features", rows(results, "features")),
        ("|error| / |gradient| of the scale", rows(results, "scale")),
    ]
    report(TITLE, facts, sections, results, skipped, given.out)


if __name__ == "__main__":
    main()
