"""A run's checkpoints: what goes into one, when the last one counts as written, and going on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from clipkit.recipes.pretrain import State
    from clipkit.recipes.progress import Progress


def save(state: State, progress: Progress, *, now: bool) -> None:
    """Write a checkpoint and drop old ones; a disk that is full leaves the last good one and a warning.

    Args:
        now: return when it is on the disk. Otherwise one of split tensors is written while training goes on.
    """
    from clipkit.checkpoint import rng_state, save_checkpoint, save_sharded_checkpoint
    from clipkit.distributed import gather_objects
    from clipkit.sharding import is_sharded, optimizer_settings, optimizer_tensors, take_unsplit_of_rank_0

    settle(state, progress)
    weights, optimizer = named_weights(state), optimizer_tensors(state.optimizer)
    sharded = is_sharded(weights)
    if sharded:
        take_unsplit_of_rank_0(weights)
    ranks = gather_objects({"rng": rng_state(), "stream": state.stream.state_dict()})
    content = {
        "weights": weights,
        "optimizer": optimizer,
        "config": state.config,
        "tokenizer": state.tokenizer,
        "metrics": state.metrics,
        "train_state": {
            "optimizer": optimizer_settings(state.optimizer),
            "schedule": state.schedule.state_dict(),
            "ranks": ranks,
            "sentences": state.sentences.state_dict() if state.sentences else None,
            "average_updates": state.average.updates if state.average else None,
        },
    }
    try:
        if sharded:
            state.saving = (
                state.step,
                save_sharded_checkpoint(state.checkpoints, state.step, **content, group=state.saving_group),
            )
        elif state.rank == 0:
            save_checkpoint(state.checkpoints, state.step, **content)
    except OSError as error:
        not_written(state, progress, state.step, error)
        return
    if now:
        settle(state, progress)
    if state.rank == 0:
        drop_old(state)


def settle(state: State, progress: Progress) -> None:
    """Wait for the checkpoint that is being written in the background, if there is one; every rank learns how
    it went.
    """
    from clipkit.distributed import gather_objects

    if state.saving is None:
        return
    (step, future), state.saving, problem = state.saving, None, None
    try:
        future.result()
    except OSError as error:
        problem = str(error)
    problems = [text for text in gather_objects(problem) if text]
    if problems:
        not_written(state, progress, step, OSError(problems[0]))
    elif state.rank == 0:
        drop_old(state)


def not_written(state: State, progress: Progress, step: int, error: OSError) -> None:
    """Say so and go on; for the last step's checkpoint it is an error."""
    from clipkit.checkpoint import list_checkpoints

    kept = (list_checkpoints(state.checkpoints) or [None])[-1]
    if step == state.total:
        raise OSError(
            f"the final checkpoint could not be written ({error}); the last good one is {kept}"
        ) from error
    progress.say(f"warning: no checkpoint at step {step}: {error}; the last good one is {kept}")


def drop_old(state: State) -> None:
    from clipkit.checkpoint import prune

    prune(state.checkpoints, keep=state.config["keep"], metric=state.config["best_metric"])


def resume(state: State) -> None:
    """Continue from the folder's newest good checkpoint, if there is one, whatever number of ranks wrote it."""
    from clipkit.checkpoint import latest_checkpoint, load_checkpoint, set_rng_state, split_weights
    from clipkit.distributed import gather_objects
    from clipkit.sharding import load_optimizer, optimizer_parameters

    # Rank 0 alone reads it through to check it.
    path = gather_objects(latest_checkpoint(state.checkpoints) if state.rank == 0 else None)[0]
    if path is None:
        return
    present, parameters = named_weights(state), optimizer_parameters(state.optimizer)

    def like(name: str) -> torch.Tensor | None:
        return parameters[int(name.split(".")[1])] if name.startswith("optimizer.") else present.get(name)

    loaded = load_checkpoint(path, verified=True, like=like)
    weights = {name: as_present(tensor, present.get(name)) for name, tensor in loaded["weights"].items()}
    state.model.load_state_dict(split_weights(weights, "model"))
    state.loss.load_state_dict(split_weights(weights, "loss"))
    saved = loaded["train_state"]
    if state.average:
        state.average.load_state_dict(
            {"updates": saved["average_updates"], "weights": split_weights(weights, "average")}
        )
    load_optimizer(state.optimizer, saved["optimizer"], loaded["optimizer"])
    state.schedule.load_state_dict(saved["schedule"])
    if state.sentences:
        state.sentences.load_state_dict(saved["sentences"])
    if len(saved["ranks"]) == state.world_size:
        mine = saved["ranks"][state.rank]
        set_rng_state(mine["rng"])
        state.stream.load_state_dict(mine["stream"])
    else:
        # Another number of ranks goes on at the same sample; rank 0 keeps the count of faults met so far.
        faults = (
            [fault for one in saved["ranks"] for fault in one["stream"]["faults"]] if state.rank == 0 else []
        )
        state.stream.load_state_dict({**saved["ranks"][0]["stream"], "faults": faults})
    state.step, state.metrics = loaded["step"], loaded["metrics"]


def named_weights(state: State) -> dict[str, torch.Tensor]:
    """Every weight as a checkpoint names it: "model.*", "loss.*", "average.*"."""
    parts: dict[str, Mapping[str, Any]] = {"model": state.model.state_dict(), "loss": state.loss.state_dict()}
    if state.average:
        parts["average"] = state.average.weights
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def as_present(tensor: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """A tensor that was read in full, split as the run's own is."""
    from clipkit.sharding import split_as

    return tensor if present is None or hasattr(tensor, "full_tensor") else split_as(tensor, present)
