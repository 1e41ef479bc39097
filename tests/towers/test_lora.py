"""Adapters beside a tower's linear layers: every family, merged and told from the tower's own weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import normalize

from clipkit.optim import create_optimizer
from clipkit.towers import create_image_tower, create_text_tower
from clipkit.towers.lora import LinearAttention, add_lora, frozen_names, is_adapted, merge_lora, plain_name

pytest.importorskip("peft")

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
QWEN3 = {**BERT, "num_key_value_heads": 1, "head_dim": 16}
TRANSFORMER = {"name": "transformer", "width": 32, "layers": 2, "heads": 2}
VIT = {"name": "clip_vit", "image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "heads": 2}
# Tower -> its settings, and how many layers of it have adapters: 4 a block of CLIP's (two of attention, two of the MLP), 6 of
# BERT's (queries, keys, values apart), 7 of Qwen3's (a gated MLP).
TOWERS = {
    "clip_vit": (VIT, 8),
    "timm": ({"name": "timm", "model": "test_vit", "image_size": None}, 24),
    "transformer": (TRANSFORMER, 8),
    "transformer that sees both sides": ({**TRANSFORMER, "causal": False, "pooling": "mean"}, 8),
    "bert": ({"name": "hf", "model_type": "bert", "config": BERT}, 12),
    "gpt2": ({"name": "hf", "model_type": "gpt2", "config": GPT2}, 8),
    "qwen3": ({"name": "hf", "model_type": "qwen3", "config": QWEN3}, 14),
}


def build(name: str, **more):
    settings = {**(TOWERS[name][0] if name in TOWERS else {"name": name}), **more}
    torch.manual_seed(1)
    if settings["name"] in ("clip_vit", "timm", "clip_resnet50"):
        return create_image_tower(settings, embed_dim=16)
    return create_text_tower(settings, embed_dim=16, vocab_size=50, pad_id=0, eot_id=49, context_length=12)


def inputs(tower) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    if hasattr(tower, "image_size"):
        return torch.randn(3, 3, tower.image_size, tower.image_size, generator=generator)
    return torch.tensor([[1, 5, 6, 7, 49, 0], [1, 3, 3, 49, 0, 0], [1, 9, 8, 7, 6, 49]])


def moved(tower):
    """The tower with adapters that change something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return tower


@pytest.fixture(scope="module", params=TOWERS)
def towers(request):
    """(name, the tower, the same tower with adapters), in evaluation mode."""
    plain, adapted = build(request.param), build(request.param, lora={"rank": 4, "alpha": 8.0})
    return request.param, plain.eval(), adapted.eval()


def test_an_adapted_tower_begins_as_it_was_and_has_adapters_everywhere(towers):
    name, plain, adapted = towers
    x = inputs(plain)
    torch.testing.assert_close(adapted(x), plain(x), rtol=0, atol=1e-6)
    trained = [key for key, one in adapted.named_parameters() if one.requires_grad]
    assert len(trained) == 2 * TOWERS[name][1] and all(".lora_" in key for key in trained)


def test_merged_equals_unmerged_and_has_the_names_and_shapes_of_the_tower(towers):
    """1e-6 of a unit feature. W + alpha / rank B A, from the adapters' own numbers in float64."""
    _, plain, adapted = towers
    adapted = moved(copy.deepcopy(adapted))
    x = inputs(plain)
    before, state = adapted(x), adapted.state_dict()
    assert (normalize(before, dim=-1) - normalize(plain(x), dim=-1)).abs().max() > 1e-3
    merged = merge_lora(adapted)
    assert (normalize(merged(x), dim=-1) - normalize(before, dim=-1)).abs().max() < 1e-6
    own = plain.state_dict()
    found = merged.state_dict()
    assert {key: tensor.shape for key, tensor in found.items()} == {k: t.shape for k, t in own.items()}
    assert not is_adapted(merged)
    changed = {key for key in own if not torch.equal(own[key], found[key])}
    for key, b in state.items():
        if "lora_B" not in key:
            continue
        # As it was before the attention's layers were opened.
        name = key.replace(".lora_B.default", "")
        name = name if name in own else name.replace("in_proj.weight", "in_proj_weight")
        delta = 2 * b.double() @ state[key.replace("lora_B", "lora_A")].double()
        # GPT-2 holds the weight transposed.
        delta = delta.T if ".h." in name else delta
        assert (found[name].double() - own[name].double() - delta).abs().max() < 1e-6, name
        changed.discard(name)
    assert not changed


def test_every_adapter_learns_and_nothing_else_does(towers):
    _, _, adapted = towers
    adapted = moved(copy.deepcopy(adapted)).train()
    out = adapted(inputs(adapted))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    for key, parameter in adapted.named_parameters():
        assert (parameter.grad is not None and parameter.grad.norm() > 0) == (".lora_" in key), key


