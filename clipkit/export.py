"""Weights out of clipkit and back: open_clip's state-dict layout, and sentence-transformers folders.

    save_open_clip(model, folder, tokenizer=tokenizer)
    open_clip.create_model_and_transforms("local-dir:FOLDER")          # the same features
    load_open_clip_state_dict(model, other.state_dict())               # and back
    save_sentence_transformer(model, folder, tokenizer=tokenizer)
    SentenceTransformer("FOLDER").encode(captions)

Nothing is converted numerically: tensors are renamed, transposed or split, so features agree to rounding.
"""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from clipkit.data import Tokenizer
from clipkit.model import DualEncoder
from clipkit.sources.open_clip import clipkit_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")


def open_clip_config(model: DualEncoder) -> dict[str, Any]:
    """The `model_cfg` that makes open_clip build this model: `open_clip.model.CLIP(**config)`.

    Raises:
        ValueError: a tower that open_clip cannot build as it is here; the message says which setting.
    """
    image, text = _settings(model.image_tower), _settings(model.text_tower)
    if text["name"] != "transformer":
        raise ValueError(
            f"open_clip's layout needs the text tower 'transformer', not {text['name']!r}: export the text "
            "tower with save_sentence_transformer, or all weights as safetensors"
        )
    if model.text_tower.pooling != "eot" or not model.text_tower.causal:
        raise ValueError(
            "open_clip pools the end token of a causal text tower: this one has "
            f"text_tower.pooling {model.text_tower.pooling!r} and text_tower.causal {model.text_tower.causal}"
        )
    unlike = {
        "text_tower.attend_padding": text["attend_padding"],
        "text_projection_bias": model.text_projection.bias is not None,
        "image_tower.project=false": image.get("project") is False,
    }
    if any(unlike.values()):
        raise ValueError(
            f"open_clip's plain layout has no {next(key for key, on in unlike.items() if on)}, which this model has: export "
            "all weights as safetensors"
        )
    text_cfg = {key: text[key] for key in ("context_length", "width", "heads", "layers", "mlp_ratio")}
    if text["norm_eps"] != 1e-5:
        text_cfg["norm_kwargs"] = {"eps": text["norm_eps"]}
    text_cfg |= {"vocab_size": model.text_tower.vocab_size, "pad_id": model.text_tower.pad_id}
    if model.text_tower.eot_id != model.text_tower.vocab_size - 1:
        # The default takes the largest id for the end token.
        text_cfg |= {"pool_type": "eos", "eos_id": model.text_tower.eot_id}
    config = {
        "embed_dim": model.embed_dim,
        "quick_gelu": bool(text["quick_gelu"]),
        "vision_cfg": {
            "image_size": model.image_tower.image_size,
            **_vision_config(model.image_tower, image, text),
        },
        "text_cfg": text_cfg,
    }
    return config if model.logit_bias is None else {**config, "init_logit_bias": 0.0}


