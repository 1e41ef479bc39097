"""Where shards come from: patterns, a local HTTP server, pipes, dropped connections and deadlines."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from clipkit.data import create_stream, expand_shards, iter_eval
from clipkit.data.faults import DataError
from clipkit.data.spool import Spool
from clipkit.data.urls import Expanded
from clipkit.foreign import BrokenFile, named_by
from tests.data.shard_server import Server
from tests.processes import PATIENCE


@pytest.fixture
def shards(tmp_path, write_tar, sample) -> list[Path]:
    return [
        write_tar(
            tmp_path / "set" / f"{s:03d}.tar", [m for i in range(6) for m in sample(f"{s:03d}{i}", s * 6 + i)]
        )
        for s in range(4)
    ]


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy between the test and its own server."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def keys_of(train, tokenizer, **options):
    spec = {"kind": "shards", "train": train, **options.pop("spec", {})}
    stream = create_stream(
        spec, tokenizer=tokenizer, image_size=16, batch_size=8, seed=0, epochs=2, **options
    )
    return [key for batch in stream for key in batch["key"]]


def test_files_http_and_pipe_give_the_same_keys(shards, byte_tokenizer, keys_in):
    local = keys_of([str(path) for path in shards], byte_tokenizer)
    assert sorted(local[:24]) == sorted(keys_in(shards))
    folder = shards[0].parent
    assert keys_of(f"pipe:cat {folder}/{{000..003}}.tar", byte_tokenizer) == local
    with Server(folder) as server:
        assert keys_of(f"{server.url}/{{000..003}}.tar", byte_tokenizer, num_workers=2) == local
        assert server.served == {f"{i:03d}.tar": 1 for i in range(4)}, (
            "each shard was fetched once, by whichever process"
        )
        evaluated = [
            key
            for batch in iter_eval(f"{server.url}/{{000..003}}.tar", image_size=16, batch_size=10)
            for key in batch["key"]
        ]
        assert evaluated == keys_in(shards)


def test_a_server_that_drops_connections_is_asked_again(shards, tmp_path):
    with Server(shards[0].parent, drops=2) as server:
        spool = Spool(tmp_path / "spool", retries=3, backoff_s=0.01)
        assert Path(spool.path(f"{server.url}/001.tar")).read_bytes() == shards[1].read_bytes()
        assert server.asked["001.tar"] == 3
        with pytest.raises(DataError, match=r"002.tar.*2 tries"):
            Spool(tmp_path / "spool", retries=1, backoff_s=0.01).path(f"{server.url}/002.tar")
    assert [path.suffix for path in (tmp_path / "spool").glob("*.tar")] == [".tar"], (
        "a broken copy is never kept as a shard"
    )


def test_a_shard_that_never_comes_is_named_after_its_deadline(shards, byte_tokenizer):
    with Server(shards[0].parent, hang=("001.tar",)) as server:
        spec = {"shard_deadline_s": 1.0, "shard_stall_s": 0.5, "shard_retries": 1}
        start = time.monotonic()
        with pytest.raises(DataError, match=r"001\.tar.*no byte for 0.5 s|001\.tar.*deadline"):
            keys_of(f"{server.url}/{{000..003}}.tar", byte_tokenizer, spec=spec)
        assert time.monotonic() - start < PATIENCE
        skipped = create_stream(
            {
                "train": f"{server.url}/{{000..003}}.tar",
                "on_bad_shard": "skip",
                "max_bad_fraction": {"unreadable_shard": 0.25},
                **spec,
            },
            tokenizer=byte_tokenizer,
            image_size=16,
            batch_size=6,
            seed=0,
            epochs=1,
        )
        assert skipped.samples_per_epoch == 18 and skipped.report()["skipped"] == {"unreadable_shard": 1}


def test_a_refusing_server_and_a_failing_command_say_so(shards, tmp_path):
    spool = Spool(tmp_path / "spool", retries=0)
    with Server(shards[0].parent, status={"000.tar": 404}) as server:
        with pytest.raises(DataError, match="000.tar"):
            spool.path(f"{server.url}/000.tar")
    for command in ("pipe:exit 3", f"pipe:cat {shards[0]}; exit 7", "pipe:true"):
        with pytest.raises(DataError, match="unreadable_shard"):
            spool.path(command)


def test_two_that_want_a_shard_at_once_fetch_it_once(shards, tmp_path):
    log = tmp_path / "log"
    source = f"pipe:echo x >> {log}; sleep 0.3; cat {shards[0]}"
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: Spool(tmp_path / "spool").path(source), range(4)))
    assert log.read_text().count("x") == 1
    assert all(Path(path).read_bytes() == shards[0].read_bytes() for path in paths)


def test_fetched_shards_stay_within_their_limit(shards, tmp_path):
    size = shards[0].stat().st_size
    spool = Spool(tmp_path / "spool", limit_gb=2.5 * size / 1e9)
    for path in shards:
        spool.path(f"pipe:cat {path}")
        time.sleep(0.02)
    assert len(list((tmp_path / "spool").glob("*.tar"))) == 2
    assert Path(spool.path(f"pipe:cat {shards[0]}")).read_bytes() == shards[0].read_bytes()


def test_a_remote_index_is_kept_so_that_a_second_run_fetches_what_it_reads(
    shards, tmp_path, own_cache, byte_tokenizer
):
    log = tmp_path / "log"
    source = f"pipe:echo x >> {log}; cat {shards[0]}"
    keys_of(source, byte_tokenizer, spec={"resample": True})
    for file in (own_cache / "shards").glob("*.tar"):
        file.unlink()
    create_stream(
        {"train": source, "resample": True}, tokenizer=byte_tokenizer, image_size=16, batch_size=4, seed=0
    )
    assert log.read_text().count("x") == 1


def test_a_shard_that_goes_away_during_the_run_stops_it_by_name(shards, tmp_path, own_cache, byte_tokenizer):
    copies = [tmp_path / f"gone{i}.tar" for i in range(2)]
    for copy, shard in zip(copies, shards):
        shutil.copy(shard, copy)
    stream = create_stream(
        {"train": [f"pipe:cat {copy}" for copy in copies], "shard_retries": 0},
        tokenizer=byte_tokenizer,
        image_size=16,
        batch_size=6,
        seed=0,
    )
    copies[1].unlink()
    for file in (own_cache / "shards").glob("*.tar"):
        file.unlink()
    with pytest.raises(DataError, match=r"gone1\.tar.*unreadable_shard"):
        for _, _ in zip(range(4), stream):
            pass


def test_patterns_expand_in_order(shards, tmp_path):
    folder = shards[0].parent
    names = [str(path) for path in shards]
    assert expand_shards(f"{folder}/*.tar") == names
    assert expand_shards(f"{folder}/{{000..003}}.tar") == names
    assert expand_shards(folder) == names
    assert expand_shards([f"{folder}/00[23].tar", names[0]]) == [names[2], names[3], names[0]]
    assert expand_shards("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]
    assert expand_shards("s3://bucket/{00..02}.tar")[2] == "s3://bucket/02.tar"


def test_what_is_not_there_is_an_error_that_says_what_is(shards):
    folder = shards[0].parent
    with pytest.raises(ValueError, match=r"no file matches .*holds 000.tar, 001.tar, 002.tar, \.\.\."):
        expand_shards(f"{folder}/*.tgz")
    with pytest.raises(ValueError, match=r"1 of the 2 shards of .*004\.tar"):
        expand_shards(f"{folder}/{{003..004}}.tar")
    with pytest.raises(ValueError, match="more than once"):
        expand_shards([f"{folder}/*.tar", f"{folder}/000.tar"])
    with pytest.raises(ValueError, match="is empty"):
        expand_shards([])


HOSTILE_NAMES = [
    "pipe:touch ran; cat set.tar", "PIPE:touch ran.tar", "https:x.tar", "file:x.tar", "{a,b}.tar", "{0..9}.tar",
    "[ab].tar", "*.tar", "x?.tar", "~x.tar", "{.tar", "a\\{b.tar", "-x.tar",
]  # fmt: skip


def test_files_whose_names_are_patterns_or_commands_are_those_files(tmp_path, monkeypatch, write_tar, sample):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(HOSTILE_NAMES):
        write_tar(tmp_path / name, sample(f"key{i}", i))
    found = expand_shards("./*tar")
    assert sorted(Path(name).name for name in found) == sorted(HOSTILE_NAMES)
    for again in (found, expand_shards(found), expand_shards(list(found))):
        assert again == found
    # Their relative names too, as `*.tar` in the present folder gives them, by every way that expands names twice.
    names = expand_shards("*tar")
    assert names == expand_shards(list(names)) and not any(name.startswith(("pipe", "~")) for name in names)
    keys = [key for batch in iter_eval(names, image_size=8, batch_size=4) for key in batch["key"]]
    assert sorted(keys) == sorted(f"key{i}" for i in range(len(HOSTILE_NAMES)))
    for name in HOSTILE_NAMES:
        if ":" not in name and "\\" not in name:
            assert [Path(one).name for one in expand_shards(name)] == [name]
    assert not (tmp_path / "ran").exists()


def test_a_folder_whose_name_is_a_pattern_is_that_folder(shards, tmp_path):
    folder = tmp_path / "set[1]"
    shutil.copytree(shards[0].parent, folder)
    assert expand_shards(folder) == [str(folder / path.name) for path in shards]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_pattern_that_matches_no_regular_file_is_refused(shards, make):
    make(shards[0].parent / "zzz.tar")
    for name in (f"{shards[0].parent}/*.tar", shards[0].parent, str(shards[0].parent / "zz?.tar")):
        with pytest.raises(ValueError, match=r"zzz\.tar' is not a regular file"):
            expand_shards(name)


@pytest.mark.parametrize(
    "name",
    [
        "{0..99999999}.tar",
        "{0..9999}{0..9999}.tar",
        "{{0..9999}{0..9999},x}",
        "{a,b}" * 40,
        "{1" + "0" * 5000 + "..2}",
    ],
)
def test_braces_without_bound_are_refused(name):
    with pytest.raises(ValueError, match="stands for more than 1,000,000 shards"):
        expand_shards(name)
    with pytest.raises(ValueError, match="is no brace pattern"):
        expand_shards("{" * 3000)


def test_a_stranger_s_settings_open_no_shard_elsewhere(shards, tmp_path, monkeypatch):
    work = tmp_path / "work"
    (work / "mine").mkdir(parents=True)
    shutil.copy(shards[0], work / "mine" / "0.tar")
    monkeypatch.chdir(work)
    elsewhere = shards[0].parent
    (work / "mine" / "set").symlink_to(elsewhere)
    bad = [
        str(shards[0]), f"{elsewhere}/*.tar", str(elsewhere), f"{elsewhere}/{{000..001}}.tar", f"file:{shards[0]}",
        "../set/*.tar", "mine/../../set/000.tar", "{mine/0.tar,/etc/passwd}", "/*/passwd", "nowhere/../../set/*",
        "pipe:cat mine/0.tar", "https://host/{0..1}.tar",
    ]  # fmt: skip
    with named_by(tmp_path / "run"):
        assert len(expand_shards("mine/*.tar")) == 1 and len(expand_shards("mine")) == 1
        for name in bad:
            with pytest.raises(BrokenFile, match="settings that"):
                expand_shards(name)
        with pytest.raises(BrokenFile):
            expand_shards(Expanded([str(shards[0])]))
    assert len(expand_shards(str(elsewhere))) == 4


def test_an_endless_stream_ends_at_the_limit_and_leaves_nothing(tmp_path):
    spool = Spool(tmp_path / "spool", limit_gb=0.002, retries=3, backoff_s=10.0)
    with pytest.raises(DataError, match="unreadable_shard: it has more than the 0.002 GB.*data.spool_gb"):
        spool.path("pipe:cat /dev/zero")
    assert not [path for path in (tmp_path / "spool").iterdir() if path.suffix != ".lock"]


def test_a_stream_stops_before_the_disk_is_full(shards, tmp_path, monkeypatch):
    spool = Spool(tmp_path / "spool", retries=2, backoff_s=0.01)
    spool.path(f"pipe:cat {shards[0]}")
    kept = list((tmp_path / "spool").glob("*.tar"))
    usage = shutil.disk_usage(tmp_path)
    # As the older shard goes, the disk has room again.
    monkeypatch.setattr(
        "clipkit.data.spool.shutil.disk_usage",
        lambda path: usage._replace(free=1000 if kept[0].exists() else usage.total // 2),
    )
    assert Path(spool.path(f"pipe:cat {shards[1]}")).read_bytes() == shards[1].read_bytes()
    assert not kept[0].exists()
    monkeypatch.setattr("clipkit.data.spool.shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"disk of .* is full .* lower data.spool_gb, or set data.cache_dir"):
        Spool(tmp_path / "other", retries=2, backoff_s=10.0).path(f"pipe:cat {shards[2]}")
    assert not [path for path in (tmp_path / "other").iterdir() if path.suffix != ".lock"]
