"""Which of a run's settings say how it is carried out and watched, where its data lies, how long it is; the rest is the run.

EXECUTION is free: a run folder's name leaves these settings out, a run may go on with other values of them, and
runs that differ in nothing else count as the same experiment. LOCATION and LENGTH are part of the name, and a run may go on
with other values of them. Every other setting says what is learnt and how, and makes another run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from clipkit.kinds import COUNT, FRACTION, NATURAL, POSITIVE, Number, OneOf, or_null

EXECUTION = (
    "output_dir",
    "plugins",
    "resume",
    "device",
    "num_threads",
    "max_minutes",
    "timeout_minutes",
    "log_every",
    "logger",
    "count_flops",
    "profile",
    "profile.start",
    "profile.steps",
    "loss_spike",
    "skip_nonfinite",
    "amend",
    "eval_every",
    "save_every",
    "keep",
    "objective",
    "micro_batch_size",
    "parallel",
    "compile",
    "tf32",
    "channels_last",
    "image_tower.activation_checkpointing",
    "text_tower.activation_checkpointing",
    "data.max_bad_fraction",
    "data.num_workers",
    "data.prefetch",
    "data.cache_dir",
    "data.spool_gb",
    "data.timeout_s",
    "data.shard_stall_s",
    "data.shard_deadline_s",
    "data.shard_retries",
)
# Where a run's data lies: part of its name, for other data are another run; but a run may go on where the same data has
# moved to. What the data is stands in its checkpoints, which are compared.
LOCATION = (
    "data.root",
    "data.train",
    "data.val",
    "data.zeroshot",
    "data.shapes.folder",
    "data.teacher",
    "data.sentences.triplets",
    "data.sentences.pairs",
)
# How long a run is, and so at which rates it learns: a run may be made longer as long as the steps it has taken had the rates
# that the new settings say. {key: what it may be}.
LENGTH = {
    "steps": or_null(COUNT),
    "epochs": or_null(COUNT),
    "schedule": OneOf(("cosine", "linear", "constant", "wsd")),
    "cooldown_steps": NATURAL,
    "final_lr": FRACTION,
}
# What `amend` may change in a run that has begun: its length, and what helps it over a loss that is not finite.
AMENDABLE = {
    **LENGTH,
    "optim.lr": POSITIVE,
    "optim.weight_decay": Number(0),
    "clip_grad_norm": or_null(POSITIVE),
    "max_logit_scale": POSITIVE,
    "precision": OneOf(("fp32", "bf16", "fp16", "pure_bf16")),
}
# Asks for a folder of its own, and changes nothing else.
NAME = "name"
# In a checkpoint's config.json alone: what the towers' pretrained models decided, see clipkit.checkpoint.
ARCHITECTURE = "architecture"


def experiment(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a run the one it is, its seed among them."""
    return _without(config, {*EXECUTION, NAME, ARCHITECTURE})


def learnt(config: Mapping[str, Any]) -> dict[str, Any]:
    """`experiment` without its length and where its data lies, and so without the tasks, which are found beside it."""
    return _without(config, {*EXECUTION, NAME, ARCHITECTURE, *LOCATION, *LENGTH, "eval"})


def _without(config: Mapping[str, Any], keys: set[str], prefix: str = "") -> dict[str, Any]:
    return {
        key: _without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in keys
    }


def differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested mappings differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}, key=str):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix, old, new
