"""The text Transformer: equal to open_clip's, dropout that drops, pooling that reads the right token."""

from __future__ import annotations

import pytest
import torch
from open_clip.transformer import TextTransformer

from clipkit.towers import create_text_tower

PAD, SOT, EOT = 0, 48, 49
IDS = {"vocab_size": 50, "pad_id": PAD, "eot_id": EOT}
TINY = {"name": "transformer", "context_length": 12, "width": 32, "layers": 2, "heads": 4}


def tower(**settings):
    return create_text_tower({**TINY, **settings}, embed_dim=16, **IDS)


@pytest.fixture
def text():
    torch.manual_seed(0)
    text = torch.randint(1, SOT, (4, 12))
    text[:, 0] = SOT
    for row, end in enumerate((3, 11, 7, 1)):
        text[row, end] = EOT
        text[row, end + 1 :] = PAD
    return text


def test_equals_open_clips_text_transformer_with_copied_weights(text):
    ours = tower().eval()
    peer = TextTransformer(
        context_length=12, vocab_size=50, width=32, heads=4, layers=2, output_dim=None
    ).eval()
    peer.load_state_dict(ours.body.state_dict())
    torch.testing.assert_close(ours(text), peer(text), atol=1e-6, rtol=0)


def test_dropout_keeps_the_state_dict_of_open_clip():
    peer = TextTransformer(context_length=12, vocab_size=50, width=32, heads=4, layers=2, output_dim=None)
    assert tower(dropout=0.1).body.state_dict().keys() == peer.state_dict().keys()


