"""The fault corpus: training finishes, the counts are the script's, nothing is executed, limits stop the
run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import runpy
import sys
import tarfile
from pathlib import Path

import pytest

from clipkit.data import create_stream, iter_eval, train_captions
from clipkit.data.faults import DataError, FaultCounter, joined_faults
from clipkit.distributed import launch

# Spawned ranks import the worker by name, and inherit sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import limit_cases

_program = runpy.run_path(str(Path(__file__).with_name("make_faults.py")))
make, PASSED_OVER = _program["make"], _program["PASSED_OVER"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    marker = folder / "unpickled"
    return *make(folder / "shards", marker), marker


def stream_of(shards, tokenizer, **spec):
    settings = {
        "batch_size": 1,
        "epochs": 1,
        "num_workers": 0,
        **{k: spec.pop(k) for k in ("num_workers",) if k in spec},
    }
    return create_stream(
        {"kind": "shards", "train": shards, "on_bad_shard": "skip", "max_bad_fraction": 1.0, **spec},
        tokenizer=tokenizer,
        image_size=32,
        seed=0,
        **settings,
    )


@pytest.mark.parametrize("num_workers, cache", [(0, "none"), (2, "none"), (0, "ram")])
def test_training_finishes_with_the_scripts_counts(corpus, byte_tokenizer, num_workers, cache):
    shards, faults, good, marker = corpus
    stream = stream_of(shards, byte_tokenizer, num_workers=num_workers, cache=cache)
    keys = [key for batch in stream for key in batch["key"]]
    assert stream.report()["skipped"] == dict(sorted(faults.items()))
    assert len(set(keys)) == good
    # Every position was filled: what did not decode was replaced.
    decoded = sum(
        faults[c]
        for c in ("corrupt_image", "image_too_large", "empty_caption", "caption_not_utf8", "broken_json")
    )
    assert len(keys) == good + decoded - PASSED_OVER == stream.samples_per_epoch


def test_nothing_is_executed_or_written_outside(corpus, byte_tokenizer, tmp_path, monkeypatch):
    shards, _, _, marker = corpus
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(Path(shards[0]).parent))
    for _ in stream_of(shards, byte_tokenizer):
        pass
    assert not marker.exists() and not Path("/tmp/absolute.jpg").exists()
    assert os.listdir(tmp_path) == [] and sorted(os.listdir(Path(shards[0]).parent)) == before


def test_the_corpus_pickle_would_have_shown_itself(corpus):
    shards, _, _, marker = corpus
    with tarfile.open([path for path in shards if path.endswith("08-members.tar")][0]) as tar:
        payload = tar.extractfile("loaded.pkl").read()
    pickle.loads(payload).close()
    assert marker.exists()
    marker.unlink()


def test_one_cause_over_its_limit_stops_the_run_and_names_shard_and_key(corpus, byte_tokenizer):
    shards, faults, _, _ = corpus
    with pytest.raises(
        RuntimeError, match=r"2 of \d+ samples are bad by caption_not_utf8|1 of \d+ .* caption_not_utf8"
    ) as raised:
        for _ in stream_of(
            shards, byte_tokenizer, max_bad_fraction={"default": 1.0, "caption_not_utf8": 0.0}
        ):
            pass
    assert "key 'latin1' of shard" in str(raised.value) and "07-captions.tar" in str(raised.value)


def test_the_limit_holds_with_workers_and_for_shards(corpus, byte_tokenizer):
    with pytest.raises(RuntimeError, match="broken_json"):
        for _ in stream_of(
            corpus[0], byte_tokenizer, num_workers=2, max_bad_fraction={"default": 1.0, "broken_json": 0.01}
        ):
            pass
    with pytest.raises(RuntimeError, match="empty_shard"):
        stream_of(corpus[0], byte_tokenizer, max_bad_fraction={"default": 1.0, "empty_shard": 0.001})


@pytest.mark.parametrize("name", ["03-zero.tar", "04-nothing.tar", "05-noise.tar"])
def test_a_bad_shard_is_an_error_before_the_first_step_unless_skipped(corpus, byte_tokenizer, name):
    folder = Path(corpus[0][0]).parent
    with pytest.raises(DataError, match=name):
        stream_of([str(folder / "00-good.tar"), str(folder / name)], byte_tokenizer, on_bad_shard="error")
    with pytest.raises(DataError, match="none of the 1 shards has a complete sample"):
        stream_of([str(folder / name)], byte_tokenizer)


def test_a_vocabulary_is_built_from_what_is_readable(corpus):
    shards, _, good, _ = corpus
    captions = list(train_captions({"train": shards, "on_bad_shard": "skip"}))
    assert {"from the json", "caf\u00e9 \U0001f600"} < set(captions)
    with pytest.raises(DataError, match="03-zero.tar"):
        list(train_captions({"train": shards}))


def test_counts_survive_a_resume(corpus, byte_tokenizer):
    shards, faults, _, _ = corpus
    first = stream_of(shards, byte_tokenizer)
    iterator = iter(first)
    for _ in range(40):
        next(iterator)
    state = first.state_dict()
    iterator.close()
    resumed = stream_of(shards, byte_tokenizer)
    resumed.load_state_dict(state)
    for _ in resumed:
        pass
    assert resumed.report()["skipped"] == dict(sorted(faults.items()))


def test_reports_of_ranks_add_up(corpus, byte_tokenizer):
    shards, faults, good, _ = corpus
    total: dict[str, int] = {}
    for rank in range(2):
        stream = create_stream(
            {"kind": "shards", "train": shards, "on_bad_shard": "skip", "max_bad_fraction": 1.0},
            tokenizer=byte_tokenizer,
            image_size=32,
            batch_size=1,
            seed=0,
            rank=rank,
            world_size=2,
            epochs=1,
        )
        for _ in stream:
            pass
        for cause, n in stream.report()["skipped"].items():
            total[cause] = total.get(cause, 0) + n
    # A substitute that is itself bad may be met by the other rank too, so decoding faults are a lower bound.
    for cause, n in faults.items():
        assert total[cause] == n or (
            total[cause] > n
            and cause
            in ("corrupt_image", "image_too_large", "empty_caption", "caption_not_utf8", "broken_json")
        )


def test_a_fifo_as_a_shard_is_refused_and_not_opened(tmp_path, byte_tokenizer):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="not a regular file"):
        stream_of([str(tmp_path / "a.tar")], byte_tokenizer)


def test_a_shard_that_changes_during_the_run_is_an_error(tmp_path, write_tar, sample, byte_tokenizer):
    shard = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in sample(f"k{i}", i)])
    stream = stream_of([str(shard)], byte_tokenizer)
    os.truncate(shard, 4096)
    with pytest.raises(RuntimeError, match="size changed"):
        next(iter(stream))


@pytest.fixture(scope="module")
def third_bad(tmp_path_factory, write_tar, sample):
    """800 samples, 3 in 10 of them corrupt, in 8 shards."""
    folder = tmp_path_factory.mktemp("third")
    paths = []
    for shard in range(8):
        members = []
        for i in range(100):
            image, *rest = sample(f"{shard}{i:03d}", i % 8)
            members += [(image[0], b"no picture" if i % 10 < 3 else image[1]), *rest]
        paths.append(str(write_tar(folder / f"{shard}.tar", members)))
    return paths


def steps_until_too_many(shards, tokenizer, world_size):
    """How many samples all ranks have read when the sum of their counts passes the limit; summed here by hand."""
    streams = [
        create_stream(
            {"train": shards},
            tokenizer=tokenizer,
            image_size=8,
            batch_size=16 // world_size,
            seed=0,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    for stream in streams:
        stream.faults.agreed = True
    for read, _ in enumerate(zip(*streams), 1):
        added = [sum(column) for column in zip(*(stream.faults.added() for stream in streams))]
        over = {stream.faults.over(added) for stream in streams}
        assert len(over) == 1
        if over != {None}:
            return 16 * read, max(added)


def test_any_number_of_ranks_passes_the_limit_at_the_same_sample(third_bad, byte_tokenizer):
    found = {world: steps_until_too_many(third_bad, byte_tokenizer, world) for world in (1, 2, 4, 8)}
    assert len(set(found.values())) == 1, found
    read, bad = found[1]
    # The 41st is too many of 800 at 0.05: 137 samples at 0.3, with 16 more of the batch, give or take three
    # standard deviations of chance.
    assert 41 <= bad <= 41 + 16 and 90 <= read <= 200


@pytest.mark.parametrize(
    "world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_ranks_stop_together_with_one_message(third_bad, byte_tokenizer, world):
    read, bad = steps_until_too_many(third_bad, byte_tokenizer, 1)
    found = launch(limit_cases.run_until_stopped, world, third_bad, 16 // world)
    assert {position for position, _ in found} == {read}
    (message,) = {message for _, message in found}
    assert f"{bad} of 800 samples are bad by corrupt_image" in message and "The last was key '" in message


def test_a_rank_by_itself_holds_its_share_and_allows_for_chance(third_bad, byte_tokenizer):
    def read_by(rank, **spec):
        stream = create_stream(
            {"train": third_bad, **spec},
            tokenizer=byte_tokenizer,
            image_size=8,
            batch_size=4,
            seed=0,
            rank=rank,
            world_size=4,
            epochs=1,
        )
        with pytest.raises(RuntimeError, match="bad by corrupt_image"):
            for _ in stream:
                pass
        return stream.report()["samples_seen"]

    # Its 200 samples may hold 10 and 4 times the root of 10: the 23rd is too many, of 60 that are bad.
    assert all(4 * 40 <= read_by(rank) <= 4 * 140 for rank in range(4))
    assert read_by(0, max_bad_fraction=0) <= 4 * 20


def test_every_epoch_has_room_for_as_many(third_bad, byte_tokenizer):
    """Bad samples are met again, and are no more of the data for it."""
    stream = stream_of(third_bad, byte_tokenizer, max_bad_fraction=0.301)
    stream.epochs = 3
    for _ in stream:
        pass
    assert stream.report()["skipped"] == {"corrupt_image": 3 * 240}
    with pytest.raises(RuntimeError, match=r"24[0-9] of 800 samples are bad"):
        for _ in stream_of(third_bad, byte_tokenizer, max_bad_fraction=0.299):
            pass


def test_a_checkpoint_holds_counts_and_few_examples(third_bad, byte_tokenizer):
    stream = stream_of(third_bad, byte_tokenizer)
    sizes = []
    for _ in stream:
        sizes.append(len(json.dumps(stream.state_dict())))
    assert sizes[-1] - sizes[100] < 20 and sizes[-1] < 2000
    assert stream.state_dict()["faults"]["counts"] == {"corrupt_image": 240}
    assert len(stream.state_dict()["faults"]["examples"]["corrupt_image"]) == 5
    # Four ranks' states go on as one.
    counters = [FaultCounter(1.0, samples=10) for _ in range(4)]
    for number, counter in enumerate(counters):
        for i in range(number):
            counter.add("corrupt_image", shard="a.tar", key=f"{number}{i}")
    again = FaultCounter(1.0, samples=10)
    again.load_state_dict(json.loads(json.dumps(joined_faults([one.state_dict() for one in counters]))))
    assert again.counts == {"corrupt_image": 6} and len(again.examples("corrupt_image")) == 5


def test_a_position_of_other_pictures_is_refused(third_bad, byte_tokenizer):
    stream = stream_of(third_bad, byte_tokenizer)
    state = stream.state_dict()
    del state["version"]
    with pytest.raises(ValueError, match=r"made other pictures \(data version 1, here 2"):
        stream.load_state_dict(state)


@pytest.mark.parametrize("count", [1, 2, 5, 19, 40])
def test_one_bad_shard_of_few_is_skipped_where_skipping_is_asked_for(
    count, tmp_path, write_tar, sample, byte_tokenizer
):
    names = [str(write_tar(tmp_path / f"{i:02d}.tar", sample(f"k{i}"))) for i in range(count)]
    (tmp_path / "zz.tar").write_bytes(b"noise" * 1000)
    names.append(str(tmp_path / "zz.tar"))
    spec = {"max_bad_fraction": 0.05}
    assert stream_of(names, byte_tokenizer, **spec).report()["skipped"] == {"unreadable_shard": 1}
    with pytest.raises(DataError, match="zz.tar"):
        stream_of(names, byte_tokenizer, on_bad_shard="error", **spec)
    for limit in (0, {"unreadable_shard": 0.001}):
        with pytest.raises(RuntimeError, match=rf"1 of {count + 1} shards are bad by unreadable_shard"):
            stream_of(names, byte_tokenizer, max_bad_fraction=limit)


def test_a_gap_in_a_brace_list_is_a_bad_shard(tmp_path, write_tar, sample, byte_tokenizer):
    for i in (0, 1, 3):
        write_tar(tmp_path / f"{i:02d}.tar", sample(f"k{i}"))
    braces = f"{tmp_path}/{{00..03}}.tar"
    stream = stream_of(braces, byte_tokenizer)
    assert stream.report()["skipped"] == {"unreadable_shard": 1} and stream.samples_per_epoch == 3
    assert sorted(train_captions({"train": braces, "on_bad_shard": "skip"})) == [
        "picture k0",
        "picture k1",
        "picture k3",
    ]
    for read in (
        lambda: stream_of(braces, byte_tokenizer, on_bad_shard="error"),
        lambda: list(train_captions({"train": braces})),
        lambda: list(iter_eval(braces, image_size=8, batch_size=1)),
    ):
        with pytest.raises(ValueError, match="1 of the 4 shards .*02.tar.*on_bad_shard=skip trains"):
            read()
    for nowhere in (f"{tmp_path}/{{10..12}}.tar", f"{tmp_path}/10.tar"):
        with pytest.raises(ValueError, match="10.tar"):
            stream_of(nowhere, byte_tokenizer)


def test_a_fault_keeps_its_fields_between_processes():
    error = pickle.loads(pickle.dumps(DataError("broken_json", "why", shard="s.tar", key="k")))
    assert (error.cause, error.detail, error.shard, error.key) == ("broken_json", "why", "s.tar", "k")


def test_members_that_are_too_large_are_not_read(tmp_path, write_tar, sample, jpeg, monkeypatch):
    import clipkit.data.shardset

    limits = ((20_000, "image_too_large"), (50, "caption_not_utf8"), (500, "broken_json"))
    monkeypatch.setattr(clipkit.data.shardset, "_MOST", limits)
    members = [("a.jpg", jpeg(1) + b"\0" * 30_000), ("a.txt", b"x"), ("b.jpg", jpeg(2)), ("b.txt", b"x" * 60)]
    members += [("c.jpg", jpeg(3)), ("c.json", b'{"caption": "' + b"x" * 600 + b'"}'), *sample("good")]
    faults = []
    path = write_tar(tmp_path / "a.tar", members)
    batches = list(iter_eval(path, image_size=8, batch_size=4, on_bad=faults.append))
    assert [batch["key"] for batch in batches] == [["good"]]
    assert [(fault.key, fault.cause) for fault in faults] == [
        ("a", "image_too_large"),
        ("b", "caption_not_utf8"),
        ("c", "broken_json"),
    ]


def test_the_zeros_between_concatenated_tars_are_passed_over_without_reading_holes(tmp_path):
    """Two tars with 20 GB of nothing between: a sparse file, whose second half counts."""
    from clipkit.data.tarindex import index_tar

    def one(name: str) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for suffix in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
        return out.getvalue()

    path = tmp_path / "sparse.tar"
    with path.open("wb") as file:
        file.write(one("first"))
        file.seek(20 << 30)
        file.write(one("second"))
    assert index_tar(path).keys == ["first", "second"] and not index_tar(path).faults
    with path.open("ab") as file:
        file.truncate(50 << 30)
    assert index_tar(path).keys == ["first", "second"]
    path.write_bytes(one("first") + bytes(512 * 5000) + one("second"))
    assert index_tar(path).keys == ["first", "second"]
