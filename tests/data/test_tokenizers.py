"""Tokenizers: open_clip's exact ids, truncation that keeps the end, files that give the same ids again."""

from __future__ import annotations

import json
import random

import pytest
import torch

from clipkit.data import create_tokenizer, list_tokenizers, load_tokenizer

ODD = [
    "",
    " ",
    "\n\t ",
    "a" * 10_000,
    "ab " * 3_400,
    "\u00e9" * 10_000,
    "caf\u00e9 na\u00efve \u2019s",
    "&amp;lt;b&gt; &eacute;",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \U0001f389\U0001f389",
    "<start_of_text> x <end_of_text>y",
    "<START_OF_TEXT>",
    "\u03a3\u0391\u03a3 \u03a3",
    "don't we'll I'M you'D '\u017f it's",
    "\x00\x1f\x7fabc\x0b\x0cd",
    "x\x1cy\u2003z\u0085w\u00a0v",
    "\u0130stanbul \ufb01re \u00df",
    "12345 1\u00bd \u00b2 3.14",
    "a_b __c",
    "\u201cquoted\u201d \u2014 dash\u2026",
    "\u00c3\u00a9 mojibake",
    "e\u0301 combining",
    "\u202eright-to-left \u05d0\u05d1",
    "tab\tand\r\nlines",
    "!!!??..",
    "'",
    "''''s",
    "a'sb",
]


@pytest.fixture(scope="module")
def reference():
    import open_clip

    return open_clip.SimpleTokenizer()


@pytest.fixture(scope="module")
def clip():
    return create_tokenizer("clip_bpe")


def test_odd_strings_get_open_clips_ids(clip, reference):
    for text in ODD:
        assert torch.equal(clip(text), reference(text)), repr(text[:40])


def test_random_unicode_gets_open_clips_ids(clip, reference):
    rng = random.Random(0)
    ranges = [
        (32, 127),
        (32, 127),
        (0, 32),
        (0xA0, 0x250),
        (0x370, 0x530),
        (0x2000, 0x2070),
        (0x4E00, 0x4F00),
        (0x1F600, 0x1F640),
    ]
    texts = [
        "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 30)))
        for _ in range(400)
    ]
    assert torch.equal(clip(texts), reference(texts))


def test_every_word_of_the_vocabulary_gets_open_clips_ids(clip, reference):
    words = [
        token[:-4]
        for token in reference.encoder
        if token.endswith("</w>") and token[:-4].isascii() and token[:-4].isprintable()
    ]
    assert len(words) > 30_000
    for i in range(0, len(words), 70):
        text = " ".join(words[i : i + 70])
        assert clip._pairs.ids(text, 10**6) == reference.encode(text)


def test_real_captions_get_open_clips_ids(clip, reference, test_data):
    captions = []
    for name, lines in (
        ("flickr8k-mini/val_retrieval.jsonl", 600),
        ("sentences/multi30k_captions.jsonl", 400),
    ):
        for line in open(test_data(name)).readlines()[:lines]:
            captions += json.loads(line)["captions"]
    assert len(captions) == 5000
    assert torch.equal(clip(captions), reference(captions))
    assert torch.equal(clip(captions[:500]), reference(captions[:500])), "a warm cache changes nothing"


@pytest.mark.parametrize("length", [3, 8, 77])
def test_truncation_keeps_the_end_token(length, reference):
    tokens = create_tokenizer({"name": "clip_bpe", "context_length": length})(
        "a long sentence about " + "many things " * 50
    )
    assert tokens.shape == (1, length) and tokens[0, -1] == 49407 and tokens[0, 0] == 49406
    assert torch.equal(
        tokens, reference("a long sentence about " + "many things " * 50, context_length=length)
    )


def test_clip_bpe_describes_itself(clip):
    assert (clip.vocab_size, clip.sot_id, clip.eot_id, clip.pad_id, clip.context_length) == (
        49408,
        49406,
        49407,
        0,
        77,
    )
    assert clip([]).shape == (0, 77)


