"""DualEncoder: two towers, their projections and the logit scale, as the dict of features that losses read.

`forward(batch, inputs)` makes just the passes that `inputs` asks for, which is the union of what the chosen
losses need. Every text pass of a step (captions, their second dropout view, hard negatives, sentences) goes
through the tower as one batch.

With m captions a picture the batch's text is (B, m, L). The image tower runs once a picture, and a row of its
features stands beside each of the picture's texts, as do its id and its number: losses see B m pairs, row
i m + k being picture i with its caption k, and the ids that make a picture's captions each other's positives.
Hard negatives, (B, m h, L), become h of each of these rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.distributed import full_tensor
from clipkit.loggers import tolerate_broken_wandb
from clipkit.registry import check_keys, unknown
from clipkit.towers import ImageTower, TextTower, create_image_tower, create_text_tower
from clipkit.towers.image import NO_IMAGES
from clipkit.towers.lora import add_lora

# Feature name -> the batch entry it encodes, and the setting that brings that entry.
_TEXT_PASSES = {
    "text_features": ("text", "data: shards with captions"),
    "text_features_view2": ("text", "data: shards with captions"),
    "hard_negative_features": ("hard_negative", "data.hard_negatives: the field of KEY.json that holds them"),
    "premise_features": ("premise", "data.sentences: NLI triplets"),
    "entailment_features": ("entailment", "data.sentences: NLI triplets"),
    "contradiction_features": ("contradiction", "data.sentences: NLI triplets"),
    "pair_premise_features": ("pair_premise", "data.sentences: labelled NLI pairs"),
    "pair_hypothesis_features": ("pair_hypothesis", "data.sentences: labelled NLI pairs"),
}
_IMAGE_PASSES = {
    "image_features": ("image", "data: shards with images"),
    "image_features_view1": ("image_view1", "data: two augmented views of each image"),
    "image_features_view2": ("image_view2", "data: two augmented views of each image"),
}
# What a loss may use, that no data setting brings: a batch of one's own has it by this name.
_GIVEN = ("text_index", "sample_weight", "content_features", "hard_negative_image_features")
# A teacher's, one for each picture, one for each text, and its temperature.
_TEACHER = ("dist_image_features", "dist_text_features", "dist_logit_scale")
# What a loss may use where it is there, and is not missed where it is not.
_OPTIONAL = ("hard_negative_features", "pair_ids", *_GIVEN)
# Entries handed from the batch to the losses.
_PASSED_ON = {
    "nli_labels": "data.sentences: labelled NLI pairs",
    "sample_index": "data: a stream that numbers its samples",
    "pair_ids": "data.pair_ids",
    **dict.fromkeys(_GIVEN, "a batch of yours"),
    **dict.fromkeys(_TEACHER, "data.teacher: a folder that `clipkit-predict teacher` has written"),
}
# One for each picture: repeated for each of its captions.
_OF_PICTURES = ("image_features", "sample_index", "pair_ids", "sample_weight", "dist_image_features")
_OWN = ("logit_scale", "logit_bias", "mlm_logits", "mlm_labels")
FEATURES = (*_IMAGE_PASSES, *_TEXT_PASSES, *_PASSED_ON, *_OWN)


class Vocabulary(Protocol):
    """What a model asks of a tokenizer: how many ids there are, how many make a text, and the special ones."""

    vocab_size: int
    context_length: int
    pad_id: int
    sot_id: int
    eot_id: int


class DualEncoder(nn.Module):
    """Two towers into one space of unit vectors (Radford et al. 2021, figure 3).

    Args:
        image_tower, text_tower: as clipkit.towers makes them.
        embed_dim: columns D of both kinds of features.
        init_logit_scale: the multiplier of cosines at the start, 1 / temperature.
        init_logit_bias: added to the scaled cosines at the start (SigLIP: -10); None: no such parameter.
        mlm_probability: share of tokens hidden for mlm_logits, above 0 and below 1; None: no masked-language
            head.
        mask_id: the id that hides a token; sot_id: the start token's, never hidden. Both needed with
            mlm_probability.
        channels_last: hand images to the tower in the channels_last memory format, which convolutions run
            faster in.
        text_projection_bias: the text projection adds a bias (SigLIP).

    The log of the scale is the parameter `log_logit_scale` of shape (1,), because FSDP2 refuses 0-d
    parameters.
    """

    # torch types a module's call as Any.
    __call__: Callable[..., dict[str, Tensor]]
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        image_tower: ImageTower,
        text_tower: TextTower,
        *,
        embed_dim: int,
        init_logit_scale: float = 1 / 0.07,
        init_logit_bias: float | None = None,
        mlm_probability: float | None = None,
        mask_id: int | None = None,
        sot_id: int | None = None,
        channels_last: bool = True,
        text_projection_bias: bool = False,
    ):
        super().__init__()
        if init_logit_scale <= 0:
            raise ValueError(
                f"init_logit_scale is a multiplier above 0 (CLIP: 1 / 0.07 = 14.3), not {init_logit_scale}"
            )
        if image_tower.projects and image_tower.width != embed_dim:
            raise ValueError(
                f"the image tower projects to {image_tower.width} columns but embed_dim is {embed_dim}: set embed_dim to "
                f"{image_tower.width}"
            )
        self.embed_dim, self.channels_last = embed_dim, channels_last
        self.image_tower, self.text_tower = image_tower, text_tower
        self.image_projection = (
            nn.Identity() if image_tower.projects else _projection(image_tower.width, embed_dim)
        )
        self.text_projection = _projection(text_tower.width, embed_dim, bias=text_projection_bias)
        self.log_logit_scale = nn.Parameter(torch.tensor([math.log(init_logit_scale)]))
        self.logit_bias = (
            None if init_logit_bias is None else nn.Parameter(torch.tensor([float(init_logit_bias)]))
        )
        self.mlm_head = None
        if mlm_probability is not None:
            self.mlm_head = MaskedLanguageHead(text_tower, mlm_probability, mask_id=mask_id, sot_id=sot_id)
        self.register_buffer("image_mean", None, persistent=False)
        self.register_buffer("image_std", None, persistent=False)
        self._set_channel_statistics(self.log_logit_scale.device)

    @property
    def logit_scale(self) -> Tensor:
        """() multiplier of the cosines, exp of the parameter. Under FSDP it is gathered: ask on all ranks."""
        log = full_tensor(self.log_logit_scale)
        # A sum of one: FSDP warns of outputs that are views.
        return log.float().exp().sum()

    @torch.no_grad()
    def clamp_logit_scale(self, max: float = 100.0) -> None:
        """Keep the multiplier at or below `max`, in place, after a step (Radford et al. 2021, 2.5)."""
        self.log_logit_scale.clamp_(max=math.log(max))

    def hold_in_bf16(self) -> None:
        """Cast the weights to bf16, in place; the temperature, the bias and BatchNorm stay in fp32."""
        for part in self.children():
            part.to(torch.bfloat16)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.float()

    def _set_channel_statistics(self, device: torch.device) -> None:
        # For values 0..255, so that uint8 is normalised in one subtraction and one division.
        for name, values in (("image_mean", self.image_tower.mean), ("image_std", self.image_tower.std)):
            setattr(
                self, name, torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1) * 255
            )

    def _apply(self, fn: Any, recurse: bool = True) -> DualEncoder:
        super()._apply(fn, recurse)
        # .to(bfloat16) would round the statistics and .to_empty() lose them.
        self._set_channel_statistics(self.image_mean.device)
        return self

    def normalize_image(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) uint8 -> the tower's normalised float input; floats pass as they are."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), not {tuple(image.shape)}")
        if image.dtype == torch.uint8:
            # In fp32 even under autocast: 255 levels do not survive a bf16 subtraction.
            image = (image.float() - self.image_mean) / self.image_std
        elif not image.is_floating_point():
            raise ValueError(
                f"images must be uint8 in 0..255 or already normalised floats, not {image.dtype}"
            )
        image = image.to(next(self.image_tower.parameters()).dtype)
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def encode_image(self, image: Tensor) -> Tensor:
        """image: (B, 3, H, W) uint8, or float normalised by the tower's mean and std -> (B, D), unit norm."""
        if not self.image_tower.encodes:
            raise ValueError(NO_IMAGES)
        return _unit(self.image_projection(self.image_tower(self.normalize_image(image))))

    def encode_text(self, text: Tensor) -> Tensor:
        """text: (B, L) int64 token ids -> (B, D), unit norm."""
        return _unit(self.text_projection(self.text_tower(text)))

    def check_inputs(self, inputs: Sequence[str]) -> None:
        """Raise ValueError, before the first step, for a feature that this model is not set up to make."""
        for name in inputs:
            if name not in FEATURES:
                raise unknown("model output", name, FEATURES)
        pictures = [name for name in inputs if name in _IMAGE_PASSES]
        if pictures and not self.image_tower.encodes:
            raise ValueError(
                f"a loss reads {pictures[0]}, and {NO_IMAGES}: choose losses of texts, or an image tower"
            )
        if "text_features_view2" in inputs and not self.text_tower.has_dropout:
            raise ValueError(
                "text_features_view2 is a second dropout pass over the captions, but this text tower drops "
                "nothing, so both views would be identical: set text_tower.dropout (for hf "
                "text_tower.hidden_dropout, or attention_dropout where it has no other) to 0.1, say"
            )
        if "logit_bias" in inputs and self.logit_bias is None:
            raise ValueError(
                "a loss asks for logit_bias, which this model lacks: set init_logit_bias (SigLIP: -10)"
            )
        if ("mlm_logits" in inputs or "mlm_labels" in inputs) and self.mlm_head is None:
            raise ValueError(
                "a loss asks for mlm_logits, but this model has no such head: set mlm_probability "
                "(BERT: 0.15)"
            )

    def forward(
        self,
        batch: Mapping[str, Any],
        inputs: Sequence[str] = ("image_features", "text_features", "logit_scale"),
    ) -> dict[str, Tensor]:
        """The features named in `inputs`, made from `batch` with as few passes as they need.

        Args:
            batch: image (B, 3, H, W) uint8, text (B, L) or with m captions a picture (B, m, L) int64, and
                hard_negative (B, m h, L), premise, entailment, contradiction (M, L), pair_premise,
                pair_hypothesis (P, L), nli_labels (P,), pair_ids, sample_index (B,) as needed.
                What a batch of one's own has of text_index, sample_weight (B,), content_features (B, E) and
                hard_negative_image_features is handed on, and a teacher's dist_image_features (B, E),
                dist_text_features (B, E) or (B, m, E) and dist_logit_scale ().
            inputs: names from `clipkit.model.FEATURES`.

        Returns:
            *_features (rows, D) of unit norm in fp32, where image_features and text_features have B m rows;
            hard_negative_features (B m, h, D); logit_scale and logit_bias (); mlm_logits (T, V) and mlm_labels
            (T,) over the T hidden tokens; labels as they came; pair_ids and sample_index (B m,).
        """
        self.check_inputs(inputs)
        features = self._passes(_IMAGE_PASSES, batch, inputs, self._encode_images)
        features |= self._passes(_TEXT_PASSES, batch, inputs, self._encode_texts)
        for name, source in _PASSED_ON.items():
            if name in inputs and _there(batch, name, name):
                features[name] = _entry(batch, name, name, source)
        if features.get("dist_text_features") is not None and features["dist_text_features"].ndim == 3:
            features["dist_text_features"] = features["dist_text_features"].flatten(0, 1).clone()
        per_picture = _captions_per_picture(batch)
        if "hard_negative_features" in features:
            pictures, texts = batch["hard_negative"].shape[:2]
            each = (pictures * per_picture, texts // per_picture)
            # A copy: FSDP warns of outputs that are views.
            features["hard_negative_features"] = features["hard_negative_features"].unflatten(0, each).clone()
        if per_picture > 1:
            for name in set(_OF_PICTURES) & set(features):
                features[name] = features[name].repeat_interleave(per_picture, 0)
        if "logit_scale" in inputs:
            features["logit_scale"] = self.logit_scale
        if "logit_bias" in inputs and self.logit_bias is not None:
            features["logit_bias"] = self.logit_bias.float().sum()
        if ("mlm_logits" in inputs or "mlm_labels" in inputs) and self.mlm_head is not None:
            text = _rows(_entry(batch, "text", "mlm_logits", "data: shards with captions"))
            features["mlm_logits"], features["mlm_labels"] = self.mlm_head(self.text_tower, text)
        return features

    def _passes(self, table: Mapping[str, tuple[str, str]], batch, inputs, encode) -> dict[str, Tensor]:
        wanted = {
            name: _entry(batch, entry, name, source)
            for name, (entry, source) in table.items()
            if name in inputs and _there(batch, entry, name)
        }
        return dict(zip(wanted, encode(list(wanted.values())))) if wanted else {}

    def _encode_images(self, images: list[Tensor]) -> Sequence[Tensor]:
        # One pass over all views: BatchNorm sees the step's images once and updates its statistics once.
        if len(images) == 1:
            return [self.encode_image(*images)]
        return _apart(self.encode_image(torch.cat(images)), images)

    def _encode_texts(self, texts: list[Tensor]) -> Sequence[Tensor]:
        texts = [_rows(text) for text in texts]
        if len(texts) == 1:
            return [self.encode_text(*texts)]
        length = max(text.shape[1] for text in texts)
        pad_id = self.text_tower.pad_id
        texts = [F.pad(text, (0, length - text.shape[1]), value=pad_id) for text in texts]
        # Dropout draws one mask an entry of the joined batch, so two rows of the same caption get independent
        # masks.
        return _apart(self.encode_text(torch.cat(texts)), texts)


class MaskedLanguageHead(nn.Module):
    """Predicts hidden tokens from both sides, with the token embedding as output (Devlin et al. 2019, 3.1).

    Of the tokens that are not special, `probability` are drawn, at least one; of these 80 % become mask_id,
    10 % a random id and 10 % stay. logits = LayerNorm(GELU(dense(state))) @ embedding^T + bias, on the drawn
    tokens only.
    """

    def __init__(self, tower: TextTower, probability: float, *, mask_id: int | None, sot_id: int | None):
        super().__init__()
        if not 0 < probability < 1:
            raise ValueError(
                f"mlm_probability is a share above 0 and below 1 (BERT: 0.15), not {probability}"
            )
        if tower.causal:
            raise ValueError(
                "mlm_probability needs a text tower that sees both sides of a token: set text_tower.causal: false, or "
                "for hf choose another model_type than a causal one"
            )
        if mask_id is None or sot_id is None:
            raise ValueError(
                "mlm_probability needs mask_id and sot_id, ids of the tokenizer's mask and start tokens"
            )
        self.probability, self.mask_id = probability, mask_id
        self.kept = (tower.pad_id, tower.eot_id, sot_id)
        width = tower.token_embedding.embedding_dim
        self.dense = nn.Linear(tower.width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(tower.vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def hide(self, text: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """text: (B, L) -> (the text with some tokens hidden (B, L), which were drawn (B, L) bool)."""
        draw = torch.rand(text.shape, device=text.device)
        for token in self.kept:
            draw = draw.masked_fill(text == token, 2.0)
        # The lowest draw is taken whatever its value: a batch without a hidden token would have no loss.
        drawn = (draw < self.probability) | ((draw == draw.min()) & (draw < 2))
        fate = torch.rand(text.shape, device=text.device)
        other = torch.randint(vocab_size, text.shape, device=text.device)
        hidden = torch.where(drawn & (fate < 0.8), torch.full_like(text, self.mask_id), text)
        return torch.where(drawn & (fate >= 0.9), other, hidden), drawn

    def forward(self, tower: TextTower, text: Tensor) -> tuple[Tensor, Tensor]:
        """text: (B, L) -> logits (T, V) and labels (T,) of the T drawn tokens."""
        embedding, text = tower.token_embedding.weight, tower.aligned(text)
        hidden, drawn = self.hide(text, embedding.shape[0])
        states = tower.tokens(hidden)[drawn]
        return F.linear(self.norm(F.gelu(self.dense(states))), embedding, self.bias), text[drawn]


def create_model(config: Mapping[str, Any], *, tokenizer: Vocabulary, adapters: bool = True) -> DualEncoder:
    """The model that a config describes, for a tokenizer's ids.

    Args:
        config: embed_dim, image_tower and text_tower (dicts with `name` and that tower's settings), and
            optionally init_logit_scale, init_logit_bias, mlm_probability, channels_last, text_projection_bias.
        tokenizer: one of clipkit.data, or anything with its numbers and perhaps mask_id.
        adapters: False leaves out those that the towers' `lora` asks for, which `add_adapters` puts in once the weights
            are those that are to be adapted.

    Raises:
        ValueError: an unknown key or name, a vocabulary that is not the tower's, or texts longer than it
            holds.
    """
    tolerate_broken_wandb()
    optional = (
        "init_logit_scale",
        "init_logit_bias",
        "mlm_probability",
        "channels_last",
        "text_projection_bias",
    )
    check_keys(config, ("embed_dim", "image_tower", "text_tower", *optional), "the model")
    for key in ("embed_dim", "image_tower", "text_tower"):
        if config.get(key) is None:
            raise ValueError(f"the model's config has no {key!r}")
    if not adapters:
        towers = {
            key: {name: value for name, value in config[key].items() if name != "lora"}
            for key in ("image_tower", "text_tower")
            if isinstance(config[key], Mapping)
        }
        config = {**config, **towers}
    embed_dim = int(config["embed_dim"])
    text_tower = create_text_tower(
        config["text_tower"],
        embed_dim=embed_dim,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        eot_id=tokenizer.eot_id,
        context_length=tokenizer.context_length,
    )
    if tokenizer.context_length > text_tower.context_length:
        raise ValueError(
            f"the tokenizer makes texts of {tokenizer.context_length} tokens but the text tower holds "
            f"{text_tower.context_length}: lower the tokenizer's context_length or raise "
            "text_tower.context_length"
        )
    mask_id = getattr(tokenizer, "mask_id", None)
    return DualEncoder(
        create_image_tower(config["image_tower"], embed_dim=embed_dim),
        text_tower,
        embed_dim=embed_dim,
        # A vocabulary without a mask token lends its start token, which stands nowhere else but first.
        mask_id=tokenizer.sot_id if mask_id is None else mask_id,
        sot_id=tokenizer.sot_id,
        **{key: config[key] for key in optional if config.get(key) is not None},
    )


def add_adapters(model: DualEncoder, config: Mapping[str, Any]) -> None:
    """Put the adapters that a config's image_tower.lora and text_tower.lora ask for beside the weights there are."""
    for key, tower in (("image_tower", model.image_tower), ("text_tower", model.text_tower)):
        lora = config[key].get("lora") if isinstance(config[key], Mapping) else None
        if lora and lora.get("rank"):
            add_lora(tower, **lora)


def _projection(width: int, embed_dim: int, *, bias: bool = False) -> nn.Linear:
    projection = nn.Linear(width, embed_dim, bias=bias)
    nn.init.normal_(projection.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection


def _unit(features: Tensor) -> Tensor:
    """features: (B, D) -> unit rows in fp32 (fp64 stays), whatever the autocast."""
    features = features if features.dtype == torch.float64 else features.float()
    return F.normalize(features, dim=-1)


def _apart(features: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    """The rows of each part, copied: FSDP warns of outputs that are views."""
    return [rows.clone() for rows in features.split([len(part) for part in parts])]


def _there(batch: Mapping[str, Any], entry: str, feature: str) -> bool:
    """Whether to make a feature: one that is missed is an error where it is made."""
    return feature not in _OPTIONAL or batch.get(entry) is not None


def _captions_per_picture(batch: Mapping[str, Any]) -> int:
    text = batch.get("text")
    return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 1


def _rows(text: Tensor) -> Tensor:
    """(B, m, L) as (B m, L); (B, L) as it is."""
    return text.flatten(0, 1) if text.ndim == 3 else text


def _entry(batch: Mapping[str, Any], entry: str, feature: str, source: str) -> Tensor:
    if batch.get(entry) is None:
        raise ValueError(
            f"{feature} needs {entry!r} in the batch, which holds {sorted(batch)}: set up {source}"
        )
    return batch[entry]