def test_its_names_are_told_back_and_it_is_made_again_without_values(towers):
    """For layer-wise rates; and a checkpoint's architecture is compared on the meta device."""
    name, plain, adapted = towers
    own = dict(plain.named_parameters())
    for key, _ in adapted.named_parameters():
        assert plain_name(adapted, key) in own
    with torch.device("meta"):
        again = build(name, lora={"rank": 4, "alpha": 8.0})
    shapes = {key: tensor.shape for key, tensor in again.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in adapted.state_dict().items()}
    assert frozen_names(adapted) == {key for key in shapes if ".lora_" not in key}


def test_layer_wise_rates_are_those_of_the_layers_that_are_adapted():
    tower = build("transformer", lora={"rank": 2})
    optimizer = create_optimizer(tower, name="adamw", lr=1.0, weight_decay=0.0, layer_decay=0.5)
    rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
    for key, parameter in tower.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (0.25 if ".resblocks.0." in key else 0.5), key


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "of each head"])
def test_opened_attention_is_torchs_own(batch_first, mask):
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(12, 3, batch_first=batch_first).double()
    torch.nn.init.normal_(attention.in_proj_bias)
    x = torch.randn((2, 5, 12) if batch_first else (5, 2, 12), dtype=torch.float64)
    masks = {
        "none": None,
        "causal": torch.full((5, 5), float("-inf"), dtype=torch.float64).triu(1),
        "bool": torch.ones(5, 5, dtype=torch.bool).triu(1),
        "of each head": torch.randn(6, 5, 5, dtype=torch.float64),
    }
    expected, _ = attention(x, x, x, need_weights=False, attn_mask=masks[mask])
    opened = LinearAttention(attention)
    torch.testing.assert_close(opened(x, x, x, attn_mask=masks[mask])[0], expected)
    closed, _ = opened.closed()(x, x, x, need_weights=False, attn_mask=masks[mask])
    assert torch.equal(closed, expected)
    with pytest.raises(ValueError, match="attends to its own input"):
        opened(x, x.clone(), x)


def test_activation_checkpointing_and_dropout_leave_the_gradients():
    lora = {"rank": 2, "dropout": 0.0}
    plain, again = (moved(build("clip_vit", lora=lora, activation_checkpointing=on)) for on in (False, True))
    x = inputs(plain)
    for tower in (plain, again):
        tower(x).square().sum().backward()
    for (key, one), (_, other) in zip(plain.named_parameters(), again.named_parameters()):
        assert one.grad is None or torch.equal(one.grad, other.grad), key
    dropping = moved(build("transformer", lora={"rank": 2, "dropout": 0.5})).train()
    text = inputs(dropping)
    assert not torch.equal(dropping(text), dropping(text))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("clip_resnet50", {"lora": {"rank": 2}, "image_size": 32, "width": 8}, "a convolutional tower"),
        ("clip_vit", {"lora": {"rank": 2, "targets": ["qkv"]}}, "no linear layer is called"),
        ("clip_vit", {"lora": {"rank": 2, "targets": []}}, "is empty"),
        ("clip_vit", {"lora": {"rank": 2, "alpha": 0.0}}, "an alpha above 0"),
        ("clip_vit", {"lora": {"rank": 2, "dropout": 1.0}}, "dropout of 0 to below 1"),
        ("clip_vit", {"lora": {"rank": 2}, "freeze": 1}, "leave freeze at 0"),
        ("clip_vit", {"lora": {"rnk": 2}}, "Did you mean 'rank'"),
    ],
)
def test_wrong_settings_say_what_to_do(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, **settings)


def test_an_adapter_that_would_do_nothing_is_refused():
    """CLIP's attention pooling reads four layers' weights without calling them: peft would adapt them in vain."""
    with pytest.raises(ValueError, match=r"reads the weight of body.attnpool.q_proj without calling"):
        build("clip_resnet50", lora={"rank": 2, "targets": ["q_proj"]}, image_size=32, width=8)
    tower = build("clip_resnet50", image_size=32, width=8)
    state = {key: tensor.clone() for key, tensor in tower.state_dict().items()}
    with pytest.raises(ValueError):
        add_lora(tower, rank=2)
    assert {*tower.state_dict()} == {*state}


def test_chosen_layers_alone_have_adapters():
    tower = build("bert", lora={"rank": 2, "targets": ["query", "value"]})
    adapted = {
        key.split(".lora_")[0].rpartition(".")[2] for key, _ in tower.named_parameters() if "lora_" in key
    }
    assert adapted == {"query", "value"}
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(tower, rank=2)
