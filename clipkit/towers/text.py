"""CLIP's text Transformer, with dropout that is really applied (Radford et al. 2021, section 2.4)."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipkit.towers.base import POOLINGS, TextTower
from clipkit.towers.registry import register_text_tower


@register_text_tower("transformer")
class TransformerTower(TextTower):
    """open_clip's TextTransformer as the body: pre-norm blocks, learnt positions, a causal mask, the end
    token pooled.

    Args:
        context_length: tokens, the end token included. None in a config means the tokenizer's.
        width, layers, heads: the defaults are the text tower of CLIP's RN50 and ViT-B/32.
        mlp_ratio: hidden width of the MLP over width.
        dropout: probability, 0 to below 1, on the embeddings and on both branches of every block; 0.1 in
            SimCSE.
        attention_dropout: probability on the attention weights; None: the same as dropout.
        pooling: eot (end token), last (before the padding), mean, or cls (the start token; needs causal false).
        causal: a token sees only those before it, as in CLIP; false sees all but the padding.
        quick_gelu: OpenAI's GELU approximation; needed for its published weights.
        norm_eps: added to the variance in the norms.
        attend_padding: padding is read like any token, so that `last` pools a text's last place and `mean` all of them
            (SigLIP); a text then has context_length tokens, no fewer.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        pad_id: int,
        eot_id: int,
        context_length: int = 77,
        width: int = 512,
        layers: int = 12,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        attention_dropout: float | None = None,
        pooling: str = "eot",
        causal: bool = True,
        quick_gelu: bool = False,
        norm_eps: float = 1e-5,
        attend_padding: bool = False,
    ):
        super().__init__()
        from open_clip.transformer import LayerNorm, QuickGELU, TextTransformer

        attention_dropout = dropout if attention_dropout is None else attention_dropout
        _check(width, heads, dropout, attention_dropout, pooling, causal)
        self.body = TextTransformer(
            context_length=context_length,
            vocab_size=vocab_size,
            width=width,
            heads=heads,
            layers=layers,
            mlp_ratio=mlp_ratio,
            output_dim=None,
            no_causal_mask=not causal,
            pad_id=pad_id,
            act_layer=QuickGELU if quick_gelu else nn.GELU,
            # open_clip calls it, whatever its annotation says.
            norm_layer=cast(Any, partial(LayerNorm, eps=norm_eps)),
        )
        self.embedding_dropout = nn.Dropout(dropout)
        blocks: list[Any] = [*self.body.transformer.resblocks]
        for block in blocks:
            # These two slots scale a branch's output (identity here) just before it joins the residual
            # stream, which is where dropout belongs; neither has weights, so the state-dict keys stay
            # open_clip's.
            block.ls_1, block.ls_2 = nn.Dropout(dropout), nn.Dropout(dropout)
            block.attn.dropout = attention_dropout
        self.width, self.num_layers, self.heads = width, layers, heads
        self.context_length, self.vocab_size = context_length, vocab_size
        self.pad_id, self.eot_id, self.pooling, self.causal = pad_id, eot_id, pooling, causal
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.attend_padding = attend_padding

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0 or self.attention_dropout > 0

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.body.token_embedding

    def tokens(self, text: Tensor) -> Tensor:
        self._check_text(text)
        length = text.shape[1]
        states = self.body.token_embedding(text) + self.body.positional_embedding[:length]
        if self.causal:
            mask = self.body.get_buffer("attn_mask")[:length, :length]
        else:
            # (B * heads, L, L), as nn.MultiheadAttention takes it.
            mask = torch.zeros(text.shape, dtype=states.dtype, device=text.device)
            mask = mask.masked_fill(~self.attention_mask(text), float("-inf"))
            mask = mask[:, None, :].expand(-1, length, -1).repeat_interleave(self.heads, dim=0)
        states = self.body.transformer(self.embedding_dropout(states), attn_mask=mask)
        return self.body.ln_final(states)

    def aligned(self, text: Tensor) -> Tensor:
        return text if self.attend_padding else super().aligned(text)

    def attention_mask(self, text: Tensor) -> Tensor:
        return (
            torch.ones_like(text, dtype=torch.bool) if self.attend_padding else super().attention_mask(text)
        )

    def _check_text(self, text: Tensor) -> None:
        super()._check_text(text)
        if self.attend_padding and text.shape[1] != self.context_length:
            raise ValueError(
                f"text_tower.attend_padding reads padding as text, and texts of {text.shape[1]} tokens are not padded to "
                f"the context_length {self.context_length}: give the tokenizer the same context_length"
            )

    def layer_of(self, name: str) -> int:
        block = re.match(r"body\.transformer\.resblocks\.(\d+)\.", name)
        if block:
            return int(block[1]) + 1
        return self.num_layers + 1 if name.startswith("body.ln_final") else 0

    def blocks(self) -> list[nn.Module]:
        return list(self.body.transformer.resblocks)


def _check(
    width: int, heads: int, dropout: float, attention_dropout: float, pooling: str, causal: bool
) -> None:
    if width % heads:
        raise ValueError(f"text_tower.width {width} is not a multiple of text_tower.heads {heads}")
    for name, rate in (("dropout", dropout), ("attention_dropout", attention_dropout)):
        if not 0 <= rate < 1:
            raise ValueError(f"text_tower.{name} is a probability from 0 to below 1, not {rate}")
    if pooling not in POOLINGS:
        raise ValueError(f"text_tower.pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    if pooling == "cls" and causal:
        raise ValueError(
            "text_tower.pooling cls reads the first token, which sees no other while causal is true: "
            "use pooling eot, or causal false"
        )
