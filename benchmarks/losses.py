"""Time and memory of the losses on large batches, beside the peers, in one run.

    python benchmarks/losses.py --out benchmarks/results/2026-11-cpu2-losses.md      # on CUDA where there is one
    python benchmarks/losses.py --device cpu --pairs 4096                            # smaller and quicker

Parity comes first: every candidate's value and gradients against the definition in float64 on a small batch; one
that fails is not timed. On a CPU: chunked InfoNCE against open_clip's own ClipLoss, and cyclic in closed form
against the dense definition; about 15 minutes on 2 quiet cores, wall and processor time both given, and a
failure stops the run. On CUDA: the sizes of the kernel goals with every peer that is installed, in stages of a
process each (losses_cuda.py), in ten minutes:

    pip install open_clip_torch inf-cl==1.2.1 memeff==0.3.1 siglip-kernel==0.1.2
    python benchmarks/losses.py --out benchmarks/results/2026-12-h200-losses.md
    python benchmarks/losses.py --rehearse --out /tmp/losses.md     # the same on a CPU: interpreted, tiny sizes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import PeakMemory, header, in_child, quantiles, report, table, time_loss
from torch import Tensor

from clipkit.losses import CyclicGeometry, InfoNCE, Sigmoid

TITLE = "Losses on large batches"


def features(pairs: int, dim: int, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Image and text features with cosine near 0.5 between partners and near 0 elsewhere, and scale 100."""
    generator = torch.Generator(device).manual_seed(0)
    draw = lambda: torch.randn(pairs, dim, device=device, generator=generator)
    common = draw()
    sides = [F.normalize(common + draw(), dim=1).to(dtype).requires_grad_() for _ in range(2)]
    return [*sides, torch.tensor(100.0, device=device, requires_grad=True)]


