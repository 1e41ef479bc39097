"""A shard list at scale: counts without reading, indexes when a shard is read, and no pair of a shard written anew."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import clipkit.data.shardset
from clipkit.data import create_stream, iter_eval
from clipkit.data.faults import DataError
from clipkit.data.shardset import ShardSet
from clipkit.data.spool import Spool
from clipkit.foreign import BrokenFile
from tests.data.shard_server import Server


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between the test and its own server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def pairs(write_tar, path: Path, keys: list[str], *, seed: int = 0) -> Path:
    """Samples whose picture, caption and json all say which they are; their lengths differ, their tars' sizes do not."""
    rng, members = random.Random(seed), []
    for key in keys:
        members += [
            (f"{key}.jpg", f"picture {key} ".encode() * rng.randrange(1, 60)),
            (f"{key}.txt", f"caption {key}".encode() + b" " * rng.randrange(40)),
            (f"{key}.json", json.dumps({"of": key, "more": "x" * rng.randrange(40)}).encode()),
        ]
    write_tar(path, members)
    with open(path, "ab") as file:
        file.truncate(4 * 1024 * len(keys) + 10240)
    return path


def told(data: ShardSet, sample: int) -> set[str]:
    """Which sample each of its parts says it is of."""
    picture = data.image(sample).split(b" ")[1].decode()
    return {picture, data.captions(sample)[0].split()[1], data.meta(sample)["of"], data.key(sample)}


def stream_of(train, tokenizer, *, batch_size=4, epochs=1, seed=0, **spec):
    return create_stream(
        {"kind": "shards", "train": train, **spec},
        tokenizer=tokenizer,
        image_size=8,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
    )


def keys_of(stream) -> list[str]:
    return [key for batch in stream for key in batch["key"]]


@pytest.fixture
def shards(tmp_path, write_tar, sample) -> list[Path]:
    """Eight shards of 3 to 6 samples."""
    return [
        write_tar(
            tmp_path / "set" / f"{s:05d}.tar",
            [m for i in range(3 + s % 4) for m in sample(f"{s:05d}{i:04d}", s * 6 + i)],
        )
        for s in range(8)
    ]


def say_sizes(shards):
    (shards[0].parent / "sizes.json").write_text(
        json.dumps({p.name: 3 + s % 4 for s, p in enumerate(shards)})
    )


def say_stats(shards):
    # What img2dataset writes beside a shard.
    for s, path in enumerate(shards):
        stats = {"count": 10, "successes": 3 + s % 4, "failed_to_download": 7 - s % 4, "duration": 1.5}
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(stats))


@pytest.mark.parametrize("say", [say_sizes, say_stats])
def test_counts_beside_the_shards_give_the_order_and_no_shard_is_read_for_it(
    shards, byte_tokenizer, keys_in, say, monkeypatch
):
    expected = keys_of(stream_of(str(shards[0].parent), byte_tokenizer, epochs=2))
    monkeypatch.setenv("CLIPKIT_CACHE", str(shards[0].parent.parent / "other"))
    say(shards)
    with monkeypatch.context() as never:
        never.setattr(ShardSet, "_open", lambda self, shard: pytest.fail("a shard was read"))
        stream = stream_of(str(shards[0].parent), byte_tokenizer, epochs=2)
        assert stream.samples_per_epoch == len(keys_in(shards)) == 36
    assert keys_of(stream) == expected
    # From here on the indexes say it, whatever is beside the shards.
    say_sizes(shards[:1])
    assert keys_of(stream_of(str(shards[0].parent), byte_tokenizer, epochs=2)) == expected


def test_shards_whose_count_nothing_says_are_counted(shards, byte_tokenizer, keys_in):
    say_stats(shards)
    for path in (shards[1], *shards[5::2], shards[3]):
        path.with_name(f"{path.stem}_stats.json").unlink()
    (shards[0].parent / "sizes.json").write_text(json.dumps({shards[1].name: 4, "another.tar": 9}))
    (shards[0].parent / "00004_stats.json").write_text("no json")
    (shards[0].parent / "00006_stats.json").write_text('{"successes": true}')
    data = ShardSet([str(path) for path in shards], cache_dir=shards[0].parent / "cache", declared=True)
    assert data.declared.tolist() == [True, True, True, False, False, False, False, False]
    assert data.counts.tolist() == [3, 4, 5, 6, 3, 4, 5, 6]
    assert [data.key(sample) for sample in data] == keys_in(shards)


