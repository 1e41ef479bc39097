"""Data: img2dataset shards in an exact, resumable order, tokenizers, sentence streams, and generated
pictures.

    from clipkit.data import create_stream, create_tokenizer, train_captions
    tokenizer = create_tokenizer({"name": "clip_bpe"})
    stream = create_stream({"kind": "shards", "train": "shards/{00000..00331}.tar"}, tokenizer=tokenizer,
                           image_size=224, batch_size=128, seed=0, num_workers=4)
    for batch in stream: ...            # image (B,3,H,W) uint8, text (B,L) int64, key, sample_index (B,)

Names are imported when first used, so that `import clipkit.data` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "create_stream": "shards",
    "Stream": "shards",
    "resolve_data": "spec",
    "train_captions": "spec",
    "DATA_DEFAULTS": "spec",
    "iter_eval": "evalset",
    "count_samples": "evalset",
    "iter_captions": "evalset",
    "create_tokenizer": "tokenizers",
    "load_tokenizer": "tokenizers",
    "list_tokenizers": "tokenizers",
    "create_sentences": "sentences",
    "SentenceStream": "sentences",
    "write_shapes": "synthetic",
    "SHAPE_CLASSES": "synthetic",
    "SHAPE_TEMPLATES": "synthetic",
    "create_augment": "augment",
    "Augment": "augment",
    "DataError": "faults",
    "CAUSES": "faults",
    "expand_shards": "urls",
    "pack": "packing",
    "check": "checking",
    "stats": "checking",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipkit.data' has no attribute {name!r}")
    return getattr(import_module(f"clipkit.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
