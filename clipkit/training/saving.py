"""A run's checkpoints: what goes into one, when the last one counts as written, and going on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import distributed, nn

from clipkit.checkpoint import (
    add_metrics,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    rng_state,
    save_checkpoint,
    save_frozen,
    save_sharded_checkpoint,
    set_rng_state,
    split_weights,
)
from clipkit.data import Tokenizer
from clipkit.data.faults import joined_faults
from clipkit.distributed import Group, gather_objects, rank, world_size
from clipkit.foreign import BrokenFile
from clipkit.loading import with_architecture
from clipkit.optim import Schedule, WeightAverage
from clipkit.sharding import (
    is_sharded,
    load_optimizer,
    optimizer_parameters,
    optimizer_settings,
    optimizer_tensors,
    split_as,
    take_unsplit_of_rank_0,
    whole,
)
from clipkit.towers.lora import frozen_names
from clipkit.training.precision import LossScale
from clipkit.training.record import due
from clipkit.training.run_folder import record_amendment


class Resumable(Protocol):
    """What a run reads and can go on reading where it stopped."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """Saves a run and goes on from what was saved; every rank holds one and calls the same methods at the same step.

    Args:
        folder: where the checkpoints lie.
        model, loss, average, optimizer, schedule, loss_scale, stream, sentences: what a checkpoint holds.
        tokenizer: saved beside the weights.
        config: the run's resolved settings, saved as config.json.
        skipped: steps that were left out so far; the loop appends to it.
        total_steps: the last step, whose checkpoint must be written.
        every: steps between two checkpoints; 0: only after the last.
        keep: newest checkpoints kept, besides the best by `best_metric`.
        say: prints a warning, on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        stream: Resumable,
        sentences: Resumable | None,
        average: WeightAverage | None,
        loss_scale: LossScale,
        tokenizer: Tokenizer,
        config: Mapping[str, Any],
        total_steps: int,
        every: int,
        keep: int,
        best_metric: str | None,
        skipped: list[int],
        say: Callable[[str], None] = print,
    ):
        self.folder, self.tokenizer, self.say = folder, tokenizer, say
        self.config = with_architecture(config)
        self.model, self.loss, self.average = model, loss, average
        self.optimizer, self.schedule, self.loss_scale = optimizer, schedule, loss_scale
        self.stream, self.sentences = stream, sentences
        self.total_steps, self.every, self.keep, self.best_metric = total_steps, every, keep, best_metric
        self.skipped = skipped
        # Of the adapted towers' own weights: they are written once, and what was written.
        self._frozen_names = sorted(f"model.{name}" for name in frozen_names(model))
        self._frozen: dict[str, str] | None = None
        # Warnings that were said, which are not said again.
        self._said: set[str] = set()
        # One that is written in the background, and its step.
        self._pending: tuple[int, Future] | None = None
        sharded = is_sharded(model.state_dict())
        self._group = cast("Group", distributed.new_group(backend="gloo")) if sharded else None

    def after(self, step: int, *, stopping: bool) -> None:
        """Save where it is time: every so many steps, after the last, and before a stop."""
        final = stopping or step == self.total_steps
        if final or due(step, self.every):
            self.save(step, {}, wait=final)

    def score(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep an evaluation's numbers with this step's checkpoint, which is written now if it may be the best."""
        if not metrics:
            return
        self._settle()
        path = self.folder / f"step_{step:08d}"
        saved = gather_objects(path.is_dir() if rank() == 0 else None)[0]
        if not saved:
            if self.best_metric:
                self.save(step, metrics, wait=step == self.total_steps)
            return
        if rank() == 0:
            try:
                add_metrics(path, metrics)
            except (OSError, BrokenFile) as error:
                self.say(f"warning: the scores of step {step} are not in its checkpoint: {error}")
        self._drop_old()

    def save(self, step: int, metrics: Mapping[str, float], *, wait: bool) -> None:
        """Write a checkpoint and drop old ones; a disk that is full leaves the last good one and a warning.

        Args:
            metrics: of the evaluation after this step, by which the best checkpoint is told; empty before it.
            wait: return when it is on the disk. Otherwise one of split tensors is written while training goes on.

        Raises:
            OSError: the last step's could not be written.
        """
        self._settle()
        weights = self._weights()
        sharded = is_sharded(weights)
        if sharded:
            take_unsplit_of_rank_0(weights)
        try:
            self._write_frozen(weights)
        except OSError as error:
            self._not_written(step, error)
            return
        left_out = {*self._frozen_names, *(f"average.{name[6:]}" for name in self._frozen_names)}
        weights = {name: tensor for name, tensor in weights.items() if name not in left_out}
        ranks = gather_objects({"rng": rng_state(), "stream": self.stream.state_dict()})
        train_state = {
            "optimizer": optimizer_settings(self.optimizer),
            "schedule": self.schedule.state_dict(),
            "ranks": ranks,
            "sentences": self.sentences.state_dict() if self.sentences else None,
            "average_updates": self.average.updates if self.average else None,
            "skipped_steps": list(self.skipped),
            "loss_scale": self.loss_scale.state_dict(),
        }
        content: dict[str, Any] = {
            "weights": weights,
            "optimizer": optimizer_tensors(self.optimizer),
            "config": self.config,
            "tokenizer": self.tokenizer,
            "metrics": metrics,
            "train_state": train_state,
            "frozen": self._frozen,
        }
        try:
            if sharded:
                writing = save_sharded_checkpoint(self.folder, step, **content, group=self._group)
                self._pending = step, writing
            elif rank() == 0:
                save_checkpoint(self.folder, step, **content)
        except OSError as error:
            self._not_written(step, error)
            return
        if wait:
            self._settle()
        self._drop_old()

    def _write_frozen(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Once, by all ranks: the weights that this run leaves as they are. OSError on every rank."""
        if not self._frozen_names or self._frozen:
            return
        tensors, problem, written = whole({name: weights[name] for name in self._frozen_names}), None, None
        if rank() == 0:
            try:
                written = save_frozen(self.folder, tensors)
            except OSError as error:
                problem = str(error)
        problem, self._frozen = gather_objects((problem, written))[0]
        if problem:
            raise OSError(problem)

    def resume(self) -> tuple[int, dict[str, float]]:
        """Go on from the folder's newest good checkpoint, whatever number of ranks wrote it.

        Returns:
            The steps done and the metrics of the evaluation after them; (0, {}) where there is no checkpoint.
        """
        # Rank 0 alone reads it through to check it.
        path = gather_objects(latest_checkpoint(self.folder) if rank() == 0 else None)[0]
        step, metrics = (0, {}) if path is None else self._go_on(path)
        if rank() == 0:
            record_amendment(self.folder.parent, self.config, step)
        return step, metrics

    def _go_on(self, path: Path) -> tuple[int, dict[str, float]]:
        """Read a checkpoint that is whole into the run."""
        present, parameters = self._weights(), optimizer_parameters(self.optimizer)

        def like(name: str) -> torch.Tensor | None:
            return parameters[int(name.split(".")[1])] if name.startswith("optimizer.") else present.get(name)

        loaded = load_checkpoint(path, verified=True, like=like)
        saved = loaded["train_state"]
        try:
            self._restore(loaded, saved, present)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise BrokenFile(
                f"checkpoint {path} is whole, but no state of this run: {(str(error).splitlines() or [''])[0][:300]}. "
                "Remove it to go on from the one before"
            ) from error
        try:
            # What differs in the data itself, and a length that the run cannot have, is a ValueError that says so.
            self._seek(saved)
            self.schedule.load_state_dict(saved["schedule"])
        except (AttributeError, LookupError, TypeError) as error:
            raise BrokenFile(f"checkpoint {path} does not say how far its data was read") from error
        return loaded["step"], loaded["metrics"]

    def _restore(
        self, loaded: Mapping[str, Any], saved: Mapping[str, Any], present: Mapping[str, torch.Tensor]
    ) -> None:
        """Weights, optimizer, schedule and random numbers."""
        weights = {name: _as_present(tensor, present.get(name)) for name, tensor in loaded["weights"].items()}
        self.model.load_state_dict(split_weights(weights, "model"))
        self.loss.load_state_dict(split_weights(weights, "loss"))
        if self.average:
            average = {"updates": saved["average_updates"], "weights": split_weights(weights, "average")}
            self.average.load_state_dict(average)
        # What the run is told now, by `amend`, counts; the checkpoint holds what it was told then.
        told = [(group["initial_lr"], group["weight_decay"]) for group in self.optimizer.param_groups]
        load_optimizer(self.optimizer, saved["optimizer"], loaded["optimizer"])
        for group, (lr, decay) in zip(self.optimizer.param_groups, told, strict=True):
            group["initial_lr"], group["weight_decay"] = lr, decay
        if "loss_scale" in saved:
            self.loss_scale.load_state_dict(saved["loss_scale"])
        self.skipped[:] = map(int, saved.get("skipped_steps", []))
        if len(saved["ranks"]) == world_size():
            set_rng_state(saved["ranks"][rank()]["rng"])

    def _seek(self, saved: Mapping[str, Any]) -> None:
        """Go on reading where the checkpoint stopped."""
        if self.sentences:
            self.sentences.load_state_dict(saved["sentences"])
        if len(saved["ranks"]) == world_size():
            self.stream.load_state_dict(saved["ranks"][rank()]["stream"])
        else:
            # Another number of ranks goes on at the same sample; rank 0 keeps the count of faults met so far.
            position = saved["ranks"][0]["stream"]
            states = [one["stream"]["faults"] for one in saved["ranks"]] if rank() == 0 else []
            self.stream.load_state_dict({**position, "faults": joined_faults(states)})

    def _settle(self) -> None:
        """Wait for the one that is being written in the background; every rank learns how it went."""
        if self._pending is None:
            return
        (step, writing), self._pending, problem = self._pending, None, None
        try:
            writing.result()
        except OSError as error:
            problem = str(error)
        problems = [text for text in gather_objects(problem) if text]
        if problems:
            self._not_written(step, OSError(problems[0]))
        else:
            self._drop_old()

    def _not_written(self, step: int, error: OSError) -> None:
        """Say so and go on; for the last step's checkpoint it is an error."""
        kept = (list_checkpoints(self.folder) or [None])[-1]
        if step == self.total_steps:
            raise OSError(
                f"the final checkpoint could not be written ({error}); the last good one is {kept}"
            ) from error
        self.say(f"warning: no checkpoint at step {step}: {error}; the last good one is {kept}")

    def _drop_old(self) -> None:
        if rank() == 0:
            for problem in prune(self.folder, keep=self.keep, metric=self.best_metric):
                if problem not in self._said:
                    self._said.add(problem)
                    self.say(f"warning: {problem}")

    def _weights(self) -> dict[str, torch.Tensor]:
        """Every weight as a checkpoint names it: "model.*", "loss.*", "average.*"."""
        parts: dict[str, Mapping[str, Any]] = {
            "model": self.model.state_dict(),
            "loss": self.loss.state_dict(),
        }
        if self.average:
            parts["average"] = self.average.weights
        return {
            f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()
        }


def _as_present(tensor: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """A tensor that was read in full, split as the run's own is."""
    return tensor if present is None or hasattr(tensor, "full_tensor") else split_as(tensor, present)
