"""The main job in processes of its own, on data the package draws itself."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from clipkit.losses import list_losses
from tests.processes import wait_until
from tests.recipes.runs import SMALL, lines, only_run, run, start, typed, weights


def test_a_run_leaves_the_folder_of_the_design_and_is_not_repeated(tmp_path, shapes):
    overrides = [*SMALL, shapes, f"output_dir={tmp_path}", "steps=4"]
    output = typed(*overrides)
    folder = only_run(tmp_path)
    assert "step 4/4" in output and "zero_shot" in output and str(folder) in output
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"] and summary["step"] == 4 and summary["data"]["samples_seen"] == 4 * 32
    assert summary["metrics"]["retrieval/text_to_image_R@5"] >= 0 and "torch" in summary["versions"]
    trained = [line for line in lines(folder) if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4]
    assert any("eval/zero_shot/top1" in line for line in lines(folder))
    assert list((folder / "checkpoints").glob("step_00000004/model.safetensors")) and list(
        folder.glob("tensorboard/*")
    )
    again = run(*overrides)
    assert "is finished" in again and "step 1/" not in again

    evaluated = run(
        f"checkpoint={folder}",
        f"output={tmp_path}/numbers.json",
        f"output_dir={tmp_path}/hydra",
        # The run's data lies elsewhere, and its own settings say so.
        "trust_paths=true",
        recipe="evaluate.py",
    )
    assert "zero_shot" in evaluated
    assert json.loads((tmp_path / "numbers.json").read_text())["metrics"] == pytest.approx(
        summary["metrics"], abs=1e-6
    )


def test_a_killed_run_goes_on_to_the_bits_of_an_uninterrupted_one(tmp_path, shapes):
    """SIGKILL after a checkpoint, the same command again: same weights, and no step missing or doubled in the
    record.
    """
    loss = "loss=[cyclip,simcse]"
    settings = [*SMALL, shapes, loss, "steps=14", "save_every=3", "eval=none", "logger=none"]
    run(*settings, f"output_dir={tmp_path}/whole")
    process = start(*settings, f"output_dir={tmp_path}/killed")
    wait_until(lambda: list(tmp_path.glob("killed/**/step_00000006/manifest.json")), process)
    process.signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(tmp_path.glob("killed/**/summary.json"))
    output = run(*settings, f"output_dir={tmp_path}/killed")
    assert "resumed at step" in output
    whole, killed = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert [line["step"] for line in lines(killed)] == list(range(1, 15))
    sessions = [json.loads(line)["step"] for line in (killed / "sessions.jsonl").read_text().splitlines()]
    assert sessions == [0, int(output.split("resumed at step ")[1].split()[0])]
    for ours, theirs in zip(lines(killed), lines(whole)):
        assert ours["train/loss"] == theirs["train/loss"]
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(killed).items())


@pytest.mark.slow
def test_kills_at_random_moments_change_no_bit(tmp_path, shapes):
    """Several epochs with two decoding workers and evaluations, killed CLIPKIT_KILLS times (2): the weights and
    numbers of an uninterrupted run.
    """
    kills = int(os.environ.get("CLIPKIT_KILLS", "2"))
    steps = 100 + 50 * kills
    settings = [
        *SMALL,
        shapes,
        "loss=[cyclip,simcse]",
        "data.num_workers=2",
        "data.cache=none",
        f"steps={steps}",
        "save_every=4",
        "eval_every=10",
        "logger=none",
    ]
    run(*settings, f"output_dir={tmp_path}/whole")
    moments = random.Random(20261122)
    for _ in range(kills):
        process = start(*settings, f"output_dir={tmp_path}/killed")
        process.wait_for("step ")
        time.sleep(moments.uniform(0, 1.5))
        assert process.status is None, "it finished before it could be killed: give it more steps"
        process.kill()
    run(*settings, f"output_dir={tmp_path}/killed")
    whole, killed = only_run(tmp_path / "whole"), only_run(tmp_path / "killed")
    assert numbers(killed) == numbers(whole)
    assert [line["step"] for line in lines(killed) if "train/loss" in line] == list(range(1, steps + 1))
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(killed).items())


def numbers(folder: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the system's memory decides."""
    other = ("second", "seconds", "memory_gb", "data_fraction")
    return [{key: value for key, value in line.items() if not key.endswith(other)} for line in lines(folder)]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path, shapes):
    """Zero-shot every 2 of 6 steps, the newest one kept: what is left is the last and the best, labelled by
    its own numbers. Other tasks have their own times.
    """
    metric = "zero_shot/top5"
    run(
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        "steps=6",
        "eval=[shapes,validation_loss]",
        "eval_every={zero_shot: 2, validation_loss: 3}",
        "save_every=3",
        "keep=1",
        f"best_metric={metric}",
        "logger=none",
    )
    folder = only_run(tmp_path)
    scores = {line["step"]: line[f"eval/{metric}"] for line in lines(folder) if f"eval/{metric}" in line}
    assert list(scores) == [2, 4, 6]
    for name, steps in (("validation_loss/infonce", [3, 6]), ("retrieval/text_to_image_R@1", [6])):
        assert [line["step"] for line in lines(folder) if f"eval/{name}" in line] == steps
    best = max(scores, key=lambda step: (scores[step], -step))
    kept = {
        int(path.name[-8:]): json.loads((path / "manifest.json").read_text())["metrics"]
        for path in folder.glob("checkpoints/step_*")
    }
    assert set(kept) == {best, 6}
    assert all(metrics[metric] == scores[step] for step, metrics in kept.items())


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path, shapes):
    """A learning rate that blows up: the keys of the batch are on record, and the message says what to do."""
    output = run(
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        "steps=50",
        "optim.lr=1e30",
        "clip_grad_norm=null",
        "eval=none",
        "logger=none",
        status=1,
    )
    assert "is not finite at step" in output and "amend={optim.lr" in output and "Traceback" not in output
    (record,) = tmp_path.rglob("nonfinite_step_*.json")
    assert len(json.loads(record.read_text())["keys"]) == 32
    assert "not finite" in next(tmp_path.rglob("error.txt")).read_text()