@pytest.mark.parametrize("said, place", [(2, 0), (4, 0), (7, 3), (5, 3)])
def test_a_wrong_count_is_an_error_that_names_the_shard_and_what_to_do(
    shards, byte_tokenizer, said, place, tmp_path
):
    sizes = {path.name: 3 + s % 4 for s, path in enumerate(shards)} | {shards[place].name: said}
    (shards[0].parent / "sizes.json").write_text(json.dumps(sizes))
    message = (
        rf"{shards[place].name}: wrong_count: it holds {3 + place} complete samples, the sizes.json or _stats.json "
        rf"beside it says {said}\. .*`clipkit-data index`"
    )
    with pytest.raises(DataError, match=message):
        keys_of(stream_of(str(shards[0].parent), byte_tokenizer))
    with pytest.raises(DataError, match=message):
        for _ in create_stream(
            {"train": str(shards[0].parent), "cache_dir": str(tmp_path / "other")},
            tokenizer=byte_tokenizer,
            image_size=8,
            batch_size=4,
            seed=0,
            num_workers=2,
            epochs=1,
        ):
            pass
    # It has been indexed meanwhile, and that counts.
    assert len(keys_of(stream_of(str(shards[0].parent), byte_tokenizer))) == 36


@pytest.mark.parametrize(
    "text", ["[", "[3]", '{"00000.tar": "3"}', '{"00000.tar": -1}', '{"00000.tar": 1e3}']
)
def test_a_sizes_file_that_holds_something_else_is_named(shards, byte_tokenizer, text):
    (shards[0].parent / "sizes.json").write_text(text)
    with pytest.raises(BrokenFile, match=r"sizes\.json"):
        stream_of(str(shards[0].parent), byte_tokenizer)


def test_a_shard_that_is_not_there_is_no_sample_whatever_is_said_of_it(shards, tmp_path):
    say_sizes(shards)
    shards[2].unlink()
    names = [str(path) for path in shards]
    data = ShardSet(names, cache_dir=tmp_path / "cache", declared=True, on_bad_shard="skip")
    assert data.counts.tolist() == [3, 4, 0, 6, 3, 4, 5, 6]
    assert [(shard, cause) for shard, cause, _ in data.faults] == [(names[2], "unreadable_shard")]
    with pytest.raises(DataError, match=r"00002\.tar: unreadable_shard"):
        ShardSet(names, cache_dir=tmp_path / "cache", declared=True)


def test_faults_of_a_shard_that_was_not_read_at_first_are_counted_once(
    tmp_path, write_tar, sample, byte_tokenizer
):
    good = [
        write_tar(tmp_path / f"{s}.tar", [m for i in range(9) for m in sample(f"{s}{i}", i)])
        for s in range(2)
    ]
    write_tar(
        tmp_path / "2.tar",
        [*sample("2a"), ("2b.txt", b"no picture"), *sample("2c"), ("2d.jpg", b"no caption")],
    )
    (tmp_path / "sizes.json").write_text(json.dumps({"0.tar": 9, "1.tar": 9, "2.tar": 2}))
    spec = {"train": str(tmp_path), "max_bad_fraction": 0.5}
    total: Counter[str] = Counter()
    streams = [
        create_stream(
            spec,
            tokenizer=byte_tokenizer,
            image_size=8,
            batch_size=2,
            seed=0,
            rank=rank,
            world_size=2,
            epochs=1,
        )
        for rank in range(2)
    ]
    for stream in streams:
        assert len(keys_of(stream)) == 10
        total.update(stream.report()["skipped"])
    assert total == {"missing_image": 1, "missing_caption": 1} and len(good) == 2


