"""Checkpoints: whole or absent, verified when read, and the same random numbers after a restore."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import torch

from clipkit import checkpoint
from clipkit.checkpoint import (
    best_checkpoint,
    find_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    rng_state,
    save_checkpoint,
    set_rng_state,
    split_weights,
)


def save(folder: Path, step: int, **metrics: float) -> Path:
    weights = {"model.weight": torch.full((3,), float(step)), "loss.head": torch.ones(2)}
    return save_checkpoint(
        folder,
        step,
        weights=weights,
        train_state={"rng": [rng_state()], "lr": 0.1},
        config={"seed": step},
        metrics=metrics,
    )


def test_what_was_saved_comes_back(tmp_path):
    loaded = load_checkpoint(save(tmp_path, 7, accuracy=0.5))
    assert loaded["step"] == 7 and loaded["config"] == {"seed": 7} and loaded["metrics"] == {"accuracy": 0.5}
    assert split_weights(loaded["weights"], "model")["weight"].tolist() == [7.0, 7.0, 7.0]
    assert list(split_weights(loaded["weights"], "loss")) == ["head"]
    assert loaded["train_state"]["lr"] == 0.1


def test_random_numbers_continue_after_a_restore(tmp_path):
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    state = load_checkpoint(save(tmp_path, 1))["train_state"]["rng"][0]
    expected = draw()
    draw()
    set_rng_state(state)
    assert draw() == expected


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    file = bad / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="step_00000002 is damaged"):
        assert latest_checkpoint(tmp_path) == good
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(bad)


def test_a_kill_while_writing_leaves_the_older_checkpoint(tmp_path):
    """The process dies between the files and the rename: nothing with a final name may be there."""
    save(tmp_path, 1)
    program = textwrap.dedent(f"""
        import os, signal, torch
        from clipkit import checkpoint
        os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save_checkpoint({str(tmp_path)!r}, 2, weights={{"model.w": torch.ones(9)}}, train_state={{}}, config={{}})
    """)
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert any(path.name.startswith(".writing-") for path in tmp_path.iterdir())
    save(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_failed_write_is_an_os_error_and_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not Path("/dev/full").exists(),
    reason="needs root to mount a small tmpfs",
)
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        good = save(small, 1)
        with pytest.raises(OSError):
            save_checkpoint(small, 2, weights={"model.w": torch.ones(1_000_000)}, train_state={}, config={})
        assert latest_checkpoint(small) == good
        assert [path.name for path in small.iterdir()] == ["step_00000001"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, accuracy in enumerate([0.1, 0.9, 0.3, 0.2, 0.4], start=1):
        save(tmp_path, step, accuracy=accuracy)
    prune(tmp_path, keep=2, metric="accuracy")
    assert [int(path.name[-1]) for path in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert best_checkpoint(tmp_path, "accuracy").name == "step_00000002"
    assert best_checkpoint(tmp_path, "absent") is None
    with pytest.raises(ValueError, match="keep >= 1"):
        prune(tmp_path, keep=0)


def test_a_run_folder_and_a_checkpoint_folder_are_both_found(tmp_path):
    path = save(tmp_path / "checkpoints", 3)
    assert find_checkpoint(tmp_path) == path == find_checkpoint(path)
    with pytest.raises(ValueError, match="no checkpoint at .*nowhere"):
        find_checkpoint(tmp_path / "nowhere")


def test_a_pickle_in_the_training_state_is_refused(tmp_path):
    """A checkpoint from elsewhere must not run code, even with a manifest that fits."""

    class Trap:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    path = save(tmp_path, 1)
    torch.save({"trap": Trap()}, path / "train.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["train.pt"] = checkpoint._sha256(path / "train.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="[Ww]eights.only"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