def _vision_config(tower: Any, image: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    if image["name"] == "timm":
        if tower.width != tower.trunk.num_features:
            # A hidden layer stands before the classifier (MobileNetV3).
            raise ValueError(
                f"open_clip takes timm's {image['model']} for {tower.trunk.num_features} columns wide, and its head makes "
                f"{tower.width} of them: its own model of that name does not run"
            )
        # Weights of the same shapes may see pictures through other windows.
        published = tower.trunk.pretrained_cfg
        if published.get("fixed_input_size") and published["input_size"][-1] != tower.image_size:
            raise ValueError(
                f"open_clip builds timm's {image['model']} at its own image_size {published['input_size'][-1]} alone, and "
                f"this tower's is {tower.image_size}"
            )
        return {"timm_model_name": image["model"], "timm_pool": image["pool"] or "", "timm_proj": "linear"}
    if image["name"] == "clip_resnet50":
        return {"layers": list(image["layers"]), "width": image["width"]}
    if image["name"] != "clip_vit":
        raise ValueError(
            f"open_clip has no image tower like {image['name']!r}: it builds timm, clip_resnet50 and clip_vit"
        )
    if image["quick_gelu"] != text["quick_gelu"]:
        raise ValueError(
            "open_clip has one quick_gelu for both towers: set image_tower.quick_gelu and "
            "text_tower.quick_gelu alike"
        )
    same = {key: image[key] for key in ("patch_size", "width", "layers", "mlp_ratio", "patch_dropout")}
    return {**same, "head_width": image["width"] // (image["heads"] or max(1, image["width"] // 64))}


def open_clip_state_dict(model: DualEncoder) -> dict[str, Tensor]:
    """The model's weights under open_clip's names, on the CPU, detached.

    Raises:
        ValueError: as open_clip_config, or where open_clip's own model of that config has other names or
            shapes.
    """
    peer = _open_clip_shapes(model)
    projection = model.image_projection
    state = {f"visual.{name}": tensor for name, tensor in _image_weights(model).items()}
    if isinstance(projection, nn.Linear):
        state["visual.head.proj.weight"] = projection.weight
    state |= {
        name: tensor
        for name, tensor in model.text_tower.get_submodule("body").state_dict().items()
        if name.startswith(_TEXT)
    }
    state["text_projection"] = model.text_projection.weight.T
    state["logit_scale"] = model.log_logit_scale[0]
    if model.logit_bias is not None:
        state["logit_bias"] = model.logit_bias[0]
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    hint = "it builds timm models at their own image_size and pool alone"
    _same_layout(state, peer, "open_clip's model of this config", hint)
    return state


@torch.no_grad()
def load_open_clip_state_dict(model: DualEncoder, state: Mapping[str, Tensor]) -> None:
    """Copy an open_clip.CLIP state dict into a clipkit model of the same architecture, in place.

    Raises:
        ValueError: a name or shape that does not fit, before any weight has changed.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    _same_layout(
        state, _open_clip_shapes(model), "this model", "its settings must be those of the open_clip model"
    )
    renamed, _ = clipkit_names(state)
    missing = [
        name for name in model.state_dict() if name not in renamed and not name.startswith("mlm_head.")
    ]
    if missing:
        raise ValueError(f"the open_clip weights have nothing for {', '.join(missing)}")
    model.load_state_dict(renamed, strict=False)


def save_open_clip(model: DualEncoder, folder: str | Path, *, tokenizer: Tokenizer | None = None) -> Path:
    """Write a folder that open_clip loads by "local-dir:FOLDER": open_clip_config.json and safetensors
    weights.

    Args:
        tokenizer: clipkit's; any but clip_bpe is written beside the weights for open_clip.get_tokenizer.

    Raises:
        ValueError: as open_clip_state_dict.
    """
    config, state = open_clip_config(model), open_clip_state_dict(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and tokenizer.name != "clip_bpe":
        hugging_face_tokenizer(tokenizer).save_pretrained(folder)
        config["text_cfg"]["hf_tokenizer_name"] = "in this folder"
    if tokenizer is not None and tokenizer.clean:
        config["text_cfg"]["tokenizer_kwargs"] = {"clean": tokenizer.clean}
    tower = model.image_tower
    preprocess = {"mean": list(tower.mean), "std": list(tower.std)}
    preprocess |= {"resize_mode": tower.resize_mode, "interpolation": tower.interpolation}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    return folder


def save_sentence_transformer(
    model: DualEncoder, folder: str | Path, *, tokenizer: Tokenizer, project: bool = True
) -> Path:
    """Write the text tower as a sentence-transformers folder of its stock modules: no custom code to trust.

    Transformer + Pooling, then with `project` Dense (the projection) and Normalize, which give encode_text's
    features. The tower 'transformer' becomes a transformers CLIPTextModel, whose blocks compute the same.

    Args:
        tokenizer: clipkit's, which the tower was trained with.
        project: end in the shared space of images and texts; False: the pooled states, `width` columns.

    Raises:
        ValueError: a tower that the stock modules cannot express; the message says why.
    """
    from sentence_transformers import SentenceTransformer

    modules = _sentence_modules()
    tower = model.text_tower
    mode = {"eot": "lasttoken", "last": "lasttoken", "cls": "cls", "mean": "mean"}[tower.pooling]
    with tempfile.TemporaryDirectory() as parts:
        _hugging_face_body(tower).save_pretrained(parts)
        hugging_face_tokenizer(tokenizer).save_pretrained(parts)
        layers = [
            modules.Transformer(parts, max_seq_length=tokenizer.context_length),
            modules.Pooling(tower.width, mode),
        ]
        if project:
            weight, bias = (
                model.text_projection.weight.detach().cpu().float().clone(),
                model.text_projection.bias,
            )
            dense = modules.Dense(
                tower.width,
                model.embed_dim,
                bias=bias is not None,
                activation_function=torch.nn.Identity(),
                init_weight=weight,
                init_bias=None if bias is None else bias.detach().cpu().float().clone(),
            )
            layers += [dense, modules.Normalize()]
        SentenceTransformer(modules=layers, device="cpu").save_pretrained(
            str(folder), create_model_card=False
        )
    return Path(folder)


def hugging_face_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with the ids of clipkit's `tokenizer` (clip_bpe, words or hf).

    Two differences for clip_bpe. It first mends mojibake and HTML entities, which transformers has no part
    for; other texts agree (so does any tokenizer with `clean`). And padding is the end token, hidden by the attention mask: CLIP's own padding id
    is the token "!".
    """
    from transformers import PreTrainedTokenizerFast

    build = {"clip_bpe": _clip_backend, "words": _words_backend, "hf": _hf_backend}
    if tokenizer.name not in build:
        raise ValueError(
            f"no transformers tokenizer is known for {tokenizer.name!r}; known: {', '.join(build)}"
        )
    backend = build[tokenizer.name](tokenizer)
    if tokenizer.clean:
        backend.normalizer = _canonical(backend.normalizer)
    pad_id = tokenizer.eot_id if tokenizer.name == "clip_bpe" else tokenizer.pad_id
    special = {"pad_token": pad_id, "bos_token": tokenizer.sot_id, "eos_token": tokenizer.eot_id}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.context_length,
        padding_side="right",
        truncation_side="right",
        **{name: backend.id_to_token(token) for name, token in special.items()},
    )


def _settings(tower: Any) -> dict[str, Any]:
    if tower.settings is None:
        raise ValueError(
            f"{type(tower).__name__} was built directly: export needs a tower made by create_image_tower or "
            "create_text_tower, which keep its settings"
        )
    return {**tower.settings, "context_length": getattr(tower, "context_length", None)}


def _image_weights(model: DualEncoder) -> dict[str, Tensor]:
    tower = model.image_tower
    if hasattr(tower, "trunk"):
        return {f"trunk.{name}": tensor for name, tensor in tower.get_submodule("trunk").state_dict().items()}
    return tower.get_submodule("body").state_dict()


def _open_clip_shapes(model: DualEncoder) -> dict[str, torch.Size]:
    from open_clip.model import CLIP

    with torch.device("meta"):
        peer = CLIP(**open_clip_config(model))
    return {name: tensor.shape for name, tensor in peer.state_dict().items()}


def _same_layout(
    state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], whose: str, hint: str
) -> None:
    for name in (*shapes, *state):
        given = tuple(state[name].shape) if name in state else "nothing"
        wanted = tuple(shapes[name]) if name in shapes else "nothing"
        # logit_scale and logit_bias may be () or (1,).
        if given != wanted and {given, wanted} != {(), (1,)}:
            raise ValueError(f"{name!r} is {given} in the weights and {wanted} in {whose}: {hint}")


