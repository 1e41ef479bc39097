"""Settings on the command line that this run reads nothing of: it is said, for the user meant something by them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Losses that read sentences beside the pairs, and what they read.
_SENTENCES = {"nli_contrastive": "triplets", "nli_softmax": "pairs"}
_SCORED = ("final_eval", "eval_every", "best_metric", "objective")


def unread(config: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """A line for every override of clipkit-pretrain that changes nothing in these settings.

    Args:
        config: composed and resolved.
        overrides: as they were given.
    """
    data, tasks = config["data"], config["eval"] or {}
    named = list(_leaves(tasks))
    for entry in overrides:
        key = entry.lstrip("+~").split("=")[0]
        part = ".".join(key.split(".")[:2])
        if part in ("data.val", "data.zeroshot") and tasks:
            given = data[part.partition(".")[2]]
            if not any(leaf in named for leaf in _leaves(given)):
                yield f"{entry}: no task of eval= reads it; eval=retrieval scores data.val, eval.TASK.shards= says where a task looks"
        elif part == "data.sentences":
            name = key.split(".")[-1]
            losses = {(settings or {}).get("name") or term for term, settings in config["loss"].items()}
            read = {what for loss, what in _SENTENCES.items() if loss in losses}
            if name in _SENTENCES.values() and name not in read or not read:
                yield f"{entry}: no loss of this run reads it"
        elif part == "data.tokenizer" and config["text_tower"].get("name") == "source":
            yield f"{entry}: text_tower=source brings its own tokenizer; text_tower.context_length= says how long its texts are"
        elif config["image_tower"].get("name") == "none" and part in ("data.augmentation", "data.cache"):
            yield f"{entry}: image_tower=none reads no picture"
        elif key.endswith(".same_ids") and not data["pair_ids"] and data["captions_per_image"] == 1:
            yield f"{entry}: the data gives its pairs no ids; data.pair_ids= says which are the same"
        elif key in _SCORED and not tasks:
            yield f"{entry}: this run is not scored (eval= names no task)"


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _leaves(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    else:
        yield value
