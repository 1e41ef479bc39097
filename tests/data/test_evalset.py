"""Evaluation reading: every sample once, in file order, nothing left out in silence."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipkit.data import count_samples, create_tokenizer, iter_captions, iter_eval, stats, train_captions
from clipkit.data.faults import DataError
from clipkit.data.shardset import ShardSet


@pytest.fixture
def shards(tmp_path, write_tar, sample):
    return [
        str(
            write_tar(
                tmp_path / f"{s}.tar",
                [m for i in range(5) for m in sample(f"{s}{i}", i, [f"one {s}{i}", f"two {s}{i}"])],
            )
        )
        for s in range(3)
    ]


def keys(batches):
    return [key for batch in batches for key in batch["key"]]


def test_every_sample_comes_once_in_file_order(shards, keys_in):
    batches = list(iter_eval(shards, image_size=16, batch_size=4))
    assert keys(batches) == keys_in(shards) and [len(batch["key"]) for batch in batches] == [4, 4, 4, 3]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(15))
    first = batches[0]
    assert first["image"].shape == (4, 3, 16, 16) and first["image"].dtype == torch.uint8
    assert first["captions"][1] == ["one 01", "two 01"] and first["meta"][1]["key"] == "01"


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_ranks_read_disjoint_pieces_in_order(shards, keys_in, world_size):
    pieces = [
        keys(iter_eval(shards, image_size=16, batch_size=4, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert [key for piece in pieces for key in piece] == keys_in(shards)


def test_a_limit_takes_the_first(shards, keys_in):
    assert keys(iter_eval(shards, image_size=16, batch_size=4, limit=6)) == keys_in(shards)[:6]


def test_a_bad_sample_is_an_error_that_names_it_unless_skipped(tmp_path, write_tar, sample):
    broken = [("bad.jpg", b"no picture"), ("bad.txt", b"words")]
    shard = str(write_tar(tmp_path / "a.tar", [*sample("a"), *broken, *sample("c")]))
    with pytest.raises(DataError, match=r"a\.tar key 'bad': corrupt_image"):
        list(iter_eval(shard, image_size=16, batch_size=4))
    assert keys(iter_eval(shard, image_size=16, batch_size=4, on_bad="skip")) == ["a", "c"]
    faults = []
    assert keys(iter_eval(shard, image_size=16, batch_size=4, on_bad=faults.append)) == ["a", "c"]
    assert [(fault.cause, fault.shard, fault.key) for fault in faults] == [("corrupt_image", shard, "bad")]
    with pytest.raises(ValueError, match="'error', 'skip' or a function"):
        next(iter_eval(shard, image_size=16, batch_size=4, on_bad="ignore"))


def test_captions_and_counts(shards):
    assert count_samples(shards) == 15
    assert (
        list(iter_captions(shards))[:3] == ["one 00", "two 00", "one 01"]
        and len(list(iter_captions(shards))) == 30
    )


def test_real_photographs_are_the_files_in_the_shard(test_data):
    import tarfile

    shard = test_data("flickr8k-mini/val/000000.tar")
    batch = next(iter_eval(str(shard), image_size=192, batch_size=8))
    with tarfile.open(shard) as tar:
        for key, image in zip(batch["key"], batch["image"]):
            pillow = Image.open(io.BytesIO(tar.extractfile(f"{key}.jpg").read())).convert("RGB")
            expected = torch.frombuffer(bytearray(pillow.tobytes()), dtype=torch.uint8).reshape(192, 192, 3)
            assert (image.permute(1, 2, 0).int() - expected.int()).abs().max() <= 2


def gone(path):
    path.unlink()


def cut(path):
    os.truncate(path, 700)


def another(path):
    """As many bytes, and the time that it had."""
    before, raw = path.stat(), bytearray(path.read_bytes())
    raw[: len(raw) // 2] = raw[: len(raw) // 2][::-1]
    path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


READERS = {
    "captions": lambda names: list(iter_captions(names)),
    "pictures": lambda names: list(iter_eval(names, image_size=8, batch_size=2, on_bad="skip")),
    "statistics": lambda names: stats(names),
    "a tokenizer": lambda names: create_tokenizer("words", captions=train_captions({"train": names})),
}


@pytest.mark.parametrize("damage", [gone, cut, another])
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_passes_over_a_whole_shard(reader, damage, tmp_path, write_tar, sample, monkeypatch):
    """A shard that was there when the set was opened and is not when it is read: the rest is not all of it."""
    names = [
        str(write_tar(tmp_path / f"{s}.tar", [m for i in range(3) for m in sample(f"{s}{i}", i)]))
        for s in range(2)
    ]
    opened = ShardSet.__init__

    def then_damaged(self, *args, **kwargs):
        opened(self, *args, **kwargs)
        damage(Path(names[1]))

    monkeypatch.setattr(ShardSet, "__init__", then_damaged)
    with pytest.raises(DataError, match=r"1\.tar.*(unreadable_shard|changed_shard)"):
        READERS[reader](names)
