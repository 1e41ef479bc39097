"""The CUDA half of benchmarks/losses.py: every candidate at the sizes of the kernel goals, in stages.

    parity    errors of every candidate against float64 at scales 10 and 100; who fails at 10 is not timed
    rate      what cuBLAS reaches here on an 8192^3 float16 product
    infonce, sigmoid, cyclic      times and peak memory at the sizes below
    million   InfoNCE of 2^20 pairs
    profile   where the time of InfoNCE and of the sigmoid loss at 32,768 pairs goes, kernel by kernel

Each is a process of its own, so that what breaks the device in one breaks no other, and writes its file
(OUT-STAGE.json) after every candidate; the report is written anew after every stage, from the files there are. What
was not run this time is taken from its file, with the candidates' whole messages where they failed.

Fractions are of the rate that cuBLAS reaches here on an 8192^3 float16 product, counting useful operations: 2
N^2 D forward, 6 N^2 D backward (the logits again, and two products with the coefficients), 8 N^2 D both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import PeakMemory, header, quantiles, report, table, time_loss
from losses import errors, features, open_clip_loss, ours
from torch import Tensor

from clipkit.losses import CyclicGeometry

# stage -> (N, D, repeats, goal in ms for forward and backward)
SIZES = {
    "infonce": ((32768, 512, 15, 7.5), (65536, 768, 7, 45.0), (131072, 512, 5, 121.0)),
    "sigmoid": ((65536, 768, 7, 33.0), (32768, 512, 15, None)),
    "cyclic": ((32768, 512, 15, 1.0),),
    "million": ((1 << 20, 512, 1, 7700.0),),
}
STAGES = ("parity", "rate", *SIZES, "profile")
REHEARSED = (160, 64, 2, None)


def product_rate(device: str, size: int, repeats: int = 20) -> float:
    """Operations a second of a float16 product."""
    a, b = (torch.randn(size, size, device=device).half() for _ in range(2))
    out = torch.empty_like(a)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 5):
        wait()
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / quantiles(times[5:])[0]


def under_autocast(loss: Callable, x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
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
CANDIDATES = {"infonce": INFONCE, "sigmoid": SIGMOID, "cyclic": CYCLIC, "million": INFONCE}


def message(error: BaseException) -> str:
    """Its type and all it says, within reason."""
    return f"{type(error).__name__}: {error}"[:2000]


class Stage:
    """One stage's findings, in its file from the first on."""

    def __init__(self, base: str | None, name: str, device: str):
        self.path = None if base is None else Path(f"{base}-{name}.json")
        self.device, self.found = device, {"results": {}, "skipped": []}
        self.write()

    def write(self) -> None:
        if self.path is not None:
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def add(self, name: str, result: dict) -> None:
        self.found["results"][name] = result
        self.write()

    def skip(self, why: str) -> None:
        self.found["skipped"].append(why)
        print(why, flush=True)
        self.write()

    @property
    def interpreted(self) -> bool:
        return self.device == "cpu"


def check(stage: Stage, name: str, make: Callable, dtype: torch.dtype, tolerance: float) -> Callable | None:
    """The candidate, if its errors at scale 10 are within its tolerance; its numbers are written either way."""
    if stage.interpreted and "compiled" in name:
        stage.skip(f"{name}: not rehearsed")
        return None
    try:
        loss = make()
        given = {"pairs": 96, "dim": 64} if stage.interpreted else {}
        found = {
            scale: errors(name, loss, stage.device, dtype, scale=float(scale), **given) for scale in (10, 100)
        }
    except Exception as error:
        stage.add(f"parity of {name}", {"tolerance": tolerance, "problem": message(error)})
        return None
    beyond = [f"{key} off by {error:.1e}" for key, error in found[10].items() if not abs(error) <= tolerance]
    stage.add(
        f"parity of {name}",
        {"tolerance": tolerance, "problem": ", ".join(beyond)}
        | {f"{key}, scale {scale}": error for scale, of in found.items() for key, error in of.items()},
    )
    return None if beyond else loss