def test_sigterm_saves_and_exits_with_its_own_status(tmp_path, shapes):
    process = start(
        *SMALL, shapes, f"output_dir={tmp_path}", "steps=100000", "save_every=0", "eval=none", "logger=none"
    )
    process.wait_for("step 2/")
    process.signal(signal.SIGTERM)
    assert "run the same command to go on" in process.finished(75)
    assert weights(only_run(tmp_path))


def test_gradient_caching_trains_the_same_model(tmp_path, shapes):
    """Without dropout, and with BatchNorm frozen out of the way by a ViT, micro-batches change only rounding."""
    vit = [
        "image_tower=timm",
        "image_tower.model=test_vit",
        "image_tower.image_size=null",
        "text_tower.dropout=0.0",
        "precision=fp32",
    ]
    for name, micro in (("whole", "null"), ("micro", "8")):
        run(
            *SMALL,
            shapes,
            *vit,
            f"micro_batch_size={micro}",
            f"output_dir={tmp_path}/{name}",
            "steps=3",
            "eval=none",
            "logger=none",
        )
    first, second = lines(only_run(tmp_path / "whole")), lines(only_run(tmp_path / "micro"))
    for a, b in zip(first, second, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_and_recomputed_towers_train_the_same_model(tmp_path, shapes):
    """torch.compile, activation checkpointing and layer-wise rates together, beside layer-wise rates alone."""
    settings = [
        *SMALL,
        shapes,
        "image_tower=timm",
        "image_tower.model=test_vit",
        "image_tower.image_size=null",
        "text_tower.dropout=0.0",
        "optim.layer_decay=0.5",
        "optim.eps=1e-5",
        "steps=3",
        "eval=none",
        "logger=none",
    ]
    run(*settings, f"output_dir={tmp_path}/plain")
    run(
        *settings,
        "compile=true",
        "image_tower.activation_checkpointing=true",
        "text_tower.activation_checkpointing=true",
        f"output_dir={tmp_path}/compiled",
    )
    plain, compiled = only_run(tmp_path / "plain"), only_run(tmp_path / "compiled")
    for a, b in zip(lines(plain), lines(compiled), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4)
    expected = weights(plain)
    assert all(
        torch.allclose(tensor, expected[name], atol=1e-4) for name, tensor in weights(compiled).items()
    )


def test_a_sweep_makes_a_folder_for_every_job(tmp_path, shapes):
    run(
        "-m",
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        "steps=3",
        "eval=none",
        "logger=none",
        "loss=clip,[cyclip,simcse]",
        "seed=0,1",
    )
    summaries = list(tmp_path.rglob("summary.json"))
    assert len(summaries) == 4 and len({path.parent for path in summaries}) == 4


def test_every_registered_loss_trains(tmp_path, shapes):
    """One sweep over all of them, on a model and data that supply what each asks for."""
    (tmp_path / "triplets.jsonl").write_text(
        '{"sent0": "a red star", "sent1": "a star", "hard_neg": "no star"}\n' * 8
    )
    (tmp_path / "pairs.jsonl").write_text(
        '{"premise": "a red star", "hypothesis": "a star", "label": "entailment"}\n' * 8
    )
    supplied = [
        f"data.sentences.triplets={tmp_path}/triplets.jsonl",
        f"data.sentences.pairs={tmp_path}/pairs.jsonl",
        "data.sentences.batch_size=4",
        "data.augmentation.flip=0.5",
        "init_logit_bias=-10.0",
        "mlm_probability=0.15",
        "text_tower.causal=false",
    ]
    # A teacher's: test_teacher.
    names = [name for name in list_losses() if not name.startswith("distill")]
    run(
        "-m",
        *SMALL,
        shapes,
        f"output_dir={tmp_path}/runs",
        "steps=3",
        "eval=none",
        "logger=none",
        *supplied,
        "loss=" + ",".join(names),
    )
    trained = {}
    for path in (tmp_path / "runs").rglob("metrics.jsonl"):
        for line in lines(path.parent):
            (name,) = {key.removeprefix("train/") for key in line if key.startswith("train/")} & set(names)
            assert math.isfinite(line["train/loss"])
            trained[name] = line["step"]
    assert trained == dict.fromkeys(names, 3)


@pytest.mark.parametrize("broken", [False, True])
def test_wandb_offline_or_broken_never_stops_a_run(tmp_path, shapes, broken):
    # A fresh interpreter finds the broken one on its path.
    program, env = (typed if broken else run), {"WANDB_MODE": "offline"}
    if broken:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "wandb.py").write_text("raise RuntimeError('this wandb is broken')")
        env["PYTHONPATH"] = str(tmp_path / "broken")
    output = program(
        *SMALL, shapes, f"output_dir={tmp_path}/runs", "steps=3", "eval=none", "logger=wandb", env=env
    )
    folder = only_run(tmp_path / "runs")
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert output.count("logger 'wandb' failed") == (1 if broken else 0)
    assert bool(list(folder.glob("wandb/offline-run-*/*.wandb"))) is not broken


