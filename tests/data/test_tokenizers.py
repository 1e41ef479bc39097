"""Tokenizers: open_clip's exact ids, truncation that keeps the end, files that give the same ids again."""

from __future__ import annotations

import gzip
import json
import os
import random
import time

import pytest
import tokenizers
import torch

from clipkit.data import create_tokenizer, list_tokenizers, load_tokenizer
from clipkit.data.bpe import _merge_everywhere, _merge_long, canonicalize
from clipkit.foreign import BrokenFile, named_by

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


def long_words() -> list[str]:
    rng = random.Random(5)
    letters = {"ascii": "abcdefghijklmnopqrstuvwxyz", "few": "aeinst", "marks": "!?.,-_#"}
    out = ["".join(rng.choices(kind, k=n)) for kind in letters.values() for n in (47, 48, 49, 50, 200, 1500)]
    out += [
        "".join(chr(rng.randrange(*span)) for _ in range(300)) for span in ((0xE0, 0x17F), (0x4E00, 0x9000))
    ]
    out += ["".join(rng.choices("ab\u00e9\u4e2d", k=600))]
    out += [piece * n for piece in ("a", "ab", "aba", "the", "\u00e9") for n in (49, 100, 511, 1024)]
    return out + ["antidisestablishmentarianism" * 40, "a" * 300 + "the" * 200 + "z"]


def test_long_words_get_open_clips_ids(clip, reference):
    for word in long_words():
        assert clip._pairs.ids(word, 10**9) == reference.encode(word), word[:60]


def test_merging_by_a_heap_is_merging_round_by_round():
    """Also where merges are in an order that training would not give, such as one that needs a later one."""
    rng = random.Random(0)
    for _ in range(300):
        made = ["a", "b", "c"]
        pairs = {}
        for _ in range(rng.randrange(1, 25)):
            pair = (rng.choice(made), rng.choice(made))
            pairs[pair] = len(pairs)
            made.append("".join(pair))
        order = list(range(len(pairs)))
        rng.shuffle(order)
        ranks = dict(zip(pairs, order, strict=True))
        parts = rng.choices("abc", k=rng.randrange(2, 60))
        slow = list(parts)
        while True:
            found = [pair for pair in zip(slow, slow[1:]) if pair in ranks]
            if not found:
                break
            slow = _merge_everywhere(slow, min(found, key=ranks.__getitem__))
        assert _merge_long(parts, ranks) == slow


def test_a_long_word_takes_no_quadratic_time(clip):
    """100,000 letters: hours by rounds over the whole word, some tenths of a second now."""
    word = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    start = time.process_time()
    clip(word)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("name", ["clip_bpe", "words", "hf"])
def test_the_rest_of_a_very_long_text_is_not_looked_at(name, test_data, monkeypatch):
    monkeypatch.setattr("clipkit.data.tokenizers.MAX_CHARACTERS", 12)
    spec = {"name": name, "context_length": 16}
    if name == "hf":
        spec["model"] = str(test_data("tokenizers/bert-uncased"))
    tokenizer = create_tokenizer(spec, captions=["a red circle and stars"] if name == "words" else None)
    long = "a red circle and stars"
    assert (
        torch.equal(tokenizer(long), tokenizer("a red circle")) and len(set(tokenizer(long)[0].tolist())) > 4
    )
    assert torch.equal(tokenizer([long, "a"]), tokenizer(["a red circle", "a"]))


def merges_file(path, lines, pack=gzip.compress):
    path.write_bytes(pack("\n".join(["#version", *lines]).encode()))
    return path


def test_own_merges_are_kept_in_the_saved_file(tmp_path):
    path = merges_file(tmp_path / "merges.gz", ["h e", "l l", "he ll", "o</w> x"])
    tokenizer = create_tokenizer({"name": "clip_bpe", "context_length": 12, "merges": str(path)})
    expected = tokenizer(["hello hell", "world"])
    assert tokenizer.vocab_size == 512 + 4 + 2
    tokenizer.save(tmp_path / "tokenizer.json")
    path.unlink()
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert torch.equal(again(["hello hell", "world"]), expected) and again.vocab_size == tokenizer.vocab_size
    create_tokenizer("clip_bpe").save(tmp_path / "usual.json")
    assert (tmp_path / "usual.json").stat().st_size < 200, "open_clip's own merges are not copied"


