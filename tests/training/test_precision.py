"""Loss scaling against torch's own GradScaler, and what each precision holds in which type."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from clipkit.model import create_model
from clipkit.optim import WeightAverage
from clipkit.training.precision import LossScale, autocast, cast_towers, use_tf32
from tests.recipes.runs import SMALL, lines, only_run, run, run_ranks, weights
from tests.test_model import TOKENIZER, texts

CPU = torch.device("cpu")


@pytest.mark.parametrize("pattern", ["ok" * 3, "b", "ok b ok", "bbb", "o" * 9, "oob" * 4, "ob" * 20])
def test_the_scale_moves_as_torchs_gradscaler_moves_it(pattern):
    """b: a step whose gradient is infinite; any other letter: a good one."""
    ours = LossScale("fp16", interval=4)
    peer = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    weight, theirs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([theirs], lr=0.1)
    for letter in pattern:
        bad = letter == "b"
        peer.scale((theirs * (torch.inf if bad else 0.5)).sum()).backward()
        peer.unscale_(optimizer)
        peer.step(optimizer)
        peer.update()
        ((weight * (torch.inf if bad else 0.5)).sum() * ours.value).backward()
        ours.unscale([weight])
        assert torch.equal(weight.grad, theirs.grad)
        loss = torch.tensor(1.0)
        left_out = ours.overflowed(loss, weight.grad.norm())
        if peer.get_scale() < 1:
            # At the scale 1 the peer goes on halving, where no gradient could be the scale's fault.
            assert not left_out
            return
        assert left_out == bad
        if not bad:
            with torch.no_grad():
                weight -= 0.1 * weight.grad
        weight.grad = theirs.grad = None
        assert ours.value == peer.get_scale()
        assert torch.equal(weight, theirs)


def test_what_is_no_fault_of_the_scale_is_no_overflow():
    inf, one = torch.tensor(torch.inf), torch.tensor(1.0)
    scale = LossScale("fp16")
    assert not scale.overflowed(torch.tensor(torch.nan), inf) and scale.value == 2.0**16
    scale.value = 1.0
    assert not scale.overflowed(one, inf)
    assert not LossScale("bf16").overflowed(one, inf) and LossScale("bf16").value == 1.0


def test_the_scale_goes_on_where_it_was_saved():
    scale = LossScale("fp16")
    scale.overflowed(torch.tensor(1.0), torch.tensor(torch.inf))
    scale.overflowed(torch.tensor(1.0), torch.tensor(1.0))
    later = LossScale("fp16")
    later.load_state_dict(scale.state_dict())
    assert (later.value, later.good) == (2.0**15, 1)
    # A run that goes on in another precision has no use for it.
    other = LossScale("fp32")
    other.load_state_dict(scale.state_dict())
    assert other.value == 1.0
    for value, good in ((0.0, 0), (3.0, 0), (float("inf"), 0), (float("nan"), 0), (2.0, -1), (2.0, 10**9)):
        with pytest.raises((ValueError, OverflowError)):
            later.load_state_dict({"value": value, "good": good})


def test_unknown_precisions_are_named():
    with pytest.raises(ValueError, match="'fp8'.*fp16"):
        autocast("fp8", CPU)


def test_tf32_is_for_gpus_alone():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        assert not use_tf32(True, CPU) and torch.get_float32_matmul_precision() == before[0]
        assert use_tf32(True, torch.device("cuda")) and torch.get_float32_matmul_precision() == "high"
        assert not use_tf32(False, torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def small():
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "init_logit_bias": -10.0,
        "image_tower": {"name": "timm", "model": "test_resnet"},
        "text_tower": {"name": "transformer", "width": 16, "heads": 2, "layers": 1, "context_length": 12},
    }
    return create_model(config, tokenizer=TOKENIZER)


def test_pure_bf16_keeps_the_temperature_and_batch_norm_in_fp32_and_averages_in_fp32():
    model = small()
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast_towers(model, "pure_bf16", sharded=False)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    assert types["log_logit_scale"] == types["logit_bias"] == torch.float32
    norms = {name for name in types if name.rpartition(".")[0] + ".running_mean" in types}
    assert norms and {types[name] for name in norms} == {torch.float32}
    assert {types[name] for name in types.keys() - norms - {"log_logit_scale", "logit_bias"}} == {
        torch.bfloat16
    }
    images, text = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), texts(4)
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    features = model({"image": images, "text": text}, names)
    assert {value.dtype for value in features.values()} == {torch.float32}
    model.load_state_dict(exact)
    average = WeightAverage(model, decay=0.99)
    assert {w.dtype for w in average.weights.values() if w.is_floating_point()} == {torch.float32}
    average.update(model)
    with average.applied(model):
        assert model.image_projection.weight.dtype == torch.bfloat16


def test_pure_bf16_with_fsdp_is_refused():
    with pytest.raises(ValueError, match="parallel=ddp"):
        cast_towers(small(), "pure_bf16", sharded=True)


SETTINGS = [
    *SMALL,
    "steps=4",
    "save_every=2",
    "keep=9",
    "eval=none",
    "logger=none",
    "ema_decay=0.9",
    "optim.lr=1e-5",
]


@pytest.mark.parametrize(
    "precision",
    ["pure_bf16", "fp16", pytest.param("bf16", marks=pytest.mark.slow)],
)
def test_a_run_in_few_bits_learns_as_in_fp32_and_goes_on_to_the_same_bits(precision, tmp_path):
    shapes = f"data.shapes.folder={tmp_path}/shapes"
    run(*SETTINGS, shapes, f"output_dir={tmp_path}/fp32")
    output = run(*SETTINGS, shapes, f"precision={precision}", f"output_dir={tmp_path}/whole")
    whole, exact = only_run(tmp_path / "whole"), lines(only_run(tmp_path / "fp32"))
    taken = {line["step"]: line["train/loss"] for line in lines(whole) if "train/loss" in line}
    for line in exact:
        if line["step"] in taken:
            assert taken[line["step"]] == pytest.approx(line["train/loss"], rel=0.02)
    if precision == "fp16":
        # The first scale is always too large for a network that has learnt nothing.
        assert "step 1 overflowed fp16 and is left out; the loss scale is now 32768" in output
        assert 1 not in taken and len(taken) >= 2
    else:
        assert len(taken) == 4
    saved = weights(whole)
    kept = {"pure_bf16": torch.bfloat16}.get(precision, torch.float32)
    assert saved["model.text_projection.weight"].dtype == kept
    assert saved["average.text_projection.weight"].dtype == torch.float32
    # As it was after step 2.
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    (again / "summary.json").unlink()
    run(*SETTINGS, shapes, f"precision={precision}", f"hydra.run.dir={again}")
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "parallel"), [("pure_bf16", "ddp"), ("fp16", "ddp"), ("fp16", "fsdp"), ("bf16", "fsdp")]
)
def test_two_ranks_in_few_bits_learn_as_one(precision, parallel, tmp_path):
    quiet = [
        "image_tower.model=test_vit",
        "image_tower.image_size=null",
        "text_tower.dropout=0.0",
        "optim.eps=1e-5",
    ]
    settings = [*SETTINGS, *quiet, f"data.shapes.folder={tmp_path}/shapes", f"precision={precision}"]
    run(*settings, f"output_dir={tmp_path}/one")
    run_ranks(*settings, f"parallel={parallel}", "micro_batch_size=8", f"output_dir={tmp_path}/two")
    one, two = (
        {
            line["step"]: line["train/loss"]
            for line in lines(only_run(tmp_path / name))
            if "train/loss" in line
        }
        for name in ("one", "two")
    )
    # Each rank's gradient is larger before the ranks' mean is taken, so fp16 may overflow once more.
    assert len(two) >= (2 if precision == "fp16" else 4) and two.keys() <= one.keys()
    for step, value in two.items():
        assert value == pytest.approx(one[step], rel=5e-3)
