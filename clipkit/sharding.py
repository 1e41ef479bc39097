"""A model whose weights, gradients and optimizer state are split over ranks (FSDP2), and tensors whole or
split.

    shard(model)                                    # each block, then the rest; forward gathers what it needs
    optimizer = create_optimizer(model, ...)        # over the shards
    whole(model.state_dict())                       # every rank gets the full tensors

Checkpoints name every tensor of a run alike, split or not: "model.*", "loss.*", "average.*" and
"optimizer.N.KEY", the state of the N-th parameter. So a run that was saved sharded goes on whole, on another
number of ranks, and the other way round.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from clipkit.distributed import full_tensor

# Of a model, besides `forward`: what evaluation calls.
_METHODS = ("encode_image", "encode_text")


def shard(module: nn.Module) -> nn.Module:
    """Split the parameters over the default process group's ranks, in place, by FSDP2 (`fully_shard`).

    Each tower block is gathered when it runs and freed after, then comes the rest of the module as one unit.
    A module without trainable parameters stays as it is. Make the optimizer after this.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    for tower in (getattr(module, name, None) for name in ("image_tower", "text_tower")):
        for block in tower.blocks() if tower is not None else ():
            fully_shard(block)
    fully_shard(module)
    for method in _METHODS:
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)
    return module


def is_sharded(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether any of the tensors holds a rank's part alone."""
    return any(hasattr(tensor, "full_tensor") for tensor in tensors.values())


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor in full, detached. Gathers where they are split: call it on every rank, in the same order
    of names.
    """
    return {name: full_tensor(tensor.detach()) for name, tensor in tensors.items()}


def take_unsplit_of_rank_0(tensors: Mapping[str, torch.Tensor]) -> None:
    """Give every rank rank 0's values of what is not split, in place: BatchNorm's running statistics, which
    DDP broadcasts.
    """
    for tensor in tensors.values():
        if not hasattr(tensor, "full_tensor"):
            torch.distributed.broadcast(tensor.detach(), 0)


def split_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A full tensor, the same on every rank, as `like` is: this rank's part on its device, or the tensor
    itself.
    """
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    like = cast(DTensor, like)
    # Every rank holds the whole, so none needs to send it.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """{"optimizer.N.KEY": tensor}: the state of the N-th parameter in the order of the groups."""
    return {
        f"optimizer.{index}.{key}": value
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state_dict without its tensors."""
    saved = optimizer.state_dict()
    state = {
        index: {key: value for key, value in entries.items() if not isinstance(value, torch.Tensor)}
        for index, entries in saved["state"].items()
    }
    return {"state": state, "param_groups": saved["param_groups"]}


def load_optimizer(
    optimizer: torch.optim.Optimizer, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Restore `optimizer_settings` and `optimizer_tensors`, whole or split; a whole one is split as its
    parameter is.
    """
    parameters = optimizer_parameters(optimizer)
    state = {int(index): dict(entries) for index, entries in settings["state"].items()}
    for name, tensor in tensors.items():
        if not name.startswith("optimizer."):
            continue
        _, index, key = name.split(".", 2)
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            # In the parameter's memory format: a fused step walks through both as they lie in memory.
            placed = torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False)
            tensor = placed.copy_(tensor if hasattr(tensor, "full_tensor") else split_as(tensor, parameter))
        state[int(index)][key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters in the order that state_dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def read_shards(
    folder: Path, like: Callable[[str], torch.Tensor | None] | None = None, *, limit: int | None = None
) -> dict[str, torch.Tensor]:
    """Every tensor of a folder that torch.distributed.checkpoint wrote as safetensors; no rank waits for
    another.

    Args:
        like: of a name, the tensor to split it as, where shapes agree; None: in full, on the CPU.
        limit: bytes that all the tensors may have together.

    Raises:
        ValueError: something in it is no tensor, or they are larger than `limit`.
    """
    from torch.distributed.checkpoint import hf_storage, metadata, state_dict_loader

    reader = hf_storage.HuggingFaceStorageReader(str(folder))
    tensors, size = {}, 0
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise ValueError(f"{folder} holds {name}, which is no tensor: clipkit did not write it")
        size += math.prod(entry.size) * entry.properties.dtype.itemsize
        if limit is not None and size > limit:
            raise ValueError(f"{folder} states tensors of more than the {limit} bytes of its files")
        near = like(name) if like else None
        if near is not None and hasattr(near, "full_tensor") and near.shape == entry.size:
            tensors[name] = torch.empty_like(near, dtype=entry.properties.dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        # That no process group is asked for is meant.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        state_dict_loader.load(
            tensors, storage_reader=hf_storage.HuggingFaceStorageReader(str(folder)), no_dist=True
        )
    return tensors
