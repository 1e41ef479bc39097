"""Freezing and activation checkpointing, on every kind of tower."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clipkit.towers import create_image_tower, create_text_tower

RESNET = {"name": "timm", "model": "test_resnet", "image_size": 32}
CLIP_RESNET = {"name": "clip_resnet50", "image_size": 32, "layers": [1, 1, 1, 1], "width": 16}
IMAGE = {
    "timm_cnn": RESNET,
    "timm_vit": {"name": "timm", "model": "test_vit", "image_size": 32},
    "clip_resnet50": CLIP_RESNET,
    "clip_vit": {"name": "clip_vit", "image_size": 32, "patch_size": 16, "width": 64, "layers": 3},
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {
    "transformer": {"name": "transformer", "width": 32, "layers": 3, "heads": 2, "dropout": 0.1},
    "roberta": {"name": "hf", "model_type": "roberta", "config": SIZES},
    "t5": {
        "name": "hf",
        "model_type": "t5",
        "config": {"d_model": 32, "num_layers": 3, "num_heads": 2, "d_kv": 16, "d_ff": 64},
    },
}


def image_tower(spec, **settings):
    torch.manual_seed(0)
    return create_image_tower({**spec, **settings}, embed_dim=24)


def text_tower(spec, **settings):
    torch.manual_seed(0)
    return create_text_tower(
        {**spec, **settings}, embed_dim=24, vocab_size=30, pad_id=1, eot_id=2, context_length=8
    )


def make(kind, name, **settings):
    if kind == "image":
        return image_tower(IMAGE[name], **settings), torch.randn(4, 3, 32, 32)
    text = torch.randint(3, 30, (4, 8))
    text[:, -1] = 2
    return text_tower(TEXT[name], **settings), text


EVERY = [("image", name) for name in IMAGE] + [("text", name) for name in TEXT]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_frozen_layers_keep_their_values_and_the_rest_moves(kind, name):
    tower, batch = make(kind, name, freeze=2)
    before = copy.deepcopy(tower.state_dict())
    optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.5)
    out = tower.train()(batch)
    (out * torch.randn_like(out)).sum().backward()
    optimizer.step()
    moved = {n for n, value in tower.state_dict().items() if not torch.equal(value, before[n])}
    frozen = {n for n, p in tower.named_parameters() if not p.requires_grad}
    assert frozen and not moved & frozen
    # Whatever the library calls them, the first two blocks are frozen whole and the last is not.
    first, second, *_, last = tower.blocks()
    assert not any(p.requires_grad for block in (first, second) for p in block.parameters())
    assert all(p.requires_grad for p in last.parameters())
    assert moved


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_all_freezes_every_parameter_and_zero_none(kind, name):
    assert not any(p.requires_grad for p in make(kind, name, freeze="all")[0].parameters())
    assert all(p.requires_grad for p in make(kind, name, freeze=0)[0].parameters())


def test_embeddings_freeze_with_the_first_layers():
    for name in ("transformer", "roberta"):
        assert not text_tower(TEXT[name], freeze=1).token_embedding.weight.requires_grad


@pytest.mark.parametrize("spec", [RESNET, CLIP_RESNET], ids=["timm", "clip_resnet50"])
def test_frozen_batch_norm_stays_in_eval_and_keeps_its_statistics(spec):
    tower = image_tower(spec, freeze=2).train()
    assert tower.training
    norms = {n: m for n, m in tower.named_modules() if isinstance(m, nn.BatchNorm2d)}
    before = {n: m.running_mean.clone() for n, m in norms.items()}
    tower.eval().train()
    tower(torch.randn(4, 3, 32, 32))
    still = {n for n, m in norms.items() if torch.equal(m.running_mean, before[n])}
    early = {n for n in norms if "layer3" not in n and "layer4" not in n}
    assert still == early and len(early) < len(norms)
    assert all(norms[n].training != (n in early) for n in norms)


def test_freeze_all_keeps_all_batch_norms_still():
    tower = image_tower(RESNET, freeze="all").train()
    assert not any(m.training for m in tower.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("wrong", [-1, 5, "some", 1.5, True])
def test_wrong_depths_are_refused(wrong):
    with pytest.raises(ValueError, match="1 to 4"):
        image_tower(RESNET, freeze=wrong)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_activation_checkpointing_changes_memory_and_nothing_else(kind, name):
    plain, batch = make(kind, name)
    recomputing, _ = make(kind, name, activation_checkpointing=True)
    assert recomputing.state_dict().keys() == plain.state_dict().keys()
    results = []
    for tower in (plain, recomputing):
        tower.train()
        torch.manual_seed(3)
        weights = {p.data_ptr() for p in tower.parameters()}
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            out = tower(batch)
        held = sum(size for pointer, size in kept.items() if pointer not in weights)
        (out * torch.linspace(-1, 1, out.shape[1])).sum().backward()
        grads = {n: p.grad for n, p in tower.named_parameters()}
        results.append((out.detach(), grads, dict(tower.named_buffers()), held))
    (out, grads, buffers, held), (out2, grads2, buffers2, held2) = results
    torch.testing.assert_close(out2, out, atol=0, rtol=0)
    torch.testing.assert_close(grads2, grads, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(buffers2, buffers, atol=0, rtol=0)
    # The stem is not recomputed and is a ResNet's largest layer.
    assert held2 < (0.8 if "resnet" in name or "cnn" in name else 0.5) * held


def test_activation_checkpointing_survives_a_copy_and_switches_off():
    tower, batch = make("image", "clip_vit", activation_checkpointing=True)
    twin = copy.deepcopy(tower)
    nn.init.zeros_(twin.blocks()[0].mlp.c_proj.weight)
    assert not torch.equal(twin.train()(batch), tower.train()(batch))
    tower.set_activation_checkpointing(False)
    assert "forward" not in vars(tower.blocks()[0])
