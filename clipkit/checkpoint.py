"""Checkpoints that survive a kill, a full disk and a flipped byte.

A checkpoint is a folder `step_00000600/`:

    model.safetensors   weights of the model ("model.*") and of losses that have any ("loss.*")
    train.pt            optimizer, schedule, RNG, data position: tensors, numbers, lists and strings only
    config.json         the resolved config the run was started with
    tokenizer.json      what turns captions into ids for this model
    manifest.json       step, metrics, versions, and the sha256 of every other file

It is written under a temporary name, each file flushed to the disk, the manifest last, and then renamed: a folder that has
the final name is whole. Reading verifies the hashes, and falls back to the newest checkpoint that is good. No pickle
is loaded: `train.pt` is read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

MANIFEST = "manifest.json"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old text or the new, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rng_state() -> dict[str, Any]:
    """This process's random state (Python, NumPy, torch, CUDA) as tensors and lists, which `weights_only` admits."""
    import numpy

    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` gave."""
    import numpy

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(
    folder: str | Path,
    step: int,
    *,
    weights: Mapping[str, torch.Tensor],
    train_state: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Any = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write `folder/step_XXXXXXXX` atomically and return it.

    Args:
        weights: name to tensor, as `model.*` and `loss.*`.
        train_state: everything else a run needs to go on; tensors, numbers, lists, dicts and strings.
        config: the resolved config, JSON-serialisable.
        tokenizer: an object with `save(path)`, or None.
        metrics: the last evaluation's numbers, kept in the manifest so that the best checkpoint can be told.

    Raises:
        OSError: the disk is full or the folder cannot be written. Nothing half-written is left, and older
            checkpoints are untouched.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    final = folder / f"step_{step:08d}"
    # Names that start with a dot are never taken for checkpoints.
    temporary = folder / f".writing-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".writing-*"):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
        save_file(tensors, temporary / "model.safetensors")
        torch.save(dict(train_state), temporary / "train.pt")
        (temporary / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer.json")
        names = sorted(path.name for path in temporary.iterdir())
        manifest = {
            "step": step,
            "metrics": dict(metrics or {}),
            "versions": {"torch": torch.__version__},
            "sha256": {name: _sha256(temporary / name) for name in names},
        }
        for name in names:
            _flush(temporary / name)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(temporary / MANIFEST)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        # safetensors reports a full disk as an error type of its own.
        raise OSError(f"checkpoint {final} could not be written: {error}") from error
    return final


def verify(path: str | Path) -> str | None:
    """None when the checkpoint folder is whole, else one line that says what is wrong with it."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["sha256"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sha256(path / name) != expected:
                return f"{name} does not have the content its manifest states (truncated or altered)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read: {error}"
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Every finished checkpoint below `folder`, oldest first, unverified."""
    return sorted(path for path in Path(folder).glob("step_*") if (path / MANIFEST).is_file())


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint that verifies, or None; every damaged one passed over is named in a warning."""
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({problem}); trying the one before it", stacklevel=2)
    return None


def best_checkpoint(folder: str | Path, metric: str) -> Path | None:
    """The checkpoint whose manifest has the highest `metric`; the earliest of equals; None when none has it."""
    scored = []
    for path in list_checkpoints(folder):
        metrics = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["metrics"]
        if metric in metrics:
            scored.append((metrics[metric], path))
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def prune(folder: str | Path, *, keep: int, metric: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints and the best by `metric`."""
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the newest checkpoint must stay; give keep >= 1")
    paths = list_checkpoints(folder)
    best = best_checkpoint(folder, metric) if metric else None
    for path in paths[:-keep]:
        if path != best:
            shutil.rmtree(path)


def load_checkpoint(path: str | Path, *, verified: bool = False) -> dict[str, Any]:
    """Read a checkpoint folder into {"step", "weights", "train_state", "config", "metrics"}, tensors on the CPU.

    Raises:
        ValueError: it is damaged; the message says which file and how.
    """
    from safetensors.torch import load_file

    path = Path(path)
    problem = None if verified else verify(path)
    if problem:
        raise ValueError(f"checkpoint {path} is damaged: {problem}. Use an older one, or one from another copy.")
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    return {
        "step": manifest["step"],
        "metrics": manifest["metrics"],
        "weights": load_file(path / "model.safetensors"),
        "train_state": torch.load(path / "train.pt", map_location="cpu", weights_only=True),
        "config": json.loads((path / "config.json").read_text(encoding="utf-8")),
    }


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by `path`: a checkpoint folder, or a run folder whose newest good checkpoint is taken.

    Raises:
        ValueError: there is none; the message says what was looked for.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    found = latest_checkpoint(path / "checkpoints") or latest_checkpoint(path)
    if found is None:
        raise ValueError(
            f"no checkpoint at {path}: expected a run folder (with checkpoints/step_*) or one step_* folder in it"
        )
    return found


def split_weights(weights: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The entries under `part.` with that prefix removed; part is "model" or "loss"."""
    return {name[len(part) + 1 :]: tensor for name, tensor in weights.items() if name.startswith(part + ".")}


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Any, Any, dict[str, Any]]:
    """Rebuild the model of a run or checkpoint folder: (DualEncoder in eval mode, tokenizer, config).

    Raises:
        ValueError: no checkpoint there, a damaged one, or weights that do not fit the config beside them.
    """
    from clipkit.data.tokenizers import load_tokenizer
    from clipkit.model import create_model

    path = find_checkpoint(path)
    loaded = load_checkpoint(path)
    tokenizer = load_tokenizer(path / "tokenizer.json")
    model = create_model(model_config(loaded["config"], pretrained=False), tokenizer=tokenizer)
    try:
        model.load_state_dict(split_weights(loaded["weights"], "model"))
    except RuntimeError as error:
        raise ValueError(f"the weights of {path} do not fit the architecture in its config.json: {error}") from error
    return model.to(device).eval(), tokenizer, loaded["config"]


def model_config(config: Mapping[str, Any], *, pretrained: bool = True) -> dict[str, Any]:
    """The part of a run's config that `create_model` takes; `pretrained=False` skips weights that will be replaced."""
    keys = ("embed_dim", "image_tower", "text_tower", "init_logit_scale", "init_logit_bias", "mlm_probability", "channels_last")
    part = {key: config[key] for key in keys if key in config}
    if not pretrained:
        for tower in ("image_tower", "text_tower"):
            part[tower] = dict(part[tower])
            # timm's switch is a boolean; a Hugging Face folder still supplies the architecture's sizes.
            if isinstance(part[tower].get("pretrained"), bool):
                part[tower]["pretrained"] = False
    return part
