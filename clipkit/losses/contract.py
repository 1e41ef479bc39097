"""Does a loss give the gradient of one process on the whole batch? Measure it, on gloo ranks of this machine.

    from functools import partial
    print(check_gradient_contract(partial(create_loss, "infonce"), world_size=4))

Two linear towers, a temperature and a bias are run twice in float64: by one process on all pairs, and by
`world_size` processes on their shares, whose gradients are averaged as DDP and FSDP average them. A ratio of
1, a cosine of 1 and equal values on all ranks are what training on more devices should change: nothing. Any
callable can be measured, whoever wrote it. Scripts that call this need the `if __name__ == "__main__":` guard
of spawned processes.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from clipkit.distributed import Group, launch, rank
from clipkit.grad_cache import cached_backward
from clipkit.losses.compose import WeightedSum
from clipkit.registry import unknown

_INPUTS = ("image_features", "text_features", "logit_scale")
# Feature -> the tower that makes it and the batch entry it is made from.
_FEATURES = {
    "image_features": ("image_tower", "image"),
    "image_features_view1": ("image_tower", "image_view1"),
    "image_features_view2": ("image_tower", "image_view2"),
    "text_features": ("text_tower", "text"),
    "text_features_view2": ("text_tower", "text_view2"),
    "premise_features": ("text_tower", "premise"),
    "entailment_features": ("text_tower", "entailment"),
    "contradiction_features": ("text_tower", "contradiction"),
    "pair_premise_features": ("text_tower", "pair_premise"),
    "pair_hypothesis_features": ("text_tower", "pair_hypothesis"),
}
# Feature -> the tower and the batch entry (rows, 2, _WIDTH) of each row's hard negatives.
_NEGATIVES = {
    "hard_negative_features": ("text_tower", "hard_negative"),
    "hard_negative_image_features": ("image_tower", "hard_negative_image"),
}
# Rows of unit norm that no tower makes, and their width.
_GIVEN = {"content_features": 3, "dist_image_features": 9, "dist_text_features": 9}
_PARAMETERS = {"logit_scale": "log_logit_scale", "logit_bias": "logit_bias", "mlm_logits": "mlm_head"}
_INTEGERS = {"pair_ids": None, "sample_index": None, "nli_labels": 3, "mlm_labels": 11}
_TOWERS = {**_FEATURES, **_NEGATIVES}
_WIDTH = 6  # of the towers' inputs


@dataclasses.dataclass(frozen=True)
class ParameterGradient:
    """One parameter's gradient, averaged over ranks, beside one process's.

    ratio: ||g|| / ||reference||, 1 is right. cosine: their direction, 1 is right (the sign, for a scalar).
    relative_error: ||g - reference|| / ||reference||; with a reference of 0, ||g|| and ratio and cosine are
        NaN.
    """

    name: str
    ratio: float
    cosine: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What `check_gradient_contract` measured; `print` shows it as a table.

    value_error: the largest |value - one process's value| of a rank, relative. value_spread: the largest
    relative difference between the values of one group's ranks. ok: all of these are within `tolerance`.
    """

    world_size: int
    micro_batches: int
    hybrid_group: int | None
    parameters: tuple[ParameterGradient, ...]
    value: float
    value_error: float
    value_spread: float
    tolerance: float

    @property
    def ok(self) -> bool:
        errors = [parameter.relative_error for parameter in self.parameters]
        # Written so that a NaN anywhere is a failure.
        return all(error <= self.tolerance for error in [*errors, self.value_error, self.value_spread])

    def __getitem__(self, name: str) -> ParameterGradient:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise unknown("parameter", name, [parameter.name for parameter in self.parameters])

    def __str__(self) -> str:
        split = f", {self.micro_batches} micro-batches a rank" if self.micro_batches > 1 else ""
        group = f", groups of {self.hybrid_group}" if self.hybrid_group else ""
        width = max(len(parameter.name) for parameter in self.parameters)
        lines = [
            f"{self.world_size} ranks{group}{split} against one process (tolerance {self.tolerance:.0e})"
        ]
        lines.append(f"  {'gradient of':{width}}  {'ratio':>8}  {'cosine':>8}  {'error':>8}")
        for p in self.parameters:
            lines.append(f"  {p.name:{width}}  {p.ratio:8.4f}  {p.cosine:8.4f}  {p.relative_error:8.1e}")
        errors = f"error {self.value_error:.1e}, spread over ranks {self.value_spread:.1e}"
        lines.append(f"  value {self.value:.6g}, {errors}")
        lines.append(f"  {'holds' if self.ok else 'DOES NOT HOLD'}")
        return "\n".join(lines)


