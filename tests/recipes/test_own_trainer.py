"""Each own-trainer example, run as a user would, beside a bare loop of the papers' formulas on the same
batches.

The loops here use plain torch alone: the curve that a trainer with clipkit's loss has to reach comes from
elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clipkit.data import create_augment
from clipkit.losses import create_loss
from clipkit.recipes import pretrain
from clipkit.training.evaluation import Evaluation
from clipkit.training.precision import LossScale
from clipkit.training.process import StopRequest
from clipkit.training.record import Record
from clipkit.training.speed import Speed
from tests.processes import ROOT, command

FOLDER = ROOT / "recipes" / "own_trainer"
STEPS, BATCH = 8, 32
# fp32, another order of sums and 8 steps of AdamW on losses of 3 to 5.
TOLERANCE = {"rtol": 2e-5, "atol": 0.0}


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")


def curve(script, *options, ranks=1):
    """The losses that an example prints as its last line."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start.append(Path(__file__).with_name("ending.py"))
    arguments = [*(start if ranks > 1 else []), FOLDER / script]
    arguments += ["--steps", str(STEPS), "--batch-size", str(BATCH), *options]
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    output = command(*arguments, env=environment).finished()
    lines = [line for line in output.splitlines() if line.startswith('{"losses"')]
    assert len(lines) == 1, output
    losses = json.loads(lines[0])["losses"]
    assert len(losses) == STEPS
    return torch.tensor(losses)


@pytest.fixture
def example(monkeypatch):
    """Import an example as its neighbours do."""
    monkeypatch.syspath_prepend(FOLDER)
    loaded = []

    def load(name):
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in {*loaded, "pairs"}:
        sys.modules.pop(name, None)


def train(parameters, steps, loss, learning_rate):
    """The bare loop: loss(batch), backward, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses, steps = [], list(steps)
    for batch in steps:
        value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert loss(steps[0]) < losses[0], "the reference must learn, or equal curves would show little"
    return torch.tensor(losses)


def cyclip(features, in_modal=0.25, cross_modal=0.25):
    """InfoNCE (Radford et al. 2021, figure 3) + 0.05 CyCLIP consistency (Goel et al. 2022, section 2)."""
    x, y, scale = features["image_features"], features["text_features"], features["logit_scale"]
    rows = len(x)
    labels = torch.arange(rows)
    logits = scale * x @ y.T
    infonce = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    similar = x @ y.T
    cross = (similar - similar.T).square().sum() / rows
    within = (x @ x.T - y @ y.T).square().sum() / rows
    return infonce + 0.05 * (in_modal * within + cross_modal * cross)


@pytest.fixture
def pairs_curve(example):
    """The curve of the small dual encoder that three of the examples train."""
    pairs = example("pairs")
    model = pairs.SmallDualEncoder()
    steps = pairs.batches(pairs.make_pairs(STEPS * BATCH), BATCH)
    return train(model.parameters(), steps, lambda batch: cyclip(model(batch)), pairs.LEARNING_RATE)


def test_plain_ddp_with_micro_batches(pairs_curve):
    """Two ranks, each in four micro-batches, against one process."""
    losses = curve("plain_ddp.py", "--micro-batch-size", "4", ranks=2)
    torch.testing.assert_close(losses, pairs_curve, **TOLERANCE)


@pytest.mark.slow
def test_lightning_on_two_processes(pairs_curve):
    needs("lightning")
    losses = curve("lightning_trainer.py", "--devices", "2", "--accelerator", "cpu")
    torch.testing.assert_close(losses, pairs_curve, **TOLERANCE)


def test_hugging_face_trainer_on_two_processes(pairs_curve):
    needs("transformers", "accelerate")
    losses = curve("hf_trainer.py", ranks=2)
    torch.testing.assert_close(losses, pairs_curve, **TOLERANCE)


@pytest.mark.slow
def test_accelerate_on_two_processes(pairs_curve):
    needs("accelerate")
    losses = curve("accelerate_loop.py", ranks=2)
    torch.testing.assert_close(losses, pairs_curve, **TOLERANCE)


@pytest.mark.slow
def test_sentence_transformers_trainer(example):
    needs("sentence_transformers", "accelerate", "datasets")
    module = example("sentence_transformers_trainer")
    model = module.make_model()
    tokenizer, weight = model[0].tokenizer, torch.nn.Parameter(model[0].embedding.weight.detach().clone())

    def embed(sentences):
        rows = [
            weight[tokenizer.encode(sentence, add_special_tokens=False).ids].mean(0) for sentence in sentences
        ]
        return F.normalize(torch.stack(rows), dim=-1)

    def supervised_simcse(columns):
        """Gao et al. 2021, equation 5, at temperature 0.05."""
        premise, entailment, contradiction = (embed(sentences) for sentences in columns)
        logits = torch.cat([premise @ entailment.T, premise @ contradiction.T], dim=1) / 0.05
        return F.cross_entropy(logits, torch.arange(len(premise)))

    columns = module.make_triplets(STEPS * BATCH).values()
    steps = [[column[k : k + BATCH] for column in columns] for k in range(0, STEPS * BATCH, BATCH)]
    expected = train([weight], steps, supervised_simcse, importlib.import_module("pairs").LEARNING_RATE)
    torch.testing.assert_close(curve("sentence_transformers_trainer.py"), expected, **TOLERANCE)


@pytest.mark.slow
def test_open_clip_model_with_either_loss(example):
    """open_clip's model on two ranks with clipkit's loss, against one process with open_clip's ClipLoss."""
    needs("open_clip")
    module, pairs = example("open_clip_loss"), example("pairs")
    model, clip_loss = module.make_model(), module.open_clip.ClipLoss()

    def loss(batch):
        return clip_loss(**model(batch["image"] / 255, batch["text"]))

    steps = pairs.batches(pairs.make_pairs(STEPS * BATCH), BATCH)
    expected = train(model.parameters(), steps, loss, pairs.LEARNING_RATE)
    torch.testing.assert_close(curve("open_clip_loss.py", ranks=2), expected, **TOLERANCE)


