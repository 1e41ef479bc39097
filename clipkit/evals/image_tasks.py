"""The tasks that look at images: what `cfg.eval` can name, over the functions of this folder's other files.

Every task reads one data source, given by exactly one of

    shards          img2dataset shards (globs, braces, lists); class ids from `label_key` of the json
    clip_benchmark  a folder in CLIP_benchmark's webdataset layout, `split` of it
    folder          FOLDER/CLASS/NAME.jpg
    tar             a tar of PART/CLASS/NAME.jpg
    cifar           the folder in which torchvision keeps CIFAR-10 or CIFAR-100; `split` test or train
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from clipkit.evals.classes import ClassNames
from clipkit.evals.classification import (
    classification_metrics,
    image_labels,
    read_classes,
    read_templates,
    zero_shot_classifier,
)
from clipkit.evals.compositional import NamedImages, choice_metrics, pair_rows, pairs_left, read_pairs
from clipkit.evals.encoder import Encoder
from clipkit.evals.geometry import consistency_scores, geometry_metrics
from clipkit.evals.items import ImageSource
from clipkit.evals.linear_probe import linear_probe_metrics
from clipkit.evals.retrieval import retrieval_metrics
from clipkit.evals.sources import ClipBenchmark, open_source
from clipkit.evals.tasks import register_task

# As clipkit.evals.classification.read_classes takes them; None: the source's own.
Classes = str | Sequence[str] | Mapping[str, str] | None


class _Captioned:
    """A captioned data set and what is measured of it."""

    what: str

    def __init__(
        self, *, shards: str | list[str] | None = None, clip_benchmark: str | None = None, split: str = "test"
    ):
        self.source = open_source(
            self.what, shards=shards, clip_benchmark=clip_benchmark, split=split, captioned=True
        )

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        text_features, index = encoder.captions(self.source)
        encoded = encoder.images(self.source)
        images = encoded.image_features.to(encoder.ranking_device)
        metrics = self.measure(encoder, images, text_features.to(images.device), index.to(images.device))
        return {**metrics, **encoded.skipped}

    def measure(self, encoder: Encoder, images: Tensor, texts: Tensor, index: Tensor) -> dict[str, float]:
        """Of image features (N, D), text features (M, D) and the image (M,) of each text."""
        raise NotImplementedError


@register_task("retrieval")
class Retrieval(_Captioned):
    """Image-text retrieval over one captioned data set; see clipkit.evals.retrieval for metrics and tie rule."""

    metrics = tuple(
        f"{direction}_{name}"
        for direction in ("image_to_text", "text_to_image")
        for name in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
    )
    what = "retrieval"

    def measure(self, encoder: Encoder, images: Tensor, texts: Tensor, index: Tensor) -> dict[str, float]:
        return retrieval_metrics(images, texts, index, group=encoder.group, scored=encoder.record.scored)


@register_task("geometry")
class Geometry(_Captioned):
    """Alignment, uniformity and modality gap over one captioned data set; see clipkit.evals.geometry."""

    metrics = ("align_l2", "uniform_i", "uniform_t", "uniform_it", "modality_gap")
    what = "geometry"

    def measure(self, encoder: Encoder, images: Tensor, texts: Tensor, index: Tensor) -> dict[str, float]:
        return geometry_metrics(images, texts, index, group=encoder.group)


class _Labelled:
    """A labelled source with its class names: what zero-shot, probe and consistency share."""

    def __init__(self, what: str, classes: Classes, **source: Any):
        names = None if classes is None else ClassNames(*read_classes(classes))
        self.what = what
        self.source: ImageSource = open_source(what, classes=names, labelled=True, **source)
        known = names.names if names else self.source.classes
        if known is None:
            raise ValueError(f"{what} needs `classes`: a list of names or a file")
        self.classes = known

    def templates(self, given: str | list[str] | None) -> list:
        return read_templates(
            self.source.templates if given is None and isinstance(self.source, ClipBenchmark) else given
        )

    def encode(self, encoder: Encoder) -> tuple:
        images = encoder.images(self.source)
        labels = image_labels(images, self.what)
        empty = sorted({*range(len(self.classes))} - {*labels.tolist()})
        if empty:
            names = [self.classes[label] for label in empty]
            encoder.found(
                "empty_classes",
                f"{len(empty)} of {len(self.classes)} classes have no picture in {self.source.identity} "
                f"({', '.join(repr(name[:100]) for name in names[:4])}{', ...' if len(names) > 4 else ''})",
                {
                    "classes": len(empty),
                    "of": len(self.classes),
                    "names": [name[:100] for name in names[:10]],
                },
            )
        return images.image_features, labels

    def skipped(self, encoder: Encoder) -> dict[str, int]:
        """`EncodedImages.skipped` of what `encode` read."""
        return encoder.images(self.source).skipped


def _skipped_of_both(encoder: Encoder, train: _Labelled, test: _Labelled) -> dict[str, int]:
    counts = [count for data in (train, test) for count in data.skipped(encoder).values()]
    return {"skipped": sum(counts)} if counts else {}


@register_task("zero_shot")
class ZeroShot:
    """Zero-shot classification of one labelled data set: top1, top5, mean_per_class.

    Args:
        shards, clip_benchmark, folder, tar, cifar, split, label_key: the source; exactly one of the first
            five.
        classes: as read_classes; CLIP_benchmark folders, image folders and CIFAR bring their own, which given ones are
            matched with by name.
        templates: as read_templates; CLIP_benchmark folders bring their own.
        present_only: let only classes with an image compete, as ImageNet-A and ImageNet-R ask with 200 of
            1,000.
    """

    metrics = ("top1", "top5", "mean_per_class")

    def __init__(
        self,
        *,
        shards: str | list[str] | None = None,
        clip_benchmark: str | None = None,
        folder: str | None = None,
        tar: str | None = None,
        cifar: str | None = None,
        split: str = "test",
        classes: Classes = None,
        templates: str | list[str] | None = None,
        label_key: str | None = None,
        present_only: bool = False,
    ):
        self.data = _Labelled(
            "zero_shot",
            classes,
            shards=shards,
            clip_benchmark=clip_benchmark,
            folder=folder,
            tar=tar,
            cifar=cifar,
            split=split,
            label_key=label_key,
        )
        self.templates, self.present_only = self.data.templates(templates), present_only

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        classes = self.data.classes
        if self.present_only:
            features, labels = self.data.encode(encoder)
            present, labels = labels.unique(return_inverse=True)
            classes = [classes[label] for label in present.tolist()]
            classifier = zero_shot_classifier(encoder, classes, self.templates)
        else:
            # First: what is wrong with the prompts is said before the pictures are encoded.
            classifier = zero_shot_classifier(encoder, classes, self.templates)
            features, labels = self.data.encode(encoder)
        metrics = classification_metrics(features, classifier, labels, scored=encoder.record.scored)
        return {**metrics, **self.data.skipped(encoder)}


@register_task("linear_probe")
class LinearProbe:
    """Logistic regression on frozen image features: top1, mean_per_class and the C chosen; see linear_probe.

    Args:
        train, test: the two sources, each a dict with one of shards, clip_benchmark, folder, tar, cifar.
        classes: as read_classes, for both; folders and CLIP_benchmark folders bring their own.
    """

    metrics = ("top1", "mean_per_class", "C")

    def __init__(self, *, train: dict[str, Any], test: dict[str, Any], classes: Classes = None):
        self.train = _Labelled("linear_probe train", classes, **train)
        self.test = _Labelled("linear_probe test", classes or self.train.source.classes, **test)

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        metrics = linear_probe_metrics(
            *self.train.encode(encoder),
            *self.test.encode(encoder),
            classes=len(self.train.classes),
            scored=encoder.record.scored,
        )
        return {**metrics, **_skipped_of_both(encoder, self.train, self.test)}


@register_task("consistency")
class Consistency:
    """CyCLIP's consistency between image and text space at k = 1, 3, 5, 10; see geometry.consistency_scores.

    Args:
        train, test: the two sources, each a dict with one of shards, clip_benchmark, folder, tar, cifar.
        classes, templates: as in zero_shot.
    """

    def __init__(
        self,
        *,
        train: dict[str, Any],
        test: dict[str, Any],
        classes: Classes = None,
        templates: str | list[str] | None = None,
        k: tuple[int, ...] = (1, 3, 5, 10),
    ):
        self.train = _Labelled("consistency train", classes, **train)
        self.test = _Labelled("consistency test", classes or self.train.source.classes, **test)
        self.templates, self.k = self.test.templates(templates), tuple(k)
        self.metrics = tuple(f"consistency@{nearest}" for nearest in self.k)

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        classifier = zero_shot_classifier(encoder, self.test.classes, self.templates)
        train, labels = self.train.encode(encoder)
        metrics = consistency_scores(
            self.test.encode(encoder)[0], classifier, train, labels, k=self.k, scored=encoder.record.scored
        )
        return {**metrics, **_skipped_of_both(encoder, self.train, self.test)}


@register_task("compositional")
class Compositional:
    """SugarCrepe: does the image prefer its caption to a hard negative? Accuracy a kind of change, and over
    all.

    Args:
        pairs: a .jsonl of {key or filename, caption, negative_caption, task}, or the folder of SugarCrepe's
            json files.
        shards, folder: where the images are; exactly one. `folder` holds the images themselves, by file name.
    """

    def __init__(self, *, pairs: str, shards: str | list[str] | None = None, folder: str | None = None):
        self.pairs = read_pairs(pairs)
        self.metrics = (*sorted({pair["task"] for pair in self.pairs}), "average", "all")
        if folder is not None and shards is None:
            self.source: ImageSource = NamedImages(folder, self.pairs)
        else:
            self.source = open_source("compositional", shards=shards)

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        images = encoder.images(self.source)
        pairs = pairs_left(self.pairs, images)
        rows = pair_rows(pairs, images)
        right = encoder.texts([pair["caption"] for pair in pairs])
        wrong = encoder.texts([pair["negative_caption"] for pair in pairs])
        metrics = choice_metrics(
            images.image_features[rows],
            right,
            wrong,
            [pair["task"] for pair in pairs],
            scored=encoder.record.scored,
        )
        return {**metrics, **images.skipped}
