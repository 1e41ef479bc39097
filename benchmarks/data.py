"""The data path beside open_clip's: images and captions per CPU-second, images per second with workers, and whether a
worker's memory grows.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install open_clip_torch==3.3.0 webdataset==0.2.86 pandas
    python benchmarks/data.py --peer-python /tmp/peer/bin/python --output benchmarks/results/2026-11-cpu2-data.md

open_clip 3.3.0's training pipeline needs webdataset 0.2.86, hence its own environment; the two run in turns
on the same shards, each alone on one thread, and CPU time is what is compared, so that another job on the
machine does no harm to the ratio. Pictures are those of imagenet1k-samples with the shorter side resized to
256 and 512 px (JPEG, quality 95), captions those of the data folder (CLIPKIT_TEST_DATA). Parity comes first:
no figure is printed when ids, evaluation pixels or training pixels differ. With workers the clock is the wall's: that
part means something on an idle machine alone.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

DATA = Path(os.environ.get("CLIPKIT_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
IMAGE_SIZE, BATCH = 224, 50
# Training pixels beside Pillow's crop and bicubic resize: the median photograph, dB and energy of gradients.
LEAST_DB, LEAST_ENERGY = 41.0, 0.97


def real_captions() -> list[str]:
    """Captions and sentences of the data folder, 100,000 of them, in a fixed order."""
    out: list[str] = []
    for name in (
        "flickr8k-mini/train_captions.jsonl",
        "flickr8k-mini/val_retrieval.jsonl",
        "sentences/multi30k_captions.jsonl",
        "coco-mini/retrieval.jsonl",
    ):
        out += [text for line in open(DATA / name) for text in json.loads(line)["captions"]]
    for row in csv.DictReader(open(DATA / "clotho-mini/clotho_captions_development.csv", newline="")):
        out += [text for name, text in row.items() if name.startswith("caption_")]
    for path in sorted((DATA / "audiocaps-captions").glob("*.csv")):
        out += [row["caption"] for row in csv.DictReader(open(path, newline=""))]
    for name in ("nli-mini/triplets.jsonl", "nli-mini/pairs.jsonl", "nli-mini/cad_nli.jsonl"):
        out += [
            text
            for line in open(DATA / name)
            for key, text in json.loads(line).items()
            if key not in ("label", "snli_split")
        ]
    for path in sorted((DATA / "sts").rglob("*input*.txt")) + sorted(
        (DATA / "senteval-mini/downstream").rglob("*.txt")
    ):
        out += [part for line in open(path, encoding="latin-1") for part in line.rstrip("\n").split("\t")]
    out += (DATA / "sentences/wikitext2_sentences.txt").read_text().splitlines()
    return [text for text in out if isinstance(text, str) and text.strip()][:100_000]


def write_shards(folder: Path, side: int) -> None:
    from PIL import Image

    captions = real_captions()
    with tarfile.open(DATA / "imagenet1k-samples/images.tar") as source:
        members = [member for member in source if member.name.lower().endswith((".jpg", ".jpeg"))]
        for shard in range(4):
            with tarfile.open(folder / f"{side}-{shard}.tar", "w") as out:
                for i in range(shard * 150, shard * 150 + 150):
                    image = Image.open(source.extractfile(members[i])).convert("RGB")
                    scale = side / min(image.size)
                    file = io.BytesIO()
                    image.resize(
                        [max(side, round(x * scale)) for x in image.size], Image.Resampling.BICUBIC
                    ).save(file, "JPEG", quality=95)
                    for extension, data in (
                        ("jpg", file.getvalue()),
                        ("txt", captions[i].encode()),
                        ("json", b"{}"),
                    ):
                        info = tarfile.TarInfo(f"{i:09d}.{extension}")
                        info.size = len(data)
                        out.addfile(info, io.BytesIO(data))


def ours(folder: Path, side: int, batches: int, workers: int = 0) -> float:
    """Images per CPU-second of clipkit's training stream, tokens included; with workers, images per second."""
    from clipkit.data import create_stream, create_tokenizer

    stream = create_stream(
        {"train": f"{folder}/{side}-{{0..3}}.tar", "cache_dir": str(folder / "cache")},
        tokenizer=create_tokenizer("clip_bpe"),
        image_size=IMAGE_SIZE,
        batch_size=BATCH,
        seed=0,
        num_workers=workers,
    )
    return rate(iter(stream), batches, workers)


