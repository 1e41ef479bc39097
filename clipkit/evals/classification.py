"""Zero-shot classification (Radford et al., 2021, section 3.1): a class is the mean of its prompts'
embeddings.

As open_clip does it: each prompt's embedding has unit norm, a class weight is their mean, renormalised, and
logits are 100 times the cosine. Equal logits share their places evenly (expectation over a random order), so
constant features have the accuracy of guessing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkit.data import SHAPE_CLASSES, SHAPE_TEMPLATES
from clipkit.evals.checks import alike, in_words
from clipkit.evals.encoder import EncodedImages, Encoder, check_features
from clipkit.evals.interval import Scored, mean_of, mean_of_groups
from clipkit.evals.retrieval import hit_probability
from clipkit.foreign import BrokenFile, permit, read_json, read_text
from clipkit.registry import unknown


def shape_classes() -> list[str]:
    return list(SHAPE_CLASSES)


def shape_templates() -> list[str]:
    return list(SHAPE_TEMPLATES)


def imagenet_classes() -> list[str]:
    return _of_open_clip("IMAGENET_CLASSNAMES")


def imagenet_wnids() -> list[str]:
    """The wnid of each of the 1,000 classes, which are in the order of these."""
    from timm.data.imagenet_info import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def imagenet_templates() -> list[Callable[[str], str]]:
    return _of_open_clip("OPENAI_IMAGENET_TEMPLATES")


def simple_templates() -> list[Callable[[str], str]]:
    return _of_open_clip("SIMPLE_IMAGENET_TEMPLATES")


def _of_open_clip(name: str) -> list[Any]:
    import open_clip

    return list(getattr(open_clip, name))


CLASSES = {"shapes": shape_classes, "imagenet": imagenet_classes}
TEMPLATES: dict[str, Callable[[], Sequence[str | Callable[[str], str]]]] = {
    "shapes": shape_templates,
    "imagenet": imagenet_templates,
    "imagenet_simple": simple_templates,
    "plain": lambda: ["a photo of a {}."],
}


def read_classes(classes: str | Sequence[str] | Mapping[str, str]) -> tuple[list[str], list[str] | None]:
    """Class names, and what the data calls each where that is given (as ImageNet's wnid).

    Args:
        classes: a list of names; a mapping {name in the data: class name}; `shapes` or `imagenet` (with its wnids); or
            a file: .txt with one name a line, .json with a list, or .tsv/.csv with the column `name` and optionally
            `folder` or `wnid`.
    """
    folders = None
    if isinstance(classes, Mapping):
        folders, names = [str(name) for name in classes], [str(name) for name in classes.values()]
    elif not isinstance(classes, str):
        names = [str(name) for name in classes]
    elif classes in CLASSES:
        names = CLASSES[classes]()
        folders = imagenet_wnids() if classes == "imagenet" else None
    elif not _is_file(classes, "classes"):
        raise ValueError(
            f"{unknown('class list', classes, CLASSES)} It is no file either; a list of names also does."
        )
    elif classes.endswith((".tsv", ".csv")):
        names, folders = _read_table(classes)
    elif classes.endswith(".json"):
        names = read_json(classes, list[str])
    else:
        names = read_text(classes).splitlines()
        while names and not names[-1].strip():
            names = names[:-1]
    if not names:
        raise ValueError(f"the class list {classes!r} is empty")
    for label, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"class {label} of {classes if isinstance(classes, str) else 'the list'} is empty"
            )
    return names, folders


def _is_file(name: str, what: str) -> bool:
    """Whether a setting that is none of the known names is the path of a file that may be read."""
    permit(name, what)
    return "\0" not in name and Path(name).is_file()


def _read_table(classes: str) -> tuple[list[str], list[str] | None]:
    text = io.StringIO(read_text(classes), newline="")
    reader = csv.DictReader(text, delimiter="\t" if classes.endswith(".tsv") else ",")
    try:
        rows = list(reader)
    except csv.Error as error:
        raise BrokenFile(f"{classes}, near line {reader.line_num}: {error}") from None
    header = list(reader.fieldnames or ())
    if not rows or "name" not in header:
        raise ValueError(
            f"{classes} needs a header with the column 'name'; got {str(header)[:200] if header else 'nothing'}"
        )
    column = next((column for column in ("folder", "wnid") if column in header), None)
    for row in rows:
        if row["name"] is None or (column and row[column] is None):
            raise BrokenFile(f"{classes}: a row has fewer columns than the header")
    return [row["name"] for row in rows], [row[column] for row in rows] if column else None


def read_templates(templates: str | Sequence[str] | None) -> list[Callable[[str], str]]:
    """Prompt makers from a list of strings holding `{}` or `{c}`, a file with one a line, or a name in
    TEMPLATES.
    """
    if templates is None or len(templates) == 0:
        raise ValueError(
            f"zero-shot classification needs templates: a list such as ['a photo of a {{}}.'], a file with one a line, "
            f"or one of {', '.join(sorted(TEMPLATES))}"
        )
    if not isinstance(templates, str):
        made: Sequence[str | Callable[[str], str]] = templates
    elif templates in TEMPLATES:
        made = TEMPLATES[templates]()
    elif _is_file(templates, "templates"):
        lines = read_text(templates).splitlines()
        wrong = [i for i, line in enumerate(lines, 1) if line.strip() and not _has_place(line)]
        if wrong or not "".join(lines).strip():
            where = f"{templates}, line {wrong[0]}" if wrong else templates
            raise BrokenFile(f"{where} has no place for the class: write {{}} or {{c}} there")
        made = [line for line in lines if line.strip()]
    else:
        raise ValueError(f"{unknown('templates', templates, TEMPLATES)} It is no file either.")
    return [_prompt_maker(template) if isinstance(template, str) else template for template in made]


def _has_place(template: str) -> bool:
    return "{}" in template or "{c}" in template


def _prompt_maker(template: str) -> Callable[[str], str]:
    if not _has_place(template):
        raise ValueError(
            f"template {repr(template)[:200]} has no place for the class: write {{}} or {{c}} there"
        )
    # Not str.format: class names and templates may hold other braces.
    return lambda name: template.replace("{}", name).replace("{c}", name)


def zero_shot_classifier(
    encoder: Encoder, classes: Sequence[str], templates: Sequence[Callable[[str], str]]
) -> Tensor:
    """(K, D) unit-norm class weights; classes whose prompts are the same tokens are said, and have equal weights."""
    prompts = [template(name) for name in classes for template in templates]
    keys = encoder.token_keys(prompts)
    per_class = [tuple(keys[i : i + len(templates)]) for i in range(0, len(keys), len(templates))]
    groups = sorted(alike(per_class), key=len, reverse=True)
    if groups:
        count = sum(map(len, groups))
        encoder.found(
            "shared_prompts",
            f"{count} of {len(classes)} classes share all their prompts' tokens with another, so that the model cannot "
            f"tell them apart ({in_words(groups, classes)}): ties count by their expectation",
            {
                "classes": count,
                "of": len(classes),
                "groups": [[classes[row] for row in group] for group in groups],
            },
        )
    features = encoder.texts(prompts, keys=keys).reshape(len(classes), len(templates), -1).mean(dim=1)
    return features / features.norm(dim=1, keepdim=True)


def zero_shot_logits(image_features: Tensor, classifier: Tensor) -> Tensor:
    """(N, K) float32: 100 times the cosine of (N, D) and (K, D) unit-norm features."""
    return 100.0 * image_features.float() @ classifier.float().T


def classification_metrics(
    image_features: Tensor, classifier: Tensor, labels: Tensor, *, scored: dict[str, Scored] | None = None
) -> dict[str, float]:
    """top1, top5 and mean_per_class (mean over the classes present of their top-1), as fractions of 1.

    Args:
        image_features: (N, D), unit norm.
        classifier: (K, D).
        labels: (N,) int64 in 0..K-1.
        scored: is filled with each metric's images, for `clipkit.evals.interval`, and its chance level.
    """
    check_features(image_features, "image_features")
    check_features(classifier, "class weights")
    outside = torch.nonzero((labels < 0) | (labels >= len(classifier)))
    if len(outside):
        row = int(outside[0])
        raise ValueError(
            f"image {row} has label {int(labels[row])}, but there are {len(classifier)} classes (from 0)"
        )
    hits, level = {1: [], 5: []}, []
    tolerance = 4 * torch.finfo(torch.float64).eps * image_features.shape[1]
    for start in range(0, len(labels), 1024):
        truth = labels[start : start + 1024, None]
        scores = image_features[start : start + 1024].double() @ classifier.double().T
        own = scores.gather(1, truth)
        scores.scatter_(1, truth, -torch.inf)
        greater = torch.count_nonzero(scores > own + tolerance, dim=1)
        tied = torch.count_nonzero(scores >= own - tolerance, dim=1) - greater
        for k, found in hits.items():
            found.append(hit_probability(greater, tied, torch.ones_like(tied), k))
        level.append(tied)
    top1, top5 = torch.cat(hits[1]), torch.cat(hits[5])
    count = torch.bincount(labels, minlength=len(classifier))
    per_class = torch.zeros(len(classifier), dtype=torch.float64).scatter_add_(0, labels, top1)
    present = count > 0
    if scored is not None:
        guess = 1 / len(classifier)
        ties = torch.cat(level)
        scored["top1"] = mean_of(top1, chance=guess, tied=ties)
        scored["top5"] = mean_of(top5, chance=min(5, len(classifier)) * guess, tied=ties)
        scored["mean_per_class"] = mean_of_groups(top1, labels, chance=guess)
    return {
        "top1": float(top1.mean()),
        "top5": float(top5.mean()),
        "mean_per_class": float((per_class[present] / count[present]).mean()),
    }


def image_labels(images: EncodedImages, what: str) -> Tensor:
    """(N,) int64 labels of encoded images; ValueError naming the first image without one."""
    for key, label in zip(images.keys, images.labels, strict=True):
        if not isinstance(label, int):
            raise ValueError(f"{what}: image {key!r} has no class id (KEY.cls, or label_key in its json)")
    return torch.tensor(images.labels)