def dense_cyclic(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CyCLIP section 2.2 as it is written, weights 0.25: four N x N matrices."""
    in_modal = (x @ x.T - y @ y.T).square().sum()
    cross_modal = (x @ y.T - y @ x.T).square().sum()
    return 0.25 * (in_modal + cross_modal) / len(x)


def dense_infonce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's figure 3, as it is written."""
    logits, labels = scale * x @ y.T, torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_sigmoid(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """SigLIP's algorithm 1 with bias -10, as it is written."""
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(labels * (scale * x @ y.T - 10)).sum() / len(x)


def open_clip_loss() -> Callable:
    from open_clip.loss import ClipLoss

    return ClipLoss()


def ours(name: str, impl: str) -> Callable:
    if name == "infonce":
        return InfoNCE(impl=impl, group=None)
    sigmoid = Sigmoid(impl=impl, group=None)
    return lambda x, y, scale: sigmoid(x, y, scale, torch.tensor(-10.0, device=x.device))


CPU_LOSSES = {
    "clipkit InfoNCE, chunked": partial(ours, "infonce", "chunked"),
    "open_clip ClipLoss, dense": open_clip_loss,
    "clipkit sigmoid, chunked": partial(ours, "sigmoid", "chunked"),
    "clipkit cyclic, closed form": lambda: lambda x, y, scale: CyclicGeometry(group=None)(x, y),
    "cyclic, dense definition": lambda: dense_cyclic,
}
DEFINITION = {
    "InfoNCE": dense_infonce,
    "ClipLoss": dense_infonce,
    "sigmoid": dense_sigmoid,
    "cyclic": dense_cyclic,
}


def definition_of(name: str) -> Callable:
    return next(dense for word, dense in DEFINITION.items() if word in name)


def errors(
    name: str,
    loss: Callable,
    device: str,
    dtype: torch.dtype,
    *,
    pairs: int = 384,
    dim: int = 256,
    scale: float = 10.0,
) -> dict[str, float]:
    """Relative errors against the definition in float64: of the value, of the gradients of x and y."""
    given = features(pairs, dim, device, dtype)
    given[2] = torch.tensor(scale, device=device, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in given]
    found, expected = loss(*given), definition_of(name)(*exact)
    result = {"value": abs(found.item() - expected.item()) / abs(expected.item())}
    wanted = torch.autograd.grad(expected, exact[:2])
    for side, grad, reference in zip("xy", torch.autograd.grad(found, given[:2]), wanted):
        result[side] = float((grad.double() - reference).norm() / reference.norm())
    return result


def parity(name: str, loss: Callable, device: str, dtype: torch.dtype, tolerance: float) -> str:
    """ "" when value and gradients agree with the definition in float64, else what does not."""
    found = errors(name, loss, device, dtype)
    return ", ".join(f"{key} off by {error:.1e}" for key, error in found.items() if not error <= tolerance)


def child(job: dict) -> None:
    """One candidate alone in this process: times, and peak memory above the features it was given."""
    device = torch.device("cpu")
    loss, leaves = CPU_LOSSES[job["name"]](), features(job["pairs"], job["dim"], "cpu")
    # A small step first: threads, libraries and code pages are not the loss's memory.
    small = features(64, job["dim"], "cpu")
    loss(*small).backward()
    memory = PeakMemory(device)
    samples = time_loss(lambda: loss(*leaves), leaves, repeats=job["repeats"], warm_up=job["warm_up"])
    print(json.dumps({**job, **samples, "peak": memory.bytes(), "process": memory.base + memory.bytes()}))


def merge(runs: list[dict]) -> dict:
    """The samples of several children of one job, and their largest peak."""
    done = [run for run in runs if "skipped" not in run]
    if not done:
        return runs[0]
    merged = dict(done[0], peak=max(run["peak"] for run in done), process=max(run["process"] for run in done))
    for key in ("forward", "backward", "both", "cpu"):
        merged[key] = [sample for run in done for sample in run[key]]
    return merged


def seconds(samples: list[float]) -> str:
    middle, low, high = quantiles(samples)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def cpu_row(name: str, result: dict) -> dict[str, str]:
    row = {"loss": name, "N": str(result["pairs"]), "D": str(result["dim"])}
    if "skipped" in result:
        return row | {"forward + backward, s": f"skipped: {result['skipped']}"}
    return row | {
        "forward, s": seconds(result["forward"]),
        "backward, s": seconds(result["backward"]),
        "forward + backward, s": seconds(result["both"]),
        "processor, s": seconds(result["cpu"]),
        "peak above the features, MB": f"{result['peak'] / 1e6:.0f}",
        "whole process, MB": f"{result['process'] / 1e6:.0f}",
    }


def cpu_ratios(results: dict, pairs: int, dim: int, sizes: list[int]) -> str:
    """One line for each pair of candidates that both ran."""

    def ratio(key: str, above: tuple, below: tuple) -> float:
        return quantiles(results[above][key])[0] / quantiles(results[below][key])[0]

    def ran(*jobs: tuple) -> bool:
        return not any("skipped" in results[job] for job in jobs)

    lines = []
    chunked, dense = ("clipkit InfoNCE, chunked", pairs), ("open_clip ClipLoss, dense", pairs)
    if ran(chunked, dense):
        memory = results[chunked]["peak"] / max(1, results[dense]["peak"])
        lines.append(
            f"- InfoNCE, N = {pairs}, D = {dim}, chunked over open_clip's dense: time "
            f"x{ratio('both', chunked, dense):.2f} (goal at most 1.2), processor time "
            f"x{ratio('cpu', chunked, dense):.2f}, peak memory above the features x{memory:.3f} "
            "(goal at most 0.1)"
        )
    for n in sizes[:-1]:
        closed, whole = ("clipkit cyclic, closed form", n), ("cyclic, dense definition", n)
        if ran(closed, whole):
            lines.append(
                f"- Cyclic, N = {n}: the closed form is {ratio('both', whole, closed):.1f} times faster "
                f"(processor time {ratio('cpu', whole, closed):.1f} times)"
            )
    last, before = ("clipkit cyclic, closed form", sizes[-1]), ("clipkit cyclic, closed form", sizes[-2])
    if ran(last, before):
        lines.append(
            f"- Cyclic closed form, N = {sizes[-2]} -> {sizes[-1]}: x{ratio('both', last, before):.2f} in "
            "time (2 is linear; the dense definition is quadratic)"
        )
    return "\n".join(lines) or "(nothing to compare)"


def run_cpu(pairs: int, dim: int, rounds: int, timeout: float) -> tuple[list, dict, list[str]]:
    """Candidates take turns, round by round, so that a busy machine slows both sides of a ratio."""
    for name, make in CPU_LOSSES.items():
        problem = parity(name, make(), "cpu", torch.float32, 2e-5)
        if problem:
            raise SystemExit(f"parity: {name}: {problem}")
    sizes = [pairs // 8, pairs // 4, pairs // 2, pairs, 2 * pairs]
    jobs = [(name, pairs) for name in list(CPU_LOSSES)[:3]]
    jobs += [("clipkit cyclic, closed form", n) for n in sizes] + [
        ("cyclic, dense definition", n) for n in sizes[:-1]
    ]
    runs: dict[tuple[str, int], list[dict]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for name, n in jobs:
            quick = "closed" in name or n * dim <= 4096 * 512
            job = {
                "name": name,
                "pairs": n,
                "dim": dim,
                "repeats": 3 if quick else 1,
                "warm_up": 1 if quick else 0,
            }
            runs[name, n].append({**job, **in_child(__file__, job, timeout=timeout)})
    results = {job: merge(done) for job, done in runs.items()}
    skipped = [f"{name}, N = {n}: {r['skipped']}" for (name, n), r in results.items() if "skipped" in r]
    skipped.append("Everything on a GPU: torch found no CUDA device, or --device cpu was given.")
    rows = [cpu_row(name, result) for (name, _), result in results.items()]
    sections = [("Time and memory", table(rows)), ("Ratios", cpu_ratios(results, pairs, dim, sizes))]
    return sections, {f"{name}, N={n}": r for (name, n), r in results.items()}, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--pairs", type=int, default=16384, help="CPU: N of the comparison; cyclic goes to 2 N"
    )
    parser.add_argument("--dim", type=int, default=512, help="CPU: D")
    parser.add_argument("--rounds", type=int, default=3, help="CPU: times every candidate takes its turn")
    parser.add_argument(
        "--timeout", type=float, default=600, help="CPU: seconds one candidate may take in a round"
    )
    parser.add_argument("--minutes", type=float, default=9, help="CUDA: what is not begun by then is skipped")
    parser.add_argument(
        "--stages", help="CUDA: some of parity,rate,infonce,sigmoid,cyclic,million,profile; default: all"
    )
    parser.add_argument("--rehearse", action="store_true", help="the CUDA stages on a CPU, at tiny sizes")
    parser.add_argument("--out", help="result file to write; CUDA: each stage's file beside it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device == "cpu" and not given.rehearse:
        if given.child:
            child(json.loads(given.child))
            return
        facts = header(torch.device(given.device))
        sections, results, skipped = run_cpu(given.pairs, given.dim, given.rounds, given.timeout)
        report(TITLE, facts, sections, results, skipped, given.out)
        return
    from losses_cuda import run_stage, run_stages

    if given.child:
        run_stage(**json.loads(given.child))
    else:
        run_stages(TITLE, given.stages, given.minutes, given.out, rehearse=given.rehearse)


if __name__ == "__main__":
    main()
