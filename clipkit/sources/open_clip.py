"""open_clip's models as sources: their settings in clipkit's words, their weights under clipkit's names.

A model is named as open_clip names it. What clipkit has no like of (attention pools, Hugging Face text towers, CoCa) is an
error that says which setting it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clipkit.data import Tokenizer, create_tokenizer
from clipkit.foreign import BrokenFile, read_json
from clipkit.loggers import tolerate_broken_wandb
from clipkit.registry import unknown
from clipkit.sources.files import SUFFIXES, read_state_dict
from clipkit.sources.source import Source

CONFIG = "open_clip_config.json"
# open_clip.push_to_hf_hub's names first, as open_clip looks for them.
_NAMES = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth", "model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth",
)  # fmt: skip
_POOLINGS = {"argmax": "eot", "eos": "eot", "last": "last", "first": "cls"}
# Preprocessing of open_clip's own, where a model says none.
_PREPROCESS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def from_name(name: str, given: str) -> Source:
    """NAME=TAG or NAME=FILE: open_clip's architecture with published weights, or those of a file."""
    open_clip = _library()
    pretrained = open_clip.pretrained
    architecture, _, weights = given.partition("=")
    if architecture not in open_clip.list_models():
        raise unknown("open_clip model", architecture, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not weights:
        raise ValueError(
            f"{name} names no weights: give open_clip:{architecture}=TAG_OR_FILE (tags: {', '.join(tags) or 'none'})"
        )
    config: Any = open_clip.get_model_config(architecture)
    published = pretrained.get_pretrained_cfg(architecture, weights)
    if published:
        try:
            path = pretrained.download_pretrained(published)
        except Exception as error:
            raise ValueError(
                f"{name}: open_clip could not fetch the weights {weights!r}: {(str(error).splitlines() or [''])[0][:300]}. "
                "Fetch them once with the network, or give a file"
            ) from error
        # A published model knows which activation it was trained with; the architecture's name may say another.
        config = {**config, "quick_gelu": bool(published.get("quick_gelu", config.get("quick_gelu", False)))}
    elif Path(weights).is_file():
        path, published = weights, {}
    else:
        raise ValueError(
            f"{name}: {weights!r} is neither a file nor a tag of {architecture}. Its tags: {', '.join(tags) or 'none'}"
        )
    state, _ = read_state_dict(path)
    tokenizer = _tokenizer(config, None)
    return _source(name, f"open_clip's {architecture}", str(path), state, config, published, tokenizer)


def from_hub(name: str, identifier: str) -> Source:
    """hf-hub:ORGANISATION/NAME, a repository with open_clip_config.json and weights."""
    fetch = _library().pretrained.download_pretrained_from_hf
    try:
        config, weights = fetch(identifier, filename=CONFIG), fetch(identifier)
    except Exception as error:
        raise ValueError(
            f"{name}: the hub or its cache gave no {CONFIG} and weights: {(str(error).splitlines() or [''])[0][:300]}"
        ) from error
    return _from_config(name, Path(config), Path(weights), identifier)


def from_folder(name: str, folder: Path) -> Source:
    """local-dir:FOLDER, as `clipkit-export to=open_clip` writes too: open_clip_config.json and weights beside it."""
    config = folder / CONFIG
    if not config.is_file():
        raise ValueError(f"{name}: {folder} is no open_clip folder: it has no {CONFIG}")
    files = [
        path for path in folder.iterdir() if path.suffix in SUFFIXES and path.suffix not in (".pt", ".ckpt")
    ]
    ordered = sorted(
        files, key=lambda path: (_NAMES.index(path.name) if path.name in _NAMES else len(_NAMES), path.name)
    )
    if not ordered:
        raise ValueError(f"{name}: {folder} holds {CONFIG} and no weights (such as {_NAMES[0]})")
    return _from_config(name, config, ordered[0], None)


def _from_config(name: str, config: Path, weights: Path, hub: str | None) -> Source:
    found: dict[str, Any] = read_json(config)
    model = found.get("model_cfg")
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vision_cfg"), dict)
        or not isinstance(model.get("text_cfg"), dict)
    ):
        raise BrokenFile(f"{config} has no model_cfg with vision_cfg and text_cfg")
    preprocess = found.get("preprocess_cfg") or {}
    state, _ = read_state_dict(weights)
    tokenizer = _tokenizer(model, config.parent if hub is None else hub)
    return _source(name, "an open_clip model", str(weights), state, model, preprocess, tokenizer)


