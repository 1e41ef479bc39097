"""Captions: where they stand, what is taken out of them, and what a broken json does not cost."""

from __future__ import annotations

import gzip
import json
import lzma
import tarfile

import pytest
import torch

from clipkit.data import check, create_sentences, create_stream, create_tokenizer, iter_eval, pack
from clipkit.data.captions import clean_caption
from clipkit.data.faults import DataError
from clipkit.data.pairs import Pairs
from clipkit.data.shardset import ShardSet
from clipkit.data.spec import resolve_data
from clipkit.data.table import TableSet
from clipkit.evals.compositional import read_pairs
from clipkit.evals.sources import ClipBenchmark
from clipkit.foreign import BrokenFile


@pytest.fixture
def captions_of(tmp_path, write_tar, jpeg):
    """`captions_of(text, meta)`: the captions of a sample of these files, and what was passed over."""

    def read(text: bytes | None, meta: object) -> tuple[list[str], list[str]]:
        raw = meta if isinstance(meta, (bytes, type(None))) else json.dumps(meta).encode()
        members = [("k.jpg", jpeg(1))]
        members += [(f"k.{end}", data) for end, data in (("txt", text), ("json", raw)) if data is not None]
        data = ShardSet([str(write_tar(tmp_path / "a.tar", members))], cache_dir=tmp_path / "cache")
        try:
            return data.captions(0), [cause for cause, *_ in data.passed_over(0)]
        finally:
            data.close()

    return read


@pytest.mark.parametrize(
    "text, meta, expected",
    [
        (b"a dog", {}, ["a dog"]),
        (b"a dog", {"captions": ["one", "two"]}, ["one", "two"]),
        (b"a dog", {"captions": "one"}, ["one"]),
        (None, {"caption": "one"}, ["one"]),
        (None, {"caption": ["one", "two"]}, ["one", "two"]),
        (b"", {"caption": ["one", " ", 3, "two"]}, ["one", "two"]),
        (None, ["one", "two"], ["one", "two"]),
        (b"a dog", {"captions": [" ", None]}, ["a dog"]),
        (b"a dog", {"captions": {"en": "x"}}, ["a dog"]),
        (b"\xef\xbb\xbfa dog\r\n", None, ["a dog"]),
        (b"a\x00 dog\x07", None, ["a dog"]),
    ],
)
def test_captions_are_found_where_they_stand(text, meta, expected, captions_of):
    assert captions_of(text, meta) == (expected, [])


@pytest.mark.parametrize("meta", [b'{"caption": "a', b"[1, 2]", b"", b"\xff\xfe\x00", b"3", b"[" * 100_000])
def test_a_broken_json_costs_no_sample_that_has_a_caption(meta, captions_of):
    assert captions_of(b"a dog", meta) == (["a dog"], ["broken_json"])
    for text in (None, b"", b" \x00"):
        with pytest.raises(DataError) as raised:
            captions_of(text, meta)
        assert raised.value.cause == "broken_json"


@pytest.mark.parametrize(
    "text", [b"\x00\x00", b"\x07", "\u200b\u2060".encode(), b"\xef\xbb\xbf", b"\x1b[31m\x1b[0m", b"\x7f \t"]
)
def test_a_caption_that_nobody_can_see_is_empty(text, captions_of):
    with pytest.raises(DataError) as raised:
        captions_of(text, {})
    assert raised.value.cause == "empty_caption"


def test_cleaning_changes_no_id_of_clips_tokenizer():
    """ftfy takes the same out; mojibake, whose C1 controls it needs, stays as it is."""
    import open_clip

    texts = [
        "a\x00b",
        "\ufeffa dog",
        "the \x1b[36;44mblue\x1b[0m dog",
        "it\u00e2\x80\x99s a dog",
        "a\x0bb\x0cc\td\u200d",
        "caf\xe9 \U0001f600",
    ]
    peer, ours = open_clip.SimpleTokenizer(), create_tokenizer("clip_bpe")
    for text in texts:
        assert ours([clean_caption(text)]).tolist() == peer([text]).tolist(), repr(text)


def test_training_uses_and_counts_what_a_broken_json_lies_beside(
    tmp_path, write_tar, sample, jpeg, byte_tokenizer
):
    members = [member for i in range(8) for member in sample(f"k{i}", i)]
    members += [("broken.jpg", jpeg(9)), ("broken.txt", b"a dog"), ("broken.json", b"{")]
    shard = str(write_tar(tmp_path / "a.tar", members))
    for cache in ("none", "ram"):
        stream = create_stream(
            {"train": shard, "max_bad_fraction": 0.2, "cache": cache},
            tokenizer=byte_tokenizer,
            image_size=8,
            batch_size=3,
            seed=0,
            epochs=2,
        )
        keys = [key for batch in stream for key in batch["key"]]
        assert keys.count("broken") == 2 and stream.report()["skipped"] == {"broken_json": 2}
    report = check(shard)
    assert (report["samples"], report["good"], report["faults"]) == (9, 9, {"broken_json": 1})
    # An evaluation reads more from the json than captions.
    with pytest.raises(DataError, match="broken_json"):
        list(iter_eval(shard, image_size=8, batch_size=9))


def test_the_same_key_in_two_shards_is_said_with_both(tmp_path, write_tar, sample):
    paths = [
        str(write_tar(tmp_path / f"{name}.tar", [m for key in keys for m in sample(key)]))
        for name, keys in (("a", ("one", "two")), ("b", ("two", "three")))
    ]
    report = check(paths)
    assert report["duplicate_keys"] == 1
    assert report["examples"]["duplicate_keys"] == [f"two: {paths[0]} and {paths[1]}"]


