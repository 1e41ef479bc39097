"""The stream: one global order whatever the workers and ranks, every sample once an epoch, exact resume."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from clipkit.data import create_stream
from clipkit.data.workers import Workers
from tests.processes import ROOT, command

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def stream_of(
    shards,
    tokenizer,
    *,
    batch_size,
    rank=0,
    world_size=1,
    num_workers=0,
    epochs=None,
    seed=0,
    image_size=16,
    **spec,
):
    train = [one if isinstance(one, dict) else str(one) for one in shards]
    spec = {"kind": "shards", "train": train, **spec}
    return create_stream(
        spec,
        tokenizer=tokenizer,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        epochs=epochs,
    )


def global_batches(shards, tokenizer, *, global_batch, world_size, num_workers, epochs, **spec):
    """Per step, the keys of all ranks in rank order."""
    ranks = [
        [
            batch["key"]
            for batch in stream_of(
                shards,
                tokenizer,
                batch_size=global_batch // world_size,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                epochs=epochs,
                **spec,
            )
        ]
        for rank in range(world_size)
    ]
    return [[key for keys in step for key in keys] for step in zip(*ranks, strict=True)]


def test_captions_alone_come_in_the_same_order_and_no_picture_is_read(
    tmp_path, write_tar, jpeg, byte_tokenizer
):
    """Of samples whose pictures are readable the same batches but for the picture; of unreadable ones the captions too."""
    for folder, picture in (("good", jpeg(3)), ("bad", b"no picture")):
        rows = [
            (f"{n:04d}.{kind}", data)
            for n in range(12)
            for kind, data in (("jpg", picture), ("txt", b"text %d" % n))
        ]
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "a.tar", rows)
    given = {"batch_size": 4, "epochs": 2, "captions": "first", "cache": "ram"}
    with_pictures = [*stream_of([tmp_path / "good" / "a.tar"], byte_tokenizer, **given)]
    for folder in ("good", "bad"):
        alone = [*stream_of([tmp_path / folder / "a.tar"], byte_tokenizer, image_size=None, **given)]
        assert [batch["key"] for batch in alone] == [batch["key"] for batch in with_pictures]
        assert all(
            torch.equal(one["text"], other["text"]) for one, other in zip(alone, with_pictures, strict=True)
        )
        assert all("image" not in batch and not batch.get("faults") for batch in alone)


def test_a_thousand_shards_come_in_one_order_for_any_workers_and_ranks(
    thousand_shards, byte_tokenizer, keys_in
):
    everything = keys_in(thousand_shards)
    assert len(everything) == 1500
    expected = None
    for world_size, num_workers in ((1, 0), (1, 1), (1, 2), (1, 4), (2, 0), (2, 2), (4, 0), (4, 1)):
        steps = global_batches(
            thousand_shards,
            byte_tokenizer,
            global_batch=100,
            world_size=world_size,
            num_workers=num_workers,
            epochs=2,
            image_size=8,
        )
        line = [key for step in steps for key in step]
        expected = expected or line
        assert line == expected, f"{world_size} ranks with {num_workers} workers"
    first, second = expected[:1500], expected[1500:]
    assert Counter(first) == Counter(everything) and Counter(second) == Counter(everything)
    assert first != second and first != everything


def test_real_photographs_come_once_an_epoch_for_any_workers_and_ranks(test_data, byte_tokenizer, keys_in):
    shards = sorted(test_data("flickr8k-mini/val").glob("*.tar"))
    everything = keys_in(shards)
    lines = []
    for world_size, num_workers in ((1, 0), (1, 2), (2, 0), (4, 1)):
        steps = global_batches(
            shards,
            byte_tokenizer,
            global_batch=100,
            world_size=world_size,
            num_workers=num_workers,
            epochs=2,
            image_size=32,
            cache="ram" if num_workers else "none",
        )
        lines.append([key for step in steps for key in step])
    assert all(line == lines[0] for line in lines)
    for epoch in range(2):
        assert Counter(lines[0][1000 * epoch : 1000 * epoch + 1000]) == Counter(everything)


def test_batches_are_equal_to_the_byte_with_and_without_workers(thousand_shards, byte_tokenizer):
    def digest(num_workers, cache):
        stream = stream_of(
            thousand_shards[:100],
            byte_tokenizer,
            batch_size=30,
            num_workers=num_workers,
            epochs=2,
            cache=cache,
        )
        return [(batch["image"].clone(), batch["text"], batch["sample_index"]) for batch in stream]

    for cache in ("none", "ram"):
        plain, parallel = digest(0, cache), digest(2, cache)
        assert len(plain) == len(parallel) == 10
        for one, other in zip(plain, parallel):
            assert all(torch.equal(a, b) for a, b in zip(one, other))


def test_epochs_join_without_a_gap_when_the_batch_does_not_divide_them(
    thousand_shards, byte_tokenizer, keys_in
):
    shards = thousand_shards[:66]
    everything = keys_in(shards)
    stream = stream_of(shards, byte_tokenizer, batch_size=35, epochs=5)
    line = [key for batch in stream for key in batch["key"]]
    assert stream.samples_per_epoch == 99 and stream.batches_per_epoch == 2
    assert len(line) == 490, "the last 5 of 495 do not fill a batch"
    for epoch in range(4):
        assert Counter(line[99 * epoch : 99 * epoch + 99]) == Counter(everything)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resume_continues_with_the_next_sample(thousand_shards, byte_tokenizer, num_workers):
    make = lambda: stream_of(
        thousand_shards[:100], byte_tokenizer, batch_size=20, num_workers=num_workers, epochs=3
    )
    whole = [(batch["key"], batch["image"]) for batch in make()]
    for stop in (1, 7, 11):
        first = make()
        iterator = iter(first)
        taken = [next(iterator)["key"] for _ in range(stop)]
        state = first.state_dict()
        iterator.close()
        resumed = make()
        resumed.load_state_dict(state)
        rest = [(batch["key"], batch["image"]) for batch in resumed]
        assert taken + [keys for keys, _ in rest] == [keys for keys, _ in whole]
        assert all(torch.equal(a[1], b[1]) for a, b in zip(rest, whole[stop:], strict=True))


def test_a_resume_on_another_world_size_keeps_the_order(thousand_shards, byte_tokenizer):
    shards = thousand_shards[:80]
    whole = global_batches(shards, byte_tokenizer, global_batch=40, world_size=1, num_workers=0, epochs=2)
    two = [
        stream_of(shards, byte_tokenizer, batch_size=20, rank=rank, world_size=2, epochs=2)
        for rank in range(2)
    ]
    iterators = [iter(stream) for stream in two]
    for step in range(3):
        assert [key for it in iterators for key in next(it)["key"]] == whole[step]
    four = [
        stream_of(shards, byte_tokenizer, batch_size=10, rank=rank, world_size=4, epochs=2)
        for rank in range(4)
    ]
    for stream in four:
        stream.load_state_dict(two[0].state_dict())
    rest = [
        [key for keys in step for key in keys]
        for step in zip(*([batch["key"] for batch in stream] for stream in four), strict=True)
    ]
    assert rest == whole[3:]


def test_a_state_of_other_shards_or_another_seed_is_refused(thousand_shards, byte_tokenizer):
    state = stream_of(thousand_shards[:20], byte_tokenizer, batch_size=4).state_dict()
    with pytest.raises(ValueError, match="shards differ"):
        stream_of(thousand_shards[:21], byte_tokenizer, batch_size=4).load_state_dict(state)
    with pytest.raises(ValueError, match="seed 0"):
        stream_of(thousand_shards[:20], byte_tokenizer, batch_size=4, seed=1).load_state_dict(state)


def test_the_state_is_small(thousand_shards, byte_tokenizer):
    stream = stream_of(thousand_shards, byte_tokenizer, batch_size=100)
    next(iter(stream))
    assert len(repr(stream.state_dict())) < 1500


def test_weighted_sources_get_their_shares_and_each_stays_exactly_once(
    thousand_shards, byte_tokenizer, keys_in
):
    train = [
        {"name": "a", "shards": [str(p) for p in thousand_shards[:66]], "weight": 3},
        {"name": "b", "shards": [str(p) for p in thousand_shards[66:132]], "weight": 1},
    ]
    lines = []
    for world_size, num_workers in ((1, 0), (2, 2)):
        steps = global_batches(
            train, byte_tokenizer, global_batch=66, world_size=world_size, num_workers=num_workers, epochs=2
        )
        lines.append([key for step in steps for key in step])
    assert lines[0] == lines[1]
    of_a = [key for key in lines[0] if key < "00066"]
    assert abs(len(of_a) - 297) < 30, "396 samples at 3 to 1"
    assert Counter(of_a[:99]) == Counter(keys_in(thousand_shards[:66]))


def test_unweighted_sources_are_joined(thousand_shards, byte_tokenizer, keys_in):
    train = [
        {"name": "a", "shards": [str(p) for p in thousand_shards[:4]]},
        {"name": "b", "shards": [str(p) for p in thousand_shards[4:8]]},
    ]
    stream = stream_of(train, byte_tokenizer, batch_size=12, epochs=1)
    assert sorted(key for batch in stream for key in batch["key"]) == sorted(keys_in(thousand_shards[:8]))


def test_resampling_is_reproducible_and_allows_batches_larger_than_the_data(thousand_shards, byte_tokenizer):
    runs = [
        next(
            iter(stream_of(thousand_shards[:4], byte_tokenizer, batch_size=64, resample=True, num_workers=n))
        )["key"]
        for n in (0, 1)
    ]
    assert runs[0] == runs[1] and len(set(runs[0])) <= 6
    with pytest.raises(ValueError, match="larger than the 6 training samples"):
        stream_of(thousand_shards[:4], byte_tokenizer, batch_size=64)


def test_captions_are_chosen_by_rule(tmp_path, write_tar, sample, byte_tokenizer):
    texts = ["one", "two", "three"]
    members = [member for i in range(30) for member in sample(f"k{i:02d}", i, texts)]
    shard = write_tar(tmp_path / "a.tar", members)

    def epochs(rule):
        line = [
            (key, bytes(row).rstrip(b"\0").decode())
            for batch in stream_of([shard], byte_tokenizer, batch_size=30, epochs=6, captions=rule)
            for key, row in zip(batch["key"], batch["text"].tolist())
        ]
        return [dict(line[30 * e : 30 * e + 30]) for e in range(6)]

    assert {text for epoch in epochs("first") for text in epoch.values()} == {"one"}
    for start in (0, 3):
        of_key = [{epoch[f"k{i:02d}"] for epoch in epochs("all")[start : start + 3]} for i in range(30)]
        assert all(found == set(texts) for found in of_key), "three epochs go once through the three captions"
    assert len(set(epochs("all")[0].values())) == 3, "the captions start at different places"
    drawn = Counter(text for epoch in epochs("random") for text in epoch.values())
    assert set(drawn) == set(texts) and min(drawn.values()) > 30


def test_the_crop_of_a_sample_changes_with_the_epoch_and_not_with_the_run(thousand_shards, byte_tokenizer):
    def images():
        stream = stream_of(
            thousand_shards[:16],
            byte_tokenizer,
            batch_size=24,
            epochs=2,
            augmentation={"crop_scale": [0.2, 0.6]},
        )
        return [dict(zip(batch["key"], batch["image"])) for batch in stream]

    first, again = images(), images()
    assert all(torch.equal(first[e][key], again[e][key]) for e in range(2) for key in first[e])
    changed = sum(not torch.equal(first[0][key], first[1][key]) for key in first[0])
    assert changed > len(first[0]) // 2


def test_what_a_batch_holds(thousand_shards, byte_tokenizer, keys_in):
    everything = keys_in(thousand_shards[:8])
    for batch in stream_of(thousand_shards[:8], byte_tokenizer, batch_size=10, epochs=2):
        assert batch["image"].shape == (10, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert batch["text"].shape == (10, 24) and batch["text"].dtype == torch.int64
        assert [everything[i] for i in batch["sample_index"].tolist()] == batch["key"]
        assert [bytes(row).rstrip(b"\0").decode() for row in batch["text"].tolist()] == [
            f"picture {k}" for k in batch["key"]
        ]


def test_random_state_of_the_process_is_left_alone(thousand_shards, byte_tokenizer):
    torch.manual_seed(0)
    np.random.seed(0)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    iterator = iter(stream_of(thousand_shards[:8], byte_tokenizer, batch_size=10, num_workers=1))
    next(iterator)
    iterator.close()
    assert torch.equal(before, torch.get_rng_state()) and (numbers == np.random.get_state()[1]).all()


def test_a_stalled_batch_is_announced_with_the_shard_it_reads(
    thousand_shards, byte_tokenizer, monkeypatch, capfd
):
    import clipkit.data.shards

    monkeypatch.setattr(clipkit.data.shards, "_FIRST_WARNING_S", 0.1)

    def slow(texts):
        time.sleep(0.6)
        return byte_tokenizer(texts)

    iterator = iter(stream_of(thousand_shards[:1], slow, batch_size=1))
    next(iterator)
    iterator.close()
    said = capfd.readouterr().err
    assert (
        f"waiting 0.1 s for the first batch: reading {thousand_shards[0]}" in said and "waiting 0.2 s" in said
    )


def test_a_batch_that_never_comes_is_an_error_that_names_the_shard(thousand_shards):
    def stuck(texts):
        time.sleep(4)

    with pytest.raises(
        RuntimeError, match=rf"no batch for timeout_s = 1 s; waiting for {thousand_shards[0]}"
    ):
        next(iter(stream_of(thousand_shards[:1], stuck, batch_size=1, num_workers=1, timeout_s=1)))


def test_a_worker_that_dies_each_time_ends_the_stream(thousand_shards, capfd):
    def die(texts):
        os.kill(os.getpid(), signal.SIGKILL)

    stream = stream_of(thousand_shards[:1], die, batch_size=1, num_workers=1)
    with pytest.raises(
        RuntimeError,
        match=r"data worker \d+ was killed by SIGKILL.* GB free and this process takes .*data.num_workers.*data.prefetch"
        rf".*data.cache=none.*3 times in a row without a batch, after 2 restarts: waiting for {thousand_shards[0]}",
    ):
        next(iter(stream))
    assert stream.report()["worker_restarts"] == 2
    assert capfd.readouterr().err.count("New workers go on with the same batch") == 2


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_killed_workers_change_no_batch(thousand_shards, byte_tokenizer, cache, capfd):
    def make(num_workers):
        return stream_of(
            thousand_shards[:200],
            byte_tokenizer,
            batch_size=25,
            num_workers=num_workers,
            epochs=3,
            cache=cache,
            augmentation={"crop_scale": [0.3, 1.0]},
        )

    expected = [(batch["image"].clone(), batch["text"], batch["key"]) for batch in make(0)]
    before, rng = signal.getsignal(signal.SIGCHLD), random.Random(4)
    stream, found, killed = make(2), [], 0
    for batch in stream:
        found.append((batch["image"].clone(), batch["text"], batch["key"]))
        assert signal.getsignal(signal.SIGCHLD) is before
        if len(found) in (2, 9, 10, 20):
            # As the kernel would, at any moment; and what runs here meanwhile is not disturbed.
            victim = rng.choice(multiprocessing.active_children())
            os.kill(victim.pid, rng.choice((signal.SIGKILL, signal.SIGTERM)))
            killed += 1
            time.sleep(0.05 * rng.random())
    assert len(found) == len(expected) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in zip(found, expected)
    )
    said = capfd.readouterr().err
    assert 1 <= stream.report()["worker_restarts"] <= killed
    assert (
        said.count("New workers go on") == stream.report()["worker_restarts"]
        and "was killed by SIGKILL" in said
    )
    assert "worker_restarts" not in make(0).report() and not multiprocessing.active_children()


def test_a_worker_that_dies_in_the_middle_of_a_message_is_not_waited_for(
    thousand_shards, byte_tokenizer, monkeypatch
):
    """Half a message in the queue, as of a worker killed while it writes: its reader would wait for the rest."""
    started = []
    start = Workers._start
    monkeypatch.setattr(Workers, "_start", lambda self: started.append(start(self)) or started[-1])

    def slow(texts):
        # The second batch takes long in the first worker alone.
        if texts != first and not marker.value:
            marker.value = 1
            time.sleep(60)
        return byte_tokenizer(texts)

    marker = multiprocessing.Value("i", 0)
    make = lambda tokenizer, workers: stream_of(
        thousand_shards[:4], tokenizer, batch_size=2, num_workers=workers, epochs=1, shuffle=False
    )
    expected = [batch["key"] for batch in make(byte_tokenizer, 0)]
    first = [f"picture {key}" for key in expected[0]]
    stream = make(slow, 1)

    def harm():
        while not marker.value:
            time.sleep(0.01)
        queue = started[0]._worker_result_queue
        os.write(queue._writer.fileno(), (100_000).to_bytes(4, "big") + b"half of a message")
        time.sleep(0.2)
        os.kill(started[0]._workers[0].pid, signal.SIGKILL)

    thread = threading.Thread(target=harm)
    thread.start()
    assert [batch["key"] for batch in stream] == expected
    thread.join()
    assert stream.report()["worker_restarts"] == 1 and len(started) == 2


@pytest.mark.slow
def test_a_hundred_kills_change_no_batch(thousand_shards, byte_tokenizer):
    rng = random.Random(1)
    expected = [
        batch["image"].clone()
        for batch in stream_of(thousand_shards, byte_tokenizer, batch_size=10, epochs=1)
    ]
    for _ in range(10):
        stream = stream_of(thousand_shards, byte_tokenizer, batch_size=10, num_workers=3, epochs=1)
        for step, batch in enumerate(stream):
            assert torch.equal(batch["image"], expected[step])
            if step % 15 == 7:
                os.kill(rng.choice(multiprocessing.active_children()).pid, signal.SIGKILL)
                time.sleep(0.02 * rng.random())
        assert step == len(expected) - 1 and stream.report()["worker_restarts"] >= 8


def test_an_error_inside_a_worker_is_no_death(thousand_shards):
    def fail(texts):
        raise ConnectionResetError("a server said so")

    stream = stream_of(thousand_shards[:1], fail, batch_size=1, num_workers=1)
    with pytest.raises(ConnectionResetError, match="a server said so"):
        next(iter(stream))
    assert "worker_restarts" not in stream.report()


@pytest.mark.parametrize(
    "spec, message",
    [
        ({"train": "nowhere/*.tar"}, "no file matches 'nowhere"),
        ({"train": None}, "data.train is not set"),
        ({"windw": 3}, "'window'"),
        ({"captions": "randm"}, "'random'"),
        ({"augmentation": {"crop_scael": [1, 1]}}, "'crop_scale'"),
        ({"augmentation": {"crop_scale": [0.5, 2.0]}}, "at most 1"),
        ({"max_bad_fraction": {"corupt_image": 0.1}}, "'corrupt_image'"),
        ({"max_bad_fraction": 7}, "fraction from 0 to 1"),
        ({"train": [{"shards": "x.tar", "weight": 0}]}, "above 0"),
        ({"train": [{"shards": "x.tar", "weight": 1}, {"shards": "y.tar"}]}, "give all a weight"),
    ],
)
def test_wrong_settings_say_what_is_right(spec, message, thousand_shards, byte_tokenizer):
    spec = {"kind": "shards", "train": str(thousand_shards[0]), **spec}
    with pytest.raises(ValueError, match=message):
        create_stream(spec, tokenizer=byte_tokenizer, image_size=16, batch_size=1, seed=0)


def test_a_process_that_leaves_a_stream_behind_ends_well(tmp_path, write_tar, sample):
    """Its watching thread, waking while Python ended, aborted nearly every one of this benchmark's processes."""
    for shard in range(8):
        write_tar(tmp_path / f"{shard}.tar", [m for i in range(64) for m in sample(f"{shard}{i:02d}", i)])
    job = {"what": "first_batch", "folder": str(tmp_path), "cache": str(tmp_path / "cache")}
    for started in [command(ROOT / "benchmarks" / "shards.py", "--child", json.dumps(job)) for _ in range(3)]:
        assert json.loads(started.finished().splitlines()[-1])["samples"] == 512
