"""The recipe under torchrun on gloo: the same global batches, losses and weights as one process, and an exact resume."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from PIL import Image

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


def kill_tree(root: int) -> None:
    """SIGKILL to a process and all below it: torchrun starts each rank in a session of its own."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = dict(tuple(map(int, line.split())) for line in listed.splitlines())
    doomed = {root}
    while grown := {pid for pid, parent in parents.items() if parent in doomed} - doomed:
        doomed |= grown
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


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
    """Killed CLIPKIT_KILLS times (1) at random moments."""
    settings = [*SMALL, *EXACT, shapes, "loss=[cyclip,simcse]", "text_tower.dropout=0.1"]
    kills = int(os.environ.get("CLIPKIT_KILLS", "1"))
    steps = 60 + 60 * kills
    settings.remove("text_tower.dropout=0.0")
    settings[settings.index("save_every=2")] = "save_every=10"
    settings[settings.index("steps=8")] = f"steps={steps}"
    finished(torchrun(*settings, f"output_dir={tmp_path}/whole"))
    moments = random.Random(20261122)
    for _ in range(kills):
        process = torchrun(*settings, f"output_dir={tmp_path}/killed")
        while "step" not in process.stdout.readline():
            assert process.poll() is None, "it finished before it could be killed: give it more steps"
        time.sleep(moments.uniform(0, 1.0))
        kill_tree(process.pid)
        process.communicate()
    finished(torchrun(*settings, f"output_dir={tmp_path}/killed"))
    whole, killed = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert [line["step"] for line in lines(killed)] == list(range(1, steps + 1))
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(killed).items())


def test_faults_are_counted_over_ranks_and_across_a_resume_on_another_number(tmp_path):
    """Three of forty pictures are no pictures: each is counted once, whichever rank met it and whenever."""
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(40):
            good = io.BytesIO()
            Image.new("RGB", (32, 32), (6 * number, 90, 40)).save(good, "JPEG")
            bad = number in (3, 17, 30)
            for name, content in ((f"{number:04d}.jpg", b"not a picture" if bad else good.getvalue()), (f"{number:04d}.txt", b"a colour")):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    settings = [s for s in EXACT if not s.startswith(("steps", "save"))] + [
        "data=shards", f"data.train={shard}", "data.tokenizer.name=words", "data.tokenizer.context_length=8", "data.num_workers=0",
        "data.max_bad_fraction=0.2", "batch_size=8", "optim.warmup_steps=1", "log_every=1", "steps=15", f"output_dir={tmp_path}/runs"]
    process = torchrun(*settings, "save_every=1")
    while "step 7/" not in process.stdout.readline():
        assert process.poll() is None
    kill_tree(process.pid)
    process.communicate()
    assert "resumed at step" in run(*settings, "save_every=1")
    summary = json.loads((only_run(tmp_path / "runs") / "summary.json").read_text())
    assert summary["data"]["samples_seen"] == 15 * 8
    assert summary["data"]["skipped"] == {"corrupt_image": 3}


def test_a_batch_that_does_not_divide_is_refused(tmp_path, shapes):
    process = torchrun(*[s for s in SMALL if not s.startswith("batch_size")], *EXACT, shapes, "batch_size=33", f"output_dir={tmp_path}")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "batch_size=33 does not divide evenly over 2 ranks" in output
