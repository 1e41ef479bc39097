"""InfoNCE of a batch whose matrix of logits is small, in few operators: there their number is the time."""

from __future__ import annotations

import torch
from torch import Tensor

from clipkit.kernels.pairs import DENSE_PAIRS, runs_triton
from clipkit.losses.checks import softplus


def runs_small(x: Tensor, y: Tensor, scale: Tensor, impl: str) -> bool:
    """Whether `small_infonce` is what `impl` asks for here, and nothing looks inside it: no compiler, no
    autocast, no function transform."""
    return (
        impl in ("auto", "dense")
        and x.device.type == "cpu"
        and not runs_triton(x)
        and 1 < len(x) <= DENSE_PAIRS // len(x)
        and x.dtype == y.dtype == scale.dtype
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        # Absent from torch's stub.
        and not torch._C._are_functorch_transforms_active()  # pyright: ignore[reportAttributeAccessIssue]
    )


def small_infonce(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE of x (N, D) and y (N, D) at scale (), with N > 1; twice differentiable."""
    return _SmallInfoNCE.apply(x, y, scale)


def _plain(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * (x @ y.T)
    positive = logits.diagonal()
    mask = torch.eye(len(x), dtype=torch.bool, device=x.device)
    negative = logits.masked_fill(mask, -torch.inf)
    lse = torch.stack([torch.logsumexp(negative, 1), torch.logsumexp(negative, 0)])
    return softplus(lse - positive).sum() / (2 * len(x))


class _SmallInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale):
        similarity = x @ y.T
        logits = similarity * scale
        diagonal = logits.diagonal()
        positive = diagonal.clone()
        diagonal.fill_(-torch.inf)
        lse = torch.stack([torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)])
        gap = lse - positive
        ctx.save_for_backward(x, y, scale, similarity, logits, lse, gap)
        return softplus(gap).sum() / (2 * len(x))

    @staticmethod
    def backward(ctx, grad):
        x, y, scale, similarity, logits, lse, gap = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A gradient of this gradient is wanted: what was saved has none.
            wanted = [v for v, need in zip((x, y, scale), ctx.needs_input_grad) if need]
            found = iter(torch.autograd.grad(_plain(x, y, scale), wanted, grad, create_graph=True))
            return tuple(next(found) if need else None for need in ctx.needs_input_grad)
        weight = torch.sigmoid(gap) * (grad / (2 * len(x)))
        g = (logits - lse[0, :, None]).exp_().mul_(weight[0, :, None])
        g.add_((logits - lse[1]).exp_().mul_(weight[1]))
        g.diagonal().sub_(weight.sum(0))
        d_scale = (g * similarity).sum() if ctx.needs_input_grad[2] else None
        g.mul_(scale)
        return (
            g @ y if ctx.needs_input_grad[0] else None,
            g.T @ x if ctx.needs_input_grad[1] else None,
            d_scale,
        )
