"""Some hundred cases of the fuzzer; `python tests/data/fuzz_shards.py 600` for ten minutes."""

from __future__ import annotations

from pathlib import Path

from tests.processes import PATIENCE, fork


def test_damaged_shards_neither_crash_nor_hang(tmp_path):
    program = Path(__file__).with_name("fuzz_shards.py")
    output = fork(program, PATIENCE, 3, 300, cwd=tmp_path).finished()
    assert "300 cases" in output and "good" in output and "corrupt_image" in output
