"""open_clip_train's train_one_epoch, unmodified, with clipkit's losses in place of its own.

Expected: what the same loop makes of the same batches with open_clip's ClipLoss and SigLipLoss, or with the
papers' formulas.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clipkit.losses import InfoNCE, Sigmoid, create_loss
from tests.processes import launch
from tests.recipes import open_clip_loop

open_clip = pytest.importorskip("open_clip")
pytest.importorskip("open_clip_train")
# fp32, another order of sums, some steps of AdamW.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


class Sum(nn.Module):
    """Weighted terms as the loop takes them: functions of features, their values in one dict."""

    def __init__(self, **terms):
        super().__init__()
        self.terms = terms

    def forward(self, output_dict, **features):
        return {name: weight * term(features) for name, (weight, term) in self.terms.items()}


def clip(features):
    return open_clip.ClipLoss()(
        features["image_features"], features["text_features"], features["logit_scale"]
    )


def siglip(features):
    return open_clip.loss.SigLipLoss()(**features)


def cycles(features):
    """Goel et al. 2022, section 2.2, both weights 0.25."""
    x, y = features["image_features"], features["text_features"]
    within, across = x @ x.T - y @ y.T, x @ y.T - y @ x.T
    return 0.25 * (within.square().sum() + across.square().sum()) / len(x)


CASES = {
    "InfoNCE for ClipLoss": (InfoNCE, lambda: open_clip.ClipLoss(), {}),
    "InfoNCE where the model has a bias": (InfoNCE, lambda: open_clip.ClipLoss(), {"bias": True}),
    "Sigmoid for SigLipLoss": (Sigmoid, lambda: open_clip.loss.SigLipLoss(), {"bias": True}),
    "create_loss of one": (lambda: create_loss("infonce"), lambda: open_clip.ClipLoss(), {}),
    "a sum of three": (
        lambda: create_loss({"infonce": {"weight": 0.7}, "sigmoid": {}, "cyclic": {"weight": 0.2}}),
        lambda: Sum(infonce=(0.7, clip), sigmoid=(1.0, siglip), cyclic=(0.2, cycles)),
        {"bias": True},
    ),
    "accumulation": (InfoNCE, lambda: open_clip.ClipLoss(), {"accum_freq": 2}),
    "bf16 autocast": (InfoNCE, lambda: Sum(clip=(1.0, in_fp32)), {"precision": "amp_bf16"}),
}


def in_fp32(features):
    """Radford et al. 2021, figure 3, in fp32 whatever the autocast, as clipkit has it."""
    with torch.autocast("cpu", enabled=False):
        logits = (
            features["logit_scale"].float()
            * features["image_features"].float()
            @ features["text_features"].float().T
        )
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


@pytest.mark.parametrize("case", list(CASES))
def test_losses_and_weights_are_those_of_open_clips_own_loss(case):
    ours, theirs, settings = CASES[case]
    losses, weights = open_clip_loop.train(ours(), **settings)
    expected_losses, expected = open_clip_loop.train(theirs(), **settings)
    assert len(losses) == open_clip_loop.STEPS
    # The biases of attention's keys change no output: their gradient is rounding, which AdamW makes steps of.
    loose = {"rtol": 2e-2, "atol": 2e-3} if settings.get("precision") else CLOSE
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), **loose)
    start = open_clip_loop.make_model(bias=settings.get("bias", False)).state_dict()
    assert (weights["visual.proj"] - start["visual.proj"]).norm() > 0.03 * start["visual.proj"].norm()
    for name, value in expected.items():
        if name == "logit_bias" and ours is InfoNCE:
            # It changes no softmax: ClipLoss moves it by rounding alone, InfoNCE leaves it.
            assert torch.equal(weights[name], start[name])
        elif not name.endswith("in_proj_bias"):
            torch.testing.assert_close(weights[name], value, **loose, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.slow
def test_two_ranks_of_the_loop_are_one_process():
    """A sum of terms under DDP, without world_size, local_loss or gather_with_grad."""
    loss = Sum(infonce=(0.5, clip), cyclic=(0.1, cycles))
    losses, expected = open_clip_loop.train(loss)
    for found_losses, weights in launch(open_clip_loop.run_rank, 2):
        torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(losses), **CLOSE)
        for name, value in expected.items():
            if not name.endswith("in_proj_bias"):
                torch.testing.assert_close(
                    weights[name], value, **CLOSE, msg=lambda m, name=name: f"{name}: {m}"
                )