def _sentence_modules() -> Any:
    try:
        from sentence_transformers.sentence_transformer import modules
    except ImportError:
        # Before sentence-transformers 5.
        from sentence_transformers import models as modules  # pyright: ignore[reportAttributeAccessIssue]
    return modules


def _hugging_face_body(tower: Any) -> Any:
    """The tower as a transformers model."""
    if tower.settings is not None and tower.settings["name"] == "hf":
        if not tower.loads_alone:
            raise ValueError(
                f"{tower.model_type} has no model of its encoder alone, which sentence-transformers' stock modules could "
                "load: export all weights as safetensors"
            )
        return tower.body
    if (
        tower.settings is None
        or tower.settings["name"] != "transformer"
        or not tower.causal
        or tower.attend_padding
    ):
        raise ValueError(
            "sentence-transformers' stock modules hold transformers models: this text tower is neither "
            "'hf' nor a causal 'transformer' (text_tower.causal: true, text_tower.attend_padding: false), "
            "for which transformers has CLIPTextModel"
        )
    from transformers import CLIPTextConfig, CLIPTextModel

    settings, body = tower.settings, tower.body
    config = CLIPTextConfig(
        vocab_size=tower.vocab_size,
        hidden_size=tower.width,
        intermediate_size=int(tower.width * settings["mlp_ratio"]),
        num_hidden_layers=tower.num_layers,
        num_attention_heads=tower.heads,
        max_position_embeddings=tower.context_length,
        hidden_act="quick_gelu" if settings["quick_gelu"] else "gelu",
        layer_norm_eps=body.ln_final.eps,
        pad_token_id=tower.pad_id,
        bos_token_id=None,
        eos_token_id=tower.eot_id,
    )
    peer = CLIPTextModel(config).eval()
    peer.load_state_dict(_clip_text_state(peer, body))
    return peer


