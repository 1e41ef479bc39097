"""Compositional understanding: an image, its caption, and a caption changed in one thing (SugarCrepe: Hsieh
et al., 2023).

Chance is 1/2, and a tie counts as half, so a model that cannot tell the two apart scores chance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.evals.encoder import EncodedImages, check_features
from clipkit.evals.sources import Items


def read_pairs(pairs: str | Path) -> list[dict[str, str]]:
    """Pairs from a .jsonl, or from a folder of SugarCrepe's own TASK.json files ({id: {filename, caption,
    ...}}).
    """
    path = Path(pairs)
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        rows = [{"task": f.stem, **row} for f in files for row in json.loads(f.read_text("utf-8")).values()]
    elif path.is_file():
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    else:
        raise ValueError(
            f"compositional pairs {pairs} do not exist: give a .jsonl or a folder of SugarCrepe's json files"
        )
    if not rows:
        raise ValueError(f"compositional pairs {pairs} hold no pair")
    for number, row in enumerate(rows):
        missing = [name for name in ("caption", "negative_caption", "task") if not row.get(name)]
        if missing or not (row.get("key") or row.get("filename")):
            raise ValueError(
                f"pair {number} of {pairs} lacks {', '.join(missing) or 'key or filename'}; got {sorted(row)}"
            )
    return rows


class NamedImages(Items):
    """The images of `folder` that the pairs name, once each."""

    def __init__(self, folder: str | Path, pairs: Sequence[dict[str, str]]):
        self.folder, self.identity = Path(folder), f"images in {folder} of {len(pairs)} pairs"
        names = sorted({pair["filename"] for pair in pairs if "filename" in pair})
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing or not names:
            raise ValueError(
                f"{len(missing)} of {len(names)} images of the pairs are not in {folder}: {missing[:3]}"
            )
        self.items = [(name, None, []) for name in names]

    def read(self, key):
        return (self.folder / key).read_bytes()


def pair_rows(pairs: Sequence[dict[str, Any]], images: EncodedImages) -> Tensor:
    """(P,) the row of `images` each pair is about, by key, or by file name."""
    rows: dict[Any, int] = {key: row for row, key in enumerate(images.keys)}
    found = [rows.get(pair.get("key"), rows.get(pair.get("filename"))) for pair in pairs]
    if None in found:
        pair = pairs[found.index(None)]
        raise ValueError(
            f"image {pair.get('key') or pair.get('filename')!r} of a pair is not among the images read"
        )
    return torch.tensor(found)


def choice_metrics(
    image_features: Tensor, right: Tensor, wrong: Tensor, tasks: Sequence[str]
) -> dict[str, float]:
    """Accuracy of choosing `right` over `wrong`, all (P, D), for each task name, `all` pairs, and `average`
    of tasks.
    """
    for name, features in (
        ("image_features", image_features),
        ("caption", right),
        ("negative caption", wrong),
    ):
        check_features(features, name)
    x = image_features.double()
    margin = (x * right.double()).sum(1) - (x * wrong.double()).sum(1)
    tolerance = 4 * torch.finfo(torch.float64).eps * x.shape[1]
    correct = (margin > tolerance).double() + 0.5 * (margin.abs() <= tolerance).double()
    metrics = {}
    for task in sorted(set(tasks)):
        metrics[task] = float(correct[torch.tensor([name == task for name in tasks])].mean())
    return {**metrics, "average": sum(metrics.values()) / len(metrics), "all": float(correct.mean())}
