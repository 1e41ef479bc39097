"""Shards at scale: time to the first batch, memory of a machine, time to index, and waiting for a slow server.

    python benchmarks/shards.py --output benchmarks/results/2026-11-cpu2-shards.md       # some 15 minutes, 5 GB of disk
    python benchmarks/shards.py --only remote

The large sets are one tar of 10,000 small pictures under 1,200 and 41,000 names (hard links), so that every shard can be
read and none takes room; what reading other shards from a disk costs beside that is not in the figures. Memory is the sum
over the ranks' processes of what their proportional set size has grown by since before the stream was made, with all
alive, after --steps batches. The remote run is two nodes of two ranks, with a spool each, against a server that takes a
second for each shard: tests/data/remote_run.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from harness import ROOT, header, in_child, report, table

SETS = {"12 M samples": 1_200, "410 M samples": 41_000}
SAMPLES, BATCH = 10_000, 256
REMOTE = {"shards": 200, "samples": 256, "batch_size": 64, "seconds": 0.3, "spool_shards": 40}


def write_shard(path: Path, samples: int, *, pictures: list[bytes], key: str = "") -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(samples):
            for name, data in (
                (f"{key}{i:06d}.jpg", pictures[i % len(pictures)]),
                (f"{key}{i:06d}.txt", b"words"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def picture(side: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(out, "JPEG", quality=90)
    return out.getvalue()


def tokenize(texts):
    import torch

    return torch.zeros(len(texts), 4, dtype=torch.int64)


def open_stream(folder: str, cache: str, *, rank: int = 0, world_size: int = 1):
    from clipkit.data import create_stream

    return create_stream(
        {"train": folder, "cache_dir": cache},
        tokenizer=tokenize,
        image_size=32,
        batch_size=BATCH // world_size,
        seed=0,
        rank=rank,
        world_size=world_size,
    )


def first_batch(job: dict) -> dict:
    """Seconds to make the stream, and to its first batch."""
    import clipkit.data.shards

    assert clipkit.data.shards
    began = time.monotonic()
    stream = open_stream(job["folder"], job["cache"])
    made = time.monotonic() - began
    next(iter(stream))
    return {"made": made, "first": time.monotonic() - began, "samples": stream.samples_per_epoch}


def pss() -> int:
    """Proportional set size, bytes: what processes share is divided among them."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"^Pss:\s+(\d+)", text, re.MULTILINE)[1]) * 1024


def memory(job: dict) -> dict:
    """Growth of each rank, bytes."""
    import torch

    import clipkit.data.shards

    assert clipkit.data.shards
    torch.set_num_threads(1)
    ranks, marks = job["ranks"], Path(job["marks"])
    children = []

    def meet(name: str, rank: int) -> None:
        (marks / f"{name}-{rank}").touch()
        while len(list(marks.glob(f"{name}-*"))) < ranks:
            time.sleep(0.02)

    for rank in range(ranks):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        try:
            os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
            # What decoding needs once is not the set's.
            open_and_read(job["warm"], job["cache"] + "-warm", rank, ranks, 2)
            meet("warm", rank)
            before = pss()
            meet("before", rank)
            kept = open_and_read(job["folder"], job["cache"], rank, ranks, job["steps"])
            meet("read", rank)
            (marks / f"grown-{rank}").write_text(str(pss() - before))
            meet("told", rank)
            del kept
        finally:
            os._exit(0)
    for pid in children:
        os.waitpid(pid, 0)
    return {"grown": [int((marks / f"grown-{rank}").read_text()) for rank in range(ranks)]}


def open_and_read(folder: str, cache: str, rank: int, ranks: int, steps: int):
    stream = open_stream(folder, cache, rank=rank, world_size=ranks)
    batches = iter(stream)
    for _ in range(steps):
        next(batches)
    return stream, batches