def stage_parity(stage: Stage, until: float) -> None:
    for group in (INFONCE, SIGMOID, CYCLIC):
        for name, (make, dtype, tolerance, _) in group.items():
            check(stage, name, make, dtype, tolerance)


def stage_rate(stage: Stage, until: float) -> None:
    size = 256 if stage.interpreted else 8192
    stage.add("rate", {"size": size, "flops": product_rate(stage.device, size)})


def stage_times(kind: str, stage: Stage, until: float) -> None:
    for name, (make, dtype, tolerance, largest) in CANDIDATES[kind].items():
        loss = None
        for pairs, dim, repeats, _ in [REHEARSED] if stage.interpreted else SIZES[kind]:
            where = f"{name}, N={pairs}, D={dim}"
            if pairs > largest:
                stage.skip(f"{where}: tried up to {largest} only")
                continue
            if time.time() > until:
                stage.skip(f"{where}: the time was over")
                continue
            loss = loss or check(stage, name, make, dtype, tolerance)
            if loss is None:
                stage.skip(f"{where}: failed parity, or its check failed")
                break
            try:
                result = measure(loss, pairs, dim, dtype, repeats, stage.device)
                stage.add(where, {"name": name, "pairs": pairs, "dim": dim, **result})
            except Exception as error:
                stage.skip(f"{where}: {message(error)}")
            if stage.device == "cuda":
                torch.cuda.empty_cache()


