"""From a config's `loss` to one module: build each term by name, route features to it, add the terms up."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, resolve_group
from clipkit.losses.checks import agreed, check_number, takes_ranks
from clipkit.losses.registry import losses
from clipkit.registry import check_keys, suggest, unknown

_MODEL = "the model's forward: pass it this loss's `inputs`"
_SUPPLIED_BY = {
    "image_features": _MODEL,
    "text_features": _MODEL,
    "logit_scale": _MODEL,
    "logit_bias": "the model's init_logit_bias",
}


class WeightedSum(nn.Module):
    """sum_k weight_k L_k over a dict of features; each term receives the features it names in its `inputs`.

    Args:
        terms: name to loss module, at least one.
        weights: name to weight, finite and >= 0; 1.0 where absent. A term of weight 0 is computed and
            reported, but adds nothing.
        renamed: name of a term to {input as the loss names it: feature to take}.

    Attributes:
        inputs: the features that the terms need together; give them to the model, which makes just those
            passes.
        optional_inputs: features that some term uses where they are present.

    Raises:
        ValueError: no terms, a weight for no term, a weight that is negative or not finite, or another name for
            an input that a term does not have.
    """

    # torch types a module's call as Any.
    __call__: Callable[..., dict[str, Tensor]]

    def __init__(
        self,
        terms: Mapping[str, nn.Module],
        weights: Mapping[str, float] | None = None,
        renamed: Mapping[str, Mapping[str, str]] | None = None,
    ):
        super().__init__()
        if not terms:
            raise ValueError(
                "the loss is empty: name at least one term, such as loss=clip or loss=[infonce]. Losses: "
                f"{', '.join(losses.names())}"
            )
        weights = dict(weights or {})
        check_keys(weights, terms, "the weights")
        for name in terms:
            if name == "loss":
                raise ValueError("a term cannot be called 'loss': that key holds the weighted sum")
        self.terms: Any = nn.ModuleDict(dict(terms))
        self.weights = {
            name: check_number(f"the weight of {name}", weights.get(name, 1.0), 0.0) for name in terms
        }
        check_keys(renamed or {}, terms, "the renamed inputs")
        self._renamed: dict[str, dict[str, str]] = {
            name: dict((renamed or {}).get(name, {})) for name in terms
        }
        self._reads = {name: _reads(name, term, self._renamed[name]) for name, term in terms.items()}
        self._shares = [name for name, term in terms.items() if takes_ranks(term)]
        self.inputs = _union(needed for needed, _ in self._reads.values())
        optional = _union(optional for _, optional in self._reads.values())
        self.optional_inputs = tuple(name for name in optional if name not in self.inputs)

    def forward(
        self,
        features: Mapping[str, Any] | None = None,
        *,
        output_dict: bool = False,
        **named: Any,
    ) -> dict[str, Tensor]:
        """{"loss": (), "<term>": () unweighted, ...}.

        The terms meet the group's ranks together: their inputs are checked and each feature is gathered once.

        Args:
            features: name to tensor; what no term names is ignored.
            output_dict: for loops that add up what they get, as open_clip's, which calls
                `loss(**model_out, output_dict=True)`: {"<term>": () weighted, ...}, whose sum is the loss.
            named: features as keywords, in place of `features`.

        Raises:
            ValueError: a term's input is missing (the message says which setting supplies it), or refused by
                it, on any rank.
        """
        if features is None:
            features = named
        elif named:
            raise ValueError(f"give the features as one mapping or as keywords, not both: {', '.join(named)}")
        shared = self._meet(features)
        values = {
            name: term(**self._given(name, features), **shared.get(name, {}))
            for name, term in self.terms.items()
        }
        weighted = {name: self.weights[name] * value for name, value in values.items()}
        return weighted if output_dict else {"loss": reduce(torch.add, weighted.values()), **values}

    def _meet(self, features: Mapping[str, Any]) -> dict[str, dict[str, Ranks]]:
        """For each term that shares them, the ranks of its group, which have agreed on the inputs."""
        by_group: list[tuple[Any, list[str]]] = []
        for name in self._shares:
            group = resolve_group(self.terms[name].group)
            names = next((names for other, names in by_group if other is group), None)
            if names is None:
                by_group.append((group, [name]))
            else:
                names.append(name)
        checked, problem = False, None
        for group, names in by_group:
            if group is None or torch.compiler.is_compiling():
                continue
            problem = agreed(
                self, group, lambda: self._check(features, problem), *self._brought(names, features)
            )
            checked = True
        if problem is not None:
            raise ValueError(problem)
        if not checked:
            self._check(features, None)
            for group, names in by_group:
                agreed(self, group, lambda: None, *self._brought(names, features))
        return {
            name: {"ranks": ranks} for group, names in by_group for ranks in [Ranks(group)] for name in names
        }

    def _check(self, features: Mapping[str, Any], problem: str | None) -> None:
        """ValueError for `problem`, or for what a term misses or refuses."""
        if problem is not None:
            raise ValueError(problem)
        for name, term in self.terms.items():
            given = self._given(name, features)
            if name in self._shares:
                term.check(**given)

    def _brought(self, names: Sequence[str], features: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
        """The features that these terms read, and those of which ranks may bring different numbers of rows."""
        brought, even = {}, set()
        for name in names:
            read = [key for key in sum(self._reads[name], ()) if features.get(key) is not None]
            brought.update({key: features[key] for key in read})
            if not getattr(self.terms[name], "uneven_rows", False):
                even.update(read)
        return brought, set(brought) - even

    def _given(self, name: str, features: Mapping[str, Any]) -> dict[str, Any]:
        """The features of one term, by the names it has for them."""
        term, (needed, _) = self.terms[name], self._reads[name]
        for key in needed:
            if features.get(key) is None:
                raise ValueError(_missing(name, term, key, features))
        other, own = self._renamed[name], (*term.inputs, *getattr(term, "optional_inputs", ()))
        found = {key: features.get(other[key] if key in other else key) for key in own}
        return {key: value for key, value in found.items() if value is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{weight:g} * {name}" for name, weight in self.weights.items())


def create_loss(
    spec: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None],
    *,
    group: Group | str = "auto",
    towers: str | None = None,
) -> WeightedSum:
    """The weighted sum of losses that a config's `loss` describes.

        create_loss("infonce")
        create_loss(["infonce", "cyclic"])
        create_loss({"infonce": {}, "cyclic": {"weight": 0.5, "in_modal": 0.25}})
        create_loss({
            "infonce": {},
            "audio": {"name": "infonce", "inputs": {"image_features": "audio_features"}, "weight": 0.5},
        })

    Args:
        spec: a loss name, a list of names, or name to settings: `weight` (default 1), the keyword arguments
            of the loss's class, `name` where the term is not called as the loss is (to have one twice) and
            `inputs`, {input as the loss names it: feature to take in its place}.
        group: passed to each loss that takes a group and whose settings give none.
        towers: what the towers of a run compute in: "fp32" (tf32 too), "bf16", "fp16" or "pure_bf16". Where a
            loss's `precision` is "auto", its similarities on a GPU then take float16 operands beside towers in
            half precision, whose own rounding is coarser, and operands split in two beside fp32. None: each
            call goes by its features' type and autocast, which tell nothing where features leave the model in
            fp32 and the loss is called outside autocast.

    Raises:
        ValueError: an unknown loss or setting (with the nearest match and the list), an empty sum, a setting
            that the loss needs and did not get, a weight that is negative or not finite.
    """
    if isinstance(spec, str):
        spec = {spec: {}}
    elif isinstance(spec, Mapping):
        spec = dict(spec)
    elif isinstance(spec, Sequence) and all(isinstance(name, str) for name in spec):
        if len(set(spec)) != len(spec):
            raise ValueError(f"the loss names a term twice: {list(spec)}; give it once, with a weight")
        spec = {name: {} for name in spec}
    else:
        raise ValueError(
            f"loss is {spec!r}: give a name, a list of names, or a mapping from names to settings"
        )
    terms, weights, renamed = {}, {}, {}
    for name, settings in spec.items():
        if settings is not None and not isinstance(settings, Mapping):
            raise ValueError(
                f"the settings of loss {name!r} are {settings!r}: give a mapping such as {{'weight': 0.5}}"
            )
        settings = dict(settings or {})
        weights[name] = settings.pop("weight", 1.0)
        renamed[name] = settings.pop("inputs", None) or {}
        if not isinstance(renamed[name], Mapping):
            raise ValueError(
                f"the inputs of loss {name!r} are {renamed[name]!r}: give a mapping from the loss's names to the "
                "features', such as {'image_features': 'audio_features'}"
            )
        terms[name] = build(settings.pop("name", None) or name, settings, group=group)
    total = WeightedSum(terms, weights, renamed)
    if towers is not None:
        _set_precision(total, towers)
    return total


def _set_precision(loss: nn.Module, towers: str) -> None:
    """The one rule of which operands a run's similarities take, for every part that says "auto"."""
    precision = {"fp32": "high", "bf16": "half", "fp16": "half", "pure_bf16": "half"}
    if towers not in precision:
        raise unknown("towers", towers, precision)
    for part in loss.modules():
        if getattr(part, "precision", None) == "auto":
            # torch's stub has a module hold tensors and modules alone.
            part.precision = precision[towers]  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]


