"""The kernels compile for three architectures, use their tensor cores, and keep their tiles in registers.

No GPU is needed: fused.py's launches are recorded instead of run, with the configuration it would pick on
each architecture, and every distinct one is compiled to machine code. A process of its own, since the
interpreter's tests decide at import that nothing is compiled.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.processes import command

KERNELS = (
    "norm_kernel",
    "scalars_kernel",
    "cast_kernel",
    "sums_kernel",
    "strip_kernel",
    "weights_kernel",
    "coef_kernel",
    "exact_coef_kernel",
    "finish_kernel",
)
PRODUCTS = ("sums_kernel", "strip_kernel", "coef_kernel", "exact_coef_kernel")
# Instructions that multiply on tensor cores, and those that must not be there instead.
TENSOR_CORES = {
    80: (r"\bHMMA\b", r"HGMMA"),
    90: (r"\bHGMMA\b", r"\bHMMA\b"),
    100: (r"\bUTC\w*MMA\b", r"\bHMMA\b|HGMMA"),
}


def record(arch: int, dim: int, dtype: torch.dtype, high: bool) -> list[tuple]:
    """(kernel, arguments, constants) of every launch of a forward and a backward pass of both kinds."""
    from clipkit.kernels import fused, triton_tiles
    from clipkit.kernels.chunked import Pairs

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append((self.kernel, args, constants))

    recorders = {name: Recorder(getattr(triton_tiles, name)) for name in KERNELS}
    with (
        mock.patch.multiple(triton_tiles, **recorders),
        mock.patch.object(fused, "_capability", lambda device: divmod(arch, 10)),
    ):
        n = 300
        x, y = torch.randn(n, dim).to(dtype), torch.randn(n, dim).to(dtype)
        scale, bias, ones = torch.tensor(10.0), torch.tensor(-3.0), torch.ones(n)
        plain, masked = Pairs(), Pairs(0, torch.arange(n), torch.arange(n))
        for pairs, weight in ((plain, None), (masked, torch.zeros(n))):
            fused.lse_forward(x, y, scale, weight, pairs, high=high)
            fused.lse_backward(
                ones,
                ones,
                x,
                y,
                scale,
                weight,
                ones,
                ones,
                pairs,
                high=high,
                need_x=True,
                need_y=True,
                need_weight=weight is not None,
            )
        fused.softplus_forward(x, y, scale, bias, plain, high=high)
        fused.softplus_backward(
            ones, x, y, scale, bias, plain, high=high, need_x=True, need_y=True, need_bias=True
        )
    return launches


def specialized(kernel, args, constants: dict, arch: int):
    """(source, options) of a launch as the JIT makes them: which pointers and sizes it finds divisible by 16 or
    equal to 1 decides which loads and stores the binary has.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **constants)
    options, *parts = kernel._pack_args(backend, constants, bound, specialization, options)
    return ASTSource(kernel, *parts), options.__dict__


def compile_launch(kernel, args, constants: dict, arch: int):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    source, options = specialized(kernel, args, constants, arch)
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    """(registers, bytes of stack) of the kernel in `cubin`; a spilled register lives on the stack."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return int(re.search(r"REG:(\d+)", text)[1]), int(re.search(r"STACK:(\d+)", text)[1])


def check(arch: int, dim: int, dtype: str, high: bool, folder: Path) -> None:
    import triton

    seen, checked = set(), set()
    # The passes over rows put a few numbers aside, once; so does triton before 3.9 outside sm_90's kernels. A
    # spilled tile takes hundreds of bytes.
    strict = arch == 90 or tuple(int(v) for v in triton.__version__.split(".")[:2]) >= (3, 9)
    wanted, unwanted = TENSOR_CORES[arch]
    for kernel, args, constants in record(arch, dim, getattr(torch, dtype), high):
        key = specialized(kernel, args, constants, arch)[0].hash()
        if key in seen:
            continue
        seen.add(key)
        compiled = compile_launch(kernel, args, constants, arch)
        registers, stack = resources(compiled.asm["cubin"], folder)
        name = f"sm_{arch} {kernel.__name__}: {registers} registers, {stack} bytes of stack"
        print(name, flush=True)
        assert stack <= (0 if strict and kernel.__name__ in PRODUCTS else 64), f"{name}: spills"
        if kernel.__name__ in PRODUCTS:
            sass = compiled.asm["sass"]
            assert re.search(wanted, sass), f"{name}: no tensor-core instruction ({wanted})"
            assert not re.search(unwanted, sass), f"{name}: an older generation's instruction ({unwanted})"
            if arch == 80:
                assert "LDGSTS" in sass, f"{name}: its loads are not asynchronous"
                if kernel.__name__ == "coef_kernel":
                    assert "STG.E.128" in sass, f"{name}: its stores are narrow"
            checked.add(kernel.__name__)
    assert checked == set(PRODUCTS)


ALL = [
    (80, 512, "bfloat16", False),
    (90, 512, "float16", False),
    (90, 768, "float32", True),
    (100, 512, "float16", False),
]


def test_compiles_to_tensor_cores_without_spills(tmp_path):
    triton = pytest.importorskip("triton", reason="triton is not installed: nothing to compile with")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"this triton has no {tool.name}: nothing to read machine code with")
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "CLIPKIT_KERNEL_CONFIGS": ""}
    output = command("-W", "ignore", __file__, tmp_path, env=environment).finished()
    # Each of the seven kernels on each of the three architectures.
    assert {line.split(":")[0] for line in output.splitlines() if line.startswith("sm_")} >= {
        f"sm_{arch} {kernel}" for arch in (80, 90, 100) for kernel in PRODUCTS
    }


if __name__ == "__main__":
    for settings in ALL:
        check(*settings, Path(sys.argv[1]))
