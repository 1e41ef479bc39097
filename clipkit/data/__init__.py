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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.data.augment import Augment, create_augment
    from clipkit.data.checking import check, stats
    from clipkit.data.evalset import count_samples, iter_captions, iter_eval
    from clipkit.data.faults import CAUSES, DataError
    from clipkit.data.indexing import index_shards
    from clipkit.data.packing import pack
    from clipkit.data.samples import SampleSet, register_data
    from clipkit.data.sentences import SentenceStream, create_sentences
    from clipkit.data.shards import Stream, create_stream
    from clipkit.data.spec import DATA_DEFAULTS, locate_data, resolve_data, train_captions
    from clipkit.data.synthetic import SHAPE_CLASSES, SHAPE_TEMPLATES, write_shapes
    from clipkit.data.tokenizers import (
        Tokenizer,
        create_tokenizer,
        list_tokenizers,
        load_tokenizer,
        register_tokenizer,
    )
    from clipkit.data.urls import expand_shards

_HOME = {
    "create_stream": "shards",
    "Stream": "shards",
    "locate_data": "spec",
    "resolve_data": "spec",
    "train_captions": "spec",
    "DATA_DEFAULTS": "spec",
    "iter_eval": "evalset",
    "count_samples": "evalset",
    "iter_captions": "evalset",
    "Tokenizer": "tokenizers",
    "create_tokenizer": "tokenizers",
    "load_tokenizer": "tokenizers",
    "list_tokenizers": "tokenizers",
    "register_tokenizer": "tokenizers",
    "SampleSet": "samples",
    "register_data": "samples",
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
    "index_shards": "indexing",
    "pack": "packing",
    "check": "checking",
    "stats": "checking",
}

__all__ = [
    "Augment",
    "CAUSES",
    "DATA_DEFAULTS",
    "DataError",
    "SHAPE_CLASSES",
    "SHAPE_TEMPLATES",
    "SampleSet",
    "SentenceStream",
    "Stream",
    "Tokenizer",
    "check",
    "count_samples",
    "create_augment",
    "create_sentences",
    "create_stream",
    "create_tokenizer",
    "expand_shards",
    "index_shards",
    "iter_captions",
    "iter_eval",
    "list_tokenizers",
    "load_tokenizer",
    "locate_data",
    "pack",
    "register_data",
    "register_tokenizer",
    "resolve_data",
    "stats",
    "train_captions",
    "write_shapes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipkit.data' has no attribute {name!r}")
    return getattr(import_module(f"clipkit.data.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