def test_a_file_that_names_its_merges_opens_what_it_may_alone(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    elsewhere, own = (merges_file(folder / "merges.gz", ["h e"]) for folder in (tmp_path, tmp_path / "work"))
    for path, allowed in ((own, True), (elsewhere, False)):
        saved = {"tokenizer": "clip_bpe", "context_length": 12, "merges": str(path)}
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
        assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == 515
        with named_by(tmp_path / "run"):
            if allowed:
                assert load_tokenizer(tmp_path / "tokenizer.json").vocab_size == 515
            else:
                with pytest.raises(BrokenFile, match="tokenizer.merges is"):
                    load_tokenizer(tmp_path / "tokenizer.json")


SECRET = "hunter2"
BROKEN_MERGES = {
    "no gzip": SECRET.encode(),
    "cut short": gzip.compress(SECRET.encode() * 99)[:-12],
    "altered": gzip.compress(SECRET.encode() * 99)[:20] + b"xxxx",
    "no text": gzip.compress(b"\n\xff\xff"),
    "a merge of three": gzip.compress(f"#\n{SECRET} b c\n".encode()),
    "a merge of one": gzip.compress(f"#\na b\n{SECRET}\n".encode()),
    "a bomb": gzip.compress(b"\0" * (65 << 20), 1),
    "empty": b"",
}


@pytest.mark.parametrize("what", BROKEN_MERGES)
def test_broken_merges_are_an_error_that_names_the_file(what, tmp_path):
    path = tmp_path / "merges.gz"
    path.write_bytes(BROKEN_MERGES[what])
    with pytest.raises(ValueError, match=str(path)) as raised:
        create_tokenizer({"name": "clip_bpe", "merges": str(path)})
    assert SECRET not in str(raised.value)


def test_merges_that_are_no_regular_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=str(path)):
            create_tokenizer({"name": "clip_bpe", "merges": str(path)})


def hf_state(**changes):
    backend = {
        "version": "1.0",
        "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"},
    }
    state = {"tokenizer": "hf", "context_length": 8, "special": {"pad": 0, "sot": 0, "eot": 1}}
    return {**state, "backend": json.dumps({**backend, **changes.pop("backend", {})}), **changes}


BROKEN_TOKENIZERS = {
    "no name": {"context_length": 12},
    "another name": {"tokenizer": SECRET, "context_length": 12},
    "a name that is a list": {"tokenizer": [SECRET]},
    "a setting too many": {"tokenizer": "words", "context_length": 12, "vocabulary": [], "x": SECRET},
    "a setting too few": {"tokenizer": "words", "context_length": 12},
    "words that are numbers": {"tokenizer": "words", "context_length": 12, "vocabulary": ["a", 3]},
    "a huge context": {"tokenizer": "words", "context_length": 10**12, "vocabulary": ["a"]},
    "a context of text": {"tokenizer": "words", "context_length": SECRET, "vocabulary": ["a"]},
    "a context that is true": {"tokenizer": "words", "context_length": True, "vocabulary": ["a"]},
    "merges of three": {"tokenizer": "clip_bpe", "context_length": 12, "merges": [f"{SECRET} b c"]},
    "merges of lists": {"tokenizer": "clip_bpe", "context_length": 12, "merges": [["a", "b"]]},
    "too many merges": {"tokenizer": "clip_bpe", "context_length": 12, "merges": ["a b"] * 50_000},
    "merges that are a file of another kind": {
        "tokenizer": "clip_bpe",
        "context_length": 12,
        "merges": "/etc/passwd",
    },
    "a backend that is no json": hf_state() | {"backend": SECRET},
    "a backend of nothing": hf_state() | {"backend": "{}"},
    "a deep backend": hf_state() | {"backend": "[" * 100_000},
    "a model that is not": hf_state(backend={"model": {"type": SECRET}}),
    "special ids beyond the vocabulary": hf_state(special={"pad": 7, "sot": 0, "eot": 1}),
    "negative special ids": hf_state(special={"pad": -1, "sot": 0, "eot": 1}),
    "special ids too few": hf_state(special={"pad": 0}),
    "a post-processor of unknown tokens": hf_state(
        backend={"post_processor": {"type": "BertProcessing", "sep": [SECRET, 99], "cls": [SECRET, 98]}}
    ),
    "no token for the unknown": hf_state(
        backend={"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": SECRET}}
    ),
}


