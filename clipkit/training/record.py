"""What a training run says and keeps of its steps: progress, loggers, loss spikes, and a loss that is not finite."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from clipkit.data import Tokenizer
from clipkit.distributed import rank
from clipkit.files import write_json
from clipkit.foreign import shown
from clipkit.loggers import Loggers
from clipkit.training.profile import Profile
from clipkit.training.progress import Progress
from clipkit.training.run_folder import table
from clipkit.training.sessions import begin_session
from clipkit.training.speed import Speed


class Record:
    """The steps of a run, on the terminal and in the loggers; every rank keeps the spikes of its own share.

    Args:
        run_dir: the run's folder.
        total_steps: the last step.
        speed: the clock of the steps.
        loggers: {name: settings} beside metrics.jsonl.
        shown: settings of the run, for loggers that show them.
        log_every: steps between two lines and between two entries of the loggers.
        profile: {"start": steps of the session before the traced ones, "steps": how many are traced, 0 for none}.
        loss_spike: factor of a SpikeRecord, or None.
        skip_nonfinite: steps of the run that may be left out because they are not finite.

    Attributes:
        skipped: the steps that were left out.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        log_every: int,
        speed: Speed,
        loss_spike: float | None = None,
        skip_nonfinite: int = 0,
        loggers: Mapping[str, Mapping[str, Any]] | None = None,
        shown: Mapping[str, Any] | None = None,
        profile: Mapping[str, int] | None = None,
    ):
        self._run_dir, self._every, self._chosen, self._shown = run_dir, log_every, loggers or {}, shown or {}
        self._progress = Progress(total=total_steps, every=log_every, enabled=rank() == 0)
        self._speed, self._profile = speed, Profile(run_dir / "profile", **(profile or {}))
        self._loggers: Loggers | None = None
        self._spikes = SpikeRecord(run_dir, loss_spike)
        self._started = time.monotonic()
        self._may_skip, self.skipped = skip_nonfinite, []

    def start(self, step: int, *, scored: bool = True) -> None:
        """Steps are about to be taken; `step` are done, more than 0 in a run that resumes.

        Args:
            scored: False where the evaluation after `step` is about to be made again.
        """
        self._progress.start(step)
        self.say(f"run folder {self._run_dir}" + (f", resumed at step {step}" if step else ""))
        if rank() == 0:
            session = begin_session(self._run_dir, step, say=self.say)
            self._loggers = Loggers(
                self._run_dir,
                self._chosen,
                shown={**shown(self._shown), "code": session["code"]},
                start_step=step,
                scored=scored,
            )
        self._speed.start(step)
        self._started = time.monotonic()

    def steps(self, steps: range) -> Iterator[int]:
        """The steps to take, those of the `profile` traced."""
        return self._profile.over(steps, say=self.say, paused=self.paused)

    def waiting(self) -> AbstractContextManager[None]:
        """Within it the next batch is awaited."""
        return self._speed.waiting()

    def paused(self) -> AbstractContextManager[None]:
        """Within it the run is saved or scored, which counts as no step's time."""
        return self._speed.paused()

    def say(self, text: str) -> None:
        """Print a line, on rank 0."""
        self._progress.say(text)

    def step(
        self,
        step: int,
        numbers: Mapping[str, float],
        *,
        lr: float,
        logit_scale: torch.Tensor,
        keys: Sequence[str],
    ) -> None:
        """Take in a finished step.

        Args:
            numbers: "loss", its terms and "grad_norm".
            logit_scale: (), read from the device only when it is logged.
            keys: the batch's samples.
        """
        terms = {name: value for name, value in numbers.items() if name != "grad_norm"}
        self._progress.show(step, terms | {"lr": lr}, self._speed.pairs_per_second(step))
        if self._loggers and (step == self._progress.total or due(step, self._every)):
            found = {**numbers, "lr": lr, "logit_scale": logit_scale.item(), "seconds": self.seconds}
            found |= self._speed.entry(step)
            self._loggers.log(step, {f"train/{name}": value for name, value in found.items()})
        self._spikes.see(step, numbers["loss"], keys, self._progress)

    def finite(
        self, step: int, terms: Mapping[str, torch.Tensor], keys: Sequence[str]
    ) -> dict[str, float] | None:
        """A step's terms as numbers, before the weights change; None for a step that is to be left out.

        Every rank has the same loss and the same averaged gradient, so all of them stop or leave it out, or none.

        Args:
            terms: () tensors, "loss" and "grad_norm" among them.
            keys: the batch's samples.

        Raises:
            RuntimeError: the loss or its gradient is not finite, and no further step may be left out; the batch's keys
                are on record.
        """
        # One copy from the device for all of them.
        values = torch.stack([value.detach().float() for value in terms.values()]).tolist()
        numbers = dict(zip(terms, values, strict=True))
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
        if not bad:
            return numbers
        path = self._run_dir / f"nonfinite_step_{step}{of_rank()}.json"
        try:
            write_json(
                path, {"terms": {name: str(value) for name, value in numbers.items()}, "keys": list(keys)}
            )
            where = f"the batch's keys are in {path}"
        except OSError as error:
            where = f"the batch's keys could not be written to {path} ({error})"
        what = f"the {' and the '.join(bad)} is not finite at step {step} ({numbers}); the weights are unchanged and {where}"
        if len(self.skipped) < self._may_skip:
            self.skipped.append(step)
            if self._loggers:
                self._loggers.log(step, {"train/skipped_steps": len(self.skipped)})
            self.say(
                f"warning: {what}. The step is left out, {len(self.skipped)} of skip_nonfinite={self._may_skip}"
            )
            return None
        raise RuntimeError(
            f"{what}. The same command goes on from the last checkpoint and comes here again; so add to it "
            f"skip_nonfinite={self._may_skip + 1} to leave this step out, or amend={{optim.lr: ...}} (also clip_grad_norm, "
            "precision, max_logit_scale) to go on with other values"
        )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log {"task/metric": value}; the last step's table is the program's to print."""
        if self._loggers and metrics:
            self._loggers.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        if metrics and step < self._progress.total:
            self._progress.say(f"step {step} evaluation\n{table(metrics)}")

    def last_evaluation(self, step: int, about: Mapping[str, Any]) -> None:
        """Keep what the numbers after the last step rest on, in RUN/evaluation.json."""
        if rank() == 0:
            try:
                write_json(self._run_dir / "evaluation.json", {"step": step, **about})
            except OSError as error:
                self._progress.say(f"warning: evaluation.json could not be written: {error}")

    def samples(self, step: int, batch: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Hand the first pairs of rank 0's batch, as the model saw them, to the loggers that show some.

        Args:
            batch: {"image": (B, 3, H, W) uint8, augmented, "text": (B, L) ids}.
        """
        wanted = self._loggers.samples if self._loggers else 0
        if not self._loggers or not wanted or "image" not in batch:
            return
        captions = [tokenizer.decode(ids) for ids in batch["text"][:wanted].tolist()]
        self._loggers.log_samples(step, batch["image"][:wanted].cpu(), captions)

    @property
    def seconds(self) -> float:
        """Since training began, in this session."""
        return time.monotonic() - self._started

    def close(self) -> None:
        self._progress.close()
        if self._loggers:
            self._loggers.close()


