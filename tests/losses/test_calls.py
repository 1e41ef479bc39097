"""The calls that a loss takes: open_clip's training loop's, plain numbers, lists."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from clipkit.losses import InfoNCE, Sigmoid, create_loss, list_losses
from tests.losses.test_every_loss import build, make

MODEL_OUTPUT = ("image_features", "text_features", "logit_scale", "logit_bias")


def model_out(rows: int = 5) -> dict[str, torch.Tensor]:
    """What open_clip's models return in training, with a bias."""
    x, y = torch.nn.functional.normalize(
        torch.randn(2, rows, 6, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    return {
        "image_features": x,
        "text_features": y,
        "logit_scale": torch.tensor(8.0),
        "logit_bias": torch.tensor(-4.0),
    }


@pytest.mark.parametrize("name", list_losses())
def test_every_loss_takes_the_models_whole_output_and_gives_a_dict_where_asked(name):
    loss = build(name).terms[name]
    given = make(build(name), grad=False)
    plain = loss(**given)
    unread = {key: value for key, value in model_out().items() if key not in loss.inputs}
    assert torch.equal(build(name).terms[name](**given, **unread), plain)
    terms = build(name).terms[name](**given, **unread, output_dict=True)
    assert list(terms) == [name] and torch.equal(terms[name], plain)
    with pytest.raises(TypeError if name not in ("uniformity", "matryoshka") else (TypeError, ValueError)):
        loss(**given, image_featurs=given[loss.inputs[0]])


@pytest.mark.parametrize("extra", [{}, {"logit_bias": None}])
def test_open_clips_loop_gets_open_clips_values(extra):
    """`losses = loss(**model_out, output_dict=True); total_loss = sum(losses.values())`, from its train.py."""
    open_clip = pytest.importorskip("open_clip.loss")
    out = model_out()
    del out["logit_bias"]
    theirs = open_clip.ClipLoss()(**out, output_dict=True)
    ours = InfoNCE()(**out, **extra, output_dict=True)
    assert float(sum(ours.values())) == pytest.approx(float(sum(theirs.values())), rel=1e-6)
    out = model_out()
    theirs = open_clip.SigLipLoss()(**out, output_dict=True)
    assert float(sum(Sigmoid()(**out, output_dict=True).values())) == pytest.approx(
        float(sum(theirs.values())), rel=1e-6
    )


@pytest.mark.parametrize("weights", [{}, {"cyclic": {"weight": 0.5}, "uniformity": {"weight": 3.0}}])
def test_a_sums_terms_add_up_to_its_loss_in_open_clips_loop(weights):
    spec = {"infonce": {}, "cyclic": {}, "uniformity": {}, "sigmoid": {}} | weights
    out = model_out()
    expected = create_loss(spec)(out)["loss"]
    terms = create_loss(spec)(**out, output_dict=True)
    assert "loss" not in terms and list(terms) == list(spec)
    assert float(sum(terms.values())) == pytest.approx(float(expected), rel=1e-6)
    assert torch.equal(create_loss(spec)(**out)["loss"], expected)
    with pytest.raises(ValueError, match="not both"):
        create_loss(spec)(out, logit_scale=out["logit_scale"])


@pytest.mark.parametrize("name", [n for n in list_losses() if "logit_scale" in build(n).inputs])
@pytest.mark.parametrize(
    "form", [float, lambda s: torch.tensor([s]), lambda s: torch.tensor(s).double(), int]
)
def test_scales_of_any_form_are_taken(name, form):
    given = make(build(name), grad=False)
    expected = build(name)(given)["loss"]
    scales = {key: form(float(given[key])) for key in ("logit_scale", "logit_bias") if key in given}
    found = build(name)({**given, **scales})["loss"]
    assert (
        found.shape == () and found.dtype == torch.float32 and float(found) == pytest.approx(float(expected))
    )


@pytest.mark.parametrize("bad", [math.nan + 0j, "7", True, [7.0], torch.ones(2)])
def test_other_scales_are_refused(bad):
    with pytest.raises(ValueError, match="logit_scale"):
        InfoNCE()(**{**model_out(), "logit_scale": bad})


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_ids_may_be_a_list(loss):
    ids = [3, 1, 3, 2, 1]
    for same_ids in ("positive", "mask"):
        objective = create_loss({loss: {"same_ids": same_ids}})
        listed = objective({**model_out(), "pair_ids": ids})["loss"]
        assert torch.equal(listed, objective({**model_out(), "pair_ids": torch.tensor(ids)})["loss"])
        for bad in ([3, 1], [3.0] * 5, "abcde", [True] * 5):
            with pytest.raises(ValueError, match=r"pair_ids must be integers of shape \(5,\)"):
                objective({**model_out(), "pair_ids": bad})


def test_a_losss_signature_is_its_own():
    assert list(inspect.signature(InfoNCE.forward).parameters)[:4] == [
        "self", "image_features", "text_features", "logit_scale",
    ]  # fmt: skip
