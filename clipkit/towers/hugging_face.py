"""Hugging Face encoders as text towers: any of transformers whose forward makes token ids and a mask into states.

What a type is like (where its layers are, whether it is causal, what it drops) is found out when it is built:
clipkit.towers.structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clipkit.towers.base import POOLINGS, TextTower
from clipkit.towers.registry import register_text_tower
from clipkit.towers.structure import dropout_rates, examine, position_limit

# Their texts begin with the first word, not with a token of their own.
_NO_START_TOKEN = ("t5", "mt5", "umt5", "longt5")


@register_text_tower("hf")
class HuggingFaceTower(TextTower):
    """An encoder of the transformers library, without its pooler or heads; of an encoder-decoder the encoder.

    Args:
        pretrained: a Hugging Face name or a local folder with config.json and weights; None: random weights.
        model_type: transformers' name of the family, for random weights: bert, modernbert, deberta-v2, t5,
            gpt2, qwen3, gemma3, clip and so on.
        config: sizes for random weights, in the family's own words, such as
            {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size":
            3072}; what it leaves out is the family's default (RoBERTa, BERT: the base size).
        context_length: tokens, special ones included. None in a config means the tokenizer's.
        pooling: mean over the tokens that are not padding, cls (first token), last (before the padding), or eot (end
            token). None: last for a causal model, whose other tokens have not seen the whole text, else mean.
        hidden_dropout: probability on embeddings and branches; None: the model's own (0.1 for BERT and
            RoBERTa).
        attention_dropout: probability on the attention weights; None: the model's own.

    Raises:
        ValueError: neither or both of pretrained and model_type, an unknown family or config key, a model that is no
            text encoder or whose weights are not all there, a dropout it does not have, a vocabulary that is not the
            tokenizer's, or fewer positions than context_length needs.
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
        pooling: str | None = None,
        hidden_dropout: float | None = None,
        attention_dropout: float | None = None,
    ):
        super().__init__()
        self.check(pooling=pooling, pretrained=pretrained, model_type=model_type, config=config)
        whole = None
        if pretrained is None:
            settings = _library().random_config(str(model_type), config or {}, vocab_size, pad_id, eot_id)
        else:
            whole, settings = _library().pretrained_config(pretrained, model_type)
            _library().check_rows(pretrained, settings, vocab_size)
        self.model_type = str(settings.model_type)
        rates = {"hidden": hidden_dropout, "attention": attention_dropout}
        _library().set_dropout(settings, rates)
        if "use_cache" in settings.to_dict():
            # States of earlier calls, which would be kept twice by a block that runs again.
            settings.use_cache = False
        self.body = _library().encoder(settings, pretrained, whole)
        if not isinstance(getattr(self.body, "get_input_embeddings", lambda: None)(), nn.Embedding):
            raise ValueError(
                f"text_tower.model_type {self.model_type!r} cannot be a text tower: it has no nn.Embedding of its tokens"
            )
        self._check_positions(context_length)
        for name, rate in rates.items():
            if rate and rate not in dropout_rates(self.body):
                raise ValueError(
                    f"{self.model_type} takes no notice of text_tower.{name}_dropout: leave it null"
                )
        found = examine(
            self.body,
            kind=f"text_tower.model_type {self.model_type!r}",
            width=settings.hidden_size,
            pad_id=pad_id,
            vocab_size=vocab_size,
        )
        self.width, self.causal, self.num_layers = found.width, found.causal, found.num_layers
        self._depth, self._blocks = found.depth, [*found.blocks]
        for name in found.unread:
            # A pooler. Without a gradient, DistributedDataParallel would wait for it.
            self.body.get_parameter(name).requires_grad_(False)
        if pretrained is not None and not self.causal and settings.pad_token_id not in (None, pad_id):
            raise _library().of_another_tokenizer(
                pretrained, settings, f"{vocab_size} ids and pads with {pad_id}"
            )
        # Padding is hidden by the mask. In CLIP's vocabulary and in GPT-2's its id is a token's too, which is to learn.
        self.token_embedding.padding_idx = None
        self.context_length, self.vocab_size = context_length, settings.vocab_size
        self.pad_id, self.eot_id = pad_id, eot_id
        self.pooling = pooling or ("last" if self.causal else "mean")
        if self.pooling == "cls" and (self.causal or self.model_type in _NO_START_TOKEN):
            reason = "sees no other token" if self.causal else "is a word like any other"
            raise ValueError(
                f"text_tower.pooling cls reads the first token, which in {self.model_type} {reason}: set it to "
                f"{'last' if self.causal else 'mean'}"
            )

    @staticmethod
    def check(
        *,
        pooling: str | None = None,
        pretrained: str | None = None,
        model_type: str | None = None,
        config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """ValueError for settings that name no tower; nothing is built or loaded."""
        if pooling is not None and pooling not in POOLINGS:
            raise ValueError(f"text_tower.pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
        if pretrained is None and model_type is None:
            raise ValueError(
                "the text tower 'hf' needs text_tower.pretrained (a name or a local folder) or, for random "
                "weights, text_tower.model_type (such as bert, roberta, t5, gpt2) and text_tower.config"
            )
        if pretrained is not None and config:
            raise ValueError(
                "text_tower.config sets the sizes of random weights: leave it empty beside pretrained"
            )
        if model_type is not None:
            _library().check_family(model_type)

    @property
    def has_dropout(self) -> bool:
        return bool(dropout_rates(self.body))

    @property
    def token_embedding(self) -> nn.Embedding:
        return self.body.get_input_embeddings()

    @property
    def loads_alone(self) -> bool:
        """Whether transformers loads a folder of this encoder, rather than of the model that it is half of."""
        return _library().loads_alone(self.body)

    def tokens(self, text: Tensor) -> Tensor:
        self._check_text(text)
        return self.body(input_ids=text, attention_mask=self.attention_mask(text).long()).last_hidden_state

    def layer_of(self, name: str) -> int:
        # The name may be of no parameter, such as a buffer's: it is where its module is.
        name = name.removeprefix("body.")
        while name and name not in self._depth:
            name = name.rpartition(".")[0]
        return self._depth.get(name, 0)

    def blocks(self) -> list[nn.Module]:
        return list(self._blocks)

    def _check_positions(self, context_length: int) -> None:
        limit = position_limit(self.body)
        if limit is None or context_length + limit[1] <= limit[0]:
            return
        positions, taken = limit
        reason = f" (its positions start at {taken})" if taken else ""
        raise ValueError(
            f"context_length {context_length} needs {context_length + taken} positions{reason} but this "
            f"{self.model_type} has {positions}: lower text_tower.context_length to {positions - taken}, "
            "or for random weights raise text_tower.config.max_position_embeddings"
        )


def longest_text(pretrained: str) -> int | None:
    """Tokens of the longest text that the config of a name's or folder's encoder speaks of; None: it speaks of none."""
    _, settings = _library().pretrained_config(pretrained, None)
    limit = getattr(settings, "max_position_embeddings", None)
    # RoBERTa's positions start behind the padding's id.
    before = 2 if "roberta" in str(settings.model_type) else 0
    return limit - before if isinstance(limit, int) and limit > before else None


def without_weights(tower: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a tower with `pretrained` weights as those of one with random weights of the same sizes."""
    model_type, sizes = _library().sizes_of(tower["pretrained"], tower.get("model_type"))
    return {**tower, "pretrained": None, "model_type": model_type, "config": sizes}


def _library() -> Any:
    # It imports transformers, which takes seconds.
    from clipkit.towers import encoders

    return encoders
