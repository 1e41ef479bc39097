"""The validation loss against the formulas in float64 loops, over its batches."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import pytest
import torch

from clipkit.data import write_shapes
from clipkit.data.evalset import iter_eval
from clipkit.evals import create_tasks, evaluate
from clipkit.training.evaluation import check_every
from tests.test_model import EOT, PAD, SOT, model


def tokenize(captions: list[str]) -> torch.Tensor:
    """Letters as ids: what a caption's tokens are does not matter here."""
    tokens = torch.full((len(captions), 12), PAD)
    for row, caption in enumerate(captions):
        ids = [SOT, *(1 + ord(letter) % (SOT - 1) for letter in caption[:10]), EOT]
        tokens[row, : len(ids)] = torch.tensor(ids)
    return tokens


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    return write_shapes(tmp_path_factory.mktemp("shapes"), train=8, val=26, seed=3)["val"]


def pairs(shards, dual):
    """(N, D) images and texts in float64, a picture at a time."""
    images, captions = [], []
    with torch.no_grad():
        for batch in iter_eval(shards, image_size=32, batch_size=1):
            images.append(dual.encode_image(batch["image"])[0].double())
            captions.append(dual.encode_text(tokenize([batch["captions"][0][0]]))[0].double())
    return images, captions


def infonce(images, captions, scale):
    """Radford et al. (2021), figure 3, a logit at a time."""
    count, total = len(images), 0.0
    logits = [[scale * float(x @ y) for y in captions] for x in images]
    for i in range(count):
        row = math.log(sum(math.exp(value) for value in logits[i]))
        column = math.log(sum(math.exp(logits[j][i]) for j in range(count)))
        total += (row + column) / 2 - logits[i][i]
    return total / count


def sigmoid(images, captions, scale, bias):
    """Zhai et al. (2023), equation 1, a pair at a time."""
    total = 0.0
    for i, x in enumerate(images):
        for j, y in enumerate(captions):
            sign = 1 if i == j else -1
            total += math.log1p(math.exp(-sign * (scale * float(x @ y) + bias)))
    return total / len(images)


@pytest.fixture(scope="module")
def captioned_thrice(shards, tmp_path_factory) -> list[str]:
    """The same pictures, each with two more captions."""
    paths = []
    for path in map(Path, shards):
        paths.append(str(tmp_path_factory.mktemp("thrice") / path.name))
        with tarfile.open(path) as source, tarfile.open(paths[-1], "w") as target:
            for member in source:
                data = source.extractfile(member).read()
                stem, kind = member.name.rsplit(".", 1)
                if kind == "json":
                    continue
                if kind == "txt":
                    data = json.dumps([data.decode(), "another caption", "and a third"]).encode()
                    member.name = f"{stem}.json"
                member.size = len(data)
                target.addfile(member, io.BytesIO(data))
    return paths


@pytest.mark.parametrize("captions_each", [1, 3])
def test_it_is_the_mean_over_whole_batches_by_the_formulas(shards, captioned_thrice, captions_each):
    shards = shards if captions_each == 1 else captioned_thrice
    assert all(
        len(one) == captions_each
        for batch in iter_eval(shards, image_size=32, batch_size=8)
        for one in batch["captions"]
    )
    dual = model(init_logit_bias=-3.0).train()
    loss = {"infonce": {"weight": 2.0}, "sigmoid": {"weight": 0.5}}
    tasks = {"val": {"kind": "validation_loss", "shards": shards, "loss": loss, "batch_size": 8}}
    assert create_tasks(tasks)["val"].metrics == ("infonce", "sigmoid", "loss")
    found = evaluate(dual, tokenize, tasks, batch_size=5)["val"]
    assert dual.training
    images, captions = pairs(shards, dual.eval())
    scale = math.exp(dual.log_logit_scale.item())
    # 26 pairs: three batches, and two left out.
    batches = [slice(start, start + 8) for start in (0, 8, 16)]
    contrast = sum(infonce(images[rows], captions[rows], scale) for rows in batches) / 3
    pairwise = sum(sigmoid(images[rows], captions[rows], scale, -3.0) for rows in batches) / 3
    assert found == pytest.approx(
        {"infonce": contrast, "sigmoid": pairwise, "loss": 2 * contrast + 0.5 * pairwise}, rel=1e-5
    )


def test_what_reads_more_than_pairs_is_left_out_and_said(shards, capsys):
    dual = model(text={"dropout": 0.1})
    loss = {"infonce": {}, "simcse": {}, "nli_contrastive": {}}
    tasks = {"val": {"kind": "validation_loss", "shards": shards, "loss": loss, "batch_size": 8}}
    found = evaluate(dual, tokenize, tasks)["val"]
    assert set(found) == {"infonce"} == set(create_tasks(tasks)["val"].metrics)
    assert "leaves out simcse, nli_contrastive" in capsys.readouterr().err
    tasks["val"]["loss"] = ["simcse"]
    with pytest.raises(ValueError, match="no term of this loss .simcse."):
        create_tasks(tasks)


def test_fewer_pairs_than_a_batch_are_an_error(shards):
    tasks = {"val": {"kind": "validation_loss", "shards": shards, "loss": ["infonce"], "batch_size": 27}}
    with pytest.raises(ValueError, match="holds 26 pairs, fewer than a batch of 27"):
        evaluate(model(), tokenize, tasks)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        ({"vall": 5}, "'vall'.*'val'"),
        ({"val": -1}, "val -1 steps"),
        ({"val": 0.5}, "0.5"),
        ({"val": True}, "True"),
    ],
)
def test_a_wrong_frequency_is_named(every, message):
    check_every({"val": 5}, {"val": {}})
    with pytest.raises(ValueError, match=message):
        check_every(every, {"val": {}})
