"""What found false negatives are worth, on generated scenes whose duplicates are planted and so known.

    python benchmarks/false_negatives.py --out benchmarks/results/2026-11-cpu2-false_negatives.md
    python benchmarks/false_negatives.py --seeds 1 --steps 100          # a look, under a minute

Scenes of two coloured shapes (`clipkit.data.synthetic`), each drawn several times; a batch holds every scene of
its own `copies` times, in as many pictures, each told from one side or the other ("A left of B" for "B right of
A"). Per seed one small image and text tower are trained from the same weights on the same batches by InfoNCE:
with all other rows as negatives ("none"), with false negatives found by its own text features as they are learnt,
with those found by the frozen text tower of the "none" run (`content_features`), and with the true ones
(`pair_ids`). Scored: R@1 among unseen distinct scenes, mean of both directions, and how many of the pairs found are
true and of the true ones found. About four minutes on 2 cores with the defaults.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from typing import Any

import torch
from harness import header, report, table
from PIL import Image
from torch import Tensor, nn

from clipkit.data import synthetic
from clipkit.losses import InfoNCE

SIZE, WORDS, WIDTH = 32, 14, 64
VOCABULARY = [
    *("a", "small", "large", "left", "right", "of", "above", "below"),
    *synthetic.COLOURS,
    *synthetic.SHAPES,
]
# Settings of the loss, and where it learns of contents from.
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({}, ""),
    "found by own texts, masked": ({"false_negatives": "mask"}, "own"),
    "found by a first run's texts, masked": ({"false_negatives": "mask"}, "first"),
    "found by a first run's texts, shared": ({"false_negatives": "share"}, "first"),
    "oracle, masked": ({"same_ids": "mask"}, "ids"),
    "oracle, shared": ({"same_ids": "positive"}, "ids"),
}


def tokens(caption: str) -> list[int]:
    """Word numbers from 1, filled up with 0."""
    found = [VOCABULARY.index(word) + 1 for word in caption.split()]
    return found + [0] * (WORDS - len(found))


def told_from_the_other_side(scene: dict[str, Any]) -> str:
    """A caption of the same scene that begins with its second shape."""
    second, first = (
        f"a {shape['size']} {synthetic.SHAPE_CLASSES[shape['cls']]}" for shape in reversed(scene["shapes"])
    )
    return f"{second} {synthetic._OPPOSITE[scene['relation']]} {first}"


def draw(scenes: list[dict[str, Any]], rng: random.Random) -> Tensor:
    """(N, 3, SIZE, SIZE) pictures in [-1, 1], each on a background of its own."""
    pictures = []
    for scene in scenes:
        other = {**scene, "background": rng.choice(list(synthetic.BACKGROUNDS))}
        with Image.open(io.BytesIO(synthetic._picture(other, rng, SIZE))) as image:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pictures.append(pixels.view(SIZE, SIZE, 3).permute(2, 0, 1))
    return torch.stack(pictures).float() / 127.5 - 1


class Towers(nn.Module):
    """A small convolutional network, and a perceptron over word and place embeddings."""

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in ((3, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(inside, outside, 3, 2, 1), nn.GroupNorm(8, outside), nn.ReLU()]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, WIDTH))
        self.words = nn.Embedding(len(VOCABULARY) + 1, 24)
        self.text = nn.Sequential(nn.Linear(24 * WORDS, 256), nn.ReLU(), nn.Linear(256, WIDTH))
        self.log_scale = nn.Parameter(torch.tensor(2.66))

    def images(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.image(x), dim=-1)

    def texts(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.text(self.words(x).flatten(1)), dim=-1)


def data(seed: int, scenes: int, pictures: int, gallery: int) -> dict[str, Tensor]:
    """Training pictures (scenes, pictures, ...) and captions (scenes, 2, ...), and a gallery of unseen scenes."""
    rng, distinct = random.Random(f"false negatives/{seed}"), {}
    while len(distinct) < scenes + gallery:
        scene = synthetic._two_shapes(rng)
        distinct.setdefault(synthetic._canonical(scene), scene)
    every = list(distinct.values())
    train, held_out = every[:scenes], every[scenes:]
    return {
        "images": torch.stack([draw(train, rng) for _ in range(pictures)], 1),
        "texts": torch.tensor([[tokens(s["caption"]), tokens(told_from_the_other_side(s))] for s in train]),
        "gallery images": draw(held_out, rng),
        "gallery texts": torch.tensor([tokens(s["caption"]) for s in held_out]),
    }


def batch(
    drawn: dict[str, Tensor], rows: int, copies: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(images, texts, ids): rows / copies scenes, each in so many of its pictures with either caption."""
    number, pictures = drawn["images"].shape[:2]
    ids = torch.randperm(number, generator=generator)[: rows // copies]
    order = torch.rand(len(ids), pictures, generator=generator).argsort(1)[:, :copies].flatten()
    told = torch.randint(0, 2, (len(ids) * copies,), generator=generator)
    ids = ids.repeat_interleave(copies)
    return drawn["images"][ids, order], drawn["texts"][ids, told], ids


@torch.no_grad()
def recall(towers: Towers, drawn: dict[str, Tensor]) -> float:
    """R@1 among the gallery, the mean of both directions."""
    similarity = towers.images(drawn["gallery images"]) @ towers.texts(drawn["gallery texts"]).T
    own = torch.arange(len(similarity))
    return float(sum((s.argmax(1) == own).float().mean() for s in (similarity, similarity.T)) / 2)


@torch.no_grad()
def found(texts: Tensor, ids: Tensor, threshold: float) -> tuple[float, float]:
    """(precision, recall) of the pairs of rows that are judged one content."""
    apart = ~torch.eye(len(ids), dtype=torch.bool)
    judged, true = (texts @ texts.T >= threshold) & apart, (ids[:, None] == ids[None, :]) & apart
    both = float((judged & true).sum())
    return both / max(1.0, float(judged.sum())), both / float(true.sum())


def train(
    method: str,
    seed: int,
    drawn: dict[str, Tensor],
    *,
    steps: int,
    rows: int,
    copies: int,
    threshold: float,
    start: int,
    first: Towers | None,
) -> dict[str, Any]:
    """R@1 after training, what was found at the start, the middle and the end, and the towers.

    Args:
        start: step from which own texts are looked at.
        first: the towers of a run before, whose texts tell contents.
    """
    torch.manual_seed(seed)
    towers, generator = Towers(), torch.Generator().manual_seed(seed)
    settings, source = METHODS[method]
    plain, loss = InfoNCE(), InfoNCE(**settings, false_negative_threshold=threshold)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    quality, began = {}, time.perf_counter()
    for step in range(steps):
        images, texts, ids = batch(drawn, rows, copies, generator)
        y, told = towers.texts(texts), {}
        if source == "ids":
            told["pair_ids"] = ids
        elif source == "first" and first is not None:
            with torch.no_grad():
                told["content_features"] = first.texts(texts)
        if step in (0, steps // 4, steps // 2, steps - 1):
            quality[step] = found(told.get("content_features", y), ids, threshold)
        now = plain if source == "own" and step < start else loss
        scale = towers.log_scale.clamp(max=4.6).exp()
        value = now(towers.images(images), y, scale, **told)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    return {"R@1": recall(towers, drawn), "found": quality, "seconds": seconds, "towers": towers}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--start", type=int, default=50, help="steps before own texts are looked at")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--copies", type=int, default=8, help="of each scene in a batch")
    parser.add_argument("--scenes", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=8, help="of each scene, at least copies")
    parser.add_argument("--threshold", type=float, default=0.85)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="with none first"
    )
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.methods[0] != "none":
        parser.error("--methods begin with none, whose text tower others need")
    facts = header(torch.device("cpu"))
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in options.methods}
    for seed in range(options.seeds):
        drawn = data(seed, options.scenes, options.pictures, gallery=500)
        first = None
        for method in options.methods:
            results[method].append(
                train(
                    method,
                    seed,
                    drawn,
                    steps=options.steps,
                    rows=options.rows,
                    copies=options.copies,
                    threshold=options.threshold,
                    start=options.start,
                    first=first,
                )
            )
            first = results[method][-1]["towers"] if method == "none" else first
            print(f"seed {seed}, {method}: R@1 {results[method][-1]['R@1']:.3f}", flush=True)
    rows = []
    for method, runs in results.items():
        row = {"false negatives": method}
        row |= {f"seed {seed}": f"{run['R@1']:.3f}" for seed, run in enumerate(runs)}
        row["mean"] = f"{statistics.mean(run['R@1'] for run in runs):.3f}"
        row["seconds a run"] = f"{statistics.mean(run['seconds'] for run in runs):.1f}"
        rows.append(row)
    judged = [
        {
            "false negatives": method,
            "seed": str(seed),
            **{
                f"step {step}": f"{precision:.2f} / {share:.2f}"
                for step, (precision, share) in run["found"].items()
            },
        }
        for method, runs in results.items()
        for seed, run in enumerate(runs)
    ]
    setting = (
        f"{options.steps} steps of {options.rows} rows, each scene {options.copies} times a batch; {options.scenes} scenes in "
        f"{options.pictures} pictures; threshold {options.threshold}, own texts from step {options.start} on; 500 unseen "
        "scenes, chance 0.002"
    )
    report(
        "Found false negatives on generated scenes",
        {**facts, "Setting": setting},
        [
            ("R@1, mean of both directions", table(rows)),
            ("Precision / recall of the pairs that the threshold finds, by step", table(judged)),
        ],
        {method: [run["R@1"] for run in runs] for method, runs in results.items()},
        ["Real captions, where nobody knows the truth", "Other thresholds: --threshold"],
        options.out,
    )


if __name__ == "__main__":
    main()
