"""What every tower shares: numbered layers, freezing that lasts, and activation checkpointing.

A tower's parameters are numbered by depth: 0 is the stem or the embeddings, 1..n the blocks or stages, and n
+ 1 what follows them (final norm, pooling). Freezing and layer-wise learning-rate decay both read that one
numbering.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


class Tower(nn.Module):
    """Base of both towers. A subclass sets `num_layers` and `blocks()` and says the depth of a parameter.

    Attributes:
        settings: `name` and every setting, defaults included, when made by create_image_tower or
            create_text_tower.
    """

    num_layers: int
    width: int
    settings: dict[str, Any] | None = None

    def layer_of(self, name: str) -> int:
        """Depth of the parameter `name` (as in named_parameters): 0 stem, 1..num_layers, num_layers + 1."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """The repeated modules, in order, which FSDP wraps and checkpointing recomputes one by one."""
        raise NotImplementedError

    def freeze(self, layers: int | str) -> None:
        """Stop the training of the first layers, for locked-image tuning (Zhai et al. 2022, LiT) and its kin.

        Args:
            layers: 0 freezes nothing, n >= 1 the stem or embeddings and the first n blocks or stages, "all"
                the whole tower. A frozen BatchNorm keeps its running statistics: it stays in eval mode
                through .train().

        Raises:
            ValueError: `layers` is not one of these, or more than the tower has.
        """
        if layers == "all":
            depth = self.num_layers + 1
        elif isinstance(layers, int) and not isinstance(layers, bool) and 0 <= layers <= self.num_layers:
            depth = layers if layers else -1
        else:
            raise ValueError(
                f"freeze={layers!r}: give 0 (nothing), 1 to {self.num_layers} (this tower's blocks) or 'all'"
            )
        for name, parameter in self.named_parameters():
            if self.layer_of(name) <= depth:
                parameter.requires_grad_(False)
        self._frozen_depth = depth
        self.train(self.training)

    def train(self, mode: bool = True) -> Tower:
        """As nn.Module.train, with frozen BatchNorm kept in eval mode."""
        super().train(mode)
        depth = getattr(self, "_frozen_depth", -1)
        if mode and depth >= 0:
            for name, module in self.named_modules():
                if isinstance(module, _BatchNorm) and self.layer_of(f"{name}.weight") <= depth:
                    module.eval()
        return self

    def set_activation_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them.

        About one more forward pass of time for memory that hardly grows with depth. Same gradients: the
        random state is replayed, and BatchNorm's running statistics are updated by the first pass only. Under
        torch.compile, blocks with BatchNorm run outside the graph.
        """
        blocks = self.blocks()
        if enable and not blocks:
            raise ValueError(
                f"{type(self).__name__} names no blocks to checkpoint: set activation_checkpointing: false"
            )
        for block in blocks:
            # On the instance, so that the state dict's names stay as they are.
            recomputes = "forward" in vars(block)
            if enable and not recomputes:
                again = (
                    _recomputed_norms
                    if any(isinstance(m, _BatchNorm) for m in block.modules())
                    else _recomputed
                )
                block.forward = partial(again, block, block.forward)
            elif not enable and recomputes:
                del block.forward


def _recomputed(block: nn.Module, forward, *args, **kwargs):
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


# Dynamo takes no context_fn of ours, nor a buffer that changes inside a checkpoint.
@torch.compiler.disable
def _recomputed_norms(block: nn.Module, forward, *args, **kwargs):
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _still_statistics(block)),
        **kwargs,
    )


@contextmanager
def _still_statistics(block: nn.Module):
    """Within it a training BatchNorm normalises by the batch but leaves its running statistics alone."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    kept = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(norm, name)
            setattr(norm, name, None if buffer is None else buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = buffers


# How a picture becomes the square that an image tower sees, by open_clip's names; the first of each is the default.
# shortest: the shorter side to image_size, then the centre; longest: the longer side, black beside it; squash: both.
RESIZING = {"resize_mode": ("shortest", "longest", "squash"), "interpolation": ("bicubic", "bilinear")}


class ImageTower(Tower):
    """An image encoder: forward(image (B, 3, H, W) float, normalised by `mean` and `std`) -> (B, width).

    Attributes:
        width: columns of the output.
        image_size: side of the square image it expects, in pixels.
        mean, std: channel statistics of its input for values in [0, 1], three floats each.
        projects: True when the output already has the embedding's width, so that no projection follows.
        encodes: False for the tower `none` alone, of a model of texts.
        resize_mode, interpolation: how a picture becomes that square where it is not cropped at random; see RESIZING.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    projects: bool = False
    encodes: bool = True
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"

    def forward(self, image: Tensor) -> Tensor:
        raise NotImplementedError


POOLINGS = ("mean", "cls", "last", "eot")


