"""Position embeddings in another size: open_clip's and timm's own functions, or loops in float64, say what they should be."""

from __future__ import annotations

import pytest
import torch

from clipkit.sources.positions import resized
from tests.sources.cases import (
    CAPTIONS,
    IMAGE,
    TEXT,
    VISION,
    assert_same,
    clipkit_run,
    open_clip_folder,
    run,
    started,
    stirred,
)

open_clip = pytest.importorskip("open_clip")
OPENAI = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}


@pytest.mark.parametrize(("image_size", "context_length"), [(96, 24), (48, 9), (64, 23)])
def test_another_picture_size_and_text_length_are_open_clips(tmp_path, image_size, context_length):
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    config = {"embed_dim": 48, "vision_cfg": VISION["vit"], "text_cfg": TEXT}
    source = stirred(open_clip.CLIP(**config))
    folder = open_clip_folder(tmp_path / "model", source, config)
    peer = open_clip.CLIP(
        embed_dim=48,
        vision_cfg={**VISION["vit"], "image_size": image_size},
        text_cfg={**TEXT, "context_length": context_length},
    ).eval()
    state = source.state_dict()
    resize_pos_embed(state, peer)
    resize_text_pos_embed(state, peer)
    peer.load_state_dict(state)
    sizes = {"image_tower": {"image_size": image_size}, "text_tower": {"context_length": context_length}}
    ours, tokenizer, report = started(run(init_from=str(folder), **sizes))
    tokens = open_clip.SimpleTokenizer(context_length=context_length)(CAPTIONS)
    assert_same(ours, tokenizer, peer, tokens, **OPENAI)
    names = ["text_tower.body.positional_embedding"]
    names += ["image_tower.body.positional_embedding"] if image_size != 64 else []
    assert sorted(report.resized) == sorted(names)
    assert report.resized[names[0]] == ([16, 32], [context_length, 32])
    assert "resized text_tower.body.positional_embedding: [16, 32] -> " in "\n".join(report.lines())


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2, which antialiased resizing takes (Keys 1981, equation 15)."""
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def weights(old: int, new: int, kernel, support: float) -> list[list[float]]:
    """Row i: how much of each old place is in new place i; the kernel is widened where there are fewer places."""
    scale = max(1.0, old / new)
    rows = []
    for place in range(new):
        centre = (place + 0.5) * old / new
        row = [
            kernel((one + 0.5 - centre) / scale) if abs(one + 0.5 - centre) < support * scale else 0
            for one in range(old)
        ]
        rows.append([value / sum(row) for value in row])
    return rows


@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_grid_is_resized_by_a_cubic_kernel_and_keeps_what_stands_before_it(old, new, kept):
    table = torch.randn(1, kept + old * old, 6, generator=torch.Generator().manual_seed(0))
    found = resized("image_tower.trunk.pos_embed", table, (1, kept + new * new, 6))
    by_hand = torch.zeros(new, new, 6, dtype=torch.float64)
    mix, grid = weights(old, new, cubic, 2.0), table[0, kept:].double().reshape(old, old, 6)
    for i in range(new):
        for j in range(new):
            for p in range(old):
                for q in range(old):
                    by_hand[i, j] += mix[i][p] * mix[j][q] * grid[p, q]
    torch.testing.assert_close(found[0, kept:].double(), by_hand.reshape(-1, 6), atol=1e-5, rtol=0)
    assert torch.equal(found[0, :kept], table[0, :kept])


@pytest.mark.parametrize(("old", "new", "first"), [(6, 9, 0), (9, 4, 0), (8, 12, 2)])
def test_a_texts_positions_are_interpolated_linearly_behind_those_that_are_no_tokens(old, new, first):
    table = torch.randn(old, 5, generator=torch.Generator().manual_seed(0))
    found = resized("text_tower.body.embeddings.position_embeddings.weight", table, (new, 5), first=first)
    line = table[first:].double()
    by_hand = []
    for place in range(new - first):
        at = min(max((place + 0.5) * len(line) / (new - first) - 0.5, 0.0), len(line) - 1.0)
        low = int(at)
        high = min(low + 1, len(line) - 1)
        by_hand.append(line[low] * (1 - (at - low)) + line[high] * (at - low))
    torch.testing.assert_close(found[first:].double(), torch.stack(by_hand), atol=1e-5, rtol=0)
    assert torch.equal(found[:first], table[:first])


def test_what_is_no_table_of_positions_keeps_its_shape():
    table = torch.zeros(10, 4)
    for name, shape in {
        "image_tower.body.conv1.weight": (17, 4),
        "image_tower.body.positional_embedding": (17, 5),
        # Nine of a grid and one before it: none of the other's shapes has one before it.
        "image_tower.trunk.pos_embed": (16, 4),
        "text_tower.body.token_embedding.weight": (12, 4),
    }.items():
        assert resized(name, table, shape) is None, name


def test_a_resnets_attention_pool_and_timms_positions_are_resized(tmp_path):
    from timm.layers import resample_abs_pos_embed

    config = {"embed_dim": 48, "vision_cfg": VISION["resnet"], "text_cfg": TEXT}
    source = stirred(open_clip.CLIP(**config))
    folder = open_clip_folder(tmp_path / "resnet", source, config)
    ours, _, report = started(run(init_from=str(folder), image_tower={"image_size": 96}))
    own = source.visual.attnpool.positional_embedding.detach()
    wanted = resample_abs_pos_embed(own[None], [3, 3], num_prefix_tokens=1)[0]
    torch.testing.assert_close(ours.image_tower.body.attnpool.positional_embedding.detach(), wanted)
    assert report.resized == {"image_tower.body.attnpool.positional_embedding": ([5, 512], [10, 512])}

    image = {"name": "timm", "model": "test_vit", "image_size": 64}
    place, model, _ = clipkit_run(tmp_path / "vit", image_tower=image)
    ours, _, _ = started(run(init_from=str(place), image_tower={"image_size": 96}))
    own = model.image_tower.trunk.pos_embed.detach()
    prefix = model.image_tower.trunk.num_prefix_tokens
    wanted = resample_abs_pos_embed(own, [6, 6], num_prefix_tokens=prefix)
    torch.testing.assert_close(ours.image_tower.trunk.pos_embed.detach(), wanted)


def test_a_hugging_face_encoder_is_made_longer(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"name": "hf", "model_type": "roberta", "config": {**sizes, "max_position_embeddings": 14}}
    place, model, _ = clipkit_run(tmp_path / "run", image_tower=IMAGE, text_tower=text)
    ours, tokenizer, report = started(run(init_from=str(place), text_tower={"context_length": 20}))
    name = "text_tower.body.embeddings.position_embeddings.weight"
    before, after = model.get_parameter(name), ours.get_parameter(name)
    # Its positions start behind the padding's id, which is 0 here.
    first = 1
    assert report.resized == {name: ([14, 32], [20 + first, 32])} and tokenizer.context_length == 20
    torch.testing.assert_close(after[:first], before[:first])
    torch.testing.assert_close(after[-1], before[-1])
    ours.encode_text(tokenizer(CAPTIONS))
