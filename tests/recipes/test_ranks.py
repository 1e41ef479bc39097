"""The recipe under torchrun on gloo: the same global batches, losses and weights as one process, and an exact resume."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.recipes.runs import ROOT, SMALL, lines, only_run, run, weights

# No BatchNorm and no dropout: what the ranks compute apart is then what one process computes together.
EXACT = ["image_tower=timm", "image_tower.model=test_vit", "image_tower.image_size=null", "text_tower.dropout=0.0",
         "steps=8", "eval=none", "logger=none", "save_every=2"]


def torchrun(*overrides: str, ranks: int = 2, check: bool = True) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
         str(ROOT / "recipes" / "pretrain.py"), *overrides],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True)


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize("micro", ["null", "4"])
def test_two_ranks_train_the_model_of_one_process(tmp_path, shapes, micro):
    settings = [*SMALL, *EXACT, shapes, "loss=cyclip"]
    run(*settings, f"output_dir={tmp_path}/one")
    finished(torchrun(*settings, f"micro_batch_size={micro}", f"output_dir={tmp_path}/two"))
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    for a, b in zip(lines(one), lines(two), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5)
    expected = weights(one)
    for name, tensor in weights(two).items():
        assert torch.allclose(tensor.double(), expected[name].double(), atol=2e-4), name


def test_killed_ranks_resume_to_the_same_bits(tmp_path, shapes):
    settings = [*SMALL, *EXACT, shapes, "loss=[cyclip,simcse]", "text_tower.dropout=0.1"]
    settings.remove("text_tower.dropout=0.0")
    finished(torchrun(*settings, f"output_dir={tmp_path}/whole"))
    process = torchrun(*settings, f"output_dir={tmp_path}/killed")
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("killed/**/step_00000004/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finished(torchrun(*settings, f"output_dir={tmp_path}/killed"))
    whole, killed = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert [line["step"] for line in lines(killed)] == list(range(1, 9))
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(killed).items())


def test_a_batch_that_does_not_divide_is_refused(tmp_path, shapes):
    process = torchrun(*[s for s in SMALL if not s.startswith("batch_size")], *EXACT, shapes, "batch_size=33", f"output_dir={tmp_path}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "batch_size=33 does not divide evenly over 2 ranks" in output
