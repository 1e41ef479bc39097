"""The recipe on two gloo ranks: an exact resume after kills, and faults counted once."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
import time

import pytest
import torch
from PIL import Image

from tests.recipes.runs import SMALL, kill, lines, only_run, ranks, run, run_ranks, weights

# No BatchNorm and no dropout: what the ranks compute apart is then what one process computes together.
EXACT = [
    "image_tower=timm",
    "image_tower.model=test_vit",
    "image_tower.image_size=null",
    "text_tower.dropout=0.0",
    "steps=8",
    "eval=none",
    "logger=none",
    "save_every=2",
]


@pytest.mark.slow
def test_killed_ranks_resume_to_the_same_bits(tmp_path, shapes):
    """Killed CLIPKIT_KILLS times (1) at random moments."""
    settings = [*SMALL, *EXACT, shapes, "loss=[cyclip,simcse]", "text_tower.dropout=0.1"]
    kills = int(os.environ.get("CLIPKIT_KILLS", "1"))
    steps = 60 + 60 * kills
    settings.remove("text_tower.dropout=0.0")
    settings[settings.index("save_every=2")] = "save_every=10"
    settings[settings.index("steps=8")] = f"steps={steps}"
    run_ranks(*settings, f"output_dir={tmp_path}/whole")
    moments = random.Random(20261122)
    for _ in range(kills):
        job = ranks(*settings, f"output_dir={tmp_path}/killed")
        job[0].wait_for("step ")
        time.sleep(moments.uniform(0, 1.0))
        kill(job)
    run_ranks(*settings, f"output_dir={tmp_path}/killed")
    whole, killed = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert [line["step"] for line in lines(killed)] == list(range(1, steps + 1))
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(killed).items())


def test_faults_are_counted_over_ranks_and_across_a_resume_on_another_number(tmp_path):
    """Three of forty pictures are no pictures: each is counted once an epoch, whichever rank met it and whenever."""
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as tar:
        for number in range(40):
            good = io.BytesIO()
            Image.new("RGB", (32, 32), (6 * number, 90, 40)).save(good, "JPEG")
            bad = number in (3, 17, 30)
            for name, content in (
                (f"{number:04d}.jpg", b"not a picture" if bad else good.getvalue()),
                (f"{number:04d}.txt", b"a colour"),
            ):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    settings = [s for s in EXACT if not s.startswith(("steps", "save"))] + [
        "data=shards",
        f"data.train={shard}",
        "data.tokenizer.name=words",
        "data.tokenizer.context_length=8",
        "data.num_workers=0",
        "data.max_bad_fraction=0.2",
        "batch_size=8",
        "warmup_steps=1",
        "log_every=1",
        "steps=15",
        f"output_dir={tmp_path}/runs",
    ]
    job = ranks(*settings, "save_every=1")
    job[0].wait_for("step 7/")
    kill(job)
    assert "resumed at step" in run(*settings, "save_every=1")
    summary = json.loads((only_run(tmp_path / "runs") / "summary.json").read_text())
    assert summary["data"]["samples_seen"] == 15 * 8
    assert summary["data"]["skipped"] == {"corrupt_image": 3 * 3}


def test_a_batch_that_does_not_divide_is_refused(tmp_path, shapes):
    job = ranks(
        *[s for s in SMALL if not s.startswith("batch_size")],
        *EXACT,
        shapes,
        "batch_size=33",
        f"output_dir={tmp_path}",
    )
    for rank in job:
        assert "batch_size=33 does not divide evenly over 2 ranks" in rank.finished(status=1)