REFUSED = {
    "warm-up": (["steps=5", "warmup_steps=5"], "warmup_steps 5 is not shorter than the 5 steps"),
    "simcse without dropout": (
        ["steps=5", "loss=[clip,simcse]", "text_tower.dropout=0.0"],
        "text_tower.dropout",
    ),
    "nli without sentences": (["steps=5", "loss=[clip,nli_contrastive]"], "data.sentences"),
    "no such shards": (
        ["steps=5", "data=shards", "data.train=/nowhere/*.tar", "eval=none"],
        "/nowhere/*.tar",
    ),
    "steps and epochs": (["steps=5", "epochs=1"], "give exactly one"),
    "sigmoid without bias": (["steps=5", "loss=sigmoid"], "init_logit_bias"),
    "no loss": (["steps=5", "loss=[]"], "the loss is empty"),
    "best metric of no task": (
        ["steps=5", "warmup_steps=1", "best_metric=retreival/text_to_image_R@1"],
        "retrieval/text_to_image_R@1",
    ),
    "best metric of no such name": (
        ["steps=5", "warmup_steps=1", "best_metric=retrieval/text_to_image_R@2"],
        "unknown best_metric 'retrieval/text_to_image_R@2'. Did you mean",
    ),
    "objective of no such name": (
        ["steps=5", "warmup_steps=1", "objective=zero_shot/top3"],
        "unknown objective 'zero_shot/top3'",
    ),
    "unknown tower": (["steps=5", "image_tower=timm", "image_tower.model=resnet5000"], "resnet5000"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_an_error_before_the_first_step(tmp_path, shapes, case):
    overrides, message = REFUSED[case]
    drawn = [] if case == "no such shards" else [*SMALL[:2], shapes]
    output = run("batch_size=32", "log_every=1", *drawn, f"output_dir={tmp_path}", *overrides, status=1)
    assert message in output and "Traceback" not in output and "step 1/" not in output
    assert "Error executing job" not in output


def test_an_empty_shard_is_named_before_the_first_step(tmp_path):
    (tmp_path / "empty.tar").touch()
    output = run(
        "data=shards",
        f"data.train={tmp_path}/empty.tar",
        "eval=none",
        "steps=5",
        f"output_dir={tmp_path}/runs",
        status=1,
    )
    assert "empty.tar" in output and "Traceback" not in output and "step 1/" not in output


def test_other_settings_do_not_continue_a_run(tmp_path, shapes):
    """A folder found by name whose settings have changed since is refused, not mixed."""
    settings = [
        *SMALL,
        shapes,
        f"output_dir={tmp_path}",
        "steps=2",
        "eval=none",
        "logger=none",
        "warmup_steps=1",
    ]
    run(*settings)
    folder = only_run(tmp_path)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("batch_size: 32", "batch_size: 64"))
    output = run(*settings, status=1)
    assert "batch_size: 64 -> 32" in output
    # A record of an older version, which had fewer settings, is of the same run.
    (folder / "config.yaml").write_text(
        config.replace("loss_spike: 3.0\n", "").replace("parallel: ddp\n", "")
    )
    assert "is finished" in run(*settings)
    (folder / "config.yaml").write_text(config.replace("    impl: auto\n", ""))
    output = run(*settings, status=1)
    assert "loss.infonce.impl: None -> 'auto'" in output


PAIRS = {
    "CLIP's ResNet-50 and Transformer": ["experiment=cyclip_rn50_cc3m"],
    "timm's ResNet-50 and RoBERTa": [
        "experiment=cyclip_rn50_cc3m",
        "image_tower=resnet50",
        "text_tower=roberta_base",
    ],
}


@pytest.mark.parametrize(
    "pair", [pytest.param(pair, marks=pytest.mark.slow if "RoBERTa" in pair else ()) for pair in PAIRS]
)
def test_the_cc3m_experiment_takes_steps_on_photographs(tmp_path, test_data, pair):
    shards = test_data("flickr8k-mini/train")
    output = run(
        *PAIRS[pair],
        f"data.train={shards}/000000.tar",
        "batch_size=4",
        "epochs=null",
        "steps=2",
        "warmup_steps=1",
        "precision=fp32",
        "logger=none",
        "log_every=1",
        f"output_dir={tmp_path}",
    )
    assert "step 2/2" in output
    assert all(0 < line["train/loss"] < 100 for line in lines(only_run(tmp_path)))
