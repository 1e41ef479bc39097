"""What reading small files with extreme pictures in them adds to a process's memory, in MB: for test_decode.py."""

from __future__ import annotations

import gc
import io
import json
import re
from pathlib import Path

import psutil
from PIL import Image

from clipkit.data.decode import decode_eval
from clipkit.evals.items import load_image


def png(mode: str, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, "PNG", compress_level=9)
    return out.getvalue()


def peak(read, data: bytes) -> float:
    """MB above what the process had: the kernel's own high-water mark."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    read(data, 224)
    high = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return (high - before) / 1e6


if __name__ == "__main__":
    for read in (decode_eval, load_image):
        read(png("RGB", (300, 300)), 224)
    peaks = {
        "decode_eval 4000x1": peak(decode_eval, png("L", (4000, 1))),
        "load_image 1x4000": peak(load_image, png("L", (1, 4000))),
        "decode_eval 16 bits": peak(decode_eval, png("I;16", (6000, 6000))),
        "decode_eval alpha": peak(decode_eval, png("LA", (6000, 6000))),
    }
    print(json.dumps(peaks))
