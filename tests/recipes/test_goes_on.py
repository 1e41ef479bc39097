"""A run that goes on elsewhere: other ranks, micro-batches, workers, and data that has moved."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.recipes.runs import SMALL, lines, only_run, ranks, run


def test_a_run_goes_on_with_other_ranks_micro_batches_workers_and_moved_data(tmp_path):
    # No BatchNorm, whose statistics are of a rank's share, and no dropout, whose masks each rank draws.
    tower = ["image_tower=timm", "image_tower.model=test_vit", "image_tower.image_size=null"]
    quiet = ["text_tower.dropout=0.0", "eval=none", "logger=none"]
    settings = [*SMALL, *tower, *quiet, "steps=8", "save_every=4", "keep=9"]
    run(*settings, f"output_dir={tmp_path}/whole", f"data.shapes.folder={tmp_path}/shapes")
    whole = only_run(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "cut")
    # As it was after step 4.
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_00000008")
    (tmp_path / "cut" / "summary.json").unlink()
    shutil.move(tmp_path / "shapes", tmp_path / "moved")
    other = [
        "micro_batch_size=8",
        "data.num_workers=1",
        f"data.shapes.folder={tmp_path}/moved",
        "save_every=3",
    ]
    started = ranks(*settings, *other, f"hydra.run.dir={tmp_path}/cut")
    output = "".join(rank.finished() for rank in started)
    assert "resumed at step 4" in output and "goes on with data.shapes.folder" in output
    found, expected = lines(tmp_path / "cut"), lines(whole)
    assert [line["step"] for line in found] == list(range(1, 9))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
    assert json.loads((tmp_path / "cut" / "summary.json").read_text())["finished"]