def peer(folder: Path, side: int, batches: int, workers: int = 0) -> float:
    """As `ours`, of open_clip's training pipeline with its default augmentation."""
    import types

    import open_clip
    import open_clip_train.data

    transform = open_clip.transform.image_transform(
        IMAGE_SIZE, is_train=True, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    settings = types.SimpleNamespace(
        train_data=f"{folder}/{side}-{{0..3}}.tar",
        val_data=None,
        dataset_resampled=False,
        seed=0,
        workers=workers,
        world_size=1,
        train_num_samples=(batches + 2 + 4 * workers) * BATCH,
        train_data_upsampling_factors=None,
        batch_size=BATCH,
    )
    info = open_clip_train.data.get_wds_dataset(
        settings, transform, True, tokenizer=open_clip.SimpleTokenizer()
    )
    return rate(iter(info.dataloader), batches, workers)


def rate(batches, count: int, workers: int) -> float:
    clock = time.perf_counter if workers else time.process_time
    # What workers prepare while they start is not counted: two batches each.
    for _ in range(1 + 3 * workers):
        next(batches)
    start = clock()
    for _ in range(count):
        next(batches)
    return count * BATCH / (clock() - start)


def captions_per_second(tokenizer: Callable, captions: list[str]) -> float:
    start = time.process_time()
    for i in range(0, len(captions), 256):
        tokenizer(captions[i : i + 256])
    return len(captions) / (time.process_time() - start)


def training_pixels(folder: Path) -> dict[str, dict[str, float]]:
    """Crops of 200 photographs, in their own size and in those of the shards, against Pillow's of the same boxes:
    {"own" | "256" | "512": {"db", "worst_db": peak signal to noise; "energy": of gradients, the ratio}}.
    """
    import numpy as np
    from PIL import Image

    from clipkit.data.decode import DRAWS, crop_box, decode_train

    def energy(pixels: np.ndarray) -> float:
        return float((np.diff(pixels, axis=0) ** 2).mean() + (np.diff(pixels, axis=1) ** 2).mean())

    def photographs(source: str):
        tars = [DATA / "imagenet1k-samples/images.tar"]
        if source != "own":
            tars = [folder / f"{source}-{shard}.tar" for shard in range(4)]
        for path in tars:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.lower().endswith((".jpg", ".jpeg")):
                        yield tar.extractfile(member).read()

    found = {}
    for source in ("own", "256", "512"):
        numbers, decibels, energies = np.random.default_rng(0), [], []
        for data in photographs(source):
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            draws = numbers.random(DRAWS).tolist()
            top, left, h, w = crop_box(picture.height, picture.width, draws, (0.9, 1.0), (0.75, 4 / 3))
            wanted = picture.crop((left, top, left + w, top + h))
            wanted = np.asarray(
                wanted.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC), dtype=np.float64
            )
            given = decode_train(data, IMAGE_SIZE, draws=draws).permute(1, 2, 0).numpy().astype(np.float64)
            decibels.append(10 * np.log10(255**2 / max(1e-9, ((given - wanted) ** 2).mean())))
            energies.append(energy(given) / energy(wanted))
            if len(decibels) == 200:
                break
        found[source] = {
            "db": round(float(np.median(decibels)), 1),
            "worst_db": round(min(decibels), 1),
            "energy": round(float(np.median(energies)), 3),
        }
        if found[source]["db"] < LEAST_DB or found[source]["energy"] < LEAST_ENERGY:
            sys.exit(f"training pixels of photographs ({source}) differ from Pillow's: {found[source]}")
    return found


