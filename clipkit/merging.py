"""One model from the weights of several runs: WiSE-FT's line between two, and the uniform soup of many.

    wise_ft(["runs/pretrained", "runs/tuned"], alpha=0.5)       # (1 - alpha) A + alpha B
    soup(["runs/seed0", "runs/seed1", "runs/seed2"])            # their mean

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models" (WiSE-FT), and "Model soups: averaging weights of multiple
fine-tuned models improves accuracy without increasing inference time". Adapters are merged first; a run that kept an average of
its weights gives that. The temperature is stored as its log, and so is averaged in log space: sqrt(a b) half-way. BatchNorm's
running statistics are averaged as the weights are, which is not what the merged weights would have gathered.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clipkit.data.tokenizers import Tokenizer
from clipkit.foreign import blamed_on
from clipkit.loading import load_model, model_config
from clipkit.model import DualEncoder
from clipkit.settings import differences
from clipkit.towers.lora import merge_lora

# Of a model's settings, those that say how it was trained, or where it began.
_TRAINING = {
    "freeze",
    "lora",
    "activation_checkpointing",
    "pretrained",
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "patch_dropout",
    "drop_path",
    "init_from",
    "init_logit_scale",
    "init_logit_bias",
    "mlm_probability",
    "channels_last",
}


def wise_ft(
    paths: Sequence[str | Path], *, alpha: float, trust_paths: bool = False
) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """The model at `alpha` on the line from the first run to the second: see `merged`.

    Raises:
        ValueError: not two runs, an alpha that is not from 0 to 1, or as `merged`.
    """
    if len(paths) != 2:
        raise ValueError(
            f"alpha is a place on the line between two runs, and {len(paths)} are given: give two, or leave alpha out for "
            "the mean of all"
        )
    return merged(paths, on_the_line(alpha), trust_paths=trust_paths)


def soup(
    paths: Sequence[str | Path], *, trust_paths: bool = False
) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """The uniform mean of two runs or more: see `merged`."""
    if len(paths) < 2:
        raise ValueError(f"a mean of runs needs two or more, and {len(paths)} is given")
    return merged(paths, [1 / len(paths)] * len(paths), trust_paths=trust_paths)


def on_the_line(alpha: float) -> list[float]:
    """The weights of two runs at a place on the line between them; ValueError unless 0 <= alpha <= 1."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha!r}: give a number from 0 (the first run) to 1 (the second)")
    return [1 - alpha, alpha]


def merged(
    paths: Sequence[str | Path], weights: Sequence[float], *, trust_paths: bool = False
) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """The model whose weights are the weighted mean of several runs', in evaluation mode; the last one's tokenizer and config.

    A run at weight 0 is read and compared with the others, but leaves no trace.

    Args:
        paths: run or checkpoint folders.
        weights: one a run, at least 0, of sum 1.
        trust_paths: as of `load_model`.

    Raises:
        ValueError: runs whose architectures or tokenizers differ, every difference listed; weights that are no shares.
    """
    if len(paths) != len(weights) or min(weights) < 0 or not math.isclose(sum(weights), 1, rel_tol=1e-9):
        raise ValueError(f"{len(paths)} runs got the weights {list(weights)}: give each a share, of sum 1")
    total: dict[str, Tensor] = {}
    first: tuple[dict[str, Any], Any, dict[str, tuple[int, ...]]] | None = None
    model, tokenizer, config = None, None, None
    for path, weight in zip(paths, weights):
        with blamed_on(path):
            model, tokenizer, config = load_model(path, trust_paths=trust_paths)
        for tower in (model.image_tower, model.text_tower):
            merge_lora(tower)
        state = model.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        described = _described(model, config), _tokens(tokenizer), shapes
        if first is None:
            first = described
        else:
            _compare(str(paths[0]), first, str(path), described)
        if weight:
            for name, tensor in state.items():
                # In fp64, so that the order of many runs changes nothing after rounding, and one run at weight 1 is itself.
                share = tensor.detach().double() * weight
                total[name] = total[name] + share if name in total else share
    assert model is not None and tokenizer is not None and config is not None
    state = model.state_dict()
    model.load_state_dict({name: _as(total[name], tensor) for name, tensor in state.items()})
    return model, tokenizer, config


def has_batch_norm(model: DualEncoder) -> bool:
    """Whether running statistics are among what was averaged."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def _as(value: Tensor, like: Tensor) -> Tensor:
    # Counts of batches are whole numbers.
    return (value if like.is_floating_point() else value.round()).to(like.dtype)


def _described(model: DualEncoder, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes the architecture, without how it was trained."""
    settings = {
        key: {name: one for name, one in value.items() if name not in _TRAINING}
        if isinstance(value, Mapping)
        else value
        for key, value in model_config(config, pretrained=False).items()
        if key not in _TRAINING
    }
    tower = model.image_tower
    pictures = {"image_size": tower.image_size, "mean": list(tower.mean), "std": list(tower.std)}
    return {**settings, "pictures": pictures, "pooling": model.text_tower.pooling}


def _tokens(tokenizer: Tokenizer) -> Any:
    """What turns captions into ids, as it is saved."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(path)
        return json.loads(path.read_text("utf-8"))


def _compare(
    one: str, first: tuple[dict[str, Any], Any, Any], other: str, second: tuple[dict[str, Any], Any, Any]
) -> None:
    """ValueError that lists all that two runs' models differ in."""
    found = [f"{key}: {_short(a)} and {_short(b)}" for key, a, b in differences(first[0], second[0])]
    if first[1] != second[1]:
        found.append("the tokenizer (its vocabulary or settings)")
    found += [
        f"{name}: {first[2].get(name, 'not there')} and {second[2].get(name, 'not there')}"
        for name in sorted({*first[2], *second[2]})
        if first[2].get(name) != second[2].get(name)
    ]
    if found:
        shown = "; ".join(found[:20]) + (f"; and {len(found) - 20} more" if len(found) > 20 else "")
        raise ValueError(f"{one} and {other} cannot be merged, for they are not the same model: {shown}")


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
