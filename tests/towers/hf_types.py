"""Random tiny sizes of many Hugging Face types, and what is known of each from its paper."""

from __future__ import annotations

from typing import Any

import torch

from clipkit.data.tokenizers import Words
from clipkit.model import create_model
from clipkit.towers import create_text_tower

# Of the words tokenizer: padding, unknown, start, the words, end.
PAD, SOT, EOT, VOCABULARY = 0, 2, 59, 60
IDS = {"vocab_size": VOCABULARY, "pad_id": PAD, "eot_id": EOT}
WORDS = [f"w{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(VOCABULARY - 4)]

_BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_T5 = {"d_model": 32, "num_layers": 3, "num_heads": 2, "d_kv": 16, "d_ff": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 1, "head_dim": 16}
_BART = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64}
_BART |= {"encoder_layers": 3, "decoder_layers": 1, "decoder_ffn_dim": 64}
_DEBERTA = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]}
_DEBERTA |= {"position_biased_input": False, "norm_rel_ebd": "layer_norm", "share_att_key": True}
SIZES: dict[str, dict[str, Any]] = {
    "albert": {**_BERT, "embedding_size": 16},
    "bart": _BART,
    "bert": _BERT,
    "camembert": _BERT,
    "clip": {**_BERT, "max_position_embeddings": 12},
    "deberta-v2": {**_BERT, **_DEBERTA},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64},
    "electra": {**_BERT, "embedding_size": 16},
    "gemma3": {
        **_LLAMA,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 16},
    "modernbert": {**_BERT, "local_attention": 6},
    "mpnet": _BERT,
    "mt5": _T5,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "t5": _T5,
    "umt5": _T5,
    "xlm-roberta": _BERT,
    "xlm": {"emb_dim": 32, "n_layers": 3, "n_heads": 2},
    "xlnet": {"d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 64},
}
# Decoders, and CLIP's text encoder (Radford et al. 2021, section 2.4).
CAUSAL = ("clip", "gemma3", "gpt2", "qwen3")
# Lan et al. 2020, section 3.1: one layer's parameters for all.
SHARED = ("albert",)
# A layer is spread over four lists, so that there is no module to recompute.
NO_BLOCKS = ("xlm",)
# Which of text_tower.hidden_dropout and attention_dropout a type has.
DROPOUT = dict.fromkeys(SIZES, ("hidden", "attention"))
DROPOUT |= dict.fromkeys(("t5", "mt5", "umt5", "xlnet"), ("hidden",))
DROPOUT |= dict.fromkeys(("qwen3", "gemma3", "clip"), ("attention",))
# What of them sentence-transformers' stock module loads.
EXPORTED = tuple(sorted({*SIZES} - {"bart"}))
# Types that are refused, their sizes, and why.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fnet": ({"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}, "padding changes"),
    "nystromformer": (_BERT, "padding changes"),
    "convbert": (_BERT, "padding changes"),
    "canine": ({}, "no model of it that makes token ids"),
    "vit": ({}, "no model of it that makes token ids"),
    "whisper": ({}, "forward does not give|no model of it|cannot be"),
    "reformer": ({}, "gradient"),
}


def tower(model_type: str, **settings: Any):
    torch.manual_seed(0)
    spec = {"name": "hf", "model_type": model_type, "config": SIZES[model_type], "context_length": 10}
    return create_text_tower({**spec, **settings}, embed_dim=16, **IDS)


def words(context_length: int = 10) -> Words:
    return Words(vocabulary=WORDS, context_length=context_length)


def dual(model_type: str, text: dict[str, Any] | None = None, **settings: Any):
    torch.manual_seed(0)
    spec = {"name": "hf", "model_type": model_type, "config": SIZES[model_type], **(text or {})}
    image = {"name": "timm", "model": "test_resnet", "image_size": 32}
    config = {"embed_dim": 16, "image_tower": image, "text_tower": spec, **settings}
    return create_model(config, tokenizer=words())


def texts(length: int = 10) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(B, L) padded on the right, and each text alone."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for ends in (length, 3, 6, 4):
        row = torch.randint(3, EOT, (ends,), generator=generator)
        row[0], row[-1] = SOT, EOT
        rows.append(row)
    padded = torch.full((len(rows), length), PAD)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded, rows
