"""Exact image-text retrieval: any number of captions an image, both directions, no N x M matrix held.

Scores are formed block by block in float64 and only compared with each query's best positive, so memory is
the block and four counts a query. One pass over the blocks serves both directions: a block's rows are image
queries, its columns text queries.

Tie rule: candidates whose scores are equal (within float64 rounding of the product) stand in random order,
and every number is the exact expectation over that order. With `greater` negatives above and `tied` negatives
level with `best` equally good positives,

    P(a positive is among the first k) = 1 - C(tied, k - greater) / C(tied + best, k - greater)
    E(rank of the first positive)      = greater + (tied + best + 1) / (best + 1)

so constant features have chance, not 100 %, and without ties both are the plain count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from clipkit.evals.encoder import check_features
from clipkit.evals.interval import Scored, mean_of, median_of


def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image_index: Tensor | Sequence[int],
    *,
    k: Sequence[int] = (1, 5, 10),
    distractors: bool = False,
    block: tuple[int, int] = (1024, 4096),
    group: ProcessGroup | None = None,
    scored: dict[str, Scored] | None = None,
) -> dict[str, float]:
    """Recall at k, median and mean rank of image-to-text and text-to-image retrieval.

    An image's rank is that of its best caption (a hit at k is any of its captions among the first k, as in
    Karpathy and Fei-Fei, 2015, section 4.2); a caption has one true image.

    Args:
        image_features: (N, D), any floating dtype; the score is the dot product, so unit norm gives the
            cosine.
        text_features: (M, D).
        text_to_image_index: (M,), the row of `image_features` each caption belongs to.
        k: the cut-offs.
        distractors: let images without a caption be candidates that are never queries; otherwise they are an
            error.
        block: rows and columns of one score block: 8 * rows * columns bytes.
        group: every rank passes the same whole features and takes its share of the blocks; all ranks return
            the same.
        scored: is filled with each metric's queries, for `clipkit.evals.interval`, and its chance level.

    Returns:
        `image_to_text_R@k` and `text_to_image_R@k` as fractions of 1, `..._median_rank` and `..._mean_rank`
        from 1.

    Raises:
        ValueError: for shapes that disagree, an index out of range, non-finite features, an image without a
            caption.
    """
    index = _check(image_features, text_features, text_to_image_index, distractors)
    images, texts = _counts(image_features, text_features, index, block, group)
    queried = torch.bincount(index, minlength=len(image_features)) > 0
    metrics, scored = {}, {} if scored is None else scored
    positives = torch.bincount(index, minlength=len(image_features))[queried]
    sides = (
        ("image_to_text", [c[queried] for c in images], positives, len(text_features), None),
        ("text_to_image", texts, torch.ones_like(index), len(image_features), index),
    )
    for direction, counts, right, candidates, units in sides:
        nothing = torch.zeros_like(right)
        guess = (nothing, candidates - right, right)
        for cutoff in k:
            hits = hit_probability(*counts, k=cutoff)
            metrics[f"{direction}_R@{cutoff}"] = float(hits.mean())
            chance = float(hit_probability(*guess, k=cutoff).mean())
            scored[f"{direction}_R@{cutoff}"] = mean_of(hits, units=units, chance=chance, tied=counts[1])
        rank = expected_rank(*counts)
        chance = float(expected_rank(*guess).mean())
        scored[f"{direction}_mean_rank"] = mean_of(rank, units=units, chance=chance, tied=counts[1])
        scored[f"{direction}_median_rank"] = median_of(
            rank, units=units, chance=_median_guess(right, candidates)
        )
        # Tensor.quantile refuses more than 2**24 values, and Tensor.median takes the lower of two middle
        # ones.
        middle = rank.sort().values[[(len(rank) - 1) // 2, len(rank) // 2]]
        metrics[f"{direction}_median_rank"] = float(middle.mean())
        metrics[f"{direction}_mean_rank"] = float(rank.mean())
    return metrics


def hit_probability(greater: Tensor, tied: Tensor, best: Tensor, k: int) -> Tensor:
    """Probability that a positive is among the first k when ties stand in random order.

    Args:
        greater, tied, best: (Q,) int64 counts: negatives above, negatives level, positives level with the
            best positive.
    """
    miss = torch.ones(greater.shape, dtype=torch.float64, device=greater.device)
    # The i-th free place is filled from what is left of the tied negatives and the best positives.
    for i in range(k):
        left = (tied - i).clamp(min=0).double() / (tied + best - i).clamp(min=1).double()
        miss = torch.where(greater + i < k, miss * left, miss)
    return 1.0 - miss


def expected_rank(greater: Tensor, tied: Tensor, best: Tensor) -> Tensor:
    """Expected rank, from 1, of the first positive when ties stand in random order; arguments as
    hit_probability.
    """
    return greater + (tied + best + 1).double() / (best + 1).double()


def _median_guess(right: Tensor, candidates: int) -> float:
    """The median rank of the first of `right` (Q,) positives among `candidates` in random order."""
    place = torch.arange(candidates + 1, dtype=torch.float64, device=right.device)
    beyond = torch.zeros_like(place)
    for count, queries in zip(*(x.tolist() for x in right.unique(return_counts=True)), strict=True):
        none_before = torch.ones_like(place)
        for i in range(count):
            none_before *= ((candidates - place - i) / (candidates - i)).clamp(min=0)
        beyond += none_before * queries / len(right)
    low = int(torch.nonzero(beyond <= 0.5 + 1e-12)[0])
    high = int(torch.nonzero(beyond < 0.5 - 1e-12)[0])
    return (low + high) / 2


def _check(images: Tensor, texts: Tensor, index: Tensor | Sequence[int], distractors: bool) -> Tensor:
    if (
        images.ndim != 2
        or texts.ndim != 2
        or images.shape[1] != texts.shape[1]
        or not len(images)
        or not len(texts)
    ):
        raise ValueError(
            "retrieval expects image_features (N, D) and text_features (M, D) with N, M > 0; "
            f"got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    index = torch.as_tensor(index, dtype=torch.int64, device=images.device)
    if index.shape != (len(texts),):
        raise ValueError(f"text_to_image_index must be (M,) = ({len(texts)},); got {tuple(index.shape)}")
    if int(index.min()) < 0 or int(index.max()) >= len(images):
        row = int(torch.nonzero((index < 0) | (index >= len(images)))[0])
        raise ValueError(
            f"caption {row} names image {int(index[row])}, but there are images 0 to {len(images) - 1}"
        )
    check_features(images, "image_features")
    check_features(texts, "text_features")
    lonely = torch.nonzero(torch.bincount(index, minlength=len(images)) == 0)
    if len(lonely) and not distractors:
        raise ValueError(
            f"{len(lonely)} of {len(images)} images have no caption (first: image {int(lonely[0])}); give each a "
            "caption, or pass distractors=True to keep them as candidates only"
        )
    return index


def _counts(
    images: Tensor, texts: Tensor, index: Tensor, block: tuple[int, int], group: ProcessGroup | None
) -> tuple[list[Tensor], list[Tensor]]:
    """[greater, tied, best] of every image query and of every text query, each (N,) or (M,) int64."""
    device = images.device
    n, m = len(images), len(texts)
    # Equal vectors may get scores that differ by the rounding of a float64 dot product, as blocks are summed
    # in different orders: that much counts as level.
    tolerance = 4 * torch.finfo(torch.float64).eps * images.shape[1]
    tolerance *= float(images.norm(dim=1).max()) * float(texts.norm(dim=1).max())
    positive = torch.empty(m, dtype=torch.float64, device=device)
    for start in range(0, m, block[1]):
        rows = slice(start, start + block[1])
        positive[rows] = (images[index[rows]].double() * texts[rows].double()).sum(1)
    best_score = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
    best_score.scatter_reduce_(0, index, positive, "amax")
    level = (positive >= best_score[index] - tolerance).long()
    best = torch.zeros(n, dtype=torch.int64, device=device).scatter_add_(0, index, level)

    world, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    image_counts = torch.zeros(2, n, dtype=torch.int64, device=device)
    text_counts = torch.zeros(2, m, dtype=torch.int64, device=device)
    for top in range(rank * block[0], n, world * block[0]):
        x = images[top : top + block[0]].double()
        above, floor = (
            best_score[top : top + len(x), None] + tolerance,
            best_score[top : top + len(x), None] - tolerance,
        )
        for left in range(0, m, block[1]):
            columns = slice(left, min(left + block[1], m))
            scores = x @ texts[columns].double().T
            # A positive is never its own rival, in either direction.
            own = index[columns] - top
            inside = torch.nonzero((own >= 0) & (own < len(x))).squeeze(1)
            scores[own[inside], inside] = -torch.inf
            greater = torch.count_nonzero(scores > above, dim=1)
            image_counts[0, top : top + len(x)] += greater
            image_counts[1, top : top + len(x)] += torch.count_nonzero(scores >= floor, dim=1) - greater
            greater = torch.count_nonzero(scores > positive[columns] + tolerance, dim=0)
            text_counts[0, columns] += greater
            text_counts[1, columns] += (
                torch.count_nonzero(scores >= positive[columns] - tolerance, dim=0) - greater
            )
    if group is not None:
        torch.distributed.all_reduce(image_counts, group=group)
        torch.distributed.all_reduce(text_counts, group=group)
    return [*image_counts, best], [*text_counts, torch.ones_like(text_counts[0])]
