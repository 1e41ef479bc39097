"""What a data set knows of its pairs: ids, several captions a picture, hard negatives."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from clipkit.data import create_stream
from clipkit.data.faults import DataError
from clipkit.data.pairs import Known, Pairs, _content, content_id, plain_caption
from clipkit.data.spec import complete, resolve_data

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

# By hand: the caption, and what is compared of it.
PLAIN = {
    "A red circle": "a red circle",
    "a  RED\tcircle .": "a red circle",
    "a red circle!?\u2026": "a red circle",
    "\uff21 red c\u0131rcle": "a red c\u0131rcle",
    "STRASSE": "strasse",
    "stra\u00dfe": "strasse",
    "cafe\u0301": "caf\u00e9",
    "\ufb01ne": "fine",
    "a (red) circle)": "a (red) circle",
    "u.s.a.": "u.s.a",
    "U.S.A": "u.s.a",
    "50 %": "50",
    "it's": "it's",
    "...": "...",
    "a\u00a0b": "a b",
    "\u0130": "i\u0307",
    # Folding its capitals takes it apart.
    "\u0390": "\u0390",
    "\u0390".upper(): "\u0390",
}


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_compared_of_a_caption(text):
    assert plain_caption(text) == PLAIN[text]
    assert plain_caption(PLAIN[text]) == PLAIN[text], "twice is once"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_tar, jpeg):
    """Two folders of two shards of four pictures, numbered alike in both, whose json says what is meant."""
    root = tmp_path_factory.mktemp("pairs")
    for part in ("a", "b"):
        for shard in range(2):
            members = []
            for i in range(4):
                key = f"{shard}{i // 2}#{i % 2}"
                # Two captions of each picture are those of picture 0 of the shard in other dress.
                texts = [f"Thing {shard}.", f"own {part} {key}", f"thing  {shard}", "odd one", "odd two"]
                meta = {
                    "captions": texts,
                    "scene": [17, "17", None, f"{part}{key}"][i],
                    "wrong": [f"not {key}", f"never {key}", " ", 3],
                    "one": f"not {key}",
                }
                members += [
                    (f"{key}.jpg", jpeg(i)),
                    (f"{key}.txt", texts[0].encode()),
                    (f"{key}.json", json.dumps(meta).encode()),
                ]
            write_tar(root / part / f"{shard}.tar", members)
    return root


def stream(folder, tokenizer, *, batch_size=16, parts="ab", rank=0, world_size=1, num_workers=0, **spec):
    train = [str(folder / part / "*.tar") for part in parts]
    return create_stream(
        {"train": train, "augmentation": {"crop_scale": [1.0, 1.0]}, **spec},
        tokenizer=tokenizer,
        image_size=8,
        batch_size=batch_size,
        seed=3,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )


def batches(count, *arguments, **settings):
    found = iter(stream(*arguments, **settings))
    return [next(found) for _ in range(count)]


def text(row):
    return bytes(row.tolist()).rstrip(b"\0").decode()


def classes(batch, of):
    """The rows that share an id, as a set of groups named by `of`."""
    groups = {}
    for row, one in enumerate(batch["pair_ids"].tolist()):
        groups.setdefault(one, []).append(of(row))
    return sorted(map(sorted, groups.values()))


def test_equal_captions_share_an_id(folder, byte_tokenizer):
    (batch,) = batches(1, folder, byte_tokenizer, pair_ids="caption", captions="random")
    by_hand = {}
    for row in range(16):
        by_hand.setdefault(plain_caption(text(batch["text"][row])), []).append(row)
    assert classes(batch, int) == sorted(by_hand.values()) and 1 < len(by_hand) < 16
    assert batch["pair_ids"].dtype == torch.int64 and batch["pair_ids"].min() >= 0


def test_keys_are_told_apart_by_shard_and_their_stems_by_folder(folder, byte_tokenizer):
    (batch,) = batches(1, folder, byte_tokenizer, pair_ids="key")
    assert len(set(batch["pair_ids"].tolist())) == 16 and len(set(batch["key"])) == 8
    (batch,) = batches(1, folder, byte_tokenizer, pair_ids="key:#")
    place = lambda row: (int(batch["sample_index"][row]) // 8, batch["key"][row][:2])
    assert classes(batch, place) == sorted(
        [[(part, stem)] * 2 for part in (0, 1) for stem in ("00", "01", "10", "11")]
    )
    pairs = Pairs(resolve_data({"train": "x", "pair_ids": "key:#"}), seed=0)
    places = [("a/0.tar", "7#0"), ("a/1.tar", "7#1"), ("b/0.tar", "7#0")]
    ids = [
        pairs.id(Known([], None, []), "", SimpleNamespace(where=lambda _, at=at: at), 0, 0) for at in places
    ]
    assert ids[0] == ids[1] != ids[2], "of one folder, whatever the shard"
    (batch,) = batches(1, folder, byte_tokenizer, pair_ids="key:_")
    assert len(set(batch["pair_ids"].tolist())) == 16, "a key without the sign is its own stem"


@pytest.mark.parametrize("together", [1, 2, 3])
def test_all_captions_come_equally_often_whatever_is_joined_in_a_step(together):
    """Of six captions, m a step: each comes once in 6 / m epochs."""
    spec = {"train": "x", "captions": "all", "captions_per_image": together}
    pairs, known = Pairs(resolve_data(spec), seed=0), Known(list("abcdef"), None, [])
    for begin in range(0, 18, 6 // together):
        epochs = range(begin, begin + 6 // together)
        assert sorted(text for epoch in epochs for text in pairs.draw(known, 0.5, epoch, "key")[0]) == list(
            "abcdef"
        )


def test_a_caption_of_no_weight_fills_no_place_among_several():
    spec = {"train": "x", "captions_per_image": 3, "caption_weights": [1, 0, 2, 0]}
    pairs, known = Pairs(resolve_data(spec), seed=0), Known(list("abcd"), None, [])
    drawn = [pairs.draw(known, 0.5, epoch, "key")[0] for epoch in range(60)]
    assert {"".join(sorted(set(one))) for one in drawn} == {"ac"} and {len(one) for one in drawn} == {3}


def test_a_field_of_the_json_names_the_content(folder, byte_tokenizer):
    (batch,) = batches(1, folder, byte_tokenizer, pair_ids="json:scene")
    # Of each shard's four: 17 and "17" are one content, null is unknown, the last has a name of its own.
    groups = [len(one) for one in classes(batch, lambda row: batch["key"][row])]
    assert sorted(groups) == [1] * 8 + [8]
    seventeen = content_id("json", "17")
    rows = {batch["key"][row] for row in range(16) if batch["pair_ids"][row] == seventeen}
    assert rows == {"00#0", "00#1", "10#0", "10#1"}


@pytest.mark.parametrize(
    "settings", [{"pair_ids": "json:scen"}, {"hard_negatives": "wrongs"}, {"hard_negatives": "scene"}]
)
def test_a_field_that_is_not_there_is_a_counted_fault(folder, byte_tokenizer, settings):
    cause = "missing_pair_id" if "pair_ids" in settings else "missing_hard_negative"
    with pytest.raises(RuntimeError, match=f"bad by {cause}|{cause}"):
        batches(1, folder, byte_tokenizer, **settings)


@pytest.mark.parametrize(
    "value, told", [(17, "17"), ("17", "17"), (0, "0"), (None, None), ("", None), (" ", None)]
)
def test_blank_content_is_unknown_and_not_shared(value, told):
    assert _content({"scene": value}, "scene") == told


@pytest.mark.parametrize("value", [1.0, True, [1], {"a": 1}, float("nan")])
def test_content_that_is_neither_text_nor_a_whole_number_is_a_fault(value):
    with pytest.raises(DataError, match="neither text nor a whole number"):
        _content({"scene": value}, "scene")


KNOWN = {
    "caption": {"pair_ids": "caption"},
    "key": {"pair_ids": "key:#"},
    "json": {"pair_ids": "json:scene", "captions_per_image": 2},
    "several": {"captions_per_image": 3},
    "several, all": {"captions_per_image": 2, "captions": "all"},
    "weights": {"captions_per_image": 2, "caption_weights": [1, 5, 2]},
    "hard negatives": {"hard_negatives": "wrong"},
    "everything": {
        "pair_ids": "key",
        "captions_per_image": 2,
        "hard_negatives": "wrong",
        "hard_negatives_per_caption": 2,
    },
}


@pytest.mark.parametrize("case", KNOWN)
def test_ranks_see_what_one_process_sees(folder, byte_tokenizer, case):
    whole = batches(3, folder, byte_tokenizer, batch_size=8, **KNOWN[case])
    for other in ({"cache": "ram"}, {"world_size": 4, "batch_size": 2}):
        settings = {"batch_size": 8, **KNOWN[case], **other}
        ranks = [
            batches(3, folder, byte_tokenizer, rank=r, **settings)
            for r in range(settings.get("world_size", 1))
        ]
        for step, expected in enumerate(whole):
            for name in set(expected) & {"text", "pair_ids", "hard_negative", "sample_index"}:
                assert torch.equal(torch.cat([one[step][name] for one in ranks]), expected[name]), name
    assert ("pair_ids" in whole[0]) == (case != "hard negatives")


def test_workers_hand_over_what_this_process_makes(folder, byte_tokenizer):
    settings = {**KNOWN["everything"], "batch_size": 4}
    for one, other in zip(
        batches(2, folder, byte_tokenizer, **settings),
        batches(2, folder, byte_tokenizer, num_workers=2, **settings),
    ):
        assert one.keys() == other.keys() >= {"pair_ids", "hard_negative"}
        assert all(
            torch.equal(one[name], other[name]) for name in ("image", "text", "pair_ids", "hard_negative")
        )


@pytest.mark.parametrize("way", ["random", "first", "all"])
def test_captions_of_a_picture_come_together(folder, byte_tokenizer, way):
    seen = {}
    for batch in batches(10, folder, byte_tokenizer, captions=way, captions_per_image=2):
        assert batch["text"].shape == (16, 2, 24) and batch["pair_ids"].shape == (16,)
        assert batch["pair_ids"].unique().numel() == 16
        for row in range(16):
            texts = [text(one) for one in batch["text"][row]]
            assert len(set(texts)) == 2, "drawn without replacement"
            seen.setdefault(int(batch["sample_index"][row]), []).append(texts)
    for sample, steps in seen.items():
        counts = Counter(text for texts in steps for text in texts)
        if way == "first":
            assert len(counts) == 2 and set(counts.values()) == {10}
        if way == "all":
            assert set(counts.values()) == {4}, "ten steps of two go through five captions four times"
        if way == "random":
            assert len({tuple(texts) for texts in steps}) > 3, sample


def test_a_picture_with_fewer_captions_repeats_them(folder, byte_tokenizer):
    for way in ("random", "first", "all"):
        (batch,) = batches(1, folder, byte_tokenizer, captions=way, captions_per_image=7)
        for row in batch["text"]:
            texts = [text(one) for one in row]
            assert len(set(texts)) == 5 and texts[5:] == texts[:2]


def test_captions_are_drawn_as_often_as_their_weights_say(folder, byte_tokenizer):
    for weights, expected in (
        ([6, 3, 1], [0.6, 0.3, 0.1, 0, 0]),
        ([0, 0, 0, 0, 0, 9], [0.2] * 5),
        ([1, 0, 0, 0, 3, 5], [0.25, 0, 0, 0, 0.75]),
    ):
        counts = Counter()
        for batch in batches(100, folder, byte_tokenizer, caption_weights=weights):
            counts.update(place(text(row)) for row in batch["text"])
        total = sum(counts.values())
        for i, share in enumerate(expected):
            # Four standard deviations of a binomial; pictures of the same key in both folders draw alike.
            assert abs(counts[i] / total - share) <= 4 * math.sqrt(share * (1 - share) / (total / 2))


def place(caption):
    starts = ("Thing", "own", "thing", "odd one", "odd two")
    return next(i for i, start in enumerate(starts) if caption.startswith(start))


def test_two_captions_by_weights_are_drawn_one_after_the_other(folder, byte_tokenizer):
    """Without replacement: the pair {0, 1} of weights 6, 3, 1 has probability 6/10 * 3/4 + 3/10 * 6/7."""
    pairs = Counter()
    for batch in batches(100, folder, byte_tokenizer, caption_weights=[6, 3, 1], captions_per_image=2):
        pairs.update(frozenset(place(text(one)) for one in row) for row in batch["text"])
    share = 0.6 * 3 / 4 + 0.3 * 6 / 7
    assert abs(pairs[frozenset({0, 1})] / 1600 - share) < 4 * math.sqrt(share * (1 - share) / 800)
    assert pairs.keys() == {frozenset({0, 1}), frozenset({0, 2}), frozenset({1, 2})}


def test_hard_negatives_are_those_of_the_picture(folder, byte_tokenizer):
    for field, count, distinct in (("one", 1, 1), ("wrong", 1, 2), ("wrong", 2, 2), ("wrong", 3, 2)):
        seen = {}
        for batch in batches(
            8, folder, byte_tokenizer, hard_negatives=field, hard_negatives_per_caption=count
        ):
            assert batch["hard_negative"].shape == (16, count, 24) and "pair_ids" not in batch
            for row in range(16):
                texts = [text(one) for one in batch["hard_negative"][row]]
                assert set(texts) <= {f"not {batch['key'][row]}", f"never {batch['key'][row]}"}
                assert len(set(texts)) == min(count, distinct)
                seen.setdefault(int(batch["sample_index"][row]), set()).update(texts)
        assert all(len(texts) == distinct for texts in seen.values())


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"pair_ids": "captions"}, "Did you mean 'caption'"),
        ({"pair_ids": "json"}, "json:FIELD"),
        ({"pair_ids": "json:"}, "json:FIELD"),
        ({"pair_ids": "key:"}, "key:SEP"),
        ({"pair_ids": "caption:x"}, "json:FIELD"),
        ({"pair_ids": True}, "json:FIELD"),
        ({"captions_per_image": 0}, "1 or more"),
        ({"captions_per_image": 2.0}, "1 or more"),
        ({"pair_ids": "caption", "captions_per_image": 2}, "joins several"),
        ({"caption_weights": [1, 2], "captions": "all"}, "captions=all"),
        ({"caption_weights": []}, "not all 0"),
        ({"caption_weights": [0, 0.0]}, "not all 0"),
        ({"caption_weights": [1, -1]}, "0 or more"),
        ({"caption_weights": [1, float("nan")]}, "finite"),
        ({"hard_negatives_per_caption": 2}, "data.hard_negatives names"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        complete({"train": "x.tar", **settings})
