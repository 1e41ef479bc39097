"""What every family of timm does as an image tower, or why it does not.

Small models of four families are in the gate; thirty of fifteen families, each at two sizes, are among the slow tests.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from clipkit.export import open_clip_config, open_clip_state_dict
from clipkit.model import create_model
from clipkit.optim import parameter_groups
from clipkit.towers import create_image_tower
from tests.towers.hf_types import words

open_clip = pytest.importorskip("open_clip")

GATE = {
    "test_resnet": (32, 48),
    "test_vit": (32, 64),
    "test_convnext": (32, 64),
    "test_efficientnet": (32, 64),
}
# Name: its two sizes in pixels.
SLOW = {
    **dict.fromkeys(["resnet18", "resnet50", "resnet10t", "seresnet50", "test_nfnet", "nfnet_l0"], (64, 96)),
    **dict.fromkeys(["vit_tiny_patch16_224", "vit_small_patch32_224", "deit3_small_patch16_224"], (64, 96)),
    **dict.fromkeys(["vit_little_patch16_reg4_gap_256", "eva02_tiny_patch14_224"], (56, 112)),
    **dict.fromkeys(
        ["convnext_atto", "convnextv2_atto", "inception_next_atto", "edgenext_xx_small"], (64, 96)
    ),
    **dict.fromkeys(["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "davit_tiny"], (64, 96)),
    **dict.fromkeys(["efficientnet_b0", "tf_efficientnetv2_b0", "mobilenetv3_small_050"], (64, 96)),
    **dict.fromkeys(["mobilenetv4_conv_small", "ghostnet_050", "fastvit_t8", "repvgg_a0"], (64, 96)),
    **dict.fromkeys(["regnetx_002", "regnety_002", "densenet121", "dla34", "vgg11"], (64, 96)),
    **dict.fromkeys(["mixer_s32_224", "resmlp_12_224"], (224, 224)),
    **dict.fromkeys(
        ["coatnet_pico_rw_224", "maxvit_rmlp_pico_rw_256", "hiera_tiny_224", "mvitv2_tiny"], (64, 96)
    ),
    **dict.fromkeys(["poolformer_s12", "caformer_s18", "xcit_nano_12_p16_224", "cait_xxs24_224"], (64, 96)),
    **dict.fromkeys(["pvt_v2_b0", "focalnet_tiny_srf", "starnet_s1", "volo_d1_224"], (64, 96)),
}
# Their layers are no modules, but convolutions in a row of others.
NO_BLOCKS = ("vgg11",)
EVERY = [
    pytest.param(name, size, marks=pytest.mark.slow)
    for name, sizes in SLOW.items()
    for size in sorted({*sizes})
]
EVERY = [(name, size) for name, sizes in GATE.items() for size in sizes] + EVERY


def tower(name: str, size: int, **settings):
    torch.manual_seed(0)
    # Stochastic depth leaves blocks out at random, whatever a test compares.
    spec = {"name": "timm", "model": name, "image_size": size, **settings}
    return create_image_tower(spec, embed_dim=8)


def pictures(size: int) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_there_are_thirty_names_of_timm():
    assert len(SLOW) >= 30


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_a_family_trains_freezes_and_decays_by_depth(name, size):
    ours = tower(name, size).train()
    out = ours(pictures(size))
    assert out.shape == (3, ours.width)
    (out * torch.randn_like(out)).sum().backward()
    assert [key for key, one in ours.named_parameters() if one.grad is None] == []

    n, blocks = ours.num_layers, ours.blocks()
    assert n >= 1 and len(blocks) == (0 if name in NO_BLOCKS else n)
    depth = {key: ours.layer_of(key) for key, _ in ours.named_parameters()}
    assert set(depth.values()) <= {*range(n + 2)} and {*range(1, n + 1)} <= set(depth.values())
    # timm lists what comes first first.
    assert list(depth.values()) == sorted(depth.values()) or name in NO_BLOCKS
    rates = {
        id(one): group["lr"]
        for group in parameter_groups(ours, lr=1.0, weight_decay=0.1, layer_decay=0.5)
        for one in group["params"]
    }
    for key, one in ours.named_parameters():
        assert rates[id(one)] == 0.5 ** (n + 1 - depth[key])

    ours = tower(name, size, freeze=1)
    before = copy.deepcopy(ours.state_dict())
    (ours.train()(pictures(size)) * torch.randn_like(out)).sum().backward()
    torch.optim.SGD([one for one in ours.parameters() if one.requires_grad], lr=0.5).step()
    moved = {key for key, one in ours.named_parameters() if not torch.equal(one, before[key])}
    assert {key for key in depth if depth[key] <= 1}.isdisjoint(moved) and moved
    # Frozen BatchNorm keeps its statistics too.
    still = [
        key
        for key, _ in ours.named_buffers()
        if key.endswith("running_mean") and ours.layer_of(key[:-12] + "weight") <= 1
    ]
    assert all(torch.equal(ours.state_dict()[key], before[key]) for key in still)
    assert not any(one.requires_grad for one in tower(name, size, freeze="all").parameters())


@pytest.mark.parametrize(("name", "size"), EVERY)
def test_activation_checkpointing_changes_memory_and_nothing_else(name, size):
    if name in NO_BLOCKS:
        with pytest.raises(ValueError, match="names no blocks to checkpoint"):
            tower(name, size, activation_checkpointing=True)
        return
    results = []
    for recompute in (False, True):
        ours = tower(name, size, activation_checkpointing=recompute).train()
        for one in ours.modules():
            if type(one).__name__ == "DropPath":
                one.drop_prob = 0.0
        weights, held = {one.data_ptr() for one in ours.parameters()}, {}
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: held.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            out = ours(pictures(size))
        (out * torch.linspace(-1, 1, ours.width)).sum().backward()
        kept = sum(count for place, count in held.items() if place not in weights)
        results.append(
            (out.detach(), [one.grad for one in ours.parameters()], dict(ours.named_buffers()), kept)
        )
    (out, grads, buffers, kept), (again, grads_again, buffers_again, kept_again) = results
    torch.testing.assert_close(again, out, atol=0, rtol=0)
    scale = max(float(grad.abs().max()) for grad in grads)
    torch.testing.assert_close(grads_again, grads, atol=1e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(buffers_again, buffers, atol=0, rtol=0)
    assert kept_again < 0.9 * kept


@pytest.mark.parametrize(("name", "size"), EVERY)
@torch.no_grad()
def test_it_exports_to_open_clip_or_says_why_not(name, size):
    text = {"name": "transformer", "width": 32, "layers": 1, "heads": 2}
    image = {"name": "timm", "model": name, "image_size": size}
    torch.manual_seed(0)
    ours = create_model({"embed_dim": 8, "image_tower": image, "text_tower": text}, tokenizer=words()).eval()
    try:
        state = open_clip_state_dict(ours)
    except ValueError as error:
        published = timm.get_pretrained_cfg(name)
        if "own image_size" in str(error):
            assert published.fixed_input_size and published.input_size[-1] != size
            return
        assert "does not run" in str(error)
        with pytest.raises((RuntimeError, ValueError)):
            open_clip.CLIP(
                8, {"timm_model_name": name, "timm_pool": "", "image_size": size}, {"width": 32, "layers": 1}
            ).encode_image(pictures(size))
        return
    theirs = open_clip.CLIP(**open_clip_config(ours)).eval()
    theirs.load_state_dict(state)
    image = pictures(size)
    torch.testing.assert_close(
        ours.encode_image(image), theirs.encode_image(image, normalize=True), atol=1e-5, rtol=0
    )


def test_a_size_or_a_pool_that_gives_no_row_is_an_error_when_built():
    with pytest.raises(ValueError, match="crossvit_9_240 takes no pictures of image_tower.image_size 96"):
        tower("crossvit_9_240", 96)
    with pytest.raises(ValueError, match=r"image_tower.pool '' gives \(1, 96, .*choose a pool"):
        tower("test_resnet", 32, pool="")
