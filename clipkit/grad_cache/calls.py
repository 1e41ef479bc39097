"""How a model is asked for its features and a loss for its value, by what their signatures say.

Nothing is guessed from a failure: each way below is chosen before the call, and what fits none of them is an error
that says what to write.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from clipkit.grad_cache.splitting import is_fields, tensors_of

Features = dict[str, Any]
# One number for the whole batch, whatever its shape.
OF_THE_BATCH = ("logit_scale", "logit_bias")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def unwrapped(module: Any) -> Any:
    """What DDP, DataParallel or torch.compile was given."""
    for name in ("module", "_orig_mod"):
        inner = module._modules.get(name) if isinstance(module, nn.Module) else None
        if inner is not None and type(module).__name__ in (
            "DistributedDataParallel",
            "DataParallel",
            "OptimizedModule",
        ):
            return unwrapped(inner)
    return module


def wanted(loss: Any, batch: Any) -> tuple[str, ...] | None:
    """The features that the loss names; its optional ones where the batch has an entry of that name."""
    loss = unwrapped(loss)
    if getattr(loss, "inputs", None) is None:
        return None
    optional = getattr(loss, "optional_inputs", ())
    return (*loss.inputs, *(name for name in optional if isinstance(batch, Mapping) and name in batch))


def model_call(model: Any, names: Sequence[str] | None, batch: Any) -> Callable[[Any, Any], Any]:
    """The way to run `model` on a part of the batch.

    model(batch, names)   forward's second argument is called inputs (or it takes *args), and names are known
    model(**batch)        the batch is a mapping and each of its entries an argument of forward (transformers)
    model(*batch)         the batch is a tuple or list of as many entries as forward has arguments (open_clip)
    model(batch)          forward has one argument
    """
    parameters = _parameters(unwrapped(model))
    if parameters is None:
        return (lambda run, part: run(part)) if names is None else (lambda run, part: run(part, names))
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    required = [p for p in parameters if p.default is p.empty and p.kind in (*_POSITIONAL, p.KEYWORD_ONLY)]
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    takes_names = variadic or any(p.name == "inputs" for p in positional[1:2])
    fits = True
    if isinstance(batch, Mapping):
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if named and set(batch) <= named and {p.name for p in required} <= set(batch):
            return lambda run, part: run(**part)
        # Then there is an entry too many or one too few: the batch as a whole is no argument of such a forward.
        fits = not named & set(batch)
    elif not takes_names and is_fields(batch, top=True) and len(required) <= len(batch) <= len(positional):
        return lambda run, part: run(*part)
    if fits and names is not None and takes_names and len(required) <= 2:
        return lambda run, part: run(part, names)
    if fits and len(required) <= 1 and (positional or variadic):
        return lambda run, part: run(part)
    given = sorted(map(str, batch)) if isinstance(batch, Mapping) else f"{len(batch)} entries"
    raise ValueError(
        f"no way to call {type(unwrapped(model)).__name__}.forward({', '.join(p.name for p in parameters)}) "
        f"with a batch of {given}: give a mapping of its arguments and nothing else, or say how with "
        "forward=lambda model, part: {'image_features': ..., ...}"
    )


def features_of(output: Any, model: Any, names: Sequence[str] | None) -> Features:
    """The features in a model's output: those in `names` where they are known, else all tensors.

    image_embeds and text_embeds, as transformers' models return them, are image_features and text_features, and
    beside them the logit_scale (whose parameter holds its log) and logit_bias are the model's own.
    """
    if not isinstance(output, Mapping):
        raise ValueError(
            f"the model must return a mapping of features, but returned a {type(output).__name__}: set "
            "output_dict=True (open_clip) or return_dict=True (transformers), or say how with forward=lambda "
            "model, part: {'image_features': ..., ...}"
        )
    found = dict(output)
    embeds = {f"{kind}_features": found.get(f"{kind}_embeds") for kind in ("image", "text")}
    if all(value is not None for value in embeds.values()):
        found = {**embeds, **found}
        owner = unwrapped(model)
        for name, change in (("logit_scale", torch.exp), ("logit_bias", torch.clone)):
            parameter = getattr(owner, name, None)
            if found.get(name) is None and isinstance(parameter, torch.Tensor):
                found[name] = change(parameter)
    if names is not None:
        return _Found({name: found[name] for name in names if found.get(name) is not None}, found)
    # A matrix of a micro-batch's own pairs is no part of the whole batch's.
    kept = {
        name: value
        for name, value in found.items()
        if value is not None
        and not name.startswith("logits_per_")
        and (isinstance(value, torch.Tensor) or not any(True for _ in tensors_of(value)))
    }
    return _Found(kept, found)


def loss_call(loss: Any, features: Features) -> dict[str, torch.Tensor]:
    """The loss's terms on the whole batch, with the weighted sum under "loss".

    loss(**features)   its arguments are features by name (InfoNCE, open_clip's ClipLoss)
    loss(features)     it has one argument that is none of them (create_loss, your own function)
    """
    own = unwrapped(loss)
    declared = tuple(getattr(own, "inputs", None) or ())
    parameters = _parameters(own) or []
    positional = [p.name for p in parameters if p.kind in _POSITIONAL]
    needed = declared or tuple(
        p.name for p in parameters if p.default is p.empty and p.kind in (*_POSITIONAL, p.KEYWORD_ONLY)
    )
    if declared:
        by_name = not positional or positional[0] in declared
    else:
        by_name = len(needed) > 1 or needed[:1] in (("image_features",), ("text_features",))
    if not by_name:
        terms = loss(features)
    else:
        missing = [name for name in needed if features.get(name) is None]
        if missing:
            raise ValueError(
                f"{type(own).__name__} needs {', '.join(missing)}, which the model did not give: features "
                f"{sorted(features)}"
            )
        optional = getattr(own, "optional_inputs", ()) if declared else positional
        given = [
            *needed,
            *(name for name in optional if name not in needed and features.get(name) is not None),
        ]
        terms = loss(**{name: features[name] for name in given})
    terms = {"loss": terms} if isinstance(terms, torch.Tensor) else terms
    if not isinstance(terms, Mapping) or "loss" not in terms or terms["loss"].dim() != 0:
        shapes = (
            {name: tuple(value.shape) for name, value in terms.items()}
            if isinstance(terms, Mapping)
            else type(terms).__name__
        )
        raise ValueError(
            f'the loss must return a () tensor or a dict with a () tensor under "loss"; it returned {shapes}'
        )
    return dict(terms)


class _Found(dict):
    """Features that say what else there was when one is missing."""

    # FSDP2 makes another of the entries alone.
    def __init__(self, kept: Features, output: Mapping[str, Any] = MappingProxyType({})):
        super().__init__(kept)
        self.output = sorted(output)

    def __missing__(self, name: str) -> Any:
        why = "the model returned no such feature"
        if name in self.output:
            why = "the model's is of one micro-batch alone: make it in the loss, from features with a row an item"
        raise ValueError(f"the loss asks for {name!r}, but {why}. Features: {sorted(self)}")


def like(features: Features, values: Features) -> Features:
    """The values as features that say what else there was."""
    return _Found(values, dict.fromkeys(getattr(features, "output", values)))


def _parameters(call: Any) -> list[inspect.Parameter] | None:
    call = call.forward if isinstance(call, nn.Module) else call
    try:
        return list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return None
