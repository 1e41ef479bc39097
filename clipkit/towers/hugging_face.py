"""Hugging Face encoders as text towers: RoBERTa, BERT, ELECTRA, DistilBERT, MPNet and T5's encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipkit.registry import check_keys, unknown
from clipkit.towers.base import TextTower
from clipkit.towers.registry import register_text_tower

# What each family calls its dropouts.
_FAMILIES = {
    "roberta": {"hidden": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"},
    "xlm-roberta": {"hidden": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"},
    "mpnet": {"hidden": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"},
    "bert": {"hidden": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"},
    "electra": {"hidden": "hidden_dropout_prob", "attention": "attention_probs_dropout_prob"},
    "distilbert": {"hidden": "dropout", "attention": "attention_dropout"},
    "t5": {"hidden": "dropout_rate"},
}
_POOLINGS = ("mean", "cls", "eot")
# Published embeddings are padded to a round number of rows (T5: 32,100 tokens in 32,128 rows).
_SPARE_ROWS = 128
_FROM_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "model_type")


@register_text_tower("hf")
class HuggingFaceTower(TextTower):
    """An encoder of the transformers library, without its pooler or heads.

    Args:
        pretrained: a Hugging Face name or a local folder with config.json and weights; None: random weights.
        model_type: the family, for random weights: bert, distilbert, electra, mpnet, roberta, t5,
            xlm-roberta.
        config: sizes for random weights, in the family's own words, such as
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size":
            3072}; what it leaves out is the family's default (RoBERTa, BERT: the base size).
        context_length: tokens, special ones included. None in a config means the tokenizer's.
        pooling: mean over the tokens that are not padding, cls (first token), or eot (end token).
        hidden_dropout: probability on embeddings and branches; None: the model's own (0.1 for BERT and
            RoBERTa).
        attention_dropout: probability on the attention weights; None: the model's own.

    Raises:
        ValueError: neither or both of pretrained and model_type, an unknown family or config key, a
            vocabulary that is not the tokenizer's, or fewer positions than context_length needs.
    """

    # transformers' encoders share no typed interface.
    body: Any

    def __init__(
        self,
        *,
        vocab_size: int,
        pad_id: int,
        eot_id: int,
        context_length: int,
        pretrained: str | None = None,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
        pooling: str = "mean",
        hidden_dropout: float | None = None,
        attention_dropout: float | None = None,
    ):
        super().__init__()
        if pooling not in _POOLINGS:
            raise ValueError(f"text_tower.pooling {pooling!r} is not one of {', '.join(_POOLINGS)}")
        if pretrained is None:
            settings = _random_config(model_type, config or {}, vocab_size, pad_id, eot_id)
        else:
            if config:
                raise ValueError(
                    "text_tower.config sets the sizes of random weights: leave it empty beside pretrained"
                )
            settings = _pretrained_config(pretrained, model_type)
            _check_vocabulary(pretrained, settings, vocab_size, pad_id)
        family = _FAMILIES[settings.model_type]
        _check_positions(settings, context_length)
        for name, rate in (("hidden", hidden_dropout), ("attention", attention_dropout)):
            if rate is not None:
                if not 0 <= rate < 1:
                    raise ValueError(
                        f"text_tower.{name}_dropout is a probability from 0 to below 1, not {rate}"
                    )
                if name not in family:
                    raise ValueError(
                        f"{settings.model_type} has one rate for all its dropout: set "
                        "text_tower.hidden_dropout alone"
                    )
                setattr(settings, family[name], rate)
        self.model_type = settings.model_type
        if self.model_type == "t5" and pooling == "cls":
            raise ValueError("T5 has no first token to pool: set text_tower.pooling to mean")
        self.body = _encoder(settings, pretrained)
        self.width = getattr(settings, "hidden_size", None) or settings.dim
        self.context_length, self.vocab_size = context_length, settings.vocab_size
        self.pad_id, self.eot_id, self.pooling = pad_id, eot_id, pooling
        self.num_layers = len(self.blocks())

    @property
    def has_dropout(self) -> bool:
        return any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.body.modules())

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.body.get_input_embeddings()

    def tokens(self, text: Tensor) -> Tensor:
        self._check_text(text)
        return self.body(input_ids=text, attention_mask=self.attention_mask(text).long()).last_hidden_state

    def layer_of(self, name: str) -> int:
        block = re.search(r"\.(?:layer|block)\.(\d+)\.", name)
        if block:
            return int(block[1]) + 1
        return self.num_layers + 1 if "final_layer_norm" in name else 0

    def blocks(self) -> list[nn.Module]:
        inner = self.body.transformer if self.model_type == "distilbert" else self.body.encoder
        return list(inner.block if self.model_type == "t5" else inner.layer)


def _random_config(
    model_type: str | None, config: Mapping[str, Any], vocab_size: int, pad_id: int, eot_id: int
):
    if model_type is None:
        raise ValueError(
            "the text tower 'hf' needs text_tower.pretrained (a name or a local folder) or, for random "
            f"weights, text_tower.model_type (one of {', '.join(sorted(_FAMILIES))}) and text_tower.config"
        )
    _check_family(model_type)
    default = _default_config(model_type)
    own = {*_own_keys(default), *default.attribute_map, "vocab_size"}
    check_keys(config, own, f"text_tower.config for {model_type}")
    # Published embeddings have spare rows.
    rows = config.get("vocab_size", vocab_size)
    if not 0 <= rows - vocab_size < _SPARE_ROWS:
        raise ValueError(
            f"text_tower.config.vocab_size is {rows}, and the tokenizer has {vocab_size} ids: leave it out"
        )
    return _default_config(
        model_type, **{**config, "vocab_size": rows, "pad_token_id": pad_id, "eos_token_id": eot_id}
    )


def _default_config(model_type: str, **settings: Any):
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **settings)


def _own_keys(default) -> set[str]:
    """The settings of a family that neither all families share nor the tokenizer decides."""
    from transformers import PretrainedConfig

    return {*default.to_dict()} - {*PretrainedConfig().to_dict(), *_FROM_TOKENIZER}


def without_weights(tower: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a tower with `pretrained` weights as those of one with random weights of the same sizes."""
    settings = _pretrained_config(tower["pretrained"], tower.get("model_type"))
    own = _own_keys(_default_config(settings.model_type))
    sizes = {key: value for key, value in settings.to_dict().items() if key in own or key == "vocab_size"}
    return {**tower, "pretrained": None, "model_type": settings.model_type, "config": sizes}


