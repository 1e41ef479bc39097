"""What an encoder of another library is like, found out from its modules and three short forward passes.

Names say too little: the layers stand in `encoder.layer`, `h`, `block` or `albert_layer_groups`, a causal model need not say
that it is one, and a pooler whose output nobody reads has parameters without a gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# Shares of what changing a token does to its own state. Rounding stays below 1e-6 of it.
_SEES, _LEAKS = 1e-5, 5e-4


@dataclass
class Structure:
    """A body's layers, and what its forward does with texts.

    Attributes:
        blocks: the repeated modules in order; empty where a layer is spread over several lists (XLM).
        num_layers: layers of parameters; one that is used several times (ALBERT) counts once.
        depth: of every parameter by name: 0 before the layers, 1..num_layers in them, num_layers + 1 after.
        width: columns of last_hidden_state.
        causal: a token sees only those before it.
        unread: names of the parameters that last_hidden_state does not depend on.
    """

    blocks: list[nn.Module]
    num_layers: int
    depth: dict[str, int]
    width: int
    causal: bool = False
    unread: list[str] = field(default_factory=list)


def examine(body: Any, *, kind: str, width: int, pad_id: int, vocab_size: int) -> Structure:
    """The structure of a body whose forward takes input_ids and attention_mask.

    Weights without values, as a plan has them, are not run: such a body counts as one that sees both sides, and what
    stands outside its layers as before them.

    Args:
        kind: its name in messages.
        width: where it is not run.

    Raises:
        ValueError: its forward fails, gives no last_hidden_state of a row a token, lets padding change a text, or has
            layers whose parameters cannot be told from unused ones.
    """
    lists, blocks = _layers(body)
    found = Structure(blocks, max((len(body.get_submodule(name)) for name in lists), default=0), {}, width)
    started: dict[str, int] = {}
    if not any(p.is_meta or isinstance(p, FakeTensor) for p in body.parameters()):
        with _first_calls(body, blocks, started), _evaluating(body):
            found.width, found.causal, read = _try(body, kind, pad_id, vocab_size)
        # Made in inference mode it has no graph, and is not going to be trained.
        read = {id(one) for one in body.parameters()} if torch.is_inference_mode_enabled() else read
        for block in blocks:
            if not any(id(parameter) in read for parameter in block.parameters()):
                raise ValueError(
                    f"{kind} cannot be a text tower: its layers hide their gradient from autograd's graph"
                )
        found.unread = [
            name
            for name, parameter in body.named_parameters()
            # An expert that these few tokens were not sent to is read by others.
            if id(parameter) not in read and not re.search(r"\.\d+\..*\.\d+\.", name)
        ]
    for name, _ in body.named_parameters():
        layer = next(
            (name[len(one) + 1 :].partition(".")[0] for one in lists if name.startswith(f"{one}.")), None
        )
        before = started.get(name.rpartition(".")[0], 0)
        outside = before if before < found.num_layers else found.num_layers + 1
        found.depth[name] = outside if layer is None else int(layer) + 1
    return found


def _layers(body: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names of the lists that hold the layers, the heaviest and its like beside it, and the layers as modules."""
    outermost: dict[str, nn.ModuleList] = {}
    for name, module in body.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{one}.") for one in outermost):
            outermost[name] = module
    if not outermost:
        return [], []
    main = max(outermost, key=lambda name: sum(p.numel() for p in outermost[name].parameters()))
    lists = [
        name
        for name, module in outermost.items()
        if name.rpartition(".")[0] == main.rpartition(".")[0] and len(module) == len(outermost[main])
    ]
    whole = len(lists) == 1 and not any(isinstance(one, nn.ModuleList) for one in outermost[main])
    return lists, list(outermost[main]) if whole else []


