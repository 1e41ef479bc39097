"""The shape of the joint embedding space: alignment, uniformity, modality gap, consistency.

    align_l2    mean over pairs of ||x - y||^2                       Wang and Isola (2020), section 4.1, alpha = 2
    uniform_i   log mean over i != j of exp(-2 ||x_i - x_j||^2)      the same, t = 2; lower is more uniform
    uniform_t   the same among captions
    uniform_it  the same over every image and every caption of another image
    modality_gap  ||mean of x - mean of y||                          Liang et al. (2022), section 2

Sums run over float64 blocks, so no matrix of all pairs is held.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from clipkit.evals.encoder import check_features
from clipkit.evals.interval import Scored, mean_of


def geometry_metrics(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image_index: Tensor,
    *,
    block: int = 2048,
    group: ProcessGroup | None = None,
) -> dict[str, float]:
    """align_l2, uniform_i, uniform_t, uniform_it and modality_gap of unit-norm features.

    Args:
        image_features: (N, D), N > 1.
        text_features: (M, D), M > 1.
        text_to_image_index: (M,), the image of each caption.
        block: rows and columns of one block of distances.
        group: every rank passes the whole features and sums its share of the blocks.
    """
    check_features(image_features, "image_features")
    check_features(text_features, "text_features")
    if len(image_features) < 2 or len(text_features) < 2:
        raise ValueError(
            f"geometry needs at least two images and two captions; got {len(image_features)} and {len(text_features)}"
        )
    x, y = image_features.double(), text_features.double()
    rows, captions = torch.arange(len(x), device=x.device), torch.arange(len(y), device=y.device)
    return {
        "align_l2": float((x[text_to_image_index] - y).square().sum(1).mean()),
        "uniform_i": _uniformity(x, x, rows, rows, block, group),
        "uniform_t": _uniformity(y, y, captions, captions, block, group),
        "uniform_it": _uniformity(x, y, rows, text_to_image_index, block, group),
        "modality_gap": float((x.mean(0) - y.mean(0)).norm()),
    }


def _uniformity(
    x: Tensor, y: Tensor, x_id: Tensor, y_id: Tensor, block: int, group: ProcessGroup | None
) -> float:
    """log mean exp(-2 ||x_i - y_j||^2) over i, j of different ids; -inf-free: a unit sphere's terms are at
    least e^-8.
    """
    world, rank = (group.size(), group.rank()) if group is not None else (1, 0)
    total = torch.zeros(2, dtype=torch.float64, device=x.device)
    for top in range(rank * block, len(x), world * block):
        for left in range(0, len(y), block):
            a, b = x[top : top + block], y[left : left + block]
            squared = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_(min=0)
            different = x_id[top : top + block, None] != y_id[left : left + block]
            total[0] += squared.mul_(-2).exp_().mul_(different).sum()
            total[1] += different.sum()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    if total[1] == 0:
        raise ValueError("uniformity needs pairs that do not belong together; every pair given does")
    return float((total[0] / total[1]).log())


def consistency_scores(
    image_features: Tensor,
    classifier: Tensor,
    train_features: Tensor,
    train_labels: Tensor,
    *,
    k: tuple[int, ...] = (1, 3, 5, 10),
    scored: dict[str, Scored] | None = None,
) -> dict[str, float]:
    """How often image space and text space predict the same class (CyCLIP: Goel et al., 2022, section 4.1).

    The text space's prediction is the zero-shot class, of equally near ones each as likely, so that classes with one
    prompt neither gain nor lose. The image space's is the majority among the k nearest training images. A tied vote
    goes to the class of the nearest image among the tied ones; equally near images stand in their order.

    Args:
        image_features: (N, D) test images, unit norm.
        classifier: (K, D) zero-shot class weights.
        train_features, train_labels: (T, D) unit norm and (T,) int64 in 0..K-1; T at least max(k).
        scored: is filled with each metric's test images, for `clipkit.evals.interval`, and its chance level.

    Returns:
        `consistency@k` as fractions of 1.
    """
    for name, features in (("image_features", image_features), ("train_features", train_features)):
        check_features(features, name)
    if len(train_features) < max(k):
        raise ValueError(
            f"consistency at k = {max(k)} needs as many training images; got {len(train_features)}"
        )
    agree: dict[int, list[Tensor]] = {nearest: [] for nearest in k}
    level: list[Tensor] = []
    tolerance = 4 * torch.finfo(torch.float64).eps * image_features.shape[1]
    train, weights = train_features.double(), classifier.double()
    for start in range(0, len(image_features), 1024):
        x = image_features[start : start + 1024].double()
        scores = x @ weights.T
        nearest_classes = (scores >= scores.amax(1, keepdim=True) - tolerance).double()
        level.append(nearest_classes.sum(1) > 1)
        likely = nearest_classes / nearest_classes.sum(1, keepdim=True)
        order = (x @ train.T).sort(dim=1, descending=True, stable=True).indices[:, : max(k)]
        neighbours = train_labels[order]
        for nearest in k:
            agree[nearest].append(likely.gather(1, majority(neighbours[:, :nearest])[:, None]).squeeze(1))
    found = {f"consistency@{nearest}": torch.cat(parts) for nearest, parts in agree.items()}
    if scored is not None:
        ties, guess = torch.cat(level), 1 / len(classifier)
        scored |= {name: mean_of(values, chance=guess, tied=ties) for name, values in found.items()}
    return {name: float(values.mean()) for name, values in found.items()}


def majority(labels: Tensor) -> Tensor:
    """(Q,) the commonest of each row of (Q, k) labels; among equally common ones that which comes first in
    the row.
    """
    votes = (labels[:, :, None] == labels[:, None, :]).sum(2)
    # argmax takes the first of equal maxima only by luck: make earlier places win.
    place = torch.arange(labels.shape[1], device=labels.device)
    return labels.gather(1, (votes * (labels.shape[1] + 1) - place).argmax(1, keepdim=True)).squeeze(1)