def test_bidirectional_tower_equals_open_clips_with_a_padding_mask(text):
    ours = tower(causal=False).eval()
    peer = TextTransformer(
        context_length=12,
        vocab_size=50,
        width=32,
        heads=4,
        layers=2,
        output_dim=None,
        no_causal_mask=True,
        use_pad_mask=True,
    ).eval()
    peer.load_state_dict(ours.body.state_dict())
    torch.testing.assert_close(ours(text), peer(text), atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_change_a_text(text, causal):
    ours = tower(causal=causal).eval()
    torch.testing.assert_close(ours(text[:1, :6]), ours(text[:1]), atol=1e-6, rtol=0)


def test_the_padding_id_inside_a_text_is_a_token():
    # CLIP's vocabulary has "!" at id 0, which is also what it pads with.
    ours = tower(causal=False, pooling="mean").eval()
    a = torch.tensor([[SOT, 5, PAD, 7, EOT, PAD, PAD]])
    assert ours.attention_mask(a).tolist() == [[True] * 5 + [False] * 2]


@pytest.mark.parametrize("settings", [{"dropout": 0.2}, {"attention_dropout": 0.2}])
def test_dropout_acts_in_training_and_not_in_evaluation(text, settings):
    ours = tower(**settings)
    assert ours.has_dropout
    ours.train()
    assert not torch.allclose(ours(text), ours(text))
    ours.eval()
    torch.testing.assert_close(ours(text), ours(text), atol=0, rtol=0)


def test_no_dropout_is_the_same_in_training_and_in_evaluation(text):
    ours = tower()
    assert not ours.has_dropout
    torch.testing.assert_close(ours.train()(text), ours.eval()(text), atol=1e-6, rtol=0)


def test_each_dropout_place_drops_its_share():
    # Hooked inputs and outputs: the zeros are counted, not inferred from the tower's output.
    ours = tower(dropout=0.3, attention_dropout=0.0, width=128, context_length=64).train()
    shares = {}

    def count(name):
        return lambda module, inputs, output: shares.__setitem__(
            name, ((output == 0) & (inputs[0] != 0)).float().mean().item()
        )

    blocks = ours.body.transformer.resblocks
    places = {"embedding": ours.embedding_dropout}
    places |= {
        f"{i}.{slot}": getattr(block, slot) for i, block in enumerate(blocks) for slot in ("ls_1", "ls_2")
    }
    for name, module in places.items():
        module.register_forward_hook(count(name))
    torch.manual_seed(0)
    text = torch.randint(1, SOT, (16, 64))
    text[:, -1] = EOT
    ours(text)
    # 16 * 64 * 128 draws: a standard error of 0.0013.
    assert len(shares) == 5 and all(abs(share - 0.3) < 0.01 for share in shares.values()), shares


def test_eot_pooling_reads_the_first_end_token(text):
    ours = tower().eval()
    states = ours.tokens(text)
    for row, end in enumerate((3, 11, 7, 1)):
        torch.testing.assert_close(ours(text)[row], states[row, end], atol=0, rtol=0)


def test_mean_and_cls_pooling_by_hand(text):
    mean = tower(pooling="mean").eval()
    states = mean.tokens(text)
    torch.testing.assert_close(mean(text)[0], states[0, :4].sum(0) / 4)
    first = tower(pooling="cls", causal=False).eval()
    torch.testing.assert_close(first(text), first.tokens(text)[:, 0])


@pytest.mark.parametrize("pooling", ["eot", "last", "mean", "cls"])
def test_padding_may_stand_on_either_side(text, pooling):
    ours = tower(pooling=pooling, causal=False).eval()
    ends = (4, 12, 8, 2)
    left = torch.stack([torch.cat([row[end:], row[:end]]) for row, end in zip(text, ends, strict=True)])
    assert (left[:, 0] == PAD).any() and (left[:, -1] == EOT).all()
    torch.testing.assert_close(ours(left), ours(text), atol=0, rtol=0)
    both = torch.cat([torch.full((4, 2), PAD), text[:, :10]], dim=1)[[0, 2, 3]]
    torch.testing.assert_close(ours(both), ours(text[[0, 2, 3]]), atol=0, rtol=0)


def test_last_pooling_reads_the_state_before_the_padding(text):
    # The same end, and one that the text was cut before.
    text[1, 11] = 5
    ours = tower(pooling="last").eval()
    states = ours.tokens(text)
    for row, end in enumerate((3, 11, 7, 1)):
        torch.testing.assert_close(ours(text)[row], states[row, end], atol=0, rtol=0)


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_that_is_the_end_token_too_ends_a_text_once(start, causal):
    """GPT-2's tokenizer has one special token: it starts, ends and pads."""
    ends = 0
    spec = {**TINY, "causal": causal, "pooling": "eot"}
    ours = create_text_tower(spec, embed_dim=16, vocab_size=50, pad_id=ends, eot_id=ends).eval()
    rows = [[7, 8, 9], [4], [5, 6, 7, 8, 9, 10]]
    rows = [[ends] * start + row for row in rows]
    text = torch.tensor([row + [ends] * (12 - len(row)) for row in rows])
    mask = ours.attention_mask(text)
    assert mask.sum(dim=1).tolist() == [len(row) + 1 for row in rows]
    for pooling in ("eot", "last", "mean"):
        ours.pooling = pooling
        for row, feature in zip(rows, ours(text), strict=True):
            # The text alone, with one end token and no padding.
            states = ours.tokens(torch.tensor([[*row, ends]]))[0]
            wanted = states.mean(0) if pooling == "mean" else states[-1]
            torch.testing.assert_close(feature, wanted, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="padding id 0, which is its end token too: pad on the right"):
        ours(torch.tensor([[ends, ends, 7, 8, ends]]))


def test_a_text_without_an_end_token_is_refused():
    with pytest.raises(ValueError, match="no end token 49"):
        tower()(torch.ones(2, 12, dtype=torch.long))


def test_quick_gelu_is_x_times_a_sigmoid():
    block = tower(quick_gelu=True).body.transformer.resblocks[0]
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x))


def test_initialisation_has_open_clips_spread():
    ours = tower(width=256, layers=4)
    block = ours.body.transformer.resblocks[0]
    assert ours.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.attn.in_proj_weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(256**-0.5 * 8**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "width 32 is not a multiple"),
        ({"dropout": 1.0}, "dropout is a probability"),
        ({"attention_dropout": -0.1}, "attention_dropout is a probability"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"pooling": "cls"}, "causal"),
        ({"droput": 0.1}, "'droput'.*'dropout'"),
        ({"name": "transfomer"}, "'transfomer'.*'transformer'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tower(**settings)


def test_texts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="13 tokens.*context_length 12"):
        tower()(torch.full((1, 13), EOT))
    with pytest.raises(ValueError, match=r"\(B, L\)"):
        tower()(torch.full((12,), EOT))


def test_context_length_comes_from_the_tokenizer_when_unset():
    ours = create_text_tower({**TINY, "context_length": None}, embed_dim=16, context_length=9, **IDS)
    assert ours.context_length == 9
    with pytest.raises(ValueError, match="no context_length"):
        create_text_tower({**TINY, "context_length": None}, embed_dim=16, **IDS)
