"""A small model, its batches and plain autograd's answer, for the tests of micro-batches.

"One graph" is plain autograd: the model is called on each micro-batch, everything is kept, and a single
backward runs through it. Of clipkit.grad_cache it uses the way of splitting rows alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from clipkit.grad_cache import split_batch

CLIP = ("image_features", "text_features", "logit_scale")
ALL = (*CLIP, "premise_features")


class Towers(nn.Module):
    """A convolutional image tower (BatchNorm optional) and a dropout Transformer layer over text."""

    def __init__(self, *, batch_norm=True, dropout=0.2, attention_dropout=0.2):
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.image = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, bias=False), norm(4), nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, stride=2, bias=False), norm(6), nn.ReLU(inplace=True),
            nn.Flatten(), nn.Linear(24, 8),
        )  # fmt: skip
        self.embedding = nn.Embedding(20, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.block.self_attn.dropout = attention_dropout
        self.log_logit_scale = nn.Parameter(torch.tensor([1.0]))

    def text(self, text):
        return F.normalize(self.block(self.embedding(text)).mean(1), dim=-1)

    def forward(self, batch, inputs=CLIP):
        features = {}
        if "image_features" in inputs:
            features["image_features"] = F.normalize(self.image(batch["image"]), dim=-1)
        if "text_features" in inputs:
            features["text_features"] = self.text(batch["text"])
        if "text_features_view2" in inputs:
            features["text_features_view2"] = self.text(batch["text"])
        for name in ("premise", "entailment", "contradiction"):
            if f"{name}_features" in inputs:
                features[f"{name}_features"] = self.text(batch[name])
        if "logit_scale" in inputs:
            features["logit_scale"] = self.log_logit_scale.exp()[0]
        return features


def contrastive(features):
    """Radford et al. 2021, figure 3, in plain torch."""
    logits = features["logit_scale"] * features["image_features"] @ features["text_features"].T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def with_premises(features):
    """A second term over a second stream, of another number of rows."""
    premise = features["premise_features"]
    spread = (premise @ premise.T).square().sum()
    return {"loss": contrastive(features) + 0.3 * spread, "spread": spread}


def make_batch(rows, premises=None, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "image": torch.randn(rows, 3, 12, 12, generator=generator, dtype=dtype),
        "text": torch.randint(0, 20, (rows, 5), generator=generator),
        "key": [f"{k:03d}" for k in range(rows)],
        "epoch": 3,
    }
    if premises:
        batch["premise"] = torch.randint(0, 20, (premises, 4), generator=generator)
    return batch


def one_graph(model, loss, batch, micro_batch_size, inputs):
    """All micro-batches' graphs at once, one backward; returns the terms."""
    parts = [model(part, inputs) for part in split_batch(batch, micro_batch_size)]
    whole = {k: torch.cat([p[k] for p in parts]) if parts[0][k].dim() else parts[0][k] for k in parts[0]}
    terms = loss(whole)
    terms = terms if isinstance(terms, dict) else {"loss": terms}
    terms["loss"].backward()
    return terms


def assert_same_gradients(model, reference, tolerance):
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if expected.grad is None:
            assert parameter.grad is None, name
            continue
        error = (parameter.grad - expected.grad).norm()
        # The second term is for gradients that are 0 but for rounding.
        assert error <= tolerance * expected.grad.norm() + 1e-15, (name, float(error / expected.grad.norm()))


def assert_same_state(model, reference, tolerance):
    for (name, value), expected in zip(
        model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        if not value.is_floating_point():
            assert torch.equal(value, expected), name
            continue
        error = float((value - expected).norm() / expected.norm().clamp_min(1e-3))
        assert error <= tolerance, (name, error)