def build(name: str, settings: Mapping[str, Any], *, group: Group | str = "auto") -> nn.Module:
    """One loss by name, its settings checked against its constructor; it gets `group` if it takes one."""
    factory = losses.get(name)
    accepted = {
        key: value
        for key, value in inspect.signature(factory).parameters.items()
        if value.kind not in (value.VAR_POSITIONAL, value.VAR_KEYWORD)
    }
    check_keys(settings, [*accepted, "weight", "name", "inputs"], f"loss {name!r}")
    needed = [key for key, value in accepted.items() if value.default is value.empty and key not in settings]
    if needed:
        raise ValueError(
            f"loss {name!r} needs the setting {', '.join(needed)}: give it as loss.{name}.{needed[0]}=..."
        )
    settings = dict(settings)
    if "group" in accepted:
        settings.setdefault("group", group)
    loss = factory(**settings)
    if not getattr(loss, "inputs", None):
        raise ValueError(f"loss {name!r} names no `inputs`: list the features that its forward takes")
    return loss


def _missing(name: str, term: nn.Module, key: str, features: Mapping[str, Tensor]) -> str:
    source = {**_SUPPLIED_BY, **getattr(term, "supplied_by", {})}.get(key)
    supplied = f" It is supplied by {source}." if source else suggest(key, features)
    return (
        f"loss {name!r} needs the feature {key!r}, which is missing.{supplied} Features given: "
        f"{', '.join(sorted(features)) or 'none'}."
    )


def _reads(name: str, term: Any, renamed: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The features that a loss needs, and those it uses where they are present."""
    optional = tuple(getattr(term, "optional_inputs", ()))
    for key in renamed:
        if key not in (*term.inputs, *optional):
            raise unknown(f"input of loss {name!r}", key, (*term.inputs, *optional))
    return tuple(renamed.get(key, key) for key in term.inputs), tuple(
        renamed.get(key, key) for key in optional
    )


def _union(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The distinct names of several tuples, in order of first appearance."""
    return tuple(dict.fromkeys(name for group in names for name in group))