def test_words_are_numbered_by_alphabet_with_the_end_token_last():
    tokenizer = create_tokenizer(
        {"name": "words", "context_length": 7}, captions=["The cat, the dog", "a CAT"]
    )
    # Vocabulary by hand: "," a cat dog the -> 3 4 5 6 7, end 8.
    assert tokenizer("The dog a unicorn").tolist() == [[2, 7, 6, 4, 1, 8, 0]]
    assert tokenizer("the the the the the the the").tolist() == [[2, 7, 7, 7, 7, 7, 8]]
    assert tokenizer.eot_id == tokenizer.vocab_size - 1 == 8


def test_words_vocabulary_is_bounded_by_count_and_size():
    captions = ["b a a c c c d"]
    common = create_tokenizer({"name": "words", "max_words": 2}, captions=captions)
    assert common.words == ["a", "c"]
    assert create_tokenizer({"name": "words", "min_count": 2}, captions=lambda: captions).words == ["a", "c"]


@pytest.mark.parametrize("folder", ["roberta", "bert-uncased"])
def test_hugging_face_ids_equal_transformers(folder, test_data):
    import transformers

    path = test_data(f"tokenizers/{folder}")
    cls = transformers.RobertaTokenizerFast if folder == "roberta" else transformers.BertTokenizerFast
    peer = cls.from_pretrained(str(path))
    texts = ["A dog runs.", "", "caf\u00e9 \U0001f600 " * 30, "two words"]
    expected = peer(texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt")[
        "input_ids"
    ]
    ours = create_tokenizer({"name": "hf", "model": str(path), "context_length": 16})
    assert torch.equal(ours(texts), expected)
    assert (ours.pad_id, ours.sot_id, ours.eot_id) == (
        peer.pad_token_id,
        peer.cls_token_id,
        peer.sep_token_id,
    )
    assert ours(texts)[2, -1] == ours.eot_id


@pytest.mark.parametrize("name", ["clip_bpe", "words", "hf"])
def test_a_saved_tokenizer_gives_the_same_ids(name, tmp_path, test_data):
    spec = {"name": name, "context_length": 12}
    if name == "hf":
        spec["model"] = str(test_data("tokenizers/bert-uncased"))
    tokenizer = create_tokenizer(spec, captions=["a red circle", "a blue star"] if name == "words" else None)
    tokenizer.save(tmp_path / "tokenizer.json")
    for again in (
        load_tokenizer(tmp_path / "tokenizer.json"),
        create_tokenizer({"path": str(tmp_path / "tokenizer.json")}),
    ):
        assert torch.equal(again(["a red star", "caf\u00e9"]), tokenizer(["a red star", "caf\u00e9"]))
        assert (again.vocab_size, again.eot_id, again.context_length) == (
            tokenizer.vocab_size,
            tokenizer.eot_id,
            12,
        )
    json.loads((tmp_path / "tokenizer.json").read_text())


def test_wrong_settings_say_what_is_right(tmp_path):
    assert set(list_tokenizers()) >= {"clip_bpe", "hf", "words"}
    with pytest.raises(ValueError, match="Did you mean 'clip_bpe'"):
        create_tokenizer("clip_bpee")
    with pytest.raises(ValueError, match="Did you mean 'context_length'"):
        create_tokenizer({"name": "clip_bpe", "contxt_length": 7})
    with pytest.raises(ValueError, match="training captions"):
        create_tokenizer("words")
    with pytest.raises(ValueError, match="3 or more"):
        create_tokenizer({"name": "clip_bpe", "context_length": 2})
    with pytest.raises(ValueError, match="tokenizer.model"):
        create_tokenizer("hf")
    with pytest.raises(ValueError, match="no-such-folder"):
        create_tokenizer({"name": "hf", "model": str(tmp_path / "no-such-folder")})
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="not a tokenizer file"):
        load_tokenizer(tmp_path / "x.json")
