"""Checkpoints that survive a kill, a full disk and a flipped byte.

A checkpoint is a folder `step_00000600/`:

    model.safetensors   weights of the model ("model.*"), of losses that have any ("loss.*"), and their average ("average.*")
    optimizer.safetensors   the optimizer's state ("optimizer.N.KEY", N the parameter's number)
    shards/             instead of these two, of a run whose weights are split over ranks: a part of every tensor a rank
    train.pt            schedule, RNG, data position, the optimizer's settings: tensors, numbers, lists and strings only
    config.json         the resolved config the run was started with
    tokenizer.json      what turns captions into ids for this model
    manifest.json       step, metrics, versions, and the sha256 of every other file

Weights that training leaves as they were (a tower's beside its adapters) are in none of them, but once beside the folders, in
`frozen-HASH.safetensors`, which the manifests name.

It is written under a temporary name, each file flushed to the disk, the manifest last, and then renamed: a
folder that has the final name is whole. Reading verifies the hashes, and falls back to the newest checkpoint
that is good. No pickle is loaded: `train.pt` is read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from typing_extensions import NotRequired

from clipkit.data.tokenizers import Tokenizer
from clipkit.distributed import Group, gather_objects, rank
from clipkit.files import flush, write_json
from clipkit.foreign import BrokenFile, read_json
from clipkit.sharding import read_shards

MANIFEST = "manifest.json"
SHARDS = "shards"
_FROZEN = re.compile(r"frozen-[0-9a-f]{16}\.safetensors")
MODEL_FILES = ("model.safetensors", "config.json", "tokenizer.json")
# A file that deflates to more is no train.pt.
_TRAIN_STATE_BYTES = 1 << 30


class Manifest(TypedDict):
    """What manifest.json holds: the step, the evaluation's numbers after it, and each file's hash."""

    step: int
    metrics: dict[str, float]
    sha256: dict[str, str]
    # Of the file beside the checkpoint, by name.
    frozen: NotRequired[dict[str, str]]


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
    frozen: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/step_XXXXXXXX` atomically and return it.

    Args:
        weights: name to tensor, as `model.*`, `loss.*` and `average.*`.
        optimizer: name to tensor, as `optimizer.N.KEY` (clipkit.sharding.optimizer_tensors).
        train_state: everything else a run needs to go on; tensors, numbers, lists, dicts and strings.
        config: the resolved config, JSON-serialisable.
        tokenizer: saved beside the weights; None: nothing is.
        metrics: the last evaluation's numbers, kept in the manifest so that the best checkpoint can be told.
        frozen: what `save_frozen` gave for the weights that are not among these.

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
        return _seal(folder, temporary, step, metrics, frozen)


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
    frozen: Mapping[str, str] | None = None,
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
            return _seal(folder, temporary, step, metrics, frozen) if rank(group) == 0 else None

    return _writer.submit(finish)


# One thread: a checkpoint is finished before the next one is.
_writer = ThreadPoolExecutor(1, thread_name_prefix="clipkit-checkpoint")


def _make_temporary(temporary: Path) -> None:
    """Make the folder to write in, and remove others' remains; names that start with a dot are never taken
    for checkpoints.
    """
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for stale in (*temporary.parent.glob(".writing-*"), *temporary.parent.glob(".removed-*")):
        try:
            _delete(stale)
        except OSError:
            continue
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
        raise OSError(
            f"checkpoint {temporary.parent} could not be written: {causes[0]}{_room(temporary.parent)}"
        ) from error


def _room(folder: Path) -> str:
    """How much the disk takes: torch's own error of a full one is about positions in a file."""
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:.1f} MB are free on that disk)"
    except OSError:
        return ""