def due(step: int, every: int) -> bool:
    """Whether something happens after this step that happens every so many; 0: never."""
    return every > 0 and step % every == 0


def of_rank() -> str:
    """What the name of a file ends in that each rank writes for its share of the batch; nothing on rank 0."""
    return f"_rank_{rank()}" if rank() else ""


class SpikeRecord:
    """Steps whose loss stands out, with the keys of their samples: RUN/loss_spikes.jsonl, a file a rank.

    Args:
        factor: a spike is a loss above `factor` times the median of the 100 steps before; None: nothing is
            recorded.
    """

    def __init__(self, run_dir: Path, factor: float | None):
        self.path, self.factor = run_dir / f"loss_spikes{of_rank()}.jsonl", factor
        self.recent: deque[float] = deque(maxlen=100)

    def see(self, step: int, loss: float, keys: Sequence[str], progress: Progress) -> None:
        """Take in a step's loss; the first 20 of a session are never spikes."""
        usual = statistics.median(self.recent) if len(self.recent) >= 20 else math.inf
        self.recent.append(loss)
        if self.factor is None or loss <= self.factor * usual:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"step": step, "loss": loss, "median": usual, "keys": list(keys)}) + "\n"
                )
        except OSError as error:
            progress.say(f"warning: the loss spike at step {step} could not be recorded: {error}")
            return
        progress.say(
            f"loss spike at step {step}: {loss:.4g}, {loss / usual:.1f} times the median before; its samples' "
            f"keys are in {self.path}"
        )
