"""What each rank of test_transforms runs; spawned processes import it, so it is no test file itself."""

from __future__ import annotations

import math

import gloo_cases
import torch
import torch.distributed as dist

from clipkit.losses import FastCLIP, create_loss

# Inputs that some cases have, by a word of their name.
_ONLY_IN = {
    "pair_ids": ("with positives", "with masks"),
    "sample_weight": ("weighted",),
    "content_features": ("content",),
}


def features(rows: slice) -> dict[str, torch.Tensor]:
    """A leaf for each float feature of these rows of the whole batch; the scalars are constants."""
    torch.manual_seed(3)
    made = gloo_cases.Model().double()(gloo_cases.whole_batch())
    made = {name: value.detach()[rows] if value.dim() else value.detach() for name, value in made.items()}
    return {n: v.requires_grad_() if v.dim() and v.is_floating_point() else v for n, v in made.items()}


def penalty_gradient(case: str, rows: slice, group, impl: str = "dense", how: str = "grad"):
    """d (sum over features of |dL/dx|^2) / dx of own rows, or the message of what refused it."""
    torch.manual_seed(4)
    spec = {name: dict(settings) for name, settings in gloo_cases.SPECS[case].items()}
    given = features(rows)
    given = getattr(gloo_cases, "chosen", lambda case, features: features)(case, given)
    for name, words in _ONLY_IN.items():
        if not any(word in case for word in words):
            given.pop(name, None)
    loss = create_loss(spec, group=group).double()
    leaves = [value for name, value in given.items() if value.requires_grad and name in loss.inputs]
    ranks = 1 if group is None else dist.get_world_size(group)
    try:
        first = torch.autograd.grad(
            loss(given)["loss"], leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        penalty = sum((gradient / ranks).square().sum() for gradient in first)
        if how == "backward":
            penalty.backward()
            return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        return torch.autograd.grad(penalty, leaves, allow_unused=True, materialize_grads=True)
    except (RuntimeError, NotImplementedError) as error:
        return str(error)


def fastclip_survives() -> dict[str, torch.Tensor]:
    """The state of a loss that met a batch with a NaN on the last rank alone, between two good ones."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    share = gloo_cases.N // ranks
    loss = FastCLIP(num_samples=40, gamma=0.4).double()
    for step in range(3):
        with torch.no_grad():
            given = features(slice(rank * share, (rank + 1) * share))
            if step == 1 and rank == ranks - 1:
                given["text_features"][0, 0] = math.nan
            loss(*(given[name] for name in loss.inputs))
    return loss.state_dict()


def run_rank() -> dict:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    share = gloo_cases.N // ranks
    rows = slice(rank * share, (rank + 1) * share)
    found = {
        (case, how): penalty_gradient(case, rows, dist.group.WORLD, how=how)
        for case in gloo_cases.SPECS
        for how in ("grad", "backward")
    }
    return {"second": found, "fastclip": fastclip_survives()}
