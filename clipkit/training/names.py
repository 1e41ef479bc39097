"""The names in a run's settings, looked at before anything is drawn, opened or built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clipkit.data.tokenizers import check_tokenizer
from clipkit.evals import check_tasks
from clipkit.loggers import check_loggers, tolerate_broken_wandb
from clipkit.losses import create_loss
from clipkit.optim import check_optimizer
from clipkit.towers import check_image_tower, check_text_tower


def check_names(
    *,
    image_tower: Mapping[str, Any],
    text_tower: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | str,
    loss: Mapping[str, Any],
    optim: Mapping[str, Any],
    tasks: Mapping[str, Any],
    loggers: Mapping[str, Any],
) -> None:
    """ValueError for the first name that a registry does not know, or a setting that what it names does not take.

    Args:
        image_tower, text_tower, tokenizer, loss, optim, tasks, loggers: as the functions that make these take them.
    """
    # The towers' check asks timm, which imports wandb.
    tolerate_broken_wandb()
    check_image_tower(image_tower)
    check_text_tower(text_tower)
    check_tokenizer(tokenizer)
    check_optimizer(**optim)
    check_tasks(tasks)
    check_loggers(loggers)
    # Some have weights: drawn here, they must not change what is drawn later.
    with torch.random.fork_rng(devices=[]):
        create_loss(loss)
