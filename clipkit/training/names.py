"""The names in a run's settings, looked at before anything is drawn, opened or built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clipkit.data.spec import check_kind
from clipkit.data.tokenizers import check_tokenizer
from clipkit.evals import check_tasks
from clipkit.loggers import check_loggers, tolerate_broken_wandb
from clipkit.losses import create_loss
from clipkit.optim import create_optimizer
from clipkit.sources import check_named
from clipkit.towers import check_image_tower, check_text_tower
from clipkit.training.evaluation import check_every


def check_names(config: Mapping[str, Any]) -> None:
    """ValueError for the first name that a registry does not know, or a setting that what it names does not take.

    Args:
        config: a run's settings, as in conf/pretrain.yaml.
    """
    # The towers' check asks timm, which imports wandb.
    tolerate_broken_wandb()
    check_named(config)
    for tower, check in (("image_tower", check_image_tower), ("text_tower", check_text_tower)):
        if config[tower]["name"] != "source":
            check(config[tower])
    check_kind(config["data"]["kind"])
    check_tokenizer(config["data"]["tokenizer"])
    check_tasks(config["eval"])
    check_every(config["eval_every"], config["eval"])
    check_loggers(config["logger"])
    # Weights drawn here must not change what is drawn later.
    with torch.random.fork_rng(devices=[]):
        create_optimizer(torch.nn.Linear(2, 2), **config["optim"])
        create_loss(config["loss"])
