"""Some of the fuzzer's cases; `python tests/fuzz_runs.py 600` for ten minutes."""

from __future__ import annotations

from pathlib import Path

from tests.processes import PATIENCE, fork


def test_changed_run_folders_are_read_or_told_by_name(tmp_path):
    program = Path(__file__).with_name("fuzz_runs.py")
    output = fork(program, PATIENCE, 4, 60, cwd=tmp_path).finished()
    assert "60 cases" in output and "read" in output and "told" in output
