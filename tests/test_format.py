"""The checkout is formatted and free of what the linter finds."""

from __future__ import annotations

import pytest

from tests.processes import ROOT, command


@pytest.mark.parametrize("check", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(check):
    pytest.importorskip("ruff", reason="ruff is not installed: nothing to check the format with")
    command("-m", "ruff", *check, "--no-cache", ".", cwd=ROOT).finished()
