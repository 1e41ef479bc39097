"""Checkpoints that survive a kill, a full disk and a flipped byte.

A checkpoint is a folder `step_00000600/`:

    model.safetensors   weights of the model ("model.*"), of losses that have any ("loss.*"), and their average ("average.*")
    optimizer.safetensors   the optimizer's state ("optimizer.N.KEY", N the parameter's number)
    shards/             instead of these two, of a run whose weights are split over ranks: a part of every tensor a rank
    train.pt            schedule, RNG, data position, the optimizer's settings: tensors, numbers, lists and strings only
    config.json         the resolved config the run was started with
    tokenizer.json      what turns captions into ids for this model
    manifest.json       step, metrics, versions, and the sha256 of every other file

It is written under a temporary name, each file flushed to the disk, the manifest last, and then renamed: a
folder that has the final name is whole. Reading verifies the hashes, and falls back to the newest checkpoint
that is good. No pickle is loaded: `train.pt` is read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from safetensors.torch import load_file, save_file

from clipkit.data.tokenizers import Tokenizer, load_tokenizer
from clipkit.distributed import Group, gather_objects, rank
from clipkit.files import flush
from clipkit.model import DualEncoder, create_model
from clipkit.sharding import read_shards

MANIFEST = "manifest.json"
SHARDS = "shards"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rng_state() -> dict[str, Any]:
    """This process's random state (Python, NumPy, torch, CUDA) as tensors and lists, which `weights_only`
    admits.
    """
    version, internal, gauss = random.getstate()
    legacy = cast("tuple[str, Any, int, int, float]", numpy.random.get_state())
    kind, keys, position, has_gauss, cached = legacy
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` gave."""
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
    optimizer: Mapping[str, torch.Tensor] | None = None,
    train_state: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write `folder/step_XXXXXXXX` atomically and return it.

    Args:
        weights: name to tensor, as `model.*`, `loss.*` and `average.*`.
        optimizer: name to tensor, as `optimizer.N.KEY` (clipkit.sharding.optimizer_tensors).
        train_state: everything else a run needs to go on; tensors, numbers, lists, dicts and strings.
        config: the resolved config, JSON-serialisable.
        tokenizer: saved beside the weights; None: nothing is.
        metrics: the last evaluation's numbers, kept in the manifest so that the best checkpoint can be told.

    Raises:
        OSError: the disk is full or the folder cannot be written. Nothing half-written is left, and older
            checkpoints are untouched.
    """
    folder = Path(folder)
    temporary = folder / f".writing-step_{step:08d}-{os.getpid()}"
    with _nothing_half_written(temporary):
        _make_temporary(temporary)
        _write_small_files(temporary, train_state, config, tokenizer)
        save_file(_on_cpu(weights), temporary / "model.safetensors")
        if optimizer:
            save_file(_on_cpu(optimizer), temporary / "optimizer.safetensors")
        return _seal(folder, temporary, step, metrics)


def save_sharded_checkpoint(
    folder: str | Path,
    step: int,
    *,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    train_state: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Tokenizer | None = None,
    metrics: Mapping[str, float] | None = None,
    group: Group,
) -> Future:
    """The same from the ranks of a run whose tensors are split (FSDP2): each writes its parts, in the
    background.

    Every rank calls it with the same step; rank 0's `train_state`, `config`, `tokenizer` and `metrics` are
    written. It returns once the tensors are copied. The copies are written by torch.distributed.checkpoint as
    safetensors under `shards/`, and the folder gets its final name when all parts are there:
    `load_checkpoint` reads it on any number of ranks.

    Args:
        group: a gloo process group of all ranks that nothing else uses meanwhile.

    Returns:
        A future: on rank 0 of the Path, elsewhere of None once all parts are written. Wait for it before the
        next call.

    Raises:
        OSError: on every rank, from the call or from the future, as in `save_checkpoint`.
    """
    from torch.distributed.checkpoint import hf_storage, state_dict_saver

    folder, problem = Path(folder), None
    # The ranks agree on this name; the folder is theirs alone.
    temporary = folder / f".writing-step_{step:08d}"
    if rank(group) == 0:
        try:
            with _nothing_half_written(temporary):
                _make_temporary(temporary)
                _write_small_files(temporary, train_state, config, tokenizer)
                (temporary / SHARDS).mkdir()
        except OSError as error:
            problem = str(error)
    problem = gather_objects(problem, group)[0]
    if problem:
        raise OSError(problem)
    tensors = {name: tensor.detach() for name, tensor in {**weights, **optimizer}.items()}
    writer = hf_storage.HuggingFaceStorageWriter(str(temporary / SHARDS), save_distributed=True)
    # It copies every tensor before it returns, so training may go on.
    written = cast(Future, state_dict_saver.async_save(tensors, storage_writer=writer, process_group=group))

    def finish() -> Path | None:
        with _nothing_half_written(temporary):
            written.result()
            return _seal(folder, temporary, step, metrics) if rank(group) == 0 else None

    return _writer.submit(finish)


# One thread: a checkpoint is finished before the next one is.
_writer = ThreadPoolExecutor(1, thread_name_prefix="clipkit-checkpoint")


def _make_temporary(temporary: Path) -> None:
    """Make the folder to write in, and remove others' remains; names that start with a dot are never taken
    for checkpoints.
    """
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for stale in temporary.parent.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
    temporary.mkdir()


@contextmanager
def _nothing_half_written(temporary: Path) -> Iterator[None]:
    """An error inside removes the folder; it reaches the caller as an OSError."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, (OSError, KeyboardInterrupt, SystemExit)):
            raise
        # safetensors reports a full disk as a type of its own; so does torch.distributed.checkpoint, as a
        # BaseException with the ranks' errors.
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
        raise OSError(f"checkpoint {temporary.parent} could not be written: {causes[0]}") from error


