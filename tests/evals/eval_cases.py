"""A small dual encoder, and what spawned ranks run: importable by name."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from clipkit.evals import Encoder, evaluate, geometry_metrics, retrieval_metrics


def tokenize(texts: list[str]) -> torch.Tensor:
    """(B, 64) character codes."""
    return torch.tensor([[min(ord(c), 127) for c in text[:64].ljust(64)] for text in texts])


class TinyModel(nn.Module):
    """Seeded random towers over 8 x 8 pixels and over characters; counts what it is asked to encode."""

    def __init__(self, embed_dim: int = 16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image_tower = SimpleNamespace(image_size=32)
        self.pixels = nn.Parameter(torch.randn(3 * 8 * 8, embed_dim, generator=generator))
        self.characters = nn.Parameter(torch.randn(128, embed_dim, generator=generator))
        self.encoded = 0

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        assert image.dtype == torch.uint8 and not self.training and not torch.is_grad_enabled()
        self.encoded += len(image)
        small = nn.functional.avg_pool2d(image.float() / 255, 4).flatten(1)
        return nn.functional.normalize((small - small.mean(1, keepdim=True)) @ self.pixels, dim=1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.characters[tokens].cumsum(1).sum(1), dim=1)


def ties(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """40 images, 130 captions of small integers: hundreds of equal scores."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-2, 3, (40, 3), generator=generator).double()
    index = torch.cat([torch.arange(40), torch.randint(0, 40, (90,), generator=generator)])
    return images, torch.randint(-2, 3, (130, 3), generator=generator).double(), index


def failure(folder: str) -> str:
    """What this rank says of a folder whose last image is broken."""
    spec = {"kind": "zero_shot", "folder": folder, "templates": ["{}"]}
    try:
        evaluate(TinyModel(), tokenize, {"z": spec}, batch_size=1, group="auto")
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def rank_metrics(tasks: dict, broken: str) -> tuple:
    """Every metric that meets other ranks, with this process's group or alone."""
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    images, texts, index = ties(0)
    model = TinyModel().train()
    results = evaluate(model, tokenize, tasks, batch_size=7, group="auto")
    assert model.training
    order = Encoder(model, tokenize, batch_size=3, group=group).texts(
        [f"caption {i % 5} of {i}" for i in range(20)]
    )
    return (
        retrieval_metrics(images, texts, index, block=(7, 16), group=group),
        geometry_metrics(images, texts, index, block=9, group=group),
        results,
        order.tolist(),
        failure(broken),
    )


def skipped_metrics(tasks: dict) -> dict:
    """The metrics of sets with broken items, by every rank of a group."""
    return evaluate(TinyModel(), tokenize, tasks, batch_size=7, group="auto")
