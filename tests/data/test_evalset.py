"""Evaluation reading: every sample once, in file order, nothing left out in silence."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from clipkit.data import count_samples, iter_captions, iter_eval
from clipkit.data.faults import DataError


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
