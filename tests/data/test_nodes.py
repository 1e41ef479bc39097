"""Several nodes, each with a spool of its own: real processes with the variables that torchrun gives them."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clipkit.data import create_stream, resolve_data
from clipkit.losses import create_loss
from clipkit.training.feed import open_streams
from tests.data.remote_run import tokenize
from tests.data.shard_server import Server
from tests.processes import fork, launch

PROGRAM = Path(__file__).with_name("remote_run.py")
SHARDS = 16
# What a stream asks of an image tower.
TOWER: Any = SimpleNamespace(encodes=True, image_size=8, resize_mode="shortest", interpolation="bicubic")


@pytest.fixture(scope="module")
def shards(tmp_path_factory, write_tar, sample) -> Path:
    """16 shards of 6 samples of nearly equal size, with counts beside them."""
    folder = tmp_path_factory.mktemp("nodes")
    for s in range(SHARDS):
        write_tar(folder / f"{s:02d}.tar", [m for i in range(6) for m in sample(f"{s:02d}{i}", s * 6 + i)])
    (folder / "sizes.json").write_text(json.dumps({f"{s:02d}.tar": 6 for s in range(SHARDS)}))
    return folder


def stream_of(train, *, batch_size=12, rank=0, world_size=1, epochs=2, **spec):
    return create_stream(
        {"train": str(train), "window": 4, **spec},
        tokenizer=tokenize,
        image_size=8,
        batch_size=batch_size,
        seed=3,
        rank=rank,
        world_size=world_size,
        epochs=epochs,
    )


def steps_of(streams) -> list[list[str]]:
    """Per step, the keys of all ranks in rank order."""
    ranks = [[batch["key"] for batch in stream] for stream in streams]
    return [[key for keys in step for key in keys] for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("parts", [2, 4])
def test_the_order_of_parts_is_one_for_any_number_of_ranks(shards, parts, keys_in):
    everything = Counter(keys_in(sorted(shards.glob("*.tar"))))
    whole = steps_of([stream_of(shards, canonical_nodes=parts)])
    assert Counter(key for step in whole[:8] for key in step) == everything
    assert Counter(key for step in whole[8:] for key in step) == everything
    assert whole != steps_of([stream_of(shards)])
    for world_size in (2, 4, 12):
        ranks = [
            stream_of(
                shards, canonical_nodes=parts, batch_size=12 // world_size, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        assert steps_of(ranks) == whole
    # Another batch size takes the same samples: 24 at a time what 12 took in two steps.
    double = steps_of([stream_of(shards, canonical_nodes=parts, batch_size=24)])
    assert [sorted(step) for step in double] == [
        sorted(one + other) for one, other in zip(whole[::2], whole[1::2])
    ]


def test_a_run_of_parts_goes_on_with_other_ranks_and_batches(shards):
    whole = [key for step in steps_of([stream_of(shards, canonical_nodes=4)]) for key in sorted(step)]
    first = [stream_of(shards, canonical_nodes=4, batch_size=6, rank=rank, world_size=2) for rank in range(2)]
    iterators = [iter(stream) for stream in first]
    begun = []
    for _ in range(6):
        begun += sorted(key for one in iterators for key in next(one)["key"])
    later = [stream_of(shards, canonical_nodes=4, batch_size=3, rank=rank, world_size=4) for rank in range(4)]
    for stream in later:
        stream.load_state_dict(first[0].state_dict())
    assert begun + [key for step in steps_of(later) for key in sorted(step)] == whole
    for other in (1, 2):
        with pytest.raises(ValueError, match="order settings"):
            stream_of(shards, canonical_nodes=other).load_state_dict(first[0].state_dict())


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_node_reads_its_own_shards_alone(shards, nodes):
    """Weighted sources too: each has its parts."""
    half = [
        {"shards": [f"{shards}/{s:02d}.tar" for s in range(n, SHARDS, 2)], "weight": 1 + n} for n in range(2)
    ]
    for train in (str(shards), half):
        read: dict[int, set[str]] = {}
        for rank in range(4):
            stream = create_stream(
                {"train": train, "window": 4, "canonical_nodes": 4},
                tokenizer=tokenize, image_size=8, batch_size=2, seed=1, rank=rank, world_size=4, epochs=3,
            )  # fmt: skip
            keys = {key[:2] for batch in stream for key in batch["key"]}
            read.setdefault(rank * nodes // 4, set()).update(keys)
        assert sorted(shard for own in read.values() for shard in own) == [f"{s:02d}" for s in range(SHARDS)]


@pytest.mark.parametrize(
    "parts, message", [(5, "is no multiple of"), (0, "1 or more"), (120, "fewer samples")]
)
def test_parts_that_cannot_be_are_refused(shards, parts, message):
    with pytest.raises(ValueError, match=message):
        stream_of(shards, canonical_nodes=parts, batch_size=120 if parts == 120 else 12, resample=True)


@pytest.mark.parametrize("workers, window, room", [(0, 4, 100), (1, 2, 6.5)])
def test_two_nodes_of_two_ranks_fetch_their_half_once_an_epoch(shards, tmp_path, workers, window, room):
    """The server drops each shard's first answer; `room`: shards that a node's spool holds."""
    largest = max(path.stat().st_size for path in shards.glob("*.tar"))
    spec = {
        "window": window,
        "canonical_nodes": 2,
        "spool_gb": room * largest / 1e9,
        "run": {"batch_size": 3, "epochs": 2, "workers": workers, "seconds": 0.0},
    }
    with ExitStack() as stack:
        servers = [stack.enter_context(Server(shards, drops=1, seconds=0.02)) for _ in range(2)]
        ranks = [
            fork(
                PROGRAM, f"{servers[rank // 2].url}/{{00..15}}.tar", tmp_path, rank, 4, tmp_path / "store",
                json.dumps(spec),
                env={
                    "CLIPKIT_CACHE": str(tmp_path / f"node{rank // 2}"), "LOCAL_RANK": str(rank % 2),
                    "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": str(rank // 2), "NO_PROXY": "127.0.0.1",
                    "no_proxy": "127.0.0.1",
                },
            )
            for rank in range(4)
        ]  # fmt: skip
        for rank in ranks:
            rank.finished()
        fetched = [
            {name: n for name, n in server.served.items() if name.endswith(".tar")} for server in servers
        ]
    logs = [(tmp_path / f"{rank}.jsonl").read_text().splitlines()[:-1] for rank in range(4)]
    steps = [[key for line in step for key in json.loads(line)["keys"]] for step in zip(*logs, strict=True)]
    assert steps == steps_of([stream_of(shards, canonical_nodes=2, window=window)])
    assert sorted([*fetched[0], *fetched[1]]) == [f"{s:02d}.tar" for s in range(SHARDS)]
    assert [len(one) for one in fetched] == [8, 8]
    for one in fetched:
        # In a small spool a rank may need again what its neighbour, further on, has let go.
        assert set(one.values()) == {1} or room < SHARDS


def test_a_lost_shard_is_named_by_the_step_that_needs_it(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(shards, status={"07.tar": 404}) as server:
        stream = stream_of(f"{server.url}/{{00..15}}.tar", window=1, shard_retries=0)
        got = []
        with pytest.raises(Exception, match=r"07\.tar: unreadable_shard: .*HTTP Error 404"):
            for batch in stream:
                got += batch["key"]
        assert not [key for key in got if key.startswith("07")]


def test_what_stalls_is_said_by_name(shards, monkeypatch, capfd):
    import clipkit.data.shards

    monkeypatch.setattr(clipkit.data.shards, "_FIRST_WARNING_S", 0.2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(shards, seconds=1.5) as server:
        batches = iter(stream_of(f"{server.url}/{{00..15}}.tar", window=1, batch_size=2))
        next(batches)
        batches.close()
    assert "waiting 0.2 s for the first batch: reading http" in (said := capfd.readouterr().err)
    assert ".tar (not fetched yet)" in said


def _open(folders: list[str]) -> str:
    data = {"train": folders[torch.distributed.get_rank()], "num_workers": 0, "sentences": None}
    try:
        open_streams(
            resolve_data(data),
            create_loss("infonce"),
            tokenizer=tokenize,
            image_tower=TOWER,
            batch_size=4,
            seed=0,
        )
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_that_see_other_shards_refuse_to_begin(shards, tmp_path):
    """A node whose disk has another copy of the data would read in another order."""
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    assert launch(_open, 2, [str(shards), str(other)]) == ["", ""]
    os.remove(other / "03.tar")
    for said in launch(_open, 2, [str(shards), str(other)]):
        assert "rank 0: 96 samples in 16 shards" in said and "rank 1: 90 samples in 15 shards" in said


def test_nothing_of_the_fetching_is_left(shards, monkeypatch):
    import multiprocessing

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(shards) as server:
        batches = iter(stream_of(f"{server.url}/{{00..15}}.tar"))
        assert (
            isinstance(next(batches)["image"], torch.Tensor) and len(multiprocessing.active_children()) == 1
        )
        batches.close()
    assert not multiprocessing.active_children()