Loss = Callable[..., torch.Tensor | dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class ContractCase:
    """One measurement: the arguments of `check_gradient_contract`, without the world size."""

    loss_fn: Callable[..., Loss]
    reference_fn: Callable[..., Loss] | None = None
    batch_size: int = 16
    embed_dim: int = 8
    inputs: Sequence[str] | None = None
    micro_batches: int = 1
    hybrid_group: int | None = None
    backward: Callable[..., dict[str, torch.Tensor]] = cached_backward
    logit_scale: float = 5.0
    logit_bias: float = -1.0
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10
    seed: int = 0


def check_gradient_contract(
    loss_fn: Callable[..., Loss],
    *,
    reference_fn: Callable[..., Loss] | None = None,
    world_size: int = 4,
    batch_size: int = 16,
    embed_dim: int = 8,
    inputs: Sequence[str] | None = None,
    micro_batches: int = 1,
    hybrid_group: int | None = None,
    backward: Callable[..., dict[str, torch.Tensor]] = cached_backward,
    logit_scale: float = 5.0,
    logit_bias: float = -1.0,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
    seed: int = 0,
    timeout_s: float = 300.0,
) -> GradientReport:
    """Compare the gradients of `loss_fn`'s loss on `world_size` ranks with those of one process on the whole
    batch.

    Args:
        loss_fn: makes the loss, in each process; picklable, so a function or class importable by name, or a
            functools.partial of one. Where it accepts `group`, it gets the ranks' group with `hybrid_group`.
        reference_fn: makes the loss that one process computes, where that is to be another; None: loss_fn.
        world_size: gloo ranks, each with batch_size / world_size consecutive pairs.
        batch_size: pairs N of the whole batch.
        embed_dim: columns D of the features.
        inputs: features that the loss takes by keyword; None reads the loss's `inputs`, else the three of a
            CLIP loss. A WeightedSum takes them as one dict.
        micro_batches: parts that each rank's share is split into, through `backward`.
        hybrid_group: ranks a group; each group is a loss of its own and the reference is the mean of them.
        backward: how a rank comes from features to gradients, called as `cached_backward` is.
        logit_scale, logit_bias: their values; the parameters are log(logit_scale) and logit_bias, of shape
            (1,).
        tolerance: what `report.ok` allows as relative error.

    Raises:
        ValueError: shares that do not come out even, an unknown input, a loss_fn that cannot be pickled.
        RuntimeError: a rank failed (its traceback is in the message), or torch.distributed already runs here.
    """
    case = ContractCase(
        loss_fn, reference_fn, batch_size, embed_dim, inputs, micro_batches, hybrid_group, backward,
        logit_scale, logit_bias, dtype, tolerance, seed,
    )  # fmt: skip
    return check_gradient_contracts({"loss": case}, world_size=world_size, timeout_s=timeout_s)["loss"]


def check_gradient_contracts(
    cases: Mapping[str, ContractCase], *, world_size: int = 4, timeout_s: float = 300.0
) -> dict[str, GradientReport]:
    """`check_gradient_contract` for many cases on the same ranks, which start once."""
    if dist.is_available() and dist.is_initialized():
        raise RuntimeError(
            "torch.distributed runs in this process already: call from one that has no process group"
        )
    for name, case in cases.items():
        _check(name, case, world_size)
    if world_size == 1:
        ranks = [{name: _measure(case, 1) for name, case in cases.items()}]
    else:
        ranks = launch(_measure_all, world_size, dict(cases), timeout_s=timeout_s)
    return {
        name: _compare(case, world_size, [result[name] for result in ranks]) for name, case in cases.items()
    }


def _check(name: str, case: ContractCase, world_size: int) -> None:
    if (
        case.batch_size % world_size
        or case.batch_size // world_size < case.micro_batches
        or case.micro_batches < 1
    ):
        raise ValueError(
            f"{name}: batch_size {case.batch_size} over {world_size} ranks in {case.micro_batches} micro-"
            "batches does not give every rank the same number of pairs and every micro-batch at least one"
        )
    if case.hybrid_group is not None and (case.hybrid_group < 1 or world_size % case.hybrid_group):
        raise ValueError(f"{name}: hybrid_group {case.hybrid_group} does not divide the {world_size} ranks")
    known = [*_TOWERS, *_GIVEN, *_PARAMETERS, *_INTEGERS, "sample_weight", "dist_logit_scale"]
    for given in case.inputs or ():
        if given not in known:
            raise unknown("input", given, known)
    try:
        pickle.dumps(case)
    except Exception as error:
        raise ValueError(
            f"{name}: loss_fn cannot be sent to another process ({error}): give a function or class that is "
            "importable by name, or a functools.partial of one, not a lambda or a local function"
        ) from error


class _Towers(nn.Module):
    """Linear towers that make any of `inputs`, with a parameter for each thing asked for and no other."""

    def __init__(self, case: ContractCase, inputs: Sequence[str]):
        super().__init__()
        towers = {_TOWERS[name][0] for name in inputs if name in _TOWERS}
        towers |= {"text_tower"} if "mlm_logits" in inputs else set()
        for tower in sorted(towers):
            self.add_module(tower, nn.Linear(_WIDTH, case.embed_dim))
        if "logit_scale" in inputs:
            self.log_logit_scale = nn.Parameter(torch.tensor([math.log(case.logit_scale)]))
        if "logit_bias" in inputs:
            self.logit_bias = nn.Parameter(torch.tensor([case.logit_bias]))
        if "mlm_logits" in inputs:
            self.mlm_head = nn.Linear(case.embed_dim, _INTEGERS["mlm_labels"])

    def forward(self, batch: Mapping[str, torch.Tensor], inputs: Sequence[str]) -> dict[str, torch.Tensor]:
        features = {}
        for name in inputs:
            if name in _TOWERS:
                tower, entry = _TOWERS[name]
                features[name] = nn.functional.normalize(self.get_submodule(tower)(batch[entry]), dim=-1)
            elif name == "logit_scale":
                features[name] = self.log_logit_scale.exp()[0]
            elif name == "logit_bias":
                features[name] = self.logit_bias[0]
            elif name == "dist_logit_scale":
                features[name] = torch.tensor(3.0, dtype=next(iter(batch.values())).dtype)
            elif name == "mlm_logits":
                features[name] = self.get_submodule("mlm_head")(
                    self.get_submodule("text_tower")(batch["tokens"])
                )
            else:
                features[name] = batch[name]
        return features


def _make_batch(case: ContractCase) -> dict[str, torch.Tensor]:
    """The whole batch, the same in every process: an image is near its text, a text near its second view."""
    generator = torch.Generator().manual_seed(case.seed)
    rows = case.batch_size
    # Drawn in float32 and cast, so that precisions are compared on the same numbers.
    shared = torch.randn(rows, _WIDTH, generator=generator)
    entries = [entry for _, entry in _FEATURES.values()] + ["tokens"]
    batch = {
        name: (shared + 0.5 * torch.randn(rows, _WIDTH, generator=generator)).to(case.dtype)
        for name in entries
    }
    batch["sample_index"] = torch.randperm(rows, generator=generator)
    batch["pair_ids"] = torch.randint(0, max(2, 3 * rows // 4), (rows,), generator=generator)
    for name, classes in _INTEGERS.items():
        if classes:
            batch[name] = torch.randint(0, classes, (rows,), generator=generator)
    for _, entry in _NEGATIVES.values():
        batch[entry] = torch.randn(rows, 2, _WIDTH, generator=generator).to(case.dtype)
    for name, width in _GIVEN.items():
        vectors = torch.randn(rows, width, generator=generator).to(case.dtype)
        batch[name] = nn.functional.normalize(vectors, dim=-1)
    batch["sample_weight"] = torch.rand(rows, generator=generator).to(case.dtype)
    return batch


def _measure_all(cases: dict[str, ContractCase]) -> dict[str, tuple]:
    groups: dict[int | None, Group] = {None: None}
    for case in cases.values():
        size = case.hybrid_group
        if size is not None and size not in groups:
            # Every rank takes part in making every group, and keeps its own.
            made = [dist.new_group(list(range(k, k + size))) for k in range(0, dist.get_world_size(), size)]
            groups[size] = cast("Group", made[rank() // size])
    return {
        name: _measure(case, dist.get_world_size(), groups[case.hybrid_group]) for name, case in cases.items()
    }


def _measure(case: ContractCase, ranks: int, group: Group = None) -> tuple[float, dict[str, torch.Tensor]]:
    """This rank's value, and every parameter's gradient averaged over the ranks."""
    settings = {}
    if case.hybrid_group is not None and "group" in inspect.signature(case.loss_fn).parameters:
        settings["group"] = group
    start = rank() * (case.batch_size // ranks)
    value, gradients = _gradients(case, slice(start, start + case.batch_size // ranks), settings)
    if ranks == 1:
        return value, gradients
    # One collective for all of them: gloo's cost is per call.
    flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
    dist.all_reduce(flat)
    pieces = (flat / ranks).split([gradient.numel() for gradient in gradients.values()])
    shapes = [(name, gradient.shape) for name, gradient in gradients.items()]
    return value, {name: piece.view(shape) for (name, shape), piece in zip(shapes, pieces, strict=True)}


def _gradients(
    case: ContractCase, rows: slice, settings: Mapping[str, Any]
) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(case.seed)
    loss = case.loss_fn(**settings)
    own = tuple(getattr(loss, "inputs", _INPUTS)) if case.inputs is None else tuple(case.inputs)
    torch.manual_seed(case.seed + 1)
    model = _Towers(case, own).to(case.dtype)
    if isinstance(loss, nn.Module):
        loss = loss.to(case.dtype)
    batch = {name: value[rows] for name, value in _make_batch(case).items()}
    per_part = -(-(rows.stop - rows.start) // case.micro_batches)
    terms = case.backward(model, _OnFeatures(loss, own), batch, micro_batch_size=per_part, inputs=own)
    named = dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        named |= {f"loss.{name}": parameter for name, parameter in loss.named_parameters()}
    zero = torch.zeros_like
    return float(terms["loss"]), {n: zero(p) if p.grad is None else p.grad.clone() for n, p in named.items()}


class _OnFeatures:
    """The loss as a callable on a feature dict: WeightedSum takes it as it is, any other by keyword."""

    def __init__(self, loss: Loss, inputs: Sequence[str]):
        self.loss, self.inputs, self.takes_dict = loss, tuple(inputs), isinstance(loss, WeightedSum)

    def __call__(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        return (
            self.loss(features)
            if self.takes_dict
            else self.loss(**{name: features[name] for name in self.inputs})
        )


def _compare(case: ContractCase, world_size: int, ranks: list[tuple]) -> GradientReport:
    # The reference is one plain graph: no micro-batches, no way of accumulating but autograd's.
    loss_fn = case.reference_fn or case.loss_fn
    plain = dataclasses.replace(case, loss_fn=loss_fn, micro_batches=1, backward=cached_backward)
    groups = 1 if case.hybrid_group is None else world_size // case.hybrid_group
    rows = case.batch_size // groups
    settings = {}
    if case.hybrid_group is not None and "group" in inspect.signature(loss_fn).parameters:
        settings["group"] = None
    references = [_gradients(plain, slice(g * rows, (g + 1) * rows), settings) for g in range(groups)]
    parameters = []
    for name, gradient in ranks[0][1].items():
        reference = torch.stack([gradients[name] for _, gradients in references]).sum(0) / groups
        parameters.append(_parameter(name, gradient.double(), reference.double()))
    values = torch.tensor([value for value, _ in ranks], dtype=torch.float64).view(groups, -1)
    expected = torch.tensor([value for value, _ in references], dtype=torch.float64)[:, None]
    size = expected.abs().clamp_min(1e-300)
    spread = ((values.amax(1) - values.amin(1)) / size[:, 0]).max()
    error = ((values - expected).abs() / size).max()
    return GradientReport(
        world_size, case.micro_batches, case.hybrid_group, tuple(parameters),
        float(expected.mean()), float(error), float(spread), case.tolerance,
    )  # fmt: skip


def _parameter(name: str, gradient: torch.Tensor, reference: torch.Tensor) -> ParameterGradient:
    norm, expected = float(gradient.norm()), float(reference.norm())
    if expected == 0:
        return ParameterGradient(name, math.nan, math.nan, norm)
    cosine = float((gradient * reference).sum()) / (norm * expected) if norm else math.nan
    return ParameterGradient(name, norm / expected, cosine, float((gradient - reference).norm()) / expected)
