"""Configs and encoders of the transformers library: which of them is a text encoder, and that one made.

Imports transformers, so it is imported where one is made.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
)

from clipkit.registry import check_keys, suggest

# Names of dropouts in a config that act outside the encoder, or not on single numbers.
_OTHER_DROPOUTS = "classif|summary|pooler|qa_|activation|layerdrop|token_dropout"
_FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "model_type")


def random_config(
    model_type: str, config: Mapping[str, Any], vocab_size: int, pad_id: int, eot_id: int
) -> PretrainedConfig:
    """A family's config with the sizes that are given, for a tokenizer's ids; ValueError for what it does not have."""
    default = _default_config(model_type)
    model_type = default.model_type
    own = {*_own_keys(default), *default.attribute_map, "vocab_size"}
    check_keys(config, own, f"text_tower.config for {model_type}")
    rows = config.get("vocab_size", vocab_size)
    if not 0 <= rows - vocab_size < _spare_rows(rows):
        raise ValueError(
            f"text_tower.config.vocab_size is {rows}, and the tokenizer has {vocab_size} ids: leave it out"
        )
    ids = {"vocab_size": rows, "pad_token_id": pad_id, "eos_token_id": eot_id}
    # No encoder reads the others. Those of the family's own tokenizer may lie beyond this one's.
    ids |= {
        key: eot_id
        for key, value in default.to_dict().items()
        if key.endswith("_token_id") and key not in ids and isinstance(value, int) and value >= rows
    }
    return _default_config(model_type, **{**ids, **config, "vocab_size": rows})


def _default_config(model_type: str, **settings: Any):
    """A family's config; of a model with several parts, such as CLIP, that of its text encoder."""
    try:
        made = AutoConfig.for_model(model_type, **settings)
        part = made.get_text_config()
        return made if part is made else AutoConfig.for_model(part.model_type, **settings)
    except Exception as error:
        # transformers checks kinds by an error of its own, of several lines.
        raise ValueError(
            f"text_tower.config is none for {model_type}: {' '.join(str(error).split())}"
        ) from error


def _own_keys(default) -> set[str]:
    """The settings of a family that neither all families share nor the tokenizer decides."""
    # Some are read that the config's class does not declare, such as DeBERTa's position_buckets.
    made = _model_class(type(default))
    code = inspect.getsource(sys.modules[made.__module__]) if made else ""
    read = {
        name
        for found in re.findall(r"config\.(\w+)|getattr\(\w*\.?config, \"(\w+)\"", code)
        for name in found
    }
    # How a model is run, such as _attn_implementation, is none of them: it may name code to fetch.
    read = {name for name in read if name[:1].isalpha() and not hasattr(PretrainedConfig, name)}
    read = {name for name in read if not re.search("implementation|quantiz|kernel_config", name)}
    return ({*default.to_dict()} | read) - {*PretrainedConfig().to_dict(), *_FROM_TOKENIZER}


def sizes_of(pretrained: str, model_type: str | None) -> tuple[str, dict[str, Any]]:
    """The type of a name's or folder's text encoder, and its settings as `random_config` takes them."""
    _, settings = pretrained_config(pretrained, model_type)
    own = _own_keys(_default_config(settings.model_type))
    return str(settings.model_type), {
        key: value for key, value in settings.to_dict().items() if key in own or key == "vocab_size"
    }


def pretrained_config(pretrained: str, model_type: str | None) -> tuple[Any, Any]:
    """The config of a name's or folder's model, and the part of it that is its text encoder's."""
    try:
        settings = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = (
            "a folder without a readable config.json"
            if Path(pretrained).is_dir()
            else ("neither a local folder nor a model that the Hugging Face hub or its cache gave")
        )
        raise ValueError(f"text_tower.pretrained {pretrained!r} is {where}: {error}") from error
    check_family(settings.model_type)
    part = settings.get_text_config()
    if model_type is not None and model_type not in (settings.model_type, part.model_type):
        raise ValueError(
            f"text_tower.model_type is {model_type!r} but {pretrained!r} holds a {settings.model_type!r}"
        )
    return settings, part


