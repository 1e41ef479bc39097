"""clipkit: contrastive image-text pretraining, and the study of its language encoder.

    import clipkit
    loss = clipkit.create_loss(["infonce", "cyclic"])

The names below are imported when first used: `import clipkit` costs nothing, and `clipkit.losses` needs torch
alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "create_loss": "losses",
    "list_losses": "losses",
    "register_loss": "losses",
    "check_gradient_contract": "losses",
    "cached_backward": "grad_cache",
    "create_model": "model",
    "DualEncoder": "model",
    "create_image_tower": "towers",
    "create_text_tower": "towers",
    "create_stream": "data",
    "create_tokenizer": "data",
    "create_optimizer": "optim",
    "create_schedule": "optim",
    "evaluate": "evals",
    "load_model": "checkpoint",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    return getattr(import_module(f"clipkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
