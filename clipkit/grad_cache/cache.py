"""The exact gradient of a large contrastive batch, in the memory of a small one.

A contrastive loss compares every pair of the batch, so summing the losses of micro-batches is another, weaker
loss. The gradient cache (Gao, Zhang, Han and Callan 2021, "Scaling Deep Contrastive Learning Batch Size under
Memory Limited Setup", section 3) keeps the loss of the whole batch and recomputes the towers instead:

    pass 1  micro-batch k --model, no graph--> features k          kept: (rows, D) per feature
            all features  --loss, backward---> d loss / d features  the ranks of a group meet here, once
    pass 2  micro-batch k --model, graph-----> features k --backward from the cached gradient--> parameters

One forward more than a plain step; memory is one micro-batch of activations plus the loss on features. Random
masks are those of pass 1, since the generators are set back for each micro-batch.

    terms = cached_backward(model, loss, batch, micro_batch_size=256)
    optimizer.step()

`splitting.py` says what a batch may be, `calls.py` how models and losses are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from clipkit.grad_cache.batch_norm import UpdateOnce, WholeBatch
from clipkit.grad_cache.calls import (
    OF_THE_BATCH,
    Features,
    features_of,
    like,
    loss_call,
    model_call,
    unwrapped,
    wanted,
)
from clipkit.grad_cache.splitting import move, split_batch, tensors_of
from clipkit.registry import unknown


def cached_backward(
    model: nn.Module,
    loss: Callable[..., dict[str, torch.Tensor] | torch.Tensor],
    batch: Mapping[str, Any] | Sequence[Any],
    *,
    micro_batch_size: int,
    inputs: Sequence[str] | None = None,
    forward: Callable[[nn.Module, Any], Mapping[str, Any]] | None = None,
    backward_scale: float | torch.Tensor = 1.0,
    autocast: contextlib.AbstractContextManager | None = None,
    device: torch.device | str | None = None,
    batch_norm: str = "micro",
) -> dict[str, torch.Tensor]:
    """Add the gradient of `loss` on the whole batch to every parameter's `.grad`, a micro-batch at a time.

    What is the same as one forward and backward of the whole batch: the loss, and the gradient of every
    parameter of the model, the temperature, the bias and the loss's own, up to the rounding of another order
    of sums. Two things can make a model itself see the split:

    - BatchNorm in training normalises each micro-batch by its own statistics, as each of K data-parallel
      ranks would. Its running statistics move once per step, by its momentum, towards the mean and variance
      of the whole batch. Frozen BatchNorm (eval mode) is not touched and makes no difference. With
      `batch_norm="whole"` every micro-batch is normalised by the whole batch's statistics and gradients flow
      through them, exactly as in one forward; with L BatchNorm calls that takes about 1.5 L + 4 forward and
      L / 2 + 1 backward passes; not with FSDP2, SyncBatchNorm or activation checkpointing.
    - Dropout draws a micro-batch's masks at a time, so they are other masks than one large draw would give.
      Pass 2 sees exactly the masks of pass 1, and the run's generators end where one pass over the
      micro-batches ends.

    Args:
        model: called as its forward asks: `model(batch, inputs)` where its second argument is called inputs,
            `model(**batch)` where every entry of the batch is an argument of it (transformers), `model(*batch)`
            for a tuple or list (open_clip), or `model(batch)`. Returns a mapping of features: logit_scale, logit_bias and any other 0-dim tensor
            belong to the whole batch, any other tensor has one row per item. transformers' image_embeds and
            text_embeds are taken as image_features and text_features, with the model's own logit_scale.
        loss: `loss(**features)` where its arguments are features by name (InfoNCE, open_clip's ClipLoss), else
            `loss(features)` with the rows of the whole batch (create_loss, a function of yours); returns a dict
            with "loss" (), or a () tensor. Its own parameters get their gradient from its single backward. Wrap
            it in DDP too when it has parameters.
        batch: a mapping (nested or not), or a tuple or list, of what `split_batch` splits: tensors and lists of
            strings along their own rows, so that sentences (M, L) may come in another number than images
            (B, 3, H, W); anything else goes to every micro-batch as it is.
        micro_batch_size: the most rows of any entry that the model sees at once. Sizes differ by at most one
            row; an entry with fewer rows than there are micro-batches gives some of them an empty slice.
        inputs: the features to ask the model for; None takes the loss's `inputs` where it has them.
        forward: `forward(model, part)` gives the features in place of the calls above; the model it gets may be
            the one inside DDP.
        backward_scale: multiplies the gradient, not the returned values (a GradScaler's scale, or 1 / steps).
        autocast: such as `torch.autocast("cuda", torch.bfloat16)`, entered around each forward of the model;
            the loss runs outside it, on features in the dtype that the model gives them.
        batch_norm: "micro", or "whole" for the statistics of the whole batch (see above).
        device: where micro-batches are moved one at a time; None leaves them where they are.

    Returns:
        The loss's terms, detached, each ().

    Under DDP and FSDP2 gradients are reduced once, with the last micro-batch. Every rank needs the same
    number of rows.

    Raises:
        ValueError: a micro_batch_size below 1, a batch without rows or of a kind that could be read in two
            ways, a model or loss that fits none of the calls above, a loss without "loss".
        RuntimeError: pass 2 gave other features than pass 1: the model draws randomness from somewhere else
            than torch's generators, or changes as it runs.
    """
    if batch_norm not in ("micro", "whole"):
        raise unknown("batch_norm", batch_norm, ("micro", "whole"))
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size is {micro_batch_size}: give at least 1 row")
    names = wanted(loss, batch) if inputs is None else tuple(inputs)
    declared = getattr(unwrapped(loss), "inputs", None) is not None
    way = _Way(forward or model_call(model, names, batch), names if declared else None)
    step = _MicroBatches(model, split_batch(batch, micro_batch_size), way, autocast, device)
    if len(step.parts) == 1:
        return _loss_backward(loss, step.forward(model, 0), backward_scale)
    _take_buffers_of_rank_0(model)
    with UpdateOnce(model) as norms:
        cached = step.first_pass(norms)
        whole_norm = _whole_batch_norm(batch_norm, model, norms)
        if whole_norm:
            with step.generators.kept():
                cached = whole_norm.forwards(step.rerun, len(cached))
        whole = _concatenate(cached, step.rows)
        terms = _loss_backward(loss, whole, backward_scale)
        with step.generators.kept():
            if whole_norm:
                outputs = lambda k: _gradients_of(step.rerun(k), whole, cached, k, shared=False)
                whole_norm.backwards(outputs, len(cached))
            step.second_pass(whole, cached, whole_norm)
    return terms


class _Way:
    """A micro-batch's features, from whichever call of the model; all of them, or those a loss names."""

    def __init__(self, call: Callable[[Any, Any], Any], names: Sequence[str] | None):
        self.call, self.names = call, names

    def __call__(self, module: nn.Module, part: Any) -> Features:
        return features_of(self.call(module, part), module, self.names)


def _shared(name: str, value: torch.Tensor) -> bool:
    """Whether a feature belongs to the whole batch, and is not a row per item."""
    if name in OF_THE_BATCH and value.numel() != 1:
        raise ValueError(
            f"{name} must be one number, shape (), but the model gave shape {tuple(value.shape)}"
        )
    return value.dim() == 0 or name in OF_THE_BATCH


def _loss_backward(loss, features: Features, backward_scale) -> dict[str, torch.Tensor]:
    terms = loss_call(loss, features)
    (terms["loss"] * backward_scale).backward()
    return {name: value.detach() for name, value in terms.items()}


def _concatenate(cached: list[Features], rows: int) -> Features:
    """Features of the whole batch; floating-point ones are leaves that collect the loss's gradient."""
    for k, features in enumerate(cached):
        if features.keys() != cached[0].keys():
            raise ValueError(
                f"micro-batch {k} gave features {sorted(features)}, micro-batch 0 gave {sorted(cached[0])}: "
                "the model must return the same names for each"
            )
    whole: Features = {}
    for name, value in cached[-1].items():
        if not isinstance(value, torch.Tensor):
            whole[name] = value
            continue
        if _shared(name, value):
            whole[name] = value.detach().clone()
        else:
            if value.is_floating_point() and value.shape == (1,) and len(cached[0][name]) == 1 and rows > 1:
                raise ValueError(
                    f"the model gave {name} of shape (1,) for micro-batches of {rows} rows: give shape () if it "
                    "belongs to the whole batch"
                )
            whole[name] = torch.cat([features[name] for features in cached])
            # Views, so that features are held once.
            for features, own in zip(cached, whole[name].split([len(f[name]) for f in cached]), strict=True):
                features[name] = own
        whole[name].requires_grad_(whole[name].is_floating_point())
    return like(cached[-1], whole)


def _gradients_of(
    features: Features, whole: Features, cached: list[Features], k: int, *, shared: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Micro-batch k's features and their cached gradients; those of the whole batch only if `shared`."""
    tensors, gradients = [], []
    for name, leaf in whole.items():
        if not isinstance(leaf, torch.Tensor) or leaf.grad is None or not features[name].requires_grad:
            continue
        if _shared(name, leaf):
            if shared:
                tensors.append(features[name])
                gradients.append(leaf.grad)
            continue
        start = sum(len(part[name]) for part in cached[:k])
        tensors.append(features[name])
        gradients.append(leaf.grad[start : start + len(features[name])])
    return tensors, gradients


def _whole_batch_norm(choice: str, model: nn.Module, norms: UpdateOnce) -> WholeBatch | None:
    if choice == "micro" or not any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        return None
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm) or hasattr(module, "set_requires_gradient_sync"):
            raise ValueError(
                f"batch_norm='whole' cannot split {type(module).__name__}, whose ranks act together "
                "(SyncBatchNorm or FSDP2): use batch_norm='micro'"
            )
    norms.forget()
    return WholeBatch(norms)


class _MicroBatches:
    """The micro-batches of one step, run through the model again under the random numbers of pass 1."""

    def __init__(self, model, parts, way, autocast, device):
        self.model, self.parts, self.way, self.device = model, parts, way, device
        # The fewest rows of the longest entry in a part.
        self.rows = min(max((len(t) for t in tensors_of(part) if t.dim()), default=0) for part in parts)
        # Without a graph there is nothing for DDP to prepare.
        self.plain = model.module if isinstance(model, DistributedDataParallel) else model
        self.autocast = contextlib.nullcontext() if autocast is None else autocast
        self.generators = _Generators(model, parts[0], device)
        self.starts: list[list[torch.Tensor]] = []

    def forward(self, module: nn.Module, k: int) -> Features:
        part = self.parts[k]
        if self.device is not None:
            part = move(part, self.device)
        # Some torch releases would meet pass 1's bf16 copy of a weight, which has no graph, again in pass 2.
        torch.clear_autocast_cache()
        with self.autocast:
            return self.way(module, part)

    def rerun(self, k: int, module: nn.Module | None = None) -> Features:
        self.generators.restore(self.starts[k])
        return self.forward(self.plain if module is None else module, k)

    def first_pass(self, norms: UpdateOnce) -> list[Features]:
        cached = []
        with torch.no_grad(), norms.recording():
            for k in range(len(self.parts)):
                self.starts.append(self.generators.state())
                cached.append(self.forward(self.plain, k))
                norms.end_micro_batch()
        return cached

    def second_pass(self, whole: Features, cached: list[Features], whole_norm: WholeBatch | None) -> None:
        drift = _Drift(reduced_precision=_reduced_precision(self.model, self.autocast))
        for k in range(len(cached)):
            last = k == len(cached) - 1
            with _reducing(self.model, last):
                with whole_norm.running() if whole_norm else contextlib.nullcontext():
                    features = self.rerun(k, self.model)
                drift.add(cached[k], features)
                tensors, gradients = _gradients_of(features, whole, cached, k, shared=last)
                if tensors:
                    torch.autograd.backward(tensors, gradients)
        drift.check()


def _reduced_precision(model: nn.Module, autocast: contextlib.AbstractContextManager) -> bool:
    """Whether the model runs in bf16 or fp16, by an autocast given or around the call, or by its weights."""
    if not isinstance(autocast, contextlib.nullcontext):
        return True
    weights = {(p.device.type, p.dtype) for p in model.parameters() if p.device.type != "meta"}
    return any(
        torch.is_autocast_enabled(kind) or dtype in (torch.bfloat16, torch.float16) for kind, dtype in weights
    )


class _Generators:
    """torch's default generators: the CPU's, and those of the model's and the batch's devices."""

    def __init__(self, model: nn.Module, batch: Any, device: torch.device | str | None):
        found = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
        found |= {tensor.device for tensor in tensors_of(batch)}
        found |= {torch.device(device)} if device is not None else set()
        self.devices = sorted((d for d in found if d.type not in ("cpu", "meta")), key=str)

    def state(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is drawn inside, the run's random numbers go on as if it had not been."""
        state = self.state()
        yield
        self.restore(state)

    def restore(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for d, state in zip(self.devices, states[1:], strict=True):
            torch.get_device_module(d).set_rng_state(state, d)


class _Drift:
    """How far pass 2's features are from pass 1's; one device synchronisation, at the end."""

    def __init__(self, *, reduced_precision: bool):
        # Rounding of bf16 differs between kernels with and without a graph; another dropout mask moves far
        # more.
        self.limit = 0.05 if reduced_precision else 1e-3
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, first: Features, second: Features) -> None:
        for name, value in first.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if second[name].shape != value.shape:
                raise RuntimeError(
                    f"{name} had shape {tuple(value.shape)} in pass 1, {tuple(second[name].shape)} in pass 2:"
                    " the model must give the same features for the same micro-batch"
                )
            value, again = value.detach().float(), second[name].detach().float()
            sums = torch.stack([(again - value).square().sum(), value.square().sum()])
            self.sums[name] = sums + self.sums[name] if name in self.sums else sums

    def check(self) -> None:
        if not self.sums:
            return
        sums = torch.stack(list(self.sums.values())).sqrt().tolist()
        for name, (moved, norm) in zip(self.sums, sums, strict=True):
            # NaN fails no comparison: a non-finite loss is the caller's to see in the returned terms.
            if moved > self.limit * max(norm, 1e-12):
                raise RuntimeError(
                    f"{name} moved by {moved / max(norm, 1e-12):.2g} of its norm between the two passes, so "
                    "its gradient is wrong. The model must draw randomness from torch's default generators "
                    "alone (not Python's, NumPy's or one of its own) and must not change as it runs"
                )


def _take_buffers_of_rank_0(model: nn.Module) -> None:
    """What DDP does as a step begins; its own broadcast would come after the statistics are cleared."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.will_sync_module_buffers():
            module._sync_buffers()


@contextlib.contextmanager
def _reducing(model: nn.Module, now: bool) -> Iterator[None]:
    """Gradients made inside are reduced over the ranks only when `now`; DDP and FSDP2, nested or not."""
    ddp = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    fsdp: list[Any] = [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]
    with contextlib.ExitStack() as stack:
        if not now:
            for module in ddp:
                stack.enter_context(module.no_sync())
            for module in fsdp:
                module.set_requires_gradient_sync(False)
                stack.callback(module.set_requires_gradient_sync, True)
        yield
