"""Runs that are stopped by the clock, a full or read-only disk, or a damaged checkpoint: nothing is lost, and
it is said.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from clipkit.checkpoint import list_checkpoints, load_checkpoint
from clipkit.loading import load_model
from tests.recipes.runs import SMALL, lines, only_run, run, weights

SETTINGS = [*SMALL, "eval=none", "logger=none", "save_every=2", "keep=9", "steps=8", "loss=[clip,simcse]"]


@contextmanager
def small_disk(folder: Path, size: int):
    """A tmpfs of `size` bytes; skips where none may be mounted."""
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs needs root, and a machine that allows it")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shapes) -> Path:
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(*SETTINGS, shapes, f"output_dir={folder}")
    return only_run(folder)


def same_bits(found: Path, expected: Path) -> bool:
    ours, theirs = weights(found), weights(expected)
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def test_a_disk_that_fills_during_a_checkpoint_keeps_the_last_good_one(tmp_path, shapes, whole):
    """Room for two and a half checkpoints: the third is given up with a warning, the run ends in an error,
    and goes on with room.
    """
    one = sum(file.stat().st_size for file in list_checkpoints(whole / "checkpoints")[0].rglob("*"))
    disk = tmp_path / "disk"
    with small_disk(disk, int(2.5 * one)) as remount:
        output = run(*SETTINGS, shapes, f"output_dir={disk}", status=1)
        assert "warning: no checkpoint at step 6" in output and "step_00000004" in output, output
        assert "the final checkpoint could not be written" in output and "No space left" in output, output
        folder = only_run(disk)
        assert [path.name for path in list_checkpoints(folder / "checkpoints")] == [
            "step_00000002",
            "step_00000004",
        ]
        assert not list((folder / "checkpoints").glob(".writing*"))
        remount(f"size={8 * one}")
        assert "resumed at step 4" in run(*SETTINGS, shapes, f"output_dir={disk}")
        assert same_bits(folder, whole)
        assert [line["step"] for line in lines(folder)] == list(range(1, 9))


def test_a_read_only_folder_is_said_before_the_first_step(tmp_path, shapes):
    disk = tmp_path / "disk"
    with small_disk(disk, 1_000_000) as remount:
        remount("ro")
        output = run(*SETTINGS, shapes, f"output_dir={disk}", status=1)
    assert (
        str(disk) in output
        and "give output_dir= a folder you can write" in output
        and "Traceback" not in output
    )


@pytest.mark.parametrize("file", ["optimizer.safetensors", "manifest.json"])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(tmp_path, shapes, whole, file):
    # Stopped after its first step, and after one more.
    run(*SETTINGS, shapes, f"output_dir={tmp_path}", "max_minutes=0", status=75)
    folder = only_run(tmp_path)
    run(*SETTINGS, shapes, f"output_dir={tmp_path}", "max_minutes=0", status=75)
    newest = list_checkpoints(folder / "checkpoints")[-1]
    assert newest.name == "step_00000002"
    os.truncate(newest / file, (newest / file).stat().st_size // 2)
    output = run(*SETTINGS, shapes, f"output_dir={tmp_path}")
    assert "step_00000002 is damaged" in output and "resumed at step 1" in output, output
    assert same_bits(folder, whole)


def test_max_minutes_saves_and_exits_with_its_own_status(tmp_path, shapes, whole):
    output = run(*SETTINGS, shapes, f"output_dir={tmp_path}", "max_minutes=0", status=75)
    assert "stopped by max_minutes=0 at step 1, saved; run the same command to go on" in output
    assert "resumed at step 1" in run(*SETTINGS, shapes, f"output_dir={tmp_path}", "max_minutes=60")
    assert same_bits(only_run(tmp_path), whole)


def test_the_average_is_kept_scored_and_resumed(tmp_path, shapes):
    """average <- d average + (1 - d) weights, d = min(0.5, (1 + t) / (10 + t)) at update t from 0; stopped
    after the first step.
    """
    settings = [*SETTINGS, shapes, "ema_decay=0.5", "steps=4", "save_every=1", f"output_dir={tmp_path}"]
    run(*settings, "max_minutes=0", status=75)
    run(*settings)
    folder = only_run(tmp_path)
    saved = [load_checkpoint(path)["weights"] for path in list_checkpoints(folder / "checkpoints")]
    for t, (before, after) in enumerate(zip(saved, saved[1:]), start=1):
        d = min(0.5, (1 + t) / (10 + t))
        for name in (
            name for name in after if name.startswith("average.") and after[name].is_floating_point()
        ):
            own = after[name.replace("average.", "model.", 1)].double()
            assert torch.allclose(
                after[name].double(), d * before[name].double() + (1 - d) * own, atol=1e-6
            ), name
    model, _, _ = load_model(folder)
    scored = model.state_dict()["text_projection.weight"]
    assert torch.equal(scored, saved[-1]["average.text_projection.weight"])
    assert not torch.equal(scored, saved[-1]["model.text_projection.weight"])
