"""What goes wrong in mid-run costs what it touches: evaluations, steps that are not finite, disks, a second process."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from clipkit.checkpoint import list_checkpoints, load_checkpoint
from tests.processes import ROOT, fork
from tests.recipes.runs import SMALL, lines, only_run, ranks, run, start, weights
from tests.recipes.test_interrupted import same_bits, small_disk

QUIET = [*SMALL, "logger=none"]
NONFINITE = Path(__file__).with_name("nonfinite_run.py")


def nonfinite(*overrides: str, steps: str, status: int = 0) -> str:
    return fork(NONFINITE, *overrides, env={"NONFINITE_STEPS": steps}).finished(status)


def test_a_step_that_is_not_finite_is_left_out_and_leaves_nothing_behind(tmp_path, shapes):
    """The image tower has BatchNorm, whose statistics a forward pass writes."""
    settings = [*QUIET, shapes, f"output_dir={tmp_path}", "eval=none", "steps=6", "save_every=2", "keep=9"]
    output = nonfinite(*settings, steps="3,5", status=1)
    assert "not finite at step 3" in output and "skip_nonfinite=1" in output
    output = nonfinite(*settings, "skip_nonfinite=1", steps="3,5", status=1)
    assert "left out, 1 of skip_nonfinite=1" in output and "not finite at step 5" in output
    output = nonfinite(*settings, "skip_nonfinite=2", steps="3,5")
    folder = only_run(tmp_path)
    # The count goes on where the checkpoint stands.
    assert "resumed at step 4" in output and "left out, 2 of skip_nonfinite=2" in output
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == [3, 5]
    assert [line["step"] for line in lines(folder) if "train/loss" in line] == [1, 2, 4, 6]
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())

    def state(step):
        return load_checkpoint(folder / "checkpoints" / f"step_{step:08d}")

    # Up to its schedule the run is as if it had stood still.
    before, after = state(2), state(4)
    moments = [name for name in before["optimizer"] if name.endswith(".step")]
    assert {int(before["optimizer"][name]) for name in moments} == {2}
    assert {int(after["optimizer"][name]) for name in moments} == {3}
    assert after["train_state"]["schedule"]["last_epoch"] == 4
    tracked = [name for name in after["weights"] if name.endswith("num_batches_tracked")]
    assert tracked and {int(after["weights"][name]) for name in tracked} == {3}


def test_a_run_goes_on_with_another_rate_and_keeps_it(tmp_path, shapes):
    settings = [*QUIET, shapes, f"output_dir={tmp_path}", "eval=none", "steps=8", "save_every=2", "keep=9"]
    settings += ["schedule=constant", "warmup_steps=0"]
    nonfinite(*settings, steps="4", status=1)
    output = nonfinite(*settings, "amend={optim.lr: 0.0001, clip_grad_norm: 0.5}", steps="4", status=1)
    assert "from step 2 on: optim.lr=0.0001, clip_grad_norm=0.5" in output
    run(*settings)
    folder = only_run(tmp_path)
    rates = {line["step"]: line["train/lr"] for line in lines(folder)}
    assert rates[2] != pytest.approx(1e-4) and all(rates[n] == pytest.approx(1e-4) for n in range(3, 9))
    saved = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    assert saved["config"]["optim"]["lr"] == 1e-4 and saved["config"]["clip_grad_norm"] == 0.5
    assert json.loads((folder / "history.jsonl").read_text())["step"] == 2


def broken_set(folder: Path, shapes: str) -> str:
    """A validation set without a readable picture, of drawn shapes; returns the setting that names it."""
    (good,) = Path(shapes.partition("=")[2]).rglob("val/*.tar")
    folder.mkdir()
    with tarfile.open(good) as source, tarfile.open(folder / "val.tar", "w") as target:
        for member in source:
            content = source.extractfile(member).read()
            if member.name.endswith((".jpg", ".png", ".webp")):
                content = content[: len(content) // 3]
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return f"eval.retrieval.shards={folder / 'val.tar'}"


def test_an_evaluation_that_fails_in_mid_run_costs_no_step(tmp_path, shapes):
    run(*QUIET, shapes, f"output_dir={tmp_path / 'draw'}", "eval=none", "steps=3")
    setting = broken_set(tmp_path / "broken", shapes)
    settings = [
        *QUIET,
        shapes,
        f"output_dir={tmp_path / 'runs'}",
        "steps=4",
        "save_every=0",
        "eval_every=2",
        setting,
    ]
    output = run(*settings, status=1)
    assert "warning: the evaluation after step 2 failed" in output and "Training goes on" in output
    assert "the evaluation after the last step failed" in output and "val.tar" in output
    folder = only_run(tmp_path / "runs")
    assert [path.name for path in list_checkpoints(folder / "checkpoints")] == ["step_00000004"]
    # Mended, the same command scores it and takes no step.
    (good,) = Path(shapes.partition("=")[2]).rglob("val/*.tar")
    shutil.copy(good, tmp_path / "broken" / "val.tar")
    assert "resumed at step 4" in run(*settings)
    found = lines(folder)
    assert [line["step"] for line in found if "train/loss" in line] == [1, 2, 3, 4]
    (scored,) = [line for line in found if any(name.startswith("eval/retrieval") for name in line)]
    manifest = json.loads((folder / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert (
        scored["step"] == 4
        and manifest["metrics"] == json.loads((folder / "summary.json").read_text())["metrics"]
    )


def test_a_stop_before_an_evaluation_scores_that_step_after(tmp_path, shapes):
    """The evaluations of a run that was stopped are those of one that was not."""
    settings = [*QUIET, shapes, "steps=6", "save_every=2", "eval_every=2", "keep=9"]
    run(*settings, f"output_dir={tmp_path / 'whole'}")
    whole = only_run(tmp_path / "whole")
    run(*settings, f"output_dir={tmp_path / 'cut'}")
    cut = only_run(tmp_path / "cut")
    # As if it had been killed between the checkpoint of step 4 and its evaluation.
    shutil.rmtree(cut / "checkpoints" / "step_00000006")
    (cut / "summary.json").unlink()
    manifest = cut / "checkpoints" / "step_00000004" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "metrics": {}}))
    assert "resumed at step 4" in run(*settings, f"output_dir={tmp_path / 'cut'}")
    assert same_bits(cut, whole)

    def scores(folder):
        return [
            {name: value for name, value in line.items() if name == "step" or name.startswith("eval/")}
            for line in lines(folder)
            if any(name.startswith("eval/") for name in line)
        ]

    assert scores(cut) == scores(whole) and [line["step"] for line in scores(whole)] == [2, 4, 6]


def test_a_second_process_in_the_folder_is_refused_and_harms_nothing(tmp_path, shapes):
    settings = [
        *QUIET,
        shapes,
        f"output_dir={tmp_path}",
        "eval=none",
        "steps=100000",
        "save_every=1",
        "keep=2",
    ]
    first = start(*settings)
    first.wait_for("step 2/")
    output = run(*settings, status=1)
    assert f"process {first.pid} on" in output and "is training in" in output and "Traceback" not in output
    refused = "".join(rank.finished(1) for rank in ranks(*settings))
    assert refused.count(f"process {first.pid} on") >= 2
    folder = only_run(tmp_path)
    assert not (folder / "error.txt").exists()
    seen = first.output.count("step ")
    first.wait_for(f"step {seen + 3}/")
    assert "no checkpoint at step" not in first.output
    first.kill()
    # The dead hold nothing.
    again = start(*settings)
    again.wait_for("resumed at step")
    again.wait_for("step 9")
    again.kill()


def test_a_full_disk_costs_records_and_is_said_once(tmp_path, shapes):
    """Not a byte left after the first steps: the run goes on to its end, and says what is missing."""
    disk = tmp_path / "disk"
    with small_disk(disk, 1 << 20) as remount:
        settings = [*QUIET, shapes, f"output_dir={disk}", "eval=none", "steps=30", "save_every=10"]
        process = start(*settings)
        process.wait_for("step 1/")
        try:
            with open(disk / "filler", "wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
        except OSError:
            pass
        output = process.finished(1)
        assert "step 29/30" in output and "Traceback" not in output
        assert output.count("could not be written to") <= 2
        assert "the final checkpoint could not be written" in output
        (disk / "filler").unlink()
        remount(f"size={64 << 20}")
        run(*settings)


def test_a_run_folder_that_is_deleted_in_mid_run_is_made_again(tmp_path, shapes):
    settings = [*QUIET, shapes, f"output_dir={tmp_path}", "eval=none", "steps=60", "save_every=30"]
    process = start(*settings)
    process.wait_for("step 1/")
    folder = only_run(tmp_path)
    # The run may write into it meanwhile.
    shutil.rmtree(folder, ignore_errors=True)
    assert not (folder / "config.yaml").exists()
    output = process.finished()
    assert "Final numbers" in output
    (summary,) = tmp_path.rglob("summary.json")
    assert list_checkpoints(summary.parent / "checkpoints")


def test_what_memory_the_trainer_and_its_workers_take_is_on_record(tmp_path, shapes):
    run(*QUIET, shapes, f"output_dir={tmp_path}", "eval=none", "steps=3", "data.num_workers=1")
    for line in lines(only_run(tmp_path)):
        assert 0.1 < line["train/memory_gb"] < 100 and 0.05 < line["train/workers_memory_gb"] < 100
    assert torch.get_num_threads() >= 1


def test_an_error_on_the_first_rank_reaches_all_with_its_text(tmp_path, shapes):
    settings = [*QUIET, shapes, f"output_dir={tmp_path}", "eval=none", "steps=3"]
    run(*settings)
    folder = only_run(tmp_path)
    (folder / "config.yaml").write_text("")
    shutil.rmtree(folder / "checkpoints")
    for number, rank in enumerate(ranks(*settings)):
        output = rank.finished(1)
        assert "config.yaml is empty" in output, (number, output)
    assert (ROOT / "recipes").is_dir()