def index(job: dict) -> dict:
    """Seconds to index one tar, cold and warm."""
    from clipkit.data import index_shards

    found = {}
    for name in ("cold", "warm"):
        shutil.rmtree(job["cache"], ignore_errors=True)
        if name == "cold":
            with open(job["shard"], "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        report = index_shards(job["shard"], cache_dir=job["cache"])
        found[name] = report["seconds"] / report["bytes"] * 1e9
    return {**found, "samples": report["samples"], "bytes": report["bytes"]}


def measure_sets(folder: Path, steps: int) -> dict:
    from clipkit.data.index_cache import identity, index_file, store_index
    from clipkit.data.tarindex import index_tar

    template, warm = folder / "template.tar", folder / "warm"
    write_shard(template, SAMPLES, pictures=[picture(32)])
    warm.mkdir()
    write_shard(warm / "0.tar", 512, pictures=[picture(32)])
    found = {}
    for label, shards in SETS.items():
        place = folder / f"set-{shards}"
        place.mkdir()
        for s in range(shards):
            os.link(template, place / f"{s:05d}.tar")
        cached, empty = folder / f"cache-{shards}", folder / f"empty-{shards}"
        stored = folder / "stored.index"
        store_index(stored, index_tar(template))
        (cached / "index").mkdir(parents=True)
        for s in range(shards):
            path = str(place / f"{s:05d}.tar")
            os.link(
                stored, index_file(cached / "index", *identity(path, os.stat(path), os.path.realpath(place)))
            )
        one = {}
        one["indexes cached"] = child("first_batch", folder=place, cache=cached)
        # Without any: those of 60 shards, read as a run would, times as many.
        part = folder / f"part-{shards}"
        part.mkdir()
        for s in range(60):
            os.link(template, part / f"{s:05d}.tar")
        alone = child("first_batch", folder=part, cache=folder / f"none-{shards}")
        one["nothing known"] = {
            **alone,
            "first": alone["first"] - alone["made"] + alone["made"] * shards / 60,
        }
        (place / "sizes.json").write_text(json.dumps({f"{s:05d}.tar": SAMPLES for s in range(shards)}))
        one["sizes.json"] = child("first_batch", folder=place, cache=empty)
        for ranks in (1, 8):
            marks = folder / f"marks-{shards}-{ranks}"
            marks.mkdir()
            one[f"{ranks} ranks"] = child(
                "memory", folder=place, cache=cached, warm=warm, marks=marks, ranks=ranks, steps=steps
            )
        found[label] = one
        shutil.rmtree(place)
        shutil.rmtree(cached)
    return found


def measure_index(folder: Path) -> dict:
    shard = folder / "photographs.tar"
    noise = [os.urandom(25_000 + 97 * i) for i in range(64)]
    write_shard(shard, 35_000, pictures=noise)
    found = child("index", shard=shard, cache=folder / "index-cache")
    shard.unlink()
    return found


def measure_remote(folder: Path) -> dict:
    shards = folder / "remote"
    shards.mkdir()
    for s in range(REMOTE["shards"]):
        write_shard(shards / f"{s:03d}.tar", REMOTE["samples"], pictures=[picture(64)], key=f"{s:03d}-")
    (shards / "sizes.json").write_text(
        json.dumps({f"{s:03d}.tar": REMOTE["samples"] for s in range(REMOTE["shards"])})
    )
    spec = {
        "canonical_nodes": 2,
        "spool_gb": REMOTE["spool_shards"] * (shards / "000.tar").stat().st_size / 1e9,
        "run": {name: REMOTE[name] for name in ("batch_size", "seconds")} | {"epochs": 1, "workers": 1},
    }
    tests = ROOT / "tests" / "data"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    servers, ranks = [], []
    try:
        for _ in range(2):
            servers.append(
                subprocess.Popen(
                    [sys.executable, str(tests / "shard_server.py"), str(shards), "1.0"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                )
            )  # fmt: skip
        urls = [server.stdout.readline().strip() for server in servers]
        for rank in range(4):
            own = {"CLIPKIT_CACHE": str(folder / f"node{rank // 2}"), "LOCAL_RANK": str(rank % 2)}
            own |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": str(rank // 2)}
            names = f"{urls[rank // 2]}/{{000..{REMOTE['shards'] - 1:03d}}}.tar"
            command = [
                str(tests / "remote_run.py"),
                names,
                str(folder),
                str(rank),
                "4",
                str(folder / "store"),
            ]
            ranks.append(
                subprocess.Popen([sys.executable, *command, json.dumps(spec)], env=environment | own)
            )
        failed = [rank.wait() for rank in ranks]
        assert not any(failed), f"a rank ended with {failed}"
        served = []
        for server in servers:
            server.stdin.write("\n")
            server.stdin.flush()
            served.append(
                {k: n for k, n in json.loads(server.stdout.readline()).items() if k.endswith(".tar")}
            )
    finally:
        for process in [*ranks, *servers]:
            process.kill()
            process.wait()
    lines = [(folder / f"{rank}.jsonl").read_text().splitlines() for rank in range(4)]
    keys = [key for rank in lines for line in rank[:-1] for key in json.loads(line)["keys"]]
    assert len(keys) == len(set(keys)) == REMOTE["shards"] * REMOTE["samples"], "not every sample came once"
    ends = [json.loads(rank[-1]) for rank in lines]
    return {
        "first": max(end["first"] for end in ends),
        "stalls": max(end["waited"] / end["seconds"] for end in ends),
        "seconds": max(end["seconds"] for end in ends),
        "shards": [len(one) for one in served],
        "fetches": [sum(one.values()) for one in served],
        "both": len(set(served[0]) & set(served[1])),
    }


def child(what: str, **job) -> dict:
    given = {name: value if isinstance(value, int) else str(value) for name, value in job.items()}
    found = in_child(str(Path(__file__)), {"what": what, **given}, timeout=3600)
    assert "skipped" not in found, found
    return found


def tell(found: dict, facts: dict[str, str], steps: int, out: str | None) -> None:
    sections, skipped = [], ["a disk or network of a cluster, other sizes of shards"]
    if "sets" in found:
        rows = [
            {
                "set": f"{label}, {SETS[label]:,} shards",
                "indexes cached": f"{one['indexes cached']['first']:.1f}",
                "sizes.json, no index": f"{one['sizes.json']['first']:.1f}",
                "nothing known (60 shards, scaled)": f"{one['nothing known']['first']:.0f}",
            }
            for label, one in found["sets"].items()
        ]
        text = (
            f"Seconds to the first batch of {BATCH} in one process without workers, imports not counted. Goal: 5 with the "
            "counts cached.\n\n"
        )
        sections.append(("First batch", text + table(rows)))
        rows = []
        for label, one in found["sets"].items():
            rows.append({"set": label})
            for ranks in (1, 8):
                grown = sum(one[f"{ranks} ranks"]["grown"])
                rows[-1][f"{ranks} ranks, MB"] = f"{grown / 1e6:.0f}"
                rows[-1][f"{ranks} ranks, bytes a sample"] = f"{grown / SETS[label] / SAMPLES:.2f}"
        text = f"What the stream takes on a machine, after {steps} steps. Goal: 16 bytes a sample.\n\n"
        sections.append(("Memory", text + table(rows)))
    if "index" in found:
        one = found["index"]
        text = (
            f"{one['bytes'] / 1e9:.2f} GB with {one['samples']:,} samples on one process: {one['cold']:.2f} s a GB with nothing "
            f"of it in memory, {one['warm']:.2f} s a GB again."
        )
        sections.append(("Indexing", text))
    if "remote" in found:
        one = found["remote"]
        text = (
            f"{REMOTE['shards']} shards from a server that takes a second for each, 2 nodes of 2 ranks with one worker each, a "
            f"spool of {REMOTE['spool_shards']} shards a node, {REMOTE['seconds']} s of pretended work a step, one epoch in "
            f"{one['seconds']:.0f} s. The nodes read {one['shards'][0]} and {one['shards'][1]} shards, {one['both']} of them both, "
            f"in {one['fetches'][0]} and {one['fetches'][1]} fetches, the first window of the next epoch included. First batch "
            f"after {one['first']:.1f} s; from then on the rank that waited longest waited {one['stalls']:.2%} of the time. "
            "Goal: each its half, 5 %."
        )
        sections.append(("A slow server", text))
    skipped += [f"{name}: left out" for name in ("sets", "index", "remote") if name not in found]
    report("Shards at scale", facts, sections, found, skipped, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("sets", "index", "remote"))
    parser.add_argument("--steps", type=int, default=100, help="batches before memory is read; default 100")
    parser.add_argument("--output", help="write the result here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job = json.loads(options.child)
        print(json.dumps(globals()[job["what"]](job)))
        return
    import torch

    facts, found = header(torch.device("cpu")), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only in (None, "sets"):
            found["sets"] = measure_sets(folder, options.steps)
        if options.only in (None, "index"):
            found["index"] = measure_index(folder)
        if options.only in (None, "remote"):
            found["remote"] = measure_remote(folder)
    tell(found, facts, options.steps, options.output)


if __name__ == "__main__":
    main()
