"""A run that goes on elsewhere and for longer: other ranks, micro-batches, workers, moved data, more steps."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.recipes.runs import SMALL, lines, only_run, ranks, run

# No BatchNorm, whose statistics are of a rank's share, and no dropout, whose masks each rank draws.
TOWER = ["image_tower=timm", "image_tower.model=test_vit", "image_tower.image_size=null"]
SETTINGS = [*SMALL, *TOWER, "text_tower.dropout=0.0", "eval=none", "logger=none", "save_every=4", "keep=9"]
WSD = ["steps=12", "schedule=wsd", "cooldown_steps=4"]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_ranks_micro_batches_workers_and_moved_data_and_for_longer(
    compiled, tmp_path
):
    run(*SETTINGS, *WSD, f"output_dir={tmp_path}/whole", f"data.shapes.folder={tmp_path}/shapes")
    begun = [*SETTINGS, "schedule=constant", f"output_dir={tmp_path}/cut"]
    run(*begun, "steps=4", f"data.shapes.folder={tmp_path}/shapes")
    cut = only_run(tmp_path / "cut")
    shutil.move(tmp_path / "shapes", tmp_path / "moved")
    other = ["micro_batch_size=8", "data.num_workers=1", f"data.shapes.folder={tmp_path}/moved"]
    other += ["save_every=3", f"compile={compiled}"]
    started = ranks(*begun, *other, "steps=8", f"hydra.run.dir={cut}")
    output = "".join(rank.finished() for rank in started)
    assert "resumed at step 4" in output and "goes on with data.shapes.folder" in output
    assert "from step 4 on: steps=8" in output
    # The first command finds its folder, and tells it so.
    moved = f"data.shapes.folder={tmp_path}/moved"
    run(
        *begun,
        "steps=4",
        moved,
        f"hydra.run.dir={cut}",
        "amend={steps: 12, schedule: wsd, cooldown_steps: 4}",
    )
    found, expected = lines(cut), lines(only_run(tmp_path / "whole"))
    assert [line["step"] for line in found] == list(range(1, 13))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert ours["train/lr"] == pytest.approx(theirs["train/lr"])
    history = [json.loads(line) for line in (cut / "history.jsonl").read_text().splitlines()]
    assert [(line["step"], line["settings"]) for line in history] == [
        (4, {"steps": 8}),
        (8, {"steps": 12, "schedule": "wsd", "cooldown_steps": 4}),
    ]
    # Finished: told nothing new, it only reports.
    assert "is finished" in run(*begun, "steps=4", moved, f"hydra.run.dir={cut}")
    assert json.loads((cut / "summary.json").read_text())["step"] == 12


def test_a_run_whose_rate_has_fallen_cannot_be_made_longer(tmp_path):
    cosine = [*SETTINGS, "schedule=cosine", "steps=4", f"output_dir={tmp_path}"]
    run(*cosine)
    before = sorted((path, path.stat().st_mtime_ns) for path in only_run(tmp_path).rglob("*.safetensors"))
    output = run(*cosine, "amend={steps: 6}", status=1)
    assert "4 steps were taken by schedule=cosine over 4 steps" in output and "name=ANOTHER" in output
    assert "is finished" in run(*cosine)
    assert before == sorted(
        (path, path.stat().st_mtime_ns) for path in only_run(tmp_path).rglob("*.safetensors")
    )


@pytest.mark.slow
def test_a_run_is_made_longer_by_epochs(tmp_path):
    shapes = f"data.shapes.folder={tmp_path}/shapes"
    constant = [*SETTINGS, "schedule=constant", "warmup_steps=0", "steps=null", shapes]
    run(*constant, "epochs=2", f"output_dir={tmp_path}/whole")
    run(*constant, "epochs=1", f"output_dir={tmp_path}/cut")
    run(*constant, "epochs=1", "amend={epochs: 2}", f"output_dir={tmp_path}/cut")
    found, expected = lines(only_run(tmp_path / "cut")), lines(only_run(tmp_path / "whole"))
    assert [line["train/loss"] for line in found] == [line["train/loss"] for line in expected]
