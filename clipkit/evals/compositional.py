"""Compositional understanding: an image, its caption, and a caption changed in one thing (SugarCrepe: Hsieh
et al., 2023).

Chance is 1/2, and a tie counts as half, so a model that cannot tell the two apart scores chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.data.captions import clean_caption
from clipkit.data.decode import read_image
from clipkit.data.order import number
from clipkit.evals.encoder import EncodedImages, check_features
from clipkit.evals.interval import Scored, mean_of, mean_of_groups
from clipkit.evals.items import Items
from clipkit.foreign import VOCABULARY_BYTES, BrokenFile, checked, parse_json, permit, read_json, read_text

_NEEDED = ("caption", "negative_caption", "task")


def read_pairs(pairs: str | Path) -> list[dict[str, str]]:
    """Pairs from a .jsonl, or from a folder of SugarCrepe's own TASK.json files ({id: {filename, caption,
    ...}}).
    """
    path = Path(pairs)
    permit(path, "pairs")
    rows: list[tuple[str, dict[str, Any]]] = []
    if path.is_dir():
        for file in sorted(path.glob("*.json")):
            permit(file, "pairs")
            found = read_json(file, dict[str, dict[str, Any]], limit=VOCABULARY_BYTES)
            rows += [(f"{file}, pair {key[:50]}", {"task": file.stem, **row}) for key, row in found.items()]
    elif path.is_file():
        for line, text in enumerate(read_text(path, limit=VOCABULARY_BYTES).split("\n"), 1):
            if text.strip():
                where = f"{path}, line {line}"
                rows.append((where, parse_json(text, name=where)))
    else:
        raise ValueError(
            f"compositional pairs {pairs} do not exist: give a .jsonl or a folder of SugarCrepe's json files"
        )
    if not rows:
        raise ValueError(f"compositional pairs {pairs} hold no pair")
    out = []
    for where, row in rows:
        used = {name: row[name] for name in (*_NEEDED, "key", "filename") if row.get(name)}
        for name in ("caption", "negative_caption"):
            if isinstance(used.get(name), str) and not clean_caption(used[name]):
                del used[name]
        missing = [name for name in _NEEDED if name not in used]
        if missing or not ("key" in used or "filename" in used):
            raise BrokenFile(f"{where} lacks {', '.join(missing) or 'key or filename'}")
        out.append(checked(used, dict[str, str], name=where))
    return out


class NamedImages(Items):
    """The images of `folder` that the pairs name, once each."""

    def __init__(self, folder: str | Path, pairs: Sequence[dict[str, str]]):
        permit(folder, "folder")
        names = sorted({pair["filename"] for pair in pairs if "filename" in pair})
        self.folder = Path(folder)
        self.identity = f"images in {folder} of {len(pairs)} pairs ({number(*names):016x})"
        for name in names:
            # The pairs, which others wrote, name images of this folder alone.
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise BrokenFile(f"the pairs name {name[:200]!r}, which is no image in {folder}")
            permit(self.folder / name, "folder")
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing or not names:
            raise ValueError(
                f"{len(missing)} of {len(names)} images of the pairs are not in {folder}: {missing[:3]}"
            )
        # Its content is the names, too: other pairs name other images of the folder.
        self.items = [(name, None, []) for name in names]

    def read(self, key):
        return read_image(self.folder / key)


def pairs_left(pairs: Sequence[dict[str, str]], images: EncodedImages) -> list[dict[str, str]]:
    """The pairs without those whose image could not be read."""
    read, lost = set(images.keys), {fault.key for fault in images.faults}
    left = [
        pair
        for pair in pairs
        if not (names := {pair.get("key"), pair.get("filename")} - {None}) & lost or names & read
    ]
    if not left:
        raise ValueError("no image of a pair could be read")
    return left


def pair_rows(pairs: Sequence[dict[str, Any]], images: EncodedImages) -> Tensor:
    """(P,) the row of `images` each pair is about, by key, or by file name."""
    rows: dict[Any, int] = {key: row for row, key in enumerate(images.keys)}
    if len(rows) < len(images.keys):
        named = {pair.get(name) for pair in pairs for name in ("key", "filename")}
        twice = next((key for key, n in Counter(images.keys).items() if n > 1 and key in named), None)
        if twice is not None:
            raise ValueError(f"a pair is about image {twice[:200]!r}, and several images have that key")
    found = [rows.get(pair.get("key"), rows.get(pair.get("filename"))) for pair in pairs]
    if None in found:
        pair = pairs[found.index(None)]
        raise ValueError(
            f"image {pair.get('key') or pair.get('filename')!r} of a pair is not among the images read"
        )
    return torch.tensor(found)


def choice_metrics(
    image_features: Tensor,
    right: Tensor,
    wrong: Tensor,
    tasks: Sequence[str],
    *,
    scored: dict[str, Scored] | None = None,
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
    metrics, scored, names = {}, {} if scored is None else scored, sorted(set(tasks))
    for task in names:
        some = correct[torch.tensor([name == task for name in tasks])]
        metrics[task] = float(some.mean())
        scored[task] = mean_of(some, chance=0.5, tied=some == 0.5)
    scored["average"] = mean_of_groups(
        correct, torch.tensor([names.index(task) for task in tasks]), chance=0.5
    )
    scored["all"] = mean_of(correct, chance=0.5, tied=correct == 0.5)
    return {**metrics, "average": sum(metrics.values()) / len(metrics), "all": float(correct.mean())}
