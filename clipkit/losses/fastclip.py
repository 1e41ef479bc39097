"""FastCLIP-v3's global contrastive loss: each sample remembers its denominator over the whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.distributed import Group, Ranks, all_reduce_sum
from clipkit.losses.checks import (
    check_choice,
    check_ids,
    check_impl,
    check_negatives,
    check_number,
    check_pairs,
    check_precision,
    constant,
    integers,
    paired_logits,
    reads_values,
)
from clipkit.losses.pairs import lse_both_ways, meet_pairs
from clipkit.losses.registry import register_loss

_STATE = ("log_u1", "log_u2")


@register_loss("fastclip")
class FastCLIP(nn.Module):
    """Robust global contrastive loss with one learned temperature t = 1 / logit_scale.

        g1_i = 1/(N - 1) sum_{j != i} e^{(<x_i, y_j> - <x_i, y_i>) / t},  g2_i the same over images for text i
        u_i <- (1 - gamma) u_i + gamma g_i   (at a sample's first visit: u_i <- g_i)
        L = 1/N sum_i [ t/2 (log(eps + u1_i) + log(eps + u2_i)) ] + rho t
        dL = 1/N sum_i [ t/2 (dg1_i / (eps + u1_i) + dg2_i / (eps + u2_i)) ] + dt (L / t)

    Wei et al. 2024, "FastCLIP: A Suite of Optimization Techniques to Accelerate CLIP Training with Limited
    Resources", problem RGCL-g and its version v3, halved as the paper's code has it, so that it weighs as
    `infonce` does. The moving averages u estimate each sample's denominator over all the data, so a small
    batch does not bias the gradient. The gradient is not the derivative of the value at fixed u, but the
    paper's estimator above; with gamma = 1 it is.

    The temperature's gradient comes in two kinds, which differ in sign over a range of temperatures. With
    p_i the softmax of row i over its negatives, KL_i its divergence from the uniform distribution, and means
    over rows and both directions,

        temperature_gradient="objective"      dL/dt = rho - mean KL_i
        temperature_gradient="released_code"  dL/dt = rho - mean (2 KL_i + log g_i)

    The first is the derivative of L: rho is the radius of the distributional robustness that the problem is
    named for. The second is what the code released with the paper computes, where g is built twice (from own
    anchors and from own candidates, so that features get both shares) and the scale sits in both; the same
    code's version v2 writes the temperature's derivative out with g once. The paper's values of rho were found
    with that code: take both from it, or neither.

    u is kept as log u (it spans e^{2 logit_scale}) in two buffers indexed by the sample, updated in training
    mode, equal on all ranks and saved in the state dict: 8 bytes a sample, in float32 whatever type the module
    is moved to. They grow as indices appear unless `num_samples` is given, which also spares the GPU a wait
    per step. Exact resume needs them, and a stable `sample_index`. A batch whose loss is not finite leaves
    them as they were; an entry that is not finite, from elsewhere, counts as never visited. Under
    DistributedDataParallel pass broadcast_buffers=False: the ranks agree already.

    Args:
        num_samples: size of the data set, or None to grow.
        num_texts: number of texts where `text_index` numbers them apart; None is num_samples.
        gamma: final weight of the newest value, in (0, 1]; 0.2 (CC3M) to 0.8 in the paper.
        gamma_decay_steps: training steps of the cosine from 1 to gamma; 0 starts at gamma. The paper decays
            by epoch, over half of the training.
        rho: weight of the temperature's price, >= 0; the paper uses 6.5 (CC3M) to 8.5.
        temperature_gradient: "objective" or "released_code".
        eps: > 0.
        group: "auto", a ProcessGroup or None.
        impl: "auto", "dense", "chunked" or "triton": see `clipkit.kernels.pair_lse`.
        precision: "auto", "half" or "high", of impl="triton" alone: see `clipkit.kernels.pair_lse`.

    With gamma = 1 and eps -> 0 it is t (infoloob - log(N - 1) + rho). Siblings: `infonce`, `infoloob`.
    """

    __call__: Callable[..., Tensor]
    inputs = ("image_features", "text_features", "logit_scale", "sample_index")
    optional_inputs = ("text_index",)
    supplied_by = {
        "sample_index": (
            "the data stream, which numbers every sample; take it from the batch into the features"
        )
    }

    log_u1: Tensor
    log_u2: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        num_texts: int | None = None,
        gamma: float = 0.2,
        gamma_decay_steps: int = 0,
        rho: float = 6.5,
        temperature_gradient: str = "objective",
        eps: float = 1e-14,
        group: Group | str = "auto",
        impl: str = "auto",
        precision: str = "auto",
    ):
        super().__init__()
        self.precision = check_precision(precision)
        self.num_samples = None if num_samples is None else int(check_number("num_samples", num_samples, 1))
        self.num_texts = self.num_samples
        if num_texts is not None:
            self.num_texts = int(check_number("num_texts", num_texts, 1))
            if num_samples is None:
                raise ValueError("num_texts without num_samples: give both sizes, or neither to grow")
        self.gamma = check_number("gamma", gamma, 0.0, 1.0, open_low=True)
        self.gamma_decay_steps = int(check_number("gamma_decay_steps", gamma_decay_steps, 0))
        self.rho = check_number("rho", rho, 0.0)
        self.temperature_gradient = check_choice(
            "temperature_gradient", temperature_gradient, ("objective", "released_code")
        )
        self.eps = check_number("eps", eps, 0.0, open_low=True)
        self.group = group
        self.impl = check_impl(impl)
        for name, size in zip(_STATE, (self.num_samples, self.num_texts)):
            self.register_buffer(name, torch.full((size or 0,), -torch.inf, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def check(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        sample_index: Tensor,
        text_index: Tensor | None = None,
    ) -> None:
        """ValueError for what forward refuses, as far as this process can see it."""
        check_pairs(self, image_features, text_features, logit_scale=logit_scale)
        check_ids("sample_index", sample_index, len(image_features))
        if text_index is not None:
            check_ids("text_index", text_index, len(image_features))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        sample_index: Tensor,
        *,
        text_index: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> Tensor:
        """The loss of the group's pairs, (); in training mode it also updates their u.

        Args:
            image_features: (B, D), unit norm.
            text_features: (B, D), unit norm; row i belongs to image i.
            logit_scale: (), the multiplier 1/t.
            sample_index: (B,) integers >= 0, each sample's stable number in the data set.
            text_index: (B,) integers >= 0, each text's own stable number, where several texts belong to an
                image and take turns; sample_index then numbers the images alone. None: sample_index.
            ranks: what a weighted sum gives all of its terms; leave it out.

        Raises:
            ValueError: shapes that differ or are not (B, D), features off unit norm, ranks with different B,
                a single pair in the group, an index out of range.
        """
        ranks, x, y, logit_scale, kernel = meet_pairs(
            self,
            ranks,
            image_features,
            text_features,
            logit_scale,
            sample_index=sample_index,
            text_index=text_index,
        )
        total = ranks.size * len(x)
        check_negatives("fastclip", total)
        scale = logit_scale
        if self.temperature_gradient == "released_code":
            # Its value, with twice the gradient.
            scale = 2 * logit_scale - logit_scale.detach()
        log_g = torch.stack(lse_both_ways(x, y, scale, ranks, **kernel))
        log_g = log_g - paired_logits(x, y, scale) - constant(total - 1, log_g).log()

        own = integers(sample_index, x)
        index = torch.stack([own, own if text_index is None else integers(text_index, own)], 1)
        all_index = ranks.gather(index)
        self._reserve(all_index)
        log_u = self._moving_average(log_g.detach(), index)
        if self.training:
            self._remember(ranks.gather(log_u.T.contiguous()), all_index)

        temperature = 1 / logit_scale
        log_total = torch.logaddexp(log_u, torch.full_like(log_u, math.log(self.eps)))
        # dg / (eps + u) = e^{log g - log(eps + u)} d log g; its value is taken out again, only its gradient
        # stays.
        ascent = (log_g.detach() - log_total).exp() * log_g
        loss = temperature * log_total.sum() / 2 + temperature.detach() * (ascent - ascent.detach()).sum() / 2
        return all_reduce_sum(loss / total, ranks.group) + self.rho * temperature

    def _moving_average(self, log_g: Tensor, index: Tensor) -> Tensor:
        """(2, B): log of the updated u of own rows, from log g (2, B) and their numbers (B, 2)."""
        gamma = torch.full((), self.gamma, device=log_g.device, dtype=log_g.dtype)
        if self.gamma_decay_steps > 0:
            part = (self.steps.to(log_g.dtype) / self.gamma_decay_steps).clamp(max=1.0)
            gamma = gamma + (1 - gamma) * (1 + torch.cos(math.pi * part)) / 2
        old = torch.stack([self.log_u1[index[:, 0]], self.log_u2[index[:, 1]]]).to(log_g.dtype)
        mixed = torch.logaddexp(torch.log1p(-gamma) + old, gamma.log() + log_g)
        return torch.where(old.isfinite(), mixed, log_g)

    @torch.no_grad()
    def _remember(self, log_u: Tensor, index: Tensor) -> None:
        """Keep log u (N, 2) of the samples (N, 2), unless a NaN or infinity in it would outlive its batch."""
        good = (log_u < torch.inf).all()
        for side, name in enumerate(_STATE):
            state, which = getattr(self, name), index[:, side]
            state[which] = torch.where(good, log_u[:, side].to(state.dtype), state[which])
        self.steps += good

    @torch.no_grad()
    def _reserve(self, index: Tensor) -> None:
        """Room for every number (N, 2): grown buffers, or a ValueError where their size is fixed."""
        if self.num_samples is not None and not reads_values(self, index.device):
            return
        sides = ("sample_index", "num_samples", self.num_samples), ("text_index", "num_texts", self.num_texts)
        for name, side, (given, setting, size) in zip(_STATE, index.T, sides, strict=True):
            low, high = int(side.min()), int(side.max())
            if low < 0 or (size is not None and high >= size):
                raise ValueError(
                    f"{given} goes from {low} to {high}, but fastclip has {setting}={size}: number samples "
                    f"from 0, and set {setting} to how many there are, or num_samples to null for a state that "
                    "grows"
                )
            if high >= len(getattr(self, name)):
                self._resize(name, max(high + 1, 2 * len(getattr(self, name))))

    def _resize(self, name: str, size: int) -> None:
        old = getattr(self, name)
        grown = old.new_full((size,), -torch.inf)
        grown[: len(old)] = old
        setattr(self, name, grown)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FastCLIP:
        """Moves as modules do, but keeps the state's type: bfloat16 would leave log u two digits."""
        before = {name: getattr(self, name) for name in _STATE}
        super()._apply(fn, recurse)
        for name, value in before.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _STATE:
            saved, own = state_dict.get(f"{prefix}{name}"), getattr(self, name)
            if self.num_samples is None and saved is not None and len(saved) != len(own):
                setattr(self, name, own.new_full((len(saved),), -torch.inf))
        super()._load_from_state_dict(state_dict, prefix, *args)
