"""A few seconds of the fuzzer; `python tests/data/fuzz_shards.py 600` for ten minutes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_damaged_shards_neither_crash_nor_hang(tmp_path):
    program = Path(__file__).with_name("fuzz_shards.py")
    result = subprocess.run(
        [sys.executable, str(program), "4", "3"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(re.search(r"(\d+) cases", result.stdout)[1]) > 20
    assert "good" in result.stdout and "corrupt_image" in result.stdout