def test_what_is_held_does_not_grow_with_the_samples(tmp_path, write_tar):
    paths = [
        pairs(write_tar, tmp_path / f"{s:02d}.tar", [f"{s:02d}{i}" for i in range(5)]) for s in range(30)
    ]
    data = ShardSet([str(path) for path in paths], cache_dir=tmp_path / "cache", together=1)
    held = [value for value in vars(data).values() if isinstance(value, np.ndarray)]
    assert all(len(value) <= 31 for value in held) and not data._indexes
    assert [told(data, sample) for sample in data] == [{f"{s:02d}{i}"} for s in range(30) for i in range(5)]


def test_many_shards_at_once_are_read_with_few_open_files(tmp_path, write_tar, monkeypatch):
    monkeypatch.setattr(clipkit.data.shardset, "_OPEN_FILES", 3)
    monkeypatch.setattr(clipkit.data.shardset, "_OPEN_INDEXES", 2)
    paths = [pairs(write_tar, tmp_path / f"{s}.tar", [f"{s}{i}" for i in range(5)]) for s in range(8)]
    data = ShardSet([str(path) for path in paths], cache_dir=tmp_path / "cache", together=2)
    before = len(os.listdir("/proc/self/fd"))
    for sample in np.random.default_rng(0).permutation(40):
        assert told(data, int(sample)) == {f"{sample // 5}{sample % 5}"}
        assert len(data._files) <= 3 and len(data._indexes) <= 4
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    data.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_index_is_made_once_by_the_ranks_of_a_machine(shards, tmp_path, monkeypatch):
    made: list[str] = []
    index = clipkit.data.shardset.index_stream
    monkeypatch.setattr(
        clipkit.data.shardset,
        "index_stream",
        lambda file, size: made.append(os.readlink(f"/dev/fd/{file.fileno()}")) or index(file, size),
    )
    names = [str(path) for path in shards]
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert ShardSet(names, cache_dir=tmp_path / "cache").counts.tolist() == [3, 4, 5, 6] * 2
    assert sorted(made) == names
    # The second rank begins where the first comes last.
    made.clear()
    ShardSet(names, cache_dir=tmp_path / "another")
    assert made[0] in names[4:6]


