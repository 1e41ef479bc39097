"""Measure tile configurations on the GPU at hand and write the best.

    python -m clipkit.kernels.tune OUT.json --dims 512,768,1024 --rows 32768 --kinds lse_sums,lse_coef --minutes 9
    python -m clipkit.kernels.tune OUT.json --dry-run
    python -m clipkit.kernels.tune OUT.json --rehearse      # all of it in Triton's interpreter, at tiny sizes
    export CLIPKIT_KERNEL_CONFIGS=OUT.json

Each kind of kernel is timed through the public path (forward for sums, backward for coefficients, so that
block size and cuBLAS count too), the others at the entry of CLIPKIT_KERNEL_CONFIGS or the table. Every candidate's
sums and gradients are first compared with the entry's own, and those with float64 on a sample of rows: one that is
wrong, or does not fit the chip, is passed over and its reason printed. Every measurement goes to OUT.json.tried at
once, and is not repeated by the same command later, also where a candidate ended the process; OUT.json keeps what
it has of other kinds and dimensions. About two minutes a kind and D on an H100 (not measured yet).
--dry-run lists the candidates and needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

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
REHEARSED = ((32, 32, 32, 4, 1), (32, 16, 32, 4, 1), (16, 32, 16, 4, 1))
GROUPS = (8, 16)
OUTER = {"sums": (16896, 33792), "coef": (5632, 8448, 11264, 16896)}


def candidates(kind: str, base: TileConfig, tiles: tuple = TILES) -> list[TileConfig]:
    """Tiles first at the table's group and block, then groups and blocks are tried on the winner by
    `tune_one`."""
    found = [base]
    for block_m, block_n, block_k, num_warps, num_stages in tiles:
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


class Tried:
    """What was measured, a line of JSON each: {"problem": [kind, capability, rows, dim], "config": .., "ms": ..} or,
    in place of "ms", "failed". A candidate is announced before it runs: the last line of a process that it ended.
    """

    def __init__(self, path: Path):
        self.path, self.known = path, {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                # A process that was killed while it wrote; what it wrote about is measured again.
                continue
            self.known[self._key(entry["problem"], entry["config"])] = entry.get("ms", float("inf"))

    @staticmethod
    def _key(problem: list, config: dict) -> str:
        return json.dumps([problem, config], sort_keys=True)

    def milliseconds(self, problem: Problem, config: TileConfig) -> float:
        """Of this run or an earlier one; inf where it does not run, or computes something else."""
        key = self._key(problem.key, asdict(config))
        if key not in self.known:
            self._write(problem, config, failed="it ended the process")
            found = problem.measure(config)
            self.known[key] = found if isinstance(found, float) else float("inf")
            if isinstance(found, float):
                self._write(problem, config, ms=found)
            else:
                print(f"  {config}: {found}", file=sys.stderr)
                self._write(problem, config, failed=found)
                if problem.device == "cuda":
                    # An error that the device does not get over would be every later candidate's too.
                    torch.cuda.synchronize()
        return self.known[key]

    def _write(self, problem: Problem, config: TileConfig, **found: float | str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"problem": problem.key, "config": asdict(config), **found}) + "\n")


class Problem:
    """Rows, columns and gradients that one kind of kernel is timed on, and what comes out of them.

    Args:
        device: "cuda", or "cpu" in Triton's interpreter.
    """

    def __init__(self, kind: str, capability: tuple[int, int], rows: int, dim: int, device: str):
        self.kind, self.device, self.key = kind, device, [kind, list(capability), rows, dim]
        self.base = configs.find(kind, capability, dim)
        draw = torch.Generator(device).manual_seed(0)
        self.x, self.y = (
            torch.nn.functional.normalize(torch.randn(rows, dim, device=device, generator=draw), dim=1)
            .half()
            .requires_grad_()
            for _ in range(2)
        )
        self.scale = torch.tensor(50.0, device=device, requires_grad=True)
        self.expected: list[Tensor] | None = None

    def forward(self) -> list[Tensor]:
        if self.kind.startswith("lse"):
            return list(pair_lse(self.x, self.y, self.scale, impl="triton"))
        return [pair_softplus(self.x, self.y, self.scale, -10.0, impl="triton")]

    def backward(self, sums: list[Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad([part.sum() for part in sums], (self.x, self.y, self.scale)))

    def results(self) -> list[Tensor]:
        sums = self.forward()
        return [*(part.detach() for part in sums), *self.backward(sums)]

    def measure(self, config: TileConfig, repeats: int = 5) -> float | str:
        """Median milliseconds of the pass that this kind is for, or why there are none."""
        try:
            if self.expected is None:
                self.expected = self.results()
                if wrong := self._against_float64():
                    raise SystemExit(f"{self.kind} of the table: {wrong}; nothing is tuned on wrong results")
            with configs.trying(self.kind, config):
                for found, expected in zip(self.results(), self.expected, strict=True):
                    # One number is a sum of terms of either sign.
                    limit = 1e-2 if found.ndim == 0 else 2e-3 if found.ndim == 2 else 1e-5
                    error = float((found - expected).float().norm() / expected.float().norm())
                    if not error <= limit:
                        return f"differs from the table's entry by {error:.1e}, shape {tuple(found.shape)}"
                return self._time(repeats)
        except Exception as error:
            # Too much shared memory, too many registers or a shape this triton refuses: not a candidate here.
            return f"{type(error).__name__}: {error}"[:500]

    def _against_float64(self, sample: int = 64) -> str:
        """ "" where the first rows' sums are those of the definition in float64."""
        assert self.expected is not None
        logits = 50.0 * self.x[:sample].detach().double() @ self.y.detach().double().T
        logits.diagonal().fill_(-torch.inf)
        lse = self.kind.startswith("lse")
        exact = torch.logsumexp(logits, 1) if lse else torch.nn.functional.softplus(logits - 10.0).sum(1)
        error = float((self.expected[0][:sample] - exact).norm() / exact.norm())
        return "" if error <= 1e-4 else f"sums off by {error:.1e} against float64"

    def _time(self, repeats: int) -> float:
        wait = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        times = []
        for _ in range(repeats + 2):
            wait()
            start = time.perf_counter()
            sums = self.forward()
            wait()
            middle = time.perf_counter()
            if self.kind.endswith("coef"):
                self.backward(sums)
                wait()
                times.append(time.perf_counter() - middle)
            else:
                times.append(middle - start)
        return 1e3 * sorted(times[2:])[repeats // 2]


def tune_one(problem: Problem, tried: Tried, tiles: tuple, until: float) -> tuple[TileConfig, float, float]:
    """(best configuration, its milliseconds, the present entry's milliseconds), of what there was time for."""
    base, times = problem.base, {}

    def measure(some: list[TileConfig]) -> TileConfig:
        for config in some:
            if config is base or time.monotonic() < until:
                times[config] = tried.milliseconds(problem, config)
        return min(times, key=lambda config: times[config])

    best = measure(candidates(problem.kind, base, tiles))
    best = measure(around(problem.kind, best))
    return best, times[best], times[base]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m clipkit.kernels.tune", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("out", help="JSON file to write, or to add to")
    parser.add_argument("--dims", default="512,768,1024", help="embedding dimensions, largest of each bucket")
    parser.add_argument("--rows", type=int, default=32768, help="rows and columns of the timed problem")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="stop then; the same command goes on later"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the candidates and stop")
    parser.add_argument(
        "--rehearse", action="store_true", help="on a CPU in the interpreter: 96 rows, D = 32, a few tiles"
    )
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
    device, rows, tiles, capability = "cuda", given.rows, TILES, (0, 0)
    if given.rehearse:
        # Read when the kernels are first imported, which is later.
        os.environ["TRITON_INTERPRET"] = "1"
        device, rows, dims, tiles = "cpu", 96, [32], REHEARSED
    elif not torch.cuda.is_available():
        raise SystemExit(
            "tuning measures on a CUDA device, and torch finds none; --dry-run lists the candidates"
        )
    else:
        capability = torch.cuda.get_device_capability()
    until, out = time.monotonic() + 60 * given.minutes, Path(given.out)
    found = configs.read_overrides(out) if out.exists() else {}
    tried = Tried(out.with_name(out.name + ".tried"))
    for kind in kinds:
        for dim in dims:
            if time.monotonic() > until:
                print(f"{kind} D <= {dim}: the time was over; run the same command again", flush=True)
                continue
            problem = Problem(kind, capability, rows, dim, device)
            best, milliseconds, before = tune_one(problem, tried, tiles, until)
            if milliseconds == float("inf"):
                print(f"{kind} D <= {dim}: nothing ran; the reasons are in {tried.path}", flush=True)
                continue
            found[kind, capability, dim] = best
            print(f"{kind} D <= {dim}: {before:.2f} -> {milliseconds:.2f} ms with {best}", flush=True)
            # Written as it goes: an interrupted run keeps what it measured.
            configs.write_overrides(out, found)


if __name__ == "__main__":
    main()
