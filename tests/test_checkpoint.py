"""Checkpoints: whole or absent, verified when read, and the same random numbers after a restore."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import psutil
import pytest
import torch

from clipkit import checkpoint
from clipkit.checkpoint import (
    add_metrics,
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
from clipkit.data.tokenizers import Words
from clipkit.loading import load_model, model_config, with_architecture
from clipkit.model import create_model
from tests import faults
from tests.damage import DAMAGE
from tests.towers.test_hugging_face_tower import SIZES


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
    with pytest.raises(ValueError, match="train.pt was not loaded"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "train.pt", "config.json", "manifest.json")


def save_whole(folder: Path, step: int) -> Path:
    weights = {"model.weight": torch.full((300,), float(step))}
    return save_checkpoint(
        folder,
        step,
        weights=weights,
        optimizer={"optimizer.0.exp_avg": torch.ones(300)},
        train_state={"rng": [rng_state()]},
        config={"seed": step},
        metrics={"task/top1": step / 10},
    )


@pytest.mark.parametrize("file", CHECKPOINT_FILES)
@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_to_any_file_is_passed_over(file, kind, tmp_path, recwarn):
    """The newest is damaged: the one before is taken, the best is told, old ones go, and loading it is one error."""
    for step in (1, 2, 3):
        save_whole(tmp_path, step)
    damaged = tmp_path / "step_00000003"
    DAMAGE[kind](damaged / file)
    assert latest_checkpoint(tmp_path).name == "step_00000002"
    if kind not in ("fifo", "missing", "folder") or file != "manifest.json":
        assert "step_00000003 is damaged" in str(recwarn.list[0].message)
        with pytest.raises(ValueError, match=rf"{damaged}.*is damaged"):
            load_checkpoint(damaged)
    best = best_checkpoint(tmp_path, "task/top1")
    if file != "manifest.json":
        assert best.name == "step_00000003"
    elif kind != "one_bit":
        assert best.name == "step_00000002"
    assert prune(tmp_path, keep=1, metric="task/top1") == []
    assert len(save_whole(tmp_path, 4).name) and latest_checkpoint(tmp_path).name == "step_00000004"


@pytest.mark.parametrize(
    "change",
    [
        {"step": "3"},
        {"step": None},
        {"metrics": []},
        {"metrics": {"a": "b"}},
        {"sha256": []},
        {"sha256": {}},
        {"sha256": {"config.json": 3}},
        {"sha256": {"../x": "0" * 64}},
        {"sha256": {"/etc/passwd": "0" * 64}},
        {"sha256": {"a//b": "0" * 64}},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_passed_over(change, tmp_path):
    old, new = save_whole(tmp_path, 1), save_whole(tmp_path, 2)
    manifest = json.loads((new / "manifest.json").read_text())
    given = {**manifest, **change}
    if isinstance(change.get("sha256"), dict) and "config.json" not in change["sha256"] and change["sha256"]:
        given["sha256"] = {**manifest["sha256"], **change["sha256"]}
    (new / "manifest.json").write_text(json.dumps(given))
    with pytest.warns(UserWarning, match=r"step_00000002 is damaged .*manifest\.json"):
        assert latest_checkpoint(tmp_path) == old
    assert best_checkpoint(tmp_path, "task/top1") == old
    prune(tmp_path, keep=1, metric="task/top1")


def test_a_manifest_that_lists_too_few_files_is_passed_over(tmp_path):
    for left_out in ("train.pt", "config.json", "model.safetensors", "optimizer.safetensors"):
        old, new = save_whole(tmp_path, 1), save_whole(tmp_path, 2)
        manifest = json.loads((new / "manifest.json").read_text())
        del manifest["sha256"][left_out]
        (new / "manifest.json").write_text(json.dumps(manifest))
        with pytest.warns(UserWarning, match=f"does not list {left_out}"):
            assert latest_checkpoint(tmp_path) == old


def test_a_metric_that_is_not_a_number_is_never_the_best(tmp_path):
    for step, value in ((1, 0.5), (2, float("nan")), (3, float("inf")), (4, 0.1)):
        save(tmp_path, step, accuracy=value)
    assert best_checkpoint(tmp_path, "accuracy").name == "step_00000001"


def test_an_old_checkpoint_that_cannot_be_deleted_is_said(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)
    monkeypatch.setattr(checkpoint.os, "replace", raise_busy)
    problems = prune(tmp_path, keep=1)
    assert len(problems) == 2 and "step_00000001 could not be deleted" in problems[0]


def raise_busy(*given):
    raise OSError(16, "Device or resource busy")


def test_a_score_is_added_to_a_checkpoint_that_stays_good(tmp_path):
    path = save(tmp_path, 3)
    add_metrics(path, {"task/top1": 0.5})
    assert latest_checkpoint(tmp_path) == path and best_checkpoint(tmp_path, "task/top1") == path
    assert load_checkpoint(path)["metrics"] == {"task/top1": 0.5}


def test_all_files_may_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        path = save_whole(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


def test_the_model_is_read_without_the_state_of_training(tmp_path):
    path = save_whole(tmp_path, 1)
    for name in ("train.pt", "optimizer.safetensors"):
        (path / name).write_bytes(b"unreadable")
    assert find_checkpoint(tmp_path) == path
    loaded = load_checkpoint(path, training=False)
    assert loaded["weights"]["model.weight"].tolist() == [1.0] * 300 and "train_state" not in loaded
    with pytest.raises(ValueError, match="no checkpoint"), pytest.warns(UserWarning):
        find_checkpoint(tmp_path, training=True)


def each_save(folder: Path):
    """What a run does to its checkpoints: the next one, its score, and the oldest away."""
    path = save_whole(folder, 3)
    add_metrics(path, {"task/top1": 0.9})
    prune(folder, keep=2, metric="task/top1")


def two_saved(folder: Path) -> Path:
    folder.mkdir()
    for step in (1, 2):
        save_whole(folder, step)
    return folder


def test_a_save_that_fails_at_any_call_loses_nothing(tmp_path):
    calls = faults.count_calls(lambda: each_save(two_saved(tmp_path / "whole")))
    assert {"replace", "fsync", "save", "save_file"} <= set(calls)
    survived = 0
    for number in range(1, len(faults.count_calls(lambda: each_save(two_saved(tmp_path / "counted")))) + 1):
        for error in faults.ERRORS:
            folder = two_saved(tmp_path / f"{number}-{error}")
            try:
                with faults.at_call(number, faults.raising(error)):
                    each_save(folder)
            except OSError as problem:
                assert str(problem)
            newest = latest_checkpoint(folder)
            assert newest.name in ("step_00000002", "step_00000003")
            assert load_checkpoint(newest)["weights"]["model.weight"][0] == int(newest.name[-1])
            # The next one is written, and takes what was left away.
            save_whole(folder, 4)
            assert latest_checkpoint(folder).name == "step_00000004"
            assert not list(folder.glob(".*"))
            survived += 1
    assert survived >= 3 * len(faults.CALLS)


def test_a_kill_at_any_call_of_a_save_loses_nothing(tmp_path):
    kills = 0
    for number in range(1, 200):
        folder = two_saved(tmp_path / str(number))
        if not faults.killed_at(number, lambda folder=folder: each_save(folder)):
            break
        kills += 1
        newest = latest_checkpoint(folder)
        assert newest.name in ("step_00000002", "step_00000003")
        assert load_checkpoint(newest)["weights"]["model.weight"][0] == int(newest.name[-1])
        save_whole(folder, 4)
        assert latest_checkpoint(folder).name == "step_00000004" and not list(folder.glob(".*"))
    assert 10 < kills < 199


@pytest.mark.parametrize("family", ["roberta", "bert", "t5", "distilbert"])
def test_a_checkpoint_needs_no_folder_that_its_text_tower_came_from(family, tmp_path):
    """Its sizes are kept, spare rows of its embeddings too; the folder is gone, or another machine's."""
    tokenizer = Words(vocabulary=["red", "circle"], context_length=8)
    transformers = pytest.importorskip("transformers")
    settings = transformers.AutoConfig.for_model(
        family, vocab_size=tokenizer.vocab_size + 5, pad_token_id=tokenizer.pad_id, **SIZES[family]
    )
    source = tmp_path / "source"
    peer = transformers.T5EncoderModel if family == "t5" else transformers.AutoModel
    (peer(settings) if family == "t5" else peer.from_config(settings)).save_pretrained(source)
    config = {
        "embed_dim": 8,
        "image_tower": {"name": "timm", "model": "test_resnet", "pretrained": False},
        "text_tower": {"name": "hf", "pretrained": str(source), "context_length": 8},
    }
    model = create_model(model_config(config), tokenizer=tokenizer).eval()
    path = save_checkpoint(
        tmp_path / "checkpoints",
        1,
        weights={f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        train_state={},
        config=with_architecture(config),
        tokenizer=tokenizer,
    )
    shutil.rmtree(source)
    again, _, found = load_model(path)
    tokens = tokenizer(["a red circle", "circle"])
    assert torch.equal(again.encode_text(tokens), model.encode_text(tokens))
    assert found["text_tower"] == config["text_tower"]


def hostile(tmp_path: Path, change) -> Path:
    """A good checkpoint whose settings a stranger has changed, with hashes that fit."""
    tokenizer = Words(vocabulary=["red", "circle"], context_length=8)
    config = {
        "embed_dim": 8,
        "image_tower": {"name": "timm", "model": "test_resnet", "pretrained": False},
        "text_tower": {"name": "transformer", "width": 16, "heads": 2, "layers": 1},
    }
    model = create_model(model_config(config), tokenizer=tokenizer)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    change(config, weights)
    return save_checkpoint(tmp_path, 1, weights=weights, train_state={}, config=config, tokenizer=tokenizer)


def setting(tower: str, **changes):
    def change(config, weights):
        config[tower] = {**config[tower], **changes}

    return change


HOSTILE = {
    "wide": setting("text_tower", width=10**9),
    "deep": setting("text_tower", layers=10**7),
    "deep, as a number of several": setting("image_tower", name="clip_resnet50", layers=[10**6, 1, 1, 1]),
    "no heads": setting("text_tower", heads=0),
    "negative": setting("text_tower", width=-16),
    "text for a number": setting("text_tower", width="wide"),
    "nested": setting("text_tower", width={"a": 1}),
    "large pictures": setting("image_tower", image_size=10**8),
    "long texts": setting("text_tower", context_length=10**8),
    "a folder elsewhere": setting("image_tower", model="local-dir:/etc"),
    "another folder": setting("text_tower", name="hf", pretrained="/etc"),
    "a name without end": setting("image_tower", model="a" * 5000),
    "no tower": setting("text_tower", name="evil"),
    "no embedding": lambda config, weights: config.pop("embed_dim"),
    "a list": lambda config, weights: config.update(image_tower=[1, 2]),
    "a weight too many": lambda config, weights: weights.update({"model.more": torch.ones(1)}),
    "a weight too few": lambda config, weights: weights.pop("model.log_logit_scale"),
    "another shape": lambda config, weights: weights.update({"model.log_logit_scale": torch.ones(7)}),
    "no weights": lambda config, weights: weights.clear(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_settings_that_did_not_make_the_weights_are_refused_before_memory_is_taken(kind, tmp_path):
    path = hostile(tmp_path, HOSTILE[kind])
    before = psutil.Process().memory_info().rss
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        load_model(path)
    assert psutil.Process().memory_info().rss - before < 5e8
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        load_model(tmp_path)


def test_a_fifo_in_the_place_of_a_checkpoint_holds_nobody_up(tmp_path):
    save(tmp_path, 1)
    os.mkfifo(tmp_path / "step_00000002")
    os.mkfifo(tmp_path / ".removed-step_00000009-1")
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000001"
    assert latest_checkpoint(tmp_path) and save(tmp_path, 2) == latest_checkpoint(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_00000001", "step_00000002"]
