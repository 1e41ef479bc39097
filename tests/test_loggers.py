"""Loggers: metrics.jsonl is the record, and a logger that breaks never stops a run."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
import types
import warnings

import numpy as np
import pytest
import torch

from clipkit.loggers import Loggers, check_loggers
from clipkit.loggers import loggers as registry


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


def test_sessions_of_one_run_are_one_run_offline(tmp_path, monkeypatch):
    """The real package, without a network: each session leaves a folder, all of the id that the run folder keeps."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = {"mode": "offline", "group": "g", "tags": ["a", "b"], "notes": "n", "samples": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="logger")
        for start in (0, 1):
            if start:
                # A folder's name has its second.
                time.sleep(1.1)
            loggers = Loggers(tmp_path, {"wandb": settings}, shown={"seed": 1}, start_step=start)
            loggers.log(start + 1, {"loss": 1.0})
            loggers.log_samples(start + 1, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["a star", "a circle"])
            loggers.close()
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    folders = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{run_id}") for folder in folders)
    for folder in folders:
        (record,) = folder.glob("*.wandb")
        assert b"a star" in record.read_bytes() and len(list(folder.glob("files/media/images/*.png"))) == 1


class FakeWandb(types.ModuleType):
    """Keeps what wandb.init was given."""

    def __init__(self):
        super().__init__("wandb")
        self.run, self.inits = None, []

    def Settings(self, **settings):  # noqa: N802
        return settings

    def init(self, **given):
        self.inits.append(given)
        return types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_a_resumed_run_asks_wandb_for_its_own_run(tmp_path, wandb):
    chosen = {"mode": "online", "project": "p", "entity": "e", "group": "g", "tags": ["t"], "notes": "n"}
    for start in (0, 200):
        Loggers(tmp_path, {"wandb": chosen}, shown={"seed": 1}, start_step=start).close()
    first, second = wandb.inits
    assert first == second and first["resume"] == "allow" and first["id"]
    assert {key: first[key] for key in chosen} == chosen and first["config"] == {"seed": 1}
    Loggers(tmp_path / "other", {"wandb": chosen}, shown={}, start_step=0).close()
    assert wandb.inits[2]["id"] != first["id"]


@pytest.mark.parametrize(
    "content", ["../../x", "", "a b", "a" * 65, "x\ny", "x/y", "\u00e9", "?id", "z" * 5000, "fifo", "folder"]
)
def test_a_strangers_run_id_is_used_only_if_it_can_be_one(tmp_path, wandb, content):
    path = tmp_path / "wandb_run_id.txt"
    if content == "fifo":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.warns(UserWarning, match="wandb_run_id.txt"):
        Loggers(tmp_path, {"wandb": {}}, shown={}, start_step=0).close()
    if content == "folder":
        # Nothing can be kept there, so the logger is left out.
        assert not wandb.inits
        return
    (given,) = wandb.inits
    assert re.fullmatch("[a-z0-9]{8}", given["id"]) and path.read_text().strip() == given["id"]


def test_tensorboard_shows_a_step_that_is_made_again_once(tmp_path):
    """Killed after step 6 with nothing saved, then after step 5 with a checkpoint of step 4."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, last in ((0, 6), (0, 5), (4, 7)):
        loggers = Loggers(tmp_path, {"tensorboard": {}}, shown={"lr": 0.1}, start_step=start)
        for step in range(start + 1, last + 1):
            loggers.log(step, {"train/loss": 10.0 * start + last + step})
        loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [
        *[(step, 5.0 + step) for step in (1, 2, 3, 4)],
        *[(step, 47.0 + step) for step in (5, 6, 7)],
    ]
    settings = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert settings == "    lr: 0.1\n"


def test_tensorboard_shows_pictures_and_captions_as_they_are(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loggers = Loggers(tmp_path, {"tensorboard": {"samples": 2}}, shown={}, start_step=0)
    assert loggers.samples == 2
    loggers.log_samples(9, images, ["# a *star*", "<b>two</b>", "three"])
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (picture,) = events.Images("samples")
    shown = torch.from_numpy(np.array(Image.open(io.BytesIO(picture.encoded_image_string)))).permute(2, 0, 1)
    assert picture.step == 9
    for image in images[:2]:
        assert any(torch.equal(image, shown[:, :, x : x + 8]) for x in range(shown.shape[2] - 7))
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    # Indented by four: Markdown leaves it alone.
    assert text == "    # a *star*\n    <b>two</b>\n"


def test_a_logger_of_ones_own_needs_to_know_nothing_of_pictures(tmp_path):
    class Plain:
        def __init__(self, run_dir, *, shown, start_step):
            pass

        def log(self, step, metrics):
            pass

        def close(self):
            pass

    registry.register("plain")(Plain)
    try:
        loggers = Loggers(tmp_path, {"plain": {}}, shown={}, start_step=0)
        assert loggers.samples == 0
        loggers.log_samples(1, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [""])
        loggers.close()
    finally:
        del registry._entries["plain"]


WRONG = [
    ("tensorboard", "samples", -1),
    ("tensorboard", "samples", "all"),
    ("tensorboard", "samples", True),
    ("wandb", "tags", "one"),
    ("wandb", "tags", [1]),
    ("wandb", "mode", "of-line"),
    ("wandb", "group", 3),
    ("wandb", "init_timeout", "long"),
]


@pytest.mark.parametrize(("name", "key", "value"), WRONG)
def test_a_setting_of_another_kind_is_an_error_before_anything_is_built(name, key, value):
    with pytest.raises(ValueError, match=f"logger.{name}.{key}"):
        check_loggers({name: {key: value}})


def test_the_settings_of_our_files_are_of_their_kind():
    check_loggers(
        {
            "tensorboard": {"samples": 8},
            "wandb": {"tags": ["a"], "notes": None, "init_timeout": 5, "mode": "online"},
        }
    )