def _write_small_files(
    temporary: Path, train_state: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Any
) -> None:
    torch.save(dict(train_state), temporary / "train.pt")
    (temporary / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(temporary / "tokenizer.json")


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _seal(folder: Path, temporary: Path, step: int, metrics: Mapping[str, float] | None) -> Path:
    """Flush every file, write the manifest last, and give the folder its final name, which is returned."""
    final = folder / f"step_{step:08d}"
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "step": step,
        "metrics": dict(metrics or {}),
        "versions": {"torch": torch.__version__},
        "sha256": {path.relative_to(temporary).as_posix(): _sha256(path) for path in files},
    }
    for path in files:
        flush(path)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    flush(temporary / MANIFEST)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    flush(folder)
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


def load_checkpoint(
    path: str | Path, *, verified: bool = False, like: Callable[[str], torch.Tensor | None] | None = None
) -> dict[str, Any]:
    """Read a checkpoint folder, whole or sharded, into {"step", "weights", "optimizer", "train_state",
    "config", "metrics"}.

    Args:
        verified: the hashes have been checked already.
        like: of a tensor's name, a tensor to split it as over the ranks (FSDP2), so that each rank of a
            sharded checkpoint reads its own part. None: everything in full, on the CPU.

    Raises:
        ValueError: it is damaged; the message says which file and how.
    """
    path = Path(path)
    problem = None if verified else verify(path)
    if problem:
        raise ValueError(
            f"checkpoint {path} is damaged: {problem}. Use an older one, or one from another copy."
        )
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if (path / SHARDS).is_dir():
        tensors = read_shards(path / SHARDS, like)
    else:
        tensors = load_file(path / "model.safetensors")
        if (path / "optimizer.safetensors").is_file():
            tensors |= load_file(path / "optimizer.safetensors")
    return {
        "step": manifest["step"],
        "metrics": manifest["metrics"],
        "weights": {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")},
        "optimizer": {name: tensor for name, tensor in tensors.items() if name.startswith("optimizer.")},
        "train_state": torch.load(path / "train.pt", map_location="cpu", weights_only=True),
        "config": json.loads((path / "config.json").read_text(encoding="utf-8")),
    }


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by `path`: a checkpoint folder, or a run folder whose newest good checkpoint is
    taken.

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
    """The entries under `part.` with that prefix removed; part is "model", "loss" or "average"."""
    return {name[len(part) + 1 :]: tensor for name, tensor in weights.items() if name.startswith(part + ".")}


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu"
) -> tuple[DualEncoder, Tokenizer, dict[str, Any]]:
    """Rebuild the model of a run or checkpoint folder: (DualEncoder in eval mode, tokenizer, config).

    Raises:
        ValueError: no checkpoint there, a damaged one, or weights that do not fit the config beside them.
    """
    path = find_checkpoint(path)
    loaded = load_checkpoint(path)
    tokenizer = load_tokenizer(path / "tokenizer.json")
    model = create_model(model_config(loaded["config"], pretrained=False), tokenizer=tokenizer)
    try:
        # What the run itself was evaluated by.
        weights = split_weights(loaded["weights"], "average") or split_weights(loaded["weights"], "model")
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {path} do not fit the architecture in its config.json: {error}"
        ) from error
    return model.to(device).eval(), tokenizer, loaded["config"]


def model_config(config: Mapping[str, Any], *, pretrained: bool = True) -> dict[str, Any]:
    """The part of a run's config that `create_model` takes; `pretrained=False` skips weights that will be
    replaced.
    """
    keys = (
        "embed_dim",
        "image_tower",
        "text_tower",
        "init_logit_scale",
        "init_logit_bias",
        "mlm_probability",
        "channels_last",
    )
    part = {key: config[key] for key in keys if key in config}
    if not pretrained:
        for tower in ("image_tower", "text_tower"):
            part[tower] = dict(part[tower])
            # timm's switch is a boolean; a Hugging Face folder still supplies the architecture's sizes.
            if isinstance(part[tower].get("pretrained"), bool):
                part[tower]["pretrained"] = False
    return part