def _clip_text_state(peer: Any, body: Any) -> dict[str, Tensor]:
    """The body's weights under transformers' names: q, k and v apart, the blocks' parts renamed."""
    names = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    # transformers 5 dropped the prefix that 4 had.
    prefix = "text_model." if any(name.startswith("text_model.") for name in peer.state_dict()) else ""
    state = {
        "embeddings.token_embedding.weight": body.token_embedding.weight,
        "embeddings.position_embedding.weight": body.positional_embedding,
        "final_layer_norm.weight": body.ln_final.weight,
        "final_layer_norm.bias": body.ln_final.bias,
    }
    for i, block in enumerate(body.transformer.resblocks):
        layer = f"encoder.layers.{i}"
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                state[f"{layer}.{theirs}.{kind}"] = block.get_parameter(f"{ours}.{kind}")
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", getattr(block.attn, f"in_proj_{kind}").chunk(3)):
                state[f"{layer}.self_attn.{name}_proj.{kind}"] = part
    return {prefix + name: tensor.detach().cpu().float().clone() for name, tensor in state.items()}


def _clip_backend(tokenizer: Any) -> Any:
    pairs = tokenizer._pairs
    merges = sorted(pairs._ranks, key=pairs._ranks.get)
    vocabulary = pairs._ids
    end = "<end_of_text>"
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=end)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return _framed(backend, tokenizer)


def _words_backend(tokenizer: Any) -> Any:
    special = {
        tokenizer.pad_id: "<pad>",
        tokenizer.unk_id: "<unk>",
        tokenizer.sot_id: "<start>",
        tokenizer.eot_id: "<end>",
    }
    vocabulary = {token: i for i, token in special.items()} | dict(tokenizer._ids)
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\W_]+|[^\w\s]|_"), behavior="removed", invert=True)
    return _framed(backend, tokenizer)


def _canonical(after: Any) -> Any:
    """A normalizer of clean="canonicalize", before the one there is."""
    marks = "".join(f"\\{mark}" for mark in string.punctuation)
    steps = [
        normalizers.Replace("_", " "),
        normalizers.Replace(Regex(f"[{marks}]"), ""),
        normalizers.Lowercase(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    return normalizers.Sequence([*steps, *([after] if after is not None else [])])


def _framed(backend: Any, tokenizer: Any) -> Any:
    """Start and end tokens around every text."""
    start, end = backend.id_to_token(tokenizer.sot_id), backend.id_to_token(tokenizer.eot_id)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, tokenizer.sot_id), (end, tokenizer.eot_id)]
    )
    return backend


def _hf_backend(tokenizer: Any) -> Any:
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend
