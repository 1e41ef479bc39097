"""clipkit: contrastive image-text pretraining, and the study of its language encoder.

    import clipkit
    loss = clipkit.create_loss(["infonce", "cyclic"])

The names below are imported when first used: `import clipkit` costs nothing, and `clipkit.losses` needs torch
alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.data import create_stream, create_tokenizer
    from clipkit.evals import evaluate
    from clipkit.grad_cache import cached_backward
    from clipkit.loading import load_model
    from clipkit.losses import check_gradient_contract, create_loss, list_losses, register_loss
    from clipkit.model import DualEncoder, create_model
    from clipkit.optim import create_optimizer, create_schedule
    from clipkit.predict import Predictor
    from clipkit.towers import create_image_tower, create_text_tower

__version__ = "0.1.0"


def _checkout_of(program: str | None) -> Path | None:
    """The checkout that a program of recipes/, benchmarks/ or tests/ lies in, if it is not this one."""
    for folder in Path(program).resolve().parents[1:3] if program else ():
        if (folder / "clipkit" / "__init__.py").is_file() and (folder / "recipes").is_dir():
            return None if folder == Path(__file__).resolve().parent.parent else folder
    return None


# `python CHECKOUT/recipes/pretrain.py` runs CHECKOUT's library, whichever clipkit is installed.
if (_checkout := _checkout_of(getattr(sys.modules.get("__main__"), "__file__", None))) is not None:
    sys.path.insert(0, str(_checkout))
    del sys.modules["clipkit"]
    import_module("clipkit")

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
    "load_model": "loading",
    "Predictor": "predict",
}

__all__ = [
    "DualEncoder",
    "Predictor",
    "cached_backward",
    "check_gradient_contract",
    "create_image_tower",
    "create_loss",
    "create_model",
    "create_optimizer",
    "create_schedule",
    "create_stream",
    "create_text_tower",
    "create_tokenizer",
    "evaluate",
    "list_losses",
    "load_model",
    "register_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipkit' has no attribute {name!r}")
    return getattr(import_module(f"clipkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
