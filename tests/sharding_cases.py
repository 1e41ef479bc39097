"""What ranks do in tests/test_sharding.py, in a module that spawned processes can import."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, nn

from clipkit.checkpoint import load_checkpoint, save_sharded_checkpoint
from clipkit.sharding import optimizer_tensors, shard, take_unsplit_of_rank_0, whole


def small_run(width: int = 7) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with a buffer after one step of AdamW, split over the ranks."""
    torch.manual_seed(0)
    model = shard(nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(12.0).view(4, 3)).square().sum().backward()
    optimizer.step()


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def content(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return {
        "weights": named(model),
        "optimizer": optimizer_tensors(optimizer),
        "train_state": {"lr": 0.1},
        "config": {"seed": 0},
        "metrics": {"recall": 0.25},
        "group": distributed.new_group(backend="gloo"),
    }


def save_and_go_on(folder: str) -> dict[str, torch.Tensor]:
    """Everything in full, as it was when the checkpoint was asked for."""
    model, optimizer = small_run()
    expected = {
        name: tensor.clone()
        for name, tensor in whole({**named(model), **optimizer_tensors(optimizer)}).items()
    }
    future = save_sharded_checkpoint(folder, 5, **content(model, optimizer))
    for _ in range(20):
        step(model, optimizer)
    future.result()
    distributed.barrier()
    return expected


def loaded_parts(path: str) -> dict[str, torch.Tensor]:
    """This rank's part of each weight."""
    if distributed.get_world_size() == 1:
        return load_checkpoint(path)["weights"]
    model, _ = small_run()
    loaded = load_checkpoint(path, like=named(model).get)["weights"]
    return {
        name: tensor.to_local() if hasattr(tensor, "to_local") else tensor for name, tensor in loaded.items()
    }


def fill_the_disk(folder: str) -> str:
    """The first checkpoint fits; the second, with a tensor larger than the disk, must not."""
    model, optimizer = small_run()
    given = content(model, optimizer)
    save_sharded_checkpoint(folder, 1, **given).result()
    distributed.barrier()
    given["weights"] = {**given["weights"], "model.large": torch.ones(2_000_000)}
    try:
        save_sharded_checkpoint(folder, 2, **given).result()
    except OSError as error:
        outcome = str(error)
    else:
        outcome = "no error"
    distributed.barrier()
    assert Path(folder, "step_00000001").is_dir()
    return outcome


def statistics_of_rank_0() -> tuple[float, float]:
    """(a whole tensor, a split one's own part) after taking rank 0's."""
    rank = distributed.get_rank()
    model = shard(nn.Linear(1, 2, bias=False))
    split = model.state_dict()["weight"]
    split.to_local().fill_(rank + 1)
    plain = torch.full((1,), rank + 1.0)
    take_unsplit_of_rank_0({"running_mean": plain, "weight": split})
    return float(plain), float(split.to_local().flatten()[0])