@pytest.mark.parametrize("micro_batch_size", [None, 8])
def test_the_recipes_own_loop_reaches_the_same_curve(example, pairs_curve, tmp_path, micro_batch_size):
    """recipes/pretrain.py's train() on the examples' model and batches; no checkpoint, no score."""
    pairs = example("pairs")

    class Model(pairs.SmallDualEncoder):
        logit_scale = property(lambda self: self.log_logit_scale.exp()[0])

        def clamp_logit_scale(self, most):
            assert self.logit_scale < most

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=pairs.LEARNING_RATE, weight_decay=0.0)
    record = Record(tmp_path, total_steps=STEPS, speed=Speed(BATCH), log_every=1)
    record.start(0)
    device = torch.device("cpu")
    checkpoints: Any = SimpleNamespace(after=lambda step, stopping: None, score=lambda step, metrics: None)
    pretrain.train(
        model,
        create_loss(pairs.LOSS),
        pairs.batches(pairs.make_pairs(STEPS * BATCH), BATCH),
        optimizer,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        average=None,
        augment=create_augment(None, seed=0),
        steps=range(STEPS),
        device=device,
        autocast=nullcontext,
        loss_scale=LossScale("fp32"),
        micro_batch_size=micro_batch_size,
        clip_grad_norm=None,
        max_logit_scale=100.0,
        record=record,
        evaluation=Evaluation(
            model,
            None,
            {},
            model_config={},
            device=device,
            batch_size=1,
            total_steps=STEPS,
            record=record,
            checkpoints=checkpoints,
        ),
        checkpoints=checkpoints,
        skip_nonfinite=False,
        stop=StopRequest(),
        metrics={},
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = torch.tensor([line["train/loss"] for line in lines if "train/loss" in line])
    torch.testing.assert_close(losses, pairs_curve, **TOLERANCE)
