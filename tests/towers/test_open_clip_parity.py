"""CLIP's RN50 and ViT-B/32 are open_clip's: names, sizes, features with its weights, and how weights start."""

from __future__ import annotations

import math

import pytest
import torch

from clipkit.export import load_open_clip_state_dict, open_clip_config, open_clip_state_dict
from clipkit.model import create_model
from tests.towers.hf_types import words

open_clip = pytest.importorskip("open_clip")
stats = pytest.importorskip("scipy.stats")

TEXT = {"name": "transformer", "width": 64, "layers": 2, "heads": 2}
TINY = {
    "resnet": {"name": "clip_resnet50", "image_size": 64, "layers": [1, 2, 1, 1], "width": 16},
    "vit": {"name": "clip_vit", "image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
}
# Our settings of each of its models, and its number of parameters (Radford et al. 2021's released weights have as many).
FULL = {
    "RN50": ({"embed_dim": 1024, "image_tower": {"name": "clip_resnet50"}}, 102_007_137),
    "ViT-B-32": ({"embed_dim": 512, "image_tower": {"name": "clip_vit"}}, 151_277_313),
}
SIZES = [pytest.param(name, marks=pytest.mark.slow) for name in FULL] + [*TINY]


def both(name):
    """Our model and open_clip's of the same architecture, each with weights of its own."""
    torch.manual_seed(0)
    if name in TINY:
        config = {"embed_dim": 48, "image_tower": TINY[name], "text_tower": TEXT}
        ours = create_model(config, tokenizer=words(16))
        torch.manual_seed(1)
        return ours, open_clip.CLIP(**open_clip_config(ours)), words(16)
    from clipkit.data import create_tokenizer

    tokenizer = create_tokenizer("clip_bpe")
    ours = create_model({**FULL[name][0], "text_tower": {"name": "transformer"}}, tokenizer=tokenizer)
    torch.manual_seed(1)
    return ours, open_clip.create_model(name, pretrained=None), tokenizer


def differs(a: torch.Tensor, b: torch.Tensor) -> str:
    """What tells two draws of a tensor's values from one distribution's; an empty string if nothing does."""
    a, b = a.flatten().double(), b.flatten().double()
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return "" if torch.equal(a, b) else "one is constant, or both are and differ"
    n = len(a)
    # Standard errors of the difference of two means, and of the log of two standard deviations' ratio.
    spread = (a.var() + b.var()) / n
    kurtosis = float(((a - a.mean()) ** 4).mean() / a.var() ** 2)
    mean = abs(float(a.mean() - b.mean())) / math.sqrt(float(spread))
    scale = abs(math.log(float(a.std() / b.std()))) / math.sqrt(max(kurtosis - 1, 0.05) / (2 * n))
    shape = stats.ks_2samp(a[:: max(1, n // 20_000)].numpy(), b[:: max(1, n // 20_000)].numpy()).pvalue
    # Of some hundred tensors none is beyond these by chance: 5 standard errors, 6e-7.
    return (
        f"mean {mean:.1f}, scale {scale:.1f} errors, shape {shape:.1e}"
        if max(mean, scale) > 5 or shape < 6e-7
        else ""
    )


@pytest.mark.parametrize("name", SIZES)
def test_names_sizes_and_initial_weights_are_open_clips(name):
    ours, theirs, _ = both(name)
    state, wanted = open_clip_state_dict(ours), theirs.state_dict()
    assert {key: one.shape for key, one in state.items()} == {key: one.shape for key, one in wanted.items()}
    count = sum(one.numel() for one in ours.parameters())
    assert count == sum(one.numel() for one in theirs.parameters())
    if name in FULL:
        assert count == FULL[name][1]
    found = {key: differs(state[key], one) for key, one in wanted.items()}
    assert not {key: what for key, what in found.items() if what}


def test_other_initial_weights_would_be_seen():
    torch.manual_seed(0)
    a, b = torch.randn(2, 64, 128)
    assert not differs(a, b)
    assert differs(a, 1.1 * b) and differs(a, b + 0.1) and differs(a, torch.zeros(64, 128))
    # Of the same mean and deviation.
    assert differs(a, (torch.rand(64, 128) - 0.5) * math.sqrt(12))


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_features_with_open_clips_weights_are_open_clips(name):
    ours, theirs, tokenizer = both(name)
    # Away from the start, where the residual branches of a ResNet are zero and its features of any two pictures alike.
    for key, one in theirs.named_parameters():
        if ".bn" in key:
            torch.nn.init.uniform_(one, 0.5, 1.5)
    for key, one in theirs.named_buffers():
        if key.endswith("running_mean"):
            torch.nn.init.uniform_(one, -0.1, 0.1)
        if key.endswith("running_var"):
            torch.nn.init.uniform_(one, 0.5, 1.5)
    load_open_clip_state_dict(ours, theirs.state_dict())
    ours.eval(), theirs.eval()
    size = ours.image_tower.image_size
    shades = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    picture = (torch.nn.functional.interpolate(shades, size, mode="bilinear") * 255).to(torch.uint8)
    mean, std = (
        torch.tensor(value).view(3, 1, 1)
        for value in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    features = ours.encode_image(picture)
    wanted = theirs.encode_image((picture / 255 - mean) / std, normalize=True)
    assert (features[0] - features[1]).norm() > 1e-3
    torch.testing.assert_close(features, wanted, atol=1e-5, rtol=0)
    text = tokenizer(["waa wab", "a dog runs over wet sand", "wbc " * 90])
    torch.testing.assert_close(
        ours.encode_text(text), theirs.encode_text(text, normalize=True), atol=1e-5, rtol=0
    )
    assert ours.logit_scale.item() == pytest.approx(theirs.logit_scale.exp().item(), rel=1e-6)