def check_family(model_type: str) -> None:
    """ValueError for a type that transformers has no encoder of token ids for, as far as its names tell."""
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"unknown text_tower.model_type {model_type!r}.{suggest(model_type, CONFIG_MAPPING)} The types are those "
            "of transformers' AutoModel"
        )
    kind = type(_default_config(model_type))
    if not hasattr(kind(), "vocab_size") or _model_class(kind) is None:
        raise ValueError(
            f"text_tower.model_type {model_type!r} cannot be a text tower: transformers has no model of it that makes "
            "token ids into states"
        )


def _model_class(config_class: type) -> Any:
    found = MODEL_MAPPING.get(config_class, None)
    return found[0] if isinstance(found, (tuple, list)) else found


def _spare_rows(rows: int) -> int:
    """Published embeddings are padded to a round number of rows (T5: 32,100 tokens in 32,128, Qwen3: 151,669 in 151,936)."""
    return max(128, rows // 256)


def check_rows(pretrained: str, settings, vocab_size: int) -> None:
    if not 0 <= settings.vocab_size - vocab_size < _spare_rows(settings.vocab_size):
        raise of_another_tokenizer(pretrained, settings, f"{vocab_size} ids")


def of_another_tokenizer(pretrained: str, settings, has: str) -> ValueError:
    return ValueError(
        f"the tokenizer has {has}, but {pretrained!r} was trained with {settings.vocab_size} ids padded with "
        f"{settings.pad_token_id}: use the tokenizer 'hf' of the same name or folder"
    )


def set_dropout(settings, rates: Mapping[str, float | None]) -> None:
    """Write the given rates into a config, under whatever it calls its dropouts."""
    given = [key for key, value in settings.to_dict().items() if type(value) in (int, float)]
    own = [key for key in given if re.search("dropout|pdrop", key) and not re.search(_OTHER_DROPOUTS, key)]
    names = {
        "attention": [key for key in own if key.startswith("att")],
        "hidden": [key for key in own if not key.startswith("att")],
    }
    for name, rate in rates.items():
        if rate is None:
            continue
        if not 0 <= rate < 1:
            raise ValueError(f"text_tower.{name}_dropout is a probability from 0 to below 1, not {rate}")
        if not names[name]:
            other = "attention" if name == "hidden" else "hidden"
            does = (
                f"has one rate for all its dropout: set text_tower.{other}_dropout alone"
                if names[other]
                else "drops nothing"
            )
            raise ValueError(f"{settings.model_type} has no text_tower.{name}_dropout; it {does}")
        for key in names[name]:
            setattr(settings, key, rate)


def encoder(settings, pretrained: str | None, whole) -> nn.Module:
    """The encoder of a config with random weights, or those of `pretrained`, whose config is `whole`."""
    # T5 and its kin have a class of the encoder alone. A folder of that class does not say that it was half of a model.
    base = _model_class(type(settings))
    made: Any = MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(settings), None) or base
    # An unused pooler would be a parameter without a gradient, which DistributedDataParallel refuses.
    arguments = inspect.signature(made.__init__).parameters
    extra = {"add_pooling_layer": False} if "add_pooling_layer" in arguments else {}
    if pretrained is None:
        body = made._from_config(settings, **extra)
    else:
        alone = whole is settings
        body, report = (made if alone else AutoModel).from_pretrained(
            pretrained,
            config=whole,
            # A checkpoint in half precision would be trained in it.
            dtype=torch.get_default_dtype(),
            output_loading_info=True,
            trust_remote_code=False,
            **(extra if alone else {}),
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ValueError(
                f"text_tower.pretrained {pretrained!r} has no weights for {len(missing)} tensors of its "
                f"{settings.model_type}, such as {missing[0]}: they would stay random"
            )
        if not alone:
            body = next((module for module in body.modules() if type(module) is made), None)
            if body is None:
                raise ValueError(
                    f"text_tower.pretrained {pretrained!r} holds no {made.__name__} among its parts"
                )
    return body.get_encoder() if made is base and type(settings)().is_encoder_decoder else body


def loads_alone(body: Any) -> bool:
    """Whether transformers makes such a body from a folder of it; BART's encoder, for one, is loaded with its decoder alone."""
    kind = type(body.config)
    return type(body) in (_model_class(kind), MODEL_FOR_TEXT_ENCODING_MAPPING.get(kind, None))
