"""What a model does with its evaluation data, as pictures for the report: galleries, confusion, similarities,
a map. The checkpoint and what the run's tasks name are a stranger's: whatever goes wrong with them is a line of text.
"""

from __future__ import annotations

import warnings
from collections import Counter
from html import escape
from typing import Any

import torch
from torch import Tensor

from clipkit.evals.classification import image_labels, zero_shot_classifier
from clipkit.evals.encoder import Encoder
from clipkit.evals.tasks import create_tasks
from clipkit.foreign import blamed_on, checked, named_by, readable, redacted
from clipkit.loading import load_model
from clipkit.reports.charts import Series, heat_map, jpeg_uri, scatter
from clipkit.reports.runs import Run

THUMBNAIL = 96
# Classes that a confusion matrix shows.
CLASSES = 1000


def group_pictures(
    run: Run, *, queries: int, device: str = "cpu", batch_size: int = 64, trust_paths: bool = False
) -> str:
    """HTML of one run's retrieval gallery, similarity matrix, embedding map and zero-shot confusion.

    What cannot be shown (no checkpoint, data that is gone or that a run may not name, no such task) is said in a
    line instead.

    Args:
        trust_paths: as clipkit.foreign.named_by.
    """
    with named_by(run.path, trust_paths=trust_paths):
        try:
            with blamed_on(run.path), warnings.catch_warnings():
                # A damaged newest checkpoint is passed over for the one before it.
                warnings.simplefilter("ignore")
                model, tokenizer, config = load_model(run.path, device=device)
                given = run.config.get("eval") or config.get("eval") or {}
                tasks = create_tasks(
                    checked(given, dict[str, dict[str, Any] | None], name=f"{run.path}: eval")
                )
        except (ValueError, OSError) as error:
            return _said("No pictures", error)
        encoder = Encoder(model, tokenizer, device=device, batch_size=batch_size)
        parts = [f'<p class="note">From {escape(readable(str(run.path)))}.</p>']
        seen = set()
        for name, task in tasks.items():
            kind = type(task).__name__
            try:
                with blamed_on(run.path):
                    if kind in ("Retrieval", "Geometry") and task.source.identity not in seen:
                        seen.add(task.source.identity)
                        parts.append(retrieval_pictures(name, encoder, task.source, queries))
                    elif kind == "ZeroShot":
                        parts.append(confusion_pictures(name, encoder, task))
            except (ValueError, OSError) as error:
                parts.append(_said(f"{name}: no pictures", error))
        return "".join(parts)


def _said(what: str, error: Exception) -> str:
    return f'<p class="note">{escape(readable(redacted(f"{what}: {error}")))}</p>'


def retrieval_pictures(name: str, encoder: Encoder, source: Any, queries: int) -> str:
    """Gallery both ways for evenly spaced queries, the first pairs' similarities, and a plane through the
    embeddings.
    """
    images = encoder.images(source)
    texts, index = encoder.captions(source)
    captions = [caption for one in images.captions for caption in one]
    pick = torch.linspace(0, len(images.keys) - 1, min(queries, len(images.keys))).round().long().tolist()
    first = [int(torch.nonzero(index == i)[0]) for i in range(len(images.keys))]
    to_image = (texts[[first[i] for i in pick]] @ images.image_features.T).topk(
        min(5, len(images.keys)), dim=1
    )
    to_text = (images.image_features[pick] @ texts.T).topk(min(5, len(texts)), dim=1)
    wanted = sorted({*pick, *to_image.indices.flatten().tolist()})
    thumbs = thumbnails(source, wanted)
    searches, descriptions = [], []
    for row, query in enumerate(pick):
        hits = "".join(
            f'<figure class="{"true" if hit == query else ""}"><img src="{thumbs[hit]}" alt="{escape(images.captions[hit][0])}">'
            f"<figcaption>{score:.2f}</figcaption></figure>"
            for hit, score in zip(to_image.indices[row].tolist(), to_image.values[row].tolist(), strict=True)
        )
        missed = (
            ""
            if query in to_image.indices[row]
            else f'<figure><img src="{thumbs[query]}" alt="the true image"><figcaption>truth</figcaption></figure>'
        )
        searches.append(
            f'<div class="query"><p>“{escape(captions[first[query]])}”</p><div class="hits">{hits}{missed}</div></div>'
        )
        lines = "".join(
            f'<li class="{"true" if int(index[hit]) == query else ""}">{escape(captions[hit])} ({score:.2f})</li>'
            for hit, score in zip(to_text.indices[row].tolist(), to_text.values[row].tolist(), strict=True)
        )
        descriptions.append(
            f'<div class="query"><img src="{thumbs[query]}" alt="query"><ol>{lines}</ol></div>'
        )
    return (
        f"<h3>{escape(name)}: text to image</h3>"
        '<p class="note">A caption, the five nearest images with their cosines, the true one framed (or last, as “truth”).</p>'
        f'<div class="grid">{"".join(searches)}</div><h3>{escape(name)}: image to text</h3>'
        f'<p class="note">An image and the five nearest captions, its own in green.</p><div class="grid">{"".join(descriptions)}</div>'
        f'<h3>{escape(name)}: embedding space</h3><div class="grid">{_similarities(images.image_features, texts[first])}'
        f"{_plane(images.image_features, texts[first])}</div>"
    )