def stage_profile(stage: Stage, until: float) -> None:
    """The device's time of one forward and backward, by kernel, and the number of launches."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CPU if stage.interpreted else ProfilerActivity.CUDA
    pairs, dim = REHEARSED[:2] if stage.interpreted else (32768, 512)
    for name in ("infonce", "sigmoid"):
        loss, leaves = ours(name, "triton"), features(pairs, dim, stage.device, torch.float16)
        for _ in range(3):
            loss(*leaves).backward()
        with profile(activities=[activity]) as found:
            loss(*leaves).backward()
            if not stage.interpreted:
                torch.cuda.synchronize()
        key = "self_cpu_time_total" if stage.interpreted else "self_device_time_total"
        events = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
        stage.add(
            f"{name}, N={pairs}, D={dim}",
            {event.key[:100]: {"us": getattr(event, key), "calls": event.count} for event in events[:30]},
        )


def measure(loss: Callable, pairs: int, dim: int, dtype: torch.dtype, repeats: int, device: str) -> dict:
    leaves = features(pairs, dim, device, dtype)
    memory = PeakMemory(leaves[0].device)
    samples = time_loss(lambda: loss(*leaves), leaves, repeats=repeats, warm_up=min(3, repeats))
    return samples | {"peak": max(1, memory.bytes())}


def run_stage(name: str, base: str | None, until: float, device: str) -> None:
    """One stage in this process."""
    runs = {"parity": stage_parity, "rate": stage_rate, "profile": stage_profile}
    stage = Stage(base, name, device)
    runs.get(name, partial(stage_times, name))(stage, until)


def row(
    name: str, pairs: int, dim: int, result: dict, rate: float | None, goal: float | None, eager: dict | None
) -> dict[str, str]:
    forward, backward, both = (quantiles(result[key]) for key in ("forward", "backward", "both"))
    share = lambda flops, seconds: f"{flops * pairs**2 * dim / seconds / rate:.0%}"
    milliseconds = lambda q: "{:.2f} ({:.2f}-{:.2f})".format(*(1e3 * value for value in q))
    counted = "cyclic" not in name and rate is not None
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


def run_stages(title: str, chosen: str | None, minutes: float, out: str | None, *, rehearse: bool) -> None:
    """Each stage in a process of its own, the report after each of them."""
    names = chosen.split(",") if chosen else list(STAGES)
    if wrong := set(names) - set(STAGES):
        raise SystemExit(f"unknown stage {', '.join(sorted(wrong))}: there are {', '.join(STAGES)}")
    if out is None:
        raise SystemExit("give --out FILE.md: the stages write their files beside it")
    device, until = "cpu" if rehearse else "cuda", time.time() + 60 * minutes
    base, facts = str(Path(out).with_suffix("")), header(torch.device("cpu" if rehearse else "cuda"))
    facts["Command"] = " ".join(["python", "benchmarks/losses.py", *sys.argv[1:]])
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    script = str(Path(__file__).with_name("losses.py"))
    for name in names:
        job = {"name": name, "base": base, "until": until, "device": device}
        command = [sys.executable, script, "--device", device, "--child", json.dumps(job)]
        started, problem = time.time(), ""
        if started > until:
            problem = "the time was over"
        else:
            try:
                # A stage looks at the clock between candidates; one that hangs ends here.
                limit = until - started + 90
                done = subprocess.run(
                    command + ["--rehearse"] * rehearse, env=environment, timeout=limit, stderr=subprocess.PIPE,
                    text=True,
                )  # fmt: skip
                problem = done.stderr[-2000:] if done.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"over {limit:.0f} s"
        path = Path(f"{base}-{name}.json")
        found = json.loads(path.read_text()) if path.exists() else {"results": {}, "skipped": []}
        if problem:
            found["skipped"].append(f"stage {name}: {problem}")
        path.write_text(json.dumps(found | {"seconds": round(time.time() - started)}, indent=1) + "\n")
        summarise(title, facts, base, out)


def summarise(title: str, facts: dict[str, str], base: str, out: str) -> None:
    """The report, of all stages' files that lie beside `out`."""
    stages = {
        name: json.loads(path.read_text())
        for name in STAGES
        if (path := Path(f"{base}-{name}.json")).exists()
    }
    skipped = [f"stage {name}: not run" for name in STAGES if name not in stages]
    skipped += [line for stage in stages.values() for line in stage["skipped"]]
    checked, timed = {}, {}
    for name, stage in stages.items():
        for key, result in stage["results"].items():
            if key.startswith("parity of "):
                checked[key.removeprefix("parity of ")] = result
            elif name in SIZES:
                timed.setdefault(name, {})[key] = result
    sections = [("Errors against float64", table([parity_row(*item) for item in checked.items()]))]
    rate = stages.get("rate", {}).get("results", {}).get("rate")
    if rate:
        size, flops = rate["size"], rate["flops"]
        sections.append(("A float16 product", f"{size}^3: {flops / 1e12:.3g} TFLOP/s."))
    for name, results in timed.items():
        sections.append((name, table(list(rows(name, results, rate and rate["flops"])))))
    for name, kernels in stages.get("profile", {}).get("results", {}).items():
        lines = [
            {"kernel": kernel, "calls": str(found["calls"]), "us": f"{found['us']:.0f}"}
            for kernel, found in kernels.items()
        ]
        sections.append((f"Profile: {name}", table(lines)))
    seconds = {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage}
    sections.append(("Length of the stages", ", ".join(f"{name} {s} s" for name, s in seconds.items())))
    report(title, facts, sections, {name: stage["results"] for name, stage in stages.items()}, skipped, out)


def parity_row(name: str, found: dict) -> dict[str, str]:
    number = lambda key: f"{found[key]:.1e}" if key in found else ""
    columns = [f"{key}, scale {scale}" for scale in (10, 100) for key in ("value", "x", "y")]
    return (
        {"loss": name}
        | {column: number(column) for column in columns}
        | {"tolerance at 10": f"{found['tolerance']:.0e}", "problem": found["problem"].replace("\n", " ")}
    )


def rows(kind: str, results: dict[str, dict], rate: float | None):
    """A line a candidate and size, beside open_clip's in bf16 autocast at that size."""
    goals = {(pairs, dim): goal for pairs, dim, _, goal in SIZES[kind]}
    for result in results.values():
        name, pairs, dim = result["name"], result["pairs"], result["dim"]
        eager = results.get(f"open_clip ClipLoss, autocast, N={pairs}, D={dim}")
        best = name.startswith("clipkit") and (
            "float16" in name and "bfloat16" not in name or kind == "cyclic"
        )
        yield row(name, pairs, dim, result, rate, goals.get((pairs, dim)) if best else None, eager)
