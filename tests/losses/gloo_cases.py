"""What each rank of the gradient-contract test runs; spawned processes import it, so it is no test file
itself.

A tiny model with linear towers, log scale, bias and a vocabulary head turns this rank's rows into features;
the loss's backward is averaged over all ranks as DDP would. One process on all rows is the same code on one
"rank".
"""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch import nn

from clipkit.kernels import pairs
from clipkit.losses import create_loss, distill, duplicates, list_losses
from clipkit.losses.registry import losses

N, D, IMAGE, TEXT, VOCABULARY = 8, 6, 5, 4, 7
NEAR = {"false_negative_threshold": 0.3}
SPECS = {
    "infonce": {"infonce": {}},
    "infonce smoothed": {"infonce": {"label_smoothing": 0.2}},
    "infonce with positives": {"infonce": {"same_ids": "positive", "label_smoothing": 0.1}},
    "infonce with masks": {"infonce": {"same_ids": "mask", "label_smoothing": 0.1}},
    "cyclic": {"cyclic": {}},
    "cyclic mean": {"cyclic": {"normalize": "mean", "in_modal": 3.0, "cross_modal": 0.5}},
    "sigmoid": {"sigmoid": {}},
    "sigmoid with positives": {"sigmoid": {"same_ids": "positive"}},
    "sigmoid with masks": {"sigmoid": {"same_ids": "mask"}},
    "simcse": {"simcse": {"temperature": 0.3}},
    "simcse with head": {"simcse": {"head": True, "embed_dim": D}},
    "nli_contrastive": {"nli_contrastive": {"temperature": 0.3}},
    "nli_contrastive weighted": {"nli_contrastive": {"hard_negative_weight": 2.5}},
    "nli_softmax": {"nli_softmax": {"embed_dim": D, "bias": True}},
    "infoloob": {"infoloob": {}},
    "cloob": {"cloob": {}},
    "fastclip": {"fastclip": {"gamma": 0.4, "gamma_decay_steps": 3, "num_samples": 40}},
    "fastclip growing": {"fastclip": {"gamma": 0.4}},
    "uniformity": {"uniformity": {}},
    "mlm": {"mlm": {}},
    "matryoshka": {"matryoshka": {"loss": "infonce", "dims": [2, 5, 6], "dim_weights": [0.5, 1.0, 2.0]}},
    "matryoshka of a classifier": {"matryoshka": {"loss": "nli_softmax", "dims": [3, 6]}},
    "slip": {"slip": {}},
    "slip with head": {"slip": {"head": True, "embed_dim": D, "hidden_dim": 5, "output_dim": 4}},
    "infonce with negatives": {"infonce": {"label_smoothing": 0.1}},
    "infonce with own negatives": {"infonce": {"hard_negatives": "own", "label_smoothing": 0.1}},
    "infonce weighted with positives": {"infonce": {"label_smoothing": 0.1}},
    "infonce masking near": {"infonce": {"false_negatives": "mask", "label_smoothing": 0.1, **NEAR}},
    "infonce sharing near": {"infonce": {"false_negatives": "share", "label_smoothing": 0.1, **NEAR}},
    "infonce sharing near content with positives": {"infonce": {"false_negatives": "share", **NEAR}},
    "sigmoid with negatives": {"sigmoid": {}},
    "sigmoid with own negatives": {"sigmoid": {"hard_negatives": "own"}},
    "sigmoid weighted": {"sigmoid": {}},
    "sigmoid masking near": {"sigmoid": {"false_negatives": "mask", **NEAR}},
    "sigmoid sharing near": {"sigmoid": {"false_negatives": "share", **NEAR}},
    "infoloob with own negatives weighted": {"infoloob": {"hard_negatives": "own"}},
    "nli_contrastive of several": {"nli_contrastive": {"hard_negative_weight": 2.5, "temperature": 0.3}},
    "infonce ring": {"infonce": {"overlap": "ring", "label_smoothing": 0.2}},
    "infonce ring with masks weighted": {"infonce": {"overlap": "ring", "same_ids": "mask"}},
    "infonce ring with negatives": {"infonce": {"overlap": "ring", "label_smoothing": 0.1}},
    "sigmoid ring": {"sigmoid": {"overlap": "ring"}},
    "sigmoid ring with masks weighted": {"sigmoid": {"overlap": "ring", "same_ids": "mask"}},
    "sigmoid ring with own negatives": {"sigmoid": {"overlap": "ring", "hard_negatives": "own"}},
    "matryoshka of a ring": {"matryoshka": {"dims": [2, 5, 6], "settings": {"overlap": "ring"}}},
    "a sum with a ring": {"infonce": {"overlap": "ring"}, "cyclic": {}, "sigmoid": {"overlap": "ring"}},
    "distill": {"distill": {}},
    "distill_features": {"distill_features": {"embed_dim": D, "teacher_dim": 9}},
    "distill_features weighted": {"distill_features": {"sides": ["text"], "embed_dim": D, "teacher_dim": 9}},
    "distill_relations": {"distill_relations": {}},
    "distill_contrastive": {"distill_contrastive": {"embed_dim": D, "teacher_dim": 9}},
    "distill_contrastive weighted": {
        "distill_contrastive": {"sides": ["image"], "embed_dim": D, "teacher_dim": 9}
    },
    "queue": {"queue": {"embed_dim": D, "size": 11}},
    "queue of sigmoid weighted": {"queue": {"loss": "sigmoid", "embed_dim": D, "size": 5}},
    "twice": {
        "infonce": {"weight": 0.7},
        "views": {
            "name": "infonce",
            "inputs": {"image_features": "image_features_view1", "text_features": "text_features_view2"},
        },
    },
    "a sum": {
        "infonce": {"weight": 0.7},
        "cyclic": {"weight": 2.0},
        "simcse": {"weight": 0.1},
        "nli_softmax": {"embed_dim": D},
    },
}
# A new loss has the contract asked of it under its defaults; one that needs settings gets a line above.
SPECS |= {name: {name: {}} for name in list_losses() if not any(name in spec for spec in SPECS.values())}
UNEVEN = ("cyclic", "nli_softmax", "mlm")
IMPLEMENTATIONS = ("dense", "chunked")


