"""Steps of every Hugging Face type, whole, sharded by FSDP2 or averaged by DDP, in a module that spawned ranks can import."""

from __future__ import annotations

from typing import Any

import torch

from clipkit.optim import create_optimizer
from clipkit.sharding import shard
from tests.towers.hf_types import DROPOUT, NO_BLOCKS, dual, texts


def trained(names: list[str], way: str) -> dict[str, dict[str, Any]]:
    """Losses and final weights of two steps by name; every rank sees the same texts."""
    return {name: _two_steps(name, way) for name in names}


def _two_steps(name: str, way: str) -> dict[str, Any]:
    still: dict[str, Any] = {f"{kind}_dropout": 0.0 for kind in DROPOUT[name]}
    model: Any = dual(name, {**still, "activation_checkpointing": name not in NO_BLOCKS}).train()
    # Text alone: the image tower would have no gradient.
    model.image_tower.requires_grad_(False), model.image_projection.requires_grad_(False)
    model.log_logit_scale.requires_grad_(False)
    encode = model
    if way == "fsdp":
        model = encode = shard(model)
    elif way == "ddp":
        encode = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = create_optimizer(model, name="sgd", lr=0.05, weight_decay=0.1)
    padded, _ = texts()
    losses = []
    for _ in range(2):
        features = encode({"text": padded}, ("text_features",))["text_features"]
        loss = (features @ features.T - torch.eye(len(features))).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = {key: one.detach() for key, one in model.state_dict().items()}
    whole = {
        key: (one.full_tensor() if hasattr(one, "full_tensor") else one).clone() for key, one in state.items()
    }
    return {"losses": losses, "weights": whole}