def test_indexing_says_how_far_it_is(shards, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(clipkit.data.shardset, "_SAY_AFTER_S", 0.0)
    ShardSet([str(path) for path in shards], cache_dir=tmp_path / "cache")
    assert "indexed 1 of 8 shards" in (said := capfd.readouterr().err) and "clipkit-data index" in said


def test_a_cache_that_cannot_be_written_costs_time_alone(shards, tmp_path, keys_in):
    (tmp_path / "file").write_text("")
    data = ShardSet([str(path) for path in shards], cache_dir=tmp_path / "file")
    assert [data.key(sample) for sample in data] == keys_in(shards)


def replace(path: Path, other: Path, how: str) -> None:
    """Another tar in the place of one, of equal size and time of modification."""
    before = path.stat()
    assert other.stat().st_size == before.st_size and other.read_bytes() != path.read_bytes()
    if how == "renamed":
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(other, path)
    else:
        with open(path, "r+b") as file:
            file.write(other.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "when, how",
    [
        ("before", "in place"),
        ("later", "in place"),
        ("at first", "renamed"),
        pytest.param("before", "renamed", marks=pytest.mark.slow),
        pytest.param("at first", "in place", marks=pytest.mark.slow),
        pytest.param("later", "renamed", marks=pytest.mark.slow),
    ],
)
def test_a_shard_written_anew_at_equal_size_and_time_gives_no_wrong_pair(tmp_path, write_tar, how, when):
    """10,000 samples read while, or after, one shard is written anew: the same keys in another order, as another crawl."""
    keys = [[f"{s}{i:03d}" for i in range(500)] for s in range(4)]
    paths = [pairs(write_tar, tmp_path / f"{s}.tar", some, seed=s) for s, some in enumerate(keys)]
    other = pairs(write_tar, tmp_path / "other", list(reversed(keys[2])), seed=9)
    names, cache = [str(path) for path in paths], tmp_path / "cache"
    ShardSet(names, cache_dir=cache).close()
    if when == "before":
        replace(paths[2], other, how)
    data = ShardSet(names, cache_dir=cache)
    order = np.random.default_rng(3).integers(0, 2000, 10_000)
    refused = 0
    for step, sample in enumerate(map(int, order)):
        if (when, step) in (("at first", 0), ("later", 3000)):
            replace(paths[2], other, how)
        try:
            (key,) = told(data, sample)
        except DataError as error:
            assert error.cause == "changed_shard" and error.shard == names[2] and when != "before"
            assert "was written anew" in error.detail
            refused += 1
            continue
        if when == "before":
            assert key == ([*keys[0], *keys[1], *reversed(keys[2]), *keys[3]])[sample]
        else:
            assert key == [key for some in keys for key in some][sample]
    # A file that is open stays the one that it was, where another took its name.
    assert (refused > 1000) == (when == "at first" or (when == "later" and how == "in place"))


def test_a_sample_s_parts_are_of_one_shard_though_it_is_written_anew_between_them(tmp_path, write_tar):
    keys = [f"k{i:02d}" for i in range(50)]
    path = pairs(write_tar, tmp_path / "a.tar", keys)
    data = ShardSet([str(path)], cache_dir=tmp_path / "cache")
    assert data.image(7).startswith(b"picture k07")
    replace(path, pairs(write_tar, tmp_path / "b.tar", keys, seed=1), "in place")
    for read in (data.image, data.captions, data.meta):
        with pytest.raises(DataError, match=r"changed_shard: another member is where that of key 'k07' was"):
            read(7)


def test_a_training_run_stops_at_a_shard_written_anew(shards, tmp_path, write_tar, sample, byte_tokenizer):
    other = write_tar(tmp_path / "other.tar", [m for i in (2, 0, 1) for m in sample(f"00000{i:04d}", i)])
    stream = stream_of(str(shards[0].parent), byte_tokenizer, epochs=9)
    batches = iter(stream)
    next(batches)
    with open(shards[0], "r+b") as file:
        file.write(other.read_bytes()[: shards[0].stat().st_size])
    with pytest.raises(DataError, match=r"00000\.tar.*changed_shard.*start again"):
        for _ in batches:
            pass


def test_a_resume_refuses_another_content_of_the_same_name_and_count(
    shards, tmp_path, write_tar, sample, byte_tokenizer
):
    spec = str(shards[0].parent)
    stream = stream_of(spec, byte_tokenizer)
    next(iter(stream))
    state = stream.state_dict()
    moved = tmp_path / "moved"
    shutil.copytree(spec, moved)
    stream_of(str(moved), byte_tokenizer).load_state_dict(state)
    old = {name: value for name, value in state.items() if name != "content"}
    write_tar(moved / "00005.tar", [m for i in range(4) for m in sample(f"00005{i:04d}", 90 + i)])
    stream_of(str(moved), byte_tokenizer).load_state_dict(old)
    with pytest.raises(ValueError, match=r"00005\.tar has the name and count .* another content"):
        stream_of(str(moved), byte_tokenizer).load_state_dict(state)
    # The same where nothing of the shards has been read yet.
    say_sizes([moved / path.name for path in shards])
    shutil.rmtree(os.environ["CLIPKIT_CACHE"])
    with pytest.raises(ValueError, match=r"00005\.tar has the name and count .* another content"):
        stream_of(str(moved), byte_tokenizer).load_state_dict(state)


def remote(server: Server, tmp_path: Path, **options) -> tuple[list[str], Spool]:
    return [f"{server.url}/{s}.tar" for s in range(3)], Spool(tmp_path / "spool", retries=0, **options)


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("when", ["before", "later"])
def test_a_remote_shard_written_anew_gives_no_wrong_pair(tmp_path, write_tar, etags, when):
    """10,000 samples of a spool that holds one shard of three, so that each is fetched again and again."""
    keys = [[f"{s}{i:03d}" for i in range(100)] for s in range(3)]
    for s, some in enumerate(keys):
        pairs(write_tar, tmp_path / "set" / f"{s}.tar", some, seed=s)
    other = pairs(write_tar, tmp_path / "other.tar", list(reversed(keys[1])), seed=5)
    limit = {"limit_gb": 1.5 * other.stat().st_size / 1e9}
    with Server(tmp_path / "set", etags=etags) as server:
        names, spool = remote(server, tmp_path, **limit)
        ShardSet(names, cache_dir=tmp_path / "cache", spool=spool).close()
        time.sleep(0.05)
        names, spool = remote(server, tmp_path, **limit)
        if when == "before":
            replace(tmp_path / "set" / "1.tar", other, "renamed")
        data = ShardSet(names, cache_dir=tmp_path / "cache", spool=spool)
        refused = 0
        for step in range(100):
            if (when, step) == ("later", 50):
                replace(tmp_path / "set" / "1.tar", other, "renamed")
            for sample in range(100 * (step % 3), 100 * (step % 3) + 100):
                try:
                    (key,) = told(data, sample)
                except DataError as error:
                    assert error.cause == "changed_shard" and error.shard == names[1] and when == "later"
                    refused += 1
                    break
                place = 99 - sample % 100 if (when, sample // 100) == ("before", 1) else sample % 100
                assert key == keys[sample // 100][place]
            data.close()
        assert refused == (16 if when == "later" else 0)


def test_a_copy_is_taken_anew_only_where_the_server_has_another(tmp_path, write_tar, monkeypatch):
    paths = [pairs(write_tar, tmp_path / "set" / f"{s}.tar", [f"{s}{i}" for i in range(5)]) for s in range(2)]
    other = pairs(write_tar, tmp_path / "other.tar", [f"1{i}" for i in reversed(range(5))], seed=3)
    with Server(tmp_path / "set") as server:
        urls = [f"{server.url}/{path.name}" for path in paths]
        for _ in range(2):
            spool = Spool(tmp_path / "spool")
            for url, path in zip(urls, paths):
                assert Path(spool.path(url)).read_bytes() == path.read_bytes()
                spool.path(url)
        assert server.served == {"0.tar": 1, "1.tar": 1} == server.not_modified
        replace(paths[1], other, "renamed")
        spool = Spool(tmp_path / "spool")
        assert Path(spool.path(urls[1])).read_bytes() == paths[1].read_bytes()
        assert server.served["1.tar"] == 2
        # What is here stays of use while the server does not answer.
        server.status.update({"0.tar": 500})
        assert Path(Spool(tmp_path / "spool", retries=0).path(urls[0])).read_bytes() == paths[0].read_bytes()


def test_a_resume_refuses_a_remote_shard_of_another_content(
    tmp_path, shards, write_tar, sample, byte_tokenizer
):
    say_sizes(shards)
    folder = shards[0].parent
    with Server(folder) as server:
        train = f"{server.url}/{{00000..00007}}.tar"
        stream = stream_of(train, byte_tokenizer)
        expected = keys_of(stream)
        state = {**stream.state_dict(), "position": 0}
        write_tar(folder / "00005.tar", [m for i in range(4) for m in sample(f"00005{i:04d}", 90 + i)])
        time.sleep(0.05)
        resumed = stream_of(train, byte_tokenizer)
        resumed.load_state_dict(state)
        with pytest.raises(DataError, match=r"00005\.tar.*changed_shard"):
            keys_of(resumed)
        assert sorted(keys_of(stream_of(train, byte_tokenizer))) == sorted(expected)


def test_shards_of_any_file_system_are_read_through_fsspec(shards, byte_tokenizer):
    """fsspec's own memory stands for an object store."""
    import fsspec

    memory = fsspec.filesystem("memory")
    say_sizes(shards)
    expected = keys_of(stream_of(str(shards[0].parent), byte_tokenizer))
    for path in shards[0].parent.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    try:
        train = "memory://bucket/{00000..00007}.tar"
        assert keys_of(stream_of(train, byte_tokenizer)) == expected
        evaluated = [key for batch in iter_eval(train, image_size=8, batch_size=9) for key in batch["key"]]
        assert sorted(evaluated) == sorted(expected)
    finally:
        memory.rm("/bucket", recursive=True)