def _write_small_files(
    temporary: Path, train_state: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Any
) -> None:
    torch.save(dict(train_state), temporary / "train.pt")
    (temporary / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(temporary / "tokenizer.json")


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def save_frozen(folder: str | Path, weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Write weights that every checkpoint of a folder shares, once; {file: sha256}, for the checkpoints' manifests.

    Raises:
        OSError: the disk is full or the folder cannot be written; no half of it is left.
    """
    folder = Path(folder)
    temporary = folder / f".writing-frozen-{os.getpid()}"
    with _nothing_half_written(temporary):
        _make_temporary(temporary)
        written = temporary / "frozen.safetensors"
        save_file(_on_cpu(weights), written)
        _settle(written, temporary)
        digest = _sha256(written)
        final = folder / f"frozen-{digest[:16]}.safetensors"
        os.replace(written, final)
        flush(folder)
        temporary.rmdir()
    return {final.name: digest}


def _settle(file: Path, folder: Path) -> None:
    """Flush a file, and let whoever may read the folder read it: safetensors writes for the owner alone."""
    file.chmod(folder.stat().st_mode & 0o666)
    flush(file)


def frozen_file(path: Path) -> Path | None:
    """The file of a checkpoint's frozen weights, beside its folder; None where it has all of its own.

    Raises:
        BrokenFile: the manifest names another file.
    """
    named = list(read_manifest(path).get("frozen", {}))
    return path.parent / named[0] if named else None


def _seal(
    folder: Path,
    temporary: Path,
    step: int,
    metrics: Mapping[str, float] | None,
    frozen: Mapping[str, str] | None,
) -> Path:
    """Flush every file, write the manifest last, and give the folder its final name, which is returned."""
    final = folder / f"step_{step:08d}"
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "step": step,
        "metrics": dict(metrics or {}),
        "versions": {"torch": torch.__version__},
        "sha256": {path.relative_to(temporary).as_posix(): _sha256(path) for path in files},
        **({"frozen": dict(frozen)} if frozen else {}),
    }
    for path in files:
        _settle(path, temporary)
    write_json(temporary / MANIFEST, manifest)
    if final.exists():
        _remove(final)
    os.replace(temporary, final)
    flush(folder)
    return final


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no half of it is ever taken for one. OSError where it cannot be."""
    removed = path.with_name(f".removed-{path.name}-{os.getpid()}")
    os.replace(path, removed)
    _delete(removed)


def _delete(path: Path) -> None:
    """A folder with all in it, or whatever else has its name: rmtree would wait for a FIFO's writer."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def read_manifest(path: str | Path) -> Manifest:
    """A checkpoint folder's manifest.

    Raises:
        BrokenFile: it is no manifest, or does not list what a checkpoint needs, or names files elsewhere.
        OSError: it is not there.
    """
    path = Path(path)
    manifest: Manifest = read_json(path / MANIFEST, Manifest)
    listed, frozen = manifest["sha256"], manifest.get("frozen", {})
    if len(frozen) > 1 or not all(map(_FROZEN.fullmatch, frozen)):
        raise BrokenFile(f"{path / MANIFEST} names frozen weights that clipkit did not write")
    for name in listed:
        if name.startswith("/") or not set(name.split("/")).isdisjoint({"", ".", ".."}):
            raise BrokenFile(f"{path / MANIFEST} lists a file outside of the checkpoint")
    shards = [f"{SHARDS}/{one.name}" for one in (path / SHARDS).iterdir()] if (path / SHARDS).is_dir() else []
    optional = [name for name in ("optimizer.safetensors", "tokenizer.json") if (path / name).exists()]
    for name in ("config.json", "train.pt", *(shards or ["model.safetensors"]), *optional):
        if name not in listed:
            raise BrokenFile(f"{path / MANIFEST} does not list {name}: it is cut short or altered")
    return manifest


def add_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Put an evaluation's numbers into the manifest of a checkpoint that is there already."""
    manifest = read_json(path / MANIFEST)
    write_json(path / MANIFEST, {**manifest, "metrics": dict(metrics)})


def verify(path: str | Path, *, training: bool = True) -> str | None:
    """None when the checkpoint folder is whole, else one line that says what is wrong with it.

    Args:
        training: False looks at what makes up the model alone, not at the state of its training.
    """
    path = Path(path)
    try:
        for name, expected in read_manifest(path)["sha256"].items():
            if not training and name not in MODEL_FILES and not name.startswith(SHARDS + "/"):
                continue
            if not (path / name).is_file():
                return f"{name} is missing"
            # No clipkit writes such, and to read it through would take minutes.
            if not name.endswith(".safetensors") and (path / name).stat().st_size > _TRAIN_STATE_BYTES:
                return f"{name} has more than {_TRAIN_STATE_BYTES} bytes"
            if name.endswith(".safetensors"):
                tensor_shapes(path / name)
            if _sha256(path / name) != expected:
                return f"{name} does not have the content its manifest states (truncated or altered)"
        for name, expected in read_manifest(path).get("frozen", {}).items():
            beside = path.parent / name
            if not beside.is_file():
                return f"{name}, the weights that its run left as they were, is missing beside it in {path.parent}"
            tensor_shapes(beside)
            if _sha256(beside) != expected:
                return (
                    f"{name} beside it does not have the content its manifest states (truncated or altered)"
                )
    except BrokenFile as error:
        return str(error)
    except OSError as error:
        return f"its {MANIFEST} cannot be read: {error}"
    return None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file by its header alone; BrokenFile where that does not fit the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise BrokenFile(f"{path} is no safetensors file, or not all of one ({str(error)[:200]})") from None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Every finished checkpoint below `folder`, oldest first, unverified."""
    found = [
        path
        for path in Path(folder).glob("step_*")
        if re.fullmatch(r"step_[0-9]{8,18}", path.name) and (path / MANIFEST).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest_checkpoint(folder: str | Path, *, training: bool = True) -> Path | None:
    """The newest checkpoint that verifies, or None; every damaged one passed over is named in a warning."""
    for path in reversed(list_checkpoints(folder)):
        problem = verify(path, training=training)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is damaged ({problem}); trying the one before it", stacklevel=2)
    return None


def best_checkpoint(folder: str | Path, metric: str) -> Path | None:
    """The checkpoint whose manifest has the highest finite `metric`; the earliest of equals; None when none has it.

    One whose manifest cannot be read is passed over.
    """
    scored = []
    for path in list_checkpoints(folder):
        try:
            value = read_manifest(path)["metrics"].get(metric)
        except (BrokenFile, OSError):
            continue
        if value is not None and math.isfinite(value):
            scored.append((value, path))
    return max(scored, key=lambda pair: pair[0])[1] if scored else None


def prune(folder: str | Path, *, keep: int, metric: str | None = None) -> list[str]:
    """Delete all but the newest `keep` checkpoints and the best by `metric`.

    Returns:
        A line for each that could not be deleted.
    """
    if keep < 1:
        raise ValueError(f"keep = {keep}: at least the newest checkpoint must stay; give keep >= 1")
    paths, problems = list_checkpoints(folder), []
    best = best_checkpoint(folder, metric) if metric else None
    for path in paths[:-keep]:
        if path != best:
            try:
                _remove(path)
            except OSError as error:
                problems.append(f"the old checkpoint {path} could not be deleted: {error}")
    return problems


def load_checkpoint(
    path: str | Path,
    *,
    verified: bool = False,
    training: bool = True,
    like: Callable[[str], torch.Tensor | None] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint folder, whole or sharded, into {"step", "weights", "optimizer", "train_state",
    "config", "metrics"}.

    Args:
        verified: the hashes have been checked already.
        training: False leaves out "optimizer" and "train_state", and does not open their files.
        like: of a tensor's name, a tensor to split it as over the ranks (FSDP2), so that each rank of a
            sharded checkpoint reads its own part. None: everything in full, on the CPU.

    Raises:
        ValueError: it is damaged; the message says which file and how.
    """
    path = Path(path)
    problem = None if verified else verify(path, training=training)
    if problem:
        raise BrokenFile(
            f"checkpoint {path} is damaged: {problem}. Use an older one, or one from another copy."
        )
    manifest = read_manifest(path)
    if (path / SHARDS).is_dir():
        tensors = _read_shards(path / SHARDS, like)
    else:
        tensors = load_file(path / "model.safetensors")
        if training and (path / "optimizer.safetensors").is_file():
            tensors |= load_file(path / "optimizer.safetensors")
    for name in manifest.get("frozen", {}):
        frozen = load_file(path.parent / name)
        if any(one.startswith("average.") for one in tensors):
            # An average of what does not change, which is kept in fp32.
            frozen |= {
                f"average.{one[6:]}": tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                if tensor.is_floating_point()
                else tensor
                for one, tensor in frozen.items()
            }
        tensors |= frozen
    found = {
        "step": manifest["step"],
        "metrics": manifest["metrics"],
        "weights": {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer.")},
        "config": read_json(path / "config.json"),
    }
    if training:
        found["optimizer"] = {name: one for name, one in tensors.items() if name.startswith("optimizer.")}
        found["train_state"] = _train_state(path / "train.pt")
    return found


def _train_state(path: Path) -> dict[str, Any]:
    """train.pt, read as tensors, numbers, lists and texts alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _TRAIN_STATE_BYTES:
                raise BrokenFile(f"{path} unpacks to more than {_TRAIN_STATE_BYTES} bytes: it was not loaded")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (BrokenFile, OSError):
        raise
    except Exception:
        # torch's own words advise to load it as a pickle, which runs what it holds.
        raise BrokenFile(
            f"{path} was not loaded: it is damaged, or holds more than tensors, numbers, lists and texts, and clipkit "
            "did not write it"
        ) from None
    if not isinstance(state, dict):
        raise BrokenFile(f"{path} holds no training state: clipkit did not write it")
    return state


def _read_shards(folder: Path, like: Callable[[str], torch.Tensor | None] | None) -> dict[str, torch.Tensor]:
    """The tensors of a sharded checkpoint; BrokenFile for one that states more than its files hold."""
    for file in folder.iterdir():
        tensor_shapes(file)
    try:
        return read_shards(folder, like, limit=sum(file.stat().st_size for file in folder.iterdir()))
    except (BrokenFile, OSError):
        raise
    except Exception as error:
        raise BrokenFile(f"{folder} could not be read as a sharded checkpoint: {str(error)[:200]}") from None


def find_checkpoint(path: str | Path, *, training: bool = False) -> Path:
    """The checkpoint meant by `path`: a checkpoint folder, or a run folder whose newest good checkpoint is
    taken.

    Args:
        training: the state of its training must be whole, too.

    Raises:
        ValueError: there is none; the message says what was looked for.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    found = latest_checkpoint(path / "checkpoints", training=training) or latest_checkpoint(
        path, training=training
    )
    if found is None:
        raise ValueError(
            f"no checkpoint at {path}: expected a run folder (with checkpoints/step_*) or one step_* folder in it"
        )
    return found


def split_weights(weights: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """The entries under `part.` with that prefix removed; part is "model", "loss" or "average"."""
    return {name[len(part) + 1 :]: tensor for name, tensor in weights.items() if name.startswith(part + ".")}