@pytest.mark.parametrize("what", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_file_is_one_error_that_names_it_and_quotes_nothing(what, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(BROKEN_TOKENIZERS[what]))
    with pytest.raises(ValueError, match=str(path)) as raised:
        load_tokenizer(path)
    assert SECRET not in str(raised.value) and "root:" not in str(raised.value)


def test_the_backend_of_these_cases_is_otherwise_good(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hf_state()))
    assert load_tokenizer(path)("a b").tolist() == [[0, 0, 0, 0, 0, 0, 0, 0]]


def odd_texts(count=300):
    rng = random.Random(3)
    spans = [
        (32, 127),
        (32, 127),
        (33, 48),
        (0xA0, 0x250),
        (0x370, 0x530),
        (0x2000, 0x2070),
        (0x4E00, 0x4F00),
    ]
    made = [
        "".join(chr(rng.randrange(*rng.choice(spans))) for _ in range(rng.randrange(1, 40)))
        for _ in range(count)
    ]
    # What a second cleaning would change: mojibake and entities that appear once the punctuation is gone.
    mended = [
        "\u00c3,\u00a9",
        "\u00c3_\u00a9",
        "&am;p;",
        "&amp;amp;lt;",
        "a_b__c",
        "\u0130x",
        "\ufb01,\ufb01",
        "\u00e3\u20ac,\u20ac",
    ]
    return [*ODD, *made, *mended]


def real_captions(test_data, count=100):
    with open(test_data("flickr8k-mini/val_retrieval.jsonl")) as file:
        return [text for line in file.readlines()[:count] for text in json.loads(line)["captions"]]


def test_canonical_text_is_open_clips():
    from open_clip.tokenizer import get_clean_fn

    theirs = get_clean_fn("canonicalize")
    for text in odd_texts():
        assert canonicalize(text) == theirs(text), repr(text)


def test_canonical_ids_are_open_clips(test_data):
    import open_clip

    ours = create_tokenizer({"name": "clip_bpe", "clean": "canonicalize"})
    theirs = open_clip.SimpleTokenizer(clean="canonicalize")
    texts = [*odd_texts(), *real_captions(test_data)]
    assert torch.equal(ours(texts), theirs(texts))
    assert not torch.equal(ours(texts), create_tokenizer("clip_bpe")(texts))


@pytest.mark.parametrize("folder", [pytest.param("roberta", marks=pytest.mark.slow), "bert-uncased"])
def test_canonical_hugging_face_ids_are_open_clips(folder, test_data, tmp_path):
    import open_clip
    import transformers

    cls = transformers.RobertaTokenizerFast if folder == "roberta" else transformers.BertTokenizerFast
    cls.from_pretrained(str(test_data(f"tokenizers/{folder}"))).save_pretrained(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=20, clean="canonicalize")
    ours = create_tokenizer(
        {"name": "hf", "model": str(tmp_path), "context_length": 20, "clean": "canonicalize"}
    )
    texts = [*odd_texts(100), *real_captions(test_data, 40)]
    assert torch.equal(ours(texts), theirs(texts))


def test_a_canonical_vocabulary_has_no_punctuation(tmp_path):
    spec = {"name": "words", "clean": "canonicalize", "context_length": 8}
    tokenizer = create_tokenizer(spec, captions=["It's a dog, a_DOG!"])
    assert tokenizer.words == ["a", "dog", "its"]
    assert torch.equal(tokenizer(["ITS a (dog)."]), tokenizer(["it's a dog"]))
    tokenizer.save(tmp_path / "t.json")
    assert torch.equal(load_tokenizer(tmp_path / "t.json")(["It's, a dog"]), tokenizer(["its a dog"]))
    for name in ("words", "clip_bpe", "hf"):
        with pytest.raises(ValueError, match="tokenizer.clean is 'canonicalise'.*canonicalize"):
            create_tokenizer(
                {"name": name, "clean": "canonicalise", **({"model": "x"} if name == "hf" else {})}
            )