class TextTower(Tower):
    """A text encoder: forward(text (B, L) int64) -> (B, width), pooled from tokens(text) -> (B, L, width).

    Texts are padded on the right; forward also takes them padded on the left, and gives the same.

    Attributes:
        width: columns of the output.
        context_length: the longest text it takes, in tokens; shorter batches are fine.
        vocab_size: rows of its token embedding.
        has_dropout: True when two training passes over one text differ, as SimCSE's two views need.
        causal: True when a token sees only those before it.
    """

    context_length: int
    vocab_size: int
    pad_id: int
    eot_id: int
    pooling: str
    causal: bool = False

    @property
    def has_dropout(self) -> bool:
        raise NotImplementedError

    @property
    def token_embedding(self) -> nn.Embedding:
        """The (vocab_size, width) embedding, for heads that share its weights."""
        raise NotImplementedError

    def tokens(self, text: Tensor) -> Tensor:
        """text: (B, L) int64 -> every token's final state (B, L, width)."""
        raise NotImplementedError

    def forward(self, text: Tensor) -> Tensor:
        """text: (B, L) int64 with L <= context_length -> pooled (B, width), not projected or normalised."""
        self._check_text(text)
        text = self.aligned(text)
        return self.pool(self.tokens(text), text)

    def aligned(self, text: Tensor) -> Tensor:
        """text: (B, L) -> (B, L), padding that stands before a text moved behind it.

        Raises:
            ValueError: padding on the left that is also the end token: where the text begins cannot be told. Seen on the
                CPU alone.
        """
        if self.pad_id == self.eot_id:
            if _read_at_once(text):
                started = (text[:, :2] == self.pad_id).all(dim=1) & (text != self.pad_id).any(dim=1)
                if started.any():
                    raise ValueError(
                        f"a text starts with the padding id {self.pad_id}, which is its end token too: pad on the right"
                    )
            return text
        before = (text == self.pad_id).long().cumprod(dim=1).sum(dim=1, keepdim=True)
        place = torch.arange(text.shape[1], device=text.device)
        return text.gather(1, (place + before) % text.shape[1])

    def pool(self, states: Tensor, text: Tensor) -> Tensor:
        """states: (B, L, width), text: (B, L), padded on the right -> (B, width) by `pooling`.

        cls is the first token's state, last that of the last one before the padding, eot that of the first end token, mean
        the mean over all but the padding.
        """
        if self.pooling == "cls":
            return states[:, 0]
        if self.pooling == "eot":
            ends = text == self.eot_id
            if _read_at_once(text) and not ends.any(dim=-1).all():
                raise ValueError(
                    f"a text has no end token {self.eot_id}, whose state is its feature: was it cut "
                    "without one?"
                )
            # Some vocabularies start a text with the same token, which does not end it.
            later = ends[:, 1:]
            only_first = torch.where(ends[:, 0], 0, self._last(text))
            at = torch.where(later.any(dim=-1), later.int().argmax(dim=-1) + 1, only_first)
            return states[torch.arange(len(text), device=text.device), at]
        if self.pooling == "last":
            return states[torch.arange(len(text), device=text.device), self._last(text)]
        keep = self.attention_mask(text).to(states.dtype).unsqueeze(-1)
        return (states * keep).sum(dim=1) / keep.sum(dim=1).clamp_min(1)

    def _last(self, text: Tensor) -> Tensor:
        """text: (B, L) -> (B,) the place of each text's last token."""
        return self.attention_mask(text).sum(dim=-1).clamp_min(1) - 1

    def attention_mask(self, text: Tensor) -> Tensor:
        """text: (B, L) -> (B, L) bool, False on the padding after the last real token.

        Only trailing padding counts: CLIP's padding id 0 is also the token "!", which may stand inside a
        text. Where padding is the end token (GPT-2), the first of a text's trailing ones ends it.
        """
        keep = (text != self.pad_id).flip(-1).cummax(dim=-1).values.flip(-1)
        if self.pad_id == self.eot_id:
            keep = torch.cat([torch.ones_like(keep[:, :1]), keep[:, 1:] | keep[:, :-1]], dim=1)
        return keep

    def _check_text(self, text: Tensor) -> None:
        if text.ndim != 2 or text.is_floating_point():
            raise ValueError(f"text must be (B, L) of token ids, not {tuple(text.shape)} {text.dtype}")
        if text.shape[1] > self.context_length:
            raise ValueError(
                f"texts of {text.shape[1]} tokens do not fit this text tower's context_length "
                f"{self.context_length}: lower the tokenizer's context_length or raise "
                "text_tower.context_length"
            )


def _read_at_once(text: Tensor) -> bool:
    """Whether a text's values may be looked at: on a device the answer would hold up the step."""
    return text.device.type == "cpu" and not torch.compiler.is_compiling()
