"""One gradient on 1, 2 and 4 gloo ranks, DDP and FSDP2, with and without gradient caching, and
across resumes.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from clipkit.checkpoint import latest_checkpoint
from clipkit.loading import load_model
from tests.processes import children, wait_until
from tests.recipes.runs import SMALL, kill, lines, only_run, ranks, run, run_ranks, torchrun, weights

STEPS = 20
# No BatchNorm and no dropout: what the ranks compute apart is then what one process computes together.
EXACT = [
    "image_tower=timm",
    "image_tower.model=test_vit",
    "image_tower.image_size=null",
    "text_tower.dropout=0.0",
    "loss=[cyclip,nli_softmax]",
    # Adam's own 1e-8 turns the rounding of a gradient that is zero (an attention key's bias) into steps.
    "optim.eps=1e-5",
    # What the tolerance was measured at, whatever the experiment has.
    "optim.lr=2e-3",
    "text_tower.width=128",
    "schedule=constant",
    "ema_decay=0.9",
    f"steps={STEPS}",
    "eval=none",
    "logger=none",
    "save_every=5",
    "keep=9",
]


@pytest.fixture(scope="module")
def settings(shapes, tmp_path_factory) -> list[str]:
    # Labelled pairs, so that the loss has parameters of its own.
    pairs = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    colours, labels = ("red", "green", "blue"), ("entailment", "neutral", "contradiction")
    pairs.write_text(
        "".join(
            f'{{"premise": "a {colours[i % 3]} square", "hypothesis": "a {colours[i % 2]} shape", "label": "{labels[i % 3]}"}}\n'
            for i in range(96)
        )
    )
    return [*SMALL, *EXACT, shapes, f"data.sentences.pairs={pairs}", "data.sentences.batch_size=8"]


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory) -> Path:
    """The run of a single process."""
    folder = tmp_path_factory.mktemp("one")
    run(*settings, f"output_dir={folder}")
    return only_run(folder)


def same(found: Path, expected: Path) -> None:
    """Loss curve and final weights, the average's too, within 1e-5."""
    theirs = lines(expected)
    assert (
        [line["step"] for line in lines(found)]
        == [line["step"] for line in theirs]
        == list(range(1, STEPS + 1))
    )
    for a, b in zip(theirs, lines(found), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-5), b["step"]
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and {name.split(".")[0] for name in ours} == {
        "model",
        "loss",
        "average",
    }
    worst = max(
        (float((tensor.double() - theirs[name].double()).abs().max()), name) for name, tensor in ours.items()
    )
    assert worst[0] < 1e-5, worst


def test_the_run_moves_far_beyond_the_tolerance(one):
    """Weights within 1e-5 of each other would mean nothing if training moved them no further."""
    losses = [line["train/loss"] for line in lines(one)]
    assert max(losses) - min(losses) > 0.1
    final, average = weights(one), "average.text_projection.weight"
    assert (final[average] - final["model.text_projection.weight"]).abs().max() > 1e-3


COMBINATIONS = [
    pytest.param(
        *(world_size, parallel, micro),
        marks=pytest.mark.slow if world_size == 4 or (parallel, micro) == ("fsdp", "3") else (),
    )
    for world_size in (2, 4)
    for parallel in ("ddp", "fsdp")
    for micro in ("null", "3")
]


@pytest.mark.parametrize(("world_size", "parallel", "micro"), COMBINATIONS)
def test_ranks_train_the_model_of_one_process(one, settings, tmp_path, world_size, parallel, micro):
    run_ranks(
        *settings,
        f"parallel={parallel}",
        f"micro_batch_size={micro}",
        f"output_dir={tmp_path}",
        world_size=world_size,
    )
    same(only_run(tmp_path), one)
    sharded = (latest_checkpoint(only_run(tmp_path) / "checkpoints") / "shards").is_dir()
    assert sharded == (parallel == "fsdp")


@pytest.mark.parametrize(
    "parallel, others",
    [
        ("fsdp", 1),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (("ddp", 1), ("ddp", 4), ("fsdp", 4))),
    ],
)
def test_two_ranks_go_on_as_one_or_four(one, settings, tmp_path, parallel, others):
    """The same samples in the same order: each step's loss is the uninterrupted run's."""
    settings = [*settings, f"parallel={parallel}", f"output_dir={tmp_path}"]
    job = ranks(*settings)
    job[0].wait_for("step 12/")
    kill(job)
    output = run(*settings) if others == 1 else run_ranks(*settings, world_size=others)
    assert "resumed at step 10" in output
    same(only_run(tmp_path), one)
    # What evaluation and export read is the average, in full.
    model, _, _ = load_model(only_run(tmp_path))
    average = weights(one)["average.text_projection.weight"]
    assert torch.allclose(model.text_projection.weight, average, atol=1e-5)


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_killed_rank_ends_the_others_and_the_job_continues(one, settings, tmp_path, parallel):
    process = torchrun(*settings, f"parallel={parallel}", f"output_dir={tmp_path}")
    process.wait_for("step 7/")
    job = children(process.pid)
    assert len(job) == 2
    job[-1].kill()
    output = process.finished(status=None)
    assert "lost another rank" in output and "the run goes on from its last checkpoint" in output, output
    wait_until(lambda: not any(rank.is_running() for rank in job))
    assert "resumed at step 5" in run_ranks(*settings, f"parallel={parallel}", f"output_dir={tmp_path}")
    same(only_run(tmp_path), one)


def test_sigterm_to_torchrun_saves_on_every_rank(one, settings, tmp_path):
    process = torchrun(*settings, "parallel=fsdp", "save_every=0", f"output_dir={tmp_path}")
    process.wait_for("step 3/")
    process.signal(signal.SIGTERM)
    output = process.finished(status=None)
    assert "stopped by SIGTERM at step" in output and "run the same command to go on" in output, output
    assert latest_checkpoint(only_run(tmp_path) / "checkpoints") is not None
    assert "resumed at step" in run(*settings, "parallel=fsdp", "save_every=0", f"output_dir={tmp_path}")
    same(only_run(tmp_path), one)


def test_a_loss_that_is_not_finite_stops_every_rank_with_its_samples(settings, tmp_path):
    for rank in ranks(*settings, "optim.lr=1e30", "clip_grad_norm=null", f"output_dir={tmp_path}"):
        assert "is not finite at step" in rank.finished(status=1)
    records = sorted(only_run(tmp_path).glob("nonfinite_step_*.json"))
    assert [("rank_1" in record.name) for record in records] == [False, True]
    keys = [json.loads(record.read_text())["keys"] for record in records]
    assert len(set(keys[0] + keys[1])) == 32