def from_openai(name: str, path: Path, state: Mapping[str, Tensor]) -> Source:
    """A TorchScript archive as OpenAI published: its sizes are read off its tensors, its GELU is the quick one."""
    config = _openai_config(state, path)
    return _source(name, "an OpenAI archive", str(path), state, config, {}, _tokenizer(config, None))


def is_layout(names: Mapping[str, Any]) -> bool:
    """Whether weights have open_clip's names."""
    return any(name.startswith("visual.") for name in names) and any(
        name.startswith(("transformer.", "text.", "token_embedding.")) for name in names
    )


def clipkit_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(weights under clipkit's names, names that clipkit has no place for) of open_clip's CLIP and CustomTextCLIP."""
    renamed: dict[str, Tensor] = {}
    odd = []
    for full, tensor in state.items():
        name = full.removeprefix("text.") if not full.startswith("text.text_projection.") else full[5:]
        if name == "visual.head.proj.weight":
            renamed["image_projection.weight"] = tensor
        elif name.startswith("visual.trunk."):
            renamed[f"image_tower.{name[7:]}"] = tensor
        elif name.startswith("visual.head."):
            odd.append(full)
        elif name.startswith("visual."):
            renamed[f"image_tower.body.{name[7:]}"] = tensor
        elif name == "text_projection":
            renamed["text_projection.weight"] = tensor.T
        elif name in ("text_projection.weight", "text_projection.bias"):
            renamed[name] = tensor
        elif (
            name.startswith(("transformer.", "token_embedding.", "ln_final."))
            or name == "positional_embedding"
        ):
            renamed[f"text_tower.body.{name}"] = tensor
        elif name in ("logit_scale", "logit_bias"):
            renamed[{"logit_scale": "log_logit_scale"}.get(name, name)] = tensor.reshape(1)
        elif name != "attn_mask":
            odd.append(full)
    return renamed, odd


def _source(
    name: str,
    kind: str,
    place: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> Source:
    settings = model_settings(config, preprocess, name)
    text = config["text_cfg"]
    pool = text.get("pool_type", "argmax")
    end = {"argmax": text.get("vocab_size", 49408) - 1, "eos": text.get("eos_id", 2)}.get(
        pool, tokenizer.eot_id
    )
    if end != tokenizer.eot_id:
        raise ValueError(
            f"{name}: text_cfg pools the token {end} ({pool}), and its tokenizer ends a text with {tokenizer.eot_id}"
        )
    weights, odd = clipkit_names(state)
    if not weights:
        raise BrokenFile(f"{place} is no open_clip model's: none of its tensors has a name of one")
    if odd:
        raise ValueError(
            f"{name}: {place} holds {len(odd)} tensors that its settings do not speak of, such as {odd[0]}"
        )
    return Source(name, kind, place, weights, settings, tokenizer)


def model_settings(config: Mapping[str, Any], preprocess: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What `clipkit.create_model` takes, of an open_clip `model_cfg` and `preprocess_cfg`.

    Raises:
        ValueError: a setting that clipkit's towers do not have; the message names it.
    """
    quick_gelu = bool(config.get("quick_gelu", False))
    text, bias = _text_settings(config["text_cfg"], quick_gelu, name)
    _only(config, {"multimodal_cfg": None, "nonscalar_logit_scale": False}, "model_cfg", name, ignore=(
        "embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "init_logit_bias"
    ))  # fmt: skip
    settings = {
        "embed_dim": int(config["embed_dim"]),
        "image_tower": {
            **_vision_settings(config["vision_cfg"], quick_gelu, name),
            **{key: preprocess.get(key) or default for key, default in _PREPROCESS.items()},
        },
        "text_tower": text,
        "text_projection_bias": bias,
    }
    for key in ("mean", "std"):
        settings["image_tower"][key] = list(settings["image_tower"][key])
    # open_clip may draw one at random in training; an evaluation's is bicubic.
    if settings["image_tower"]["interpolation"] == "random":
        settings["image_tower"]["interpolation"] = "bicubic"
    if config.get("init_logit_bias") is not None:
        settings["init_logit_bias"] = float(config["init_logit_bias"])
    return settings


# Settings of open_clip's that act in training alone, or are read elsewhere.
_VISION = {
    "ls_init_value": None, "attentional_pool": False, "no_ln_pre": False, "pos_embed_type": "learnable",
    "final_ln_after_pool": False, "pool_type": "tok", "act_kwargs": None, "norm_kwargs": None, "block_type": None,
    "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False, "scale_attn": False,
    "scale_fc": False,
}  # fmt: skip


def _vision_settings(given: Mapping[str, Any], quick_gelu: bool, name: str) -> dict[str, Any]:
    size = given.get("image_size", 224)
    if isinstance(size, (list, tuple)):
        if len({*size}) != 1:
            raise ValueError(f"{name}: vision_cfg.image_size is {size}: clipkit's pictures are square")
        size = size[0]
    if given.get("timm_model_name"):
        ignore = (
            "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_drop", "timm_drop_path", "image_size",
            "layers", "width", "head_width", "mlp_ratio", "patch_size", "output_tokens", "attn_pooler_queries",
            "attn_pooler_heads",
        )  # fmt: skip
        _only(
            given,
            {**_VISION, "timm_proj_bias": False, "patch_dropout": 0.0},
            "vision_cfg",
            name,
            ignore=ignore,
        )
        proj, pool = given.get("timm_proj", "linear"), given.get("timm_pool", "avg")
        if proj not in ("linear", "none") or pool in ("abs_attn", "rot_attn"):
            raise ValueError(
                f"{name}: vision_cfg has timm_proj {proj!r} and timm_pool {pool!r}; clipkit's timm tower ends in a linear "
                "projection or none, with a pool of timm's own"
            )
        return {
            "name": "timm",
            "model": given["timm_model_name"],
            "image_size": size,
            "pool": pool or None,
            "project": proj == "linear",
            "drop_path": given.get("timm_drop_path"),
        }
    ignore = (
        "layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout", "output_tokens",
        "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_model_name", "timm_pool", "timm_proj",
        "timm_proj_bias", "timm_drop", "timm_drop_path",
    )  # fmt: skip
    _only(given, _VISION, "vision_cfg", name, ignore=ignore)
    layers, width = given.get("layers", 12), given.get("width", 768)
    if isinstance(layers, (list, tuple)):
        if given.get("head_width", 64) != 64:
            raise ValueError(
                f"{name}: vision_cfg.head_width is {given['head_width']}; clipkit's ResNet has 64 columns a head"
            )
        return {"name": "clip_resnet50", "image_size": size, "layers": list(layers), "width": width}
    return {
        "name": "clip_vit",
        "image_size": size,
        "patch_size": given.get("patch_size", 16),
        "width": width,
        "layers": layers,
        "heads": width // given.get("head_width", 64),
        "mlp_ratio": given.get("mlp_ratio", 4.0),
        "patch_dropout": given.get("patch_dropout", 0.0),
        "quick_gelu": quick_gelu,
    }


_TEXT = {
    "ls_init_value": None, "embed_cls": False, "final_ln_after_pool": False, "proj_type": "linear", "act_kwargs": None,
    "block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False, "scale_attn_inner": False,
    "scale_attn": False, "scale_fc": False, "hf_model_name": None, "use_pad_mask": False,
}  # fmt: skip


def _text_settings(given: Mapping[str, Any], quick_gelu: bool, name: str) -> tuple[dict[str, Any], bool]:
    """(the text tower's settings, whether its projection has a bias)."""
    _only(given, _TEXT, "text_cfg", name, ignore=(
        "context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "width", "heads", "layers",
        "mlp_ratio", "pad_id", "eos_id", "no_causal_mask", "pool_type", "proj_bias", "output_tokens", "norm_kwargs",
        "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
    ))  # fmt: skip
    norm = dict(given.get("norm_kwargs") or {})
    eps = norm.pop("eps", 1e-5)
    pool = given.get("pool_type", "argmax")
    if norm or pool not in _POOLINGS:
        raise ValueError(
            f"{name}: text_cfg has norm_kwargs {norm} or pool_type {pool!r}, which clipkit's text tower has not"
        )
    both_sides = bool(given.get("no_causal_mask", False))
    settings = {
        "name": "transformer",
        "context_length": given.get("context_length", 77),
        "width": given.get("width", 512),
        "layers": given.get("layers", 12),
        "heads": given.get("heads", 8),
        "mlp_ratio": given.get("mlp_ratio", 4.0),
        "pooling": _POOLINGS[pool],
        "causal": not both_sides,
        "quick_gelu": quick_gelu,
        "norm_eps": eps,
        # open_clip hides no padding: whoever sees both sides, or pools the last place, reads it.
        "attend_padding": both_sides or pool == "last",
    }
    return settings, bool(given.get("proj_bias", False))


def _only(
    given: Mapping[str, Any], known: Mapping[str, Any], what: str, name: str, *, ignore: tuple[str, ...]
) -> None:
    """ValueError for a setting that clipkit has no like of and that is not at its default."""
    for key, value in given.items():
        if key in ignore or (key in known and (value == known[key] or not value and not known[key])):
            continue
        raise ValueError(
            f"{name}: {what}.{key} is {str(value)[:80]!r}, which clipkit's towers have no like of: this model cannot be begun "
            "from"
        )


def _tokenizer(config: Mapping[str, Any], place: Path | str | None) -> Tokenizer:
    """The tokenizer as open_clip.get_tokenizer chooses it; a folder holds its own."""
    text = config["text_cfg"]
    extra = dict(text.get("tokenizer_kwargs") or {})
    clean = extra.pop("clean", None)
    known = (None, "canonicalize") if text.get("hf_tokenizer_name") else (None, "canonicalize", "lower")
    if extra or clean not in known or text.get("tokenizer_mode"):
        raise ValueError(
            f"text_cfg.tokenizer_kwargs {extra or clean!r} are of an open_clip tokenizer that clipkit has no like of"
        )
    spec: dict[str, Any] = {"context_length": text.get("context_length", 77)}
    spec |= {"clean": clean} if clean == "canonicalize" else {}
    named = text.get("hf_tokenizer_name")
    if named:
        made = create_tokenizer({"name": "hf", "model": str(place or named), **spec})
    else:
        made = create_tokenizer({"name": "clip_bpe", **spec})
    rows = text.get("vocab_size", 49408)
    if not made.vocab_size <= rows:
        raise ValueError(
            f"the tokenizer of this open_clip model has {made.vocab_size} ids, and its text_cfg {rows}"
        )
    return made


def _library() -> Any:
    # It takes seconds, and imports timm, which imports wandb.
    tolerate_broken_wandb()
    import open_clip

    return open_clip


def _openai_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The model_cfg of a CLIP by its tensors' shapes (Radford et al. 2021, tables 19 and 20)."""
    try:
        blocks = {name.split(".")[2] for name in state if name.startswith("transformer.resblocks.")}
        width = state["ln_final.weight"].shape[0]
        text = {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": width,
            "heads": width // 64,
            "layers": len(blocks),
        }
        if "visual.proj" in state:
            patch = state["visual.conv1.weight"].shape[-1]
            grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
            layers = {
                name.split(".")[3] for name in state if name.startswith("visual.transformer.resblocks.")
            }
            vision: dict[str, Any] = {
                "image_size": patch * grid,
                "layers": len(layers),
                "width": state["visual.conv1.weight"].shape[0],
                "patch_size": patch,
            }
        else:
            stages = [
                len({name.split(".")[2] for name in state if name.startswith(f"visual.layer{n}.")})
                for n in (1, 2, 3, 4)
            ]
            grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
            vision = {
                "image_size": grid * 32,
                "layers": stages,
                "width": state["visual.layer1.0.conv1.weight"].shape[0],
            }
        embed_dim = state["text_projection"].shape[1]
    except (KeyError, IndexError):
        raise BrokenFile(
            f"{path} is a TorchScript archive, and not of a CLIP as OpenAI published them"
        ) from None
    return {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