@contextmanager
def _first_calls(body: nn.Module, blocks: list[nn.Module], started: dict[str, int]) -> Iterator[None]:
    """Within it `started` takes, for each module outside the blocks, how many of them ran before its first call."""
    running: set[int] = set()

    def begins(block: nn.Module, _: Any) -> None:
        running.add(id(block))

    def noted(name: str, *_: Any) -> None:
        started.setdefault(name, len(running))

    inside = {id(module) for block in blocks for module in block.modules()}
    hooks = [block.register_forward_pre_hook(begins) for block in blocks]
    for name, module in body.named_modules():
        if id(module) not in inside:
            hooks.append(module.register_forward_pre_hook(partial(noted, name)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(body: nn.Module) -> Iterator[None]:
    training = body.training
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        body.eval()
        try:
            yield
        finally:
            body.train(training)


def _try(body: Any, kind: str, pad_id: int, vocab_size: int) -> tuple[int, bool, set[int]]:
    """(columns of the states, whether a token sees only those before it, ids of the parameters they depend on)."""
    device = next(body.parameters()).device
    ids = [one for one in range(min(vocab_size, 6)) if one != pad_id]
    a, b, c, other = (ids[place % len(ids)] for place in (0, 1, 2, 3))
    pair = torch.tensor([[a, b, c, a], [a, b, c, b if len(ids) < 4 else other]], device=device)
    padded = torch.tensor([[a, b, c, a, pad_id, pad_id, pad_id]], device=device)
    try:
        states = _states(body, pair, torch.ones_like(pair))
        behind = torch.arange(7, device=device)[None] < 4
        with torch.no_grad():
            longer = _states(body, padded, behind.long())
    except Exception as error:
        line = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{kind} cannot be a text tower: its forward does not give a last_hidden_state (B, L, width) for input_ids "
            f"and attention_mask ({type(error).__name__}: {line})"
        ) from error
    read = _leaves(states)
    states = states.detach()
    effect = float((states[0, 3] - states[1, 3]).abs().max())
    if float((longer[0, :4] - states[0]).abs().max()) > _LEAKS * effect:
        raise ValueError(
            f"{kind} cannot be a text tower: padding changes what it makes of a text, which would then depend on the "
            "batch it stands in"
        )
    causal = float((states[0, :3] - states[1, :3]).abs().max()) <= _SEES * effect
    return states.shape[-1], causal, read


def _states(body: Any, text: Tensor, mask: Tensor) -> Tensor:
    states = body(input_ids=text, attention_mask=mask).last_hidden_state
    if states.ndim != 3 or states.shape[:2] != text.shape:
        raise ValueError(f"last_hidden_state is {tuple(states.shape)} for {tuple(text.shape)} ids")
    return states


def _leaves(output: Tensor) -> set[int]:
    """Ids of the leaves of the graph that an output hangs on."""
    found: set[int] = set()
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        waiting += [following for following, _ in node.next_functions]
    return found


def dropout_rates(body: nn.Module) -> set[float]:
    """The rates above 0 at which a body's modules drop: those of Dropout modules, and numbers they hand to functions.

    LayerDrop is none of them: it leaves a layer out for a whole batch.
    """
    rates: set[float] = set()
    for module in body.modules():
        held = {"dropout": module.p} if isinstance(module, nn.modules.dropout._DropoutNd) else vars(module)
        rates |= {
            float(value)
            for name, value in held.items()
            if re.search("drop", name)
            and "layerdrop" not in name
            and isinstance(value, float)
            and 0 < value < 1
        }
    return rates


def position_limit(body: nn.Module) -> tuple[int, int] | None:
    """(rows of a body's smallest table of absolute positions, those before the first token's); None: it has none."""
    limits = []
    for name, module in body.named_modules():
        last = ".".join(name.split(".")[-2:])
        if isinstance(module, nn.Embedding) and re.search("pos|wpe", last) and "rel" not in last:
            # RoBERTa's positions start after the padding's; BART's at an offset.
            first = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            limits.append((module.num_embeddings, int(first)))
    return min(limits, key=lambda limit: limit[0] - limit[1], default=None)
