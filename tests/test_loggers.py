"""Loggers: metrics.jsonl is the record, and a logger that breaks never stops a run."""

from __future__ import annotations

import json
import sys
import types
import warnings

import pytest

from clipkit.loggers import Loggers


def read(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_numbers_are_on_disk_at_once(tmp_path):
    loggers = Loggers(tmp_path, {}, shown={}, start_step=0)
    loggers.log(1, {"train/loss": 2.5})
    assert read(tmp_path) == [{"step": 1, "train/loss": 2.5}]


def test_resume_cuts_later_steps_and_a_half_written_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"'
    )
    loggers = Loggers(tmp_path, {}, shown={}, start_step=2)
    loggers.log(3, {"a": 30})
    loggers.close()
    assert read(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 30}]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = Loggers(tmp_path, {"tensorboard": {}}, shown={}, start_step=0)
    loggers.log(5, {"train/loss": 0.25})
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(5, 0.25)]


def test_an_unknown_logger_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'wandb'"):
        Loggers(tmp_path, {"wandbb": {}}, shown={}, start_step=0)


@pytest.mark.parametrize("broken", ["missing", "at init", "at log"])
def test_a_broken_wandb_is_said_once_and_training_goes_on(tmp_path, monkeypatch, broken):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    fake = types.ModuleType("wandb")
    fake.run, fake.Settings, fake.finish = None, lambda **settings: None, lambda **settings: None
    fake.init = fail if broken == "at init" else lambda **settings: types.SimpleNamespace(log=fail)
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "missing" else fake)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loggers = Loggers(tmp_path, {"wandb": {}}, shown={}, start_step=0)
        for step in range(1, 4):
            loggers.log(step, {"loss": 1.0})
        loggers.close()
    assert len([w for w in caught if "wandb" in str(w.message)]) == 1
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]


def test_wandb_offline_leaves_a_run_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="logger")
        loggers = Loggers(tmp_path, {"wandb": {"mode": "offline"}}, shown={"seed": 1}, start_step=0)
        loggers.log(1, {"loss": 1.0})
        loggers.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