def _similarities(images: Tensor, texts: Tensor, count: int = 64) -> str:
    count = min(count, len(images))
    return heat_map(
        f"Cosines of the first {count} pairs",
        images[:count] @ texts[:count].T,
        rows="image",
        columns="caption",
    )


def _plane(images: Tensor, texts: Tensor, count: int = 200) -> str:
    """The two directions of largest variance of images and captions together."""
    x, y = images[:count].double(), texts[:count].double()
    both = torch.cat([x, y])
    axes = torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:2].T
    # A singular vector's sign is arbitrary: fix it, so that a rerun draws the same picture.
    axes = axes * torch.where(axes.gather(0, axes.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    a, b = [[tuple(p) for p in ((part - both.mean(0)) @ axes).tolist()] for part in (x, y)]
    chart = scatter(
        f"First two principal components, {len(a)} pairs: images blue, captions orange",
        [Series(a, "#0072b2", "images"), Series(b, "#d55e00", "captions")],
        list(zip(a, b, strict=True))[:40],
    )
    return chart


def confusion_pictures(name: str, encoder: Encoder, task: Any) -> str:
    """Rows are true classes, columns predictions, as shares of the row; then the commonest mistakes in words."""
    images = encoder.images(task.data.source)
    labels, classes = image_labels(images, name), task.data.classes
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{name} has labels outside its {len(classes)} classes (from 0)")
    predicted = (images.image_features @ zero_shot_classifier(encoder, classes, task.templates).T).argmax(1)
    # Pairs that are there: a matrix over all classes could fill the memory.
    found = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    # Of equal counts the first classes, whatever the order of the images.
    worst = sorted(((-n, pair) for pair, n in found.items() if pair[0] != pair[1]))[:10]
    rows = "".join(
        f"<tr><td>{escape(classes[true])}</td><td>{escape(classes[guess])}</td><td>{-n}</td></tr>"
        for n, (true, guess) in worst
    )
    present = sorted({*labels.tolist()})[:CLASSES]
    place = {label: i for i, label in enumerate(present)}
    shares = torch.zeros(len(present), len(present), dtype=torch.float64)
    for (true, guess), n in found.items():
        if true in place and guess in place:
            shares[place[true], place[guess]] = n
    totals = torch.bincount(labels)[present].double()
    chart = heat_map(
        f"Confusion of {len(present)} classes",
        shares / totals[:, None],
        rows="true class",
        columns="prediction",
        names=[classes[i] for i in present],
    )
    table = (
        f'<div class="scroll"><table><thead><tr><th>true</th><th>predicted</th><th>images</th></tr></thead><tbody>{rows}</tbody></table></div>'
        if rows
        else "<p>No mistake.</p>"
    )
    return (
        f'<h3>{escape(name)}: zero-shot confusion</h3><div class="grid">{chart}<figure><figcaption>Commonest mistakes of '
        f"{len(labels)} images</figcaption>{table}</figure></div>"
    )


def thumbnails(source: Any, rows: list[int]) -> dict[int, str]:
    """Data URIs of the images in those places of a source."""
    found, place, wanted = {}, 0, set(rows)
    for _, batch in source.batches(THUMBNAIL, 64):
        for image in batch["image"]:
            if place in wanted:
                found[place] = jpeg_uri(image.permute(1, 2, 0).contiguous().numpy())
            place += 1
        if len(found) == len(wanted):
            break
    return found
