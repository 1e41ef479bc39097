"""What every setting may be: its kind and range, and a check of composed settings before anything is built.

The keys are those of clipkit's own YAML files, whose comments say what they mean. Settings of losses, evaluation tasks and
loggers are not here: their own factories check them. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from clipkit.kinds import (
    COUNT,
    FLAG,
    FRACTION,
    NAMES,
    NATURAL,
    POSITIVE,
    PROBABILITY,
    TEXT,
    Either,
    Kind,
    ListOf,
    Number,
    OneOf,
    or_null,
)
from clipkit.registry import suggest, unknown
from clipkit.settings import AMENDABLE


def _lora(tower: str) -> dict[str, Any]:
    return {
        f"{tower}.lora.rank": NATURAL,
        f"{tower}.lora.alpha": POSITIVE,
        f"{tower}.lora.dropout": PROBABILITY,
        f"{tower}.lora.targets": Either((OneOf(("all",)), ListOf(TEXT))),
    }


PRETRAIN: dict[str, Any] = {
    **AMENDABLE,
    "seed": Number(0, 2**63 - 1, whole=True),
    "output_dir": TEXT,
    "plugins": ListOf(TEXT),
    "name": or_null(Either((TEXT, Number()))),
    "resume": FLAG,
    "init_from": or_null(TEXT),
    "embed_dim": COUNT,
    "text_projection_bias": FLAG,
    "init_logit_scale": POSITIVE,
    "init_logit_bias": or_null(Number()),
    "mlm_probability": or_null(Number(0, 1, above=True, below=True)),
    "warmup_steps": NATURAL,
    "batch_size": COUNT,
    "micro_batch_size": or_null(COUNT),
    "device": TEXT,
    "num_threads": or_null(COUNT),
    "channels_last": FLAG,
    "parallel": OneOf(("ddp", "fsdp")),
    "compile": FLAG,
    "tf32": FLAG,
    "ema_decay": or_null(PROBABILITY),
    "log_every": COUNT,
    "eval_every": Either((NATURAL, Kind((dict,), "a mapping {task: steps}"))),
    "final_eval": ListOf(TEXT),
    "save_every": NATURAL,
    "keep": COUNT,
    "max_minutes": or_null(Number(0)),
    "timeout_minutes": POSITIVE,
    "count_flops": or_null(FLAG),
    "profile": Kind((dict,), "a mapping"),
    "profile.start": NATURAL,
    "profile.steps": NATURAL,
    "loss_spike": or_null(Number(1, above=True)),
    "skip_nonfinite": NATURAL,
    "amend": or_null(Kind((dict,), "a mapping")),
    "best_metric": or_null(TEXT),
    "objective": or_null(TEXT),
    "image_tower.name": TEXT,
    "image_tower.model": TEXT,
    "image_tower.pretrained": FLAG,
    "image_tower.image_size": or_null(COUNT),
    "image_tower.patch_size": COUNT,
    "image_tower.width": COUNT,
    "image_tower.layers": Either((COUNT, ListOf(COUNT, 4))),
    "image_tower.heads": or_null(COUNT),
    "image_tower.mlp_ratio": POSITIVE,
    "image_tower.patch_dropout": or_null(PROBABILITY),
    "image_tower.quick_gelu": FLAG,
    "image_tower.drop_path": or_null(PROBABILITY),
    "image_tower.pool": or_null(TEXT),
    "image_tower.project": FLAG,
    "image_tower.init_from": or_null(TEXT),
    "image_tower.mean": or_null(ListOf(Number(), 3)),
    "image_tower.std": or_null(ListOf(POSITIVE, 3)),
    "image_tower.resize_mode": or_null(OneOf(("shortest", "longest", "squash"))),
    "image_tower.interpolation": or_null(OneOf(("bicubic", "bilinear"))),
    "image_tower.freeze": Either((NATURAL, OneOf(("all",)))),
    "image_tower.activation_checkpointing": FLAG,
    **_lora("image_tower"),
    "text_tower.name": TEXT,
    "text_tower.pretrained": or_null(TEXT),
    "text_tower.model_type": or_null(TEXT),
    "text_tower.config": or_null(Kind((dict,), "a mapping")),
    "text_tower.context_length": or_null(Number(3, whole=True)),
    "text_tower.width": COUNT,
    "text_tower.layers": COUNT,
    "text_tower.heads": COUNT,
    "text_tower.mlp_ratio": POSITIVE,
    "text_tower.dropout": or_null(PROBABILITY),
    "text_tower.attention_dropout": or_null(PROBABILITY),
    "text_tower.hidden_dropout": or_null(PROBABILITY),
    "text_tower.pooling": or_null(OneOf(("eot", "last", "mean", "cls"))),
    "text_tower.causal": FLAG,
    "text_tower.quick_gelu": FLAG,
    "text_tower.norm_eps": POSITIVE,
    "text_tower.attend_padding": FLAG,
    "text_tower.init_from": or_null(TEXT),
    "text_tower.freeze": Either((NATURAL, OneOf(("all",)))),
    "text_tower.activation_checkpointing": FLAG,
    **_lora("text_tower"),
    "optim.name": TEXT,
    "optim.betas": or_null(ListOf(PROBABILITY, 2)),
    "optim.eps": or_null(POSITIVE),
    "optim.layer_decay": Number(0, 1, above=True),
    "optim.image_tower_lr": POSITIVE,
    "optim.text_tower_lr": POSITIVE,
    "optim.momentum": or_null(PROBABILITY),
    "optim.options": or_null(Kind((dict,), "a mapping")),
    "data.kind": TEXT,
    "data.root": or_null(TEXT),
    "data.train": NAMES,
    "data.val": NAMES,
    "data.zeroshot": or_null(Kind((dict,), "a mapping")),
    "data.shapes": or_null(Kind((dict,), "a mapping")),
    "data.shapes.folder": TEXT,
    "data.shapes.train": COUNT,
    "data.shapes.val": COUNT,
    "data.shapes.seed": NATURAL,
    "data.shapes.image_size": COUNT,
    "data.shapes.copies": COUNT,
    "data.table": or_null(Kind((dict,), "a mapping")),
    "data.table.image": TEXT,
    "data.table.caption": Either((TEXT, ListOf(TEXT))),
    "data.table.separator": or_null(TEXT),
    "data.table.encoding": or_null(TEXT),
    "data.table.quotes": OneOf(("auto", "csv", "none")),
    "data.source": or_null(Kind((dict,), "a mapping")),
    "data.sentences": or_null(Kind((dict,), "a mapping")),
    "data.sentences.triplets": NAMES,
    "data.sentences.pairs": NAMES,
    "data.sentences.batch_size": COUNT,
    "data.tokenizer": Either((TEXT, Kind((dict,), "a mapping"))),
    "data.num_workers": NATURAL,
    "data.prefetch": COUNT,
    "data.captions": OneOf(("random", "first", "all")),
    "data.caption_weights": or_null(ListOf(Number(0))),
    "data.captions_per_image": COUNT,
    "data.pair_ids": or_null(TEXT),
    "data.hard_negatives": or_null(TEXT),
    "data.hard_negatives_per_caption": COUNT,
    "data.teacher": or_null(TEXT),
    "data.augmentation": or_null(Kind((dict,), "a mapping")),
    "data.augmentation.crop_scale": or_null(ListOf(Number(0, 1, above=True), 2)),
    "data.augmentation.crop_ratio": ListOf(POSITIVE, 2),
    "data.augmentation.flip": FRACTION,
    "data.augmentation.colour_jitter": or_null(ListOf(Number(0), 4)),
    "data.augmentation.auto_augment": FLAG,
    "data.shuffle": FLAG,
    "data.window": COUNT,
    "data.resample": FLAG,
    "data.canonical_nodes": COUNT,
    "data.samples_per_epoch": or_null(COUNT),
    "data.cache": OneOf(("none", "ram")),
    "data.cache_size": or_null(COUNT),
    "data.cache_dir": or_null(TEXT),
    "data.spool_gb": POSITIVE,
    "data.max_bad_fraction": Either((FRACTION, Kind((dict,), "a mapping {cause: fraction}"))),
    "data.on_bad_shard": OneOf(("error", "skip")),
    "data.max_pixels": COUNT,
    "data.timeout_s": Number(0),
    "data.shard_stall_s": POSITIVE,
    "data.shard_deadline_s": POSITIVE,
    "data.shard_retries": NATURAL,
}
PLAN: dict[str, Any] = {
    "gpus": Either((COUNT, ListOf(COUNT))),
    "efficiency": Number(0, 1, above=True),
    "launch_us": Number(0),
    "reserve_gb": Number(0),
    "vocab_size": or_null(COUNT),
    "json": FLAG,
    "output": or_null(TEXT),
}
EVALUATE: dict[str, Any] = {
    "checkpoint": TEXT,
    "device": TEXT,
    "batch_size": COUNT,
    "output": or_null(TEXT),
    "output_dir": TEXT,
    "plugins": ListOf(TEXT),
    "trust_paths": FLAG,
}
EXPORT: dict[str, Any] = {
    "checkpoint": or_null(TEXT),
    "merge": or_null(ListOf(TEXT)),
    "alpha": or_null(Either((FRACTION, ListOf(FRACTION)))),
    "to": TEXT,
    "output": or_null(TEXT),
    "project": FLAG,
    "output_dir": TEXT,
    "plugins": ListOf(TEXT),
    "trust_paths": FLAG,
}
SETTINGS = {"pretrain": PRETRAIN, "plan": {**PRETRAIN, **PLAN}, "evaluate": EVALUATE, "export": EXPORT}
# Groups whose entries the user names (terms, tasks, loggers), and what is hydra's or a choice's alone.
FREE_GROUPS = ("loss", "eval", "logger", "hydra", "gpu")


# The towers that our files name; a plugin's has settings of its own, which its registry checks.
OWN_TOWERS = {
    "image_tower": ("timm", "clip_resnet50", "clip_vit", "none", "source"),
    "text_tower": ("transformer", "hf", "source"),
}


def check_values(config: Mapping[str, Any], program: str) -> None:
    """ValueError for a key that nothing reads, or a value out of its range or of another kind.

    Args:
        config: composed settings as plain values, interpolations replaced.
        program: pretrain, plan, evaluate or export.
    """
    known = SETTINGS[program]
    plugged = {
        group: config[group]
        for group, names in OWN_TOWERS.items()
        if isinstance(config.get(group), Mapping) and config[group].get("name") not in names
    }
    config = {key: value for key, value in config.items() if key not in plugged}
    groups = {key.rpartition(".")[0] for key in known} - {""}
    for key, value in _entries(config, known, groups):
        if key not in known:
            raise ValueError(_unknown(key, known, groups))
        if not known[key].holds(value):
            raise ValueError(f"{key}={_shown(value)}: expected {known[key]}")
    for key, value in (config.get("amend") or {}).items():
        if key not in AMENDABLE:
            raise unknown("setting to amend in a run", key, AMENDABLE)
        if not AMENDABLE[key].holds(value):
            raise ValueError(f"amend gives {key}={_shown(value)}: expected {AMENDABLE[key]}")


def _entries(
    config: Mapping[str, Any], known: Mapping[str, Any], groups: set[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is to be looked at: every part of a group, and every setting as a whole."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if not prefix and name in FREE_GROUPS:
            continue
        if key in known or not (isinstance(value, Mapping) and key in groups):
            yield key, value
        if isinstance(value, Mapping) and key in groups:
            yield from _entries(value, known, groups, f"{key}.")


def _unknown(key: str, known: Mapping[str, Any], groups: set[str]) -> str:
    group, _, name = key.rpartition(".")
    within = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == group]
    within += (
        [] if group else sorted({one.partition(".")[0] for one in groups} | {*FREE_GROUPS} - {"hydra", "gpu"})
    )
    hint = suggest(name, within)
    if not hint and (
        elsewhere := difflib.get_close_matches(name, [one.rpartition(".")[2] for one in known], 1, 0.8)
    ):
        hint = " It is " + next(one for one in known if one.rpartition(".")[2] == elsewhere[0]) + "?"
    where = group or "the settings"
    return f"unknown key {key!r}: {where} has no {name!r}.{hint} Valid keys: {', '.join(sorted(within))}."


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
