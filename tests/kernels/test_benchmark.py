"""The GPU benchmark's stages, rehearsed in Triton's interpreter from a source tree without git."""

from __future__ import annotations

import json

import pytest

from tests.processes import ROOT, command

pytest.importorskip("triton", reason="triton is not installed: the kernels cannot run, interpreted or not")


@pytest.mark.slow
def test_stages_leave_their_files_and_go_on_past_a_failure(tmp_path):
    out = tmp_path / "losses.md"
    tools = tmp_path / "bin"
    tools.mkdir()
    environment = {"PATH": str(tools), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    given = ("--rehearse", "--out", out, "--stages", "parity,rate,sigmoid")
    command("-W", "ignore", ROOT / "benchmarks" / "losses.py", *given, env=environment).finished()
    parity, rate, sigmoid = (
        json.loads((tmp_path / f"losses-{stage}.json").read_text()) for stage in ("parity", "rate", "sigmoid")
    )
    ours = parity["results"]["parity of clipkit InfoNCE, float16"]
    assert ours["problem"] == "" and 0 < ours["x, scale 100"] < 1e-3
    # A peer that is not installed says so in full, and costs nobody else a turn.
    assert (
        "No module named 'siglip_kernel'" in sigmoid["results"]["parity of siglip-kernel, sigmoid"]["problem"]
    )
    assert len(sigmoid["results"]["clipkit sigmoid, float16, N=160, D=64"]["both"]) == 2
    text = out.read_text()
    assert "not a git checkout" in text and "stage infonce: not run" in text
    assert rate["results"]["rate"]["flops"] > 0
