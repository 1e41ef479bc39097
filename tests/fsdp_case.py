"""Two steps of a small DualEncoder, whole or sharded by FSDP2, in a module that spawned ranks can import."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from clipkit.model import create_model
from clipkit.optim import WeightAverage, create_optimizer

TOKENIZER = SimpleNamespace(vocab_size=50, context_length=12, pad_id=0, sot_id=48, eot_id=49)
CONFIG = {
    "embed_dim": 24,
    "image_tower": {"name": "timm", "model": "test_resnet", "image_size": 32},
    "text_tower": {
        "name": "transformer",
        "width": 32,
        "layers": 2,
        "heads": 4,
        "activation_checkpointing": True,
    },
    "init_logit_bias": -1.0,
}


def two_steps(sharded: bool) -> dict[str, object]:
    """Losses, the clamped scale, and the final and averaged weights; every rank sees the same batch."""
    torch.manual_seed(0)
    model = create_model(CONFIG, tokenizer=TOKENIZER).train()
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for block in (*model.image_tower.blocks(), *model.text_tower.blocks()):
            fully_shard(block)
        fully_shard(model)
    # SGD: Adam's first steps are signs, which would turn a rounding difference of a zero gradient into a
    # whole step.
    optimizer = create_optimizer(model, name="sgd", lr=0.05, weight_decay=0.1)
    average = WeightAverage(model, decay=0.9)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, 48, (6, 12), generator=generator)
    text[:, 7] = 49
    batch = {
        "image": torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "text": text,
    }
    losses = []
    for _ in range(2):
        out = model(batch, ("image_features", "text_features", "logit_scale", "logit_bias"))
        logits = out["logit_scale"] * out["image_features"] @ out["text_features"].T + out["logit_bias"]
        loss = F.cross_entropy(logits, torch.arange(6)) + F.softplus(logits).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale(5.0)
        average.update(model)
        losses.append(loss.item())
    with average.applied(model):
        averaged = _whole(model)
    return {
        "losses": losses,
        "logit_scale": model.logit_scale.item(),
        "weights": _whole(model),
        "averaged": averaged,
    }


def _whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in state.items()}