def parity(folder: Path) -> dict[str, float]:
    """Ids of every caption against open_clip; evaluation pixels of 50 pictures against open_clip's own
    transform; training pixels of 200 photographs.
    """
    import open_clip
    import torch
    from PIL import Image

    from clipkit.data import create_tokenizer
    from clipkit.data.decode import decode_eval

    captions = real_captions()
    ours_, theirs = create_tokenizer("clip_bpe"), open_clip.SimpleTokenizer()
    for i in range(0, len(captions), 1000):
        if not torch.equal(ours_(captions[i : i + 1000]), theirs(captions[i : i + 1000])):
            sys.exit(f"ids differ among captions {i} to {i + 1000}: no figures")
    transform = open_clip.transform.image_transform(IMAGE_SIZE, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    worst = 0.0
    with tarfile.open(folder / "256-0.tar") as tar:
        for member in [member for member in tar if member.name.endswith("jpg")][:50]:
            data = tar.extractfile(member).read()
            expected = transform(Image.open(io.BytesIO(data))) * 255
            worst = max(worst, float((decode_eval(data, IMAGE_SIZE).float() - expected).abs().max()))
    if worst > 2.01:
        sys.exit(f"evaluation pixels differ by {worst} of 255: no figures")
    return {
        "captions": len(captions),
        "worst_pixel": round(worst, 3),
        "training_pixels": training_pixels(folder),
    }


def worker_memory(folder: Path, samples: int) -> list[tuple[int, float]]:
    """(samples, resident megabytes of the worker) ten times over `samples`."""
    from clipkit.data import create_stream, create_tokenizer

    stream = create_stream(
        {"train": f"{folder}/256-{{0..3}}.tar", "cache_dir": str(folder / "cache")},
        tokenizer=create_tokenizer("clip_bpe"),
        image_size=32,
        batch_size=100,
        seed=0,
        num_workers=1,
    )
    out = []
    for i, _ in enumerate(stream, 1):
        if i * 100 % (samples // 10) == 0:
            (worker,) = multiprocessing.active_children()
            status = Path(f"/proc/{worker.pid}/status").read_text()
            anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            out.append((i * 100, int(anonymous.split()[1]) / 1024))
        if i * 100 >= samples:
            return out
    raise AssertionError("the stream ended")


def spread(values: list[float]) -> str:
    if len(values) < 3:
        return " / ".join(f"{value:,.0f}" for value in values)
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return f"{statistics.median(values):,.0f} ({low:,.0f} to {high:,.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--peer-python",
        help="python with open_clip 3.3.0 and webdataset 0.2.86; without it that part is left out",
    )
    parser.add_argument("--output", help="write the table to this file")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--batches", type=int, default=12, help="batches of 50 a turn")
    parser.add_argument("--memory-samples", type=int, default=100_000, help="0 leaves the memory part out")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[1, 2], help="end to end with so many; none to leave it out"
    )
    parser.add_argument(
        "--as-peer", nargs=4, metavar=("FOLDER", "SIDE", "BATCHES", "WORKERS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    if options.as_peer:
        folder, side, batches, workers = options.as_peer
        print(json.dumps(peer(Path(folder), int(side), int(batches), int(workers))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in (256, 512):
            write_shards(folder, side)
        result = {"parity": parity(folder), **images(folder, options), **tokens(options.rounds)}
        if options.memory_samples:
            result["worker_memory_mb"] = worker_memory(folder, options.memory_samples)
    text = table(result, options)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n")


def images(folder: Path, options: argparse.Namespace) -> dict:
    """Turns of both, on shards of either size: alone on one thread, then end to end with workers."""
    result: dict = {}
    for side in (256, 512):
        for workers in (0, *options.workers):
            found: dict[str, list[float]] = {"clipkit": [], "open_clip": []}
            for _ in range(options.rounds):
                found["clipkit"].append(ours(folder, side, options.batches, workers))
                if options.peer_python:
                    found["open_clip"].append(peer_turn(folder, side, workers, options))
            result[f"images_{side}" + (f"_{workers}_workers" if workers else "")] = found
    return result


def peer_turn(folder: Path, side: int, workers: int, options: argparse.Namespace) -> float:
    """`peer` in its own environment."""
    run = subprocess.run(
        [
            options.peer_python,
            __file__,
            "--as-peer",
            *map(str, (folder, side, options.batches, workers)),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(run.stdout.splitlines()[-1])


def tokens(rounds: int) -> dict:
    import open_clip

    from clipkit.data import create_tokenizer

    captions = real_captions()
    found: dict[str, list[float]] = {"clipkit": [], "open_clip": [], "clipkit_warm": []}
    for _ in range(max(3, rounds // 2)):
        fresh = create_tokenizer("clip_bpe")
        found["clipkit"].append(captions_per_second(fresh, captions))
        found["clipkit_warm"].append(captions_per_second(fresh, captions))
        found["open_clip"].append(captions_per_second(open_clip.SimpleTokenizer(), captions))
    return {"captions": found}


def table(result: dict, options: argparse.Namespace) -> str:
    import open_clip
    import torch

    lines = [
        f"# Data path, {time.strftime('%Y-%m-%d', time.gmtime())}",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical processors, one thread "
        "each; Python "
        f"{platform.python_version()}, torch {torch.__version__}, open_clip {open_clip.__version__} with "
        "webdataset 0.2.86. "
        f"Median of {options.rounds} turns (20 % and 80 % quantiles). Made by `benchmarks/data.py`.",
        "",
        f"Parity first: {result['parity']['captions']:,} captions with open_clip's ids; evaluation pixels "
        "of 50 photographs "
        f"within {result['parity']['worst_pixel']} of 255 of open_clip's transform; training crops of 200 beside "
        "Pillow's of the same boxes: "
        + ", ".join(
            f"{source if source == 'own' else source + ' px'} {one['db']} dB (worst {one['worst_db']}), gradient energy "
            f"{one['energy']}"
            for source, one in result["parity"]["training_pixels"].items()
        )
        + ".",
        "",
        "| per CPU-second | clipkit | open_clip | ratio |",
        "|---|---|---|---|",
    ]
    for name, found in result.items():
        if not name.startswith("images_"):
            continue
        _, side, *workers = name.split("_")
        how = (
            f"end to end, {workers[0]} worker{'s'[: workers[0] != '1']}, a second"
            if workers
            else "with tokens"
        )
        ratio = (
            statistics.median(found["clipkit"]) / statistics.median(found["open_clip"])
            if found["open_clip"]
            else None
        )
        lines.append(
            f"| images, {side}-px shards to {IMAGE_SIZE} px, {how} | {spread(found['clipkit'])} | "
            f"{spread(found['open_clip']) if ratio else 'not run: no --peer-python'} | "
            f"{f'{ratio:.2f}' if ratio else ''} |"
        )
    found = result["captions"]
    for name, label in (("clipkit", "captions, first pass"), ("clipkit_warm", "captions, words seen before")):
        ratio = statistics.median(found[name]) / statistics.median(found["open_clip"])
        lines.append(f"| {label} | {spread(found[name])} | {spread(found['open_clip'])} | {ratio:.2f} |")
    if "worker_memory_mb" in result:
        memory = ", ".join(f"{n:,}: {mb:.0f}" for n, mb in result["worker_memory_mb"])
        lines += ["", f"Resident anonymous memory of a worker, MB after so many samples: {memory}."]
    lines += [
        "",
        "clipkit delivers uint8 (normalised on the device); open_clip delivers normalised float32, which is "
        "part of its "
        "time. Not measured: remote shards, other image sizes.",
        "",
        f"```json\n{json.dumps(result)}\n```",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
