"""clipkit-pretrain init_from=: the run begins with another's weights, and needs that one no more once it has begun."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml

from clipkit.evals import evaluate
from clipkit.loading import load_model
from clipkit.training.run_folder import check_unchanged
from tests.recipes.runs import SMALL, lines, only_run, run, run_ranks, weights


def test_a_run_begins_from_another_and_goes_on_without_it(tmp_path, shapes):
    quick = [*SMALL, shapes, "eval=none", "logger=none", "schedule=constant"]
    run(*quick, "steps=3", f"output_dir={tmp_path}/first")
    first = only_run(tmp_path / "first")
    before = weights(first)
    tuned = [
        *quick,
        f"init_from={first}",
        "image_tower=source",
        "text_tower=source",
        "image_tower.freeze=all",
    ]
    # The shapes' own words would be the same; the source's are taken all the same.
    tuned += ["steps=3", "data.tokenizer.context_length=20", f"output_dir={tmp_path}/second"]
    output = run(*tuned)
    second = only_run(tmp_path / "second")
    report = json.loads((second / "init_from.json").read_text())
    assert len(report["loaded"]) == len(before) and not (report["new"] or report["left"] or report["resized"])
    assert f"{len(before)} tensors loaded" in output and "data.tokenizer is not read" in output
    after = weights(second)
    frozen = [name for name in before if name.startswith("model.image_tower.")]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    moved = (after["model.text_projection.weight"] - before["model.text_projection.weight"]).abs().max()
    assert 0 < moved < 0.1
    shutil.rmtree(first)
    again = run(*tuned, "amend={steps: 4}")
    assert "resumed at step 3" in again and [line["step"] for line in lines(second)] == [1, 2, 3, 4]
    model, tokenizer, _ = load_model(second)
    assert tokenizer.context_length == 12 and model.embed_dim == 128
    config = yaml.safe_load((second / "config.yaml").read_text())
    check_unchanged(second, config)
    with pytest.raises(ValueError, match=r"init_from: .* -> 'elsewhere'"):
        check_unchanged(second, {**config, "init_from": "elsewhere"})


def test_texts_alone_train_a_tower_that_another_run_begins_with(tmp_path, shapes):
    """experiment=text_only's losses without a picture: none is decoded, and the next run's text tower is that one's."""
    sentences = tmp_path / "nli.jsonl"
    rows = [
        {"sent0": f"a {n} dog runs", "sent1": f"{n} dogs move", "hard_neg": f"no {n} animal"}
        for n in range(16)
    ]
    sentences.write_text("\n".join(map(json.dumps, rows)))
    small = [
        "text_tower.width=32",
        "text_tower.layers=1",
        "embed_dim=32",
        "eval=none",
        "logger=none",
        "epochs=null",
    ]
    run(
        "experiment=text_only", "data=shapes", f"data.sentences.triplets={sentences}", "data.sentences.batch_size=8",
        *SMALL, shapes, *small, "steps=3", "micro_batch_size=8", "count_flops=true", f"output_dir={tmp_path}/texts",
    )  # fmt: skip
    texts = only_run(tmp_path / "texts")
    logged = lines(texts)
    assert all(
        {"train/simcse", "train/mlm", "train/nli_contrastive", "train/uniformity"} <= line.keys()
        for line in logged
    )
    assert logged[-1]["train/tflops"] > 0 and logged[0]["train/loss"] != logged[-1]["train/loss"]
    before = weights(texts)
    assert not [name for name in before if "image" in name]
    run(
        *SMALL, shapes, "text_tower=source", f"text_tower.init_from={texts}", "text_tower.freeze=all", "embed_dim=32",
        "steps=3", "eval=none", "logger=none", f"output_dir={tmp_path}/pairs",
    )  # fmt: skip
    after = weights(only_run(tmp_path / "pairs"))
    tower = [name for name in before if name.startswith("model.text_tower.")]
    assert tower and all(torch.equal(before[name], after[name]) for name in tower)
    pictures = run(
        "experiment=text_only",
        "data=shapes",
        *SMALL,
        shapes,
        *small[:3],
        "eval=shapes",
        "loss=simcse",
        status=1,
    )
    assert "scores pictures, and this model has no image tower" in pictures
    model, tokenizer, _ = load_model(texts)
    with pytest.raises(ValueError, match="encodes text only"):
        evaluate(
            model,
            tokenizer,
            {"geometry": {"kind": "geometry", "shards": f"{shapes.partition('=')[2]}/**/val/*.tar"}},
        )
    assert model.encode_text(tokenizer(["a red circle"])).shape == (1, 32)
    with pytest.raises(ValueError, match="no image tower"):
        model.encode_image(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="a loss reads image_features, and this model has no image tower"):
        model.check_inputs(["image_features", "text_features"])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_begin_with_the_same_weights_as_one_process(tmp_path, shapes, parallel):
    quick = [*SMALL, shapes, "eval=none", "logger=none", "steps=3"]
    run(*quick, f"output_dir={tmp_path}/first")
    tuned = [*quick, f"init_from={only_run(tmp_path / 'first')}", "image_tower=source", "text_tower=source"]
    # One rank's BatchNorm sees half the batch, and dropout draws its own masks: neither is to tell.
    tuned += ["image_tower.freeze=all", "text_tower.dropout=0.0", f"parallel={parallel}"]
    run(*tuned, f"output_dir={tmp_path}/one")
    told = run_ranks(*tuned, f"output_dir={tmp_path}/two")
    assert told.count("tensors loaded") == 1
    one, two = lines(only_run(tmp_path / "one")), lines(only_run(tmp_path / "two"))
    assert [line["train/loss"] for line in two] == pytest.approx(
        [line["train/loss"] for line in one], rel=1e-5
    )
