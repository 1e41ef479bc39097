"""Some thousand cases of the fuzzers; `python tests/data/fuzz_shards.py 600` or fuzz_readers.py for ten minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import PATIENCE, fork


def test_damaged_shards_neither_crash_nor_hang(tmp_path):
    program = Path(__file__).with_name("fuzz_shards.py")
    output = fork(program, PATIENCE, 3, 300, cwd=tmp_path).finished()
    assert "300 cases" in output and "good" in output and "corrupt_image" in output


@pytest.mark.parametrize("cases", [1500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_named(tmp_path, cases):
    program = Path(__file__).with_name("fuzz_readers.py")
    output = fork(program, PATIENCE, cases, cases, cwd=tmp_path).finished()
    assert f"{cases} cases" in output
    for reader in ("tokenizer", "packed_table", "class_tar", "cifar", "sts", "embeddings"):
        assert f'"{reader} read"' in output and f'"{reader} refused"' in output