def has_implementations(case: str) -> bool:
    return any(
        name == "queue" or "impl" in inspect.signature(losses.get(settings.get("name", name))).parameters
        for name, settings in SPECS[case].items()
    )


class Model(nn.Module):
    """Linear towers, a vocabulary head, log scale and bias."""

    def __init__(self):
        super().__init__()
        self.image_tower = nn.Linear(IMAGE, D)
        self.text_tower = nn.Linear(TEXT, D)
        self.vocabulary = nn.Linear(D, VOCABULARY)
        self.log_logit_scale = nn.Parameter(torch.tensor(1.7))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        unit = nn.functional.normalize
        image = {
            name: unit(self.image_tower(data[name]), dim=-1)
            for name in data
            if name.startswith("image_features")
        }
        text_names = (
            "text_features",
            "text_features_view2",
            "premise_features",
            "entailment_features",
            "contradiction_features",
        )
        text_names += ("pair_premise_features", "pair_hypothesis_features")
        text = {name: unit(self.text_tower(data[name]), dim=-1) for name in text_names}
        negatives = {
            "hard_negative_features": unit(self.text_tower(data["hard_negatives"]), dim=-1),
            "hard_negative_image_features": unit(self.image_tower(data["hard_negative_images"]), dim=-1),
            "contradictions": unit(self.text_tower(data["contradictions"]), dim=-1),
        }
        return {
            **{name: value for name, value in data.items() if not value.is_floating_point()},
            **{name: data[name] for name in ("sample_weight", "content_features") if name in data},
            **{name: unit(data[name], dim=-1) for name in ("dist_image_features", "dist_text_features")},
            "dist_logit_scale": torch.tensor(3.0),
            **image,
            **text,
            **negatives,
            "mlm_logits": self.vocabulary(self.text_tower(data["mlm_logits"])),
            "logit_scale": self.log_logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def whole_batch() -> dict[str, torch.Tensor]:
    """The inputs of every row of the global batch."""
    generator = torch.Generator().manual_seed(7)

    def rows(*width: int) -> torch.Tensor:
        return torch.randn(N, *width, generator=generator, dtype=torch.float64)

    texts = (
        "text_features",
        "text_features_view2",
        "premise_features",
        "entailment_features",
        "contradiction_features",
    )
    texts += ("pair_premise_features", "pair_hypothesis_features", "mlm_logits")
    return {
        **{name: rows(IMAGE) for name in ("image_features", "image_features_view1", "image_features_view2")},
        **{name: rows(TEXT) for name in texts},
        "nli_labels": torch.tensor([0, 1, 2, 2, 1, 0, 1, 1]),
        "mlm_labels": torch.tensor([3, -100, -100, -100, 1, 6, 0, -100]),
        "pair_ids": torch.tensor([4, 1, 4, 2, 9, 9, 4, 5]),
        "sample_index": torch.tensor([31, 4, 0, 17, 8, 2, 39, 5]),
        "hard_negatives": rows(3, TEXT),
        "hard_negative_images": rows(1, IMAGE),
        "contradictions": rows(2, TEXT),
        "dist_image_features": rows(9),
        "dist_text_features": rows(9),
        "content_features": nn.functional.normalize(rows(3), dim=-1),
        "sample_weight": rows().abs() * torch.tensor([1, 1, 0, 1, 1, 1, 1, 1]),
    }


def chosen(case: str, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The features of a case: optional ones where its name says so."""
    features = dict(features)
    if "negatives" not in case:
        del features["hard_negative_features"], features["hard_negative_image_features"]
    if "of several" in case:
        features["contradiction_features"] = features["contradictions"]
    return features


def run(case: str, impl: str, rows: slice, group, loss_group="auto") -> dict[str, torch.Tensor]:
    """Value, gradients (averaged over `group`, if any) and buffers of a case on these rows."""
    torch.manual_seed(3)
    model = Model().double()
    spec = {name: dict(settings) for name, settings in SPECS[case].items()}
    for name, settings in spec.items():
        if "impl" in inspect.signature(losses.get(settings.get("name", name))).parameters:
            settings["impl"] = impl
        elif name == "queue":
            settings["settings"] = {"impl": impl}
    loss = create_loss(spec, group=loss_group).double()
    data = {name: value[rows] for name, value in whole_batch().items()}
    used = {"pair_ids": ("with positives", "with masks"), "sample_weight": ("weighted",)}
    used |= {"content_features": ("content",)}
    for name, words in used.items():
        if not any(word in case for word in words):
            del data[name]
    if next(loss.buffers(), None) is not None:
        # A step elsewhere gives a loss with a state something to remember.
        moved = {
            key: value * 0.5 + 0.1 if value.is_floating_point() else value for key, value in data.items()
        }
        with torch.no_grad():
            loss(chosen(case, model(moved)))
    out = loss(chosen(case, model(data)))
    out["loss"].backward()
    found = {f"value of {name}": value.detach() for name, value in out.items()}
    named = [*model.named_parameters(prefix="model"), *loss.named_parameters(prefix="loss")]
    named = [(name, parameter) for name, parameter in named if parameter.grad is not None]
    flat = torch.cat([parameter.grad.flatten() for _, parameter in named])
    if group is not None:
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
    parts = flat.split([parameter.numel() for _, parameter in named])
    found.update({f"gradient of {name}": part for (name, _), part in zip(named, parts, strict=True)})
    # log u of a sample not yet seen is -inf; its exponential can be compared.
    found.update(
        {
            f"state {name}": value.exp() if "log_u" in name else value.clone()
            for name, value in loss.named_buffers()
        }
    )
    return found


def half_features(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 images and texts of these rows of the global batch; no dot product of theirs is small."""
    generator = torch.Generator().manual_seed(11)
    x, y = torch.rand(2, N, 40, generator=generator, dtype=torch.float64).bfloat16()
    unit = nn.functional.normalize
    return tuple(unit(v.double(), dim=-1)[rows].bfloat16().requires_grad_() for v in (x, y))


def half_gradient(
    rows: slice, group="auto", dtype: torch.dtype = torch.bfloat16, overlap: str = "none"
) -> torch.Tensor:
    """What InfoNCE wants of this rank's texts, averaged over ranks as by DDP."""
    x, y = (v.detach().to(dtype).requires_grad_() for v in half_features(rows))
    settings = {"label_smoothing": 0.1, "impl": "chunked", "overlap": overlap}
    loss = create_loss({"infonce": settings}, group=group)
    loss({"image_features": x, "text_features": y, "logit_scale": 20.0})["loss"].backward()
    # The mean over W ranks of a gradient that one of them has.
    return y.grad


def run_rank() -> dict[tuple[str, str, str], dict[str, torch.Tensor]]:
    """Every case over the world, over pairs of ranks, and with uneven rows where allowed."""
    pairs.DEFAULT_CHUNK = 3
    # Blocks of three own rows.
    duplicates._BLOCK = distill._BLOCK = 3 * N
    ranks, rank = dist.get_world_size(), dist.get_rank()
    share = N // ranks
    rows = slice(rank * share, (rank + 1) * share)
    found = {f"half gradient {overlap}": half_gradient(rows, overlap=overlap) for overlap in ("none", "ring")}
    for case in SPECS:
        for impl in IMPLEMENTATIONS if has_implementations(case) else ("dense",):
            found[case, impl, "world"] = run(case, impl, rows, dist.group.WORLD)
    if ranks == 4:
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for case in SPECS:
            found[case, "dense", "halves"] = run(case, "dense", rows, dist.group.WORLD, halves[rank // 2])
    # Rank 0 has the most rows, the last none, and each between them one.
    most = N - ranks + 2
    uneven = slice(0, most) if rank == 0 else slice(most + rank - 1, most + rank)
    for case in UNEVEN:
        found[case, "dense", "uneven"] = run(case, "dense", uneven, dist.group.WORLD)
    try:
        run("infonce", "dense", uneven, None)
    except ValueError as error:
        found["refusal"] = str(error)
    return found
