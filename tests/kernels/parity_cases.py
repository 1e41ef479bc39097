"""Cases for the Triton kernels, and the way to run one: `python parity_cases.py OUT.pt` runs all in the
interpreter.

Each case is a problem built from a seed, so that the process that runs the kernels (the interpreter's, which
must be its own, or this one on CUDA) and the process that computes the float64 reference see the same
numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

CONFIG = {"block_m": 32, "block_n": 16, "block_k": 32, "group": 2, "outer": 64}
POINTERS = CONFIG | {"block_m": 16, "block_n": 32, "block_k": 16, "descriptors": False}


# Distances between the centres of images and of texts: 0.8 is CLIP's (Liang et al. 2022, "Mind the gap"). Here they
# point away from each other, so that negatives have cosines near -gap^2 / 4. With this few pairs the sums of all
# rows reach fused.flush_floor between 1.23 and 1.3 for float32, and between 1.31 and 1.37 for float16.
GAPS = (0.8, 1.1, 1.26, 1.33, 1.4)


def case(
    n=37,
    m=53,
    d=19,
    *,
    dtype="float16",
    scale=14.0,
    op="lse",
    features="random",
    weights=False,
    ids=False,
    row_offset=0,
    exclude_positives=True,
    needs="xysw",
    precision="auto",
    config="tiles",
):
    return dict(locals())


CASES = {
    "float16": case(),
    "bfloat16": case(dtype="bfloat16"),
    "float32": case(dtype="float32"),
    "float32 in half precision": case(dtype="float32", precision="half"),
    "float16 in high precision": case(precision="high"),
    "square, tile by tile": case(64, 64, 64),
    "several blocks": case(130, 97, 32, dtype="float32"),
    "one dimension more than a step": case(33, 17, 65, dtype="float32"),
    "D = 37": case(20, 20, 37),
    "pointers": case(70, 37, 37, dtype="float32", config="pointers"),
    "pointers, sigmoid": case(37, 70, 37, dtype="float32", config="pointers", op="softplus"),
    "N = 1": case(1, 1, 8),
    "N = 1 against many": case(1, 20, 8),
    "no rows": case(0, 5, 8),
    "no columns": case(5, 0, 8),
    "scale 100": case(scale=100.0, dtype="float32"),
    "scale 100, float16": case(scale=100.0),
    "negative scale": case(scale=-20.0, dtype="float32"),
    "all cosines negative at scale 100": case(scale=100.0, features="opposed", dtype="float32"),
    "all cosines negative, pointers": case(
        scale=100.0, features="opposed", dtype="float32", config="pointers"
    ),
    "all cosines negative, weighted": case(
        scale=100.0, features="opposed", dtype="float32", weights=True, ids=True
    ),
    "one row opposed at scale 200": case(40, 40, 16, scale=200.0, features="one opposed", dtype="float32"),
    **{
        f"gap of {gap}, {dtype}": case(features=f"gap {gap}", scale=100.0, d=32, dtype=dtype)
        for gap in GAPS
        for dtype in ("float16", "float32")
    },
    "flushed tails, float16": case(40, 40, 124, scale=100.0, features="tail -0.383 -0.529"),
    "flushed tails, float32": case(40, 40, 124, scale=100.0, features="tail -0.342 -0.529", dtype="float32"),
    "all features equal": case(features="equal", scale=100.0),
    "converged": case(24, 24, 32, scale=100.0, features="converged", dtype="float32"),
    "duplicates": case(features="duplicates", ids=True, scale=50.0),
    "group ids": case(ids=True),
    "group ids without positives": case(ids=True, exclude_positives=False),
    "positives kept": case(exclude_positives=False),
    "offset rows": case(row_offset=7, dtype="float32"),
    "offset rows, negative": case(row_offset=-5, dtype="float32"),
    "offset beyond the columns": case(row_offset=1000, dtype="float32"),
    "weighted columns": case(weights=True, dtype="float32"),
    "norms of 50": case(features="norm 50", scale=0.01, dtype="float32"),
    "norms of 1/1000": case(features="norm 1/1000", scale=1e6),
    "mixed norms": case(features="mixed norms", scale=1.0, dtype="float32"),
    "strided rows": case(features="strided", dtype="float32"),
    "transposed storage": case(features="transposed"),
    "NaN behind the inputs": case(features="poisoned", weights=True, ids=True),
    "only columns need a gradient": case(needs="ys", dtype="float32"),
    "only the scale needs a gradient": case(needs="s", dtype="float32"),
    "sigmoid": case(op="softplus", dtype="float32"),
    "sigmoid, float16": case(op="softplus"),
    "sigmoid, bfloat16": case(op="softplus", dtype="bfloat16"),
    "sigmoid, group ids and offset": case(op="softplus", ids=True, row_offset=3, dtype="float32"),
    "sigmoid, several blocks": case(130, 70, 32, op="softplus"),
    "sigmoid, large logits": case(op="softplus", scale=300.0, dtype="float32"),
}
NAN_CASES = {"NaN in a row": "lse", "NaN in a row, sigmoid": "softplus"}


def _features(c: dict, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 rows and columns of a case."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    n, m, d, kind = c["n"], c["m"], c["d"], c["features"]
    x, y = normalize(draw(n, d), dim=1), normalize(draw(m, d), dim=1)
    if kind in ("opposed", "one opposed"):
        away = normalize(draw(d), dim=0)
        opposed = normalize(0.1 * x + away, dim=1)
        x = opposed if kind == "opposed" else torch.cat([opposed[:1], -opposed[1:]])
        y = normalize(0.1 * y - away, dim=1)
    elif kind.startswith("gap"):
        # One side's own directions are nearly those in which the other is 0.
        towards, own = float(kind.split()[1]) / 2, torch.arange(d) % 2 == 0
        x, y = x * torch.where(own, 1, 0.1), y * torch.where(own, 0.1, 1)
        x[:, 0] = y[:, 0] = 0
        x, y = (normalize(side, dim=1) * (1 - towards**2) ** 0.5 for side in (x, y))
        x[:, 0], y[:, 0] = towards, -towards
    elif kind.startswith("tail"):
        # Each row has one negative near the floor; all its others lie just under what exp2 flushes to 0.
        nearest, others = (float(cosine) for cosine in kind.split()[1:])
        parts = -others, nearest - others, 1 - nearest + 2 * others
        axis, basis = torch.eye(d, dtype=torch.float64)[:1], torch.eye(d, dtype=torch.float64)[1:]
        towards, shared, own = (part**0.5 for part in parts)
        x = towards * axis + shared * basis[:n] + own * basis[n : 2 * n]
        y = -towards * axis + shared * basis[:m].roll(1, 0) + own * basis[2 * n : 2 * n + m]
    elif kind == "equal":
        x, y = x[:1].expand(n, d).clone(), x[:1].expand(m, d).clone()
    elif kind == "converged":
        # Orthogonal pairs: every positive has cosine near 1, every negative near 0.
        x = torch.linalg.qr(draw(d, d)).Q[:n]
        y = normalize(x + 1e-3 * draw(m, d), dim=1)
    elif kind == "duplicates":
        x, y = x[torch.arange(n) // 3], y[torch.arange(m) // 3]
    elif kind == "norm 50":
        x, y = 50 * x, 50 * y
    elif kind == "norm 1/1000":
        x, y = x / 1000, y / 1000
    elif kind == "mixed norms":
        x = x * torch.linspace(0.01, 4, n, dtype=torch.float64)[:, None]
    return x, y


def problem(name: str, device: str) -> tuple[dict, dict]:
    """(inputs, settings) of a case: x, y, scale and weights or bias with requires_grad, in the case's
    dtype."""
    c = CASES[name] if name in CASES else case(dtype="float32", op=NAN_CASES[name])
    dtype = getattr(torch, c["dtype"])
    x, y = _features(c, seed=len(name))
    x, y = x.to(dtype), y.to(dtype)
    if name in NAN_CASES:
        x[3, 2] = float("nan")
    if c["features"] == "strided":
        x = torch.cat([x, torch.full_like(x, float("nan"))], 1).repeat_interleave(2, 0)[::2, : c["d"]]
    if c["features"] == "transposed":
        x, y = x.T.contiguous().T, y.T.contiguous().T
    if c["features"] == "poisoned":
        x, y = (_inside_nan(features) for features in (x, y))
    x, y = x.to(device).detach(), y.to(device).detach()
    g = torch.Generator().manual_seed(1)
    settings = {"row_offset": c["row_offset"], "exclude_positives": c["exclude_positives"]}
    inputs = {"x": x, "y": y, "s": torch.tensor(c["scale"], device=device)}
    if c["op"] == "softplus":
        inputs["b"] = torch.tensor(-3.0, device=device)
    elif c["weights"]:
        inputs["w"] = torch.randn(c["m"], generator=g).to(device)
        inputs["w"][2] = float("-inf")
    if c["ids"]:
        settings |= {
            "row_ids": (torch.arange(c["n"]) // 3).to(device),
            "col_ids": (torch.arange(c["m"]) // 3).to(device),
        }
    for key in inputs:
        inputs[key].requires_grad_(key in c["needs"] + "b")
    return inputs, settings | {"op": c["op"], "precision": c["precision"]}


def _inside_nan(features: torch.Tensor) -> torch.Tensor:
    """A view with NaN before, after and between its rows."""
    n, d = features.shape
    around = torch.full((n + 2, d + 3), float("nan"), dtype=features.dtype)
    around[1:-1, 1 : d + 1] = features
    return around[1:-1, 1 : d + 1]


def evaluate(inputs: dict, settings: dict, impl: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients for random upstream gradients, on the CPU in float64."""
    from clipkit.kernels import pair_lse, pair_softplus

    settings = dict(settings, impl=impl)
    op = settings.pop("op")
    if op == "softplus":
        outputs = {"row_sum": pair_softplus(inputs["x"], inputs["y"], inputs["s"], inputs["b"], **settings)}
    else:
        row_lse, col_lse = pair_lse(
            inputs["x"], inputs["y"], inputs["s"], col_log_weight=inputs.get("w"), **settings
        )
        outputs = {"row_lse": row_lse, "col_lse": col_lse}
    g = torch.Generator().manual_seed(2)
    total = 0.0
    for out in outputs.values():
        upstream = torch.randn(out.shape, generator=g).to(out)
        total = total + (torch.where(out.isinf(), 0.0, out) * upstream).sum()
    wanted = {key: value for key, value in inputs.items() if value.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
    result = outputs | {f"d{key}": grad for key, grad in zip(wanted, grads)}
    return {key: value.detach().double().cpu() for key, value in result.items()}


def kernel_config(name: str) -> str:
    return CASES[name]["config"] if name in CASES else "tiles"


def use_config(folder: Path, name: str) -> None:
    """Point CLIPKIT_KERNEL_CONFIGS at small tiles, loaded by descriptors or by pointers."""
    from clipkit.kernels.configs import KINDS

    path = folder / f"{name}.json"
    settings = CONFIG if name == "tiles" else POINTERS
    path.write_text(
        json.dumps(
            [{"kind": kind, "capability": [0, 0], "max_dim": 10**6, "config": settings} for kind in KINDS]
        )
    )
    os.environ["CLIPKIT_KERNEL_CONFIGS"] = str(path)


def flush_as_the_chip() -> None:
    """The interpreter's exp2 as ex2.approx.ftz: what lies under 2^-126 is 0."""
    from triton.runtime import interpreter

    def exp2(values):
        found = np.exp2(values)
        return np.where(found < 2.0**-126, np.float32(0), found)

    interpreter.InterpreterBuilder.create_exp2 = lambda self, arg: self.unary_op(arg, exp2)


@contextlib.contextmanager
def exact_tiles():
    """Within it, whether each launch of exact_coef_kernel had a sum below the floor."""
    from clipkit.kernels import triton_tiles

    kernel, found = triton_tiles.exact_coef_kernel, []

    class Recorded:
        def __getitem__(self, grid):
            def launch(*args, **constants):
                found.append(bool(dict(zip(kernel.arg_names, args))["lost"]))
                return kernel[grid](*args, **constants)

            return launch

    triton_tiles.exact_coef_kernel = Recorded()
    try:
        yield found
    finally:
        triton_tiles.exact_coef_kernel = kernel


def main(out: str) -> None:
    torch.set_num_threads(1)
    # torch.empty is filled with NaN from here on: a cell that is read before it is written shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    flush_as_the_chip()
    results = {}
    for name in [*CASES, *NAN_CASES]:
        use_config(Path(out).parent, kernel_config(name))
        inputs, settings = problem(name, "cpu")
        with exact_tiles() as exact:
            results[name] = evaluate(inputs, settings, "triton")
        results[name]["exact"] = torch.tensor(float(any(exact)))
        if name == "several blocks":
            results["again"] = evaluate(inputs, settings, "triton")
    torch.save(results, out)


if __name__ == "__main__":
    main(sys.argv[1])
