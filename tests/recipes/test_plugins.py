"""A package outside of this repository: a loss, a tower, a task and YAML, used by name in every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clipkit.command import plugins
from tests.processes import ROOT, fork
from tests.recipes.runs import SMALL, lines, only_run

PARTS = """
import torch
from torch import nn

from clipkit.evals import register_task
from clipkit.evals.sources import open_source
from clipkit.losses.registry import register_loss
from clipkit.towers import TextTower, register_text_tower


@register_loss("their_loss")
class TheirLoss(nn.Module):
    inputs = ("image_features", "text_features")

    def __init__(self, *, power: float = 2.0):
        super().__init__()
        self.power = power

    def forward(self, image_features, text_features):
        return (image_features - text_features).norm(dim=1).pow(self.power).mean()


@register_text_tower("their_tower")
class TheirTower(TextTower):
    def __init__(self, *, vocab_size, pad_id, eot_id, context_length, columns: int = 8):
        super().__init__()
        self.table = nn.Embedding(vocab_size, columns)
        self.width, self.num_layers, self.pooling = columns, 0, "mean"
        self.vocab_size, self.pad_id, self.eot_id, self.context_length = vocab_size, pad_id, eot_id, context_length

    @property
    def has_dropout(self):
        return False

    @property
    def token_embedding(self):
        return self.table

    def tokens(self, text):
        return self.table(text)

    def layer_of(self, name):
        return 0

    def blocks(self):
        return []


@register_task("their_task")
class TheirTask:
    metrics = ("mean",)

    def __init__(self, *, shards):
        self.source = open_source("their_task", shards=shards)

    def __call__(self, encoder):
        return {"mean": float(encoder.images(self.source).image_features.mean())}
"""
PARTS += """

import hashlib
import io

from PIL import Image

from clipkit.data import DataError, SampleSet, Tokenizer, register_data, register_tokenizer


