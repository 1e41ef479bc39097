"""What a run tells of itself, and that telling it changes no number."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clipkit.data import create_augment, create_tokenizer
from clipkit.losses import create_loss
from clipkit.model import create_model
from clipkit.recipes import pretrain
from clipkit.training.precision import LossScale
from clipkit.training.process import StopRequest
from clipkit.training.record import Record
from clipkit.training.speed import Speed
from tests.recipes.runs import SMALL, lines, only_run, run, weights
from tests.recipes.test_pretrain import numbers

WATCHED = [
    "profile.start=1",
    "profile.steps=2",
    "logger=tensorboard",
    "logger.tensorboard.samples=3",
]


def test_watching_a_run_changes_no_number(tmp_path, shapes):
    """Traced and shown, with augmentation and dropout. That counting draws no number: tests/training/test_speed.py."""
    settings = [*SMALL, shapes, "loss=[clip,simcse]", "data.augmentation.flip=0.5", "steps=4"]
    run(*settings, "logger=none", f"output_dir={tmp_path}/plain")
    said = run(*settings, *WATCHED, f"output_dir={tmp_path}/watched")
    plain, watched = only_run(tmp_path / "plain"), only_run(tmp_path / "watched")
    assert plain.relative_to(tmp_path / "plain") == watched.relative_to(tmp_path / "watched")
    expected = weights(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(watched).items())
    assert numbers(watched) == numbers(plain)

    assert "pairs/s" in next(line for line in said.splitlines() if line.startswith("step 3/4"))
    trained = [line for line in lines(watched) if "train/loss" in line]
    for line in trained:
        assert line["train/pairs_per_second"] * line["train/step_seconds"] == pytest.approx(32)
        assert 0 < line["train/data_seconds"] < line["train/step_seconds"]
        assert line["train/data_fraction"] == pytest.approx(
            line["train/data_seconds"] / line["train/step_seconds"]
        )
        assert "train/tflops" not in line and line["train/infonce"] > 0 and line["train/simcse"] > 0
    assert [path.name for path in (watched / "profile").iterdir()] == ["rank_0.1.pt.trace.json.gz"]
    (session,) = [json.loads(line) for line in (watched / "sessions.jsonl").read_text().splitlines()]
    assert session["step"] == 0 and session["ranks"] == 1

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "tensorboard")).Reload()
    assert [event.step for event in events.Images("samples")] == [4]
    captions = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
    assert len(captions) == 3 and all(line.startswith("    a ") for line in captions)


CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "image_tower": {"name": "timm", "model": "test_resnet", "pretrained": False, "image_size": 32},
    "text_tower": {"name": "transformer", "width": 16, "layers": 1, "heads": 2},
}


def test_a_steps_time_is_of_its_batch_and_its_work_alone(tmp_path, monkeypatch, capsys):
    """A clock that moves by 1 s a batch, 2 s a loss, 1,000 s a checkpoint and an evaluation."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tokenizer = create_tokenizer({"name": "words", "context_length": 8}, captions=["a red star"])
    model = create_model(CONFIG, tokenizer=tokenizer)
    loss = create_loss("infonce")

    def passing(seconds: float, value: Any = None) -> Any:
        now[0] += seconds
        return value

    def batches():
        while True:
            now[0] += 1
            yield {
                "image": torch.zeros(4, 3, 32, 32, dtype=torch.uint8),
                "text": tokenizer(["a red star"] * 4),
            }

    loss.register_forward_hook(lambda *_: passing(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    record = Record(tmp_path, total_steps=5, log_every=2, speed=Speed(4))
    record.start(0)
    now[0] += 500
    pretrain.train(
        model,
        loss,
        batches(),
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        average=None,
        augment=create_augment(None, seed=0),
        steps=range(5),
        device=torch.device("cpu"),
        autocast=nullcontext,
        loss_scale=LossScale("fp32"),
        micro_batch_size=None,
        clip_grad_norm=None,
        max_logit_scale=100.0,
        record=record,
        evaluation=SimpleNamespace(after=lambda step, batch: passing(1000, {})),
        checkpoints=SimpleNamespace(after=lambda step, stopping: passing(1000)),
        skip_nonfinite=False,
        stop=StopRequest(),
        metrics={},
    )
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [2, 4, 5]
    for line in found:
        assert line["train/step_seconds"] == pytest.approx(3) and line["train/data_seconds"] == pytest.approx(
            1
        )
        assert line["train/pairs_per_second"] == pytest.approx(4 / 3)
    assert "1 pairs/s" in capsys.readouterr().out
