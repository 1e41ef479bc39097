"""Measure tile configurations on the GPU at hand and write the best.

    python -m clipkit.kernels.tune OUT.json --dims 512,768,1024 --rows 32768 --kinds lse_sums,lse_coef
    python -m clipkit.kernels.tune OUT.json --dry-run
    export CLIPKIT_KERNEL_CONFIGS=OUT.json

Each kind of kernel is timed through the public path (forward for sums, backward for coefficients, so that
block size and cuBLAS count too), the others at the table's entry. A configuration that does not fit the chip
is passed over. About a minute a kind and D on an H100. --dry-run lists the candidates and needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from clipkit.kernels import configs, pair_lse, pair_softplus
from clipkit.kernels.configs import KINDS, TileConfig
from clipkit.registry import unknown

# (block_m, block_n, block_k, num_warps, num_stages)
TILES = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 128, 128, 8, 2),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (64, 256, 64, 4, 4),
    (128, 128, 32, 8, 4),
)
GROUPS = (8, 16)
OUTER = {"sums": (16896, 33792), "coef": (5632, 8448, 11264, 16896)}


def candidates(kind: str, base: TileConfig) -> list[TileConfig]:
    """Tiles first at the table's group and block, then groups and blocks are tried on the winner by
    `tune_one`."""
    found = [base]
    for block_m, block_n, block_k, num_warps, num_stages in TILES:
        found.append(
            replace(
                base,
                block_m=block_m,
                block_n=block_n,
                block_k=block_k,
                num_warps=num_warps,
                num_stages=num_stages,
            )
        )
    return list(dict.fromkeys(found))


def around(kind: str, best: TileConfig) -> list[TileConfig]:
    """The winner with other groups, blocks and loads."""
    found = [replace(best, group=group) for group in GROUPS]
    found += [replace(best, outer=outer) for outer in OUTER[kind.split("_")[1]]]
    found.append(replace(best, descriptors=not best.descriptors))
    return [config for config in dict.fromkeys(found) if config != best]


def measure(
    kind: str, capability: tuple[int, int], config: TileConfig, rows: int, dim: int, repeats: int = 5
) -> float:
    """Median milliseconds of the pass that `kind` is for, or inf where the configuration does not run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.json"
        configs.write_overrides(path, {(kind, capability, 1 << 30): config})
        # A new path each time, so that the file's cache never answers for another configuration.
        os.environ["CLIPKIT_KERNEL_CONFIGS"] = str(path)
        try:
            return _time(kind, rows, dim, repeats)
        except Exception as error:
            # Too much shared memory, too many registers or a shape this triton refuses: not a candidate here.
            print(f"  {config}: {type(error).__name__}", file=sys.stderr)
            return float("inf")
        finally:
            del os.environ["CLIPKIT_KERNEL_CONFIGS"]


def _time(kind: str, rows: int, dim: int, repeats: int) -> float:
    g = torch.Generator("cuda").manual_seed(0)
    x, y = (
        torch.nn.functional.normalize(torch.randn(rows, dim, device="cuda", generator=g), dim=1)
        .half()
        .requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(50.0, device="cuda", requires_grad=True)
    times = []
    for _ in range(repeats + 2):
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        if kind.startswith("lse"):
            row_lse, col_lse = pair_lse(x, y, scale, impl="triton")
            total = row_lse.sum() + col_lse.sum()
        else:
            total = pair_softplus(x, y, scale, -10.0, impl="triton").sum()
        middle.record()
        torch.autograd.grad(total, (x, y, scale))
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(middle) if kind.endswith("sums") else middle.elapsed_time(end))
    return sorted(times[2:])[repeats // 2]


def tune_one(kind: str, capability: tuple[int, int], rows: int, dim: int) -> tuple[TileConfig, float, float]:
    """(best configuration, its milliseconds, the table's milliseconds)."""
    base = configs.find(kind, capability, dim)
    times = {config: measure(kind, capability, config, rows, dim) for config in candidates(kind, base)}
    best = min(times, key=lambda config: times[config])
    times |= {config: measure(kind, capability, config, rows, dim) for config in around(kind, best)}
    best = min(times, key=lambda config: times[config])
    return best, times[best], times[base]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m clipkit.kernels.tune", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("out", help="JSON file to write")
    parser.add_argument("--dims", default="512,768,1024", help="embedding dimensions, largest of each bucket")
    parser.add_argument("--rows", type=int, default=32768, help="rows and columns of the timed problem")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and stop")
    given = parser.parse_args(argv)
    dims, kinds = sorted(int(d) for d in given.dims.split(",")), given.kinds.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind", kind, KINDS)
    if given.dry_run:
        for kind in kinds:
            for config in candidates(kind, configs.find(kind, (9, 0), dims[0])):
                print(kind, config)
        return
    if not torch.cuda.is_available():
        raise SystemExit(
            "tuning measures on a CUDA device, and torch finds none; --dry-run lists the candidates"
        )
    capability, found = torch.cuda.get_device_capability(), {}
    for kind in kinds:
        for dim in dims:
            best, time, before = tune_one(kind, capability, given.rows, dim)
            found[kind, capability, dim] = best
            print(f"{kind} D <= {dim}: {before:.2f} -> {time:.2f} ms with {best}", flush=True)
            # Written as it goes: an interrupted run keeps what it measured.
            configs.write_overrides(given.out, found)


if __name__ == "__main__":
    main()