@pytest.mark.parametrize("name", ["gzip", "xz", "zstd"])
def test_a_compressed_tar_is_named_with_what_undoes_it(name, tmp_path, write_tar, sample, byte_tokenizer):
    plain = write_tar(tmp_path / "a.tar", sample("k"))
    data = {"gzip": gzip.compress, "xz": lzma.compress, "zstd": lambda raw: b"\x28\xb5\x2f\xfd" + raw}[name](
        plain.read_bytes()
    )
    path = tmp_path / f"a.tar.{name}"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"unreadable_shard: it is compressed by {name}: .*un.* FILE"):
        create_stream({"train": str(path)}, tokenizer=byte_tokenizer, image_size=8, batch_size=1, seed=0)
    (example,) = check(path)["examples"]["unreadable_shard"]
    assert f"compressed by {name}" in example


@pytest.mark.parametrize("extension", ["avif", "heic", "jxl"])
def test_pictures_of_newer_formats_are_samples(extension, tmp_path, write_tar, byte_tokenizer, sample):
    members = [(f"new.{extension}", b"\0\0\0\x18ftypheic" + bytes(40)), ("new.txt", b"a"), *sample("old")]
    shard = str(write_tar(tmp_path / "a.tar", members))
    report = check(shard)
    assert report["samples"] == 2 and set(report["faults"]) == {"unsupported_image"}
    assert "pip install pillow-heif" in report["examples"]["unsupported_image"][0]


def from_shard(folder, texts, write_tar, jpeg):
    path = write_tar(
        folder / "a.tar", [("k.jpg", jpeg(1)), ("k.json", json.dumps({"captions": texts}).encode())]
    )
    return ShardSet([str(path)], cache_dir=folder / "cache").captions(0)


def from_a_table(folder, texts, write_tar, jpeg):
    (folder / "k.jpg").write_bytes(jpeg(1))
    (folder / "t.jsonl").write_text(json.dumps({"image": "k.jpg", "caption": texts}) + "\n")
    return TableSet([str(folder / "t.jsonl")], cache_dir=folder / "cache").captions(0)


def hard_negatives(folder, texts, write_tar, jpeg):
    meta = json.dumps({"caption": "a", "wrong": texts}).encode()
    path = write_tar(folder / "a.tar", [("k.jpg", jpeg(1)), ("k.json", meta)])
    pairs = Pairs(resolve_data({"train": "x", "hard_negatives": "wrong"}), seed=0)
    return pairs.read(ShardSet([str(path)], cache_dir=folder / "cache"), 0).hard_negatives


def packed_captions(source, folder):
    report = pack(source, folder / "shards")
    with tarfile.open(folder / "shards" / "000000.tar") as tar:
        found = [
            json.loads(tar.extractfile(one).read())["captions"] for one in tar if one.name.endswith("json")
        ]
    return [text for one in found for text in one], report["skipped"]


def packed_from_a_table(folder, texts, write_tar, jpeg):
    (folder / "k.jpg").write_bytes(jpeg(1))
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"image": "k.jpg", "caption": t}) + "\n" for t in texts)
    )
    captions, skipped = packed_captions(folder / "t.jsonl", folder)
    assert skipped == {"empty_caption": len(texts) - 2}
    return captions


def packed_from_a_folder(folder, texts, write_tar, jpeg):
    (folder / "in").mkdir()
    (folder / "in" / "k.jpg").write_bytes(jpeg(1))
    (folder / "in" / "k.txt").write_text("\n".join(texts))
    return packed_captions(folder / "in", folder)[0]


def sentences(folder, texts, write_tar, jpeg):
    rows = [{"sent0": "a", "sent1": text, "hard_neg": "b"} for text in texts]
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read: list[list[str]] = []

    def tokenizer(given):
        read.append(given)
        return torch.zeros(len(given), 3, dtype=torch.int64)

    stream = create_sentences(
        {"triplets": str(folder / "s.jsonl")}, tokenizer=tokenizer, batch_size=2, seed=0
    )
    assert [*stream.left_out.values()] == [{"blank sentence": len(texts) - 2}]
    next(iter(stream))
    return sorted(read[1])


def captions_of_clip_benchmark(folder, texts, write_tar, jpeg):
    members = [("k.jpg", jpeg(1)), ("k.txt", "\n".join(texts).encode())]
    write_tar(folder / "test" / "0.tar", members)
    return ClipBenchmark(folder, captioned=True).items[0][2]


def compositional_pairs(folder, texts, write_tar, jpeg):
    good = []
    for text in texts:
        row = {"filename": "k.jpg", "caption": "a", "negative_caption": text, "task": "add"}
        (folder / "pairs.jsonl").write_text(json.dumps(row))
        try:
            good += [pair["negative_caption"] for pair in read_pairs(folder / "pairs.jsonl")]
        except BrokenFile as error:
            assert "lacks negative_caption" in str(error)
    return good


@pytest.mark.parametrize(
    "reader",
    [
        from_shard, from_a_table, hard_negatives, packed_from_a_table, packed_from_a_folder, sentences,
        captions_of_clip_benchmark, compositional_pairs,
    ],
)  # fmt: skip
def test_no_reader_takes_a_text_that_nobody_can_see(reader, tmp_path, write_tar, jpeg):
    unseen = ["\x07", "\x00\x1b[0m", "\u200b", "\u200b \ufeff", "\u00a0", " "]
    texts = ["a dog", *unseen, "b dog"]
    assert reader(tmp_path, texts, write_tar, jpeg) == ["a dog", "b dog"]