class Colours(SampleSet):
    def __init__(self, count, side):
        super().__init__([f"colours {n}" for n in range(4)], [count // 4] * 4)
        self.side = side

    def key(self, sample):
        return f"colour {sample}"

    def image(self, sample):
        if sample % 16 == 3:
            raise DataError("missing_image")
        file = io.BytesIO()
        Image.new("RGB", (self.side, self.side), (sample % 7 * 30, sample % 5 * 40, sample % 3 * 80)).save(file, "PNG")
        return file.getvalue()

    def captions(self, sample):
        return [f"{sample % 7} red, {sample % 5} green, {sample % 3} blue"]


@register_data("colours")
def colours(train, settings, cache_dir):
    return Colours(int(train), **settings)


@register_tokenizer("letters")
class Letters(Tokenizer):
    name = "letters"

    def __init__(self, *, context_length: int = 16, letters: int = 26):
        self.context_length, self.letters = context_length, letters
        self.pad_id, self.sot_id, self.eot_id, self.vocab_size = 0, 1, 2, letters + 3

    def ids(self, text):
        return [3 + ord(letter) % self.letters for letter in text]

    def state(self):
        return {"context_length": self.context_length, "letters": self.letters}
"""
YAML = {
    "data/colours.yaml": "defaults: [shards, _self_]\nkind: colours\ntrain: '128'\nsource: {side: 40}\n"
    "tokenizer:\n  name: letters\n  context_length: 20\n  letters: 30\n",
    "loss/their_loss.yaml": "their_loss:\n  weight: 0.5\n  power: 2.0\n",
    "text_tower/their_tower.yaml": "name: their_tower\ncolumns: 8\ncontext_length: null\n",
    "eval/their_task.yaml": "their_task:\n  kind: their_task\n  shards: ${data.val}\n",
    "experiment/theirs.yaml": "# @package _global_\ndefaults:\n  - override /text_tower: their_tower\n"
    "  - override /loss: [clip, their_loss]\n  - override /eval: their_task\nsteps: 3\nwarmup_steps: 1\n",
}


@pytest.fixture
def package(tmp_path) -> Path:
    folder = tmp_path / "their_package"
    for name, text in YAML.items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / name).write_text(text)
    for name, text in {"__init__.py": "", "conf/__init__.py": "", "parts.py": PARTS}.items():
        (folder / name).write_text(text)
    return folder


def run(folder: Path, *arguments: str, recipe: str = "pretrain.py", status: int = 0) -> str:
    return fork(ROOT / "recipes" / recipe, *arguments, cwd=folder.parent).finished(status)


def test_pretrain_sweep_evaluate_and_report_use_it_by_name(package, shapes):
    settings = [
        "plugins=[their_package.parts]",
        "experiment=theirs",
        *SMALL[:3],
        "num_threads=1",
        "log_every=1",
        shapes,
    ]
    run(package, *settings, "logger=none", "output_dir=runs")
    folder = only_run(package.parent / "runs")
    assert {"train/infonce", "train/their_loss"} <= lines(folder)[0].keys()
    assert "their_task/mean" in json.loads((folder / "summary.json").read_text())["metrics"]
    evaluated = run(
        package,
        f"checkpoint={folder}",
        "plugins=[their_package.parts]",
        "trust_paths=true",
        recipe="evaluate.py",
    )
    assert "their_task" in evaluated
    output = run(package, *settings, "logger=none", "output_dir=sweep", "seed=0,1", recipe="sweep.py")
    assert "2 of 2 jobs finished" in output and "their_task" in output
    run(package, str(folder), "--output", str(package / "report.html"), "--no-models", recipe="report.py")
    assert "their_task" in (package / "report.html").read_text()
    # A stranger's folder does not say what is imported.
    refused = run(package, f"checkpoint={folder}", "trust_paths=true", recipe="evaluate.py", status=1)
    assert "'their_task'" in refused and "Traceback" not in refused


def test_data_and_a_tokenizer_of_ones_own_train_resume_and_are_read_back(package):
    settings = ["plugins=[their_package.parts]", "data=colours", "data.max_bad_fraction=0.2", "batch_size=32"]
    settings += ["steps=6", "warmup_steps=1", "num_threads=1", "log_every=1", "eval=none", "logger=none"]
    settings += ["data.num_workers=1", "save_every=3", "keep=9"]
    run(package, *settings, "output_dir=runs")
    folder = only_run(package.parent / "runs")
    whole = lines(folder)
    summary = json.loads((folder / "summary.json").read_text())
    # 8 of 128 in the first epoch; the second is half read.
    assert summary["data"]["samples_seen"] == 6 * 32 and summary["data"]["skipped"]["missing_image"] >= 8
    assert json.loads((folder / "checkpoints/step_00000006/tokenizer.json").read_text()) == {
        "tokenizer": "letters", "context_length": 20, "letters": 30
    }  # fmt: skip
    # As it was after step 3.
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    (folder / "summary.json").unlink()
    assert "resumed at step 3" in run(package, *settings, "output_dir=runs")
    assert [line["train/loss"] for line in lines(folder)] == [line["train/loss"] for line in whole]
    message = run(package, *settings, "data.kind=colors", "output_dir=bad", status=1)
    assert "unknown data.kind 'colors'" in message and "colours" in message and "Traceback" not in message
    message = run(package, *settings, "+data.tokenizer.leters=3", "output_dir=bad", status=1)
    assert "letters" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plugins=[their_package.parts]", "loss.their_loss.pwoer=1", "experiment=theirs"], "power"),
        (["plugins=[their_package.parts]", "experiment=theirs", "+text_tower.colums=9"], "columns"),
        (["plugins=[their_packag]"], "no such package"),
        (
            ["plugins=[their_package.nothing]", "steps=5", "warmup_steps=1"],
            "their_package.nothing could not be imported",
        ),
        (["loss=their_loss"], "their_loss"),
    ],
    ids=str,
)
def test_mistakes_in_it_are_told(arguments, message, package, shapes):
    output = run(package, *arguments, shapes, *SMALL[:2], "output_dir=runs", status=1)
    assert message in output and "Traceback" not in output


def test_their_file_of_our_name_is_refused(package, monkeypatch):
    (package / "conf" / "optim").mkdir()
    (package / "conf" / "optim" / "adamw.yaml").write_text("lr: 1.0\n")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(ValueError, match=r"adamw\.yaml has the name of clipkit's own"):
        plugins.search(["their_package.parts"])