def _pretrained_config(pretrained: str, model_type: str | None):
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(pretrained)
    except (OSError, ValueError) as error:
        where = (
            "a folder without a readable config.json"
            if Path(pretrained).is_dir()
            else ("neither a local folder nor a model that the Hugging Face hub or its cache gave")
        )
        raise ValueError(f"text_tower.pretrained {pretrained!r} is {where}: {error}") from error
    _check_family(settings.model_type)
    if model_type is not None and model_type != settings.model_type:
        raise ValueError(
            f"text_tower.model_type is {model_type!r} but {pretrained!r} holds a {settings.model_type!r}"
        )
    return settings


def _check_family(model_type: str) -> None:
    if model_type not in _FAMILIES:
        raise unknown("text_tower.model_type", model_type, _FAMILIES)


def _check_vocabulary(pretrained: str, settings, vocab_size: int, pad_id: int) -> None:
    spare = settings.vocab_size - vocab_size
    if not 0 <= spare < _SPARE_ROWS or settings.pad_token_id != pad_id:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids and pads with {pad_id}, but {pretrained!r} was trained with "
            f"{settings.vocab_size} ids padded with {settings.pad_token_id}: use the tokenizer 'hf' of the "
            "same name or folder"
        )


def _check_positions(settings, context_length: int) -> None:
    positions = getattr(settings, "max_position_embeddings", None)
    if settings.model_type == "t5" or positions is None:
        return
    # RoBERTa's positions start after its padding id; MPNet has the same rule with the 1 written into its
    # code.
    taken = {"roberta": settings.pad_token_id + 1, "xlm-roberta": settings.pad_token_id + 1, "mpnet": 2}
    taken = taken.get(settings.model_type, 0)
    if context_length + taken > positions:
        reason = f" (its positions start at {taken})" if taken else ""
        raise ValueError(
            f"context_length {context_length} needs {context_length + taken} positions{reason} but this "
            f"{settings.model_type} has {positions}: lower text_tower.context_length to {positions - taken}, "
            "or for random weights raise text_tower.config.max_position_embeddings"
        )


def _encoder(settings, pretrained: str | None) -> nn.Module:
    from transformers import AutoModel, T5EncoderModel

    # An unused pooler would be a parameter without a gradient, which DistributedDataParallel refuses.
    extra = (
        {"add_pooling_layer": False}
        if settings.model_type in ("bert", "roberta", "xlm-roberta", "mpnet")
        else {}
    )
    if settings.model_type == "t5":
        return (
            T5EncoderModel.from_pretrained(pretrained, config=settings)
            if pretrained
            else T5EncoderModel(settings)
        )
    if pretrained:
        return AutoModel.from_pretrained(pretrained, config=settings, **extra)
    return AutoModel.from_config(settings, **extra)