@pytest.mark.parametrize("folder", ["roberta", "bert-uncased", "clip"])
def test_ids_spell_the_text_they_were_made_from(folder, test_data, reference):
    """Nothing is lost or altered beyond what the vocabulary does by design: case (bert, clip), white space (clip)."""
    texts = real_captions(test_data)
    if folder == "clip":
        merges = str(test_data("tokenizers/clip/bpe_simple_vocab_16e6.txt.gz"))
        tokenizer = create_tokenizer({"name": "clip_bpe", "merges": merges, "context_length": 120})
        spelt = [reference.decode(row[1 : row.index(tokenizer.eot_id)]) for row in tokenizer(texts).tolist()]
        plain = lambda text: "".join(text.lower().split())
    else:
        spec = {"name": "hf", "model": str(test_data(f"tokenizers/{folder}")), "context_length": 120}
        tokenizer = create_tokenizer(spec)
        spelt = [
            tokenizer._backend.decode(row, skip_special_tokens=True) for row in tokenizer(texts).tolist()
        ]
        # WordPiece stands words and signs apart; what it joins again is a matter of taste.
        plain = (lambda text: text) if folder == "roberta" else (lambda text: "".join(text.lower().split()))
    assert [plain(text) for text in spelt] == [plain(text) for text in texts]
    assert all((row == tokenizer.eot_id).any() for row in tokenizer(texts))


def tiny_tokenizer(kind, folder):
    """Tokenizers as GPT-2 (one special token, no post-processor) and LLaMA (one for the start alone) have them."""
    import transformers

    words = {
        word: i
        for i, word in enumerate(["<|endoftext|>", "<pad>", "<s>", "</s>", "<mask>", "a", "dog", "many"])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if not kind.startswith("gpt2"):
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        template = {"llama": "<s> $A", "another": "$A <mask>", "own ends": None}[kind]
        if template:
            backend.post_processor = tokenizers.processors.TemplateProcessing(
                single=template, special_tokens=[("<s>", 2), ("<mask>", 4)]
            )
    if kind != "gpt2":
        special["pad_token"] = "<pad>"
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)


# By hand: the ids of "a dog", of "" and of "many" ten times, in a context of 5.
ENDED = {
    "gpt2": ([5, 6, 0, 0, 0], [0, 0, 0, 0, 0], [7, 7, 7, 7, 0]),
    "gpt2 with padding": ([5, 6, 0, 1, 1], [0, 1, 1, 1, 1], [7, 7, 7, 7, 0]),
    "own ends": ([2, 5, 6, 3, 1], [2, 3, 1, 1, 1], [2, 7, 7, 7, 3]),
    "llama": ([2, 5, 6, 3, 1], [2, 3, 1, 1, 1], [2, 7, 7, 7, 3]),
}


@pytest.mark.parametrize("kind", ENDED)
def test_every_text_ends_with_the_end_token(kind, tmp_path):
    tiny_tokenizer(kind, tmp_path / "model")
    ours = create_tokenizer({"name": "hf", "model": str(tmp_path / "model"), "context_length": 5})
    texts = ["a dog", "", "many " * 10]
    assert ours(texts).tolist() == [*ENDED[kind]]
    ours.save(tmp_path / "t.json")
    assert torch.equal(load_tokenizer(tmp_path / "t.json")(texts), ours(texts))


def test_another_token_behind_the_text_is_refused_when_the_tokenizer_is_made(tmp_path):
    tiny_tokenizer("another", tmp_path)
    with pytest.raises(ValueError, match="puts '<mask>' behind a text, not its end token '</s>'"):
        create_tokenizer({"name": "hf", "model": str(tmp_path)})


@pytest.mark.slow
def test_a_large_vocabulary_of_gpt2s_kind_ends_its_texts(test_data, tmp_path):
    import transformers

    fast = transformers.GPT2TokenizerFast.from_pretrained(str(test_data("tokenizers/roberta")))
    bare = fast("A dog runs.")["input_ids"]
    fast.save_pretrained(tmp_path)
    ours = create_tokenizer({"name": "hf", "model": str(tmp_path), "context_length": 9})
    assert ours("A dog runs.")[0].tolist() == [*bare, *[fast.eos_token_id] * (9 - len(bare))]
    for text in real_captions(test_data):
        row = ours(text)[0].tolist()
        assert (
            row[:8] == (fast(text)["input_ids"] + [fast.eos_token_id] * 8)[:8] and row[8] == fast.eos_token_id
        )


def test_the_end_of_a_text_is_no_padding_where_they_are_one_token():
    from clipkit.towers import create_text_tower

    spec = {"name": "transformer", "width": 8, "layers": 1, "heads": 2, "causal": False, "pooling": "mean"}
    tower = create_text_tower(spec, embed_dim=4, vocab_size=10, pad_id=9, eot_id=9, context_length=5)
    text = torch.tensor([[1, 2, 9, 9, 9], [9, 9, 9, 9, 9], [1, 2, 3, 4, 9]])
    assert tower.attention_mask(text).int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert tower(text).isfinite().all()
