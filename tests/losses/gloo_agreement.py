"""What each rank of the agreement test runs: one rank gets a bad input of each kind, then all get good ones.

Spawned processes import it, so it is no test file itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import gloo_cases
import torch
import torch.distributed as dist

from clipkit.losses import create_loss, list_losses

BAD_RANK = 1
# On more than two ranks: what has options, and sums.
OF_MANY = ("infonce", "sigmoid", "queue", "nli_softmax", "matryoshka", "a sum", "a list", "a ring")
# One spec of every registered loss, and a sum.
SPECS = {
    name: next(
        spec for case, spec in gloo_cases.SPECS.items() if list(spec) == [name] and "growing" not in case
    )
    for name in list_losses()
}
SPECS["a sum"] = gloo_cases.SPECS["a sum"]
SPECS["infonce"] = {"infonce": {"false_negatives": "mask"}}
SPECS["a ring"] = {"infonce": {"overlap": "ring"}, "sigmoid": {"overlap": "ring"}}
SPECS["a list"] = {"infonce": {}, "cyclic": {}, "uniformity": {}, "sigmoid": {}}


def _alone(change: Callable[[torch.Tensor], object]) -> Callable[[dict, str], None]:
    def spoil(features: dict, name: str) -> None:
        features[name] = change(features[name])

    return spoil


def _all(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, str], None]:
    """Of every feature on the rank: what one process alone would take, and the group cannot."""

    def spoil(features: dict, name: str) -> None:
        for key, value in features.items():
            if torch.is_tensor(value) and value.ndim == 2:
                features[key] = change(value)

    return spoil


def _narrow(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x[:, :-1].detach(), dim=-1)


FEATURES = {
    "a vector": _alone(lambda x: x[0]),
    "integers": _alone(lambda x: x.long()),
    "another width": _alone(_narrow),
    "another width of all": _all(_narrow),
    "another type of all": _all(lambda x: x.float()),
    "a list": _alone(lambda x: x.tolist()),
    "none": _alone(lambda x: None),
}
NORMS = {"off unit norm": _alone(lambda x: x * 3)}
SCALARS = {
    "a vector": _alone(lambda x: x.expand(4)),
    "a word": _alone(lambda x: "7"),
    "none": _alone(lambda x: None),
}
IDS = {
    "too few": _alone(lambda x: x[1:]),
    "floats": _alone(lambda x: x.double()),
    "another type": _alone(lambda x: x.int()),
    "out of range": _alone(lambda x: x * 0 - 7),
}


WEIGHTS = {
    "too few": _alone(lambda x: x[1:]),
    "a matrix": _alone(lambda x: x[:, None]),
    "below 0": _alone(lambda x: x - 10),
    "a list": _alone(lambda x: x.tolist()),
    "another type": _alone(lambda x: x.float()),
    "none": _alone(lambda x: None),
}


def kinds(loss, key: str, value: torch.Tensor) -> dict[str, Callable[[dict, str], None]]:
    if key in ("logit_scale", "logit_bias", "dist_logit_scale"):
        return SCALARS
    if not value.is_floating_point():
        # Any int64 is an id; the sum's ids differ by rank as they should.
        return {name: kind for name, kind in IDS.items() if key != "pair_ids" or name != "out of range"}
    if key == "sample_weight":
        return WEIGHTS
    unit = {} if "mlm" in key or "pair_" in key or "matryoshka" in loss.terms else NORMS
    return {**FEATURES, **unit}


def attempt(loss, features: dict) -> str:
    try:
        loss(features)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def build(spec: dict):
    torch.manual_seed(4)
    return create_loss(spec).double()


def run_both() -> dict[str, dict]:
    """The gradient contract's findings and this file's, from ranks that start once."""
    return {"contract": gloo_cases.run_rank(), "agreement": run_rank()}


def run_rank() -> dict[tuple[str, ...], object]:
    warnings.simplefilter("ignore")
    rank, share = dist.get_rank(), gloo_cases.N // dist.get_world_size()
    torch.manual_seed(3)
    model, found = gloo_cases.Model().double(), {}
    data = {k: v[rank * share : (rank + 1) * share] for k, v in gloo_cases.whole_batch().items()}
    with torch.no_grad():
        features = model(data)
        for case, spec in SPECS.items():
            if dist.get_world_size() > 2 and case not in OF_MANY:
                continue
            loss = build(spec)
            read = (
                *loss.inputs,
                *(loss.optional_inputs if case in ("infonce", "sigmoid", "infoloob") else ()),
            )
            given = {key: features[key] for key in read}
            for key in read:
                for kind, spoil in kinds(loss, key, given[key]).items():
                    bad = dict(given)
                    if rank == BAD_RANK:
                        spoil(bad, key)
                    found[case, key, kind] = attempt(loss, bad)
            if case not in gloo_cases.UNEVEN:
                for kind, rows in (("fewer rows", share - 1), ("no rows", 0)):
                    keep = rows if rank == BAD_RANK else share
                    short = {k: v[:keep] if v.ndim else v for k, v in given.items()}
                    found[case, "every input", kind] = attempt(loss, short)
            poisoned = dict(given)
            first = next(key for key in read if given[key].ndim == 2)
            if rank == BAD_RANK:
                poisoned[first] = given[first] * torch.nan
            if case not in ("fastclip", "mlm"):
                found[case, first, "nan"] = float(loss(poisoned)["loss"])
            # No rank is a collective ahead: a good batch is as it was.
            found[case, "good"] = (
                float(build(spec)(given)["loss"]),
                float(loss(given)["loss"]),
            )
    return found
