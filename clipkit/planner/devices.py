"""The datasheets of conf/gpu by the names that devices give themselves."""

from __future__ import annotations

import functools
from pathlib import Path

import yaml

import clipkit
from clipkit.planner.plan import GPU


@functools.cache
def known_gpus() -> dict[str, GPU]:
    """{torch.cuda.get_device_name(): its figures}."""
    found = {}
    for path in sorted((Path(clipkit.__file__).parent / "conf" / "gpu").glob("*.yaml")):
        gpu = GPU(**yaml.safe_load(path.read_text(encoding="utf-8")))
        found |= dict.fromkeys(gpu.device_names, gpu)
    return found


def peak_tflops(device_name: str, arithmetic: str) -> float | None:
    """1e12 multiplications and additions a second of a device, by its datasheet, dense.

    Args:
        device_name: torch.cuda.get_device_name(); another spelling, such as a part of a divided GPU, is not known.
        arithmetic: "bf16", "tf32" or "fp32".

    Returns:
        None where it is not known.
    """
    gpu = known_gpus().get(device_name)
    if gpu is None:
        return None
    return {"bf16": gpu.bf16_tflops, "tf32": gpu.tf32_tflops, "fp32": gpu.fp32_tflops}[arithmetic]
